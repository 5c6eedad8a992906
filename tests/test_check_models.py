"""The ten architectures that are asked for most, as docs/models.md checks them."""

import re

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.forked import ROOT, run_python

MOST_USED = (
    "gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox",
    "opt",
)  # fmt: skip


def test_most_used_architectures_are_served_right() -> None:
    done = run_python("scripts/check_models.py", "--new-tokens=5", *MOST_USED)
    *lines, counts = done.stdout.splitlines()
    got = [f"{line[:9].strip()} {line[9:35].strip()}" for line in lines]
    assert got == [f"right {name}" for name in MOST_USED], done.stdout + done.stderr
    assert counts == "10 right, 0 refused, 0 WRONG, 0 left out"
    assert done.returncode == 0


def test_page_has_every_architecture_and_none_that_is_wrong() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    names = set(re.findall(r"^\| ([\w-]+)", page.partition("## The table")[2], re.MULTILINE))
    assert names >= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert "Wrong" not in page
