"""The stage `compare-runs`: shows the results of several training runs on one page."""

from pathlib import Path

from slam_asr.artifacts.hypotheses import HYPOTHESES
from slam_asr.artifacts.stage_record import Outcome, Record, run_stage
from slam_asr.config.variations import variation_of
from slam_asr.errors import InputError
from slam_asr.scoring.report import NUMBERS_FILE, short_name
from slam_asr.scoring.runs import read_runs, write_comparison
from slam_asr.storage import exists, fetch, join, sha256_of_file

STAGE = "compare-runs"


def compare_runs(
    runs: list[str],
    output: str,
    title: str = "",
    variations: list[str] | None = None,
    overwrite: bool = False,
) -> Record:
    """Compare the results of several training runs, best error rate first, with their curves drawn together.

    Args:
        runs: folders that score wrote.
        output: folder for the page; {fingerprint} in it is replaced by a digest of the inputs.
        title: the page's heading, such as the recipe's name.
        variations: what each run changed in the recipe, as JSON whose `name` is the title of the run's
            report: {"name": …, "training.learning_rate": 0.0001}.
        overwrite: replace results of other inputs instead of refusing.

    Returns:
        The stage's record; its folder contains runs.html, runs.md and runs.json.

    Raises:
        UserError: fewer than two runs are given, a run has no report or no hypotheses, a run is named twice,
            or a variation is not valid.
    """
    _check(runs)
    known = [variation_of(text) for text in variations or []]
    files = {folder: (fetch(join(folder, NUMBERS_FILE)), fetch(join(folder, HYPOTHESES))) for folder in runs}
    # The digests are sorted, because the pipeline's loop may pass its results in any order, and that order
    # must not change the fingerprint.
    inputs = {
        "runs": sorted([sha256_of_file(file) for file in pair] for pair in files.values()),
        "title": title,
        "variations": [{"name": variation.name, **variation.overrides} for variation in known],
    }

    def work(folder: Path) -> Outcome:
        ranked = read_runs(files, {variation.name: variation for variation in known})
        write_comparison(folder, title or ranked[0].numbers["title"], ranked)
        best, worst = ranked[0], ranked[-1]
        short = short_name(best.numbers)
        rates = {f"{short.lower()} {run.name}": run.rate for run in ranked}
        return Outcome(
            f"{len(ranked)} runs: best {best.name}, {short} {best.rate:.2f} %; "
            f"worst {worst.name}, {worst.rate:.2f} %",
            {f"best {short.lower()}": best.rate, **rates},
            {"order": [run.name for run in ranked]},
        )

    return run_stage(STAGE, output, inputs, work, overwrite)


def _check(runs: list[str]) -> None:
    """Refuse fewer than two runs, a run that is named twice, and one without a report."""
    if len(runs) < 2:
        raise InputError(
            f"There is nothing to compare: --runs names {len(runs)} folder{'s' * (len(runs) != 1)} "
            "that score wrote; give two or more."
        )
    if repeated := sorted({folder for folder in runs if runs.count(folder) > 1}):
        raise InputError(f"--runs names {repeated[0]} twice: give each run once.")
    for folder in runs:
        if not exists(join(folder, NUMBERS_FILE)):
            raise InputError(
                f"{folder} contains no {NUMBERS_FILE}, so there is no report to compare: "
                "give folders that score wrote."
            )
