"""The training pipeline: from a corpus to a trained recogniser and its word error rate."""

from collections.abc import Callable

from kfp import dsl
from kfp.dsl.base_component import BaseComponent
from kfp.dsl.pipeline_channel import PipelineChannel

from components.build_manifest.component import build_manifest
from components.convert_checkpoint.component import convert_checkpoint
from components.decode.component import decode
from components.decode.score import score
from components.extract_features.component import extract_features
from components.publish.component import publish
from components.publish.open_registry import open_registry
from components.train.component import train
from pipelines.notice import Steps, without_notice
from slam_asr.steps import PUBLISHING, TRAINING

Place = Callable[[str, dsl.PipelineTask], None]
"""A function that takes a step's name and its task, and assigns the cluster's resources to the task."""

DESCRIPTION = (
    "Train a SLAM-ASR speech recogniser and measure it: a frozen speech encoder, a frozen LLM, "
    "and the trained projector between them."
)


def build_pipeline(
    place: Place = lambda step, task: None,
    trainjob: str = "",
    publishes: bool = False,
    ending: Callable[[Steps], Steps] = without_notice,
) -> BaseComponent:
    """Build the training pipeline.

    Args:
        place: called with each step's name and task.
        trainjob: the `Placement` of the nodes of multi-node training, as JSON; if empty, the step's own pod
            trains.
        publishes: whether the pipeline ends with the step `publish`, which registers the model.
        ending: decorator for the pipeline's function, which may add a task that runs at the end.
    """

    @dsl.pipeline(
        name=PUBLISHING if publishes else TRAINING,
        display_name="SLAM-ASR: train and publish" if publishes else "SLAM-ASR",
        description=DESCRIPTION,
    )
    @ending
    def asr(corpus: str, recipe: str, store: str, recipe_overrides: dict = {}) -> None:  # noqa: B006 - kfp needs a literal
        """Train a SLAM-ASR speech recogniser and measure it.

        Args:
            corpus: s3:// prefix of the corpus to train and test on, in any format that build-manifest reads.
            recipe: Name of a shipped recipe such as `librispeech`, or the YAML text of a recipe.
            store: s3:// prefix for the results of all stages. Runs may share it; existing results are reused.
            recipe_overrides: Changes to single keys of the recipe, such as {"training.epochs": 1}.
        """
        manifest = build_manifest(
            recipe=recipe, recipe_overrides=recipe_overrides, corpus=corpus, store=store
        )
        publication: list[dsl.PipelineTask] = []
        if publishes:
            # The registry comes first: if it does not answer, the run fails before anything is computed.
            opened = open_registry(recipe=recipe, recipe_overrides=recipe_overrides, store=store)
            manifest.after(opened)
            publication.append(opened)
        manifests = manifest.outputs["manifests"]
        # kfp's local runner can only loop over the single return value of a step, which kfp names `Output`.
        # Each list of work shards is therefore returned by the step before the loop.
        with dsl.ParallelFor(manifest.outputs["Output"], name="extract-features") as shard:
            extraction = extract_features(store=store, manifests=manifests, shard=shard)
        features = dsl.Collected(extraction.outputs["features"])
        training = train(store=store, manifests=manifests, features=features, trainjob=trainjob)
        conversion, decoding, scoring = convert_and_measure(store, manifests, training)
        if publishes:
            model, scores = conversion.outputs["model"], scoring.outputs["scores"]
            run = dsl.PIPELINE_JOB_ID_PLACEHOLDER
            publication.append(publish(store=store, model=model, scores=scores, run=run))
        apply_settings(place, manifest, extraction, training, conversion, decoding, scoring, *publication)

    return asr


def convert_and_measure(
    store: PipelineChannel, manifests: PipelineChannel, training: dsl.PipelineTask
) -> tuple[dsl.PipelineTask, dsl.PipelineTask, dsl.PipelineTask]:
    """Add the steps after a training to the pipeline, and return their tasks; the last one scores."""
    conversion = convert_checkpoint(store=store, checkpoint=training.outputs["checkpoint"])
    model = conversion.outputs["model"]
    with dsl.ParallelFor(conversion.outputs["Output"], name="decode") as shard:
        decoding = decode(store=store, manifests=manifests, model=model, shard=shard)
    scoring = score(store=store, model=model, hypotheses=dsl.Collected(decoding.outputs["hypotheses"]))
    return conversion, decoding, scoring


def apply_settings(place: Place, *tasks: dsl.PipelineTask) -> None:
    """Turn off Kubeflow's cache for the tasks, and call `place` for each of them.

    Kubeflow's cache does not notice that a corpus has changed or that a training is unfinished, and may
    return pointers to folders that have been deleted. Instead, each stage looks for its results in the store.
    """
    for task in tasks:
        task.set_caching_options(False)
        place(task.name, task)


asr = build_pipeline()
"""The pipeline as it runs on this machine."""
asr_publishing = build_pipeline(publishes=True)
"""The pipeline for recipes whose `publish.registry` names a registry."""
