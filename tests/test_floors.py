"""The floors of `slam_asr`: no folder imports from a floor above its own, and no trade from another trade.

Imports inside functions count too. CONTRIBUTING.md explains the floors. Files and functions stay short.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "slam_asr"
TRADES = {
    "corpora",
    "features",
    "training",
    "conversion",
    "decoding",
    "serving",
    "scoring",
    "planning",
    "publishing",
    "trainjob",
    "notices",
}
FLOORS = (
    {"cli", "options", "__main__"},
    {"stages"},
    TRADES,
    {"artifacts"},
    {"models", "generation", "pretrained"},
    {
        "config",
        "storage",
        "runtime",
        "pages",
        "audio",
        "cores",
        "progress",
        "steps",
        "findings",
        "errors",
        "restart",
        "version",
        "__init__",
    },
)
"""Folders of each floor, from the top down. A module outside all folders counts as a folder."""

Imports = Mapping[str, set[str]]
"""The modules that each module imports."""


def imports_of(package: Path) -> Imports:
    """Read all imports of a package's own modules."""
    files = {_module(file, package): file for file in package.rglob("*.py")}
    return {module: set(_imported(file, files.keys())) - {module} for module, file in files.items()}


def _module(file: Path, package: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(file: Path, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules else node.module


def folder_of(module: str) -> str:
    """Return the folder of a module: `slam_asr.training.loop` → `training`."""
    return ([*module.split("."), "__init__"])[1]


def floor_of(folder: str) -> int:
    """Return the number of a folder's floor, counted from 0 at the top."""
    return next(number for number, folders in enumerate(FLOORS) if folder in folders)


def wrong_arrows(imports: Imports) -> list[str]:
    """Return imports that lead up, from one trade to another, or from one stage to another."""
    wrong = []
    for module, imported in imports.items():
        for other in imported:
            here, there = folder_of(module), folder_of(other)
            # The files of a trade may import each other; those of the stages must not.
            apart = TRADES if here != there else {"stages"}
            if floor_of(there) < floor_of(here) or (here in apart and there in apart):
                wrong.append(f"{module} → {other}")
    return sorted(wrong)


def circles(graph: Imports) -> list[list[str]]:
    """Return the sets of two or more nodes that reach each other, by Tarjan's algorithm."""
    found: list[list[str]] = []
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        path.append(node)
        for other in graph.get(node, ()):
            if other not in order:
                visit(other)
            if other in path:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == order[node]:
            members = path[path.index(node) :]
            del path[path.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in graph:
        if node not in order:
            visit(node)
    return found


def between_folders(imports: Imports) -> dict[str, set[str]]:
    """Return the other folders that each folder imports from."""
    folders: dict[str, set[str]] = {}
    for module, imported in imports.items():
        folders.setdefault(folder_of(module), set()).update(map(folder_of, imported))
    return {folder: others - {folder} for folder, others in folders.items()}


def test_every_folder_has_a_floor():
    for module in imports_of(PACKAGE):
        floor_of(folder_of(module))


def test_no_import_leads_up_or_from_one_trade_or_stage_to_another():
    assert wrong_arrows(imports_of(PACKAGE)) == []


def test_the_package_imports_neither_the_pipelines_nor_the_demo():
    outside = {"components", "pipelines", "demo", "tests", "benchmarks"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not outside & {name.partition(".")[0] for name in names}, file


def test_no_files_and_no_folders_import_each_other_in_a_circle():
    imports = imports_of(PACKAGE)
    assert circles(imports) == []
    assert circles(between_folders(imports)) == []


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        ("models/llm.py", "from slam_asr.stages import train", "slam_asr.models.llm → slam_asr.stages.train"),
        ("stages/score.py", "import slam_asr.cli", "slam_asr.stages.score → slam_asr.cli"),
        (
            "stages/score.py",
            "from slam_asr.stages.decode import decode",
            "slam_asr.stages.score → slam_asr.stages.decode",
        ),
        (
            "training/batches.py",
            "from slam_asr.decoding.model import Model",
            "slam_asr.training.batches → slam_asr.decoding.model",
        ),
    ],
)
def test_a_wrong_import_inside_a_function_is_found(tmp_path, file, line, problem):
    copy = tmp_path / "slam_asr"
    for source in PACKAGE.rglob("*.py"):
        target = copy / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    with open(copy / file, "a", encoding="utf-8") as text:
        text.write(f"\n\ndef late() -> None:\n    {line}\n")
    assert wrong_arrows(imports_of(copy)) == [problem]


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_importing_changes_no_global_state():
    """A module registers classes or filters warnings only inside the functions that need it."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            if is_call and file.name != "__main__.py":
                found.append(f"{file.relative_to(PACKAGE)}: {ast.unparse(node)}")
    assert found == []


def test_files_and_functions_are_short():
    """At most 350 lines per file, and 60 per function without its docstring."""
    found = []
    for folder in ("slam_asr", "components", "pipelines"):
        for file in (PACKAGE.parent / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            if (lines := len(text.splitlines())) > 350:
                found.append(f"{file}: {lines} lines")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    docstring = (ast.get_docstring(node, clean=False) or "").count("\n") + 1
                    if (lines := node.end_lineno - node.lineno + 1 - docstring) > 60:
                        found.append(f"{file}: {node.name} has {lines} lines")
    assert found == []
