"""Every shipped recipe is valid, and a wrong value is refused in a sentence with the key's full name."""

from dataclasses import fields, is_dataclass
from operator import attrgetter

import pytest
import yaml

from pipelines.cluster import load_cluster
from slam_asr.config.recipe import Recipe, dump_recipe, load_recipe, recipe_keys, shipped_recipes
from slam_asr.config.schema import nearest
from slam_asr.config.variations import read_variations
from slam_asr.errors import UserError

VICUNA, TINYLLAMA = "lmsys/vicuna-7b-v1.5", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"

PUBLISHED = [
    # recipe, encoder, LLM, WER in percent on test-clean and test-other: Ma et al., 2024, arXiv:2402.08846
    ("hubert-xlarge-ft-vicuna-7b", "facebook/hubert-xlarge-ls960-ft", VICUNA, 1.84, 3.39),
    ("wavlm-large-ft-vicuna-7b", "./wavlm-large-ft-ls960.pt", VICUNA, 1.96, 4.18),
    ("hubert-large-ft-vicuna-7b", "facebook/hubert-large-ls960-ft", VICUNA, 2.10, 4.26),
    ("wavlm-large-vicuna-7b", "microsoft/wavlm-large", VICUNA, 2.13, 4.73),
    ("whisper-large-v2-vicuna-7b", "openai/whisper-large-v2", VICUNA, 2.58, 6.47),
    ("whisper-medium-vicuna-7b", "openai/whisper-medium", VICUNA, 2.72, 6.79),
    ("whisper-small-vicuna-7b", "openai/whisper-small", VICUNA, 4.19, 9.50),
    ("whisper-base-vicuna-7b", "openai/whisper-base", VICUNA, 5.07, 13.07),
    ("whisper-tiny-vicuna-7b", "openai/whisper-tiny", VICUNA, 7.07, 16.01),
    ("whisper-tiny-tinyllama", "openai/whisper-tiny", TINYLLAMA, 12.72, 21.64),
]
SMALL = {
    "demo",
    "librispeech",
    "whisper-base-smollm2-135m",
    "whisper-base-smollm2-135m-from-nothing",
    "whisper-tiny.en-smollm2-135m",
    "whisper-tiny.en-smollm2-135m-from-nothing",
}
LARGE = sorted(shipped_recipes().keys() - SMALL)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_survive_a_round_trip(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_have_a_description_and_name_both_models(name):
    written = yaml.safe_load(shipped_recipes()[name].read_text())
    assert written["name"] == name
    assert len(written["description"].split()) > 5
    assert written["encoder"]["name"] and written["llm"]["name"]


@pytest.mark.parametrize(("name", "encoder", "llm", "clean", "other"), PUBLISHED)
def test_every_published_row_has_a_recipe_with_its_numbers_and_their_source(name, encoder, llm, clean, other):
    recipe = load_recipe(name)
    assert (recipe.encoder.name, recipe.llm.name) == (encoder, llm)
    assert recipe.published_wer == {"test-clean": clean, "test-other": other}
    assert "Ma et al. (2024, arXiv:2402.08846)" in recipe.description
    assert recipe.llm.tuning == recipe.encoder.tuning == "frozen"


@pytest.mark.slow
def test_only_published_recipes_have_published_rates_and_the_other_large_ones_say_so():
    assert {name for name in shipped_recipes() if load_recipe(name).published_wer} == {
        row[0] for row in PUBLISHED
    }
    for name in set(LARGE) - {row[0] for row in PUBLISHED}:
        assert "no published word error rate" in load_recipe(name).description


@pytest.mark.parametrize("name", LARGE)
def test_large_recipes_have_the_published_settings(name):
    recipe, training = load_recipe(name), load_recipe(name).training
    assert (training.learning_rate, training.weight_decay, training.warmup_steps) == (1e-4, 0.0, 1000)
    assert (training.schedule, training.max_steps, training.precision) == ("constant", 100_000, "bf16")
    assert training.epochs == (6 if name.endswith("-offload") else 3)
    assert (recipe.decoding.beams, recipe.decoding.max_new_tokens) == (4, 200)
    assert (recipe.projector.kind, recipe.projector.downsampling, recipe.projector.hidden) == (
        "linear",
        5,
        2048,
    )
    assert not recipe.projector.beginning.active
    assert (recipe.llm.prompt, recipe.llm.template) == (
        "Transcribe speech to text. ",
        "USER: {}\n ASSISTANT:",
    )
    # The longest utterance of the dev and test subsets, in dev-other, lasts 35.2 s.
    assert recipe.data.max_duration > 35.2 and recipe.encoder.long_audio == "cut"


def test_large_recipes_use_whispers_complete_window_and_small_recipes_only_the_speech():
    for name, file in shipped_recipes().items():
        encoder = yaml.safe_load(file.read_text())["encoder"]
        assert encoder.get("frames") == (
            "speech" if name in SMALL else "all" if name.startswith("whisper-") else None
        )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            "wavlm-large-vicuna-7b-lora",
            {
                "llm.tuning": "lora",
                "llm.lora.rank": 8,
                "llm.lora.alpha": 32,
                "llm.lora.targets": ["q_proj", "v_proj"],
            },
        ),
        (
            "whisper-large-v3-vicuna-7b-offload",
            {"training.zero_stage": 2, "training.offload_optimizer": True},
        ),
        ("wavlm-large-llama-2-70b", {"training.zero_stage": 3, "llm.tuning": "frozen"}),
        (
            "wavlm-large-vicuna-7b-full",
            {
                "llm.tuning": "full",
                "llm.learning_rate": 1e-5,
                "training.zero_stage": 3,
                "training.offload_optimizer": True,
                "training.gradient_checkpointing": True,
            },
        ),
    ],
)
def test_recipes_for_a_training_method_use_it(name, values):
    recipe = load_recipe(name)
    assert {key: attrgetter(key)(recipe) for key in values} == values


