"""The Kubeflow component `convert-checkpoint`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("convert-checkpoint"), install_kfp_package=False)
def convert_checkpoint(
    store: str,
    recipe: dsl.Input[dsl.Artifact],
    checkpoint: dsl.Input[dsl.Model],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> list[str]:
    """Convert a training checkpoint into the projector's weights and the model's configuration.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        recipe: The resolved recipe; its decoding.checkpoint selects the checkpoint, latest or best.
        checkpoint: Pointer to the result folder of train.
        model: Pointer to the folder with projector.safetensors and config.json.
        metrics: Number of the projector's parameters.

    Returns:
        The work shards of decode: 1/n, 2/n and so on.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        from slam_asr.artifacts.stage_record import follow_pointer, log_metrics, write_pointer
        from slam_asr.config.recipe import load_recipe
        from slam_asr.runtime.work_split import all_work_shards
        from slam_asr.stages.convert_checkpoint import convert_checkpoint as run

        resolved = load_recipe(recipe.path)
        record = run(
            follow_pointer(checkpoint.path),
            f"{store}/convert-checkpoint/{{fingerprint}}",
            recipe=resolved,
            which=resolved.decoding.checkpoint,
        )
        write_pointer(record, model.path)
        log_metrics(record, metrics.log_metric)
        return all_work_shards(resolved.decoding.parts)
