"""The Kubeflow component `compare-runs`, which runs in the image of `decode`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("compare-runs"), install_kfp_package=False)
def compare_runs(
    store: str,
    planned: dsl.Input[dsl.Artifact],
    variations: list,
    scores: dsl.Input[list[dsl.Dataset]],
    comparison: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    word_error_rates: dsl.Output[dsl.Metrics],
) -> None:
    """Compare all variations of a sweep on one page.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        planned: Pointer to the result folder of plan-sweep; it carries the recipe that is varied.
        variations: Name and overrides of each variation, the output of plan-sweep.
        scores: Pointers to the result folders of score.
        comparison: Pointer to the folder with runs.html, runs.md and runs.json.
        report: Page with word error rates, differences and training curves of all variations.
        summary: Short version of the report.
        word_error_rates: Each variation's word (or character) error rate in percent, and the best of them.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        import shutil

        from slam_asr.artifacts.stage_record import follow_pointer, log_metrics, recipe_of, write_pointer
        from slam_asr.scoring.run_page import write_run_page
        from slam_asr.scoring.runs import MARKDOWN, PAGE
        from slam_asr.stages.compare_runs import compare_runs as run

        folders = [follow_pointer(part.path) for part in scores]
        record = run(
            folders,
            f"{store}/compare-runs/{{fingerprint}}",
            title=recipe_of(planned.path).name,
            variations=variations,
        )
        write_pointer(record, comparison.path, None, store)
        write_run_page(record.file(PAGE), report.path, store)
        shutil.copyfile(record.file(MARKDOWN), summary.path)
        log_metrics(record, word_error_rates.log_metric)
