"""The evaluation pipeline: from a trained model and test sets to word error rates."""

from collections.abc import Callable

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.build_manifest.component import build_manifest
from components.convert_checkpoint.open_model import open_model
from components.decode.component import decode
from components.decode.score import score
from components.extract_features.component import extract_features
from pipelines.asr import Place, apply_settings
from pipelines.notice import Steps, without_notice
from slam_asr.steps import EVALUATION

DESCRIPTION = "Measure a trained SLAM-ASR model: decode test sets and report their word error rates."


def build_pipeline(
    place: Place = lambda step, task: None, ending: Callable[[Steps], Steps] = without_notice
) -> BaseComponent:
    """Build the evaluation pipeline.

    Args:
        place: called with each step's name and task.
        ending: decorator for the pipeline's function, which may add a task that runs at the end.
    """

    @dsl.pipeline(name=EVALUATION, display_name="SLAM-ASR: evaluate", description=DESCRIPTION)
    @ending
    def evaluate(
        corpus: str,
        recipe: str,
        model: str,
        store: str,
        recipe_overrides: dict = {"data.train": [], "data.dev": []},  # noqa: B006 - kfp needs a literal
    ) -> None:
        """Measure a trained SLAM-ASR model.

        Args:
            corpus: s3:// prefix of the corpus to test on, in any format that build-manifest reads.
            recipe: Name of a shipped recipe such as `librispeech`, or the YAML text of a recipe.
            model: s3:// prefix of a model folder, or the name of a shipped model.
            store: s3:// prefix for the results of all stages. Runs may share it; existing results are reused.
            recipe_overrides: Changes to single keys of the recipe. data.train and data.dev must be empty.
        """
        opened = open_model(recipe=recipe, recipe_overrides=recipe_overrides, model=model, store=store)
        # The model is opened first: if it does not fit the recipe, the run fails before any audio is read.
        manifest = build_manifest(
            recipe=recipe, recipe_overrides=recipe_overrides, corpus=corpus, store=store
        ).after(opened)
        manifests, trained = manifest.outputs["manifests"], opened.outputs["opened"]
        with dsl.ParallelFor(manifest.outputs["Output"], name="extract-features") as shard:
            extraction = extract_features(store=store, manifests=manifests, shard=shard)
        with dsl.ParallelFor(opened.outputs["Output"], name="decode") as shard:
            decoding = decode(store=store, manifests=manifests, model=trained, shard=shard)
            # `decode` reads the features from the store, so kfp sees no dependency on the extraction.
            decoding.after(extraction)
        scoring = score(store=store, model=trained, hypotheses=dsl.Collected(decoding.outputs["hypotheses"]))
        apply_settings(place, opened, manifest, extraction, decoding, scoring)

    return evaluate


evaluate = build_pipeline()
"""The pipeline as it runs on this machine."""
