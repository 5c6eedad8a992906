# Scores the endings of one question, as its tasks of multiple choice do.
cat > tale.yaml <<'END'
task: tale
dataset_path: json
dataset_kwargs: {data_files: {test: tale.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{begins}}"
doc_to_choice: "{{ends}}"
doc_to_target: "{{best}}"
END
echo '{"begins": "Once upon a", "ends": ["time", "xylophone"], "best": 0}' > tale.json
venv/bin/lm_eval run --model local-completions --tasks tale --include_path . \
  --model_args "model=$MODEL,base_url=$ADDRESS/v1/completions,tokenizer_backend=remote,max_length=512" |
  tee result.txt
grep -q '|acc  .*|  *1|' result.txt
venv/bin/python -c "from importlib.metadata import version; print('lm-eval', version('lm-eval'))"
