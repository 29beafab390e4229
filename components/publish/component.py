"""The Kubeflow component `publish`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("publish"), install_kfp_package=False)
def publish(
    store: str,
    model: dsl.Input[dsl.Model],
    scores: dsl.Input[dsl.Dataset],
    publication: dsl.Output[dsl.Artifact],
    decision: dsl.Output[dsl.Markdown],
    run_report: dsl.Output[dsl.HTML],
    publication_metrics: dsl.Output[dsl.Metrics],
    run: str = "",
) -> None:
    """Register the model in a model registry, if it passes the recipe's gate.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        model: Pointer to the result folder of convert-checkpoint.
        scores: Pointer to the result folder of score; it carries the recipe.
        publication: Pointer to the folder with decision.json.
        decision: Page that states whether the model was published, why, and as which version.
        run_report: The report of score, with the decision, and with the time and cost of the complete run.
        publication_metrics: 1 if the model is published, else 0.
        run: Id of the run, which becomes a property of the registered version.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        import shutil

        from slam_asr.artifacts.stage_record import follow_pointer, log_metrics, recipe_of, write_pointer
        from slam_asr.scoring.run_page import write_run_page
        from slam_asr.stages.publish import PAGE, REPORT
        from slam_asr.stages.publish import publish as stage

        record = stage(
            recipe_of(scores.path),
            follow_pointer(model.path),
            follow_pointer(scores.path),
            f"{store}/publish/{{fingerprint}}",
            run,
        )
        write_pointer(record, publication.path, store=store)
        shutil.copyfile(record.file(PAGE), decision.path)
        write_run_page(record.file(REPORT), run_report.path, store)
        log_metrics(record, publication_metrics.log_metric)
