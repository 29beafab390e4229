"""Inputs of training runs whose steps take milliseconds."""

import pytest

from slam_asr.config.recipe import load_recipe
from slam_asr.stages.build_manifest import build_manifest
from slam_asr.stages.extract_features import extract_features


@pytest.fixture(scope="session")
def prepared(tiny_recipe, tiny_corpus, tmp_path_factory) -> tuple[str, str, str]:
    """Paths of a recipe, of a folder with manifests, and of a feature store."""
    folder = tmp_path_factory.mktemp("prepared")
    recipe = load_recipe(str(tiny_recipe))
    built = build_manifest(recipe, str(tiny_corpus), str(folder / "m"))
    return str(tiny_recipe), built.folder, extract_features(recipe, [built.folder], str(folder / "f")).folder
