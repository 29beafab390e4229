"""The Kubeflow component `vary-recipe`, which runs in the image of `build-manifest`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("vary-recipe"), install_kfp_package=False)
def vary_recipe(
    store: str,
    recipe: dsl.Input[dsl.Artifact],
    variation: str,
    varied: dsl.Output[dsl.Artifact],
    resolved_recipe: dsl.Output[dsl.Artifact],
) -> None:
    """Write the recipe of one variation of a sweep.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        recipe: The resolved recipe that all variations start from.
        variation: JSON with name and overrides, an element of plan-sweep's output.
        varied: Pointer to the folder with recipe.yaml.
        resolved_recipe: The variation's recipe with every key spelt out; its later steps read it.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        import shutil

        from slam_asr.artifacts.stage_record import write_pointer
        from slam_asr.config.recipe import load_recipe
        from slam_asr.config.variations import variation_of
        from slam_asr.stages.sweep import RECIPE
        from slam_asr.stages.sweep import vary_recipe as run

        record = run(
            load_recipe(recipe.path), variation_of(variation), f"{store}/vary-recipe/{{fingerprint}}"
        )
        write_pointer(record, varied.path)
        shutil.copyfile(record.file(RECIPE), resolved_recipe.path)
