"""The Kubeflow component `extract-features`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("extract-features"), install_kfp_package=False)
def extract_features(
    store: str,
    manifests: dsl.Input[dsl.Dataset],
    shard: str,
    features: dsl.Output[dsl.Dataset],
    extraction_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Run the frozen speech encoder once over all utterances and save its outputs.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        manifests: Pointer to the result folder of build-manifest; it carries the recipe.
        shard: The work shard of this step, i/n.
        features: Pointer to the record of this work shard in the feature store.
        extraction_metrics: Number of utterances, number of new ones, hours of audio, megabytes of features.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        from slam_asr.artifacts.stage_record import follow_pointer, log_metrics, recipe_of, write_pointer
        from slam_asr.stages.extract_features import extract_features as run

        recipe = recipe_of(manifests.path)
        record = run(recipe, [follow_pointer(manifests.path)], f"{store}/features", shard)
        write_pointer(record, features.path, recipe, store)
        log_metrics(record, extraction_metrics.log_metric)
