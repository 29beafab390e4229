"""The Kubeflow component `vary-recipe`, which runs in the image of `build-manifest`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("vary-recipe"), install_kfp_package=False)
def vary_recipe(
    store: str,
    manifests: dsl.Input[dsl.Dataset],
    variation: str,
    varied: dsl.Output[dsl.Artifact],
    varied_manifests: dsl.Output[dsl.Dataset],
) -> None:
    """Write the recipe of one variation of a sweep.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        manifests: Pointer to the result folder of build-manifest; it carries the recipe that is varied.
        variation: JSON with name and overrides, an element of plan-sweep's output.
        varied: Pointer to the folder with recipe.yaml.
        varied_manifests: Pointer to the same manifests; it carries the variation's recipe to later steps.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        from slam_asr.artifacts.stage_record import follow_pointer, recipe_of, require_record, write_pointer
        from slam_asr.config.recipe import load_recipe
        from slam_asr.config.variations import variation_of
        from slam_asr.stages.sweep import RECIPE
        from slam_asr.stages.sweep import vary_recipe as run

        folder = follow_pointer(manifests.path)
        record = run(
            recipe_of(manifests.path), variation_of(variation), f"{store}/vary-recipe/{{fingerprint}}"
        )
        write_pointer(record, varied.path, None, store)
        built = require_record(folder, "build-manifest")
        write_pointer(built, varied_manifests.path, load_recipe(str(record.file(RECIPE))))
