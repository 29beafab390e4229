"""Training curves: loss and next-token accuracy over the steps, drawn as inline SVG."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup, escape

from slam_asr.pages.render import grouped, render
from slam_asr.storage import write_atomically

RUN_MARKERS = "●■▲◆▼★"
"""The markers that `draw_runs` gives the first lines; the style sheet's --run-1, --run-2 … are their colours."""
CURVE_POINTS = 400
"""Points drawn of a training curve; more than a screen can tell apart only make the page heavy."""


def write_curves(path: Path, title: str, facts: list[tuple[str, str]], training: dict[str, Any]) -> None:
    """Write a page with the curves of one training.

    Args:
        path: the page.
        title: its heading.
        facts: (name, value) pairs shown above the curves.
        training: `curve` and `validation`, lists of {step, loss, accuracy}, the latter perhaps with wer; and `samples`, the
            transcripts of the last validation with key, reference and hypothesis.
    """
    points = {name: thinned(training.get(name) or []) for name in ("curve", "validation")}
    samples = training.get("samples") or []
    write_atomically(
        path, render("curves.html", title=title, facts=facts, curves=draw_curves(points), samples=samples)
    )


def thinned(points: Sequence[dict[str, Any]], most: int = CURVE_POINTS) -> list[dict[str, Any]]:
    """At most `most` points: each the mean of equally many neighbours, at the step of the last."""
    if len(points) <= most:
        return list(points)
    width = math.ceil(len(points) / most)
    return [_mean(points[start : start + width]) for start in range(0, len(points), width)]


