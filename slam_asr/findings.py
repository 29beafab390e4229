"""Findings of a check: what was examined, the result, and what to do about it."""

from dataclasses import dataclass

GOOD, BAD, UNKNOWN = "✓", "✗", "–"
"""Signs of a finding: the check passed, it failed, or it could not be made from here."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    sign: str
    subject: str
    detail: str

    def line(self) -> str:
        """Format the finding for the terminal or a log."""
        return f"{self.sign} {self.subject}: {self.detail}"


def parse_finding(line: str) -> Finding | None:
    """Return the finding that `Finding.line` formatted; None for any other line."""
    sign, _, rest = line.partition(" ")
    subject, colon, detail = rest.partition(": ")
    return Finding(sign, subject, detail) if sign in (GOOD, BAD, UNKNOWN) and colon else None
