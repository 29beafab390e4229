"""Before a converted model counts: it says what the checkpoint says.

What was read from the checkpoint and what was written are put into the same LLM, one after the other, and have to give the same loss, bit for bit, on a
few utterances. No corpus is at hand where models are converted, so their encoder outputs are drawn at random and their texts are made up: the loss means
nothing, but hangs on every weight of the projector and of what was trained of the LLM. A trained encoder, which hears none of it, is
compared weight by weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModel

from slam_asr.conversion.model import ENCODER, LLM, projector_with, read_adapter, read_config, read_projector
from slam_asr.conversion.slam_llm import FILE, from_slam_llm
from slam_asr.errors import UserError
from slam_asr.models.pickles import read_pickle
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import SpeechProjector, positions_of
from slam_asr.models.tensors import Tensors, stored_tensors
from slam_asr.models.weights import load_weights
from slam_asr.planning.memory_fit import host_memory
from slam_asr.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UTTERANCES = ((110, "the first of three utterances"), (61, "a second one"), (85, "and the last of them"))
"""Encoder frames and answer."""
SMALL = 2e9
"""Bytes of an LLM up to which the loss is computed in fp32."""
MERGED_WITHIN = {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.005}
"""Share of the loss that rounding an LLM to its precision may change; a large one is computed with in bf16 here, whatever it is written in."""
ROOM = 0.6
"""Share of this machine's memory that the LLM may take."""


@dataclass
class Trained:
    """What a training changed, as it is computed with."""

    projector: SpeechProjector
    """In float32."""
    llm: Mapping[str, torch.Tensor]
    """LoRA's weights, or the whole LLM's, by their names there; none of a frozen LLM."""


def loss_before_and_after(
    recipe: Recipe,
    llm_folder: Path,
    encoder_width: int,
    before: Trained,
    after: Callable[[], Trained],
    where: str,
) -> str:
    """Compare what was read with what was written.

    Args:
        recipe: by which it was trained.
        llm_folder: of the base LLM.
        encoder_width: values of a frame.
        before: of the checkpoint, in the precision that is written.
        after: reads what was written.
        where: what was written, to name in a complaint.

    Returns:
        What was compared, for people.

    Raises:
        UserError: they differ.
    """
    written = after()
    lora = recipe.llm.tuning == "lora"
    # A whole LLM is written in the precision that it was computed with, and a tied weight once.
    llm = (
        before.llm
        if lora
        else Tensors(
            {n: lambda n=n: before.llm[n].to(written.llm[n].dtype) for n in before.llm if n in written.llm}
        )
    )
    _require_equal(before.projector.state_dict(), written.projector.state_dict(), where)
    _require_equal(llm, written.llm, where)
    if _bytes(llm_folder) > ROOM * (host_memory() or float("inf")):
        return "all weights equal before and after; no loss compared, for the LLM does not fit into this machine's memory"
    losses = _losses(recipe, llm_folder, encoder_width, [Trained(before.projector, llm), written])
    if losses[0] != losses[1]:
        raise UserError(
            f"{where} is not what the checkpoint holds: the loss on {len(UTTERANCES)} utterances is {losses[1]:.6f}, not {losses[0]:.6f}. Nothing is published; please report this."
        )
    return f"loss {losses[0]:.4f} before and after"


def loss_of_merged(
    recipe: Recipe, llm_folder: Path, encoder_width: int, before: Trained, folder: Path
) -> str:
    """Compare an LLM that stands by itself with the base LLM and what was trained of it.

    Args:
        recipe: by which it was trained.
        llm_folder: of the base LLM.
        encoder_width: values of a frame.
        before: of the checkpoint.
        folder: of the LLM that was written.

    Returns:
        What was compared, for people.

    Raises:
        UserError: the losses differ by more than rounding to the precision that was written can explain.
    """
    if _bytes(llm_folder) > ROOM * (host_memory() or float("inf")):
        return "not compared, for the LLM does not fit into this machine's memory"
    [expected] = _losses(recipe, llm_folder, encoder_width, [before])
    alone = replace(recipe, llm=replace(recipe.llm, tuning="frozen"))
    [found] = _losses(alone, folder, encoder_width, [Trained(before.projector, {})])
    within = max(
        MERGED_WITHIN[recipe.training.precision], 0 if _bytes(llm_folder) < SMALL else MERGED_WITHIN["bf16"]
    )
    if abs(found - expected) > within * abs(expected):
        raise UserError(
            f"{folder} is not what the checkpoint holds: the loss on {len(UTTERANCES)} utterances is {found:.6f}, not {expected:.6f}. Nothing is published; please report this."
        )
    return f"loss {expected:.4f} before, {found:.4f} after"


