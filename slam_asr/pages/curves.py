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

from slam_asr.pages.render import render, with_thousands
from slam_asr.storage import write_atomically

RUN_MARKERS = "●■▲◆▼★"
"""Markers of the first six runs in `draw_runs`. Their colours are --run-1 to --run-6 in the style sheet."""
CURVE_POINTS = 400
"""Maximum number of points per curve. A screen cannot show more points, and the page would be large."""


def write_curves(path: Path, title: str, facts: list[tuple[str, str]], training: dict[str, Any]) -> None:
    """Write a page with the curves of one training run.

    Args:
        path: the page's file.
        title: the page's heading.
        facts: (name, value) pairs shown above the curves.
        training: `curve` and `validation`, lists of {step, loss, accuracy}, to which `validation` may add wer
            or cer; all but step and loss are fractions. Optionally `samples`, a list of {key, reference,
            hypothesis} from the last validation, and `beginning`, a dictionary with its own `curve` and
            `validation`.
    """
    points = with_thinned_curves(training)
    samples = training.get("samples") or []
    page = render("curves.html", title=title, facts=facts, curves=draw_curves(points), samples=samples)
    write_atomically(path, page)


def with_thinned_curves(training: dict[str, Any]) -> dict[str, Any]:
    """Return the `training` of `write_curves` with at most `CURVE_POINTS` points per curve."""
    values = training | {name: thinned(training.get(name) or []) for name in ("curve", "validation")}
    if training.get("beginning"):
        values["beginning"] = with_thinned_curves(training["beginning"])
    return values


def thinned(points: Sequence[dict[str, Any]], max_points: int = CURVE_POINTS) -> list[dict[str, Any]]:
    """Reduce a curve to at most `max_points` points.

    Each new point is the mean of a group of consecutive points, and has the last step of its group. All
    groups have the same size, except that the last may be smaller.
    """
    if len(points) <= max_points:
        return list(points)
    width = math.ceil(len(points) / max_points)
    return [_mean(points[start : start + width]) for start in range(0, len(points), width)]


