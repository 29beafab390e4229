"""What the code of a stage imports, read from its source: nothing is run.

From a stage's own module on, every import of `slam_asr` is followed, those within functions too; what
is only for type checkers is left out. The command line is no part of it: it imports what it calls.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "slam_asr"


def third_party(modules: list[str]) -> dict[str, set[str]]:
    """Packages that do not come with Python, and which of our modules import each.

    Args:
        modules: where to start, such as `slam_asr.training.train`, or a file of the checkout.
    """
    seen: set[str] = set()
    found: dict[str, set[str]] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in seen or (path := _file(module)) is None:
            continue
        seen.add(module)
        for name in _imports(path):
            top = name.partition(".")[0]
            if top == PACKAGE:
                parts = name.split(".")
                waiting += [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
            elif top not in sys.stdlib_module_names:
                found.setdefault(top, set()).add(module)
    return found


def _file(module: str) -> Path | None:
    base = ROOT / module if module.endswith(".py") else ROOT.joinpath(*module.split("."))
    return next((p for p in (base, base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checkers = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names
