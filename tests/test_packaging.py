"""What is sent out: the image, the Procfile, the requirements, and what CI runs."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import sys
from pathlib import Path

from tests.support import PROMPT, ROOT, served

PACKAGES = ("engine", "backends", "media", "serving")


def lines_of(name: str) -> list[str]:
    """The lines of a file without its comments."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


def dockerfile_instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions as (name, arguments), continued lines joined."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def dockerfile_copies() -> list[tuple[str, str]]:
    """(source, target) of every path that the Dockerfile copies out of the repository."""
    copies = [arguments for name, arguments in dockerfile_instructions() if name == "COPY"]
    ours = [arguments.split() for arguments in copies if not arguments.startswith("--from=")]
    return [(source, target) for *sources, target in ours for source in sources]


def ignored_by_docker(path: Path) -> bool:
    """Whether .dockerignore keeps a path of the repository out: its last pattern that matches the
    path, or a folder that it is in, decides."""
    is_ignored = False
    places = [path.as_posix(), *(folder.as_posix() for folder in path.parents)]
    for line in lines_of(".dockerignore"):
        pattern = re.escape(line.removeprefix("!"))
        pattern = pattern.replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, place) for place in places):
            is_ignored = not line.startswith("!")
    return is_ignored


def build_app_folder(folder: Path) -> None:
    """Puts into folder what the image has in its own of the app."""
    for source, target in dockerfile_copies():
        origin = ROOT / source
        for file in origin.rglob("*") if origin.is_dir() else [origin]:
            if file.is_file() and not ignored_by_docker(file.relative_to(ROOT)):
                place = folder / target / file.relative_to(origin if origin.is_dir() else ROOT)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)


def test_dockerfile_copies_only_what_exists() -> None:
    sources = [source for source, _ in dockerfile_copies()]
    assert "main.py" in sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_dockerignore_lets_through_what_the_dockerfile_copies() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    missing = [s for s, _ in dockerfile_copies() if f"!{s.rstrip('/')}" not in ignore]
    assert missing == []


def test_dockerfile_copies_all_that_the_service_needs(tmp_path: Path) -> None:
    """A forgotten package would not be missed here, where it lies beside main.py."""
    build_app_folder(tmp_path)
    assert {"train.py", "__pycache__"}.isdisjoint(file.name for file in tmp_path.rglob("*"))
    settings = {"MODEL_NAME": str(tmp_path / "gpt2-tales")}
    with served(folder=tmp_path, **settings) as service, service.client() as http:
        answer = http.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 2})
        page = http.get("/", headers={"Accept": "text/html"})
    assert (answer.status_code, answer.json()["model_name"]) == (200, "gpt2-tales")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")


def test_dockerfile_command_is_the_procfiles() -> None:
    web = (ROOT / "Procfile").read_text().removeprefix("web: ").strip()
    commands = [arguments for name, arguments in dockerfile_instructions() if name == "CMD"]
    assert [json.loads(command) for command in commands] == [["sh", "-c", f"exec {web}"]]


def test_dockerfile_serves_as_an_ordinary_user() -> None:
    users = [arguments for name, arguments in dockerfile_instructions() if name == "USER"]
    assert users == ["app"]


def test_procfile_serves_gpt2_unless_told_otherwise() -> None:
    lines = (ROOT / "Procfile").read_text().splitlines()
    assert len(lines) == 1
    assert re.fullmatch(
        r"web: .*MODEL_NAME=\$\{MODEL_NAME:-gpt2\} "
        r"uvicorn main:app --host 0\.0\.0\.0 --port \$PORT( --\S+( \d+)?)*",
        lines[0],
    )


def test_requirements_are_pinned_exactly() -> None:
    pin = re.compile(r"[\w.-]+(\[[\w,]+\])?==\d[\w.]*( ; .+)?")
    runtime = lines_of("requirements.txt")
    development = lines_of("requirements-dev.txt")
    ray = lines_of("requirements-ray.txt")
    media = lines_of("requirements-media.txt")
    assert development[0] == ray[0] == media[0] == "-r requirements.txt"
    lines = runtime + development[1:] + ray[1:] + media[1:]
    assert [line for line in lines if not pin.fullmatch(line)] == []


def test_requirements_name_every_import() -> None:
    lines = lines_of("requirements.txt") + lines_of("requirements-media.txt")
    names = {re.split(r"[=\[ ]", line)[0] for line in lines}
    distributions = importlib.metadata.packages_distributions()
    imported = set()
    packaged = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    for path in (*ROOT.glob("*.py"), *packaged):
        if path.name.startswith(
            ("test_", "bench", "ray_serve", "redis_counts")
        ):  # requirements of their own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    local = {path.stem for path in ROOT.glob("*.py")} | set(PACKAGES)
    unpinned = {
        module
        for module in imported - sys.stdlib_module_names - local
        if names.isdisjoint(
            name.lower().replace("_", "-") for name in distributions.get(module, [module])
        )
    }
    assert unpinned == set()


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    lines = script.read_text().splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    targets = {f"make test{part}" for part in ("", "-processors", "-clients", "-ray", "-media")}
    assert {"export CI=true", *targets} <= set(lines)
    assert "|| true" not in script.read_text()
    assert os.name == "nt" or os.access(script, os.X_OK)