def test_a_q_former_has_positions_for_the_shortest_utterance():
    values = {"encoder.frames": "speech", "projector.downsampling": 100}
    assert load_recipe("demo", values | {"projector.kind": "q-former"}).projector.downsampling == 100
    with pytest.raises(UserError, match="without an audio position"):
        load_recipe("demo", values)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"training.lr": 1}, "unknown key training.lr; did you mean training.learning_rate?"),
        ({"trainin.max_steps": 4}, "unknown key trainin; did you mean training?"),
        ({"max_step": 4}, "unknown key max_step; did you mean training.max_steps?"),
        ({"training.learning_rate": "fast"}, "training.learning_rate: Expected a number. Got value: fast."),
        ({"training.max_steps": 1.5}, "training.max_steps: Expected a whole number. Got value: 1.5."),
        ({"training.precision": "bf17"}, "training.precision: Expected one of ['bf16', 'fp16', 'fp32']"),
        ({"training.max_steps": 0}, "training.max_steps is 0 but must be at least 1"),
        ({"data.dev_fraction": 0.9}, "data.dev_fraction is 0.9 but must be at most 0.5"),
        ({"data.min_duration": 40}, "data.max_duration (30.0) must be above data.min_duration (40"),
        ({"training.positions_per_batch": 10**6}, "training.positions_per_batch (1000000) must not exceed"),
        ({"data.test": []}, "data.test names no subset"),
        ({"training.learning_rate": float("nan")}, "training.learning_rate is nan but must be above 0."),
        (
            {"training.learning_rate": float("inf")},
            "learning_rate is inf but must be above 0 and finite.",
        ),
        ({"training.accumulation": 2}, "training.accumulation is 2 without training.utterances_per_batch"),
        ({"features.cache_gigabytes": 0}, "is too small for two windows of features.window_shards (8)"),
        ({"training.trackers": ["wandbb"]}, "training.trackers knows mlflow and wandb, not wandbb; did you"),
        (
            {"training.engine": "fsdp", "training.zero_stage": 3},
            "training.zero_stage is DeepSpeed's, but training.engine is fsdp",
        ),
        (
            {"gate.max_wer": 25},
            "gate decides whether a model is published, but publish.registry is none: choose kubeflow or",
        ),
        ({"gate.max_wer": -1, "publish.registry": "mlflow"}, "gate.max_wer is -1.0 but must be at least 0"),
        ({"publish.name": "a/b"}, "publish.name is 'a/b', but a registered model's name has only letters"),
        (
            {"name": "demo: mine", "publish.registry": "mlflow"},
            "'demo: mine' cannot be the name of a registered model: set publish.name.",
        ),
        ({"decoding.nbest": 9}, "decoding.nbest is 9 but decoding.beams is"),
        ({"data.max_rejected": float("nan")}, "data.max_rejected is nan"),
        (
            {"projector.downsampling": 100},
            "without an audio position at projector.downsampling 100: raise data.min_duration to 2.0",
        ),
        ({"training": 4}, "training must contain keys of its own, not 4"),
        ({"data.test": "test-other"}, "data.test: Expected a list"),
        ({"llm.lora.rnak": 4}, "unknown key llm.lora.rnak; did you mean llm.lora.rank?"),
        ({"llm.lora": 4}, "llm.lora must contain keys of its own, not 4"),
        ({"llm.lora.rank": 0}, "llm.lora.rank is 0 but must be at least 1"),
        ({"llm.lora.dropout": 0.95}, "llm.lora.dropout is 0.95 but must be at most 0.9"),
        ({"llm.lora.rank": "wide"}, "llm.lora.rank: Expected a whole number. Got value: wide."),
        (
            {"training.compile": True, "training.zero_stage": 3},
            "training.compile does not work with training.zero_stage 3",
        ),
        (
            {"training.compile": True, "training.liger": True},
            "training.compile and training.liger both replace",
        ),
        (
            {"training.offload_optimizer": True},
            "offload_optimizer needs training.zero_stage 1, 2 or 3; it is 0",
        ),
        ({"llm.learning_rate": 1e-5}, "llm.learning_rate is set but llm.tuning is frozen"),
        ({"encoder.learning_rate": 1e-5}, "encoder.learning_rate is set but encoder.tuning is frozen"),
        ({"llm.tuning": "full", "llm.learning_rate": 0}, "llm.learning_rate is 0"),
        ({"llm.template": "USER: listen"}, "must contain {} once, for the prompt"),
        ({"llm.template": "{} or {}"}, "must contain {} once, for the prompt"),
        ({"llm.template": "{audio}{audio}{}"}, "{audio} at most once"),
        ({"llm.tuning": "lora", "llm.lora.targets": []}, "llm.lora.targets names no layer"),
    ],
)
def test_a_wrong_value_is_refused_with_its_full_key(overrides, complaint):
    with pytest.raises(UserError, match="Recipe demo") as refused:
        load_recipe("demo", overrides)
    assert complaint in str(refused.value)
    assert "\n" not in refused.value.args[0]


