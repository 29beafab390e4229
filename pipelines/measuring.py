"""What the command line knows of a pipeline that only measures a model (`--model`)."""

from dataclasses import replace

from slam_asr.conversion.shipped import shipped_models
from slam_asr.errors import UserError
from slam_asr.recipe import Recipe
from slam_asr.storage import is_s3, local_path


def recipe_of_pipeline(recipe: Recipe, model: str | None) -> Recipe:
    """The recipe that the pipeline runs by: where a model is only measured, without subsets for training.

    A model that lies here is compared with it at once; one in object storage is by the pipeline's first step.

    Raises:
        UserError: nothing to train on, or a model that was trained on other features.
    """
    if model is None:
        if not recipe.data.train:
            raise UserError(f"Recipe {recipe.name}: data.train names no subset; give at least one, such as [train-*], or a model to measure with --model.")
        return recipe
    recipe = replace(recipe, data=replace(recipe.data, train=[], dev=[]))
    if not is_s3(model):
        # Not at the top: torch comes with it.
        from slam_asr.conversion.model import read_config
        from slam_asr.conversion.trained import require_same_features

        require_same_features(recipe, model, read_config(model))
    return recipe


def place_of_model(model: str) -> str:
    """A model as the steps find it: a folder by its absolute path, any other as it is named."""
    return model if is_s3(model) or model in shipped_models() else str(local_path(model).absolute())


def base_models(recipe: Recipe, model: str | None) -> tuple[str, str]:
    """The names of encoder and LLM that a run needs: the recipe's, or the LLM that the model was trained with."""
    from slam_asr.conversion.model import read_config

    return recipe.encoder.name, (recipe if model is None else read_config(model).typed_recipe).llm.name
