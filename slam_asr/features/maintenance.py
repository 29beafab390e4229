"""Looking after a feature store: what is in it, whether it is whole, and what may go."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from slam_asr.errors import UserError
from slam_asr.features.extract import manifest_files
from slam_asr.features.index import Index, Shard, among, merge, to_array
from slam_asr.features.namespace import FeatureNamespace, namespaces_in
from slam_asr.manifest import iterate_manifest
from slam_asr.progress import Meter, log_line
from slam_asr.storage import delete, digest, join, name_of, open_stream, walk, write_bytes

_FRAMES_A_SECOND = 50
_READERS = 4


@dataclass
class Contents:
    """What a space consists of."""

    space: FeatureNamespace
    index: Index | None
    """All published indexes as one."""
    there: dict[str, int]
    """Bytes of each shard that is there, by its file's name."""
    unfinished: list[str] = field(default_factory=list)
    """Receipts of extractions that are under way, or were cut off."""

    @property
    def orphans(self) -> list[str]:
        """Shards that no index and no receipt names."""
        named = {s.name for s in self.index.shards} if self.index else set()
        for receipt in self.unfinished:
            named |= {s.name for s in self.space.read_index(receipt).shards}
        return sorted(self.there.keys() - named)

    @property
    def lost(self) -> list[Shard]:
        """Shards that are missing or cut short."""
        return [s for s in self.index.shards if self.there.get(s.name) != s.bytes] if self.index else []


def _contents(space: FeatureNamespace) -> Contents:
    unfinished = join(space.root, "unfinished")
    return Contents(
        space, space.published(), space.shards_there(), [join(unfinished, f.name) for f in walk(unfinished)]
    )


def _spaces(store: str) -> list[FeatureNamespace]:
    spaces = namespaces_in(store)
    if not spaces:
        raise UserError(
            f"{store} holds no feature store: check the path; it is the --output of `slam-asr extract-features`."
        )
    return spaces


def list_store(store: str) -> None:
    """Say what a feature store holds: encoders, utterances, hours, megabytes, and what is unfinished or lost.

    Args:
        store: a folder or s3://bucket/prefix, as given to extract-features.

    Raises:
        UserError: there is no store.
    """
    for space in _spaces(store):
        contents = _contents(space)
        about = ", ".join(
            f"{key} {str(value)[:12]}" for key, value in sorted((space.fingerprint() or {}).items())
        )
        print(f"{name_of(space.root)}  {about}")
        index = contents.index
        if index is None:
            print("  no finished extraction")
        else:
            hours = int(index.columns["frames"].sum()) / _FRAMES_A_SECOND / 3600
            size = sum(s.bytes for s in index.shards) / 1e6
            print(
                f"  {len(index):,} utterances, {hours:.2f} h of frames, {size:,.1f} MB in {len(index.shards)} shards, {len(space.index_names())} indexes"
            )
        for count, what in (
            (len(contents.unfinished), "shards of unfinished extractions"),
            (len(contents.orphans), "shards that nothing names: `slam-asr features prune` removes them"),
            (len(contents.lost), "shards missing or cut short: run `slam-asr extract-features` again"),
        ):
            if count:
                print(f"  {count} {what}")


def verify_store(store: str, repair: bool = False) -> None:
    """Read every shard and compare its checksum.

    Args:
        store: a folder or s3://bucket/prefix, as given to extract-features.
        repair: remove what is damaged, so that the next extract-features computes it anew.

    Raises:
        UserError: there is no store, or something in it is damaged, missing or cut short.
    """
    spaces = [_contents(space) for space in _spaces(store)]
    damaged: list[str] = []
    lost = [c.space.shard(s.name) for c in spaces for s in c.lost]
    shards = [
        (c.space, s) for c in spaces if c.index for s in c.index.shards if c.there.get(s.name) == s.bytes
    ]
    with Meter("verify", total=len(shards), unit="shards") as meter, ThreadPoolExecutor(_READERS) as pool:
        for (space, shard), whole in zip(shards, pool.map(_is_whole, shards), strict=True):
            if not whole:
                damaged.append(space.shard(shard.name))
            meter.update()
    for path in (*damaged, *lost):
        log_line(f"{path}: {'damaged' if path in damaged else 'missing or cut short'}")
    if not damaged and not lost:
        log_line(f"{store}: {len(shards)} shards, all whole")
        return
    if repair:
        for path in damaged:
            delete(path)
        log_line(f"removed {len(damaged)} damaged shards")
    then = "run `slam-asr extract-features` again over the same manifests" + (
        "" if repair else ", after `features verify --repair true`"
    )
    raise UserError(
        f"{store}: {len(damaged)} shards are damaged and {len(lost)} missing or cut short: {then}."
    )


