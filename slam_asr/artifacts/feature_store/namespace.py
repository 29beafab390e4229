"""The feature store: encoder outputs addressed by content, in a folder or in object storage.

    STORE/
        <fingerprint>/                  a namespace: features of one encoder, preprocessing and dtype
            fingerprint.json            the fingerprint in readable form
            shards/<sha256>.safetensors features of many utterances, named by the file's SHA-256
            indexes/<plan>-1-of-1.safetensors
                                        the location of each utterance's features, for a manifest or
                                        one work shard of it
            runs/<digest>/stage.json    the record of an extraction
            plans/, unfinished/, pieces/
                                        files that an interrupted extraction needs to resume

Features are looked up by a digest of the audio (`Utterance.audio_id`), not by the utterance's key. Audio that
is in two manifests is therefore saved once. If a file's audio is replaced, the old features are never used
for the new audio. A new manifest changes no file: it adds an index, and shards for its new audio. An index is
written after its shards, and a store without an index is treated as missing.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load, save

from slam_asr.artifacts.feature_store.index import Entry, Index, Shard, build, merge
from slam_asr.artifacts.stage_record import RECORD
from slam_asr.errors import InputError
from slam_asr.models.feature_dtype import QuantizedFrames
from slam_asr.storage import digest, exists, join, parent_of, read_bytes, sha256_of_bytes, walk, write_bytes
from slam_asr.storage.paths import folders_in

FINGERPRINT_FILE = "fingerprint.json"
_PARALLEL_READS = 8
_SCALES = ".scales"
"""Suffix of the name of a tensor with scales. The audio id comes before it."""


@dataclass(frozen=True)
class FeatureNamespace:
    """The part of a store that belongs to one fingerprint.

    Its methods give the paths of its files, read its indexes, and read and write its fingerprint.
    """

    root: str

    @classmethod
    def of(cls, store: str, fingerprint: dict[str, Any]) -> "FeatureNamespace":
        """Return the namespace of a fingerprint in a store, whether or not it exists yet."""
        return cls(join(store, digest(fingerprint)[:16]))

    def shard_path(self, name: str) -> str:
        """Return the path of the shard with this file name."""
        return join(self.root, "shards", name)

    def index_path(self, name: str) -> str:
        """Return the path of the index with this name."""
        return join(self.root, "indexes", f"{name}.safetensors")

    def shard_sizes(self) -> dict[str, int]:
        """Return the size in bytes of each existing shard, keyed by file name."""
        return {f.name: f.bytes for f in walk(join(self.root, "shards"))}

    def index_names(self) -> list[str]:
        """Return the sorted names of the published indexes."""
        files = (f.name for f in walk(join(self.root, "indexes")))
        return [name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")]

    def read_index(self, path: str) -> Index:
        """Read an index, or the receipt of a finished shard, which is the index of that shard alone.

        Raises:
            FileNotFoundError: the local file does not exist.
            InputError: the file is damaged.
            StorageError: object storage cannot be read.
        """
        return Index.from_bytes(read_bytes(path), path)

    def fingerprint(self) -> dict[str, Any] | None:
        """Return the fingerprint of this namespace, or None if the namespace does not exist.

        Raises:
            InputError: the fingerprint's file is damaged.
        """
        path = join(self.root, FINGERPRINT_FILE)
        if not exists(path):
            return None
        try:
            return dict(json.loads(read_bytes(path))["fingerprint"])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path} is damaged: remove it and run `slam-asr extract-features` again."
            ) from error

    def write_fingerprint(self, fingerprint: dict[str, Any], width: int) -> None:
        """Write the fingerprint's file if it does not exist.

        Args:
            fingerprint: the fingerprint of the encoder, its preprocessing and the dtype.
            width: values per frame.
        """
        content = json.dumps({"fingerprint": fingerprint, "width": width}, indent=2, sort_keys=True) + "\n"
        # Several processes may begin at the same time. All write the same content, so the first file is
        # enough.
        write_bytes(join(self.root, FINGERPRINT_FILE), content, replace=False)

    def merged_index(self, audio_ids: np.ndarray | None = None) -> Index | None:
        """Read all published indexes and merge them into one; return None if none exists.

        Args:
            audio_ids: uint8 [n, 32], sorted. Only entries with these ids are included; all if not given.

        Raises:
            InputError: an index is damaged.
            StorageError: object storage cannot be read.
        """
        paths = [self.index_path(name) for name in self.index_names()]
        if not paths:
            return None
        # Threads, because a read from object storage is mostly waiting.
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            indexes = list(pool.map(self.read_index, paths))
        return merge(indexes[0].fingerprint, indexes[0].width, indexes, audio_ids)


def namespaces_in(store: str) -> list[FeatureNamespace]:
    """Return all namespaces of a store."""
    namespaces = (FeatureNamespace(join(store, name)) for name in folders_in(store))
    return [n for n in namespaces if exists(join(n.root, FINGERPRINT_FILE))]


def pack(
    features: dict[str, QuantizedFrames], fingerprint: dict[str, Any], spans: dict[str, int]
) -> tuple[bytes, Index]:
    """Serialise features into a shard. The same features always give the same bytes.

    Args:
        features: features by audio id, with frames [frames, width] in the store's dtype; at least one entry.
        fingerprint: the fingerprint of the features: encoder, preprocessing and dtype.
        spans: for each audio id, the length of the audio in frames; see `EncoderSpec.span_of`.

    Returns:
        The bytes of the shard's file, and the shard's index.
    """
    tensors: dict[str, torch.Tensor] = {}
    for audio_id, quantized in features.items():
        # safetensors refuses tensors that are not contiguous.
        tensors[audio_id] = quantized.frames.contiguous()
        if quantized.scales is not None:
            tensors[audio_id + _SCALES] = quantized.scales.contiguous()
    content = save(tensors)
    view = memoryview(content)
    # A safetensors file has 8 bytes with the header's length, the header in JSON, and the tensors. Offsets in
    # the header count from the first tensor. An entry's offsets count from the beginning of the file, so that
    # readers do not need the header.
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    data_begin = 8 + header_bytes
    entries = {}
    for audio_id, quantized in features.items():
        names = (audio_id, audio_id + _SCALES)
        ranges = [header[name]["data_offsets"] for name in names if name in header]
        begins = [data_begin + begin for begin, _ in ranges] + [-1]  # -1: a dtype without scales
        check = checksum(*(view[data_begin + begin : data_begin + end] for begin, end in ranges))
        entries[audio_id] = Entry(0, begins[0], begins[1], len(quantized.frames), spans[audio_id], check)
    width = next(iter(features.values())).frames.shape[1]
    return content, build(fingerprint, width, Shard(sha256_of_bytes(content), len(content)), entries)


def unpack(content: bytes) -> dict[str, QuantizedFrames]:
    """Read the features that `pack` serialised, by audio id."""
    tensors = load(content)
    return {
        audio_id: QuantizedFrames(frames, tensors.get(audio_id + _SCALES))
        for audio_id, frames in tensors.items()
        if not audio_id.endswith(_SCALES)
    }


def checksum(*chunks: memoryview | bytes | bytearray) -> int:
    """Return XXH3 of the concatenated chunks, as a signed 64-bit number."""
    hashed = xxhash.xxh3_64()
    for chunk in chunks:
        hashed.update(chunk)
    return int.from_bytes(hashed.digest(), "little", signed=True)


def find_namespace(path: str, expected: dict[str, Any] | None, dtype: str | None) -> FeatureNamespace:
    """Find the namespace that a path refers to.

    Args:
        path: a store, a namespace's folder, or the folder of an extraction's record.
        expected: keys and values that the namespace's fingerprint must contain; not checked if not given.
        dtype: the dtype to prefer if several namespaces match.

    Raises:
        InputError: no namespace matches, or several match and `dtype` does not decide between them.
    """
    if exists(join(path, FINGERPRINT_FILE)):
        candidates = [FeatureNamespace(path)]
    elif exists(join(path, RECORD)):
        # STORE/<fingerprint>/runs/<digest>
        candidates = [FeatureNamespace(parent_of(parent_of(path)))]
    else:
        candidates = namespaces_in(path)
    fingerprints = {n: found for n in candidates if (found := n.fingerprint()) is not None}
    if not fingerprints:
        raise InputError(
            f"{path} holds no feature store: run `slam-asr extract-features` first, or check the path."
        )
    expected = expected or {}
    matching = {n: found for n, found in fingerprints.items() if not _differing_keys(found, expected)}
    if not matching:
        raise InputError(_mismatch_message(path, list(fingerprints.values()), expected))
    chosen = [n for n, found in matching.items() if found["dtype"] == dtype] or list(matching)
    if len(chosen) > 1:
        names = ", ".join(f"{n.root} ({matching[n]['dtype']})" for n in chosen)
        raise InputError(f"{path} holds features of several kinds ({names}): name one of these folders.")
    return chosen[0]


def _differing_keys(fingerprint: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return sorted(key for key, value in expected.items() if fingerprint.get(key) != value)


def _mismatch_message(path: str, fingerprints: list[dict[str, Any]], expected: dict[str, Any]) -> str:
    """Describe how the most similar namespace differs from the expected fingerprint."""
    nearest = min(fingerprints, key=lambda fingerprint: len(_differing_keys(fingerprint, expected)))
    differing = _differing_keys(nearest, expected)
    detail = "; ".join(f"{key}: store {nearest.get(key)}, model {expected[key]}" for key in differing)
    return (
        f"The features in {path} were computed by another encoder or preprocessing ({detail}): "
        "extract features with this recipe, or give the store that belongs to it."
    )
