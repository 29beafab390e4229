"""The Kubeflow component `score`, which runs in the image of `decode`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("score"), install_kfp_package=False)
def score(
    store: str,
    recipe: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    hypotheses: dsl.Input[list[dsl.Dataset]],
    scores: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Join the transcripts of all work shards and report the word error rate.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        recipe: The resolved recipe.
        model: Pointer to the result folder of convert-checkpoint.
        hypotheses: Pointers to the results of decode, one per work shard.
        scores: Pointer to the folder with hypotheses.jsonl and wer.json.
        report: Page with word error rates, alignments and the worst utterances.
        summary: Short version of the report.
        metrics: Word error rates in percent, including the control experiments.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        import shutil

        from slam_asr.artifacts.stage_record import follow_pointer, log_metrics, write_pointer
        from slam_asr.config.recipe import load_recipe
        from slam_asr.stages.score import score as run

        record = run(
            load_recipe(recipe.path),
            follow_pointer(model.path),
            [follow_pointer(part.path) for part in hypotheses],
            f"{store}/score/{{fingerprint}}",
        )
        write_pointer(record, scores.path)
        shutil.copyfile(record.file("report.html"), report.path)
        shutil.copyfile(record.file("report.md"), summary.path)
        log_metrics(record, metrics.log_metric)
