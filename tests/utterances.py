"""Utterances and manifests for tests."""

from collections.abc import Iterable

from slam_asr.artifacts.manifest import Utterance, manifest_line
from slam_asr.storage import PathOrUri, write_bytes


def write_manifest(path: PathOrUri, utterances: Iterable[Utterance]) -> None:
    """Write a manifest, sorted by key."""
    ordered = sorted(utterances, key=lambda u: u.key.encode("utf-8", "backslashreplace"))
    write_bytes(path, b"".join(map(manifest_line, ordered)))


def with_audio(audio_id: str) -> Utterance:
    """Return an utterance whose audio has this id, which stands for the SHA-256 of a complete file."""
    return Utterance("key", "/audio.wav", "text", sha256=audio_id)
