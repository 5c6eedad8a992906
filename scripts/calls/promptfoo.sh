cat > promptfooconfig.yaml <<END
prompts: ['Once upon a time there was {{who}}']
providers:
  - id: openai:completion:$MODEL
    config: &ours {apiBaseUrl: $ADDRESS/v1, apiKey: none, max_tokens: 8}
  - id: openai:chat:$MODEL
    config: *ours
tests:
  - vars: {who: a king}
    assert: [{type: javascript, value: output.trim().length > 0}]
END
export PROMPTFOO_DISABLE_TELEMETRY=1 PROMPTFOO_DISABLE_UPDATE=1 PROMPTFOO_CONFIG_DIR=$PWD
npx promptfoo eval --no-cache --no-table --no-write
echo "promptfoo $(npx promptfoo --version)"
