"""`open-model` as a Kubeflow component, in the image of the stage `convert-checkpoint`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("open-model"), install_kfp_package=False)
def open_model(
    recipe: str,
    model: str,
    store: str,
    opened: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    recipe_overrides: dict = {},  # noqa: B006 - kfp needs a literal
) -> list[str]:
    """Find a trained model, and compare it with the recipe that is to measure it.

    Args:
        recipe: Name of a shipped recipe, or a recipe's YAML.
        model: Folder or s3:// prefix of a model, or the name of a shipped one.
        store: Folder that keeps the results of all stages.
        opened: Pointer to the model's folder.
        metrics: What the model's record says of it.
        recipe_overrides: Values that replace the recipe's, by full name, such as {"data.train": []}.

    Returns:
        The parts that decoding is divided into: 1/n, 2/n and so on.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        from slam_asr.conversion.trained import take_model as run
        from slam_asr.recipe import load_recipe
        from slam_asr.stage import log_metrics, write_pointer
        from slam_asr.work_split import all_work_shards

        resolved = load_recipe(recipe, recipe_overrides)
        record = run(resolved, model, f"{store}/models/{{fingerprint}}")
        write_pointer(record, opened.path)
        log_metrics(record, metrics.log_metric)
        return all_work_shards(resolved.decoding.parts)