@pytest.mark.real_input("B21-recipe-yaml")
@pytest.mark.parametrize(
    ("read", "text", "complaint"),
    [
        (
            load_recipe,
            "name: twice\ntraining: {max_steps: 2, learning_rate: 1.0e-4}\nllm: {name: x/y}\n"
            "training: {precision: fp32}\n",
            "Recipe {}, line 4: training is given twice, first in line 2",
        ),
        (
            load_recipe,
            "llm:\n  lora:\n    rank: 4\n    alpha: 8\n    rank: 4\n",
            "Recipe {}, line 5: llm.lora.rank is given twice, first in line 3",
        ),
        (
            load_recipe,
            "name: empty\ntraining:\n  patience:\n",
            "Recipe {}, line 3: training.patience has no value",
        ),
        (load_recipe, "name: empty\ntraining:\n", "Recipe {}, line 2: training has no value"),
        (load_recipe, "training: {patience: null}\n", "Recipe {}: training.patience has no value"),
        (
            read_variations,
            "- name: first\n- training.max_steps: 1\n  training.max_steps: 2\n",
            "The variations {}, line 3: training.max_steps is given twice, first in line 2",
        ),
        (
            read_variations,
            "training.max_steps: [1, 2]\ntraining.seed:\n",
            "The variations {}, line 2: training.seed has no value",
        ),
        (load_cluster, "name: a\n\nname: b\n", "Cluster {}, line 3: name is given twice, first in line 1"),
        (
            load_cluster,
            "steps:\n  train:\n    gpus:\n",
            "Cluster {}, line 3: steps.train.gpus has no value",
        ),
        (load_cluster, "steps: {train: {gpus: ~}}\n", "Cluster {}: steps.train.gpus has no value"),
    ],
)
def test_recipe_yaml_with_a_key_twice_or_without_a_value_is_refused_with_its_line(
    tmp_path, read, text, complaint
):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        read(str(tmp_path / "a.yaml"))
    assert str(refused.value).startswith(complaint.format(tmp_path / "a.yaml"))
    assert "\n" not in refused.value.args[0]


