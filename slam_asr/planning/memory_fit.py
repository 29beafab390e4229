"""Checks, before anything is loaded, whether a training run fits in memory.

The prediction is within 15 % of the memory that a process needs. A training run is therefore refused only if
it would not fit even if the prediction were 15 % too high. If no prediction is possible, because the model's
sizes cannot be computed or the machine does not report its memory, training starts without a check.
"""

import heapq
from collections.abc import Sequence
from dataclasses import replace

from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.utterances import samples_of
from slam_asr.config.recipe import value_of
from slam_asr.errors import ConfigurationError
from slam_asr.models.projector import positions_of
from slam_asr.models.prompt import Prompt
from slam_asr.planning.memory import PROCESS_OVERHEAD, Load, Memory, memory_of_phases, part_names
from slam_asr.planning.plan import USABLE, propose
from slam_asr.planning.shapes import Shapes
from slam_asr.progress import log_line
from slam_asr.runtime.machine import Machine

MAX_OVERESTIMATE = 1.15
"""Maximum ratio of the predicted to the actual memory."""
LONGEST, SAMPLE = 8, 64
"""Numbers of utterances whose texts are tokenised. All texts of a thousand hours would take a minute.

`LONGEST` have the longest audio, and as many have the longest text: the longest utterance is likely to be
among them. The mean length comes from a sample of `SAMPLE` utterances or up to twice as many.
"""


def require_fit(shapes: Shapes, prompt: Prompt, utterances: Sequence[Utterance], machine: Machine) -> None:
    """Refuse a training run that cannot fit in memory, and log a warning if it might not fit.

    Args:
        shapes: sizes of the models, and the recipe.
        prompt: the recipe's prompts, tokenised for the LLM.
        utterances: the utterances to train on.
        machine: the machine to train on.

    Raises:
        ConfigurationError: the training run needs more memory than the machine has. The message says what to
            change.
    """
    capacity = machine.capacity
    if capacity is None:
        return
    try:
        longest, load = loads_of(shapes, prompt, utterances, machine.processes)
        phases = memory_of_phases(shapes, machine.processes, machine.on_gpu)
        memory = max((phase(load) for phase in phases), key=lambda memory: memory.total)
    except Exception:  # an LLM whose size cannot be computed without its weights may still train
        return
    if memory.total / MAX_OVERESTIMATE > capacity:
        raise ConfigurationError(f"{_too_much(memory, machine)}: {_remedy(shapes, longest, machine)}.")
    if memory.total > USABLE * capacity:
        remedy = _remedy(shapes, longest, machine)
        log_line(f"warning: {_too_much(memory, machine)}, which may not be enough: {remedy}")
    _require_host(shapes, machine)


