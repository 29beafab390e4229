"""Variations of a sweep: every mistake is refused in one sentence before anything runs."""

import json

import pytest

from slam_asr.config.recipe import load_recipe
from slam_asr.config.variations import (
    Variation,
    read_variations,
    require_distinct_trainings,
    resolve,
    variation_of,
    varied,
)
from slam_asr.errors import UserError

RECIPE = load_recipe("demo")
ONE = {"training.learning_rate": 1e-3}


def write_file(tmp_path, text: str) -> str:
    path = tmp_path / "variations.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.slow
def test_a_grid_gives_every_combination(tmp_path):
    entries = read_variations(
        write_file(tmp_path, "training.learning_rate: [1e-4, 3e-4]\nprojector.hidden: [64, 128, 256]\n")
    )
    variations = resolve(RECIPE, entries)
    assert [variation.name for variation in variations][:2] == [
        "learning_rate=1e-4 hidden=64",
        "learning_rate=1e-4 hidden=128",
    ]
    recipes = [varied(RECIPE, variation) for variation in variations]
    assert {(r.training.learning_rate, r.projector.hidden) for r in recipes} == {
        (a, b) for a in (1e-4, 3e-4) for b in (64, 128, 256)
    }
    assert [r.name for r in recipes] == [v.name for v in variations]


def test_integers_that_arrive_as_floats_become_integers():
    as_planned, as_received = (
        resolve(RECIPE, [{"training.max_steps": 7}, ONE]),
        resolve(RECIPE, [{"name": "max_steps=7", "training.max_steps": 7.0}, ONE]),
    )
    assert varied(RECIPE, as_planned[0]) == varied(RECIPE, as_received[0])


def test_a_variation_survives_a_round_trip():
    variation = Variation("größer", {"projector.hidden": 64, "training.learning_rate": "1e-4"})
    assert variation_of(variation.as_json()) == variation


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([ONE], r"2 to 100 variations, not 1"),
        (
            [{"training.lr": 1}, ONE],
            r"Variation 1 of the sweep changes training.lr, which is not a key of a recipe; "
            r"did you mean training.learning_rate\?",
        ),
        (
            [ONE, {"data.test": ["x"]}],
            r"Variation 2 of the sweep changes data.test, but all variations share data, encoder",
        ),
        ([ONE, {"encoder.name": "x"}], r"changes encoder.name, but all variations share"),
        (
            [ONE, {"training.nodes": 2}],
            r"changes training.nodes, but all variations share .* and training.nodes",
        ),
        (
            [ONE, {"training.max_steps": "many"}],
            r"Variation 2 of the sweep \(max_steps=many\): .*training.max_steps",
        ),
        (
            [ONE, {"name": "again", "training.learning_rate": 0.001}],
            r"learning_rate=0.001 and again result in the same recipe",
        ),
        (
            [{"name": "a"} | ONE, {"name": "a", "training.max_steps": 3}],
            r"Two variations of the sweep are named a",
        ),
        ([{"name": "a/b"} | ONE, {}], r"named 'a/b': a name has 1 to 80 characters"),
        ([ONE, "x"], r'Variation 2 of the sweep is "x", not a mapping'),
        ([{}] * 101, r"not 101"),
    ],
)
def test_invalid_variations_are_refused(entries, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve(RECIPE, entries)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "are not valid YAML"),
        ("just words", "neither a list of mappings nor a grid"),
        ("- 3\n", "neither a list"),
        ("", "neither a list"),
        ("training.max_steps: 3", "give training.max_steps no list of values"),
        ("training.max_steps: []", "no list of values"),
    ],
)
def test_a_file_with_another_structure_is_refused(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        read_variations(write_file(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_variations(str(tmp_path / "absent.yaml"))


def test_variations_with_the_same_training_do_not_run_at_once():
    alike = resolve(RECIPE, [ONE, {"name": "beams", "decoding.beams": 2} | ONE])
    with pytest.raises(UserError, match=r"learning_rate=0\.001 and beams differ in nothing that changes"):
        require_distinct_trainings(RECIPE, alike)
    engines = resolve(RECIPE, [ONE | {"training.engine": engine} for engine in ("ddp", "fsdp")])
    with pytest.raises(UserError, match="would train the same model"):
        require_distinct_trainings(RECIPE, engines)
    starts = resolve(RECIPE, [ONE | {"projector.init_from": name} for name in ("a", "b")])
    require_distinct_trainings(RECIPE, starts)
    require_distinct_trainings(RECIPE, resolve(RECIPE, [ONE, {"training.max_steps": 3}]))


@pytest.mark.parametrize("text", ["no json", "[]", json.dumps({"training.max_steps": 3}), "3"])
def test_text_that_is_not_a_variation_is_refused(text):
    with pytest.raises(UserError, match="not a variation of a sweep"):
        variation_of(text)
