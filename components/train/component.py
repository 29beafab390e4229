"""`train` as a Kubeflow component."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("train"), install_kfp_package=False)
def train(
    store: str,
    recipe: dsl.Input[dsl.Artifact],
    manifests: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
    curves: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    features: dsl.Input[list[dsl.Dataset]] = None,
    trainjob: str = "",
):
    """Train the projector between the frozen encoder and the frozen LLM.

    Args:
        store: Folder that keeps the results of all stages; checkpoints go there while training.
        recipe: The resolved recipe.
        manifests: Pointer to the folder of build-manifest.
        checkpoint: Pointer to the folder with the checkpoints.
        curves: Loss and accuracy by step.
        metrics: Loss and accuracy at the end, and the number of steps.
        features: Pointers to the parts of extract-features; without them, the features of the store.
        trainjob: How the nodes of a training over several nodes are placed (JSON); empty: it trains in this pod.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        import json
        import shutil

        from slam_asr.recipe import load_recipe
        from slam_asr.stage import follow_parts, follow_pointer, log_metrics, write_pointer
        from slam_asr.training.train import train as run

        folder, wanted = follow_pointer(manifests.path), load_recipe(recipe.path)
        inputs = {
            "train_manifest": f"{folder}/train.jsonl",
            "dev_manifest": f"{folder}/dev.jsonl",
            "feature_store": None,
        }
        if wanted.caches_features:
            inputs["feature_store"] = (
                follow_parts(f.path for f in features) if features else f"{store}/features"
            )
        if trainjob:
            from slam_asr.trainjob.placement import Placement
            from slam_asr.trainjob.train import train_on_nodes

            record = train_on_nodes(wanted, Placement(**json.loads(trainjob)), store=store, **inputs)
        else:
            record = run(wanted, output=f"{store}/train/{{fingerprint}}", **inputs)
        write_pointer(record, checkpoint.path)
        shutil.copyfile(record.file("curves.html"), curves.path)
        log_metrics(record, metrics.log_metric)
