"""One stage of a run by itself, fed by what the stages before it left in the same folder.

It is the stage's own command line, with the inputs and outputs that the pipeline's step has, so that a
run of the whole pipeline finds it done.
"""

from collections.abc import Callable
from pathlib import Path

from components import RESULTS, STAGES
from pipelines.run_request import RunRequest
from slam_asr.errors import UserError
from slam_asr.recipe import Recipe
from slam_asr.stage import FINGERPRINT, follow_pointer, require_record
from slam_asr.storage import join

RESULTS_OF_SINGLES = "results"
"""Folder of a run that keeps the pointers of stages that were run by themselves."""


def command_of_stage(
    stage: str, output: Path, store: str, recipe: Path, corpus: str, wanted: Recipe, model: str | None = None
) -> list[str]:
    """The stage's command line.

    Args:
        stage: one of the five.
        output: the run's folder.
        store: where results go.
        recipe: file with the resolved recipe.
        corpus: what build-manifest reads.
        wanted: the same, read.
        model: decode with this one instead of the run's own.

    Raises:
        UserError: a stage before it has not run, or its result is gone.
    """

    def result(of: str) -> str:
        return follow_pointer(_latest(output, of, stage))

    def features() -> list[str]:
        return ["--feature_store", result("extract-features")] if wanted.caches_features else []

    arguments: dict[str, Callable[[], list[str]]] = {
        "build-manifest": lambda: ["--recipe", str(recipe), "--corpus", corpus, *_to(store, stage)],
        "extract-features": lambda: [
            "--recipe",
            str(recipe),
            "--manifests",
            f"[{result('build-manifest')}]",
            "--output",
            join(store, "features"),
        ],
        "train": lambda: [
            "--recipe",
            str(recipe),
            "--train_manifest",
            join(result("build-manifest"), "train.jsonl"),
            "--dev_manifest",
            join(result("build-manifest"), "dev.jsonl"),
            *features(),
            *_to(store, stage),
        ],
        "convert-checkpoint": lambda: [
            "--checkpoint",
            result("train"),
            "--which",
            wanted.decoding.checkpoint,
            *_to(store, stage),
        ],
        "decode": lambda: [
            "--recipe",
            str(recipe),
            "--model",
            model or result("convert-checkpoint"),
            "--manifests",
            f"[{join(result('build-manifest'), 'test.jsonl')}]",
            *features(),
            *_to(store, stage),
        ],
    }
    pointer = pointer_of(output, stage)
    return ["slam-asr", stage, *arguments[stage](), "--pointer", str(pointer)]


def corpus_of(output: Path, stage: str) -> str:
    """The corpus that the run's manifests stem from: later stages read its audio.

    Raises:
        UserError: there are no manifests.
    """
    return require_record(follow_pointer(_latest(output, "build-manifest", stage)), "build-manifest").inputs[
        "corpus"
    ]


def require_stage(name: str, wanted: RunRequest) -> str:
    """A stage's name.

    Args:
        name: as it was asked for.
        wanted: the pipeline that it belongs to.

    Raises:
        UserError: there is none of that name, or it runs many times.
    """
    if wanted.variations:
        raise UserError(
            "--only and --sweep are both given: a sweep runs its stages once a variation; run the recipe with the variation's options instead."
        )
    known = [stage for stage in STAGES if stage in wanted.results]
    if name not in known:
        raise UserError(
            f"There is no stage {name}{' where --model is only measured' if wanted.model else ''}: --only may be {', '.join(known)}."
        )
    return name


def pointer_of(output: Path, stage: str) -> Path:
    """Where the pointer to the result of a single stage lies."""
    return output / RESULTS_OF_SINGLES / f"{stage}.json"


def _latest(output: Path, of: str, wanted_by: str) -> Path:
    """The newest pointer that a whole run or a single stage left."""
    found = [pointer_of(output, of), *(output / "steps").glob(f"**/{of}/{RESULTS[of]}")]
    there = [path for path in found if path.is_file()]
    if not there:
        raise UserError(
            f"{wanted_by} needs what {of} makes, and {output} has none of it: run with --only {of} first, or without --only."
        )
    return max(there, key=lambda path: path.stat().st_mtime_ns)


def _to(store: str, stage: str) -> list[str]:
    return ["--output", join(store, stage, FINGERPRINT)]
