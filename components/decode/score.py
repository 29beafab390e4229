"""The Kubeflow component `score`, which runs in the image of `decode`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("score"), install_kfp_package=False)
def score(
    store: str,
    model: dsl.Input[dsl.Model],
    hypotheses: dsl.Input[list[dsl.Dataset]],
    scores: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    word_error_rates: dsl.Output[dsl.Metrics],
) -> None:
    """Join the transcripts of all work shards and report the word error rate.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        model: Pointer to the result folder of convert-checkpoint or open-model.
        hypotheses: Pointers to the results of decode, one per work shard; they carry the recipe.
        scores: Pointer to the folder with hypotheses.jsonl and wer.json.
        report: Page with word error rates, alignments and the worst utterances.
        summary: Short version of the report.
        word_error_rates: Word and character error rates in percent, also of subsets and controls.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        import shutil

        from slam_asr.artifacts.stage_record import follow_pointer, log_metrics, recipe_of, write_pointer
        from slam_asr.scoring.run_page import write_run_page
        from slam_asr.stages.score import score as run

        recipe = recipe_of(hypotheses[0].path)
        record = run(
            recipe,
            follow_pointer(model.path),
            [follow_pointer(part.path) for part in hypotheses],
            f"{store}/score/{{fingerprint}}",
        )
        write_pointer(record, scores.path, recipe, store)
        write_run_page(record.file("report.html"), report.path, store)
        shutil.copyfile(record.file("report.md"), summary.path)
        log_metrics(record, word_error_rates.log_metric)
