venv/bin/guidellm benchmark run --target "$ADDRESS" --model "$MODEL" --processor "$FOLDER" \
  --data prompt_tokens=16,output_tokens=8 --profile concurrent --rate 4 --max-requests 12 \
  --output-dir . --disable-console-interactive
venv/bin/python - <<'END'
import json
from importlib.metadata import version

(benchmark,) = json.load(open("benchmarks.json"))["benchmarks"]
totals = benchmark["metrics"]["request_totals"]
assert (totals["successful"], totals["errored"]) == (12, 0), totals
print("guidellm", version("guidellm"))
END