def loads_of(
    shapes: Shapes, prompt: Prompt, utterances: Sequence[Utterance], processes: int
) -> tuple[Load, Load]:
    """Estimate how large a micro-batch can be.

    Args:
        shapes: sizes of the models, and the recipe.
        prompt: the recipe's prompts, tokenised for the LLM.
        utterances: the utterances to train on.
        processes: number of processes that share a step.

    Returns:
        A micro-batch of the longest utterance alone, and the largest micro-batch of one process.
    """
    options = shapes.recipe.training
    lengths = [u.duration or 0.0 for u in utterances]
    texts = [len(u.target) for u in utterances]
    # An utterance takes positions for audio and for text, so the longest one is likely to be among those with
    # the longest audio or the longest text.
    indices = range(len(utterances))
    candidates = {
        i for sizes in (lengths, texts) for i in heapq.nlargest(LONGEST, indices, sizes.__getitem__)
    }
    longest = max((_load_of(shapes, prompt, utterances[i]) for i in candidates), key=lambda load: load.length)
    if options.utterances_per_batch:
        return longest, replace(longest, rows=float(min(options.utterances_per_batch, len(utterances))))
    sample = [_load_of(shapes, prompt, utterances[i]) for i in indices[:: max(1, len(indices) // SAMPLE)]]
    mean = sum(load.length for load in sample) / len(sample)
    # A micro-batch cannot exceed the process's share of a step, nor its share of all utterances.
    share = min(options.positions_per_step / processes, mean * len(utterances) / processes)
    budget = min(options.positions_per_batch, share)
    rows = max(1.0, budget / longest.length)
    if not options.packing:
        return longest, replace(longest, rows=float(int(rows)))
    # A packed row holds utterances of all lengths, so its share of targets is that of the sample, and not
    # that of the longest utterance.
    targets = sum(load.targets for load in sample) / sum(load.length for load in sample) * longest.length
    return longest, longest if rows == 1 else replace(longest, rows=rows, targets=round(targets))


def _load_of(shapes: Shapes, prompt: Prompt, utterance: Utterance) -> Load:
    audio = positions_of(shapes.recipe.projector, shapes.encoder.span_of(samples_of(utterance)))
    # Training may draw any of these prompts, so the longest one is assumed.
    before, (after, answer) = max(
        ((p.before, prompt.with_answer(p, utterance.target)) for p in prompt.for_training),
        key=lambda tokens: len(tokens[0]) + sum(map(len, tokens[1])),
    )
    return Load(1.0, audio + len(before) + len(after) + len(answer), audio, len(answer))


def _too_much(memory: Memory, machine: Machine) -> str:
    """Describe the memory that the training run needs, its two largest parts, and the machine's memory."""
    assert machine.memory is not None  # `require_fit` has checked it
    names = part_names(machine.on_gpu)
    parts = sorted(((size, names[name]) for name, size in vars(memory).items()), reverse=True)[:2]
    shown = " and ".join(f"{size / 1e9:.3g} GB {name}" for size, name in parts)
    needs = f"This training run needs about {memory.total / 1e9:.3g} GB of "
    if machine.on_gpu:
        return f"{needs}each GPU ({shown}), and a GPU has {machine.memory / 1e9:.3g} GB"
    several = machine.local_processes > 1
    each = f"memory in each of {machine.local_processes} processes" if several else "memory"
    return f"{needs}{each} ({shown}), and this host has {machine.memory / 1e9:.3g} GB available"


def _remedy(shapes: Shapes, longest: Load, machine: Machine) -> str:
    """Return the options with which the training run fits or, if no options help, what else to do."""
    assert machine.capacity is not None  # `require_fit` has checked it
    proposal = propose(shapes, longest, machine.processes, USABLE * machine.capacity, machine.on_gpu)
    changed = {k: v for k, v in proposal.items() if v != value_of(shapes.recipe, k)}
    if changed:
        return "set " + " ".join(f"--{key} {str(value).lower()}" for key, value in changed.items())
    fewer = ", fewer training.processes" if machine.local_processes > 1 and not machine.on_gpu else ""
    lora = ", or --llm.tuning lora" if shapes.recipe.llm.tuning == "full" else ""
    return f"use {'more or larger GPUs' if machine.on_gpu else 'more memory'}{fewer}, or a smaller LLM{lora}"


def _require_host(shapes: Shapes, machine: Machine) -> None:
    """Refuse processes on GPUs, and an offloaded optimiser, that do not fit in host memory."""
    if not machine.on_gpu or machine.host is None:
        return
    takes = PROCESS_OVERHEAD * machine.local_processes
    several = machine.local_processes > 1
    what = f"{machine.local_processes} training process{'es need' if several else ' needs'}"
    remedy = "more memory for the host"
    if shapes.recipe.training.offload_optimizer:
        # The optimiser is sharded over all processes. This host holds the shards of its own processes.
        takes += shapes.host_optimizer_bytes * machine.local_processes / machine.processes
        what = "training.offload_optimizer needs"
        remedy = "more machines or more memory, or --llm.tuning lora"
    if takes / MAX_OVERESTIMATE > machine.host:
        raise ConfigurationError(
            f"{what} about {takes / 1e9:.3g} GB of memory on this host, which has "
            f"{machine.host / 1e9:.3g} GB available: use {remedy}."
        )
