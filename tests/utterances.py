"""Writes manifests for tests, as `build-manifest` writes them."""

from collections.abc import Iterable

from slam_asr.artifacts.manifest import Utterance, manifest_line
from slam_asr.storage import PathOrUri, write_bytes


def write_manifest(path: PathOrUri, utterances: Iterable[Utterance]) -> None:
    """Write a manifest, sorted by key."""
    ordered = sorted(utterances, key=lambda u: u.key.encode("utf-8", "backslashreplace"))
    write_bytes(path, b"".join(map(manifest_line, ordered)))
