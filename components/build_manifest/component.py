"""The Kubeflow component `build-manifest`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("build-manifest"), install_kfp_package=False)
def build_manifest(
    recipe: str,
    corpus: str,
    store: str,
    manifests: dsl.Output[dsl.Dataset],
    statistics: dsl.Output[dsl.HTML],
    corpus_metrics: dsl.Output[dsl.Metrics],
    recipe_overrides: dict = {},  # noqa: B006 - kfp needs a literal
) -> list[str]:
    """Read a corpus, check its audio, and write the train, dev and test manifests.

    Args:
        recipe: Name of a shipped recipe, or the YAML text of a recipe.
        corpus: Folder, file or s3:// prefix of the corpus, as seen from the step's container.
        store: Folder or s3:// prefix for the results of all stages; results that exist already are reused.
        manifests: Pointer to the folder with train.jsonl, dev.jsonl, test.jsonl and statistics.json. It
            carries the resolved recipe, in which every key has a value, to the later steps.
        statistics: Page with hours, durations, characters, and the reasons for rejections with examples.
        corpus_metrics: Utterances and hours of each split, and the number of rejected utterances.
        recipe_overrides: Changes to single keys of the recipe, by full name, such as {"training.epochs": 1}.

    Returns:
        The work shards of extract-features: 1/n, 2/n and so on.
    """
    from slam_asr.errors import exit_on_user_error

    with exit_on_user_error():
        import shutil

        from slam_asr.artifacts.stage_record import log_metrics, write_pointer
        from slam_asr.config.recipe import load_recipe
        from slam_asr.runtime.work_split import all_work_shards
        from slam_asr.stages.build_manifest import build_manifest as run

        resolved = load_recipe(recipe, recipe_overrides)
        record = run(resolved, corpus, f"{store}/build-manifest/{{fingerprint}}")
        write_pointer(record, manifests.path, resolved, store)
        shutil.copyfile(record.file("statistics.html"), statistics.path)
        log_metrics(record, corpus_metrics.log_metric)
        return all_work_shards(resolved.features.parts)
