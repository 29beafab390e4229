"""The parts of a decoding are joined only if all of them exist and belong together."""

import json
import subprocess
import sys

import pytest

from slam_asr.artifacts.hypotheses import HYPOTHESES, NBEST, Hypothesis, read_hypotheses, write_hypotheses
from slam_asr.artifacts.json_lines import write_json_lines
from slam_asr.artifacts.model_folder import CONFIG, ModelConfig
from slam_asr.artifacts.stage_record import Outcome, run_stage
from slam_asr.config.recipe import Recipe, dump_recipe, load_recipe
from slam_asr.errors import UserError
from slam_asr.stages.decode import options_that_change_texts
from slam_asr.stages.score import score

ROWS = [Hypothesis(f"u{i}", f"the word {i}", f"the word {i % 4}", "test", "", 2.0) for i in range(7)]
FACTS = {
    "beams": 1,
    "seconds": 2.0,
    "audio_hours": 0.001,
    "hours_decoded": 0.001,
    "utterances": 1,
    "answers_cut": 1,
    "empty_answers": 0,
}


@pytest.fixture
def model(tmp_path):
    from dataclasses import asdict

    config = ModelConfig(
        dump_recipe(load_recipe("demo")), "e", "l", encoder_width=8, llm_width=8, training={"recipe": "demo"}
    )
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(asdict(config)))
    return str(folder)


@pytest.fixture
def part_of(tmp_path):
    """Return a function that writes the hypotheses and the record of the work shard `number`/`of`.

    If `of` is None, the record names no work shard, like the records that older versions wrote for a
    decoding in one part.
    """

    def decode(number, of, rows, name="", nbest=(), **inputs):
        def work(folder):
            write_hypotheses(folder / HYPOTHESES, rows)
            if nbest:
                write_json_lines(folder / NBEST, nbest)
            return Outcome("", {}, FACTS | {"utterances": len(rows)})

        part = {"part": f"{number}-of-{of}"} if of else {}
        return run_stage(
            "decode",
            str(tmp_path / f"decoded{name}-{number}-of-{of}"),
            {"model": "m", **inputs, **part},
            work,
        ).folder

    return decode


def test_joined_parts_equal_an_undivided_decoding(tmp_path, model, part_of):
    recipe = load_recipe("demo")
    undivided = score(recipe, model, [part_of(1, 1, ROWS)], str(tmp_path / "undivided"))
    parts = [part_of(2, 3, ROWS[1::3]), part_of(3, 3, ROWS[2::3]), part_of(1, 3, ROWS[::3])]
    joined = score(recipe, model, parts, str(tmp_path / "joined"))
    assert joined.metrics == undivided.metrics and joined.metrics["wer"] > 0
    assert read_hypotheses(joined.file(HYPOTHESES)) == ROWS
    assert joined.file("report.md").is_file() and joined.file("report.html").is_file()
    assert (
        joined.facts["utterances"] == len(ROWS)
        and joined.facts["answers_cut"] == 3
        and joined.facts["seconds"] == 6.0
    )


def test_joined_nbest_lists_have_one_line_per_utterance(tmp_path, model, part_of):
    """U+2028 and U+0085 separate lines for `str.splitlines`, but a JSON string may contain them."""
    lists = [{"key": key, "choices": [{"text": f"one\u2028two\x85{key}"}]} for key in "abc"]
    parts = [part_of(1, 2, ROWS[:4], nbest=[lists[2], lists[0]]), part_of(2, 2, ROWS[4:], nbest=[lists[1]])]
    joined = score(load_recipe("demo"), model, parts, str(tmp_path / "joined"))
    lines = joined.file(NBEST).read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == lists


def test_parts_decoded_again_with_nbest_lists_have_a_report_of_their_own(tmp_path, model, part_of):
    output = str(tmp_path / "scores" / "{fingerprint}")
    without = score(load_recipe("demo"), model, [part_of(1, 1, ROWS)], output)
    lists = [{"key": "u0", "choices": []}]
    again = score(load_recipe("demo"), model, [part_of(1, 1, ROWS, name="again", nbest=lists)], output)
    assert json.loads(again.file(NBEST).read_text()) == lists[0]
    assert again.folder != without.folder and again.metrics == without.metrics


def test_a_decoding_of_an_older_version_without_a_work_shard_is_scored(tmp_path, model, part_of):
    recipe = load_recipe("demo")
    old = score(recipe, model, [part_of(1, None, ROWS)], str(tmp_path / "old"))
    assert old.metrics == score(recipe, model, [part_of(1, 1, ROWS)], str(tmp_path / "new")).metrics


def test_a_part_without_utterances_changes_nothing(tmp_path, model, part_of):
    joined = score(
        load_recipe("demo"), model, [part_of(1, 2, ROWS), part_of(2, 2, [])], str(tmp_path / "joined")
    )
    assert len(read_hypotheses(joined.file(HYPOTHESES))) == len(ROWS)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([], "There is nothing to score"),
        (
            [(1, 3), (3, 3)],
            r"The decoding lacks 1 of 3 parts, first 2/3: run `slam-asr decode --work-shard 2/3`",
        ),
        ([(1, 2), (1, 2, "again")], "are both work shard 1/2: give each part once"),
        ([(1, 2), (2, 3)], r"are parts of different decodings \(different: number of parts\)"),
        ([(1, None), (1, 1, "again")], "are both work shard 1/1: give each part once"),
    ],
)
def test_parts_that_do_not_make_up_a_decoding_are_refused(tmp_path, model, part_of, parts, sentence):
    folders = [part_of(number, of, ROWS[:2], *name) for number, of, *name in parts]
    with pytest.raises(UserError, match=sentence):
        score(load_recipe("demo"), model, folders, str(tmp_path / "scored"))
    assert not (tmp_path / "scored").exists()


def test_parts_of_two_models_are_refused(tmp_path, model, part_of):
    folders = [part_of(1, 2, ROWS[:2], model="a"), part_of(2, 2, ROWS[2:], model="b")]
    with pytest.raises(UserError, match=r"parts of different decodings \(different: model\)"):
        score(load_recipe("demo"), model, folders, str(tmp_path / "scored"))


@pytest.mark.cold
def test_scoring_starts_without_torch():
    """torch takes seconds to import, and the stage reads only JSON."""
    loaded = "import sys, slam_asr.stages.score; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True).strip() == "False"


def test_number_of_parts_and_controls_do_not_change_texts():
    one, other = Recipe().decoding, Recipe().decoding
    other.parts, other.shuffled_control, other.seed = 5, True, 3
    assert options_that_change_texts(one) == options_that_change_texts(other)
    other.beams += 1
    assert options_that_change_texts(one) != options_that_change_texts(other)
