"""Word error rates.

Invariants: hits + substitutions + deletions = reference words; subsets add up to the total; the rate
is jiwer's; identical text scores 0, and an empty hypothesis scores 1; no utterance is left out.
"""

import json
import random
from dataclasses import astuple

import jiwer
import pytest

from slam_asr.artifacts.hypotheses import Hypothesis, WordErrors, align, read_hypotheses, write_hypotheses
from slam_asr.artifacts.word_errors import groups_of, measure, without_hypotheses
from slam_asr.errors import UserError

WORDS = ["the", "cat", "sat", "on", "a", "mat", "with", "its", "hat", "and", "that", "was", "that"]


def random_rows(count: int, seed: int = 0) -> list[Hypothesis]:
    """Random utterances, some with empty references or hypotheses."""
    chance = random.Random(seed)

    def sentence() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(0, 12)))

    return [
        Hypothesis(
            f"u{n:04d}", sentence(), sentence(), subset=chance.choice(["clean", "other", ""]), duration=1.5
        )
        for n in range(count)
    ]


def score(rows: list[Hypothesis]) -> WordErrors:
    """Align every utterance and return the word errors of all together."""
    return measure(rows).total()


def test_counts_add_up():
    rows = random_rows(300)
    errors = score(rows)
    assert errors.utterances == 300
    assert errors.words == sum(len(row.reference.split()) for row in rows)
    assert errors.hits + errors.substitutions + errors.deletions == errors.words
    assert errors.hits + errors.substitutions + errors.insertions == sum(
        len(row.hypothesis.split()) for row in rows
    )
    assert errors.errors == errors.substitutions + errors.deletions + errors.insertions


def test_the_rate_is_jiwers():
    rows = random_rows(300, seed=1)
    expected = jiwer.wer([row.reference for row in rows], [row.hypothesis for row in rows])
    assert score(rows).wer == pytest.approx(expected)


def test_a_small_example_by_hand():
    rows = [Hypothesis("a", "the cat sat on the big red mat", "the cat sit on the red mat now")]
    errors = score(rows)
    # Substitution: sat → sit. Deletion: big. Insertion: now.
    assert (errors.substitutions, errors.deletions, errors.insertions) == (1, 1, 1)
    assert errors.wer == pytest.approx(3 / 8)


def test_utterances_add_up_to_the_total():
    rows = random_rows(200, seed=2)
    alone = [astuple(score([row])) for row in rows]
    assert WordErrors(*map(sum, zip(*alone, strict=True))) == score(rows)


def test_groups_add_up_to_the_total_and_are_sorted():
    measured = measure(random_rows(200, seed=3))
    groups = groups_of(measured.rows, lambda row: row.subset)
    assert list(groups) == ["", "clean", "other"]
    totals = [astuple(measured.total(indices)) for indices in groups.values()]
    assert WordErrors(*map(sum, zip(*totals, strict=True))) == measured.total()


def test_confusions_add_up_to_the_errors(monkeypatch):
    rows = random_rows(300, seed=4)
    measured = measure(rows)
    errors = measured.total()
    assert measured.substituted.total() == errors.substitutions
    assert measured.deleted.total() == errors.deletions
    assert measured.inserted.total() == errors.insertions
    monkeypatch.setattr("slam_asr.artifacts.word_errors._ROWS_PER_CALL", 7)
    again = measure(rows)
    assert (again.counts == measured.counts).all() and again.substituted == measured.substituted


def test_without_hypotheses_equals_empty_hypotheses():
    measured = measure(random_rows(50))
    empty = [Hypothesis(row.key, row.reference, "") for row in measured.rows]
    assert (without_hypotheses(measured).counts == measure(empty).counts).all()


def test_identical_text_scores_zero():
    rows = [Hypothesis(str(n), sentence, sentence) for n, sentence in enumerate(["one two", "three"])]
    assert score(rows).wer == 0


def test_empty_hypotheses_are_all_deletions():
    rows = [Hypothesis(row.key, row.reference, " \n ") for row in random_rows(50)]
    errors = score(rows)
    assert errors.wer == 1
    assert errors.utterances == 50
    assert errors.deletions == errors.words


def test_insertions_can_raise_the_rate_above_one():
    assert score([Hypothesis("a", "okay", "okay okay okay")]).wer == 2


def test_white_space_of_any_kind_is_no_error():
    assert score([Hypothesis("a", " a\tb\n c\u00a0d ", "a b  c d")]).wer == 0


def test_differences_in_case_and_punctuation_are_errors():
    assert score([Hypothesis("a", "Hello world,", "hello world")]).substitutions == 2


def test_words_for_an_empty_reference_are_insertions():
    rows = [Hypothesis("silence", "", "thank you"), Hypothesis("speech", "a b", "a b")]
    assert score(rows).insertions == 2
    assert score(rows).wer == 1


@pytest.mark.parametrize("rows", [[], [Hypothesis("a", "", "")], [Hypothesis("a", " ", "some words")]])
def test_without_reference_words_there_is_no_rate(rows):
    with pytest.raises(UserError, match="no words"):
        _ = score(rows).wer


def test_an_alignment_contains_both_texts():
    for row in random_rows(100, seed=4):
        stretches = align(row)
        assert [word for stretch in stretches for word in stretch.reference] == row.reference.split()
        assert [word for stretch in stretches for word in stretch.hypothesis] == row.hypothesis.split()
        for kind, reference, hypothesis in stretches:
            assert (kind == "equal") == (reference == hypothesis)
            assert (kind == "insert") == (not reference)
            assert (kind == "delete") == (not hypothesis)
            if kind == "substitute":
                assert len(reference) == len(hypothesis)


def test_hypotheses_come_back_sorted_by_key(tmp_path):
    rows = random_rows(20)
    rows += [Hypothesis("z", 'quotes " and \u2028 \r\n breaks', "Grüße, 世界", "test", "61", 2.25)]
    shuffled = random.Random(0).sample(rows, len(rows))
    write_hypotheses(tmp_path / "deep" / "hypotheses.jsonl", shuffled)
    assert read_hypotheses(tmp_path / "deep" / "hypotheses.jsonl") == rows


def test_the_order_of_the_rows_does_not_change_the_file(tmp_path):
    rows = random_rows(20)
    write_hypotheses(tmp_path / "a", rows)
    write_hypotheses(tmp_path / "b", reversed(rows))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_unknown_fields_are_ignored(tmp_path):
    line = {"key": "a", "reference": "x", "hypothesis": "y", "beams": 4, "speaker": None}
    (tmp_path / "h.jsonl").write_text(json.dumps(line) + "\n\n")
    assert read_hypotheses(tmp_path / "h.jsonl") == [Hypothesis("a", "x", "y")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "an object"),
        ('{"key": "a", "reference": "x"}', "'hypothesis' is missing"),
        ('{"key": "a", "reference": "x", "hypothesis": 3}', "'hypothesis' must be text"),
        ('{"key": "a", "reference": "x", "hypothesis": "", "duration": NaN}', "'duration' must be a number"),
        ('{"key": "a", "reference": "x", "hypothesis": "", "duration": true}', "'duration' must be a number"),
    ],
)
def test_a_bad_line_is_reported_with_its_number(tmp_path, line, complaint):
    path = tmp_path / "h.jsonl"
    path.write_text('{"key": "a", "reference": "x", "hypothesis": "y"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"line 2: .*" + complaint):
        read_hypotheses(path)


def test_a_missing_file_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="run decode first"):
        read_hypotheses(tmp_path / "none.jsonl")
