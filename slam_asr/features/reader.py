"""Where a model's audio comes from: a feature store, or the audio files themselves.

Both tell an utterance's length before it is read, so that batches can be planned, and both give what
`Slam` takes. From files, the encoder runs with the model: for a single decoding, or where the
encoder is trained too and nothing can be cached.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from slam_asr.audio import SAMPLE_RATE, audio_sha256, count_samples, load_audio
from slam_asr.errors import UserError
from slam_asr.features.store import address_of
from slam_asr.manifest import Utterance
from slam_asr.progress import say

if TYPE_CHECKING:
    import torch

    from slam_asr.models.encoder import EncoderSpec, Prepared, SpeechEncoder


class Reader(Protocol):
    """What training and decoding want to know of audio."""

    def span(self, address: str) -> int:
        """Length in encoder frames, by which LLM positions are counted."""

    def read(self, address: str) -> "torch.Tensor | Prepared":
        """Encoder output [frames, width], or what the encoder takes."""


class AudioReader:
    """Reads audio files.

    Args:
        utterances: all that will be asked for.
        spec: tells their lengths.
        encoder: prepares them; not needed for lengths.
    """

    def __init__(self, utterances: Sequence[Utterance], spec: "EncoderSpec", encoder: "SpeechEncoder | None" = None) -> None:
        self.spec, self.encoder = spec, encoder
        self._utterances = {address_of(u): u for u in utterances}
        self._spans = {address: spec.span_of(samples_of(u)) for address, u in self._utterances.items()}

    def span(self, address: str) -> int:
        """Length in encoder frames."""
        return self._spans[address]

    def read(self, address: str) -> "Prepared":
        """The audio as the encoder takes it."""
        return self.encoder.prepare(read_unchanged(self._utterances[address]))


def read_unchanged(utterance: Utterance) -> np.ndarray:
    """The waveform of an utterance: float32 [samples], 16 kHz.

    Raises:
        UserError: the file is not the one that the manifest was built from.
        AudioError: it cannot be read.
    """
    if utterance.sha256 not in (None, audio_sha256(utterance.source)):
        raise UserError(f"{utterance.source} was changed since its manifest was built: run `slam-asr build-manifest` again.")
    return load_audio(utterance.source)


def samples_of(utterance: Utterance) -> int:
    """Samples at 16 kHz, from the manifest, or else from the file's header."""
    if utterance.duration is None:
        return count_samples(utterance.source)
    return round(utterance.duration * SAMPLE_RATE)


def fit_to_window(utterances: Sequence[Utterance], spec: "EncoderSpec") -> list[Utterance]:
    """Those that the encoder will take, with a word on any that its window is too short for.

    Raises:
        UserError: none is left.
    """
    too_long = {u.key for u in utterances if spec.is_too_long(samples_of(u))} if spec.window_samples else set()
    if not too_long:
        return list(utterances)
    choice = spec.options.long_audio
    done = {"cut": "are cut there, their transcripts are not", "split": "are split into windows", "set-aside": "are set aside"}
    say(
        f"{len(too_long)} of {len(utterances)} utterances are longer than the encoder's {spec.window_samples / SAMPLE_RATE:g}-s "
        f"window and {done[choice]} (encoder.long_audio: {choice})"
    )
    kept = [u for u in utterances if choice != "set-aside" or u.key not in too_long]
    if not kept:
        raise UserError(
            f"All {len(utterances)} utterances are longer than the encoder's window and encoder.long_audio sets them aside: "
            "choose cut or split, or divide the audio."
        )
    return kept
