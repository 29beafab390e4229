"""Options work in every usual spelling; a mistake is reported in one line, with exit code 2."""

import re
import shutil

import pytest

from slam_asr.artifacts.model_folder import shipped_models
from slam_asr.artifacts.shipped import default_model
from slam_asr.cli import COMMANDS, STEP_FUNCTIONS, add_recipe_options, main, resolve_command
from slam_asr.options import add_options, command_parser, parse_options
from slam_asr.storage import write_bytes


def exit_of(capsys, *arguments):
    """Run a command that must exit; return its exit code, and what it printed."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code, capsys.readouterr()


def example_stage(
    manifests: list[str], train_manifest: str = "", work_shard: str = "", keep: list[str] | None = None
):
    """A stand-in for a stage's function.

    Args:
        manifests: several files.
        train_manifest: one file.
        work_shard: i/n.
        keep: an optional list.
    """


MODEL = default_model()


@pytest.fixture
def parser():
    parser = command_parser("slam-asr example", "An example.")
    add_options(parser, example_stage)
    add_recipe_options(parser, "demo")
    return parser


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--recipe", "demo", "--training.lr", "1"], "did you mean --training.learning_rate?"),
        (["train", "--recpe", "demo"], "did you mean --recipe?"),
        (["train", "--recipe", "demo", "--train_manifst", "x"], "did you mean --train-manifest?"),
        (["train", "--recipe", "demo"], "Missing: --train-manifest, --output"),
        (["build-manifest", "--corpus", "x", "--output", "y"], "--recipe is missing"),
        (["build-manifest", "--recipe", "demoo", "--corpus", "x", "--output", "y"], "did you mean demo?"),
        (["build-manifest", "--recipe", "demo", "--corpus", "/no/such", "--output", "y"], "/no/such"),
        (["train", "--recipe", "demo", "--training.zero_stage", "9"], "training.zero_stage"),
        (["train", "--recipe", "demo", "fast"], "fast follows no option"),
        (["train", "--recipe", "demo", "--projector.masks", "/no/such"], "/no/such cannot be read as one"),
        (["train", "--recipe", "demo", "--output"], "--output lacks a value"),
        (["decode", "--recipe", "demo", "--manifests"], "--manifests lacks a value"),
        (["train", "--recipe", "demo", "--out", "x"], "did you mean --output?"),
        (["plan", "demo", "--gpu-memory", "much"], "Option --gpu-memory: Expected a number"),
        (
            ["convert-checkpoint", "--checkpoint", "/no/such", "--output", "y"],
            "There is no file or folder /no/such",
        ),
        (
            ["decode", "--model", "/no/such", "--manifests", "x", "--output", "y"],
            "There is no model /no/such",
        ),
        (["plan", "demoo"], "No recipe named demoo, and no such file; did you mean demo?"),
        (["plan", "demo", "--recipe", "librispeech"], "Two recipes are named, demo and librispeech"),
        (["compare", "a", "b", "c"], "c follows no option"),
    ],
)
def test_mistakes_are_one_line_and_code_2(capsys, arguments, answer):
    code, output = exit_of(capsys, *arguments)
    assert code == 2
    assert answer in output.err
    assert output.err.startswith("slam-asr: error: ") and output.err.count("\n") == 1


@pytest.mark.parametrize("stage", STEP_FUNCTIONS)
def test_every_stage_explains_its_options(capsys, stage):
    code, output = exit_of(capsys, stage, "--help")
    assert code == 0
    # Extraction has no --overwrite, because it only adds to a store.
    expected = "--work-shard" if stage == "extract-features" else "--overwrite"
    assert "--output OUTPUT" in output.out and expected in output.out


def test_the_usage_names_every_command(capsys):
    main([])
    usage = capsys.readouterr().out
    assert all(f"\n  {command} " in usage for command in COMMANDS)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("transcribe", "transcribe FILES… [--model MODEL] [--format {text,json,srt,vtt}] "),
        ("serve", "serve [MODEL] [--host HOST] [--port PORT] "),
        ("features ls", "features ls STORE "),
        ("plan", "plan RECIPE [--gpus GPUS] "),
        ("score", "score --model MODEL --parts PARTS … --output OUTPUT "),
    ],
)
def test_usage_line_has_every_option_and_one_placeholder_for_the_keys_of_the_recipe(capsys, command, line):
    _, output = exit_of(capsys, *command.split(), "--help")
    usage = " ".join(output.out.partition("\n\n")[0].split()) + " "
    assert usage.startswith(f"usage: slam-asr {line}")
    assert usage.count("[--SECTION.KEY VALUE …]") == (not command.startswith("features"))
    assert "--training" not in usage


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["compare", "a", "b", "--seed", "1"], ["--first=a", "--second=b", "--seed", "1"]),
        (["transcribe", "x.wav", "[y].wav"], [f"--model={MODEL}", "--files+=x.wav", "--files+=[y].wav"]),
        (["transcribe", MODEL, "x.wav"], [f"--model={MODEL}", "--files+=x.wav"]),
        (["transcribe", "x.wav", "--model", "m"], ["--files+=x.wav", "--model", "m"]),
        (["transcribe", "--files", "x.wav", "y.wav"], [f"--model={MODEL}", "--files", "x.wav", "y.wav"]),
        (
            ["transcribe", "--model", "m", "x.wav", "--format=json", "y.wav"],
            ["--files+=x.wav", "--files+=y.wav", "--model", "m", "--format=json"],
        ),
        (["serve"], [f"--model={MODEL}"]),
        (["serve", "m", "--port", "1"], ["--model=m", "--port", "1"]),
        (["serve", "--model", "m"], ["--model", "m"]),
        (["plan", "demo"], ["--recipe=demo"]),
        (["train", "demo", "--output", "o"], ["--recipe=demo", "--output", "o"]),
        (["features", "ls", "s"], ["--store=s"]),
        (["features", "ls", "--store", "s"], ["--store", "s"]),
    ],
)
def test_words_without_an_option_become_the_options_that_the_usage_names(given, options):
    assert resolve_command(given[0], given[1:])[1] == options


def test_help_spells_stage_options_with_dashes_and_recipe_keys_as_in_the_file(capsys):
    _, output = exit_of(capsys, "train", "--help")
    assert "--train-manifest" in output.out and "--train_manifest" not in output.out
    assert "--training.max_steps" in output.out and "--training.max-steps" not in output.out


def test_an_outdated_spelling_works_and_is_noted_once(parser, capsys):
    values = parse_options(
        parser, ["--train_manifest=a", "--shard", "1/2", "--manifests", "x", "--shard", "2/2"]
    )
    assert (values["train_manifest"], values["work_shard"]) == ("a", "2/2")
    assert capsys.readouterr().err == (
        "note: --train_manifest is now spelled --train-manifest; --shard is now spelled --work-shard\n"
    )


@pytest.mark.parametrize("option", ["--training.max_steps", "--training.max-steps"])
def test_a_recipe_key_may_have_dashes_or_underscores_without_a_note(parser, capsys, option):
    values = parse_options(parser, ["--manifests", "x", "--train-manifest", "a", option, "7"])
    assert values["training"].max_steps == 7
    assert capsys.readouterr().err == ""


def test_a_key_of_the_users_own_keeps_its_dashes(parser):
    values = parse_options(parser, ["--manifests", "x", "--published-wer.test-clean", "2.5"])
    assert values["published_wer"] == {"test-clean": 2.5}


@pytest.mark.parametrize(
    "given",
    [
        ["--manifests", "a b", "c"],
        ["--manifests", "a b", "--manifests", "c"],
        ["--manifests=a b", "--manifests=c"],
        ["--manifests", "[a b, c]"],
        ["--manifests", "[a b,", "c]"],
        ["--manifests", "[a b]", "--manifests", "c"],
        ["--manifests+=a b", "--manifests+", "c"],
    ],
)
def test_a_list_is_the_same_however_it_is_given(parser, given):
    values = parse_options(parser, [*given, "--train-manifest", "t"])
    assert values["manifests"] == ["a b", "c"] and values["train_manifest"] == "t"


def test_one_value_is_a_list_of_one(parser):
    values = parse_options(parser, ["--manifests", "a", "--keep", "k"])
    assert (values["manifests"], values["keep"]) == (["a"], ["k"])


def test_a_list_given_replaces_the_default_and_an_empty_one_empties_it(parser):
    values = parse_options(parser, ["--manifests", "a", "--data.train", "x", "--data.dev", "[]"])
    assert (values["data"].train, values["data"].dev, values["keep"]) == (["x"], [], None)


def test_a_model_before_the_files_of_transcribe_is_recognised_and_noted(tmp_path, bucket, capsys):
    folder = tmp_path / "model.wav"
    folder.mkdir()
    assert resolve_command("transcribe", [str(folder)])[1][1] == f"--files+={folder}", "no config.json in it"
    for place in (str(folder), "s3://bucket/models/one", MODEL):
        if place != MODEL:
            write_bytes(f"{place}/config.json", b"{}")
        capsys.readouterr()
        assert resolve_command("transcribe", [place, "x.wav"])[1] == [f"--model={place}", "--files+=x.wav"]
        assert capsys.readouterr().err == "note: a model before the files is now spelled --model MODEL\n"
    write_bytes("s3://bucket/a.wav", b"audio")
    assert resolve_command("transcribe", ["s3://bucket/a.wav"])[1][1] == "--files+=s3://bucket/a.wav"
    assert capsys.readouterr().err == ""


def test_the_help_of_transcribe_begins_with_the_facts_of_the_best_shipped_model(
    tmp_path, monkeypatch, capsys
):
    (shipped,) = [folder for name, folder in shipped_models().items() if name == MODEL]
    card = (shipped / "README.md").read_text()
    for name, rate in (("a", 30.25), ("b", 20.5), ("c", 40)):
        (tmp_path / name).mkdir()
        shutil.copy(shipped / "config.json", tmp_path / name)
        changed = re.sub(r"(type: wer, value: )[\d.]+", rf"\g<1>{rate}", card)
        (tmp_path / name / "README.md").write_text(
            re.sub(r"(?m)^limits: .*", f"limits: limits of {name}", changed)
        )
    monkeypatch.setattr("slam_asr.artifacts.model_folder.SHIPPED", tmp_path)
    code, output = exit_of(capsys, "transcribe", "--help")
    description = " ".join(output.out.split("\n\n")[1].split())
    assert code == 0 and description.startswith("The default model, b, has a word error rate of 20.5 % on ")
    assert "; limits of b. Transcribe audio files" in description
    (tmp_path / "c" / "README.md").write_text("no facts")
    code, output = exit_of(capsys, "transcribe", "x.wav")
    assert code == 2 and re.search(r"README\.md has no YAML front matter: add it\.$", output.err)
