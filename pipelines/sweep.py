"""The sweep pipeline: train and evaluate several variations of one recipe, and compare them on one page.

All variations share one manifest and one feature store.
"""

from collections.abc import Callable

from kfp import dsl
from kfp.dsl.base_component import BaseComponent
from kfp.dsl.pipeline_channel import PipelineChannel

from components.build_manifest.component import build_manifest
from components.build_manifest.plan_sweep import plan_sweep
from components.build_manifest.vary_recipe import vary_recipe
from components.convert_checkpoint.component import convert_checkpoint
from components.decode.compare_runs import compare_runs
from components.decode.component import decode
from components.decode.score import score
from components.extract_features.component import extract_features
from components.train.component import train
from pipelines.asr import Place, apply_settings
from pipelines.notice import Steps, without_notice
from slam_asr.steps import SWEEP

DESCRIPTION = (
    "Train a SLAM-ASR speech recogniser in several variations over one feature store, and compare them."
)


def build_pipeline(
    place: Place = lambda step, task: None,
    trainjob: str = "",
    parallel: int = 0,
    ending: Callable[[Steps], Steps] = without_notice,
) -> BaseComponent:
    """Build the sweep pipeline.

    Args:
        place: called with each step's name and task.
        trainjob: the `Placement` of the nodes of multi-node training, as JSON; if empty, the step's own pod
            trains.
        parallel: number of variations that run at the same time; 0 for all.
        ending: decorator for the pipeline's function, which may add a task that runs at the end.
    """

    @dsl.pipeline(name=SWEEP, display_name="SLAM-ASR: sweep", description=DESCRIPTION)
    @ending
    def sweep(corpus: str, recipe: str, variations: list, store: str, recipe_overrides: dict = {}) -> None:  # noqa: B006 - kfp needs a literal
        """Train and measure variations of a recipe, and compare them.

        Args:
            corpus: s3:// prefix of the corpus to train and test on, in any format that build-manifest reads.
            recipe: Name of a shipped recipe such as `librispeech`, or the YAML text of a recipe.
            variations: List of variations, such as [{"name": "slow", "training.learning_rate": 0.0001}].
            store: s3:// prefix for the results of all stages. Runs may share it; existing results are reused.
            recipe_overrides: Changes to single keys of the recipe for all variations.
        """
        planned = plan_sweep(
            recipe=recipe, recipe_overrides=recipe_overrides, variations=variations, store=store
        )
        manifest = build_manifest(
            recipe=recipe, recipe_overrides=recipe_overrides, corpus=corpus, store=store
        ).after(planned)
        manifests = manifest.outputs["manifests"]
        with dsl.ParallelFor(manifest.outputs["Output"], name="extract-features") as shard:
            extraction = extract_features(store=store, manifests=manifests, shard=shard)
        with dsl.ParallelFor(
            planned.outputs["Output"], name="variations", parallelism=parallel or None
        ) as variation:
            # kfp cannot pass the collected outputs of one loop to the steps of another. `train` therefore
            # reads the features from the store, and this loop waits until all of them are extracted.
            varied = vary_recipe(store=store, manifests=manifests, variation=variation).after(extraction)
            trained = _train_and_measure(store, varied.outputs["varied_manifests"], trainjob)
        comparison = compare_runs(
            store=store,
            planned=planned.outputs["planned"],
            variations=planned.outputs["Output"],
            scores=dsl.Collected(trained[-1].outputs["scores"]),
        )
        apply_settings(place, planned, manifest, extraction, varied, *trained, comparison)

    return sweep


def _train_and_measure(
    store: PipelineChannel, manifests: PipelineChannel, trainjob: str
) -> tuple[dsl.PipelineTask, ...]:
    """Add the steps of one variation to the pipeline, and return their tasks; the last one scores."""
    training = train(store=store, manifests=manifests, trainjob=trainjob)
    conversion = convert_checkpoint(store=store, checkpoint=training.outputs["checkpoint"])
    model = conversion.outputs["model"]
    with dsl.ParallelFor(conversion.outputs["Output"], name="decode") as shard:
        decoding = decode(store=store, manifests=manifests, model=model, shard=shard)
    scoring = score(store=store, model=model, hypotheses=dsl.Collected(decoding.outputs["hypotheses"]))
    return training, conversion, decoding, scoring


sweep = build_pipeline(parallel=1)
"""The pipeline as it runs on this machine: one variation at a time."""
