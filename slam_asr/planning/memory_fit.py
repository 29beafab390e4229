"""Whether a training fits where it is about to run, said before anything is loaded.

What is predicted is within 15 % of what a process takes, so that a training is refused only where it could not
fit at the lower end. Where there is nothing to predict with, nothing is said: it is no training's
fault that a model is unknown here, or that a machine does not tell its memory.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slam_asr.errors import UserError
from slam_asr.features.audio_source import samples_of
from slam_asr.manifest import Utterance
from slam_asr.models.projector import positions_of
from slam_asr.models.prompt import Prompt
from slam_asr.planning.memory import Load, Memory, training_memory
from slam_asr.planning.plan import USABLE, propose
from slam_asr.planning.shapes import Shapes
from slam_asr.progress import log_line

EXACT = 1.15
"""What is predicted over what is taken, at most."""
LONGEST, SAMPLE = 8, 64
"""Utterances that are spelled to find the longest, and a mean one: all of them would take a minute for a thousand hours."""
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container finds the memory that it may take, by the version of cgroups."""
PARTS = {
    "frozen": "frozen weights",
    "trained": "trained weights and gradients",
    "optimizer": "optimiser",
    "activations": "activations",
    "logits": "logits",
    "overhead": "CUDA and NCCL",
}


@dataclass(frozen=True)
class Place:
    """Where a training is about to run."""

    processes: int
    """On all machines."""
    here: int
    """On this one."""
    on_gpu: bool
    memory: float | None
    """Bytes of each GPU, the smallest of them; without GPUs, of this host. None where that cannot be known."""
    host: float | None
    """Bytes of this host."""

    @property
    def room(self) -> float | None:
        """Bytes of one process."""
        return self.memory if self.memory is None or self.on_gpu else self.memory / self.here


def place_of(device: torch.device, here: int, nodes: int) -> Place:
    """This machine.

    Args:
        device: on which it trains.
        here: processes on it.
        nodes: machines, all with as many.
    """
    host = host_memory()
    on_gpu = device.type == "cuda"
    return Place(here * nodes, here, on_gpu, gpu_memory(here) if on_gpu else host, host)


def gpu_memory(count: int) -> float | None:
    """Bytes of the smallest of the first `count` GPUs.

    All of it: what is free only a process that takes a part of it for itself can ask.
    """
    try:
        return float(min(torch.cuda.get_device_properties(i).total_memory for i in range(count)))
    except (RuntimeError, AssertionError, ValueError):
        return None


