"""Compile the pipeline and each component to YAML: the same bytes from the same source."""

from pathlib import Path

from kfp.compiler import Compiler

from components.build_manifest.component import build_manifest
from components.convert_checkpoint.component import convert_checkpoint
from components.decode.component import decode
from components.extract_features.component import extract_features
from components.train.component import train
from pipelines.asr import asr

COMPONENTS = (build_manifest, extract_features, train, convert_checkpoint, decode)


def compile_all(output: Path) -> list[Path]:
    """Write `asr.yaml` and `components/*.yaml` below `output`, or the pipeline alone to a file `*.yaml`.

    Returns:
        The files written.
    """
    if output.suffix in (".yaml", ".yml"):
        return [_compile(asr, output)]
    written = [_compile(asr, output / "asr.yaml")]
    return written + [_compile(c, output / "components" / f"{c.name}.yaml") for c in COMPONENTS]


def _compile(source: object, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Compiler().compile(source, str(path))
    return path
