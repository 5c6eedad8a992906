# `llm` of Simon Willison; a model is a completion or a chat, as its entry says.
export LLM_USER_PATH=$PWD
cat > extra-openai-models.yaml <<END
- {model_id: tales, model_name: $MODEL, api_base: $ADDRESS/v1, completion: true}
- {model_id: teller, model_name: $MODEL, api_base: $ADDRESS/v1}
END
for model in tales teller; do
  for options in "" --no-stream; do
    test -n "$(venv/bin/llm -m $model $options -o max_tokens 8 -o seed 1 'Once upon a time')"
  done
done
venv/bin/llm --version
