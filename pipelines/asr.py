"""The pipeline: from a corpus to a trained recogniser and its word error rate."""

from kfp import dsl

from components.build_manifest.component import build_manifest
from components.convert_checkpoint.component import convert_checkpoint
from components.decode.component import decode
from components.extract_features.component import extract_features
from components.train.component import train

DESCRIPTION = (
    "Train a SLAM-ASR speech recogniser and measure it: a frozen speech encoder, a frozen LLM, "
    "and the trained projector between them."
)


@dsl.pipeline(name="asr", display_name="SLAM-ASR", description=DESCRIPTION)
def asr(recipe: str, corpus: str, store: str):
    """Train a SLAM-ASR speech recogniser and measure it.

    Args:
        recipe: Name of a shipped recipe such as `librispeech`, or a recipe's YAML.
        corpus: Folder or file of the corpus, as the steps' containers see it.
        store: Folder for the results of all stages, as the steps' containers see it. Results that are there already are used again.
    """
    manifest = build_manifest(recipe=recipe, corpus=corpus, store=store)
    resolved, manifests = manifest.outputs["resolved_recipe"], manifest.outputs["manifests"]
    with dsl.ParallelFor(manifest.outputs["Output"], name="parts") as part:
        extraction = extract_features(store=store, recipe=resolved, manifests=manifests, shard=part)
    parts = extraction.outputs["features"]
    training = train(store=store, recipe=resolved, manifests=manifests, features=dsl.Collected(parts))
    conversion = convert_checkpoint(store=store, checkpoint=training.outputs["checkpoint"])
    decoding = decode(
        store=store, recipe=resolved, manifests=manifests, features=dsl.Collected(parts), model=conversion.outputs["model"]
    )
    for task in (manifest, extraction, training, conversion, decoding):
        # Kubeflow's cache knows neither the corpus' content nor a half-done training: each stage
        # looks itself, in the store, for what is there already.
        task.set_caching_options(False)
