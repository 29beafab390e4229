"""The pipeline that only measures: from a trained model and test sets to their word error rates."""

from collections.abc import Callable

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.build_manifest.component import build_manifest
from components.convert_checkpoint.open_model import open_model
from components.decode.component import decode
from components.decode.score import score
from components.extract_features.component import extract_features
from pipelines import EVALUATION

DESCRIPTION = "Measure a trained SLAM-ASR model: decode test sets and report their word error rates."


def build_pipeline(
    place: Callable[[str, dsl.PipelineTask], None] = lambda stage, task: None,
) -> BaseComponent:
    """The pipeline.

    Args:
        place: called with each step's stage and task, to say what the step gets of the cluster.
    """

    @dsl.pipeline(name=EVALUATION, display_name="SLAM-ASR: evaluate", description=DESCRIPTION)
    def evaluate(
        corpus: str,
        recipe: str,
        model: str,
        store: str,
        recipe_overrides: dict = {"data.train": [], "data.dev": []},  # noqa: B006 - kfp needs a literal
    ):
        """Measure a trained SLAM-ASR model.

        Args:
            corpus: What to measure with: the s3:// prefix of the corpus, of any kind that build-manifest reads.
            recipe: How: the name of a shipped recipe such as `librispeech`, or a recipe's YAML. Its data.test names the test sets.
            model: What to measure: the s3:// prefix of a model folder, or the name of a shipped model.
            store: Where to: s3:// prefix for the results of all stages, which runs may share. Results that are there already are used again.
            recipe_overrides: Changes to single fields of the recipe, by full name. data.train and data.dev must be empty.
        """
        opened = open_model(recipe=recipe, recipe_overrides=recipe_overrides, model=model, store=store)
        # A model that does not fit is answered before any audio is read.
        manifest = build_manifest(
            recipe=recipe, recipe_overrides=recipe_overrides, corpus=corpus, store=store
        ).after(opened)
        resolved, manifests = manifest.outputs["resolved_recipe"], manifest.outputs["manifests"]
        with dsl.ParallelFor(manifest.outputs["Output"], name="extraction") as part:
            extraction = extract_features(store=store, recipe=resolved, manifests=manifests, shard=part)
        with dsl.ParallelFor(opened.outputs["Output"], name="decoding") as part:
            decoding = decode(
                store=store, recipe=resolved, manifests=manifests, model=opened.outputs["opened"], shard=part
            )
            decoding.after(extraction)
        scoring = score(
            store=store,
            recipe=resolved,
            model=opened.outputs["opened"],
            hypotheses=dsl.Collected(decoding.outputs["hypotheses"]),
        )
        for task in (opened, manifest, extraction, decoding, scoring):
            # As in the pipeline that trains: each stage looks itself, in the store, for what is there.
            task.set_caching_options(False)
            place(task.name, task)

    return evaluate


evaluate = build_pipeline()
"""As it runs on this machine."""
