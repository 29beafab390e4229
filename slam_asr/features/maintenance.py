"""Maintenance of a feature store: list its contents, verify them, and remove files that are not needed."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from slam_asr.artifacts.feature_store.index import Index, Shard, isin_sorted, merge, to_array
from slam_asr.artifacts.feature_store.namespace import FeatureNamespace, namespaces_in
from slam_asr.artifacts.manifest import iterate_manifest
from slam_asr.artifacts.utterances import manifest_files
from slam_asr.config.recipe import FRAMES_PER_SECOND
from slam_asr.errors import InputError
from slam_asr.progress import Meter, log_line
from slam_asr.storage import delete, digest, join, name_of, open_stream, walk, write_bytes
from slam_asr.storage.failures import Damaged

_PARALLEL_READS = 4


@dataclass
class Contents:
    """The files of a namespace."""

    namespace: FeatureNamespace
    index: Index
    """All published indexes merged into one; empty if none exists."""
    shard_sizes: dict[str, int]
    """Size in bytes of each existing shard, keyed by file name."""
    receipts: list[str]
    """Paths of the receipts of running and interrupted extractions; see `PlannedShard.receipt`."""
    pieces: list[str]
    """Paths of the saved pieces of incomplete shards."""

    @property
    def only_in_receipts(self) -> set[str]:
        """File names of the shards to which a receipt refers, but no index."""
        named = {s.name for receipt in self.receipts for s in self.namespace.read_index(receipt).shards}
        return named - {s.name for s in self.index.shards}

    @property
    def orphans(self) -> list[str]:
        """File names of the shards to which neither an index nor a receipt refers."""
        # An extraction that was killed after it wrote a shard and before its receipt leaves such a shard.
        indexed = {s.name for s in self.index.shards}
        return sorted(self.shard_sizes.keys() - indexed - self.only_in_receipts)

    @property
    def lost(self) -> list[Shard]:
        """Shards that are missing or cut short although an index refers to them."""
        return self.index.lost_shards(self.shard_sizes)


def _contents(namespace: FeatureNamespace) -> Contents:
    receipts, pieces = (
        [join(folder, f.name) for f in walk(folder)]
        for folder in (join(namespace.root, "unfinished"), join(namespace.root, "pieces"))
    )
    index = namespace.merged_index() or Index({}, 0)
    return Contents(namespace, index, namespace.shard_sizes(), receipts, pieces)


def _require_namespaces(store: str) -> list[FeatureNamespace]:
    namespaces = namespaces_in(store)
    if not namespaces:
        raise InputError(
            f"{store} holds no feature store: check the path; "
            "it is the --output of `slam-asr extract-features`."
        )
    return namespaces


def list_store(store: str) -> None:
    """Print a feature store's contents: encoders, utterances, hours, megabytes and shards.

    Shards of unfinished extractions, pieces of incomplete shards, shards that nothing refers to, and lost
    shards are counted separately.

    Args:
        store: a folder or s3://bucket/prefix, as given to extract-features.

    Raises:
        InputError: no store exists there.
    """
    for namespace in _require_namespaces(store):
        contents = _contents(namespace)
        fingerprint = sorted((namespace.fingerprint() or {}).items())
        print(f"{name_of(namespace.root)}  {', '.join(f'{k} {str(v)[:12]}' for k, v in fingerprint)}")
        index, names = contents.index, namespace.index_names()
        if not names:
            print("  no finished extraction")
        else:
            hours = int(index.columns["frames"].sum()) / FRAMES_PER_SECOND / 3600
            size = sum(s.bytes for s in index.shards) / 1e6
            print(
                f"  {len(index):,} utterances, {hours:.2f} h of frames, {size:,.1f} MB "
                f"in {_number(len(index.shards), 'shard')}, {_number(len(names), 'index')}"
            )
        for count, what in (
            (len(contents.receipts), "shards of unfinished extractions"),
            (len(contents.pieces), "pieces of shards that an unfinished extraction has begun"),
            (len(contents.orphans), "shards that nothing refers to, which `slam-asr features prune` removes"),
            (len(contents.lost), "shards missing or cut short, for which extract-features must run again"),
        ):
            if count:
                print(f"  {what}: {count}")


def verify_store(store: str, repair: bool = False) -> None:
    """Read every shard of the finished extractions, and compare its checksum.

    Args:
        store: a folder or s3://bucket/prefix, as given to extract-features.
        repair: remove damaged shards, so that the next extract-features computes them again.

    Raises:
        InputError: no store exists there, or some of its shards are damaged, missing or cut short.
        StorageError: object storage cannot be read, in which case no shard is removed.
    """
    all_contents = [_contents(namespace) for namespace in _require_namespaces(store)]
    damaged: list[str] = []
    lost = [c.namespace.shard_path(s.name) for c in all_contents for s in c.lost]
    shards = [
        (c.namespace, s) for c in all_contents for s in c.index.shards if c.shard_sizes.get(s.name) == s.bytes
    ]
    with (
        Meter("verify", total=len(shards), unit="shards") as meter,
        ThreadPoolExecutor(_PARALLEL_READS) as pool,
    ):
        for (namespace, shard), intact in zip(shards, pool.map(_is_intact, shards), strict=True):
            if not intact:
                damaged.append(namespace.shard_path(shard.name))
            meter.update()
    # All damaged and lost shards are logged before the error, whose message only counts them.
    for path in (*damaged, *lost):
        log_line(f"{path}: {'damaged' if path in damaged else 'missing or cut short'}")
    if not damaged and not lost:
        log_line(f"{store}: {_number(len(shards), 'shard')}, all intact")
        return
    if repair:
        for path in damaged:
            delete(path)
        log_line(f"removed {_number(len(damaged), 'damaged shard')}")
    remedy = "run `slam-asr extract-features` again over the same manifests" + (
        "" if repair or not damaged else f", after `slam-asr features verify {store} --repair true`"
    )
    raise InputError(
        f"{store} has {_number(len(damaged), 'damaged shard')}, and {len(lost)} missing or cut short: "
        f"{remedy}."
    )


def _number(count: int, noun: str) -> str:
    """Return `1 shard`, `2 shards`, `2 indexes`."""
    plural = "" if count == 1 else "es" if noun.endswith("x") else "s"
    return f"{count} {noun}{plural}"


def _is_intact(located: tuple[FeatureNamespace, Shard]) -> bool:
    namespace, shard = located
    try:
        with open_stream(namespace.shard_path(shard.name)) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == shard.sha256
    except Damaged:
        # The stream compares the checksum in the object's metadata, if it has one. Other errors are raised,
        # because they do not show that the shard is damaged.
        return False


def prune_store(
    store: str,
    keep: list[str] | None = None,
    drop: list[str] | None = None,
    unfinished: bool = False,
    yes: bool = False,
) -> None:
    """Remove files that are not needed. Without --yes true, only report them.

    Shards that nothing refers to always count as not needed. Do not run an extraction at the same time.

    Args:
        store: a folder or s3://bucket/prefix, as given to extract-features.
        keep: manifests, or folders of build-manifest. Shards without audio from these are removed too.
        drop: folders in the store to remove completely, by the names that `features ls` shows.
        unfinished: also remove the shards and pieces of unfinished extractions.
        yes: remove the files instead of only reporting them.

    Raises:
        InputError: no store exists there, or it lacks a folder that `drop` names.
    """
    namespaces = _require_namespaces(store)
    unknown = sorted(set(drop or []) - {name_of(n.root) for n in namespaces})
    if unknown:
        raise InputError(
            f"{store} has no {', '.join(unknown)}: `slam-asr features ls {store}` shows what it has."
        )
    needed = _audio_ids_of(keep) if keep is not None else None
    verb = "removed" if yes else "would be removed (add --yes true to do it)"
    for namespace in namespaces:
        if name_of(namespace.root) in (drop or []):
            files = [join(namespace.root, f.name) for f in walk(namespace.root)]
        else:
            files = _removable(_contents(namespace), needed, unfinished, yes)
        size = sum(f.bytes for f in walk(namespace.root) if join(namespace.root, f.name) in set(files))
        if yes:
            # Indexes and receipts are removed before the shards to which they refer. None of them then refers
            # to a removed shard, even after an interruption.
            for file in sorted(files, key=lambda f: "/shards/" in f):
                delete(file)
        log_line(f"{name_of(namespace.root)}: {_number(len(files), 'file')}, {size / 1e6:,.1f} MB, {verb}")


def _audio_ids_of(manifests: Iterable[str]) -> np.ndarray:
    """Return the sorted audio ids, uint8 [n, 32], of all utterances in the manifests."""
    audio_ids = {u.audio_id for file in manifest_files(list(manifests)) for _, u in iterate_manifest(file)}
    return to_array(sorted(audio_ids))


def _removable(contents: Contents, needed: np.ndarray | None, unfinished: bool, yes: bool) -> list[str]:
    """Return the paths of the files that can be removed.

    If an index refers to a shard that is removed, all indexes are replaced by a single index of the remaining
    shards.

    Args:
        contents: the files of a namespace.
        needed: sorted audio ids, uint8 [n, 32], whose features must remain; all if not given.
        unfinished: whether to include the shards of unfinished extractions, and the pieces of shards.
        yes: whether to write the single index now, before the caller removes the old ones.
    """
    namespace, index = contents.namespace, contents.index
    files = [namespace.shard_path(name) for name in contents.orphans]
    if unfinished:
        files += contents.pieces + contents.receipts
        unfinished_shards = contents.only_in_receipts & contents.shard_sizes.keys()
        files += [namespace.shard_path(name) for name in sorted(unfinished_shards)]
    if needed is not None:
        # A shard remains if any of its audio is needed, because shards are never changed, only removed.
        remains = np.zeros(len(index.shards), bool)
        remains[index.columns["shard"][isin_sorted(index.columns["address"], needed)]] = True
        if not remains.all():
            files += [
                namespace.shard_path(shard.name)
                for shard, stays in zip(index.shards, remains, strict=True)
                if not stays and shard.name in contents.shard_sizes
            ]
            files += [namespace.index_path(name) for name in namespace.index_names()]
            remaining = merge(index.fingerprint, index.width, [index.select(remains[index.columns["shard"]])])
            name = f"remaining-{digest(remaining.audio_ids())[:16]}"
            # An earlier pruning may have written the same index under this name. It must not be removed.
            files = [f for f in files if f != namespace.index_path(name)]
            if yes:
                write_bytes(namespace.index_path(name), remaining.to_bytes())
    return files
