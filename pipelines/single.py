"""Runs a single stage (`--only`) on the results that earlier stages left in the run's folder.

The stage's own command line runs with the same inputs and outputs as the pipeline's step, so a later run
of the complete pipeline reuses the result.
"""

import re
from collections.abc import Callable
from pathlib import Path

from pipelines.run_request import RunRequest
from slam_asr.artifacts.stage_record import FINGERPRINT, follow_pointer, require_record
from slam_asr.config.recipe import Recipe
from slam_asr.errors import ConfigurationError, InputError
from slam_asr.steps import STEPS
from slam_asr.storage import join

SINGLE_STAGE_RESULTS = "results"
"""Folder in a run's output with the pointers to the results of stages that ran with `--only`."""

RUN_ALONE = tuple(name for name, step in STEPS.items() if step.options)
"""Stages that `--only` can run."""
CORPUS_READER = next(name for name, step in STEPS.items() if "{corpus}" in step.options.values())
"""The stage that reads the corpus. Its record names the corpus."""

_NAME = re.compile(r"\{([a-z-]+)(\*?)\}")
"""Matches a name in braces, with or without a star, in the text of an option: see `Step.options`."""


def command_of_stage(
    stage: str,
    output: Path,
    store: str,
    recipe_file: Path,
    corpus: str,
    recipe: Recipe,
    model: str | None = None,
) -> list[str]:
    """Return a stage's command line, from its options in the table of steps.

    Args:
        stage: one of `RUN_ALONE`.
        output: the run's folder.
        store: folder or s3:// prefix for the results of all stages.
        recipe_file: file with the resolved recipe.
        corpus: corpus that build-manifest reads.
        recipe: the content of `recipe_file`.
        model: model to decode with, instead of the run's own.

    Raises:
        UserError: an earlier stage has not run, or its result was deleted.
    """

    def result(earlier: str) -> str:
        return follow_pointer(_latest_pointer(output, earlier, stage))

    # These are functions, so that only results that the stage uses are looked up: a missing one raises.
    values: dict[str, Callable[[], list[str]]] = {
        "recipe": lambda: [str(recipe_file)],
        "corpus": lambda: [corpus],
        "store": lambda: [store.rstrip("/")],
        "which": lambda: [recipe.decoding.checkpoint],
        "features": lambda: [result("extract-features")] if recipe.caches_features else [],
        "model": lambda: [model or result("convert-checkpoint")],
    }

    def replace_name(text: str) -> list[str]:
        found = _NAME.search(text)
        if found is None:
            return [text]
        name, star = found.groups()
        if name in values:
            replacements = values[name]()
        elif star:
            shards = _with_other_work_shards(_latest_pointer(output, name, stage))
            replacements = [follow_pointer(pointer) for pointer in shards]
        else:
            replacements = [result(name)]
        return [text[: found.start()] + value + text[found.end() :] for value in replacements]

    command = ["slam-asr", stage]
    for option, text in ({"output": join("{store}", stage, FINGERPRINT)} | STEPS[stage].options).items():
        if replaced := replace_name(text):
            command += [f"--{option}", *replaced]
    # As in the pipeline, later stages find the result through this pointer.
    return [*command, "--pointer", str(pointer_of(output, stage))]


def corpus_of(output: Path, stage: str) -> str:
    """Return the corpus that the run's manifests were built from; later stages read its audio.

    Raises:
        UserError: build-manifest has not run, or its result was deleted.
    """
    manifests = follow_pointer(_latest_pointer(output, CORPUS_READER, stage))
    return require_record(manifests, CORPUS_READER).inputs["corpus"]


def require_stage(name: str, request: RunRequest) -> str:
    """Return a stage's name, after checking that the requested pipeline has it and is not a sweep.

    Raises:
        ConfigurationError: the pipeline has no such stage, or runs it once per variation.
    """
    if request.variations:
        raise ConfigurationError(
            "--only and --sweep are both given: a sweep runs its stages once per variation; "
            "run the recipe with the variation's options instead."
        )
    known = [stage for stage in RUN_ALONE if stage in request.results]
    if name not in known:
        where = " in an evaluation with --model" if request.model else ""
        raise ConfigurationError(f"There is no stage {name}{where}: --only may be {', '.join(known)}.")
    return name


def pointer_of(output: Path, stage: str) -> Path:
    """Return the path of the pointer to the result of a stage that ran with `--only`."""
    return output / SINGLE_STAGE_RESULTS / f"{stage}.json"


def _latest_pointer(output: Path, earlier: str, stage: str) -> Path:
    """Return the newest pointer to a result of `earlier`, which `stage` reads.

    Raises:
        InputError: the run's folder contains none.
    """
    # kfp writes `steps/<run>/<step>/<output>`, with one more folder for each loop around the step.
    of_pipelines = (output / "steps").glob(f"**/{earlier}/{STEPS[earlier].output}")
    candidates = [pointer_of(output, earlier), *of_pipelines]
    pointers = [path for path in candidates if path.is_file()]
    if not pointers:
        raise InputError(
            f"{stage} needs the result of {earlier}, and {output} contains none: "
            f"run with --only {earlier} first, or without --only."
        )
    # By time, because the stage may have run alone and in pipelines, in any order.
    return max(pointers, key=lambda path: path.stat().st_mtime_ns)


def _with_other_work_shards(pointer: Path) -> list[Path]:
    """Return a step's pointer and, if the step ran in a loop over work shards, those of the other shards.

    kfp names the folders of a loop's iterations for-loop-2-iteration-0, for-loop-2-iteration-1 and so on.
    """
    iteration = pointer.parent.parent
    loop, in_a_loop, _ = iteration.name.rpartition("-iteration-")
    if not in_a_loop:
        return [pointer]
    return sorted(iteration.parent.glob(f"{loop}-iteration-*/{pointer.parent.name}/{pointer.name}"))
