"""The stage `extract-features`: every utterance of the manifests through the frozen encoder, once.

What is to be computed is planned from the manifests, shard by shard; an interrupted run finds the
shards that were finished and goes on with the others. Several processes, on one machine or on many,
take every n-th shard each: the store's bytes do not depend on how many there are.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from slam_asr.errors import UserError
from slam_asr.features.audio_source import fit_to_window, samples_of
from slam_asr.features.index import Index, among, in_order, merge
from slam_asr.features.plan import Audio, Part, audio_of, plan_shards
from slam_asr.features.space import Space
from slam_asr.manifest import read_manifest
from slam_asr.models.stored import bytes_a_frame
from slam_asr.processes import FAILURE
from slam_asr.progress import say
from slam_asr.recipe import Recipe, dump_recipe
from slam_asr.stage import FINGERPRINT, Outcome, Record, require_record, run_stage
from slam_asr.storage import delete, digest, exists, is_s3, join, local_path, read_bytes, walk, write_bytes, write_json

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

    part = _part(shard)
    files = manifest_files(manifests)
    spec = describe_encoder(recipe.encoder)
    if not recipe.caches_features:
        why = "the encoder is trained too" if recipe.encoder.tuning != "frozen" else "features: none"
        return run_stage(
            STAGE, join(output, "uncached", FINGERPRINT), {"why": why, "part": str(part)},
            lambda _: Outcome(f"nothing to cache: {why}", {"utterances": 0}),
        )
    extraction = Extraction(recipe, spec, files, output, part)
    inputs = {
        "audio": [audio.digest() for audio in extraction.audio], "fingerprint": extraction.fingerprint,
        "shard_megabytes": recipe.features.shard_megabytes, "part": str(part),
    }
    return run_stage(STAGE, join(extraction.space.root, "runs", FINGERPRINT), inputs, lambda _: extraction.run(), intact=extraction.is_intact)


def _part(shard: str) -> Part:
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard is {shard}: write it as i/n, such as 1/4, with i from 1 to n.")
    return Part(int(found[1]), int(found[2]))


def manifest_files(manifests: Iterable[str], inside: Sequence[str] = MANIFESTS) -> list[str]:
    """Manifests by path; the folder of a finished build-manifest stands for those of it that are meant.

    Raises:
        UserError: a folder that build-manifest did not finish.
    """
    files: list[str] = []
    for manifest in manifests:
        if exists(manifest) or (is_s3(manifest) and manifest.endswith(".jsonl")) or not (is_s3(manifest) or local_path(manifest).is_dir()):
            files.append(manifest)
        else:
            folder = require_record(manifest, "build-manifest").folder
            files += [join(folder, name) for name in inside]
    return files


@dataclass
class Planned:
    """A shard to be, and the audio that goes into it."""

    number: int
    audio: Audio
    receipt: str
    """Where it is noted that the shard is finished."""


class Extraction:
    """What one extraction has to do, and how far it is.

    Args:
        recipe: the recipe.
        spec: its encoder.
        files: manifests; audio that is in several counts for the first.
        output: the store.
        part: which shards are this extraction's.
    """

    def __init__(self, recipe: Recipe, spec: "EncoderSpec", files: Sequence[str], output: str, part: Part) -> None:
        self.recipe, self.spec, self.files, self.output, self.part = recipe, spec, list(files), output, part
        self.fingerprint = fingerprint_of(recipe, spec)
        self.space = Space.of(output, self.fingerprint)
        self.audio = self._audio()

    def _audio(self) -> list[Audio]:
        found: list[Audio] = []
        for file in self.files:
            audio = audio_of(fit_to_window(read_manifest(file), self.spec), samples_of)
            for earlier in found:
                audio = audio.take(~among(audio.addresses, earlier.addresses))
            found.append(audio)
        return found

    def plans(self) -> list["Plan"]:
        """What there is to do for each manifest, as the store is now."""
        return [Plan(self, audio) for audio in self.audio]

    @staticmethod
    def missing(plans: list["Plan"], process: int = 0, processes: int = 1) -> list["Planned"]:
        """This part's shards that are not there yet; of several processes, each has its own whatever the others have done."""
        mine = [(plan, shard) for plan in plans for shard in plan.mine]
        return [shard for plan, shard in mine[process::processes] if plan.is_missing(shard)]

    def is_intact(self, record: Record) -> bool:
        """Whether what a finished extraction recorded is still there."""
        there = self.space.shards_there()
        names = set(self.space.index_names())
        for name in record.facts.get("indexes", []):
            if name not in names or any(there.get(s.name) != s.bytes for s in self.space.read_index(self.space.index(name)).shards):
                say(f"{STAGE}: the store has lost some of what it had; that is computed again")
                return False
        return True

    def run(self) -> Outcome:
        """Compute what is missing and publish the indexes."""
        from slam_asr.features.encode import encode_shards
        from slam_asr.models.precision import pick_device

        self.space.write_fingerprint(self.fingerprint, self.spec.width)
        self._remove_litter()
        plans = self.plans()
        todo = self.missing(plans)
        utterances = sum(len(plan.audio) for plan in plans)
        new = sum(len(shard.audio) for shard in todo)
        hours = sum(shard.audio.seconds() for shard in todo) / 3600
        kept = f", frames: {self.recipe.encoder.frames}" if self.spec.window_samples else ""
        whose = f" (part {self.part.number} of {self.part.of})" if self.part.of > 1 else ""
        say(f"encoder: {self.recipe.encoder.name}{kept}; {utterances} utterances, {new} of them to compute here{whose}, {hours:.2f} h")
        processes = extraction_processes(self.recipe)
        device = pick_device()
        if todo and processes > 1:
            self._spread(processes)
        elif todo:
            encode_shards(self, todo, device)
        published = [plan.publish() for plan in plans]
        size = sum(shard.bytes for shard in {s for _, index in published for s in index.shards})
        entries, shards = sum(len(index) for _, index in published), len({s for _, index in published for s in index.shards})
        return Outcome(
            summary=f"{entries} utterances, {size / 1e6:.1f} MB in {shards} shard{'s' * (shards != 1)}, {new} of them new",
            metrics={
                "utterances": entries, "new utterances": new, "audio_hours": round(sum(p.mine_seconds() for p in plans) / 3600, 4),
                "megabytes": round(size / 1e6, 2),
            },
            facts={"device": device.type, "indexes": [name for name, _ in published], "fingerprint": self.fingerprint},
        )

    def _remove_litter(self) -> None:
        """What a killed extraction left half-written on a local disk; a living one holds a lock on what it writes."""
        if not is_s3(self.space.root):
            from slam_asr.storage.local import remove_abandoned

            remove_abandoned(local_path(self.space.root))

    def _spread(self, processes: int) -> None:
        """Let each of several processes on this machine compute its share."""
        with TemporaryDirectory(prefix="slam-asr-") as folder:
            jobs = []
            for number in range(processes):
                job = Job(dump_recipe(self.recipe), self.files, self.output, asdict(self.part), number, processes, folder)
                path = Path(folder) / f"job-{number}.json"
                write_json(path, asdict(job))
                environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
                jobs.append(subprocess.Popen([sys.executable, "-u", "-m", "slam_asr.features.encode", str(path)], env=environment))
            try:
                codes = [_wait_for_any_failure(jobs)] and [job.wait() for job in jobs]
            finally:
                for job in jobs:
                    if job.poll() is None:
                        job.terminate()
                        job.wait()
            failure = Path(folder) / FAILURE
            if failure.is_file():
                raise UserError(failure.read_text())
            if any(codes):
                raise UserError(
                    f"A process of the extraction ended with code {next(c for c in codes if c)}; its own message stands above. "
                    "-9 is most often for want of memory: lower encoder.batch_seconds or features.processes."
                )