@torch.inference_mode()
def _losses(recipe: Recipe, llm_folder: Path, encoder_width: int, models: list[Trained]) -> list[float]:
    from slam_asr.models.llm import add_lora, load_llm, load_tokenizer
    from slam_asr.models.prompt import Prompt
    from slam_asr.models.slam import Row, Slam, collate
    from slam_asr.training.objective import score_answers

    llm = load_llm(llm_folder, torch.float32 if _bytes(llm_folder) < SMALL else torch.bfloat16).eval()
    if recipe.llm.tuning == "lora":
        add_lora(llm, recipe.llm.lora, seed=0)
    prompt = Prompt(load_tokenizer(llm_folder), recipe.llm)
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
        _put(llm, model.llm)
        scores = score_answers(Slam(model.projector.to(llm.dtype), llm).eval()(batch), batch.labels)
        losses.append(float(scores.loss))
        model.projector.float()
    return losses


def _put(llm: "PreTrainedModel", weights: Mapping[str, torch.Tensor]) -> None:
    own = llm.state_dict()
    missing = weights.keys() - own.keys()
    if missing:
        raise UserError(
            f"The LLM has no weight {min(missing)}, which the checkpoint trained: it belongs to another LLM."
        )
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def read_written(folder: Path, recipe: Recipe, widths: tuple[int, int], to: str) -> Trained:
    """What a conversion wrote, read as those read it who use it.

    Args:
        folder: of the model, or of SLAM-LLM's model.pt.
        recipe: by which it was trained.
        widths: of encoder and LLM.
        to: which of both.
    """
    if to == "slam-llm":
        weights = from_slam_llm(read_pickle(folder / FILE), str(folder / FILE))
        projector, llm = (
            {n.removeprefix(part): t for n, t in weights.items() if n.startswith(part)}
            for part in ("projector.", "llm.")
        )
        return Trained(projector_with(projector, recipe.projector, *widths, str(folder / FILE)), llm)
    return Trained(
        read_projector(folder, read_config(folder)),
        read_adapter(folder) or stored_tensors(sorted((folder / LLM).glob("*.safetensors"))),
    )


def require_encoder(folder: Path, weights: Mapping[str, torch.Tensor], recipe: Recipe) -> None:
    """Compare a trained encoder's weights with those that were written for it.

    Raises:
        UserError: they differ.
    """
    from slam_asr.models.encoder import describe_encoder

    spec = describe_encoder(replace(recipe.encoder, name=str(folder / ENCODER)))
    whole = load_weights(AutoModel, spec.folder, DTYPES[recipe.training.precision], "encoder")
    written = dict(spec.encoder_of(whole).named_parameters())
    own = {name.removeprefix("model."): t for name, t in weights.items()}
    _require_equal(
        {n: t.to(DTYPES[recipe.training.precision]) for n, t in own.items()}, written, str(folder / ENCODER)
    )


def _require_equal(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], where: str) -> None:
    names = sorted(ours.keys() | theirs.keys())
    differing = [n for n in names if n not in ours or n not in theirs or not torch.equal(ours[n], theirs[n])]
    if differing:
        raise UserError(
            f"{where} is not what the checkpoint holds: {len(differing)} of {len(names)} weights differ, first {differing[0]}. Nothing is published; please report this."
        )


def _bytes(folder: Path) -> int:
    """Of an LLM's weights, in whichever format they lie there."""
    return sum(f.stat().st_size for kind in ("*.safetensors", "*.bin") for f in folder.glob(kind))
