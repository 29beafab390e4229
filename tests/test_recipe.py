"""Recipes: every shipped one is valid; whatever is wrong is refused by its full name."""

import pytest

from slam_asr.errors import UserError
from slam_asr.recipe import Recipe, dump_recipe, load_recipe, nearest, recipe_keys, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_survive_a_round_trip(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(dump_recipe(recipe)) == recipe


def test_published_recipes_use_the_whole_window_and_the_small_ones_speech_only():
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.encoder.frames == ("all" if recipe.published_wer else "speech")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"training.lr": 1}, "unknown key training.lr; did you mean training.learning_rate?"),
        ({"trainin.max_steps": 4}, "unknown key trainin; did you mean training?"),
        ({"max_step": 4}, "unknown key max_step; did you mean training.max_steps?"),
        ({"training.learning_rate": "fast"}, "training.learning_rate: Expected a number. Got value: fast."),
        ({"training.max_steps": 1.5}, "training.max_steps: Expected a whole number. Got value: 1.5."),
        ({"training.precision": "bf17"}, "training.precision: Expected a one of ['bf16', 'fp16', 'fp32']"),
        ({"training.max_steps": 0}, "training.max_steps is 0 but must be at least 1"),
        ({"data.dev_fraction": 0.9}, "data.dev_fraction is 0.9 but must be at most 0.5"),
        ({"data.min_duration": 40}, "data.max_duration (30.0) must be above data.min_duration (40"),
        ({"training.positions_per_batch": 10**6}, "training.positions_per_batch (1000000) must not exceed"),
        ({"data.test": []}, "data.test names no subset"),
        ({"training.learning_rate": float("nan")}, "training.learning_rate is nan"),
        ({"data.max_rejected": float("nan")}, "data.max_rejected is nan"),
        ({"projector.downsampling": 100}, "without an audio position at projector.downsampling 100: raise it to 2.0"),
        ({"training": 4}, "training must hold keys of its own, not 4"),
        ({"data.test": "test-other"}, "data.test: Expected a list"),
    ],
)
def test_wrong_values_are_named_in_full(overrides, complaint):
    with pytest.raises(UserError, match="Recipe demo") as refused:
        load_recipe("demo", overrides)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xe4\xf6\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("source", ["x" * 5000, "a: [\n", "x\n", "no-such-recipe", "/no/such/file.yaml"])
def test_what_is_no_recipe_is_refused_in_one_line(source):
    with pytest.raises(UserError) as refused:
        load_recipe(source)
    assert "\n" not in str(refused.value)


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean demo"):
        load_recipe("dmo")


def test_overrides_change_what_they_name_and_nothing_else():
    changed = load_recipe("demo", {"training.max_steps": 7})
    assert changed.training.max_steps == 7
    changed.training.max_steps = load_recipe("demo").training.max_steps
    assert changed == load_recipe("demo")


def test_yaml_floats_without_a_dot_are_numbers():
    assert load_recipe("training: {learning_rate: 1e-3}\n").training.learning_rate == 1e-3


def test_every_key_can_be_spelt_and_is_documented():
    from docstring_parser import parse_from_object

    assert "training.max_steps" in recipe_keys() and "training" in recipe_keys()
    for section in (Recipe, *(type(v) for v in vars(Recipe()).values() if hasattr(v, "__dataclass_fields__"))):
        documented = {p.arg_name for p in parse_from_object(section).params if p.description}
        undocumented = set(section.__dataclass_fields__) - documented
        assert not undocumented - {"data", "encoder", "features", "projector", "llm", "training", "decoding"}


def test_nothing_near_gives_no_hint():
    assert nearest("zzzzzz", recipe_keys()) == ""
