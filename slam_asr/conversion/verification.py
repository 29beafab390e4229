"""Verifies a converted model: it must compute what the checkpoint computes.

All written weights are read back and compared one by one with those of the checkpoint. Then both are put into
the same LLM, one after the other, if the LLM fits in memory. They must give the same loss, bit for bit, on a
probe of three utterances. The converter has no corpus, so the probe's encoder outputs are random numbers and
its texts are made up. The loss on the probe is therefore large and says nothing about the model's quality. A
trained encoder does not take part in the probe.

An LLM that is written without a projector is an exception: it is loaded by itself, and its loss may differ by
`MERGED_TOLERANCE`, because its weights were rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedModel

from slam_asr.artifacts.model_folder import (
    CONFIG,
    ENCODER,
    LLM,
    projector_from_weights,
    read_adapter,
    read_config,
    read_projector,
)
from slam_asr.config.recipe import Recipe
from slam_asr.conversion.huggingface_folder import read_trained
from slam_asr.conversion.parts import Parts, by_part
from slam_asr.conversion.slam_llm import FILE, from_slam_llm
from slam_asr.errors import ModelError
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import SpeechProjector, positions_of
from slam_asr.pretrained.lazy_tensors import LazyTensors, lazy_tensors
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.locate import locate_model
from slam_asr.pretrained.unpickle import read_pickle
from slam_asr.runtime.machine import host_memory

UTTERANCES = ((110, "the first of three utterances"), (61, "a second one"), (85, "and the last of them"))
"""The utterances of the probe: for each, its number of encoder frames and its answer."""
ON_PROBE = "on random audio"
"""Qualifies the loss in summaries: the loss on random audio is far higher than that on speech."""
FP32_LLM_BYTES = 2e9
"""Bytes of an LLM's weight files below which its loss is computed in fp32; for larger LLMs, in bf16."""
MERGED_TOLERANCE = {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.005}
"""Relative change of the loss that rounding a merged LLM to its precision may cause. The value for bf16 also
applies to a large LLM, whatever its precision, because its loss is computed in bf16."""
MEMORY_SHARE = 0.6
"""Share of this machine's available memory that the LLM may take; for a larger LLM no loss is computed."""


@dataclass
class TrainedWeights:
    """The trained weights of projector and LLM."""

    projector: SpeechProjector
    """In float32."""
    llm: Mapping[str, torch.Tensor]
    """LoRA's weights, or all weights of a fully trained LLM, keyed by name in the LLM; empty if the LLM is
    frozen."""


