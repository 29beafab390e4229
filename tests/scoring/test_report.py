"""The report on a test set, for people and for programs.

Invariants: the page fetches nothing and executes nothing from a transcript; the three files and the metrics
agree; unknown facts are left out; thousands of utterances still give a small page.
"""

import json
import re
import time
from html.parser import HTMLParser

import pytest

from slam_asr.artifacts.hypotheses import Hypothesis
from slam_asr.config.recipe import Recipe
from slam_asr.errors import UserError
from slam_asr.pages.curves import CURVE_POINTS, thinned
from slam_asr.scoring import report
from slam_asr.scoring.report import MAX_UTTERANCES, write_report

ROWS = [
    Hypothesis(
        "c-1", "the cat sat on the big red mat", "the cat sit on the red mat now", "test-clean", "61", 2.5
    ),
    Hypothesis("c-2", "all is well", "all is well", "test-clean", "62", 1.1),
    Hypothesis("o-1", "nothing was heard", "", "test-other", "63", 1800.0),
    Hypothesis("o-2", "one two", "one two", "test-other", "63", 1800.0),
]
SHUFFLED = [Hypothesis(r.key, r.reference, "something else", r.subset, r.speaker, r.duration) for r in ROWS]
EMPTY = [Hypothesis(r.key, r.reference, "", r.subset, r.speaker, r.duration) for r in ROWS]
TRAINING = {
    "recipe": "demo",
    "encoder": "openai/whisper-tiny",
    "llm": "TinyLlama",
    "projector_parameters": 18880512,
    "all_parameters": 1888051200,
    "precision": "bf16",
    "device": "some GPU",
    "processes": 4,
    "steps": 2000,
    "epochs": 3,
    "seconds": 3723.4,
    "train_utterances": 281241,
    "train_hours": 960.9,
    "curve": [
        {"step": n, "loss": 9 / n, "accuracy": 1 - 1 / n, "learning_rate": 1e-4} for n in range(1, 2001)
    ],
    "validation": [{"step": n, "loss": 10 / n, "accuracy": 0.9 - 100 / n} for n in range(500, 2001, 500)],
}
DECODING = {
    "beams": 4,
    "seconds": 360.0,
    "audio_hours": 1.0,
    "utterances": 4,
    "answers_cut": 0,
    "empty_answers": 1,
    "batch_size": 8,
}