def _mean(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mean = {"step": points[-1]["step"]}
    for key in points[-1]:
        values = [p[key] for p in points if is_number(p.get(key))]
        if key != "step" and values:
            mean[key] = fmean(values)
    return mean


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def draw_curves(training: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures of one training, with `heading`, `summary` and `svg`: its own values and those on dev."""
    curves = []
    for quantity, heading, scale in _QUANTITIES:
        series = {
            name: _points(training[source], quantity, scale)
            for name, source in (("training", "curve"), ("validation", "validation"))
        }
        if any(series.values()):
            lines = [Line(name, points, _STYLES[name]) for name, points in series.items() if points]
            curves.append(_figure(quantity, heading, lines, _in_words(series, *_BEST[quantity])))
    return curves


def draw_runs(trainings: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of several trainings, by name, as `draw_curves` makes them: their values on dev, or their own where there was no dev.

    The first ones have colours and markers of their own, as `RUN_MARKERS` names them; the others share a quiet line. The page names the lines.
    """
    curves = []
    for quantity, heading, scale in _QUANTITIES:
        dev = {
            name: _points(training.get("validation") or [], quantity, scale)
            for name, training in trainings.items()
        }
        own = {
            name: _points(thinned(training.get("curve") or []), quantity, scale)
            for name, training in trainings.items()
        }
        series = dev if any(dev.values()) else own
        lines = [
            Line(name, points, _style_of_run(at))
            for at, (name, points) in enumerate(series.items())
            if points
        ]
        if lines:
            best, shown = _BEST[quantity]
            ends = [
                f"{line.name}: best {shown.format(best(line.points, key=lambda point: point[1])[1])}"
                for line in lines[: len(_RUNS)]
            ]
            curves.append(
                _figure(
                    quantity,
                    f"{heading}{', dev' * (series is dev and quantity != 'wer')}",
                    lines,
                    "; ".join(ends) + ".",
                    named=False,
                )
            )
    return curves


@dataclass
class Line:
    """One line of a figure: its name, its (step, value) points, and how matplotlib draws it."""

    name: str
    points: list[tuple[int, float]]
    style: dict[str, Any]


_QUANTITIES = (
    ("loss", "Loss", 1),
    ("accuracy", "Next-token accuracy, %", 100),
    ("wer", "Word error rate of some dev utterances, greedy, %", 100),
)


def _points(rows: Sequence[dict[str, Any]], quantity: str, scale: int) -> list[tuple[int, float]]:
    return [(row["step"], scale * row[quantity]) for row in rows if is_number(row.get(quantity))]


def _figure(
    quantity: str, heading: str, lines: Sequence[Line], summary: str, named: bool = True
) -> dict[str, Any]:
    return {
        "heading": heading,
        "summary": summary,
        "svg": Markup(_svg(quantity, lines, f"{heading} over optimiser steps", summary, named)),
    }


_BEST = {"loss": (min, "{:.3f}"), "accuracy": (max, "{:.1f}\u202f%"), "wer": (min, "{:.1f}\u202f%")}
"""Which of a quantity's values is the best, and how it is written."""


def _in_words(
    series: dict[str, list[tuple[int, float]]], best: Callable[..., tuple[int, float]], shown: str
) -> str:
    sentences = []
    if series["training"]:
        (first, start), (last, end) = series["training"][0], series["training"][-1]
        sentences.append(
            f"Training: {shown.format(start)} at step {grouped(first)}, {shown.format(end)} at step {grouped(last)}."
        )
    if series["validation"]:
        step, value = best(series["validation"], key=lambda point: point[1])
        sentences.append(f"Validation: best {shown.format(value)}, at step {grouped(step)}.")
    return " ".join(sentences)


# Stand-ins that matplotlib draws with; the page's style sheet has the colours, by day and by night.
_INK, _GRID, _TRAINING, _VALIDATION, _QUIET = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_RUNS = [f"#1011{number:02x}" for number in range(1, 7)]
_COLOURS = {
    _INK: "currentColor",
    _GRID: "var(--grid)",
    _TRAINING: "var(--curve)",
    _VALIDATION: "var(--accent)",
    _QUIET: "var(--quiet)",
    **{colour: f"var(--run-{number})" for number, colour in enumerate(_RUNS, start=1)},
}
_STYLES = {
    "training": {"color": _TRAINING},
    "validation": {"color": _VALIDATION, "marker": "o", "markersize": 4, "linestyle": (0, (3, 2))},
}


def _style_of_run(at: int) -> dict[str, Any]:
    """Colour and dashes: not by colour alone can lines be told apart by everyone."""
    if at >= len(_RUNS):
        return {"color": _QUIET, "alpha": 0.6}
    return {
        "color": _RUNS[at],
        "marker": "os^Dv*"[at],
        "markersize": 4,
        "linestyle": [(0, ()), (0, (3, 2)), (0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (2, 4))][at],
    }


def _svg(quantity: str, lines: Sequence[Line], title: str, description: str, named: bool) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": quantity,
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _GRID,
        "xtick.color": _GRID,
        "ytick.color": _GRID,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": _GRID,
        "ytick.major.size": 0,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 2.8), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            axes.plot(*_columns(line.points), linewidth=1.3, label=line.name, **line.style)
        axes.set_xlabel("optimiser step")
        axes.grid(axis="y", linewidth=0.6)
        highest = max(value for line in lines for _, value in line.points)
        axes.set_ylim(0, 100 if quantity == "accuracy" else 1.05 * highest or 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: grouped(round(step))))
        if named:
            axes.legend(
                frameon=False,
                handlelength=2.6,
                ncols=2,
                loc="lower right",
                bbox_to_anchor=(1, 1),
                borderaxespad=0.2,
            )
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True)
    return _inline(text.getvalue(), quantity, title, description)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """matplotlib's file as a part of a page: no header, a name and a description, the page's colours."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="[^"]+"', body)[0]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body[body.index(">") + 1 :], flags=re.DOTALL)
    # Groups are numbered anew in each figure: two on one page would share their ids.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    for stand_in, colour in _COLOURS.items():
        body = body.replace(stand_in, colour)
    return (
        f'<svg {view} role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-description">{escape(description)}</desc>{body}'
    )