def test_keys_of_an_anchor_may_be_changed_and_null_is_a_value_where_it_has_a_meaning():
    text = "llm: {lora: &a {rank: 4, alpha: 8}}\ntraining: {deepspeed: {aio: {<<: *a, alpha: 9}}}\n"
    assert load_recipe(text).training.deepspeed == {"aio": {"rank": 4, "alpha": 9}}
    assert load_recipe("encoder: {learning_rate: null}\n").encoder.learning_rate is None
    assert load_recipe("features: null\n").features.cache == "none"


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xe4\xf6\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("source", ["x" * 5000, "a: [\n", "x\n", "no-such-recipe", "/no/such/file.yaml"])
def test_a_source_that_is_not_a_recipe_is_refused_in_one_line(source):
    with pytest.raises(UserError) as refused:
        load_recipe(source)
    assert "\n" not in refused.value.args[0]


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean demo"):
        load_recipe("dmo")


def test_overrides_change_only_the_keys_they_name():
    changed = load_recipe("demo", {"training.max_steps": 7})
    assert changed.training.max_steps == 7
    changed.training.max_steps = load_recipe("demo").training.max_steps
    assert changed == load_recipe("demo")


def test_yaml_floats_without_a_dot_are_numbers():
    assert load_recipe("training: {learning_rate: 1e-3}\n").training.learning_rate == 1e-3


@pytest.mark.parametrize(
    "overrides",
    [
        {"training.offload_optimizer": True, "training.zero_stage": 1},
        {"llm.tuning": "full", "llm.learning_rate": 1e-5},
        {"llm.tuning": "lora", "llm.learning_rate": 1e-5},
        {"encoder.tuning": "full", "encoder.learning_rate": 1e-5},
        {"llm.template": "chat"},
        {"llm.template": "Listen to {audio} and {}"},
        {"llm.lora.targets": []},
    ],
)
def test_combinations_that_can_work_are_accepted(overrides):
    recipe = load_recipe("demo", overrides)
    assert {key: attrgetter(key)(recipe) for key in overrides} == overrides


def test_a_nested_section_is_overridden_key_by_key():
    recipe = load_recipe("wavlm-large-vicuna-7b-lora", {"llm.lora.rank": 32})
    assert recipe.llm.lora.rank == 32
    assert recipe.llm.tuning == "lora"
    assert recipe.llm.lora.alpha == 32 and recipe.llm.lora.targets == ["q_proj", "v_proj"]
    assert load_recipe(dump_recipe(recipe)) == recipe


def test_every_key_is_unique_and_documented():
    from docstring_parser import parse_from_object

    keys = recipe_keys()
    assert {"training", "training.max_steps", "llm.lora", "llm.lora.rank"} <= set(keys) and len(keys) == len(
        set(keys)
    )
    for section, within in _sections(Recipe).items():
        documented = {p.arg_name for p in parse_from_object(section).params if p.description}
        assert section.__dataclass_fields__.keys() - documented == within, section


def _sections(section):
    """Check that each dataclass of a recipe has a docstring, and map it to the names of its sub-sections."""
    inner = {f.name: f.default_factory for f in fields(section) if is_dataclass(f.default_factory)}
    sections = {section: inner.keys()}
    for kind in inner.values():
        sections |= _sections(kind)
    assert section.__doc__ and not section.__doc__.startswith(section.__name__ + "(")
    return sections


def test_a_word_far_from_all_known_ones_gets_no_hint():
    assert nearest("zzzzzz", recipe_keys()) == ""
