"""The command `slam-asr serve`: transcribes recordings that arrive over HTTP, with OpenAI's interface."""

import importlib.util
from functools import partial
from typing import TYPE_CHECKING

from slam_asr.artifacts.model_folder import CONFIG
from slam_asr.artifacts.shipped import default_model, language_of
from slam_asr.config.recipe import Recipe
from slam_asr.config.schema import problems
from slam_asr.errors import ConfigurationError
from slam_asr.progress import log_line
from slam_asr.serving.limits import Limits
from slam_asr.storage import name_of

if TYPE_CHECKING:
    from slam_asr.decoding.model import Model
    from slam_asr.decoding.transcriber import Transcriber

PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
"""Packages of the extra `serve`."""
DEFAULTS = Limits()


def serve(
    recipe: Recipe,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    names: list[str] | None = None,
    api_key_file: str | None = None,
    limits: Limits = DEFAULTS,
) -> None:
    """Serve a model over HTTP, with OpenAI's interface for transcriptions.

    Args:
        recipe: how to decode (its section `decoding`), and where the base models are (`encoder.name`,
            `llm.name`); on the command line, the recipe that the model was trained with, unless another is
            named.
        model: folder that convert-checkpoint wrote, or the name of a shipped model. By default, the best of
            the shipped models.
        host: address to listen on; 0.0.0.0 for all IPv4 addresses of this machine, :: for all addresses.
        port: port to listen on; 0 for any free port.
        names: names that clients may give for the model, such as whisper-1; by default, its folder's name.
        api_key_file: text file with the keys that clients must send, one per line. Without it, everyone who
            reaches the address may use the server.
        limits: how much the server accepts.

    Raises:
        ConfigurationError: the packages of the extra `serve` are not installed, the address or the file with
            keys cannot be used, or a limit is out of bounds (all raised before anything is loaded); or the
            recipe does not fit this machine or the model.
        ModelError: the model or a base model is missing or damaged, or a base model is not the one that the
            model was trained with.
    """
    if not 0 <= port <= 65535:
        raise ConfigurationError(f"--port is {port} but must be from 0 to 65535.")
    _check(limits)
    # Imported after the checks above, because torch and transformers take seconds.
    from slam_asr.decoding.model import open_model
    from slam_asr.serving.server import bind, is_loopback, run
    from slam_asr.serving.service import Served
    from slam_asr.serving.upload import Keys

    keys = Keys(api_key_file) if api_key_file else None
    listener = bind(host, port)
    if keys is None and not is_loopback(listener):
        log_line(
            f"warning: everyone who reaches {host} may use this server, because it has no --api-key-file"
        )
    model = model or default_model()
    opened = open_model(model, recipe)
    log_line(opened.describe(recipe.decoding.precision))
    served = Served(
        load=partial(_load, opened, recipe, limits),
        names=names or [name_of(model)],
        created=round((opened.folder / CONFIG).stat().st_mtime),
        language=language_of(opened.folder),
        stops=opened.prompt().stops,
        limits=limits,
        keys=keys,
    )
    run(served, listener)


def _check(limits: Limits) -> None:
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigurationError(
            f"slam-asr serve needs packages that are not installed ({', '.join(missing)}): run "
            "`pip install 'slam-asr[serve]'`."
        )
    for problem in problems(limits, "limits."):
        raise ConfigurationError(problem)


def _load(model: "Model", recipe: Recipe, limits: Limits) -> "Transcriber":
    """Load a model, and decode a second of noise, so that the first request takes no longer than others."""
    import numpy as np

    from slam_asr.audio import SAMPLE_RATE
    from slam_asr.decoding.transcriber import Transcriber

    transcriber = Transcriber(model, recipe, limits.segment)
    # Silence would have no pieces to decode.
    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE).astype(np.float32)
    transcriber.decode(transcriber.pieces(noise))
    return transcriber
