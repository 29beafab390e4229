"""Normalisers of transcripts: Whisper's for English, and one without English rules for other languages.

Whisper's normaliser (Radford et al., 2022, appendix C; in transformers' version, without its list of British
spellings) removes case, punctuation, hesitations and text in brackets, expands contractions and writes
numbers as digits. It applies some fifty regular expressions to each text, which takes a third of a
millisecond. In plain lower-case text, however, it changes only contractions, titles, hesitations and numbers,
and each change depends only on the neighbouring words. This module therefore normalises only stretches of
such words, and caches the results: a hundred thousand utterances take seconds.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence

from slam_asr.artifacts import writing_systems
from slam_asr.artifacts.hypotheses import Hypothesis

_PLAIN = re.compile(r"[a-z' ]*")
"""Matches text whose words can be normalised separately: it has no punctuation, digits or brackets."""
_ALTERED = (
    "hmm mm mhm mmm uh um wanna gotta gonna imma woulda coulda shoulda mr mrs st dr prof capt gov ald gen "
    "sen rep pres rev hon asst assoc lt col jr sr esq half"
)
"""Plain words that the normaliser replaces, besides all words that may be part of a number.

`half` is among them because the normaliser looks for `and a half`.
"""


def normalisers_of(rows: Sequence[Hypothesis]) -> Iterator[Callable[[str], str]]:
    """Yield the normaliser of each utterance's language.

    An utterance without a language in its manifest counts as English, unless the references have letters that
    English hardly uses.
    """
    may_be_english = writing_systems.looks_english(row.reference for row in rows)
    for row in rows:
        english = writing_systems.is_english(row.language) if row.language else may_be_english
        yield whisper_normaliser() if english else writing_systems.normalise_any_language


@functools.cache
def whisper_normaliser() -> Callable[[str], str]:
    """Build a faster equivalent of transformers' normaliser for English: text → text with single spaces."""
    altered = frozenset(_ALTERED.split()) | writing_systems.whisper_english().standardize_numbers.words

    @functools.lru_cache(maxsize=200_000)
    def normalise_stretch(words: tuple[str, ...], at_start: bool) -> str:
        if at_start:
            return writing_systems.normalise_english(" ".join(words))
        # The result for `and a half` depends on the word before it. A stretch that does not start the text
        # is therefore normalised after an `x`, which is part of no number; `[2:]` removes it and its space.
        return writing_systems.normalise_english(" ".join(("x", *words)))[2:]

    def normalise(text: str) -> str:
        text = text.lower()
        # Whisper's normaliser removes a space before an apostrophe, so two of the words below would be one.
        if not _PLAIN.fullmatch(text) or " '" in text:
            return writing_systems.normalise_english(text)
        words = text.split()
        normalised: list[str] = []
        i = 0
        while i < len(words):
            if "'" not in words[i] and words[i] not in altered:
                normalised.append(words[i])
                i += 1
                continue
            end = _end_of_stretch(words, i, altered)
            normalised.append(normalise_stretch(tuple(words[i:end]), i == 0))
            i = end
        return " ".join(filter(None, normalised))

    return normalise


def _end_of_stretch(words: list[str], start: int, altered: frozenset[str]) -> int:
    """Return the end (exclusive) of a stretch of altered words; one plain word may be between any two."""
    last = start
    for i in range(start + 1, len(words)):
        if "'" in words[i] or words[i] in altered:
            last = i
        elif i > last + 1:
            break
    # Some patterns of Whisper's normaliser include the word after a contraction, such as `'s been`.
    return min(last + 2, len(words)) if "'" in words[last] else last + 1
