"""What a word error rate is worth: the same score for recognisers that cannot have listened."""

import random
from collections.abc import Sequence
from dataclasses import replace

from slam_asr.scoring.wer import Hypothesis

SHUFFLED = "shuffled audio"
EMPTY = "empty output"


def shuffled_audio(rows: Sequence[Hypothesis], seed: int) -> list[Hypothesis]:
    """Each utterance with what the model writes for the audio of another one.

    The model sees nothing of an utterance but its audio, so what it writes for another's audio is
    what it wrote for that other utterance: nothing needs to be decoded again. Utterances are
    exchanged along one cycle within their test subset, so none keeps its own; an only one is left out.
    """
    subsets: dict[str, list[Hypothesis]] = {}
    for row in rows:
        subsets.setdefault(row.subset, []).append(row)
    exchanged = []
    for subset in sorted(subsets):
        order = sorted(subsets[subset], key=lambda row: row.key)
        random.Random(f"{seed}/{subset}").shuffle(order)
        if len(order) < 2:
            continue
        followers = [*order[1:], order[0]]
        exchanged += [
            replace(row, hypothesis=other.hypothesis) for row, other in zip(order, followers, strict=True)
        ]
    return exchanged


def empty_output(rows: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Each utterance without a word: all deletions."""
    return [replace(row, hypothesis="") for row in rows]