def _mean(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mean = {"step": points[-1]["step"]}
    for key in points[-1]:
        values = [p[key] for p in points if is_number(p.get(key))]
        if key != "step" and values:
            mean[key] = fmean(values)
    return mean


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def draw_curves(training: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw the figures of one training run from its values on train and on dev.

    Args:
        training: `curve`, `validation` and `beginning`, as for `write_curves`.

    Returns:
        For each quantity that has values, a dictionary with `heading`, `summary` and `svg`.
    """
    curves = []
    beginning = training.get("beginning") or {}
    for quantity, heading, scale, best, template in _QUANTITIES:
        series = {
            "beginning": _points(beginning.get("curve"), quantity, scale),
            "beginning, dev": _points(beginning.get("validation"), quantity, scale),
            "training": _points(training.get("curve"), quantity, scale),
            "validation": _points(training.get("validation"), quantity, scale),
        }
        if any(series.values()):
            lines = [Line(name, points, _STYLES[name]) for name, points in series.items() if points]
            curves.append(_figure(quantity, heading, lines, _summary(series, best, template)))
    return curves


def draw_runs(trainings: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Draw the figures of several training runs from their values on dev.

    If no run has values on dev, those on train are drawn. The first lines have colours and markers of their
    own (see `RUN_MARKERS`); all others look alike. The figures have no legend, because the page shows the
    markers next to the names.

    Args:
        trainings: training runs keyed by name, each with `curve` and `validation` as for `draw_curves`;
            either or both may be missing.

    Returns:
        The figures, as `draw_curves` returns them.
    """
    curves = []
    for quantity, heading, scale, best, template in _QUANTITIES:
        series = [_points(t.get("validation"), quantity, scale) for t in trainings.values()]
        if not any(series):
            series = [_points(thinned(t.get("curve") or []), quantity, scale) for t in trainings.values()]
        elif quantity not in ("wer", "cer"):
            heading += ", dev"
        lines = [
            Line(name, points, _style_of_run(number))
            for number, (name, points) in enumerate(zip(trainings, series, strict=True))
            if points
        ]
        if lines:
            summary = "; ".join(
                f"{line.name}: best {template.format(best(value for _, value in line.points))}"
                for line in lines[: len(_RUNS)]
            )
            curves.append(_figure(quantity, heading, lines, f"{summary}.", legend=False))
    return curves


@dataclass
class Line:
    """One line of a figure: its name, its (step, value) points, and its style in matplotlib's terms."""

    name: str
    points: list[tuple[int, float]]
    style: dict[str, Any]


_QUANTITIES: tuple[tuple[str, str, int, Callable[..., Any], str], ...] = (
    ("loss", "Loss", 1, min, "{:.3f}"),
    ("accuracy", "Next-token accuracy, %", 100, max, "{:.1f}\u202f%"),
    ("wer", "Word error rate of some dev utterances, greedy, %", 100, min, "{:.1f}\u202f%"),
    ("cer", "Character error rate of some dev utterances, greedy, %", 100, min, "{:.1f}\u202f%"),
)
"""Key, heading and factor of each quantity that is drawn; the function that finds its best value; and the
value's format."""


def _points(rows: Sequence[dict[str, Any]] | None, quantity: str, scale: int) -> list[tuple[int, float]]:
    return [(row["step"], scale * row[quantity]) for row in rows or [] if is_number(row.get(quantity))]


def _figure(
    quantity: str, heading: str, lines: Sequence[Line], summary: str, legend: bool = True
) -> dict[str, Any]:
    return {
        "heading": heading,
        "summary": summary,
        "svg": Markup(_svg(quantity, lines, f"{heading} over optimiser steps", summary, legend)),
    }


def _summary(series: dict[str, list[tuple[int, float]]], best: Callable[..., Any], template: str) -> str:
    def describe(point: tuple[int, float]) -> str:
        return f"{template.format(point[1])} at step {with_thousands(point[0])}"

    sentences = [
        f"{name.capitalize()}: {describe(series[name][0])}, {describe(series[name][-1])}."
        for name in ("beginning", "training")
        if series[name]
    ]
    if series["validation"]:
        step, value = best(series["validation"], key=lambda point: point[1])
        sentences.append(f"Validation: best {template.format(value)}, at step {with_thousands(step)}.")
    return " ".join(sentences)


# Colours that matplotlib draws with. `_inline` replaces them with those of the page's style sheet, which
# differ between light and dark pages.
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
_DASHES = ((), (3, 2), (6, 2), (1, 1.5), (6, 2, 1, 2), (2, 4))
"""Lengths of dashes and gaps of the first lines in `draw_runs`."""


def _dotted(colour: str, marker: str, dashes: tuple[float, ...]) -> dict[str, Any]:
    return {"color": colour, "marker": marker, "markersize": 4, "linestyle": (0, dashes)}


_STYLES: dict[str, dict[str, Any]] = {
    "training": {"color": _TRAINING},
    "validation": _dotted(_VALIDATION, "o", (3, 2)),
    # The beginning trains the projector by CTC. Its loss is that of CTC, and its accuracy is 1 minus the
    # token error rate of CTC's best paths.
    "beginning": {"color": _QUIET},
    "beginning, dev": _dotted(_QUIET, "s", (1, 1.5)),
}


def _style_of_run(index: int) -> dict[str, Any]:
    """Return a run's colour, marker and dashes. Not everyone can distinguish lines by colour alone."""
    if index >= len(_RUNS):
        return {"color": _QUIET, "alpha": 0.6}
    return _dotted(_RUNS[index], "os^Dv*"[index], _DASHES[index])


def _svg(quantity: str, lines: Sequence[Line], title: str, description: str, legend: bool) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style: dict[Any, Any] = {
        # Text remains text, in the page's font; the default draws each letter as a path.
        "svg.fonttype": "none",
        # Without a fixed salt, the ids would be random, and two pages of the same training run would differ.
        "svg.hashsalt": quantity,
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _GRID),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
        "legend.frameon": False,
        "legend.handlelength": 2.6,
        "legend.borderaxespad": 0.2,
        "ytick.major.size": 0,
    }
    with matplotlib.rc_context(style):
        # Not pyplot, which holds every figure in global state and may look for a display.
        figure = Figure(figsize=(4.4, 2.8), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            axes.plot(*zip(*line.points, strict=True), linewidth=1.3, label=line.name, **line.style)
        axes.set_xlabel("optimiser step")
        axes.grid(axis="y", linewidth=0.6)
        highest = max(value for line in lines for _, value in line.points)
        # The axis starts at 0, so that a small change does not look like a large one. It ends at 1 if all
        # values are 0, because matplotlib warns about an axis without height.
        axes.set_ylim(0, 100 if quantity == "accuracy" else 1.05 * highest or 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: with_thousands(round(step))))
        if legend:
            axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True)
    return _inline(text.getvalue(), quantity, title, description)


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """Turn matplotlib's SVG file into part of a page, with title, description and the page's colours."""
    body = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="[^"]+"', body)
    assert view_box is not None  # matplotlib always writes one
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body[body.index(">") + 1 :], flags=re.DOTALL)
    # matplotlib numbers the groups of each figure from 1, so two figures on a page would share ids.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    for placeholder, colour in _COLOURS.items():
        body = body.replace(placeholder, colour)
    return (
        f'<svg {view_box[0]} role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>{body}'
    )
