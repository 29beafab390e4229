"""Write the lock files: every package that slam-asr needs, at the version installed here.

    pip install -e '.[pipelines,small-models,test]' 'torch==2.13.0' 'kfp==2.17.0'
    python requirements/lock.py

Run it with a Python where all of that is installed, and the tests have passed. kfp 2.17.0 and not
2.17.3: the same code, but the later one asks for a certifi that not every index has yet. torch's
local version (`+cpu`) is dropped, so that one lock serves CPU and GPU builds.
"""

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
LAYERS = {
    "stages.txt": ("What the stages need, and what builds the package.", ["slam-asr[small-models]", "setuptools"], None),
    "run.txt": ("The stages and the pipelines that run them.", ["slam-asr[pipelines]"], "stages.txt"),
    "test.txt": ("All of that, and the tests.", ["slam-asr[test]"], "run.txt"),
}
"""Each file's purpose, the requirements that it closes over, and the file that it builds on."""


def closure(requirement: Requirement, seen: set[tuple[str, str]]) -> None:
    """Add (name, extra) of `requirement` and of all that it needs here to `seen`."""
    for extra in ("", *requirement.extras):
        key = (canonicalize_name(requirement.name), extra)
        if key in seen:
            continue
        seen.add(key)
        for text in distribution(requirement.name).requires or []:
            inner = Requirement(text)
            wanted = inner.marker is None or inner.marker.evaluate({"extra": extra})
            if wanted and (extra == "" or "extra" in str(inner.marker)):
                closure(inner, seen)


def main() -> None:
    """Write all lock files."""
    locked: set[str] = {"slam-asr"}
    for file, (purpose, roots, base) in LAYERS.items():
        seen: set[tuple[str, str]] = set()
        for root in roots:
            closure(Requirement(root), seen)
        names = sorted({name for name, _ in seen} - locked)
        locked |= set(names)
        lines = [f"# {purpose} Written by requirements/lock.py; do not edit.", *([f"-r {base}"] if base else [])]
        lines += [f"{name}=={distribution(name).version.partition('+')[0]}" for name in names]
        (HERE / file).write_text("\n".join(lines) + "\n")
        print(f"{file}: {len(names)} packages")


if __name__ == "__main__":
    main()
