"""Renders the templates in this folder. All values are escaped unless they are marked as safe."""

from collections.abc import Callable
from typing import Any

import jinja2


def render(template: str, filters: dict[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """Render a page as text.

    Args:
        template: file name in this folder.
        filters: filters by name, in addition to `with_thousands` and `capital`.
        values: values of the template's variables. If a value is missing, jinja2 raises `UndefinedError`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slam_asr.pages", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"capital": capital, "with_thousands": with_thousands, **(filters or {})}
    return environment.get_template(template).render(**values)


def capital(text: str) -> str:
    """Capitalise the first letter: `shuffled audio` → `Shuffled audio`."""
    return text[:1].upper() + text[1:]


def with_thousands(number: float) -> str:
    """Format a number with narrow no-break spaces between thousands: `18880512` → `18 880 512`.

    Numbers below 1000 that are not integers have four significant digits at most: `2.50` → `2.5`.
    """
    digits = "," if isinstance(number, int) else ",.4g" if abs(number) < 1000 else ",.0f"
    return f"{number:{digits}}".replace(",", "\u202f")
