"""The stage `extract-features`: every utterance of the manifests through the frozen encoder, once.

What is to be computed is planned from the manifests, shard by shard; an interrupted run finds the
shards that were finished and goes on with the others. Several processes, on one machine or on many,
take every n-th shard each: the store's bytes do not depend on how many there are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from slam_asr.features.audio_source import fit_to_window, samples_of
from slam_asr.features.index import among
from slam_asr.features.launch import ExtractionJob, launch_extraction
from slam_asr.features.namespace import FeatureNamespace
from slam_asr.features.plan import Audio, ExtractionPlan, Planned, audio_of
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


def extract_features(recipe: Recipe, manifests: list[str], output: str, shard: str = "1/1") -> Record:
    """Encode every utterance once and keep the result in a feature store.

    What the store has already, from whatever manifest, is not computed again. Where the recipe trains the
    encoder too, or says `features: none`, nothing is kept.

    Args:
        recipe: which encoder, how many of its frames, stored in which precision.
        manifests: manifests (JSON lines), or folders that build-manifest wrote.
        output: the store, a folder or s3://bucket/prefix; many recipes and manifests share one.
        shard: i/n: do the i-th of n equal parts; n machines that do one each fill the store together.

    Returns:
        The stage's record; its folder lies in the store and stands for it.

    Raises:
        UserError: a manifest, the encoder or an audio file cannot be used.
    """
    from slam_asr.models.encoder import describe_encoder

    part = parse_work_shard(shard)
    files = manifest_files(manifests)
    spec = describe_encoder(recipe.encoder)
    if not recipe.caches_features:
        why = "the encoder is trained too" if recipe.encoder.tuning != "frozen" else "features: none"
        return run_stage(
            STAGE,
            join(output, "uncached", FINGERPRINT),
            {"why": why, "part": str(part)},
            lambda _: Outcome(f"nothing to cache: {why}", {"utterances": 0}),
        )
    extraction = Extraction(recipe, spec, files, output, part)
    inputs = {
        "audio": [audio.digest() for audio in extraction.audio],
        "fingerprint": extraction.fingerprint,
        "shard_megabytes": recipe.features.shard_megabytes,
        "part": str(part),
    }
    return run_stage(
        STAGE,
        join(extraction.space.root, "runs", FINGERPRINT),
        inputs,
        lambda _: extraction.run(),
        intact=extraction.is_intact,
    )


def manifest_files(manifests: Iterable[str], inside: Sequence[str] = MANIFESTS) -> list[str]:
    """Manifests by path; the folder of a finished build-manifest stands for those of it that are meant.

    Raises:
        UserError: a folder that build-manifest did not finish.
    """
    files: list[str] = []
    for manifest in manifests:
        if (
            exists(manifest)
            or (is_s3(manifest) and manifest.endswith(".jsonl"))
            or not (is_s3(manifest) or local_path(manifest).is_dir())
        ):
            files.append(manifest)
        else:
            record = require_record(manifest, "build-manifest")
            # Where a model is only measured, there is nothing to train on.
            counts = record.facts.get("utterances", {})
            files += [
                join(record.folder, name)
                for name in inside
                if not counts or counts.get(name.removesuffix(".jsonl"))
            ]
    return files


class Extraction:
    """What one extraction has to do, and how far it is.

    Args:
        recipe: the recipe.
        spec: its encoder.
        files: manifests; audio that is in several counts for the first.
        output: the store.
        part: which shards are this extraction's.
    """

    def __init__(
        self, recipe: Recipe, spec: "EncoderSpec", files: Sequence[str], output: str, part: WorkShard
    ) -> None:
        self.recipe, self.spec, self.files, self.output, self.part = recipe, spec, list(files), output, part
        self.fingerprint = fingerprint_of(recipe, spec)
        self.space = FeatureNamespace.of(output, self.fingerprint)
        self.audio = self._audio()

    def _audio(self) -> list[Audio]:
        found: list[Audio] = []
        for file in self.files:
            audio = audio_of(fit_to_window(read_manifest(file), self.spec), samples_of)
            for earlier in found:
                audio = audio.take(~among(audio.addresses, earlier.addresses))
            found.append(audio)
        return found

    def plans(self) -> list[ExtractionPlan]:
        """What there is to do for each manifest, as the store is now."""
        return [
            ExtractionPlan(audio, self.space, self.fingerprint, self.spec, self.recipe.features, self.part)
            for audio in self.audio
        ]

    @staticmethod
    def missing(plans: list[ExtractionPlan], process: int = 0, processes: int = 1) -> list[Planned]:
        """This part's shards that are not there yet; of several processes, each has its own whatever the others have done."""
        mine = [(plan, shard) for plan in plans for shard in plan.mine]
        return [shard for plan, shard in mine[process::processes] if plan.is_missing(shard)]

    def is_intact(self, record: Record) -> bool:
        """Whether what a finished extraction recorded is still there."""
        there = self.space.shards_there()
        names = set(self.space.index_names())
        for name in record.facts.get("indexes", []):
            if name not in names or any(
                there.get(s.name) != s.bytes for s in self.space.read_index(self.space.index(name)).shards
            ):
                log_line(f"{STAGE}: the store has lost some of what it had; that is computed again")
                return False
        return True

    def run(self) -> Outcome:
        """Compute what is missing and publish the indexes."""
        from slam_asr.features.encode import encode_shards
        from slam_asr.models.precision import pick_device, processes_here

        self.space.write_fingerprint(self.fingerprint, self.spec.width)
        self._remove_litter()
        plans = self.plans()
        todo = self.missing(plans)
        utterances = sum(len(plan.audio) for plan in plans)
        new = sum(len(shard.audio) for shard in todo)
        hours = sum(shard.audio.seconds() for shard in todo) / 3600
        kept = f", frames: {self.recipe.encoder.frames}" if self.spec.window_samples else ""
        whose = f" (part {self.part.number} of {self.part.of})" if self.part.of > 1 else ""
        log_line(
            f"encoder: {self.recipe.encoder.name}{kept}; {utterances} utterances, {new} of them to compute here{whose}, {hours:.2f} h"
        )
        processes = processes_here("features.processes", self.recipe.features.processes)
        device = pick_device()
        if todo and processes > 1:
            launch_extraction(
                ExtractionJob(dump_recipe(self.recipe), self.files, self.output, asdict(self.part)), processes
            )
        elif todo:
            encode_shards(self, todo, device)
        published = [plan.publish() for plan in plans]
        size = sum(shard.bytes for shard in {s for _, index in published for s in index.shards})
        entries, shards = (
            sum(len(index) for _, index in published),
            len({s for _, index in published for s in index.shards}),
        )
        return Outcome(
            summary=f"{entries} utterances, {size / 1e6:.1f} MB in {shards} shard{'s' * (shards != 1)}, {new} of them new",
            metrics={
                "utterances": entries,
                "new utterances": new,
                "audio_hours": round(sum(p.mine_seconds() for p in plans) / 3600, 4),
                "megabytes": round(size / 1e6, 2),
            },
            facts={
                "device": device.type,
                "indexes": [name for name, _ in published],
                "fingerprint": self.fingerprint,
            },
        )

    def _remove_litter(self) -> None:
        """What a killed extraction left half-written on a local disk; a living one holds a lock on what it writes."""
        if not is_s3(self.space.root):
            remove_abandoned(local_path(self.space.root))


def fingerprint_of(recipe: Recipe, spec: "EncoderSpec") -> dict[str, Any]:
    """What decides stored features: encoder weights, preprocessing, and how values are stored."""
    return {**spec.fingerprint(), "dtype": recipe.features.dtype}
