"""`vary-recipe` as a Kubeflow component, in the image of the stage `build-manifest`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("vary-recipe"), install_kfp_package=False)
def vary_recipe(
    store: str,
    recipe: dsl.Input[dsl.Artifact],
    variation: str,
    varied: dsl.Output[dsl.Artifact],
    resolved_recipe: dsl.Output[dsl.Artifact],
):
    """Write the recipe of one variation of a sweep.

    Args:
        store: Folder that keeps the results of all stages.
        recipe: The resolved recipe that all variations start from.
        variation: Name and overrides, as plan-sweep gives them.
        varied: Pointer to the folder with recipe.yaml.
        resolved_recipe: The variation's recipe with every key spelt out; the steps after this one read it.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        import shutil

        from slam_asr.recipe import load_recipe
        from slam_asr.stage import write_pointer
        from slam_asr.sweeping.plan import RECIPE
        from slam_asr.sweeping.plan import vary_recipe as run
        from slam_asr.sweeping.variations import variation_of

        record = run(
            load_recipe(recipe.path), variation_of(variation), f"{store}/vary-recipe/{{fingerprint}}"
        )
        write_pointer(record, varied.path)
        shutil.copyfile(record.file(RECIPE), resolved_recipe.path)
