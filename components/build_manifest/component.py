"""The Kubeflow component `build-manifest`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("build-manifest"), install_kfp_package=False)
def build_manifest(
    recipe: str,
    corpus: str,
    store: str,
    manifests: dsl.Output[dsl.Dataset],
    resolved_recipe: dsl.Output[dsl.Artifact],
    statistics: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    recipe_overrides: dict = {},  # noqa: B006 - kfp needs a literal
) -> list[str]:
    """Read a corpus, check its audio, and write the train, dev and test manifests.

    Args:
        recipe: Name of a shipped recipe, or the YAML text of a recipe.
        corpus: Folder, file or s3:// prefix of the corpus, as seen from the step's container.
        store: Folder or s3:// prefix for the results of all stages; results that exist already are reused.
        manifests: Pointer to the folder with train.jsonl, dev.jsonl, test.jsonl and statistics.json.
        resolved_recipe: The recipe with every key spelt out; all later steps read it.
        statistics: Page with hours, durations and characters, and which utterances were rejected and why.
        metrics: Utterances and hours, accepted and rejected.
        recipe_overrides: Changes to single keys of the recipe, by full name, such as {"training.epochs": 1}.

    Returns:
        The work shards of extract-features: 1/n, 2/n and so on.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        import shutil

        from slam_asr.artifacts.stage_record import log_metrics, write_pointer
        from slam_asr.config.recipe import dump_recipe, load_recipe
        from slam_asr.runtime.work_split import all_work_shards
        from slam_asr.stages.build_manifest import build_manifest as run
        from slam_asr.storage import write_atomically

        resolved = load_recipe(recipe, recipe_overrides)
        record = run(resolved, corpus, f"{store}/build-manifest/{{fingerprint}}")
        write_pointer(record, manifests.path)
        # Not the folder's recipe.yaml: it belongs to the run that created the folder. A recipe that
        # differs only in later stages reuses this folder.
        write_atomically(resolved_recipe.path, dump_recipe(resolved))
        shutil.copyfile(record.file("statistics.html"), statistics.path)
        log_metrics(record, metrics.log_metric)
        return all_work_shards(resolved.features.parts)
