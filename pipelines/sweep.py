"""The pipeline that sweeps: variations of one recipe, each trained and measured over the same manifest and features, and one page that compares them."""

from collections.abc import Callable

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.build_manifest.component import build_manifest
from components.build_manifest.plan_sweep import plan_sweep
from components.build_manifest.vary_recipe import vary_recipe
from components.convert_checkpoint.component import convert_checkpoint
from components.decode.compare_runs import compare_runs
from components.decode.component import decode
from components.decode.score import score
from components.extract_features.component import extract_features
from components.train.component import train
from pipelines import SWEEP

DESCRIPTION = (
    "Train a SLAM-ASR speech recogniser in several variations over one feature store, and compare them."
)


def build_pipeline(
    place: Callable[[str, dsl.PipelineTask], None] = lambda stage, task: None,
    trainjob: str = "",
    parallel: int = 0,
) -> BaseComponent:
    """The pipeline.

    Args:
        place: called with each step's stage and task, to say what the step gets of the cluster.
        trainjob: how the nodes of a training over several nodes are placed (JSON); empty: each trains in its own pod.
        parallel: variations that run at the same time; 0 for all.
    """

    @dsl.pipeline(name=SWEEP, display_name="SLAM-ASR: sweep", description=DESCRIPTION)
    def sweep(corpus: str, recipe: str, variations: list, store: str, recipe_overrides: dict = {}):  # noqa: B006 - kfp needs a literal
        """Train and measure variations of a recipe, and compare them.

        Args:
            corpus: What to train on and to measure with: the s3:// prefix of the corpus, of any kind that build-manifest reads.
            recipe: How: the name of a shipped recipe such as `librispeech`, or a recipe's YAML.
            variations: What each variation changes, by full name: [{"name": "slow", "training.learning_rate": 0.0001}, …]. Corpus, encoder and features are shared.
            store: Where to: s3:// prefix for the results of all stages, which runs may share. Results that are there already are used again.
            recipe_overrides: Changes to single fields of the recipe for all variations, by full name.
        """
        planned = plan_sweep(
            recipe=recipe, recipe_overrides=recipe_overrides, variations=variations, store=store
        )
        manifest = build_manifest(
            recipe=recipe, recipe_overrides=recipe_overrides, corpus=corpus, store=store
        ).after(planned)
        resolved, manifests = manifest.outputs["resolved_recipe"], manifest.outputs["manifests"]
        with dsl.ParallelFor(manifest.outputs["Output"], name="extraction") as part:
            extraction = extract_features(store=store, recipe=resolved, manifests=manifests, shard=part)
        with dsl.ParallelFor(
            planned.outputs["Output"], name="variations", parallelism=parallel or None
        ) as variation:
            # kfp cannot hand what one loop collected to another loop's steps: they find the features in the store, once all are there.
            varied = vary_recipe(store=store, recipe=resolved, variation=variation).after(extraction)
            own = varied.outputs["resolved_recipe"]
            training = train(store=store, recipe=own, manifests=manifests, trainjob=trainjob)
            conversion = convert_checkpoint(
                store=store, recipe=own, checkpoint=training.outputs["checkpoint"]
            )
            model = conversion.outputs["model"]
            with dsl.ParallelFor(conversion.outputs["Output"], name="decoding") as part:
                decoding = decode(store=store, recipe=own, manifests=manifests, model=model, shard=part)
            scoring = score(
                store=store, recipe=own, model=model, hypotheses=dsl.Collected(decoding.outputs["hypotheses"])
            )
        comparison = compare_runs(
            store=store,
            recipe=resolved,
            variations=planned.outputs["Output"],
            scores=dsl.Collected(scoring.outputs["scores"]),
        )
        for task in (
            planned,
            manifest,
            extraction,
            varied,
            training,
            conversion,
            decoding,
            scoring,
            comparison,
        ):
            # As in the pipeline that trains once: each stage looks itself, in the store, for what is there.
            task.set_caching_options(False)
            place(task.name, task)

    return sweep


sweep = build_pipeline(parallel=1)
"""As it runs on this machine: one training at a time."""
