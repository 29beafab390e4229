"""`decode` as a Kubeflow component."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("decode"), install_kfp_package=False)
def decode(
    store: str,
    recipe: dsl.Input[dsl.Artifact],
    manifests: dsl.Input[dsl.Dataset],
    features: dsl.Input[list[dsl.Dataset]],
    model: dsl.Input[dsl.Model],
    hypotheses: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
):
    """Transcribe the test utterances and report the word error rate.

    Args:
        store: Folder that keeps the results of all stages.
        recipe: The resolved recipe.
        manifests: Pointer to the folder of build-manifest.
        features: Pointers to the parts of extract-features.
        model: Pointer to the folder of convert-checkpoint.
        hypotheses: Pointer to the folder with hypotheses.jsonl and wer.json.
        report: Word error rates, alignments and the worst utterances.
        summary: The same in short.
        metrics: Word error rates in percent, with their controls.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        import shutil

        from slam_asr.decoding.decode import decode as run
        from slam_asr.recipe import load_recipe
        from slam_asr.stage import follow_parts, follow_pointer, log_metrics, write_pointer

        record = run(
            load_recipe(recipe.path),
            follow_pointer(model.path),
            [f"{follow_pointer(manifests.path)}/test.jsonl"],
            f"{store}/decode/{{fingerprint}}",
            feature_store=follow_parts(f.path for f in features),
        )
        write_pointer(record, hypotheses.path)
        shutil.copyfile(record.file("report.html"), report.path)
        shutil.copyfile(record.file("report.md"), summary.path)
        log_metrics(record, metrics.log_metric)
