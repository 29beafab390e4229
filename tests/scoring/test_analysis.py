"""The analysis of results on a test set, besides the word error rate.

Invariants: intervals contain the rate, become narrower with the size of the test set, are wider over speakers
who differ, and cover the true rate in 95 % of cases; equal recognisers differ only by chance; the fast
normaliser agrees with transformers' own; faults of answers are found, but no repetition or apology of the
reference counts as one; groups leave no utterance out.
"""

import random

import jiwer
import numpy as np
import pytest

from slam_asr.artifacts.hypotheses import Hypothesis
from slam_asr.artifacts.word_errors import character_errors, measure
from slam_asr.scoring.analysis import CUT, EMPTY, LOOP, REFUSAL, analyse, faults_of
from slam_asr.scoring.normalization import whisper_normaliser
from slam_asr.scoring.statistics import interval, interval_over, matched_pairs


def random_errors(utterances: int, rate: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw word errors and reference words, int [utterances] each, for a recogniser with this true rate."""
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 30, utterances)
    return rng.binomial(words, rate), words


def test_intervals_contain_the_true_rate_nineteen_times_in_twenty():
    inside = 0
    for seed in range(200):
        low, high = interval(*random_errors(150, 0.2, seed))
        inside += low <= 0.2 <= high
    # 95 % of 200 are 190; the standard deviation is 3.1.
    assert 178 <= inside <= 199


def test_intervals_narrow_with_the_square_root_of_the_test_sets_size():
    small, large = interval(*random_errors(200, 0.2, 1)), interval(*random_errors(20_000, 0.2, 1))
    assert (small[1] - small[0]) / (large[1] - large[0]) == pytest.approx(10, rel=0.25)


def test_speakers_who_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    words = np.full(400, 20)
    errors = np.concatenate([rng.binomial(20, rate, 40) for rate in np.linspace(0.02, 0.4, 10)])
    speakers = {str(n): np.arange(40 * n, 40 * n + 40) for n in range(10)}
    over_utterances, over_speakers = interval(errors, words), interval_over(speakers, errors, words)
    assert over_speakers[1] - over_speakers[0] > 2 * (over_utterances[1] - over_utterances[0])


@pytest.mark.parametrize(("errors", "words"), [([], []), ([1], [2]), ([1, 1], [0, 0])])
def test_too_few_units_or_no_words_give_no_interval(errors, words):
    assert interval(np.array(errors), np.array(words)) is None


def test_equal_recognisers_differ_only_by_chance():
    false_alarms = 0
    for seed in range(60):
        first, words = random_errors(100, 0.2, seed)
        second = np.random.default_rng(seed + 1000).binomial(words, 0.2)
        false_alarms += matched_pairs(first, second, words, seed).p < 0.05
    assert false_alarms <= 9  # 5 % of 60 are 3; more than 9 have a probability below one in a thousand


def test_a_better_recogniser_is_significant_and_has_the_right_sign():
    first, words = random_errors(400, 0.1, 1)
    second = np.random.default_rng(2).binomial(words, 0.2)
    better = matched_pairs(first, second, words)
    assert better.p < 0.001 and better.low < better.difference < better.high < 0
    worse = matched_pairs(second, first, words)
    assert worse.difference == -better.difference and worse.p == pytest.approx(better.p, abs=1e-3)


def test_equal_outputs_have_no_difference():
    errors, words = random_errors(50, 0.2, 1)
    same = matched_pairs(errors, errors, words)
    assert (same.p, same.difference, same.differing) == (1.0, 0.0, 0)


def test_randomisation_and_its_normal_approximation_agree(monkeypatch):
    first, words = random_errors(3000, 0.20, 5)
    second = np.random.default_rng(6).binomial(words, 0.205)
    randomised = matched_pairs(first, second, words).p
    monkeypatch.setattr("slam_asr.scoring.statistics.MAX_RANDOMISED", 0)
    assert matched_pairs(first, second, words).p == pytest.approx(randomised, abs=0.02)


VOCABULARY = [
    "the",
    "cat",
    "one",
    "two",
    "and",
    "a",
    "half",
    "point",
    "twenty",
    "five",
    "oh",
    "hundred",
    "thousand",
    "minus",
    "dollars",
    "mr",
    "st",
    "it's",
    "been",
    "he'd",
    "gone",
    "uh",
    "hmm",
    "can't",
    "second",
    "per",
    "cent",
    "double",
    "seven",
    "ones",
    "'tis",
    "don't",
    "(laughs)",
    "42",
    "7th",
    "naïve",
    "U.S.",
    "Hello,",
    "o'clock",
    "won't",
]


def test_the_fast_normaliser_agrees_with_transformers_own():
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    original, fast, chance = EnglishTextNormalizer({}), whisper_normaliser(), random.Random(1)
    compared = 0
    for _ in range(3000):
        text = " ".join(chance.choices(VOCABULARY, k=chance.randint(0, 9)))
        try:
            expected = " ".join(original(text).split())
        except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError):
            assert isinstance(fast(text), str)
            continue
        assert fast(text) == expected, text
        compared += 1
    assert compared > 2900


@pytest.mark.parametrize(
    ("reference", "hypothesis", "faults"),
    [
        ("he came home", "he came home home home home home", [LOOP]),
        ("he came home", "and then he and then he and then he and then he came", [LOOP]),
        ("no no no no no said she", "no no no no no said she", []),
        ("no no no", "no no no", []),
        ("the rain in spain", "", [EMPTY]),
        ("", "", []),
        ("the rain in spain", "I'm sorry, but I can't assist with that.", [REFUSAL]),
        ("the rain in spain", "as an ai language model i do not listen", [REFUSAL]),
        ("i am sorry to say so", "i am sorry to say so", []),
        ("i cannot help it", "i cannot help it", []),
        ("sing a song", "sing sing sing and sing a song", []),
    ],
)
def test_faults_of_answers_are_found_unless_the_reference_has_them_too(reference, hypothesis, faults):
    assert faults_of(Hypothesis("u", reference, hypothesis)) == faults
    assert faults_of(Hypothesis("u", reference, hypothesis, cut=True)).count(CUT) == 1


def rows_of_two_speakers() -> list[Hypothesis]:
    chance = random.Random(3)
    words = ["the", "cat", "sat", "on", "a", "mat", "with", "its", "hat"]
    return [
        Hypothesis(
            f"u{n}",
            " ".join(chance.choices(words, k=chance.randint(0, 8))),
            " ".join(chance.choices(words, k=chance.randint(0, 8))),
            chance.choice(["clean", "other"]),
            chance.choice(["61", "62"]),
            chance.choice([0.0, 3.0, 5.0, 12.0, 31.0]),
        )
        for n in range(120)
    ]


def test_groups_leave_no_utterance_out():
    rows = rows_of_two_speakers()
    numbers = analyse(measure(rows))
    for groups in (numbers["subsets"].values(), numbers["speakers"].values()):
        for key in ("utterances", "words", "errors"):
            assert sum(group[key] for group in groups) == numbers["all"][key]
    assert sum(group["utterances"] for group in numbers["durations"]) == sum(row.duration > 0 for row in rows)
    assert [(group["from"], group["to"]) for group in numbers["durations"]] == [(0, 5), (10, 15), (30, None)]
    silent = [row for row in rows if not row.reference]
    assert numbers["empty_references"] == {
        "utterances": len(silent),
        "insertions": sum(len(row.hypothesis.split()) for row in silent),
    }
    assert numbers["all"]["interval"][0] < numbers["all"]["wer"] < numbers["all"]["interval"][1]


def test_the_character_error_rate_is_jiwers():
    rows = [row for row in rows_of_two_speakers() if row.reference]
    wrong, total = character_errors(rows).sum(0)
    assert wrong / total == pytest.approx(
        jiwer.cer([r.reference for r in rows], [r.hypothesis for r in rows])
    )


def test_with_an_unknown_speaker_there_is_no_interval_over_speakers():
    rows = rows_of_two_speakers()
    assert analyse(measure(rows))["all"]["speaker_interval"]
    rows[5].speaker = ""
    assert analyse(measure(rows))["all"]["speaker_interval"] is None


def test_spelling_differences_are_no_errors_after_normalisation():
    rows = [
        Hypothesis("a", "it's twenty one dollars", "It is $21."),
        Hypothesis("b", "mister brown", "Mr. Brown!"),
    ]
    numbers = analyse(measure(rows))["all"]
    assert numbers["normalised"] == 0.0 and numbers["wer"] == 100
