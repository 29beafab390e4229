"""The feature store: encoder outputs by content, in a folder or in object storage.

    STORE/
        <fingerprint>/                  all that one encoder with one preprocessing computed, in one dtype
            fingerprint.json            which that is, in words
            shards/<sha256>.safetensors features of many utterances, named by their bytes
            indexes/<plan>-1-of-1.safetensors
                                        where each utterance of a manifest, or of a part of it, is found
            runs/<digest>/stage.json    the record of an extraction
            plans/, unfinished/         what lets an interrupted extraction go on

An utterance is found by the SHA-256 of its audio's bytes, not by its key: the same audio in two
manifests is stored once, and audio that was replaced is never mistaken for the old. Nothing is ever
changed in place: a new manifest adds shards with what is new and an index. Indexes are written last;
without one, a store does not exist.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save

from slam_asr.errors import UserError
from slam_asr.features.index import Entry, Index, Shard, build, merge
from slam_asr.models.feature_dtype import QuantizedFrames
from slam_asr.stage import RECORD
from slam_asr.storage import digest, exists, join, parent_of, read_bytes, sha256_of_bytes, walk, write_bytes
from slam_asr.storage.paths import folders_in

FINGERPRINT_FILE = "fingerprint.json"


@dataclass(frozen=True)
class FeatureNamespace:
    """Those features of a store that one fingerprint stands for, by the paths of what they consist of."""

    root: str

    @classmethod
    def of(cls, store: str, fingerprint: dict[str, Any]) -> "FeatureNamespace":
        """The space of a fingerprint in a store."""
        return cls(join(store, digest(fingerprint)[:16]))

    def shard(self, name: str) -> str:
        """Path of a shard by its file's name."""
        return join(self.root, "shards", name)

    def index(self, name: str) -> str:
        """Path of an index by its name."""
        return join(self.root, "indexes", f"{name}.safetensors")

    def shards_there(self) -> dict[str, int]:
        """Bytes of each shard that is there, by its file's name."""
        return {f.name: f.bytes for f in walk(join(self.root, "shards"))}

    def index_names(self) -> list[str]:
        """Names of the published indexes, in order."""
        return [
            f.name.removesuffix(".safetensors")
            for f in walk(join(self.root, "indexes"))
            if f.name.endswith(".safetensors")
        ]

    def read_index(self, path: str) -> Index:
        """An index of this space.

        Raises:
            UserError: it is damaged.
        """
        return Index.from_bytes(read_bytes(path), path)

    def fingerprint(self) -> dict[str, Any] | None:
        """What computed these features, or None where no space is.

        Raises:
            UserError: its file is damaged.
        """
        path = join(self.root, FINGERPRINT_FILE)
        if not exists(path):
            return None
        try:
            return dict(json.loads(read_bytes(path))["fingerprint"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is damaged: remove it and run `slam-asr extract-features` again."
            ) from error

    def write_fingerprint(self, fingerprint: dict[str, Any], width: int) -> None:
        """Say what the space is of, if nothing says so yet."""
        about = {"fingerprint": fingerprint, "width": width}
        write_bytes(
            join(self.root, FINGERPRINT_FILE),
            json.dumps(about, indent=2, sort_keys=True) + "\n",
            replace=False,
        )

    def published(self, wanted: np.ndarray | None = None) -> Index | None:
        """All published indexes as one, or None where there are none.

        Args:
            wanted: addresses [n, 32] in order, the only ones that matter; all if not given.
        """
        paths = [self.index(name) for name in self.index_names()]
        if not paths:
            return None
        with ThreadPoolExecutor(8) as pool:
            indexes = list(pool.map(self.read_index, paths))
        return merge(indexes[0].fingerprint, indexes[0].width, indexes, wanted)


def namespaces_in(store: str) -> list[FeatureNamespace]:
    """All spaces of a store."""
    return [
        s
        for s in (FeatureNamespace(join(store, name)) for name in folders_in(store))
        if exists(join(s.root, FINGERPRINT_FILE))
    ]


def pack(
    features: dict[str, QuantizedFrames], fingerprint: dict[str, Any], spans: dict[str, int]
) -> tuple[bytes, Index]:
    """Features by address → a shard's bytes and its index; the same features give the same bytes."""
    tensors: dict[str, torch.Tensor] = {}
    for address, values in features.items():
        tensors[address] = values.frames.contiguous()
        if values.scales is not None:
            tensors[_scales(address)] = values.scales.contiguous()
    content = save(tensors)
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    entries = {}
    for address, values in features.items():
        places = [header[name]["data_offsets"] for name in (address, _scales(address)) if name in header]
        begins = [8 + header_bytes + begin for begin, _ in places] + [-1]
        view = memoryview(content)
        check = checksum(*(view[8 + header_bytes + begin : 8 + header_bytes + end] for begin, end in places))
        entries[address] = Entry(0, begins[0], begins[1], len(values.frames), spans[address], check)
    width = next(iter(features.values())).frames.shape[1]
    return content, build(fingerprint, width, Shard(sha256_of_bytes(content), len(content)), entries)


def _scales(address: str) -> str:
    return f"{address}.scales"


def checksum(*parts: memoryview | bytes) -> int:
    hashed = xxhash.xxh3_64()
    for part in parts:
        hashed.update(part)
    return int.from_bytes(hashed.digest(), "little", signed=True)


def find_namespace(path: str, expected: dict[str, Any] | None, dtype: str | None) -> FeatureNamespace:
    """The space that a path means.

    Raises:
        UserError: there is none, or none of this encoder.
    """
    if exists(join(path, FINGERPRINT_FILE)):
        found = [FeatureNamespace(path)]
    elif exists(join(path, RECORD)):
        found = [FeatureNamespace(parent_of(parent_of(path)))]
    else:
        found = namespaces_in(path)
    made = {space: fingerprint for space in found if (fingerprint := space.fingerprint()) is not None}
    if not made:
        raise UserError(
            f"{path} holds no feature store: run `slam-asr extract-features` first, or check the path."
        )
    if expected is not None:
        fitting = {
            s: f for s, f in made.items() if all(f.get(key) == value for key, value in expected.items())
        }
        if not fitting:
            raise UserError(_of_others(path, list(made.values()), expected))
        made = fitting
    chosen = [s for s, f in made.items() if f["dtype"] == dtype] or list(made)
    if len(chosen) > 1:
        names = ", ".join(f"{s.root} ({made[s]['dtype']})" for s in chosen)
        raise UserError(f"{path} holds features of several kinds ({names}): name one of these folders.")
    return chosen[0]


def _of_others(path: str, made: list[dict[str, Any]], expected: dict[str, Any]) -> str:
    def differing(fingerprint: dict[str, Any]) -> list[str]:
        return sorted(key for key in expected if fingerprint.get(key) != expected[key])

    nearest = min(made, key=lambda f: len(differing(f)))
    detail = "; ".join(
        f"{key}: store {nearest.get(key)}, model {expected[key]}" for key in differing(nearest)
    )
    return (
        f"The features in {path} were made by another encoder or preprocessing ({detail}): extract features with this recipe, or "
        "give the store that belongs to it."
    )