def _wait_for_any_failure(jobs: list[subprocess.Popen]) -> bool:
    """Wait until all have ended, or one has failed; then end the others."""
    import time

    while any(job.poll() is None for job in jobs):
        if any(job.poll() for job in jobs):
            for job in jobs:
                job.terminate()
            break
        time.sleep(0.1)
    return True


@dataclass
class Job:
    """What one of several processes on a machine is told."""

    recipe: str
    files: list[str]
    output: str
    part: dict[str, int]
    process: int
    processes: int
    folder: str
    """Where it leaves a failure."""


class Plan:
    """The shards that a manifest's audio becomes.

    What other indexes had when the extraction was first begun is not computed again; which indexes those
    were is written down, so that an interrupted extraction comes to the same plan. Shards that were lost
    since are computed again.
    """

    def __init__(self, extraction: Extraction, audio: Audio) -> None:
        self.space, self.spec, self.part, self.audio = extraction.space, extraction.spec, extraction.part, audio
        self.fingerprint = extraction.fingerprint
        limit = extraction.recipe.features.shard_megabytes * 1_000_000
        self.name = digest([audio.digest(), limit])[:16]
        self._there = self.space.shards_there()
        unfinished = join(self.space.root, "unfinished", self.name)
        self._noted = {join(unfinished, f.name) for f in walk(unfinished)}
        names = self.space.index_names()
        bases = [name for name in self._bases(names) if name in names]
        based = merge(self.fingerprint, self.spec.width, map(self._index, bases), audio.addresses)
        self.have = self._present(merge(self.fingerprint, self.spec.width, map(self._index, names), audio.addresses))
        is_old = among(audio.addresses, based.columns["address"])
        lost = is_old & ~among(audio.addresses, self.have.columns["address"])
        self.old = audio.take(is_old & ~lost)
        frame = bytes_a_frame(self.spec.width, extraction.recipe.features.dtype)
        self.shards: list[Planned] = []
        for chosen in (audio.take(~is_old), audio.take(lost)):
            sizes = [self.spec.frames_of(int(n)) * frame for n in chosen.samples]
            for piece in plan_shards(sizes, limit):
                number = len(self.shards)
                self.shards.append(Planned(number, chosen.take(piece), join(unfinished, f"{number:06}.safetensors")))
        self.mine = [shard for shard in self.shards if self.part.takes(shard.number)]

    def _bases(self, names: list[str]) -> list[str]:
        """The indexes that were there when this extraction was first begun, by whatever process."""
        path = join(self.space.root, "plans", f"{self.name}.json")
        others = [name for name in names if not name.startswith(self.name)]
        write_bytes(path, json.dumps(others) + "\n", replace=False)
        try:
            return list(json.loads(read_bytes(path)))
        except ValueError as error:
            raise UserError(f"{path} is damaged: remove it and run `slam-asr {STAGE}` again.") from error

    def _index(self, name: str) -> Index:
        return self.space.read_index(self.space.index(name))

    def _present(self, index: Index) -> Index:
        """Those entries whose shards are there."""
        whole = np.array([self._there.get(s.name) == s.bytes for s in index.shards], bool)
        return index.keep(whole[index.columns["shard"]] if len(index) else np.zeros(0, bool))

    def is_missing(self, shard: Planned) -> bool:
        """Whether a shard is neither indexed nor noted as finished, or is gone."""
        if among(shard.audio.addresses, self.have.columns["address"]).all():
            return False
        noted = self._read_receipt(shard) if shard.receipt in self._noted else None
        if noted is None:
            return True
        if len(self._present(noted)) == len(shard.audio):
            return False
        delete(shard.receipt)
        return True

    def _read_receipt(self, shard: Planned) -> Index | None:
        """What a finished shard holds, or None where it is not noted, or its index was published meanwhile."""
        if not exists(shard.receipt):
            return None
        try:
            return self.space.read_index(shard.receipt)
        except (FileNotFoundError, UserError):
            if exists(shard.receipt):
                raise
            return None

    def publish(self) -> tuple[str, Index]:
        """Write the index of this part's utterances, its name and what it holds."""
        noted = [index for shard in self.mine if (index := self._read_receipt(shard))]
        # Another extraction of the same audio may have published its index, and removed the receipts, first.
        published = map(self._index, self.space.index_names())
        self._there = self.space.shards_there()
        mine = [s.audio.addresses for s in self.mine] + [self.old.addresses[self.part.number - 1 :: self.part.of]]
        wanted = np.concatenate(mine)
        wanted = wanted[in_order(wanted)]
        index = self._present(merge(self.fingerprint, self.spec.width, [*noted, *published], wanted))
        if len(index) != len(wanted):
            raise UserError(
                f"{len(wanted) - len(index)} utterances vanished from {self.space.root} while features were extracted: run the same command again."
            )
        name = f"{self.name}-{self.part}"
        write_bytes(self.space.index(name), index.to_bytes())
        for shard in self.mine:
            delete(shard.receipt)
        return name, index

    def mine_seconds(self) -> float:
        """Of this part's audio, old and new."""
        return sum(s.audio.seconds() for s in self.mine) + float(self.old.samples[self.part.number - 1 :: self.part.of].sum()) / 16_000


def fingerprint_of(recipe: Recipe, spec: "EncoderSpec") -> dict[str, Any]:
    """What decides stored features: encoder weights, preprocessing, and how values are stored."""
    return {**spec.fingerprint(), "dtype": recipe.features.dtype}


def extraction_processes(recipe: Recipe) -> int:
    """Processes on this machine: those that the recipe asks for, or one a GPU.

    Raises:
        UserError: more than there are GPUs.
    """
    import torch

    there, wanted = torch.cuda.device_count(), recipe.features.processes
    if there and wanted > there:
        raise UserError(f"features.processes is {wanted} but this machine has {there} GPUs: lower it, or leave it at 0 to use them all.")
    return wanted or max(1, there)
