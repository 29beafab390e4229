"""`slam-asr copy-models`: the frozen models once into a bucket, so that a cluster needs no way to the hub."""

from slam_asr.errors import UserError
from slam_asr.models.pretrained import locate_model
from slam_asr.progress import log_line
from slam_asr.recipe import Recipe
from slam_asr.storage import exists, is_s3, join, publish_folder

LAST = "config.json"
"""Without it a folder is no model, so it is written after all other files."""


def copy_models(to: str, recipe: Recipe | None = None, models: list[str] | None = None) -> list[str]:
    """Copy models, or those of a recipe, to object storage.

    Args:
        to: s3:// prefix; a model lies below it under its name on the hub.
        recipe: its encoder and LLM are copied.
        models: names on the hub or folders.

    Returns:
        Where each lies: what a recipe may name instead (`llm.name: s3://…`).

    Raises:
        UserError: no model is named, or one cannot be had.
    """
    names = [*([recipe.encoder.name, recipe.llm.name] if recipe else []), *(models or [])]
    if not is_s3(to):
        raise UserError(f"--to is {to}: give an s3:// prefix, such as s3://bucket/models.")
    if not names:
        raise UserError("No model is named: give a recipe, or --models '[openai/whisper-tiny.en]'.")
    return [_copy(name, to) for name in dict.fromkeys(names) if not is_s3(name)]


def _copy(name: str, to: str) -> str:
    parts = name.strip("/").split("/")
    target = join(to, *(parts if len(parts) == 2 and not name.startswith(("/", ".")) else parts[-1:]))
    if exists(join(target, LAST)):
        log_line(f"{name}: there already ({target})")
        return target
    log_line(f"{name}: copying to {target}")
    publish_folder(locate_model(name), target, last=LAST)
    log_line(f"{name}: copied to {target}")
    return target
