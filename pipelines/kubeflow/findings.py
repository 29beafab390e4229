"""The findings of `doctor`: the result of each check, and what to do about it."""

from dataclasses import dataclass

GOOD, BAD, UNKNOWN = "✓", "✗", "–"
"""Signs of a finding: the check passed, it failed, or it could not be made from here."""


@dataclass
class Finding:
    """The result of one check."""

    sign: str
    subject: str
    detail: str

    def line(self) -> str:
        """Format the finding for the terminal."""
        return f"{self.sign} {self.subject}: {self.detail}"
