"""`slam-asr copy-models`: copies pretrained models into a bucket, for clusters that cannot reach the hub."""

from slam_asr.config.recipe import Recipe
from slam_asr.errors import ConfigurationError
from slam_asr.pretrained.locate import locate_model
from slam_asr.progress import log_line
from slam_asr.storage import exists, is_s3, join, publish_folder, require_writable

LAST = "config.json"
"""The file that is copied last. A folder without it is not a model, so an interrupted copy is never used."""


def copy_models(to: str, recipe: Recipe | None = None, models: list[str] | None = None) -> list[str]:
    """Copy models to object storage.

    Args:
        to: an s3:// prefix. Below it, a copy has the model's name on the hub, or the last component of the
            folder's path. A relative path of two components, such as models/tiny, is used completely.
        recipe: a recipe whose encoder and LLM are copied.
        models: names on the hub, or folders. Models that are already in object storage are not copied.

    Returns:
        The address of each copy, which a recipe can use as the model's name (`llm.name: s3://…`).

    Raises:
        ConfigurationError: no model is named, or `to` is not an s3:// prefix.
        ModelError: a model cannot be found.
        StorageError: object storage cannot be read or written.
    """
    names = [*([recipe.encoder.name, recipe.llm.name] if recipe else []), *(models or [])]
    if not is_s3(to):
        raise ConfigurationError(f"--to is {to}: give an s3:// prefix, such as s3://bucket/models.")
    if not names:
        raise ConfigurationError("No model is named: give a recipe, or --models '[openai/whisper-tiny.en]'.")
    return [_copy(name, to) for name in dict.fromkeys(names) if not is_s3(name)]


def _copy(name: str, to: str) -> str:
    parts = name.strip("/").split("/")
    # A path of two components, such as `team/model`, may be a name on the hub, so it is used completely. Of
    # any other path, only the last component is used.
    target = join(to, *(parts if len(parts) == 2 and not name.startswith(("/", ".")) else parts[-1:]))
    if exists(join(target, LAST)):
        log_line(f"{name}: already at {target}")
        return target
    log_line(f"{name}: copying to {target}")
    require_writable(target)  # before a model of many GB is downloaded
    publish_folder(locate_model(name), target, last=LAST)
    log_line(f"{name}: copied to {target}")
    return target
