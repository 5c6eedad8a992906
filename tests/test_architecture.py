"""The arrows of docs/architecture.md: what imports what, read from the source files themselves."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support import ROOT

ROOMS = ("engine", "backends", "serving")
SOURCES = [
    *(ROOT / name for name in ("main.py", "models.py", "neutral_values.py", "ray_serve.py")),
    *(file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))),
]
TESTS = [ROOT / "test_main.py", *sorted((ROOT / "tests").rglob("*.py"))]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in SOURCES}


def imports(file: Path) -> set[str]:
    """The modules that a file imports, wherever in it; of this project's own the innermost ones."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{file} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            found |= inner or {node.module}
    return found


def rooms_of(modules: set[str]) -> set[str]:
    """Of this project's: rooms, and files outside of one."""
    return {module.partition(".")[0] for module in modules & MODULES}


@pytest.mark.parametrize(
    ("importer", "importable"),
    [
        ("engine", {"engine"}),
        ("backends", {"backends", "engine", "models"}),
        ("serving", {"serving", "backends", "engine", "models"}),
        ("models", {"neutral_values"}),
        ("neutral_values", set()),
        ("ray_serve", {"main", "serving"}),
    ],
)
def test_arrows_go_one_way(importer: str, importable: set[str]) -> None:
    files = [file for file in SOURCES if module_name(file).partition(".")[0] == importer]
    assert files
    for file in files:
        assert rooms_of(imports(file)) <= importable, file


def test_schemas_know_no_torch() -> None:
    for name in ("models.py", "neutral_values.py"):
        assert "torch" not in {each.partition(".")[0] for each in imports(ROOT / name)}


def test_ray_takes_from_the_service_only_the_app_and_the_wording_of_errors() -> None:
    assert imports(ROOT / "ray_serve.py") & MODULES == {"main", "serving.errors"}


def test_wording_of_errors_loads_no_torch() -> None:
    """The proxies of ray_serve.py import it, which have no room for more."""
    code = "import serving.errors, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_import_is_circular() -> None:
    graph = {module_name(file): imports(file) & MODULES for file in SOURCES}
    assert sum(map(len, graph.values())) > len(graph)
    TopologicalSorter(graph).prepare()  # a CycleError names the modules


def test_no_test_imports_another() -> None:
    for file in TESTS:
        names = {name.rpartition(".")[2] for name in imports(file)}
        assert not {name for name in names if name.startswith("test_")}, file


def test_nobody_asks_where_a_backend_is() -> None:
    """A route asks a backend, not for its class."""
    kinds = {"LocalBackend", "ExternalBackend"}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                asked = {getattr(each, "id", getattr(each, "attr", "")) for each in ast.walk(node)}
                assert asked.isdisjoint(kinds), f"{file}:{node.lineno}"