class Page(HTMLParser):
    """A parser that collects a page's elements, and the text of each cell of its tables, row by row."""

    VOID = ("meta", "link", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        self.tables = [[[" ".join(cell.split()) for cell in row] for row in table] for table in self.tables]
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def full_report(folder, title="demo", published=None, **changes):
    if published is None:
        published = {"test-other": 6.47, "test-elsewhere": 1.0}
    parts = {
        "rows": ROWS,
        "controls": {"shuffled audio": SHUFFLED, "empty output": EMPTY},
        "training": TRAINING,
        "decoding": DECODING,
    }
    metrics = write_report(folder, Recipe(name=title, published_wer=published), **(parts | changes))
    return (
        metrics,
        (folder / "report.html").read_text(),
        (folder / "report.md").read_text(),
        json.loads((folder / "wer.json").read_text()),
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Write one report with all its parts, for tests that only read it; its curves take half a second."""
    return full_report(tmp_path_factory.mktemp("report"))


def bare_report(folder, rows):
    return full_report(folder, rows=rows, controls={}, training={}, published={}, decoding={})


def test_the_metrics_are_percentages(full):
    metrics, *_ = full
    assert metrics == {
        "wer": 37.5,
        "wer test-clean": 27.27,
        "wer test-other": 60.0,
        "wer shuffled audio": 100.0,
        "wer empty output": 100.0,
        "wer 95 % low": 0.0,
        "wer 95 % high": 75.0,
        # Whisper's normaliser turns "one two" into one word, "12".
        "wer normalised": 40.0,
        "cer": 40.0,
    }


def test_page_markdown_and_json_agree(full):
    metrics, html, markdown, numbers = full
    head, *rows = Page(html).tables[0]
    assert head[:6] == [
        "Subset",
        "WER, %",
        "95 % interval",
        "Published, %",
        "Shuffled audio, %",
        "Empty output, %",
    ]
    assert rows == [
        [
            "test-clean",
            "27.27",
            "0.00–37.50",
            "–",
            "100.00",
            "100.00",
            "27.27",
            "21.95",
            "1",
            "1",
            "1",
            "11",
            "2",
            "0.00",
        ],
        [
            "test-other",
            "60.00",
            "0.00–100.00",
            "6.47",
            "100.00",
            "100.00",
            "75.00",
            "70.83",
            "0",
            "3",
            "0",
            "5",
            "2",
            "1.00",
        ],
        [
            "All",
            "37.50",
            "0.00–75.00",
            "–",
            "100.00",
            "100.00",
            "40.00",
            "40.00",
            "1",
            "4",
            "1",
            "16",
            "4",
            "1.00",
        ],
    ]
    for row in rows:
        assert f"| {' | '.join(row)} |" in markdown
    assert numbers["all"]["wer"] == metrics["wer"]
    assert numbers["subsets"]["test-other"]["deletions"] == 3
    assert numbers["controls"]["shuffled audio"]["subsets"]["test-clean"]["wer"] == 100.0
    for key in ("utterances", "words", "hits", "substitutions", "deletions", "insertions", "errors"):
        assert sum(counts[key] for counts in numbers["subsets"].values()) == numbers["all"][key]


def test_training_and_decoding_facts_are_shown(full):
    _, html, markdown, numbers = full
    for fact in (
        "18\u202f880\u202f512 (1\u202f% of all)",
        "openai/whisper-tiny",
        "bf16",
        "1:02:03",
        "960.90 h",
        "10.0 times real time",
        "Batch size",
    ):
        assert fact in html, fact
    assert "1:02:03" in markdown
    assert numbers["training"]["seconds"] == 3723.4
    assert numbers["decoding"] == DECODING


def test_alignments_are_readable_without_colour(full):
    _, html, *_ = full
    texts = [row[2] for row in Page(html).tables[-1][1:]]
    assert "the cat sat → sit on the − big red mat + now c-1 · test-clean · speaker 61 · 2.5 s" in texts
    assert "− nothing was heard empty answer o-1 · test-other · speaker 63 · 1800.0 s" in texts
    assert "<del>sat</del><i> → </i><ins>sit</ins>" in html
    assert "<i>− </i><del>big</del>" in html
    assert "<i>+ </i><ins>now</ins>" in html


def test_groups_confusions_and_faults_of_answers_are_on_the_page(tmp_path):
    rows = [
        *ROWS,
        Hypothesis("l-1", "over and out", "over over over over over over", "test-other", "61", 7.0, cut=True),
    ]
    _, html, markdown, numbers = full_report(tmp_path, rows=rows)
    tables = {table[0][0]: table for table in Page(html).tables}
    assert [row[0] for row in tables["Audio"][1:]] == ["0 to 5 s", "5 to 10 s", "above 30 s"]
    assert [row[0] for row in tables["Speaker"][1:]] == ["61", "63", "62"]
    assert "<li><b>1</b> sat<i> → </i>sit</li>" in html
    assert numbers["faults"] == {"loop": 1, "cut at the limit": 1, "empty answer": 1, "refusal": 0}
    assert '<span class="tag">loop</span> <span class="tag">cut at the limit</span>' in html
    assert "Answers that went wrong: loop: 1; cut at the limit: 1; empty answer: 1." in markdown


def test_utterances_come_worst_first(full):
    _, html, *_ = full
    head, *rows = Page(html).tables[-1]
    assert head == ["Errors", "WER, %", "Utterance"]
    assert [row[0] for row in rows] == ["3/3", "3/8", "0/2", "0/3"]


def test_the_page_is_self_contained(full):
    _, html, *_ = full
    assert not re.findall(r"https?://[^\s\"']+|//[a-z][\w.-]+\.[a-z]+/", html)
    assert not re.search(
        r"localStorage|sessionStorage|indexedDB|document\.cookie|fetch\(|XMLHttpRequest|import\(", html
    )
    assert "default-src 'none'" in html
    for tag, attributes in Page(html).tags:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form"), tag
        assert tag == "link" or not attributes.keys() & {"src", "href"}, (tag, attributes)


def test_audio_is_embedded_in_the_page(tmp_path):
    _, html, *_ = full_report(tmp_path, audio={("o-1", "test-other"): "SUQz"})
    (player,) = [attributes for tag, attributes in Page(html).tags if tag == "audio"]
    assert player["src"] == "data:audio/mpeg;base64,SUQz" and player["aria-label"] == "Audio of o-1"
    assert "media-src data:" in html


def test_ids_are_unique_and_references_point_to_them(full):
    _, html, *_ = full
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for key in ("aria-labelledby", "for"):
            assert set(attributes.get(key, "").split()) <= set(ids)
        if "xlink:href" in attributes:
            assert attributes["xlink:href"].removeprefix("#") in ids


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;|`*_[\"'{{ 7*7 }}"


def test_transcripts_are_inert(tmp_path):
    # Word joiners instead of spaces make it one word, so the page must mark all of it as one error.
    word = HOSTILE.replace(" ", "\u2060")
    rows = [
        Hypothesis(word + key, reference, hypothesis, word, word, 1.0)
        for key, reference, hypothesis in [
            ("e", word, word),
            ("s", word, "a"),
            ("d", f"a {word}", "a"),
            ("i", "a", f"a {word}"),
        ]
    ]
    known = {key: HOSTILE if isinstance(value, str) else value for key, value in TRAINING.items()}
    _, html, markdown, _ = full_report(
        tmp_path,
        title=HOSTILE,
        rows=rows,
        controls={HOSTILE: rows},
        training=known,
        published={word: 1.0},
        decoding={HOSTILE: HOSTILE},
    )
    page = Page(html)
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", html)[0]
    assert "<" not in markdown
    assert (
        len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")})
        == 1
    )


@pytest.mark.parametrize("left_out", [*TRAINING, "all of them"])
def test_unknown_facts_are_left_out(tmp_path, left_out):
    # Drawing takes time, so the curves are drawn only in the cases that leave out one of them.
    curves = ("curve", "validation")
    training = {
        name: fact
        for name, fact in TRAINING.items()
        if left_out not in (name, "all of them") and (left_out in curves or name not in curves)
    }
    _, html, markdown, numbers = full_report(tmp_path, training=training)
    Page(html)
    assert "None" not in html + markdown
    assert ("How it was trained" in html) == (left_out != "all of them")
    assert numbers["training"].keys() <= TRAINING.keys()


def test_a_report_with_hypotheses_only(tmp_path):
    metrics, html, *_ = bare_report(tmp_path, [Hypothesis("a", "one two", "one")])
    assert metrics == {"wer": 50.0, "wer normalised": 100.0, "cer": 57.14}
    page = Page(html)
    assert page.tables[0][1] == ["(no subset)", "50.00", "–", "100.00", "57.14", "0", "1", "0", "2", "1", "–"]
    assert len(page.tables[0]) == 2
    for absent in ("Published", "Control", "How it was", "<svg"):
        assert absent not in html.partition("<body>")[2]


def test_a_subset_without_words_has_no_rate_and_hides_no_errors(tmp_path):
    rows = [Hypothesis("a", "one two", "one", "speech"), Hypothesis("b", "", "thank you", "silence")]
    metrics, html, _, numbers = bare_report(tmp_path, rows)
    assert (metrics["wer"], metrics["wer speech"]) == (150.0, 50.0) and "wer silence" not in metrics
    assert (
        "1 utterances have an empty reference; the 2 words of their hypotheses count as insertions." in html
    )
    assert numbers["subsets"]["silence"]["wer"] is None
    assert Page(html).tables[0][1][:2] == ["silence", "–"]


@pytest.mark.parametrize("rows", [[], [Hypothesis("a", "", "words")]])
def test_nothing_to_score_is_refused_and_writes_no_files(tmp_path, rows):
    with pytest.raises(UserError, match="check the"):
        bare_report(tmp_path / "report", rows)
    assert not (tmp_path / "report").exists()


def test_curves_use_the_pages_colours_and_have_titles(full):
    _, html, *_ = full
    curves = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(curves) == 2
    for svg in curves:
        assert 'role="img"' in svg and "<title" in svg and "<desc" in svg
        # Only currentColor and the page's variables: a fixed colour might be invisible on a dark page.
        assert not re.findall(r"(?:fill|stroke): ?#\w+", svg)
        assert "var(--curve)" in svg and "var(--accent)" in svg and "currentColor" in svg
        assert "<text" in svg
    assert "0.005 at step 2\u202f000" in html
    assert "Validation: best 85.0\u202f%, at step 2\u202f000." in html


def test_a_diverged_training_still_gives_a_page_and_valid_json(tmp_path):
    nan = float("nan")
    curve = [
        {"step": 1, "loss": 5.0, "accuracy": 0.1},
        {"step": 2, "loss": nan, "accuracy": nan},
        {"step": 3, "loss": float("inf")},
    ]
    full_report(tmp_path, training={"curve": curve})
    json.loads((tmp_path / "wer.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    full_report(tmp_path, training={"curve": [{"step": 1, "loss": nan}], "validation": []})


def test_a_thinned_curve_preserves_its_mean_and_its_end():
    points = [{"step": n, "loss": float(n % 7)} for n in range(1, 4001)]
    thin = thinned(points)
    assert len(thin) <= CURVE_POINTS
    assert thin[-1]["step"] == 4000
    assert sum(p["loss"] for p in thin) / len(thin) == pytest.approx(sum(p["loss"] for p in points) / 4000)
    assert thinned(points[:CURVE_POINTS]) == points[:CURVE_POINTS]


def test_the_same_results_give_the_same_files(tmp_path):
    assert full_report(tmp_path / "a") == full_report(tmp_path / "b")


@pytest.mark.slow
def test_five_thousand_utterances_are_fast_and_give_a_small_page(tmp_path):
    sentence = "he hoped there would be stew for dinner turnips and carrots and bruised potatoes"
    rows = [
        Hypothesis(f"u{n:05d}", sentence, sentence.replace("stew", f"stew {n}"), "test", "61", 5.0)
        for n in range(5000)
    ]
    rows[4321].hypothesis = "okay " * 40
    started = time.monotonic()
    _, html, *_ = bare_report(tmp_path, rows)
    # About one second on a laptop; the bound only distinguishes linear from quadratic time.
    assert time.monotonic() - started < 20
    assert len(html) < 300_000
    table = Page(html).tables[-1]
    assert len(table) == MAX_UTTERANCES + 1
    assert "u04321" in table[1][2]
    assert f"The {MAX_UTTERANCES} of 5\u202f000 utterances" in html


def test_only_a_page_that_omits_utterances_mentions_it(tmp_path, monkeypatch):
    _, html, *_ = bare_report(tmp_path, ROWS)
    assert "with the most word errors" not in html
    monkeypatch.setattr(report, "MAX_UTTERANCES", len(ROWS) - 1)
    _, html, *_ = bare_report(tmp_path, ROWS)
    assert "The 3 of 4 utterances with the most word errors" in html


def test_a_control_over_fewer_utterances_shows_their_number(tmp_path):
    _, html, *_ = full_report(tmp_path, controls={"shuffled audio": SHUFFLED[:2]})
    assert "Over 2 utterances." in html
    assert Page(html).tables[0][2][4] == "–"
