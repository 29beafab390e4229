"""The Kubeflow component `train`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("train"), install_kfp_package=False)
def train(
    store: str,
    manifests: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
    curves: dsl.Output[dsl.HTML],
    training_metrics: dsl.Output[dsl.Metrics],
    features: dsl.Input[list[dsl.Dataset]] = None,
    trainjob: str = "",
) -> None:
    """Train the projector between encoder and LLM, and other parts if the recipe says so.

    Args:
        store: Folder or s3:// prefix for the results of all stages; training saves its checkpoints there.
        manifests: Pointer to the result folder of build-manifest; it carries the recipe.
        checkpoint: Pointer to the folder with the checkpoints.
        curves: Page with loss and accuracy by optimiser step.
        training_metrics: Number of optimiser steps, and final loss and accuracy, also on the dev set.
        features: Pointers to the results of extract-features, one per work shard; default: store/features.
        trainjob: Placement of the nodes of a multi-node training, as JSON; if empty, this pod trains.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        import json
        import shutil
        from typing import Any

        from slam_asr.artifacts.stage_record import (
            follow_pointer,
            follow_work_shards,
            log_metrics,
            recipe_of,
            write_pointer,
        )
        from slam_asr.stages.train import train as run

        folder, recipe = follow_pointer(manifests.path), recipe_of(manifests.path)
        feature_store = None
        if recipe.caches_features:
            feature_store = (
                follow_work_shards(artifact.path for artifact in features)
                if features
                else f"{store}/features"
            )
        inputs: dict[str, Any] = {
            "train_manifest": f"{folder}/train.jsonl",
            "dev_manifest": f"{folder}/dev.jsonl",
            "feature_store": feature_store,
        }
        if trainjob:
            from slam_asr.trainjob.placement import Placement
            from slam_asr.trainjob.train import train_on_nodes

            record = train_on_nodes(recipe, Placement(**json.loads(trainjob)), store=store, **inputs)
        else:
            record = run(recipe, output=f"{store}/train/{{fingerprint}}", **inputs)
        write_pointer(record, checkpoint.path, recipe, store)
        shutil.copyfile(record.file("curves.html"), curves.path)
        log_metrics(record, training_metrics.log_metric)
