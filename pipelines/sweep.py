"""The sweep pipeline: train and evaluate several variations of one recipe, and compare them on one page.

All variations share one manifest and one feature store.
"""

from collections.abc import Callable

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.build_manifest.component import build_manifest
from components.build_manifest.plan_sweep import plan_sweep
from components.build_manifest.vary_recipe import vary_recipe
from components.decode.compare_runs import compare_runs
from components.extract_features.component import extract_features
from components.train.component import train
from pipelines.asr import Place, apply_settings, convert_and_measure
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
            varied_manifests = varied.outputs["varied_manifests"]
            training = train(store=store, manifests=varied_manifests, trainjob=trainjob)
            conversion, decoding, scoring = convert_and_measure(store, varied_manifests, training)
        comparison = compare_runs(
            store=store,
            planned=planned.outputs["planned"],
            variations=planned.outputs["Output"],
            scores=dsl.Collected(scoring.outputs["scores"]),
        )
        tasks = (planned, manifest, extraction, varied, training, conversion, decoding, scoring, comparison)
        apply_settings(place, *tasks)

    return sweep


sweep = build_pipeline(parallel=1)
"""The pipeline as it runs on this machine: one variation at a time."""
