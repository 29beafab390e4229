"""The Kubeflow component `convert-checkpoint`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("convert-checkpoint"), install_kfp_package=False)
def convert_checkpoint(
    store: str,
    checkpoint: dsl.Input[dsl.Model],
    model: dsl.Output[dsl.Model],
    model_metrics: dsl.Output[dsl.Metrics],
) -> list[str]:
    """Convert a training checkpoint into a model folder.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        checkpoint: Pointer to the result folder of train; it carries the recipe, whose decoding.checkpoint
            selects the checkpoint: latest, best or average.
        model: Pointer to the folder with projector.safetensors and config.json.
        model_metrics: Number of trained parameters.

    Returns:
        The work shards of decode: 1/n, 2/n and so on.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        from slam_asr.artifacts.stage_record import follow_pointer, log_metrics, recipe_of, write_pointer
        from slam_asr.runtime.work_split import all_work_shards
        from slam_asr.stages.convert_checkpoint import convert_checkpoint as run

        recipe = recipe_of(checkpoint.path)
        record = run(
            follow_pointer(checkpoint.path),
            f"{store}/convert-checkpoint/{{fingerprint}}",
            recipe=recipe,
            which=recipe.decoding.checkpoint,
        )
        write_pointer(record, model.path, recipe, store)
        log_metrics(record, model_metrics.log_metric)
        return all_work_shards(recipe.decoding.parts)
