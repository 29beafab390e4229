"""Find the third-party packages that a stage imports, by reading its source without running it.

The search starts at the stage's own module and follows every import of `slam_asr`, including imports in
functions, but not those for type checkers. It leaves out the command line, which imports only what it calls.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "slam_asr"


def third_party(modules: list[str]) -> dict[str, set[str]]:
    """Return the third-party packages that modules import, directly or through `slam_asr`.

    Args:
        modules: modules such as `slam_asr.stages.train`, or files of the checkout.

    Returns:
        The modules that import each package, by the package's name.
    """
    seen: set[str] = set()
    importers: dict[str, set[str]] = {}
    pending = list(modules)
    while pending:
        module = pending.pop()
        if module in seen or (path := _file(module)) is None:
            continue
        seen.add(module)
        for name in _imports(path):
            top = name.partition(".")[0]
            if top == PACKAGE:
                # Importing a module also runs every package that contains it.
                parts = name.split(".")
                pending += [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
            elif top not in sys.stdlib_module_names:
                importers.setdefault(top, set()).add(module)
    return importers


def _file(module: str) -> Path | None:
    base = ROOT / module if module.endswith(".py") else ROOT.joinpath(*module.split("."))
    return next((p for p in (base, base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_checking_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in type_checking_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # An imported name may itself be a module. If it is not, `_file` finds no file for it.
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names
