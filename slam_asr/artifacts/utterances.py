"""The utterances that a stage takes: from which manifests, their audio, and the encoder's window."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.stage_record import require_record
from slam_asr.audio import SAMPLE_RATE, count_samples, load_checked
from slam_asr.errors import ConfigurationError
from slam_asr.progress import log_line
from slam_asr.storage import exists, is_s3, join, local_path

if TYPE_CHECKING:
    from slam_asr.models.encoders.base import EncoderSpec

MANIFESTS = ("train.jsonl", "dev.jsonl", "test.jsonl")
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


def load_utterance(utterance: Utterance) -> np.ndarray:
    """Decode an utterance's audio, after a check that the file is the one that its manifest was built from.

    Returns:
        float32 [samples], mono at 16 kHz.

    Raises:
        InputError: the file's SHA-256 differs from the manifest's.
        AudioError: the file is missing, damaged or empty, or too short for the segment.
    """
    return load_checked(utterance.source, utterance.sha256, utterance.start, utterance.duration)


def manifest_files(paths: Iterable[str], names: Sequence[str] = MANIFESTS) -> list[str]:
    """Paths of manifests, where the folder of a finished build-manifest stands for the manifests in it.

    Args:
        paths: manifests, or folders of build-manifest.
        names: which manifests of such a folder are meant; empty ones are omitted.

    Raises:
        InputError: a folder that build-manifest did not finish.
    """
    files: list[str] = []
    for path in paths:
        if (
            exists(path)
            or (is_s3(path) and path.endswith(".jsonl"))
            or not (is_s3(path) or local_path(path).is_dir())
        ):
            files.append(path)
        else:
            record = require_record(path, "build-manifest")
            # A corpus that is only used for evaluation has no training utterances.
            counts = record.facts.get("utterances", {})
            files += [
                join(record.folder, name)
                for name in names
                if not counts or counts.get(name.removesuffix(".jsonl"))
            ]
    return files


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
