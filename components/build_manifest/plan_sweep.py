"""The Kubeflow component `plan-sweep`, which runs in the image of `build-manifest`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("plan-sweep"), install_kfp_package=False)
def plan_sweep(
    recipe: str,
    variations: list,
    store: str,
    planned: dsl.Output[dsl.Artifact],
    sweep_metrics: dsl.Output[dsl.Metrics],
    recipe_overrides: dict = {},  # noqa: B006 - kfp needs a literal
) -> list[str]:
    """Check all variations of a sweep before any of them runs.

    Args:
        recipe: Name of a shipped recipe, or the YAML text of a recipe.
        variations: Sets of changes, each optionally with a name: [{"name": "slow", "training.epochs": 1}].
        store: Folder or s3:// prefix for the results of all stages.
        planned: Pointer to the folder with variations.json; it carries the recipe that is varied.
        sweep_metrics: Number of variations.
        recipe_overrides: Changes to single keys of the recipe for all variations, by full name.

    Returns:
        The variations, each as JSON with its name and its overrides.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        from slam_asr.artifacts.stage_record import log_metrics, write_pointer
        from slam_asr.config.recipe import load_recipe
        from slam_asr.stages.sweep import plan_sweep as run

        resolved = load_recipe(recipe, recipe_overrides)
        record, variation_list = run(resolved, variations, f"{store}/plan-sweep/{{fingerprint}}")
        write_pointer(record, planned.path, resolved, store)
        log_metrics(record, sweep_metrics.log_metric)
        return [variation.as_json() for variation in variation_list]
