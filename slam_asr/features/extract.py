"""The stage `extract-features`: runs every utterance of the manifests through the frozen encoder, once.

The shards to compute are planned from the manifests. An interrupted run finds the shards that were finished
and resumes with the others. Several processes, on one machine or on many, each take every n-th shard; the
store's bytes do not depend on how many there are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from slam_asr.features.audio_source import fit_to_window, samples_of
from slam_asr.features.index import isin_sorted
from slam_asr.features.launch import ExtractionJob, launch_extraction
from slam_asr.features.namespace import FeatureNamespace
from slam_asr.features.plan import Audio, ExtractionPlan, PlannedShard, distinct_audio
from slam_asr.manifest import read_manifest
from slam_asr.progress import log_line
from slam_asr.recipe import Recipe, dump_recipe
from slam_asr.stage import FINGERPRINT, Outcome, Record, require_record, run_stage
from slam_asr.storage import exists, is_s3, join, local_path
from slam_asr.storage.local import remove_abandoned
from slam_asr.work_split import WorkShard, parse_work_shard

if TYPE_CHECKING:
    from slam_asr.models.encoder import EncoderSpec

STAGE = "extract-features"
MANIFESTS = ("train.jsonl", "dev.jsonl", "test.jsonl")


def extract_features(recipe: Recipe, manifests: list[str], output: str, work_shard: str = "1/1") -> Record:
    """Encode every utterance once and save the result in a feature store.

    Features that the store already has, from whatever manifest, are not computed again. If the recipe trains
    the encoder too, or has `features.cache: none`, nothing is saved.

    Args:
        recipe: which encoder, how many of its frames, saved in which dtype.
        manifests: manifests (JSON lines), or folders that build-manifest wrote.
        output: the store, a folder or s3://bucket/prefix; many recipes and manifests can share one.
        work_shard: i/n: do the i-th of n equal parts; n machines that do one each fill the store together.

    Returns:
        The stage's record. Its folder is in the store and can be given wherever a store is expected.

    Raises:
        UserError: a manifest, the encoder or an audio file cannot be used.
    """
    from slam_asr.models.encoder import describe_encoder

    own = parse_work_shard(work_shard)
    files = manifest_files(manifests)
    spec = describe_encoder(recipe.encoder)
    if not recipe.caches_features:
        why = "the encoder is trained too" if recipe.encoder.tuning != "frozen" else "features: none"
        return run_stage(
            STAGE,
            join(output, "uncached", FINGERPRINT),
            {"why": why, "part": str(own)},
            lambda _: Outcome(f"nothing to cache: {why}", {"utterances": 0}),
        )
    extraction = Extraction(recipe, spec, files, output, own)
    inputs = {
        "audio": [audio.digest() for audio in extraction.audio],
        "fingerprint": extraction.fingerprint,
        "shard_megabytes": recipe.features.shard_megabytes,
        "part": str(own),
    }
    return run_stage(
        STAGE,
        join(extraction.namespace.root, "runs", FINGERPRINT),
        inputs,
        lambda _: extraction.run(),
        intact=extraction.is_intact,
    )


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


class Extraction:
    """The work of one extraction and its progress.

    Args:
        recipe: the recipe.
        spec: its encoder.
        files: manifests; audio that several of them have is computed for the first.
        output: the store.
        work_shard: which of the shards this extraction computes.
    """

    def __init__(
        self,
        recipe: Recipe,
        spec: "EncoderSpec",
        files: Sequence[str],
        output: str,
        work_shard: WorkShard,
    ) -> None:
        self.recipe, self.spec, self.files = recipe, spec, list(files)
        self.output, self.work_shard = output, work_shard
        self.fingerprint = fingerprint_of(recipe, spec)
        self.namespace = FeatureNamespace.of(output, self.fingerprint)
        self.audio = self._distinct_audio()

    def _distinct_audio(self) -> list[Audio]:
        """The audio of each manifest that no earlier manifest has."""
        distinct: list[Audio] = []
        for file in self.files:
            audio = distinct_audio(fit_to_window(read_manifest(file), self.spec), samples_of)
            for earlier in distinct:
                audio = audio.select(~isin_sorted(audio.audio_ids, earlier.audio_ids))
            distinct.append(audio)
        return distinct

    def plans(self) -> list[ExtractionPlan]:
        """One plan for each manifest, for the store in its present state."""
        options = self.recipe.features
        return [
            ExtractionPlan(audio, self.namespace, self.fingerprint, self.spec, options, self.work_shard)
            for audio in self.audio
        ]

    @staticmethod
    def missing(plans: list[ExtractionPlan], process: int = 0, processes: int = 1) -> list[PlannedShard]:
        """The shards that one of several processes must compute.

        Shards are assigned to processes before those that exist are left out, so the assignment does not
        depend on the progress of the other processes.

        Args:
            plans: of all manifests.
            process: number of the process, from 0.
            processes: how many share the work.
        """
        own = [(plan, shard) for plan in plans for shard in plan.own_shards]
        return [shard for plan, shard in own[process::processes] if plan.is_missing(shard)]

    def is_intact(self, record: Record) -> bool:
        """Whether the indexes and shards that a finished extraction recorded still exist."""
        sizes = self.namespace.shard_sizes()
        names = set(self.namespace.index_names())
        for name in record.facts.get("indexes", []):
            path = self.namespace.index_path(name)
            if name not in names or any(
                sizes.get(s.name) != s.bytes for s in self.namespace.read_index(path).shards
            ):
                log_line(f"{STAGE}: the store has lost some of its files; they are computed again")
                return False
        return True

    def run(self) -> Outcome:
        """Compute what is missing and publish the indexes."""
        from slam_asr.features.encode import encode_shards
        from slam_asr.models.precision import pick_device, processes_here

        self.namespace.write_fingerprint(self.fingerprint, self.spec.width)
        self._remove_abandoned_files()
        plans = self.plans()
        missing = self.missing(plans)
        utterances = sum(len(plan.audio) for plan in plans)
        new = sum(len(shard.audio) for shard in missing)
        hours = sum(shard.audio.seconds() for shard in missing) / 3600
        frames = f", frames: {self.recipe.encoder.frames}" if self.spec.window_samples else ""
        own = (
            f" (work shard {self.work_shard.number} of {self.work_shard.of})"
            if self.work_shard.of > 1
            else ""
        )
        log_line(
            f"encoder: {self.recipe.encoder.name}{frames}; {utterances} utterances, "
            f"{new} of them to compute here{own}, {hours:.2f} h"
        )
        processes = processes_here("features.processes", self.recipe.features.processes)
        device = pick_device()
        if missing and processes > 1:
            job = ExtractionJob(dump_recipe(self.recipe), self.files, self.output, asdict(self.work_shard))
            launch_extraction(job, processes)
        elif missing:
            encode_shards(self, missing, device)
        published = [plan.publish() for plan in plans]
        shards = {shard for _, index in published for shard in index.shards}
        size = sum(shard.bytes for shard in shards)
        entries = sum(len(index) for _, index in published)
        return Outcome(
            summary=f"{entries} utterances, {size / 1e6:.1f} MB in {len(shards)} "
            f"shard{'s' * (len(shards) != 1)}, {new} of them new",
            metrics={
                "utterances": entries,
                "new utterances": new,
                "audio_hours": round(sum(plan.own_seconds() for plan in plans) / 3600, 4),
                "megabytes": round(size / 1e6, 2),
            },
            facts={
                "device": device.type,
                "indexes": [name for name, _ in published],
                "fingerprint": self.fingerprint,
            },
        )

    def _remove_abandoned_files(self) -> None:
        """Remove what a killed extraction left half-written on a local disk.

        A running extraction locks the files that it writes, so those are not removed.
        """
        if not is_s3(self.namespace.root):
            remove_abandoned(local_path(self.namespace.root))


def fingerprint_of(recipe: Recipe, spec: "EncoderSpec") -> dict[str, Any]:
    """Everything that determines the values in a store: encoder weights, preprocessing and dtype."""
    return {**spec.fingerprint(), "dtype": recipe.features.dtype}