def verify(folder: Path, parts: Parts, to: str, half: bool) -> str:
    """Compare the written files with the weights that were read; if they differ, invalidate the result.

    Args:
        folder: folder of the result.
        parts: the checkpoint's weights.
        to: the format: `model`, `huggingface`, `slam-llm` or `llm`.
        half: whether projector and adapter were written in bf16.

    Returns:
        A clause for the stage's summary that states what was compared.

    Raises:
        ModelError: a weight or a loss differs.
    """
    recipe = parts.recipe

    def rounded(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The weights are rounded as in the written file, so that the comparison can be exact.
        return {name: t.bfloat16().float() if half else t.float() for name, t in weights.items()}

    weights = rounded(parts.projector.state_dict())
    projector = projector_from_weights(weights, recipe.projector, *parts.widths, parts.where)
    before = TrainedWeights(projector, rounded(parts.llm) if parts.adapter else parts.llm)
    try:
        if to == "llm":
            return _compare_merged_loss(folder, parts, before)
        if parts.encoder:
            _require_encoder(folder / ENCODER, parts)
        return _compare_written_loss(str(folder), parts, before, _read_back(folder, parts, to))
    except BaseException:
        # Without this file, nothing loads the folder as a model. For `huggingface` and `llm`, it is
        # transformers' own config.json, which has the same name as ours.
        (folder / (FILE if to == "slam-llm" else CONFIG)).unlink(missing_ok=True)
        raise


def _compare_written_loss(where: str, parts: Parts, before: TrainedWeights, written: TrainedWeights) -> str:
    """Require that the written weights, and the loss that they give, equal the checkpoint's bit for bit.

    Args:
        where: the written folder, for error messages.
        parts: gives the recipe and the widths.
        before: the checkpoint's weights. Those of the projector and of an adapter are already rounded to the
            precision of the written file; those of a fully trained LLM are rounded here.
        written: the written weights.

    Raises:
        ModelError: weights or losses differ.
    """

    # A fully trained LLM is written in the training's precision, with each tied weight once. The checkpoint's
    # weights are in fp32, and a tied weight is there under each of its names.
    def as_written(name: str) -> torch.Tensor:
        return before.llm[name].to(written.llm[name].dtype)

    llm = before.llm
    if parts.recipe.llm.tuning != "lora":
        llm = LazyTensors({name: partial(as_written, name) for name in llm if name in written.llm})
    _require_equal(before.projector.state_dict(), written.projector.state_dict(), where)
    _require_equal(llm, written.llm, where)
    llm_folder = locate_model(parts.recipe.llm.name)
    if not _fits_into_memory(llm_folder):
        return (
            "same weights before and after; no loss was compared, because the LLM does not fit in this "
            "machine's memory"
        )
    models = [TrainedWeights(before.projector, llm), written]
    (expected, actual), tokens = _probe_losses(parts.recipe, llm_folder, parts.widths[0], models)
    # The sums are compared, not the means: a division could round two different losses to the same number.
    if expected != actual:
        raise ModelError(_difference(where, expected / tokens, actual / tokens))
    return f"loss {expected / tokens:.4f} per token {ON_PROBE}, the same before and after"


def _compare_merged_loss(folder: Path, parts: Parts, before: TrainedWeights) -> str:
    """Compare the loss of a written LLM with that of the base LLM that has the checkpoint's weights in it.

    Args:
        folder: folder of the written LLM, with the LoRA adapter, if any, merged into it.
        parts: gives the recipe and the widths.
        before: the checkpoint's weights.

    Raises:
        ModelError: the losses differ by more than rounding to the written precision can explain.
    """
    recipe, width, llm_folder = parts.recipe, parts.widths[0], locate_model(parts.recipe.llm.name)
    if not _fits_into_memory(llm_folder):
        return "no loss was compared, because the LLM does not fit in this machine's memory"
    [expected], tokens = _probe_losses(recipe, llm_folder, width, [before])
    frozen = replace(recipe, llm=replace(recipe.llm, tuning="frozen"))
    [actual], _ = _probe_losses(frozen, folder, width, [TrainedWeights(before.projector, {})])
    # The loss of a large LLM is computed in bf16, which has the largest tolerance of all precisions.
    precision = recipe.training.precision if _weight_bytes(llm_folder) < FP32_LLM_BYTES else "bf16"
    if abs(actual - expected) > MERGED_TOLERANCE[precision] * abs(expected):
        raise ModelError(_difference(str(folder), expected / tokens, actual / tokens))
    return f"loss {expected / tokens:.4f} per token before and {actual / tokens:.4f} after, {ON_PROBE}"


def _difference(where: str, expected: float, actual: float) -> str:
    return (
        f"{where} is not what the checkpoint holds: the loss on {len(UTTERANCES)} utterances is "
        f"{actual:.9g} per token, not {expected:.9g}. Nothing is published; please report this."
    )


@torch.inference_mode()
def _probe_losses(
    recipe: Recipe, llm_folder: Path, encoder_width: int, models: list[TrainedWeights]
) -> tuple[list[float], int]:
    """Compute the loss on the probe with each model's weights, one after the other in the same LLM.

    Args:
        recipe: the training's recipe, which decides on LoRA, prompt and downsampling.
        llm_folder: folder of the LLM. The weights of `models` replace its own weights of the same names.
        encoder_width: values per frame.
        models: the trained weights.

    Returns:
        For each of `models`, the cross-entropy summed over all target tokens, in nats; and the number of
        target tokens.
    """
    from slam_asr.models.answer_loss import IGNORED, score_answers
    from slam_asr.models.batch import Row, collate
    from slam_asr.models.llm import add_lora, load_llm, load_tokenizer
    from slam_asr.models.prompt import Prompt
    from slam_asr.models.slam import Slam

    trust = recipe.llm.trust_remote_code
    dtype = torch.float32 if _weight_bytes(llm_folder) < FP32_LLM_BYTES else torch.bfloat16
    llm = load_llm(llm_folder, dtype, trust_remote_code=trust).eval()
    if recipe.llm.tuning == "lora":
        add_lora(llm, recipe.llm.lora, seed=0)
    prompt = Prompt(load_tokenizer(llm_folder, trust), recipe.llm)
    generator = torch.Generator().manual_seed(0)
    rows = [
        Row(
            torch.randn(n, encoder_width, generator=generator),
            positions_of(recipe.projector, n),
            prompt.main.before,
            *prompt.with_answer(prompt.main, text),
        )
        for n, text in UTTERANCES
    ]
    batch = collate(rows)
    losses = []
    for model in models:
        # All models have weights of the same names in the LLM, so each model replaces the previous weights.
        _overwrite(llm, model.llm)
        # `eval` is needed, because an adapter's dropout would change the loss at random.
        scores = score_answers(Slam(model.projector.to(llm.dtype), llm).eval()(batch), batch.labels)
        losses.append(float(scores.loss))
        # `to` converted the caller's projector in place.
        model.projector.float()
    return losses, int((batch.labels != IGNORED).sum())


def _overwrite(llm: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Replace some of the LLM's weights in place. The conversion has checked that the LLM has these names."""
    # The tensors of `state_dict` share their memory with the LLM's weights.
    llm_weights = llm.state_dict()
    for name, tensor in weights.items():
        llm_weights[name].copy_(tensor)


def _read_back(folder: Path, parts: Parts, to: str) -> TrainedWeights:
    """Read the trained weights from the files that a conversion wrote.

    Raises:
        ModelError: the result cannot be read.
    """
    recipe = parts.recipe
    tuned = lazy_tensors(sorted((folder / LLM).glob("*.safetensors")))
    if to == "model":
        return TrainedWeights(read_projector(folder, read_config(folder)), read_adapter(folder) or tuned)
    where = str(folder / FILE if to == "slam-llm" else folder)
    weights = by_part(
        from_slam_llm(read_pickle(folder / FILE), where) if to == "slam-llm" else read_trained(folder)
    )
    projector = projector_from_weights(weights["projector"], recipe.projector, *parts.widths, where)
    # In a folder for transformers, `llm/` may also be a copy of the base LLM.
    return TrainedWeights(projector, tuned if recipe.llm.tuning == "full" else weights["llm"])


def _require_encoder(folder: Path, parts: Parts) -> None:
    """Require that the written encoder has the checkpoint's weights, rounded to the training's precision.

    Raises:
        ModelError: a weight differs, or is missing in one of the two.
    """
    spec = describe_encoder(replace(parts.recipe.encoder, name=str(folder)))
    dtype = DTYPES[parts.recipe.training.precision]
    written = dict(spec.encoder_of(load_weights(AutoModel, folder, dtype, "encoder")).named_parameters())
    _require_equal({name: t.to(dtype) for name, t in parts.encoder.items()}, written, str(folder))


def _require_equal(
    expected: Mapping[str, torch.Tensor], written: Mapping[str, torch.Tensor], where: str
) -> None:
    names = sorted(expected.keys() | written.keys())
    differing = [
        name
        for name in names
        if name not in expected or name not in written or not torch.equal(expected[name], written[name])
    ]
    if differing:
        raise ModelError(
            f"{where} is not what the checkpoint holds: {len(differing)} of {len(names)} weights differ, "
            f"first {differing[0]}. Nothing is published; please report this."
        )


def _fits_into_memory(llm_folder: Path) -> bool:
    """Return whether the LLM may be loaded. A machine whose memory is not known is assumed to have enough."""
    return _weight_bytes(llm_folder) <= MEMORY_SHARE * (host_memory() or float("inf"))


def _weight_bytes(folder: Path) -> int:
    """Return the size of an LLM's weight files in bytes; they are safetensors or pickles."""
    return sum(f.stat().st_size for kind in ("*.safetensors", "*.bin") for f in folder.glob(kind))
