"""The Kubeflow component `extract-features`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("extract-features"), install_kfp_package=False)
def extract_features(
    store: str,
    recipe: dsl.Input[dsl.Artifact],
    manifests: dsl.Input[dsl.Dataset],
    shard: str,
    features: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Run the frozen speech encoder once over all utterances and save its outputs.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        recipe: The resolved recipe.
        manifests: Pointer to the result folder of build-manifest.
        shard: The work shard of this step, i/n.
        features: Pointer to the record of this work shard in the feature store.
        metrics: Number of utterances, hours of audio, megabytes of features.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        from slam_asr.artifacts.stage_record import follow_pointer, log_metrics, write_pointer
        from slam_asr.config.recipe import load_recipe
        from slam_asr.stages.extract_features import extract_features as run

        record = run(load_recipe(recipe.path), [follow_pointer(manifests.path)], f"{store}/features", shard)
        write_pointer(record, features.path)
        log_metrics(record, metrics.log_metric)
