"""Text of any language is scored as it is written.

Invariants: characters are counted where spaces do not separate words; two Unicode forms of a text are the
same text; the rules for English are applied only to English.
"""

import json
import unicodedata

import pytest

from slam_asr.artifacts.hypotheses import Hypothesis, read_hypotheses, write_hypotheses
from slam_asr.artifacts.word_errors import character_errors, measure
from slam_asr.artifacts.writing_systems import (
    characters_of,
    comparable,
    is_english,
    looks_english,
    normalise_any_language,
    separates_words,
)
from slam_asr.config.recipe import Data, Recipe
from slam_asr.corpora import Candidate
from slam_asr.corpora.splits import read_splits
from slam_asr.errors import ConfigurationError
from slam_asr.scoring.analysis import analyse
from slam_asr.scoring.controls import EMPTY, empty_output
from slam_asr.scoring.report import write_report
from slam_asr.stages.compare import compare
from slam_asr.stages.compare_runs import compare_runs

CHINESE = [
    Hypothesis("u0", "甚至 出现 交易 几乎 停滞 的 情况", "甚至出现交易几乎停滞的情况", "test", "a", 1.0),
    Hypothesis("u1", "你好", "你号", "test", "b", 1.0),
]
FRENCH = "L'été dernier, les élèves étaient déjà là."


def row(reference: str, hypothesis: str, language: str = "") -> Hypothesis:
    return Hypothesis("u", reference, hypothesis, language=language)


@pytest.mark.real_input("B16-languages-without-spaces")
def test_characters_are_counted_where_words_are_not_separated():
    numbers = analyse(measure(CHINESE))
    assert numbers["unit"] == "characters"
    total = numbers["all"]
    assert (total["rate"], total["cer"], total["wer"], total["normalised"]) == (6.67, 6.67, None, 6.67)
    assert (total["errors"], total["words"]) == (1, 15)
    assert numbers["confusions"]["substitutions"] == [["好", "号", 1]]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "rate"),
    [
        ("きょう は いい 天気 です", "きょうはいい天気でした", 20.0),  # Japanese: 2 errors in 10 characters
        ("สวัสดี ครับ", "สวัสดีคับ", 10.0),  # Thai: 1 error in 10 characters
        ("ສະບາຍ ດີ", "ສະບາຍດີ", 0.0),  # Lao
        ("សួស្តី\u200bបង", "សួស្តីបង", 0.0),  # Khmer, with zero-width spaces between words
        ("မင်္ဂလာ ပါ", "မင်္ဂလာပါ", 0.0),  # Burmese
        ("我 用 iPhone 打 电话", "我用iPhone打电话", 0.0),  # Chinese with a Latin word
    ],
)
def test_spaces_do_not_count_in_scripts_without_word_spaces(reference, hypothesis, rate):
    total = analyse(measure([row(reference, hypothesis)]))["all"]
    assert total["rate"] == total["cer"] == rate and total["wer"] is None


@pytest.mark.parametrize(
    "text", ["the cat sat", "안녕하세요 여러분", "привет всем", "यह किताब", FRENCH, "", "42"]
)
def test_words_are_counted_where_spaces_separate_them(text):
    assert separates_words([text])
    assert characters_of(text) == text


def test_neither_an_english_word_in_chinese_nor_a_chinese_name_in_english_decides_the_unit():
    assert not separates_words(["我用 iPhone 打电话给朋友们", "OK"])
    assert separates_words(["she met 王 in the market"])
    # The spaces next to the name do not count; those between words do.
    rows = [row("she met 王 in town", "she met王in town")]
    assert character_errors(rows).tolist() == [[0, 15]]


@pytest.mark.real_input("B17-nfc")
def test_two_unicode_forms_are_the_same_text(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "café déjà") for form in ("NFC", "NFD"))
    total = analyse(measure([row(nfd, nfc)]))["all"]
    assert (total["wer"], total["cer"], total["normalised"]) == (0.0, 0.0, 0.0)
    for name, key, text in (
        ("a_pred", unicodedata.normalize("NFD", "clé"), nfd),
        ("a_gt", "clé", nfc),
        ("b_pred", "clé", nfc),
        ("b_gt", unicodedata.normalize("NFD", "clé"), nfd),
    ):
        (tmp_path / name).write_text(f"{key}\t{text}\n", encoding="utf-8")
    (compared,) = compare(str(tmp_path / "a_pred"), str(tmp_path / "b_pred"))
    assert (compared.first, compared.second) == (0.0, 0.0)


class _Corpus:
    """A corpus of one utterance."""

    def __init__(self, text: str, **extra: str) -> None:
        self.candidate = Candidate("u0", "u0.wav", text, {"subset": "train", **extra})

    def read(self, subset: str):
        yield self.candidate


def transcript(text: str, form: str, **extra: str) -> str:
    (item,) = read_splits(_Corpus(text, **extra), {"train": ["train"]}, Data(text=form), set())
    return item.text


@pytest.mark.parametrize("form", ["lower", "upper", "as-is", "whisper"])
def test_build_manifest_writes_nfc(form):
    assert unicodedata.is_normalized("NFC", transcript(unicodedata.normalize("NFD", "Café déjà"), form))


