"""The Kubeflow component `open-model`, which runs in the image of `convert-checkpoint`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("open-model"), install_kfp_package=False)
def open_model(
    recipe: str,
    model: str,
    store: str,
    opened: dsl.Output[dsl.Model],
    model_metrics: dsl.Output[dsl.Metrics],
    recipe_overrides: dict = {},  # noqa: B006 - kfp needs a literal
) -> list[str]:
    """Open a trained model, and check that it fits the recipe that evaluates it.

    Args:
        recipe: Name of a shipped recipe, or the YAML text of a recipe.
        model: Folder or s3:// prefix of a model, or the name of a shipped model.
        store: Folder or s3:// prefix for the results of all stages.
        opened: Pointer to the model's folder.
        model_metrics: Metrics from the model's record.
        recipe_overrides: Changes to single keys of the recipe, by full name, such as {"data.train": []}.

    Returns:
        The work shards of decode: 1/n, 2/n and so on.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        from slam_asr.artifacts.stage_record import log_metrics, write_pointer
        from slam_asr.config.recipe import load_recipe
        from slam_asr.conversion.trained import adopt_trained_model as run
        from slam_asr.runtime.work_split import all_work_shards

        resolved = load_recipe(recipe, recipe_overrides)
        record = run(resolved, model, f"{store}/models/{{fingerprint}}")
        write_pointer(record, opened.path, resolved, store)
        log_metrics(record, model_metrics.log_metric)
        return all_work_shards(resolved.decoding.parts)
