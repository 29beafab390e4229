"""`python -m pipelines`: run a pipeline on this machine, compile it, or submit it to a cluster."""

import importlib.util
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def _complaint() -> str | None:
    """Return what is wrong with the working folder or the interpreter, or None."""
    for package in ("pipelines", "components"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent.parent != CHECKOUT:
            return (
                "pipelines and components run from the checkout and are not installed: "
                f"cd {CHECKOUT} and use `python -m pipelines`."
            )
    for package in ("slam_asr", "kfp", "jsonargparse"):
        if importlib.util.find_spec(package) is None:
            return (
                f"{sys.executable} has no {package}: run `make install`, which sets up .venv with all "
                "required packages, and use .venv/bin/python."
            )
    return None


if __name__ == "__main__":
    complaint = _complaint()
    if complaint:
        sys.exit(f"slam-asr: error: {complaint}")
    # The import comes after the check, which explains a missing package better than an ImportError does.
    from pipelines.cli import main

    sys.exit(main())
