"""The ten architectures that are asked for most, as docs/models.md checks them."""

import re
import subprocess
import sys

from tests.support import ROOT

MOST_USED = (
    "gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "phi3", "gpt_neox", "opt",
)  # fmt: skip


def test_most_used_architectures_are_served_right() -> None:
    command = [sys.executable, "scripts/check_models.py", *MOST_USED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert [line.split()[:2] for line in done.stdout.splitlines()[:-1]] == [
        ["right", name] for name in MOST_USED
    ], done.stdout + done.stderr
    assert done.returncode == 0


def test_page_has_every_architecture_and_none_that_is_wrong() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    names = set(re.findall(r"^\| ([\w-]+)", page.partition("## The table")[2], re.MULTILINE))
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert names >= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert "Wrong" not in page
