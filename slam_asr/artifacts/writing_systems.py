"""Writing systems, as scoring needs them: whether spaces separate words, and how a text is normalised.

Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan and some other languages put no spaces between words, so
the division into "words" depends on the transcriber. Such text is scored by characters.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

# Han with its punctuation and full-width forms, kana and bopomofo; Thai, Lao, Tibetan, Burmese, Khmer;
# Tai Le, New Tai Lue, Tai Tham, Balinese, Javanese and Yi. Korean is not included: it separates words.
_UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u3000-\u312f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff01-\uff9f"
    "\U00020000-\U0003ffff"
)
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
# The characters are not part of a match, because a character between two spaces belongs to two matches.
_SPACE_NEXT_TO_UNSPACED = re.compile(f" (?=[{_UNSPACED}])|(?<=[{_UNSPACED}]) ")
_ZERO_WIDTH_SPACES = re.compile("[\u200b\ufeff]")
"""Khmer, Thai and Burmese texts may separate words with U+200B, for line breaks. U+FEFF may begin a text as a
byte order mark. `str.split` splits at neither."""
_MAX_FOREIGN_SHARE = 0.005
"""Largest share of non-ASCII letters in English, which has few words such as `café`. In French the share is
3 %, in Italian 1 %."""


def comparable(text: str) -> str:
    """Return a text in the form that is compared: in NFC, with single spaces. Case and punctuation remain.

    Unicode can write é as one code point (NFC) or as two (NFD, which macOS and some corpora use).
    """
    text = unicodedata.normalize("NFC", text)
    return " ".join(text.split() if text.isascii() else _ZERO_WIDTH_SPACES.sub(" ", text).split())


def characters_of(text: str, all_unspaced: bool = False) -> str:
    """Return a comparable text without the spaces that do not count as characters.

    These are the spaces next to a character of a script that puts none between words.

    Args:
        text: a text that `comparable` returned.
        all_unspaced: remove all spaces, for a test set whose words are not separated.
    """
    if all_unspaced:
        return text.replace(" ", "")
    return text if text.isascii() else _SPACE_NEXT_TO_UNSPACED.sub("", text)


def separates_words(texts: Iterable[str]) -> bool:
    """Return whether spaces separate the words of texts.

    They do, unless characters of scripts without such spaces outnumber the words in other scripts.
    """
    words = unspaced = 0
    for text in texts:
        # ASCII text needs no regular expression, and Python recognises it in constant time.
        others, count = (text, 0) if text.isascii() else _UNSPACED_CHARACTER.subn(" ", text)
        words += len(others.split())
        unspaced += count
    # Without any text both are 0, and the answer is yes.
    return unspaced <= words


def looks_english(texts: Iterable[str]) -> bool:
    """Return whether texts of an unknown language may be English, which has hardly any non-ASCII letters."""
    letters = foreign = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        foreign += 0 if text.isascii() else sum(c.isalpha() and not c.isascii() for c in text)
    return foreign <= _MAX_FOREIGN_SHARE * letters


def is_english(language: str) -> bool:
    """Return whether a language's name or code means English: `en`, `en-GB`, `en_US`, `eng`, `English`."""
    return re.split("[-_ ]", language.strip().lower())[0] in ("en", "eng", "english")


def is_latin(text: str) -> bool:
    """Return whether at least half of a text's letters are Latin."""
    if text.isascii():
        return True
    latin = [unicodedata.name(c, "").startswith("LATIN") for c in text if c.isalpha()]
    # A text without letters, such as a number, counts as Latin.
    return 2 * sum(latin) >= len(latin)


@functools.cache
def whisper_english() -> Any:
    """Return transformers' normaliser for English, without a list of British spellings to convert."""
    # Imported here because the import takes a second.
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def normalise_english(text: str) -> str:
    """Normalise an English text with Whisper's normaliser; return it with single spaces."""
    try:
        return comparable(whisper_english()(text))
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError):
        # transformers' normaliser raises on some sequences of numbers, such as "zero and a half million".
        return comparable(re.sub(r"[^\w']+", " ", text.lower()))


def normalise_any_language(text: str) -> str:
    """Remove case, punctuation and symbols from a text of any language.

    Whisper's normaliser for languages other than English does the same, but also removes text in brackets and
    combining marks. Both remain here: without its vowel signs, किताब would become क त ब.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text)
    return comparable(text)
