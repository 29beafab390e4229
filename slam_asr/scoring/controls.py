"""Controls that put a word error rate into perspective: the rates of output that ignores the audio."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from slam_asr.artifacts.hypotheses import Hypothesis
from slam_asr.artifacts.word_errors import groups_of

SHUFFLED = "shuffled audio"
EMPTY = "empty output"


def shuffled_audio(rows: Sequence[Hypothesis], seed: int) -> list[Hypothesis]:
    """Pair each utterance with the hypothesis for another utterance's audio.

    The audio is the only part of an utterance that the model receives. Its output for another utterance's
    audio is therefore that utterance's hypothesis, and nothing needs to be decoded again. Hypotheses move
    along one cycle within each test subset, so no utterance retains its own. A subset of one utterance is
    left out.
    """
    shuffled = []
    for subset, indices in groups_of(rows, lambda row: row.subset).items():
        # The rows are sorted first, so that the result does not depend on their order.
        order = sorted((rows[i] for i in indices), key=lambda row: row.key)
        random.Random(f"{seed}/{subset}").shuffle(order)
        if len(order) > 1:
            shuffled += [replace(a, hypothesis=b.hypothesis) for a, b in pairwise([*order, order[0]])]
    return shuffled


def empty_output(rows: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Pair each utterance with an empty hypothesis, so that every reference word is a deletion."""
    return [replace(row, hypothesis="") for row in rows]