@pytest.mark.real_input("B18-normaliser-of-other-languages")
def test_english_rules_are_applied_to_english_alone():
    rows = [row("यह किताब", "यह कितब"), row("मेरी किताबें", "मेर किताबे")]
    total = analyse(measure(rows))["all"]
    # A normaliser that removes vowel signs would count the three wrong words of these four as right.
    assert (total["wer"], total["normalised"]) == (75.0, 75.0)
    assert normalise_any_language("यह, किताब!") == "यह किताब"
    assert (
        analyse(measure([row("Mr. Smith, isn't it?", "mister smith is not it")]))["all"]["normalised"] == 0.0
    )
    # `six` is French here: it stays a word, and so does `mr`.
    assert analyse(measure([row(f"{FRENCH} Six MR", f"{FRENCH.lower()} 6 mr")]))["all"]["normalised"] == 10.0


def test_a_language_in_the_manifest_counts_more_than_the_letters():
    french = analyse(measure([row("six mr", "6 mister", "fr")]))["all"]
    english = analyse(measure([row("six mr", "6 mister", "en-US")]))["all"]
    assert (french["normalised"], english["normalised"]) == (100.0, 0.0)
    assert [is_english(name) for name in ("en", "en_GB", "English", "eng", "enm", "fr", "end")] == [
        *[True] * 4,
        *[False] * 3,
    ]
    assert looks_english(["they met at a café", *["in the old town by the river"] * 20])
    assert not looks_english([FRENCH])


@pytest.mark.real_input("B18-normaliser-of-other-languages")
@pytest.mark.parametrize(
    ("text", "extra"), [("यह किताब", {}), ("bonjour", {"language": "fr"}), ("hallo", {"locale": "de"})]
)
def test_whispers_normaliser_for_english_refuses_other_languages(text, extra):
    with pytest.raises(ConfigurationError, match=r"u0 is not in English.*--data\.text\.$"):
        transcript(text, "whisper", **extra)
    assert transcript(text, "lower", **extra) == text


def test_reports_comparisons_and_runs_name_the_character_error_rate(tmp_path, capsys):
    worse = [Hypothesis(r.key, r.reference, "", r.subset, r.speaker, r.duration) for r in CHINESE]
    for name, rows in (("good", CHINESE), ("bad", worse)):
        metrics = write_report(tmp_path / name, Recipe(name=name), rows, {EMPTY: empty_output(rows)}, {}, {})
        write_hypotheses(tmp_path / name / "hypotheses.jsonl", rows)
    assert next(iter(metrics)) == "cer" and not [key for key in metrics if "wer" in key]
    assert metrics["cer"] == metrics["cer test"] == metrics["cer empty output"] == 100.0
    page, markdown = (
        (tmp_path / "good" / f"report.{end}").read_text(encoding="utf-8") for end in ("html", "md")
    )
    assert "Character error rate</dt>" in page and "errors counted in characters" in page
    assert "WER" not in page + markdown and "6.67" in page and "Word error" not in page + markdown
    assert "**Character error rate 6.67 %**: 1 errors in 15 characters, 2 utterances." in markdown
    folders = [str(tmp_path / name) for name in ("bad", "good")]
    (compared,) = compare(*folders, output=str(tmp_path / "difference.json"))
    assert (compared.unit, compared.first, compared.second) == ("characters", 100.0, 6.67)
    assert "character error rates" in capsys.readouterr().out
    record = compare_runs(folders, str(tmp_path / "runs"))
    assert record.metrics == {"best cer": 6.67, "cer good": 6.67, "cer bad": 100.0}
    assert "CER 6.67 %" in record.summary
    page = record.file("runs.html").read_text(encoding="utf-8")
    assert "Best character error rate" in page and "WER" not in page + record.file("runs.md").read_text(
        "utf-8"
    )


def test_hypotheses_and_reports_of_earlier_versions_are_read(tmp_path):
    line = {
        "key": "u0",
        "reference": "a b",
        "hypothesis": "a c",
        "subset": "test",
        "speaker": "",
        "cut": False,
    }
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hypotheses.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
        counts = {"wer": 50.0, "cer": 33.3, "interval": None, "normalised": 50.0}
        numbers = {"title": name, "all": counts, "subsets": {"test": counts}, "controls": {}, "training": {}}
        (tmp_path / name / "wer.json").write_text(json.dumps(numbers), encoding="utf-8")
    assert read_hypotheses(tmp_path / "one" / "hypotheses.jsonl")[0].language == ""
    record = compare_runs([str(tmp_path / "one"), str(tmp_path / "two")], str(tmp_path / "runs"))
    assert record.metrics == {"best wer": 50.0, "wer one": 50.0, "wer two": 50.0}


def test_a_loop_of_characters_is_flagged():
    faults = analyse(measure([row("谢谢你们的帮助", "谢谢" * 6)]))["faults"]
    assert faults["loop"] == 1


def test_zero_width_spaces_and_no_break_spaces_separate_words():
    assert comparable("a\u200bb\u00a0 c\ufeff") == "a b c"
