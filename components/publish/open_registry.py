"""The Kubeflow component `open-registry`, which runs in the image of `publish`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("open-registry"), install_kfp_package=False)
def open_registry(
    recipe: str,
    store: str,
    registry: dsl.Output[dsl.Artifact],
    recipe_overrides: dict = {},  # noqa: B006 - kfp needs a literal
) -> None:
    """Check that the model registry answers, before anything is trained.

    Args:
        recipe: Name of a shipped recipe, or the YAML text of a recipe.
        store: Folder or s3:// prefix for the results of all stages.
        registry: Pointer to the folder with the result.
        recipe_overrides: Changes to single keys of the recipe, by full name.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        from slam_asr.artifacts.stage_record import write_pointer
        from slam_asr.config.recipe import load_recipe
        from slam_asr.stages.publish import check_registry

        record = check_registry(
            load_recipe(recipe, recipe_overrides), f"{store}/open-registry/{{fingerprint}}"
        )
        write_pointer(record, registry.path, store=store)
