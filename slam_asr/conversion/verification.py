"""Verifies a converted model: it must compute what the checkpoint computes.

All written weights are read back and compared one by one with those of the checkpoint. Then both are put into
the same LLM, one after the other, if the LLM fits in memory. They must give the same loss, bit for bit, on a
probe of three utterances. The converter has no corpus, so the probe's encoder outputs are random numbers and
its texts are made up. The loss on the probe is therefore large and says nothing about the model's quality. A
trained encoder does not take part in the probe.

An LLM that is written without a projector is an exception: it is loaded by itself, and its loss may differ by
`MERGED_TOLERANCE`, because its weights were rounded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModel

from slam_asr.artifacts.model_folder import (
    ENCODER,
    LLM,
    projector_from_weights,
    read_adapter,
    read_config,
    read_projector,
)
from slam_asr.config.recipe import Recipe
from slam_asr.conversion.huggingface_folder import read_trained
from slam_asr.conversion.slam_llm import FILE, from_slam_llm
from slam_asr.errors import ModelError
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import SpeechProjector, positions_of
from slam_asr.pretrained.lazy_tensors import LazyTensors, lazy_tensors
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.unpickle import read_pickle
from slam_asr.runtime.machine import host_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


@dataclass(frozen=True)
class ProbeLoss:
    """The loss on the probe."""

    total: float
    """Cross-entropy summed over all target tokens, in nats."""
    tokens: int
    """Number of target tokens."""

    @property
    def mean(self) -> float:
        """Cross-entropy per target token: the unit in which training logs its loss."""
        return self.total / self.tokens


def compare_written_loss(
    recipe: Recipe,
    llm_folder: Path,
    encoder_width: int,
    before: TrainedWeights,
    after: Callable[[], TrainedWeights],
    where: str,
) -> str:
    """Require that the written weights, and the loss that they give, equal the checkpoint's bit for bit.

    Args:
        recipe: the training's recipe.
        llm_folder: the base LLM's folder.
        encoder_width: values per frame.
        before: the checkpoint's weights. Those of the projector and of an adapter are already rounded to the
            precision of the written file; those of a fully trained LLM are rounded here.
        after: reads the written weights.
        where: the written folder, for error messages.

    Returns:
        A clause for the stage's summary that states what was compared.

    Raises:
        ModelError: weights or losses differ.
    """
    written = after()
    # A fully trained LLM is written in the training's precision, with each tied weight once. The checkpoint's
    # weights are in fp32, and a tied weight is there under each of its names.
    llm = before.llm
    if recipe.llm.tuning != "lora":
        names = [name for name in before.llm if name in written.llm]
        llm = LazyTensors({name: partial(_as_written, before.llm, written.llm, name) for name in names})
    _require_equal(before.projector.state_dict(), written.projector.state_dict(), where)
    _require_equal(llm, written.llm, where)
    if not _fits_into_memory(llm_folder):
        return (
            "same weights before and after; no loss was compared, because the LLM does not fit in this "
            "machine's memory"
        )
    expected, actual = _probe_losses(
        recipe, llm_folder, encoder_width, [TrainedWeights(before.projector, llm), written]
    )
    # The sums are compared, not the means: a division could round two different losses to the same number.
    if expected.total != actual.total:
        raise ModelError(_difference(where, expected, actual))
    return f"loss {expected.mean:.4f} per token {ON_PROBE}, the same before and after"


def compare_merged_loss(
    recipe: Recipe, llm_folder: Path, encoder_width: int, before: TrainedWeights, folder: Path
) -> str:
    """Compare the loss of a written LLM with that of the base LLM that has the checkpoint's weights in it.

    Args:
        recipe: the training's recipe.
        llm_folder: the base LLM's folder.
        encoder_width: values per frame.
        before: the checkpoint's weights.
        folder: folder of the written LLM, with the LoRA adapter, if any, merged into it.

    Returns:
        A clause for the stage's summary that states what was compared.

    Raises:
        ModelError: the losses differ by more than rounding to the written precision can explain.
    """
    if not _fits_into_memory(llm_folder):
        return "no loss was compared, because the LLM does not fit in this machine's memory"
    [expected] = _probe_losses(recipe, llm_folder, encoder_width, [before])
    frozen = replace(recipe, llm=replace(recipe.llm, tuning="frozen"))
    [actual] = _probe_losses(frozen, folder, encoder_width, [TrainedWeights(before.projector, {})])
    tolerance = max(
        MERGED_TOLERANCE[recipe.training.precision],
        0 if _weight_bytes(llm_folder) < FP32_LLM_BYTES else MERGED_TOLERANCE["bf16"],
    )
    if abs(actual.total - expected.total) > tolerance * abs(expected.total):
        raise ModelError(_difference(str(folder), expected, actual))
    return f"loss {expected.mean:.4f} per token before and {actual.mean:.4f} after, {ON_PROBE}"


def _as_written(
    before: Mapping[str, torch.Tensor], written: Mapping[str, torch.Tensor], name: str
) -> torch.Tensor:
    return before[name].to(written[name].dtype)


def _difference(where: str, expected: ProbeLoss, actual: ProbeLoss) -> str:
    return (
        f"{where} is not what the checkpoint holds: the loss on {len(UTTERANCES)} utterances is "
        f"{actual.mean:.9g} per token, not {expected.mean:.9g}. Nothing is published; please report this."
    )


@torch.inference_mode()
def _probe_losses(
    recipe: Recipe, llm_folder: Path, encoder_width: int, models: list[TrainedWeights]
) -> list[ProbeLoss]:
    """Compute the loss on the probe with each model's weights, one after the other in the same LLM.

    Args:
        recipe: the training's recipe, which decides on LoRA, prompt and downsampling.
        llm_folder: folder of the LLM. The weights of `models` replace its own weights of the same names.
        encoder_width: values per frame.
        models: the trained weights.

    Returns:
        One loss for each of `models`, in the same order.
    """
    from slam_asr.models.answer_loss import score_answers
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
        losses.append(ProbeLoss(float(scores.loss), int(scores.sums[2])))
        # `to` converted the caller's projector in place.
        model.projector.float()
    return losses


def _overwrite(llm: "PreTrainedModel", weights: Mapping[str, torch.Tensor]) -> None:
    """Replace some of the LLM's weights in place."""
    # The tensors of `state_dict` share their memory with the LLM's weights.
    llm_weights = llm.state_dict()
    unknown = weights.keys() - llm_weights.keys()
    if unknown:
        raise ModelError(
            f"The LLM has no weight {min(unknown)}, which the checkpoint contains: "
            "the checkpoint belongs to another LLM."
        )
    for name, tensor in weights.items():
        llm_weights[name].copy_(tensor)


