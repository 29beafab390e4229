"""Code and docs use the field's plain words: see CONTRIBUTING.md and docs/glossary.md."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
BANNED = {
    r"\bbehind\b": "before, after, next or following",
    r"\b(over)?hear[sd]?\b": "what happens: an encoder runs, an utterance is decoded, a line is read",
    r"\bwanted\b": "requested or expected",
    r"\bwhole\b(?! (second|number))": "complete, all of, entire",
    r"\bkept\b": "cached, saved, retained, unchanged",
    r"\bas if stored\b": "rounded to the store's dtype",
    r"\b(told|tells)\b": "logged, reported, describes",
    r"(?<!set-)\baside\b": "rejected, skipped, temporary",
    r"\b(goes|going|gone|go) on (behind|with|from)\b": "resumes",
    r"\banew\b": "again",
    r"\bof yesterday\b": "old",
    r"\bcomes to nothing\b": "has no result",
}
"""Words that are vague, or mean several things here: a pattern, and what to write instead."""

ALLOWED = {
    "demo/texts.py": ['("'],  # the grammar of the demo's sentences
    "slam_asr/scoring/analysis.py": ["hear|understand"],  # what an LLM writes instead of a transcript
    "tests/scoring/test_report.py": ["nothing was heard"],  # a transcript
    "tests/test_words.py": [""],
}
"""By file, pieces of text. A line that has one of them may contain a banned word; an empty piece exempts the
complete file."""

BARE = re.compile(r"Of |Whether or not |That which |What is ")
"""Beginnings of docstrings that name neither what the object is nor what it does."""


def tracked(*patterns: str) -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("needs the git checkout, to know which files belong to the project")
    return [name for name in listing.stdout.splitlines() if (CHECKOUT / name).is_file()]


def test_code_and_docs_use_no_banned_word():
    found = []
    for name in tracked(
        "*.py", "*.md", "*.html", "*.cff", "Makefile", "slam_asr/recipes/*.yaml", "manifests/**"
    ):
        allowed = ALLOWED.get(name, [])
        if "" in allowed or "/golden/" in name:
            continue
        for number, line in enumerate((CHECKOUT / name).read_text(encoding="utf-8").splitlines(), start=1):
            # Identifiers count too: their words are joined by underscores.
            words = line.replace("_", " ")
            for pattern, instead in BANNED.items():
                if re.search(pattern, words, re.IGNORECASE) and not any(piece in line for piece in allowed):
                    found.append(f"{name}:{number}: {line.strip()[:90]}  → {instead}")
    assert not found, f"{len(found)} lines have words to replace:\n" + "\n".join(found)


def test_no_docstring_begins_with_a_phrase_that_names_nothing():
    found = []
    for name in tracked("*.py"):
        tree = ast.parse((CHECKOUT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            text = (
                node.value.value
                if isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
                else ""
            )
            if BARE.match(text):
                found.append(f"{name}:{node.lineno}: {text.splitlines()[0][:90]}")
    assert not found, f"{len(found)} docstrings to rewrite:\n" + "\n".join(found)
