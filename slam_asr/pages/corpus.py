"""The page about a corpus: hours, durations, characters, and the reasons for rejections with examples."""

import itertools
import math
import unicodedata
from pathlib import Path
from typing import Any

from slam_asr.config.recipe import Recipe
from slam_asr.pages.render import render, with_thousands
from slam_asr.storage import write_atomically

MAX_BARS = 60
"""Maximum number of bars in the histogram. Each bar covers one second, or several in a long histogram."""
MAX_CHARACTERS = 200
"""Maximum number of different characters on the page."""
_MAX_EXAMPLE = 160
"""Maximum length of a sentence or key on the page, in characters; rejected.jsonl has the full text."""

# Size and margins of the histogram, in units of the drawing.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 960, 250, 64, 16, 34, 8


def write_corpus_page(path: Path, corpus: str, kind: str, recipe: Recipe, statistics: dict[str, Any]) -> None:
    """Write the page about a corpus.

    Args:
        path: the page's file.
        corpus: path of the corpus, shown as the heading.
        kind: the corpus's layout, in words.
        recipe: the recipe, whose data section the page shows.
        statistics: the counts from `corpora.statistics`.
    """
    splits, alphabet = statistics["splits"], statistics["alphabet"]
    values = {
        "corpus": corpus,
        "kind": kind,
        "data": recipe.data,
        "total": {name: sum(m[name] for m in splits.values()) for name in ("hours", "utterances", "words")},
        "histogram": draw_histogram(splits),
        "characters": characters(alphabet),
        "left_out": max(0, len(alphabet) - MAX_CHARACTERS),
        "reasons": _reasons(statistics),
    }
    write_atomically(path, render("corpus.html", {"hours": hours, "share": share}, **values, **statistics))


def hours(value: float) -> str:
    """Format hours: `0.5` → `30.0 min`, `960.7` → `960.7 h`, with narrow no-break spaces."""
    if value < 1:
        return f"{value * 60:.1f}\u202fmin"
    return f"{with_thousands(round(value, 1 if value < 10_000 else None))}\u202fh"


def share(part: float, total: float) -> str:
    """Format a share of a total in percent: `3, 100` → `3.0 %`."""
    percent = 100 * part / total if total else 0
    return "< 0.1\u202f%" if 0 < percent < 0.1 else f"{percent:.1f}\u202f%"


def draw_histogram(splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Draw the durations of all splits as a histogram.

    Args:
        splits: for each split, `durations`: the numbers of utterances that last [0, 1) s, [1, 2) s and so on.

    Returns:
        Bars; axis ticks, each with its position and its number; sizes in units of the drawing; and `bin`, the
        seconds that a bar covers. The keys are the names in the page's template. A bar has its left edge `x`,
        its `width`, a `label` for when the pointer is over it, and its `parts` (split, top, height) from the
        lowest to the highest.
    """
    longest = max(len(m["durations"]) for m in splits.values())
    # There is one count per second, and none can be divided, so a bar's width is a whole number of seconds.
    width = math.ceil(longest / MAX_BARS)
    counts = [
        {s: sum(m["durations"][second : second + width]) for s, m in splits.items()}
        for second in range(0, longest, width)
    ]
    step, highest = _scale(max(sum(c.values()) for c in counts))
    across, up = (_WIDTH - _LEFT - _RIGHT) / len(counts), (_HEIGHT - _BOTTOM - _TOP) / highest
    bars = []
    for index, count in enumerate(counts):
        parts, base = [], _HEIGHT - _BOTTOM
        for split, number in count.items():
            if number:
                height = number * up  # y grows downwards, so a taller bar has a smaller top
                base -= height
                parts.append((split, round(base, 2), round(height, 2)))
        numbers = ", ".join(f"{with_thousands(n)} {split}" for split, n in count.items() if n) or "none"
        label = f"{index * width} to {(index + 1) * width} s: {numbers}"
        x, bar_width = round(_LEFT + index * across + 1, 2), round(max(across - 2, 1), 2)
        bars.append({"x": x, "width": bar_width, "parts": parts, "label": label})
    every = max(1, math.ceil(len(counts) / 12))
    return {
        "bars": bars,
        "width": _WIDTH,
        "end": _WIDTH - _RIGHT,
        "height": _HEIGHT,
        "left": _LEFT,
        "bottom": _HEIGHT - _BOTTOM,
        "bin": width,
        "x": [(round(_LEFT + i * across, 2), i * width) for i in range(0, len(counts) + 1, every)],
        "y": [(round(_HEIGHT - _BOTTOM - n * up, 2), n) for n in range(0, highest + 1, step)],
    }


def _scale(highest: int) -> tuple[int, int]:
    """Return two numbers: the distance between an axis's ticks, and the axis's last value, a multiple of it.

    The distance is the smallest of 1, 2, 5, 10, 20 and so on that reaches `highest` in at most four steps.
    """
    raw = max(highest, 1) / 4
    power = 10 ** math.floor(math.log10(raw)) if raw >= 1 else 1
    step = next(int(f * power) for f in (1, 2, 5, 10) if f * power >= raw)
    return step, step * math.ceil(max(highest, 1) / step)


def characters(alphabet: dict[str, int]) -> list[dict[str, Any]]:
    """Describe the first `MAX_CHARACTERS` characters of an alphabet, for the page.

    An invisible character, such as a space, has an empty `shape`, and the page shows `label` instead.

    Args:
        alphabet: number of occurrences by character, most frequent first.
    """
    total = sum(alphabet.values())
    return [
        {
            # Unicode's categories C (other, such as controls) and Z (separators) have nothing to show.
            "shape": char if unicodedata.category(char)[0] not in "CZ" else "",
            "count": count,
            "name": unicodedata.name(char, f"U+{ord(char):04X}").lower(),
            "code": f"U+{ord(char):04X}",
            "share": share(count, total),
            "label": "space" if char == " " else f"U+{ord(char):04X}",
        }
        for char, count in itertools.islice(alphabet.items(), MAX_CHARACTERS)
    ]


def _reasons(statistics: dict[str, Any]) -> list[dict[str, Any]]:
    reasons = []
    for reason, count in sorted(statistics["rejected"]["by_reason"].items(), key=lambda pair: -pair[1]):
        examples = [{k: _short(v) for k, v in example.items()} for example in statistics["examples"][reason]]
        reasons.append({"reason": reason, "count": count, "examples": examples})
    return reasons


def _short(text: str) -> str:
    # A lone surrogate, from a name that is not UTF-8, could not be written to the page.
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MAX_EXAMPLE else f"{text[: _MAX_EXAMPLE - 40]} … {text[-36:]}"
