"""The Kubeflow component `decode`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("decode"), install_kfp_package=False)
def decode(
    store: str,
    manifests: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    shard: str,
    hypotheses: dsl.Output[dsl.Dataset],
    decoding_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Transcribe the test utterances, or one work shard of them.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        manifests: Pointer to the result folder of build-manifest; it carries the recipe.
        model: Pointer to the result folder of convert-checkpoint or open-model.
        shard: The work shard of this step, i/n.
        hypotheses: Pointer to the folder with hypotheses.jsonl.
        decoding_metrics: Numbers of utterances, cut answers and empty answers, and decoding speed.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        from slam_asr.artifacts.stage_record import follow_pointer, log_metrics, recipe_of, write_pointer
        from slam_asr.stages.decode import decode as run
        from slam_asr.stages.decode import recipe_for_model

        recipe, folder = recipe_of(manifests.path), follow_pointer(model.path)
        record = run(
            recipe_for_model(recipe, folder),
            folder,
            [f"{follow_pointer(manifests.path)}/test.jsonl"],
            f"{store}/decode/{{fingerprint}}",
            feature_store=f"{store}/features",
            work_shard=shard,
        )
        write_pointer(record, hypotheses.path, recipe, store)
        log_metrics(record, decoding_metrics.log_metric)
