venv/bin/guidellm run --backend "kind=openai_http,target=$ADDRESS,model=$MODEL" \
  --tokenizer "kind=huggingface_auto,model=$FOLDER" \
  --data kind=synthetic_text,prompt_tokens=16,output_tokens=8 \
  --profile kind=concurrent,streams=4 --constraint kind=max_requests,count=12 \
  --output kind=json,path=benchmarks.json --disable-console-interactive
venv/bin/python - <<'END'
import json
from importlib.metadata import version

(benchmark,) = json.load(open("benchmarks.json"))["benchmarks"]
totals = benchmark["metrics"]["request_totals"]
assert (totals["successful"], totals["errored"]) == (12, 0), totals
print("guidellm", version("guidellm"))
END
