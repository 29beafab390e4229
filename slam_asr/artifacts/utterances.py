"""The utterances that a stage uses: finds manifests, loads audio, and skips audio that is too long."""

from collections.abc import Iterable, Sequence
from pathlib import Path
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
    "cut": "are cut to it, but their transcripts are not",
    "split": "are split into windows",
    "set-aside": "are skipped",
}
"""For each value of `encoder.long_audio`: what the log says about utterances longer than the window."""


def samples_of(utterance: Utterance) -> int:
    """Return the length of an utterance in samples at 16 kHz.

    The length comes from the manifest or, if that has no duration, from the audio file.

    Raises:
        AudioError: the manifest has no duration, and the file is missing or is not audio.
    """
    if utterance.duration is None:
        return count_samples(utterance.source)
    return round(utterance.duration * SAMPLE_RATE)


def load_utterance(utterance: Utterance) -> np.ndarray:
    """Decode an utterance's audio, after checking that its file is the one from which the manifest was built.

    Returns:
        float32 [samples], mono at 16 kHz.

    Raises:
        InputError: the file's SHA-256 differs from the manifest's.
        AudioError: as for `load_checked`.
    """
    return load_checked(
        utterance.source, utterance.sha256, utterance.start, utterance.duration, utterance.audio_channel
    )


def manifest_files(paths: Iterable[str], names: Sequence[str] = MANIFESTS) -> list[str]:
    """Return the paths of manifests, replacing each folder of build-manifest by the manifests in it.

    Args:
        paths: manifests, or folders that build-manifest wrote.
        names: the manifests to use from such a folder. Manifests without utterances are omitted.

    Raises:
        InputError: build-manifest did not finish one of the folders.
    """
    files: list[str] = []
    for path in paths:
        # A missing local path is treated as a manifest, and so is any s3:// path that ends in .jsonl. If
        # nothing is there, the error message of `read_manifest` is more helpful than that of
        # `require_record`.
        if is_s3(path):
            is_folder = not path.endswith(".jsonl") and not exists(path)
        else:
            is_folder = local_path(path).is_dir()
        if not is_folder:
            files.append(path)
            continue
        record = require_record(path, "build-manifest")
        # For example, a corpus that is only used for evaluation has no training utterances.
        counts = record.facts.get("utterances", {})
        files += [
            join(record.folder, name)
            for name in names
            if not counts or counts.get(name.removesuffix(".jsonl"))
        ]
    return files


class ManifestSubset(Sequence[Utterance]):
    """Some of a manifest's utterances. Each is read when it is accessed.

    Args:
        manifest: all utterances.
        rows: int [utterances], the positions in `manifest` of the utterances to include.
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


def fit_to_window(
    utterances: Sequence[Utterance], spec: "EncoderSpec", quiet: bool = False
) -> Sequence[Utterance]:
    """Log how many utterances are longer than the encoder's window, and skip them if the recipe says so.

    Args:
        utterances: the utterances of a manifest.
        spec: the encoder's description, with the recipe's choice for long audio.
        quiet: whether to log nothing, because the stage that started this process has logged it already.

    Returns:
        The utterances that the encoder takes, in the same order.

    Raises:
        ConfigurationError: all utterances are too long, and the recipe skips such utterances.
    """
    if not spec.window_samples:
        return utterances
    fits = np.fromiter((not spec.is_too_long(samples_of(u)) for u in utterances), bool, len(utterances))
    too_long = int((~fits).sum())
    if not too_long:
        return utterances
    choice = spec.options.long_audio
    if not quiet:
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


def save_rows(file: Path, utterances: Sequence[Utterance]) -> str | None:
    """Write the rows of a manifest that are used, for other processes.

    Args:
        file: path of the file, in numpy's format with the suffix `.npy`.
        utterances: the result of `fit_to_window`.

    Returns:
        The file's path, or None if all rows are used. Nothing is written then.
    """
    if not isinstance(utterances, ManifestSubset):
        return None
    # 8 bytes per row; the utterances themselves would take several hundred bytes each, in every process.
    np.save(file, utterances.rows)
    return str(file)


def read_rows(manifest: Sequence[Utterance], file: str | None) -> Sequence[Utterance]:
    """Return the utterances whose rows `save_rows` wrote.

    Args:
        manifest: all utterances.
        file: the value that `save_rows` returned.
    """
    return manifest if file is None else ManifestSubset(manifest, np.load(file))
