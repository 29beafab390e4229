"""The command line: mistakes are answered with the nearest valid word, in one line, with code 2."""

import pytest

from slam_asr.cli import STAGES, main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return left.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--recipe", "demo", "--training.lr", "1"], "did you mean --training.learning_rate?"),
        (["train", "--recpe", "demo"], "did you mean --recipe?"),
        (["train", "--recipe", "demo"], "Missing: --train_manifest, --output"),
        (["build-manifest", "--corpus", "x", "--output", "y"], "--recipe is missing"),
        (["build-manifest", "--recipe", "demoo", "--corpus", "x", "--output", "y"], "did you mean demo?"),
        (["build-manifest", "--recipe", "demo", "--corpus", "/no/such", "--output", "y"], "/no/such"),
        (["train", "--recipe", "demo", "--training.zero_stage", "9"], "training.zero_stage"),
        (["train", "--recipe", "demo", "fast"], "fast stands alone"),
        (["train", "--recipe", "demo", "--output"], "--output lacks a value"),
        (["train", "--recipe", "demo", "--out", "x"], "did you mean --output?"),
        (
            ["convert-checkpoint", "--checkpoint", "/no/such", "--output", "y"],
            "/no/such holds no finished train",
        ),
        (["decode", "--model", "/no/such", "--manifests", "[x]", "--output", "y"], "/no/such holds no model"),
    ],
)
def test_mistakes_are_one_line_and_code_2(capsys, arguments, answer):
    code, output = run(capsys, *arguments)
    assert code == 2
    assert answer in output.err
    assert output.err.startswith("slam-asr: error: ") and output.err.count("\n") == 1


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_explains_its_options(capsys, stage):
    code, output = run(capsys, stage, "--help")
    assert code == 0
    # Extraction replaces nothing: a store only grows.
    assert (
        "--output OUTPUT" in output.out
        and ("--shard" if stage == "extract-features" else "--overwrite") in output.out
    )


def test_the_usage_names_every_stage(capsys):
    main([])
    usage = capsys.readouterr().out
    assert all(stage in usage for stage in STAGES)
