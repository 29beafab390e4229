"""The audio of utterances as an encoder sees it: its length, and what happens if its window is too short."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from slam_asr.audio import SAMPLE_RATE, count_samples
from slam_asr.errors import ConfigurationError
from slam_asr.manifest import Utterance
from slam_asr.progress import log_line

if TYPE_CHECKING:
    from slam_asr.models.encoder import EncoderSpec

_LONG_AUDIO = {
    "cut": "are cut to it, their transcripts are not",
    "split": "are split into windows",
    "set-aside": "are skipped",
}
"""What happens to long audio, by the recipe's `encoder.long_audio`."""


def samples_of(utterance: Utterance) -> int:
    """Length in samples at 16 kHz, from the manifest or else from the file's header."""
    if utterance.duration is None:
        return count_samples(utterance.source)
    return round(utterance.duration * SAMPLE_RATE)


class ManifestSubset(Sequence[Utterance]):
    """Some of a manifest's utterances, each read when it is accessed.

    Args:
        manifest: all utterances.
        rows: [utterances] positions of these in the manifest.
    """

    def __init__(self, manifest: Sequence[Utterance], rows: np.ndarray) -> None:
        self.manifest, self.rows = manifest, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> list[Utterance]: ...
    def __getitem__(self, index: int | slice) -> Utterance | list[Utterance]:
        if isinstance(index, slice):
            return [self.manifest[int(row)] for row in self.rows[index]]
        return self.manifest[int(self.rows[index])]


def fit_to_window(utterances: Sequence[Utterance], spec: "EncoderSpec") -> Sequence[Utterance]:
    """The utterances that the encoder takes; logs how many are longer than its window.

    Raises:
        ConfigurationError: all are too long, and the recipe skips those.
    """
    if not spec.window_samples:
        return utterances
    fits = np.fromiter((not spec.is_too_long(samples_of(u)) for u in utterances), bool, len(utterances))
    too_long = int((~fits).sum())
    if not too_long:
        return utterances
    choice = spec.options.long_audio
    log_line(
        f"{too_long} of {len(utterances)} utterances are longer than the encoder's "
        f"{spec.window_samples / SAMPLE_RATE:g}-s window and {_LONG_AUDIO[choice]} "
        f"(encoder.long_audio: {choice})"
    )
    if choice != "set-aside":
        return utterances
    if too_long == len(utterances):
        raise ConfigurationError(
            f"All {len(utterances)} utterances are longer than the encoder's window "
            "and encoder.long_audio skips them: choose cut or split, or divide the audio."
        )
    return ManifestSubset(utterances, np.flatnonzero(fits))
