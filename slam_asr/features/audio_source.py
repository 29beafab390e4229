"""The audio of utterances: read as it was when its manifest was built, measured, and fitted to an encoder's window."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from slam_asr.audio import SAMPLE_RATE, count_samples
from slam_asr.errors import UserError
from slam_asr.manifest import Utterance
from slam_asr.progress import log_line

if TYPE_CHECKING:
    from slam_asr.models.encoder import EncoderSpec


def samples_of(utterance: Utterance) -> int:
    """Samples at 16 kHz, from the manifest, or else from the file's header."""
    if utterance.duration is None:
        return count_samples(utterance.source)
    return round(utterance.duration * SAMPLE_RATE)


class Chosen(Sequence[Utterance]):
    """Some of a manifest's utterances, read when they are asked for."""

    def __init__(self, manifest: Sequence[Utterance], rows: np.ndarray) -> None:
        self.manifest, self.rows = manifest, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Utterance: ...
    @overload
    def __getitem__(self, at: slice) -> list[Utterance]: ...
    def __getitem__(self, at: int | slice) -> Utterance | list[Utterance]:
        if isinstance(at, slice):
            return [self.manifest[int(row)] for row in self.rows[at]]
        return self.manifest[int(self.rows[at])]


def fit_to_window(utterances: Sequence[Utterance], spec: "EncoderSpec") -> Sequence[Utterance]:
    """Those that the encoder will take, with a word on any that its window is too short for.

    Raises:
        UserError: none is left.
    """
    if not spec.window_samples:
        return utterances
    fits = np.fromiter((not spec.is_too_long(samples_of(u)) for u in utterances), bool, len(utterances))
    too_long = int((~fits).sum())
    if not too_long:
        return utterances
    choice = spec.options.long_audio
    done = {
        "cut": "are cut there, their transcripts are not",
        "split": "are split into windows",
        "set-aside": "are set aside",
    }
    log_line(
        f"{too_long} of {len(utterances)} utterances are longer than the encoder's {spec.window_samples / SAMPLE_RATE:g}-s "
        f"window and {done[choice]} (encoder.long_audio: {choice})"
    )
    if choice != "set-aside":
        return utterances
    if too_long == len(utterances):
        raise UserError(
            f"All {len(utterances)} utterances are longer than the encoder's window and encoder.long_audio sets them aside: "
            "choose cut or split, or divide the audio."
        )
    return Chosen(utterances, np.flatnonzero(fits))