def host_memory() -> float | None:
    """Bytes that this host, or the container that this is, has to give."""
    known = [_number(path) for path in CGROUP_LIMITS]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        known.append(1024.0 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        pass
    return min((n for n in known if n is not None), default=None)


def _number(path: str) -> float | None:
    try:
        return float(int(Path(path).read_text()))
    except (OSError, ValueError):
        return None  # `max`, where there is no limit


def require_fit(shapes: Shapes, prompt: Prompt, utterances: Sequence[Utterance], place: Place) -> None:
    """Refuse a training that cannot fit, and say where one may not.

    Args:
        shapes: of the training's models.
        prompt: as the LLM's tokenizer spells it.
        utterances: to train on.
        place: where.

    Raises:
        UserError: it takes more than there is, with what to set.
    """
    if place.room is None:
        return
    try:
        one, load = loads_of(shapes, prompt, utterances, place.processes)
        memory = training_memory(shapes, load, place.processes, place.on_gpu)
    except Exception:  # an LLM of a kind that cannot be measured without its weights may train all the same
        return
    if memory.total / EXACT > place.room:
        raise UserError(f"{_too_much(memory, place)}: {_what_helps(shapes, one, place)}.")
    if memory.total > USABLE * place.room:
        log_line(f"warning: {_too_much(memory, place)}, which may not do: {_what_helps(shapes, one, place)}")
    _require_host(shapes, place)


def loads_of(
    shapes: Shapes, prompt: Prompt, utterances: Sequence[Utterance], processes: int
) -> tuple[Load, Load]:
    """The longest utterance, and the largest batch that one of `processes` processes will compute at once."""
    options = shapes.recipe.training
    lengths = [u.duration or 0.0 for u in utterances]
    texts = [len(u.target) for u in utterances]
    chosen = {
        at
        for sizes in (lengths, texts)
        for at in heapq.nlargest(LONGEST, range(len(sizes)), key=sizes.__getitem__)
    }
    one = max((_load_of(shapes, prompt, utterances[at]) for at in chosen), key=lambda load: load.length)
    if options.utterances_per_batch:
        return one, replace(one, rows=float(min(options.utterances_per_batch, len(utterances))))
    sample = [
        _load_of(shapes, prompt, utterances[at])
        for at in range(0, len(utterances), max(1, len(utterances) // SAMPLE))
    ]
    mean = sum(load.length for load in sample) / len(sample)
    # A process' share of a step, which is never more than all there is.
    budget = min(
        options.positions_per_batch,
        options.positions_per_step / processes,
        mean * len(utterances) / processes,
    )
    rows = max(1.0, budget / one.length)
    if not options.packing:
        return one, replace(one, rows=float(int(rows)))
    # Utterances of all lengths share a row: its targets are those of the mean one, not of the longest.
    targets = sum(load.targets for load in sample) / sum(load.length for load in sample) * one.length
    return one, one if rows == 1 else replace(one, rows=rows, targets=round(targets))


def _load_of(shapes: Shapes, prompt: Prompt, utterance: Utterance) -> Load:
    audio = positions_of(shapes.recipe.projector, shapes.encoder.span_of(samples_of(utterance)))
    before, (behind, answer) = max(
        ((s.before, prompt.with_answer(s, utterance.target)) for s in prompt.drawn),
        key=lambda spoken: len(spoken[0]) + sum(map(len, spoken[1])),
    )
    return Load(1.0, audio + len(before) + len(behind) + len(answer), audio, len(answer))


def _too_much(memory: Memory, place: Place) -> str:
    parts = sorted(((size, PARTS[name]) for name, size in vars(memory).items()), reverse=True)[:2]
    shown = " and ".join(f"{size / 1e9:.3g} GB {what}" for size, what in parts)
    takes = f"This training takes about {memory.total / 1e9:.3g} GB of "
    if place.on_gpu:
        return f"{takes}each GPU ({shown}), and there are {place.memory / 1e9:.3g} GB"
    each = f"memory in each of {place.here} processes" if place.here > 1 else "memory"
    return f"{takes}{each} ({shown}), and this host has {place.memory / 1e9:.3g} GB to give"


def _what_helps(shapes: Shapes, one: Load, place: Place) -> str:
    options = shapes.recipe.training
    proposal = propose(shapes, one, place.processes, USABLE * place.room, place.on_gpu)
    changed = {
        key: value
        for key, value in proposal.items()
        if value != getattr(options, key.removeprefix("training."))
    }
    if changed:
        return "set " + " ".join(f"--{key} {str(value).lower()}" for key, value in changed.items())
    fewer = ", fewer training.processes" if place.here > 1 and not place.on_gpu else ""
    lora = ", or llm.tuning lora" if shapes.recipe.llm.tuning == "full" else ""
    return (
        f"take {'more GPUs or larger ones' if place.on_gpu else 'more memory'}{fewer}, or a smaller LLM{lora}"
    )


def _require_host(shapes: Shapes, place: Place) -> None:
    """Refuse an optimiser that is kept by the host of the GPUs and does not fit there."""
    if not (place.on_gpu and shapes.recipe.training.offload_optimizer) or place.host is None:
        return
    # fp32 masters and Adam's two moments, spread over all processes.
    takes = 12 * shapes.trained_parameters * place.here / place.processes
    if takes / EXACT > place.host:
        raise UserError(
            f"training.offload_optimizer keeps about {takes / 1e9:.3g} GB of this host's memory, and it has {place.host / 1e9:.3g} GB to give: take more "
            "machines or more memory, or llm.tuning lora."
        )
