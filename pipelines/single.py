"""Run a single stage (`--only`) on the results that earlier stages left in the run's folder.

The stage's own command line runs with the same inputs and outputs as the pipeline's step, so a later run
of the complete pipeline reuses the result.
"""

from collections.abc import Callable
from pathlib import Path

from components import RESULTS, STAGES
from pipelines.run_request import RunRequest
from slam_asr.errors import ConfigurationError, InputError
from slam_asr.recipe import Recipe
from slam_asr.stage import FINGERPRINT, follow_pointer, require_record
from slam_asr.storage import join

SINGLE_STAGE_RESULTS = "results"
"""Folder in a run's output with the pointers to the results of stages that ran with `--only`."""


def command_of_stage(
    stage: str,
    output: Path,
    store: str,
    recipe_file: Path,
    corpus: str,
    recipe: Recipe,
    model: str | None = None,
) -> list[str]:
    """Return a stage's command line.

    Args:
        stage: one of `STAGES`.
        output: the run's folder.
        store: folder or s3:// prefix for results.
        recipe_file: file with the resolved recipe.
        corpus: corpus that build-manifest reads.
        recipe: the content of `recipe_file`.
        model: model to decode with, instead of the run's own.

    Raises:
        UserError: an earlier stage has not run, or its result was deleted.
    """

    def result(earlier: str) -> str:
        return follow_pointer(_latest_pointer(output, earlier, stage))

    def features() -> list[str]:
        return ["--feature-store", result("extract-features")] if recipe.caches_features else []

    arguments: dict[str, Callable[[], list[str]]] = {
        "build-manifest": lambda: [
            "--recipe",
            str(recipe_file),
            "--corpus",
            corpus,
            *_output_option(store, stage),
        ],
        "extract-features": lambda: [
            "--recipe",
            str(recipe_file),
            "--manifests",
            f"[{result('build-manifest')}]",
            "--output",
            join(store, "features"),
        ],
        "train": lambda: [
            "--recipe",
            str(recipe_file),
            "--train-manifest",
            join(result("build-manifest"), "train.jsonl"),
            "--dev-manifest",
            join(result("build-manifest"), "dev.jsonl"),
            *features(),
            *_output_option(store, stage),
        ],
        "convert-checkpoint": lambda: [
            "--checkpoint",
            result("train"),
            "--which",
            recipe.decoding.checkpoint,
            *_output_option(store, stage),
        ],
        "decode": lambda: [
            "--recipe",
            str(recipe_file),
            "--model",
            model or result("convert-checkpoint"),
            "--manifests",
            f"[{join(result('build-manifest'), 'test.jsonl')}]",
            *features(),
            *_output_option(store, stage),
        ],
    }
    pointer = pointer_of(output, stage)
    return ["slam-asr", stage, *arguments[stage](), "--pointer", str(pointer)]


def corpus_of(output: Path, stage: str) -> str:
    """Return the corpus that the run's manifests were built from; later stages read its audio.

    Raises:
        UserError: build-manifest has not run, or its result was deleted.
    """
    manifests = follow_pointer(_latest_pointer(output, "build-manifest", stage))
    return require_record(manifests, "build-manifest").inputs["corpus"]


def require_stage(name: str, request: RunRequest) -> str:
    """Return a stage's name, after checking that the requested pipeline runs it exactly once.

    Raises:
        ConfigurationError: the pipeline has no such stage, or runs it once per variation.
    """
    if request.variations:
        raise ConfigurationError(
            "--only and --sweep are both given: a sweep runs its stages once per variation; "
            "run the recipe with the variation's options instead."
        )
    known = [stage for stage in STAGES if stage in request.results]
    if name not in known:
        where = " in an evaluation with --model" if request.model else ""
        raise ConfigurationError(f"There is no stage {name}{where}: --only may be {', '.join(known)}.")
    return name


def pointer_of(output: Path, stage: str) -> Path:
    """Return the path of the pointer to the result of a stage that ran with `--only`."""
    return output / SINGLE_STAGE_RESULTS / f"{stage}.json"


def _latest_pointer(output: Path, earlier: str, stage: str) -> Path:
    """Return the newest pointer to a result of `earlier`, which `stage` reads."""
    candidates = [pointer_of(output, earlier), *(output / "steps").glob(f"**/{earlier}/{RESULTS[earlier]}")]
    pointers = [path for path in candidates if path.is_file()]
    if not pointers:
        raise InputError(
            f"{stage} needs the result of {earlier}, and {output} contains none: "
            f"run with --only {earlier} first, or without --only."
        )
    return max(pointers, key=lambda path: path.stat().st_mtime_ns)


def _output_option(store: str, stage: str) -> list[str]:
    return ["--output", join(store, stage, FINGERPRINT)]
