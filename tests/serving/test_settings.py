"""The settings are read once, refused in one line, and written down wherever one looks for them."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serving.settings import Settings
from tests.forked import run_python
from tests.support import ROOT


def start(**environment: str) -> subprocess.CompletedProcess[str]:
    """What a process that only imports the service prints. The log goes to standard output, in its
    own time."""
    code = "import main, sys; print(main.settings.model_dump_json(), file=sys.stderr)"
    return run_python("-c", code, **environment)


BAD_SETTINGS = [  # what one start can tell, a start each
    {
        "MAX_NUM_SEQS": ("0", "greater than or equal to 1"),
        "DTYPE": ("float64", "'auto', 'float32' or 'bfloat16'"),
        "RATE_LIMIT_STORAGE": ("nowhere://me:secret@host", "is neither memory:// nor redis://"),
    },
    {"MODEL_NAME": ("/no/such/folder", "cannot load")},
    {"FORBIDDEN_WORDS": ("two words", "allowed are letters")},
]


def test_settings_bad_value_stops_the_start() -> None:
    def start_with(bad: dict[str, tuple[str, str]]) -> subprocess.CompletedProcess[str]:
        return start(**{variable: bad[variable][0] for variable in bad})

    with ThreadPoolExecutor() as pool:
        for bad, stopped in zip(BAD_SETTINGS, pool.map(start_with, BAD_SETTINGS), strict=True):
            assert stopped.returncode == 1
            line = stopped.stderr.strip().splitlines()[-1]
            for variable, (_, allowed) in bad.items():
                assert variable in line
                assert allowed in line
            assert "Traceback" not in stopped.stderr
            assert "secret" not in stopped.stderr


def test_settings_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    environment = {"MODEL_NAME": "", "MAX_NUM_SEQS": "", "HF_HOME": str(tmp_path)}
    started = start(**environment, HF_HUB_OFFLINE="1")
    assert started.returncode == 0, started.stderr
    assert json.loads(started.stderr.splitlines()[-1])["max_num_seqs"] == 64
    assert "serving gpt2-tales, the small bundled model" in started.stdout


def test_settings_are_all_in_the_readme() -> None:
    rows = re.findall(r"^\| `([A-Z_0-9]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(rows) >= {name.upper() for name in Settings.model_fields}


def test_settings_are_all_in_the_example() -> None:
    names = re.findall(r"^#?\s?([A-Z_0-9]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert set(names) >= {name.upper() for name in Settings.model_fields}
    assert all(field.description for field in Settings.model_fields.values())
