"""Answers that went wrong as LLMs' answers do: they loop, are cut, stay empty, or refuse. The report counts them."""

import re

from slam_asr.scoring.wer import Hypothesis, normalise

LOOP, CUT, EMPTY, REFUSAL = "loop", "cut at the limit", "empty answer", "refusal"
GUARDS = {
    LOOP: "The same words four times or more in a row, which nobody said.",
    CUT: "Still talking at decoding.max_new_tokens.",
    EMPTY: "Nothing written where something was said.",
    REFUSAL: "An assistant's apology in place of a transcript.",
}
"""What each means, for people."""

_LOOP = re.compile(r"(?<!\S)(\S+(?: \S+){0,7}?)(?: \1){3,}(?!\S)")
_REFUSAL = re.compile(
    r"^\W*(?:(?:i'?m|i am|we are) (?:so |very |really )?(?:sorry|unable|not able)\b|(?:i|we) (?:can(?:no|')?t|can not|could(?:n'?t| not)) "
    r"(?:assist|help|transcribe|provide|process|access|hear|understand)\b|(?:sorry|unfortunately|apologies),? (?:but )?i\b|as an? (?:ai|artificial)\b)|"
    r"\b(?:ai|large|as a) language model\b"
)


def guards_of(row: Hypothesis) -> list[str]:
    """Which of `GUARDS` an answer falls under. What the reference does too is none."""
    spoken, written = normalise(row.reference).lower(), normalise(row.hypothesis).lower()
    found = []
    if loops(written) and not loops(spoken):
        found.append(LOOP)
    if row.cut:
        found.append(CUT)
    if spoken and not written:
        found.append(EMPTY)
    if _REFUSAL.search(written) and not _REFUSAL.search(spoken):
        found.append(REFUSAL)
    return found


def loops(text: str) -> bool:
    """Whether up to eight words stand there four times or more in a row."""
    # Without a word that occurs four times there is nothing to look for, and looking takes the square of the length.
    words = text.split()
    return len(words) - len(set(words)) >= 3 and _LOOP.search(text) is not None
