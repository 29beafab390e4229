"""`python -m pipelines compile`: the pipeline and each component as YAML, the same bytes from the same source."""

import os
from pathlib import Path

from components import DEFAULT_IMAGES, IMAGES_VARIABLE
from pipelines.cli import command_parser
from slam_asr.cli import parse_options
from slam_asr.storage import local_path


def compile_command(arguments: list[str]) -> int:
    """Compile, and print the files that were written → the exit code."""
    parser = command_parser("compile", "Write the pipeline and each component as YAML; the same source gives the same bytes.")
    parser.add_argument("--output", default="build/kfp", help="a folder, or a .yaml file for the pipeline alone")
    parser.add_argument(
        "--images", default=os.environ.get(IMAGES_VARIABLE) or DEFAULT_IMAGES,
        help=f"the steps' images, with {{stage}} and {{version}}; or set {IMAGES_VARIABLE}",
    )
    options = parse_options(parser, arguments)
    # kfp reads the images' names when the components are defined, that is, imported.
    os.environ[IMAGES_VARIABLE] = options["images"]
    for path in compile_all(local_path(options["output"])):
        print(path)
    return 0


def compile_all(output: Path) -> list[Path]:
    """Write `asr.yaml` and `components/*.yaml` below `output`, or the pipeline alone to a file `*.yaml`.

    Returns:
        The files written.
    """
    from components.build_manifest.component import build_manifest
    from components.convert_checkpoint.component import convert_checkpoint
    from components.decode.component import decode
    from components.extract_features.component import extract_features
    from components.train.component import train
    from pipelines.asr import asr

    if output.suffix in (".yaml", ".yml"):
        return [_compile(asr, output)]
    written = [_compile(asr, output / "asr.yaml")]
    components = (build_manifest, extract_features, train, convert_checkpoint, decode)
    return written + [_compile(c, output / "components" / f"{c.name}.yaml") for c in components]


def _compile(source: object, path: Path) -> Path:
    from kfp.compiler import Compiler

    path.parent.mkdir(parents=True, exist_ok=True)
    Compiler().compile(source, str(path))
    return path
