"""Guards: typical failures of LLMs that the report counts. Answers loop, are cut, are empty, or refuse."""

import re

from slam_asr.scoring.wer import Hypothesis, normalise

LOOP, CUT, EMPTY, REFUSAL = "loop", "cut at the limit", "empty answer", "refusal"
GUARDS = {
    LOOP: "The same words four or more times in a row, although nobody said that.",
    CUT: "The answer reached decoding.max_new_tokens.",
    EMPTY: "No text although something was said.",
    REFUSAL: "An assistant's apology instead of a transcript.",
}
"""Explanation of each guard, shown in the report."""

_LOOP = re.compile(r"(?<!\S)(\S+(?: \S+){0,7}?)(?: \1){3,}(?!\S)")
_REFUSAL = re.compile(
    r"^\W*(?:(?:i'?m|i am|we are) (?:so |very |really )?(?:sorry|unable|not able)\b|"
    r"(?:i|we) (?:can(?:no|')?t|can not|could(?:n'?t| not)) "
    r"(?:assist|help|transcribe|provide|process|access|hear|understand)\b|"
    r"(?:sorry|unfortunately|apologies),? (?:but )?i\b|as an? (?:ai|artificial)\b)|"
    r"\b(?:ai|large|as a) language model\b"
)


def guards_of(row: Hypothesis) -> list[str]:
    """The `GUARDS` that flag an answer. A loop or refusal that is also in the reference is not flagged."""
    spoken, written = normalise(row.reference).lower(), normalise(row.hypothesis).lower()
    flagged = []
    if loops(written) and not loops(spoken):
        flagged.append(LOOP)
    if row.cut:
        flagged.append(CUT)
    if spoken and not written:
        flagged.append(EMPTY)
    if _REFUSAL.search(written) and not _REFUSAL.search(spoken):
        flagged.append(REFUSAL)
    return flagged


def loops(text: str) -> bool:
    """Whether the text repeats a sequence of up to eight words four or more times in a row."""
    # A loop needs a word that occurs four times. The search takes quadratic time, so skip it without one.
    words = text.split()
    return len(words) - len(set(words)) >= 3 and _LOOP.search(text) is not None