def _is_whole(named: tuple[FeatureNamespace, Shard]) -> bool:
    space, shard = named
    hashed = hashlib.sha256()
    try:
        with open_stream(space.shard(shard.name)) as stream:
            while piece := stream.read(8 * 2**20):
                hashed.update(piece)
    except UserError:
        return False
    return hashed.hexdigest() == shard.sha256


def prune_store(
    store: str,
    keep: list[str] | None = None,
    drop: list[str] | None = None,
    unfinished: bool = False,
    yes: bool = False,
) -> None:
    """Remove what is not needed; without --yes true, say only what would go. Let no extraction run meanwhile.

    Shards that nothing names always go.

    Args:
        store: a folder or s3://bucket/prefix, as given to extract-features.
        keep: manifests, or folders of build-manifest: shards without any of their audio go too.
        drop: names of encoders' folders in the store, as `features ls` shows them, that go whole.
        unfinished: whether the shards of unfinished extractions go too.
        yes: do it.

    Raises:
        UserError: there is no store, or no such folder in it.
    """
    spaces = _spaces(store)
    unknown = sorted(set(drop or []) - {name_of(s.root) for s in spaces})
    if unknown:
        raise UserError(
            f"{store} has no {', '.join(unknown)}: `slam-asr features ls {store}` shows what it has."
        )
    wanted = _addresses(keep) if keep is not None else None
    verb = "removed" if yes else "would be removed (add --yes true to do it)"
    for space in spaces:
        if name_of(space.root) in (drop or []):
            files = [join(space.root, f.name) for f in walk(space.root)]
        else:
            files = _superfluous(_contents(space), wanted, unfinished, yes)
        size = sum(f.bytes for f in walk(space.root) if join(space.root, f.name) in set(files))
        log_line(f"{name_of(space.root)}: {len(files)} files, {size / 1e6:,.1f} MB, {verb}")
        if yes:
            # What vouches for others goes first.
            for file in sorted(files, key=lambda f: "/shards/" in f):
                delete(file)


def _addresses(manifests: Iterable[str]) -> np.ndarray:
    found = {u.audio_id for file in manifest_files(list(manifests)) for _, u in iterate_manifest(file)}
    return to_array(sorted(found))


def _superfluous(contents: Contents, wanted: np.ndarray | None, unfinished: bool, yes: bool) -> list[str]:
    """Paths that may go; where indexes are among them, an index of what stays is written first."""
    space, index = contents.space, contents.index
    files = [space.shard(name) for name in contents.orphans]
    if unfinished:
        named = {s.name for s in index.shards} if index else set()
        half = {s.name for receipt in contents.unfinished for s in space.read_index(receipt).shards} - named
        files += contents.unfinished + [space.shard(name) for name in sorted(half & contents.there.keys())]
    if wanted is not None and index is not None:
        needed = np.zeros(len(index.shards), bool)
        needed[index.columns["shard"][among(index.columns["address"], wanted)]] = True
        if not needed.all():
            files += [
                space.shard(s.name)
                for s, stays in zip(index.shards, needed, strict=True)
                if not stays and s.name in contents.there
            ]
            files += [space.index(name) for name in space.index_names()]
            stays = merge(index.fingerprint, index.width, [index.keep(needed[index.columns["shard"]])])
            name = f"kept-{digest(stays.addresses())[:16]}"
            files = [f for f in files if f != space.index(name)]
            if yes:
                write_bytes(space.index(name), stays.to_bytes())
    return files
