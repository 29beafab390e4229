"""An extraction: finds the missing shards, divides them among processes, and publishes the indexes.

The shards to compute are planned from the manifests. A run after an interruption finds the finished shards
and computes only the others. If n processes share the work, on one machine or on many, each takes every n-th
shard. The bytes of the shards do not depend on n. A machine gets one process per GPU, unless
`features.processes` requests another number. If there are several processes, each runs
`python -m slam_asr.features.extraction JOB`.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slam_asr.artifacts.feature_store.index import isin_sorted
from slam_asr.artifacts.feature_store.namespace import FeatureNamespace
from slam_asr.artifacts.manifest import read_manifest
from slam_asr.artifacts.stage_record import Outcome, Record
from slam_asr.artifacts.utterances import fit_to_window
from slam_asr.config.recipe import Recipe, dump_recipe, load_recipe
from slam_asr.features.plan import Audio, ExtractionPlan, ExtractionTask, PlannedShard, distinct_audio
from slam_asr.progress import log_line
from slam_asr.runtime.launch import Job, processes_of
from slam_asr.runtime.work_split import WorkShard
from slam_asr.runtime.worker import failures_written_to
from slam_asr.storage import is_s3, local_path
from slam_asr.storage.local import remove_abandoned

if TYPE_CHECKING:
    import torch

    from slam_asr.models.encoders.base import EncoderSpec

STAGE = "extract-features"


@dataclass(kw_only=True)
class ExtractionJob(Job):
    """The instructions for one of several processes on a machine."""

    recipe: str
    """The resolved recipe, as YAML."""
    files: list[str]
    """Paths of the manifests."""
    output: str
    """Path or URI of the store."""
    work_shard: dict[str, int]
    """The fields of the `WorkShard` that the processes of this machine compute together."""


class Extraction(ExtractionTask):
    """The work of one extraction and its progress.

    Args:
        recipe: the recipe.
        spec: the recipe's encoder.
        files: paths of the manifests. Audio that is in several manifests counts only for the first.
        output: path or URI of the store.
        work_shard: which of the planned shards this extraction computes.
        quiet: do not log how many utterances are too long, because the stage that started this process has
            already done so.
    """

    def __init__(
        self,
        recipe: Recipe,
        spec: "EncoderSpec",
        files: Sequence[str],
        output: str,
        work_shard: WorkShard,
        quiet: bool = False,
    ) -> None:
        fingerprint = {**spec.fingerprint(), "dtype": recipe.features.dtype}
        super().__init__(recipe, spec, FeatureNamespace.of(output, fingerprint), fingerprint)
        self.files, self.output, self.work_shard = list(files), output, work_shard
        self.audio = self._distinct_audio(quiet)

    def _distinct_audio(self, quiet: bool) -> list[Audio]:
        """Return, for each manifest, the audio that is in no earlier manifest."""
        distinct: list[Audio] = []
        for file in self.files:
            audio = distinct_audio(fit_to_window(read_manifest(file), self.spec, quiet))
            for earlier in distinct:
                # `isin_sorted` needs sorted ids as its second argument, which `distinct_audio` returns.
                audio = audio.select(~isin_sorted(audio.audio_ids, earlier.audio_ids))
            distinct.append(audio)
        return distinct

    def plans(self) -> list[ExtractionPlan]:
        """Plan the extraction of each manifest, given the current state of the store."""
        return [ExtractionPlan(audio, self, self.work_shard) for audio in self.audio]

    @staticmethod
    def missing(plans: list[ExtractionPlan], process: int = 0, processes: int = 1) -> list[PlannedShard]:
        """Return the shards that one of several processes must compute.

        Shards are assigned to processes before the existing ones are omitted. The assignment therefore does
        not depend on the progress of the other processes.

        Args:
            plans: the plans of all manifests.
            process: number of the process, from 0.
            processes: number of processes that share the work.
        """
        own = [(plan, shard) for plan in plans for shard in plan.own_shards]
        return [shard for plan, shard in own[process::processes] if plan.is_missing(shard)]

    def is_intact(self, record: Record) -> bool:
        """Return whether the indexes in a finished extraction's record, and their shards, still exist."""
        sizes = self.namespace.shard_sizes()
        names = set(self.namespace.index_names())
        for name in record.facts.get("indexes", []):
            path = self.namespace.index_path(name)
            if name not in names or self.namespace.read_index(path).lost_shards(sizes):
                log_line(f"{STAGE}: the store has lost some of its files; they are computed again")
                return False
        return True

    def run(self) -> Outcome:
        """Compute the missing shards and publish the indexes."""
        from slam_asr.models.precision import pick_device, processes_here

        self.namespace.write_fingerprint(self.fingerprint, self.spec.width)
        if not is_s3(self.namespace.root):
            # Left by a killed extraction. A running one locks the files that it is writing.
            remove_abandoned(local_path(self.namespace.root))
        plans = self.plans()
        missing = self.missing(plans)
        utterances = sum(len(plan.audio) for plan in plans)
        new = sum(len(shard.audio) for shard in missing)
        hours = sum(shard.audio.seconds() for shard in missing) / 3600
        frames = f", frames: {self.recipe.encoder.frames}" if self.spec.window_samples else ""
        shard = self.work_shard
        own = f" (work shard {shard.number} of {shard.total})" * (shard.total > 1)
        log_line(
            f"encoder: {self.recipe.encoder.name}{frames}; {utterances} utterances, "
            f"{new} of them to compute here{own}, {hours:.2f} h"
        )
        processes = processes_here("features.processes", self.recipe.features.processes)
        device = pick_device()
        if missing and processes > 1:
            self._encode_on_several(processes)
        elif missing:
            self.encode(missing, device)
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
            gpus=processes if device.type == "cuda" else 0,
        )

    def encode(self, shards: list[PlannedShard], device: "torch.device") -> None:
        """Compute shards on one device and publish each; see `encode.encode_shards`."""
        from slam_asr.features.encode import encode_shards

        encode_shards(self, shards, device)

    def _encode_on_several(self, processes: int) -> None:
        """Divide the missing shards among several processes, and wait for all of them."""
        job = ExtractionJob(
            recipe=dump_recipe(self.recipe),
            files=self.files,
            output=self.output,
            work_shard=asdict(self.work_shard),
        )
        remedy = "encoder.batch_seconds or features.processes"
        with processes_of("slam_asr.features.extraction", job, processes, remedy) as running:
            # The loop ends as soon as any process fails. `processes_of` then ends the others and raises.
            while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
                time.sleep(0.1)


def main() -> None:
    """Compute the shards of one of several processes on a machine."""
    import torch

    from slam_asr.models.encoders.registry import describe_encoder
    from slam_asr.models.precision import pick_device

    job = ExtractionJob(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with failures_written_to(Path(job.folder)):
        recipe = load_recipe(job.recipe)
        extraction = Extraction(
            recipe,
            describe_encoder(recipe.encoder),
            job.files,
            job.output,
            WorkShard(**job.work_shard),
            quiet=True,
        )
        device = pick_device()
        if device.type == "cuda":
            device = torch.device("cuda", job.process)
            torch.cuda.set_device(device)
        # Each process makes the plan for itself. All plans are equal, because the store records the indexes
        # that existed when the extraction first started.
        extraction.encode(extraction.missing(extraction.plans(), job.process, job.processes), device)


if __name__ == "__main__":
    main()
