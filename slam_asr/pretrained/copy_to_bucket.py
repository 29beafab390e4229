"""`slam-asr copy-models`: copies the frozen models into a bucket, for clusters that cannot reach the hub."""

from slam_asr.config.recipe import Recipe
from slam_asr.errors import ConfigurationError
from slam_asr.pretrained.locate import locate_model
from slam_asr.progress import log_line
from slam_asr.storage import exists, is_s3, join, publish_folder

LAST = "config.json"
"""A folder without this file is no model, so it is copied after all other files."""


def copy_models(to: str, recipe: Recipe | None = None, models: list[str] | None = None) -> list[str]:
    """Copy models to object storage.

    Args:
        to: s3:// prefix; each model is copied below it, under its name on the hub.
        recipe: its encoder and LLM are copied.
        models: names on the hub or folders.

    Returns:
        The address of each copy, which a recipe can use as the model's name (`llm.name: s3://…`).

    Raises:
        ConfigurationError: no model is named, or `to` is no s3:// prefix.
        ModelError: a model cannot be found.
    """
    names = [*([recipe.encoder.name, recipe.llm.name] if recipe else []), *(models or [])]
    if not is_s3(to):
        raise ConfigurationError(f"--to is {to}: give an s3:// prefix, such as s3://bucket/models.")
    if not names:
        raise ConfigurationError("No model is named: give a recipe, or --models '[openai/whisper-tiny.en]'.")
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