def read_back(folder: Path, recipe: Recipe, widths: tuple[int, int], to: str) -> TrainedWeights:
    """Read the trained weights from the files that a conversion wrote.

    Args:
        folder: folder of the model, or of SLAM-LLM's model.pt.
        recipe: the training's recipe.
        widths: width of an encoder frame and of an LLM position, in values.
        to: the format: `model`, `slam-llm` or `huggingface`.

    Raises:
        ModelError: the result cannot be read.
    """
    if to == "slam-llm":
        weights = from_slam_llm(read_pickle(folder / FILE), str(folder / FILE))
        projector, llm = (
            {n.removeprefix(part): t for n, t in weights.items() if n.startswith(part)}
            for part in ("projector.", "llm.")
        )
        return TrainedWeights(
            projector_from_weights(projector, recipe.projector, *widths, str(folder / FILE)), llm
        )
    if to == "huggingface":
        trained, llm_weights = read_trained(folder, recipe.llm.tuning)
        return TrainedWeights(
            projector_from_weights(trained, recipe.projector, *widths, str(folder)), llm_weights
        )
    # Without an adapter, `llm/` holds a fully trained LLM. If it does not exist, the LLM is frozen.
    return TrainedWeights(
        read_projector(folder, read_config(folder)),
        read_adapter(folder) or lazy_tensors(sorted((folder / LLM).glob("*.safetensors"))),
    )


def require_encoder(folder: Path, weights: Mapping[str, torch.Tensor], recipe: Recipe) -> None:
    """Require that the written encoder has the checkpoint's weights, rounded to the training's precision.

    Args:
        folder: the written model's folder.
        weights: the checkpoint's weights of the encoder, keyed by name in `SpeechEncoder`.
        recipe: the training's recipe.

    Raises:
        ModelError: a weight differs, or is missing in one of the two.
    """
    from slam_asr.models.encoders.registry import describe_encoder

    spec = describe_encoder(replace(recipe.encoder, name=str(folder / ENCODER)))
    dtype = DTYPES[recipe.training.precision]
    model = load_weights(AutoModel, spec.folder, dtype, "encoder")
    written = dict(spec.encoder_of(model).named_parameters())
    expected = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in weights.items()}
    _require_equal(expected, written, str(folder / ENCODER))


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
