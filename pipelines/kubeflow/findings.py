"""What doctor finds: each answer with a sign, and with what to do."""

from dataclasses import dataclass

GOOD, BAD, UNKNOWN = "✓", "✗", "–"


@dataclass
class Finding:
    """One answer."""

    sign: str
    what: str
    says: str

    def line(self) -> str:
        """For people."""
        return f"{self.sign} {self.what}: {self.says}"
