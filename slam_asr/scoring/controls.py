"""Controls that put a word error rate into perspective: the rates of output that ignores the audio."""

import random
from collections.abc import Sequence
from dataclasses import replace

from slam_asr.artifacts.hypotheses import Hypothesis

SHUFFLED = "shuffled audio"
EMPTY = "empty output"


def shuffled_audio(rows: Sequence[Hypothesis], seed: int) -> list[Hypothesis]:
    """Pair each utterance with the hypothesis for another utterance's audio.

    The audio is the only part of an utterance that the model receives. Its output for another utterance's
    audio is therefore that utterance's hypothesis, and nothing needs to be decoded again. Hypotheses move
    along one cycle within each test subset, so no utterance retains its own. A subset of one utterance is
    left out.
    """
    subsets: dict[str, list[Hypothesis]] = {}
    for row in rows:
        subsets.setdefault(row.subset, []).append(row)
    shuffled = []
    for subset in sorted(subsets):
        # The rows are sorted first, so that the result does not depend on their order.
        order = sorted(subsets[subset], key=lambda row: row.key)
        random.Random(f"{seed}/{subset}").shuffle(order)
        if len(order) < 2:
            continue
        successors = [*order[1:], order[0]]
        shuffled += [
            replace(row, hypothesis=other.hypothesis) for row, other in zip(order, successors, strict=True)
        ]
    return shuffled


def empty_output(rows: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Pair each utterance with an empty hypothesis, so that every reference word is a deletion."""
    return [replace(row, hypothesis="") for row in rows]
