"""The pipeline: from a corpus to a trained recogniser and its word error rate."""

from collections.abc import Callable

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.build_manifest.component import build_manifest
from components.convert_checkpoint.component import convert_checkpoint
from components.decode.component import decode
from components.decode.score import score
from components.extract_features.component import extract_features
from components.train.component import train
from pipelines import TRAINING

DESCRIPTION = (
    "Train a SLAM-ASR speech recogniser and measure it: a frozen speech encoder, a frozen LLM, "
    "and the trained projector between them."
)


def build_pipeline(
    place: Callable[[str, dsl.PipelineTask], None] = lambda stage, task: None, trainjob: str = ""
) -> BaseComponent:
    """The pipeline.

    Args:
        place: called with each step's stage and task, to say what the step gets of the cluster.
        trainjob: how the nodes of a training over several nodes are placed (JSON); empty: it trains in its own pod.
    """

    @dsl.pipeline(name=TRAINING, display_name="SLAM-ASR", description=DESCRIPTION)
    def asr(corpus: str, recipe: str, store: str, recipe_overrides: dict = {}):  # noqa: B006 - kfp needs a literal
        """Train a SLAM-ASR speech recogniser and measure it.

        Args:
            corpus: What to train on and to measure with: the s3:// prefix of the corpus, of any kind that build-manifest reads.
            recipe: How: the name of a shipped recipe such as `librispeech`, or a recipe's YAML.
            store: Where to: s3:// prefix for the results of all stages, which runs may share. Results that are there already are used again.
            recipe_overrides: Changes to single fields of the recipe, by full name: {"training.epochs": 1, "llm.name": "…"}.
        """
        manifest = build_manifest(
            recipe=recipe, recipe_overrides=recipe_overrides, corpus=corpus, store=store
        )
        resolved, manifests = manifest.outputs["resolved_recipe"], manifest.outputs["manifests"]
        # kfp's local runner knows loops over a step's only return value, so each list comes from the step before its loop.
        with dsl.ParallelFor(manifest.outputs["Output"], name="extraction") as part:
            extraction = extract_features(store=store, recipe=resolved, manifests=manifests, shard=part)
        features = dsl.Collected(extraction.outputs["features"])
        training = train(
            store=store, recipe=resolved, manifests=manifests, features=features, trainjob=trainjob
        )
        conversion = convert_checkpoint(
            store=store, recipe=resolved, checkpoint=training.outputs["checkpoint"]
        )
        model = conversion.outputs["model"]
        with dsl.ParallelFor(conversion.outputs["Output"], name="decoding") as part:
            decoding = decode(store=store, recipe=resolved, manifests=manifests, model=model, shard=part)
        scoring = score(
            store=store,
            recipe=resolved,
            model=model,
            hypotheses=dsl.Collected(decoding.outputs["hypotheses"]),
        )
        for task in (manifest, extraction, training, conversion, decoding, scoring):
            # Kubeflow's cache knows neither the corpus' content nor a half-done training, and would hand out
            # a pointer whose folder was deleted since: each stage looks itself, in the store, for what is there.
            task.set_caching_options(False)
            place(task.name, task)

    return asr


asr = build_pipeline()
"""As it runs on this machine."""
