"""What a text's writing system means for scoring: whether spaces separate words, and how text is normalised.

Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan and some others put no spaces between words, so the
"words" of their transcripts depend on who wrote them. Such text is scored by characters.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

# Han with its punctuation and full-width forms, kana and bopomofo; Thai, Lao, Tibetan, Burmese, Khmer;
# Tai Le, New Tai Lue, Tai Tham, Balinese, Javanese and Yi. Korean is not among them: it separates words.
_UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u3000-\u312f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff01-\uff9f"
    "\U00020000-\U0003ffff"
)
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
# Looks at the characters without consuming them: one may have a space on either side.
_SPACE_NEXT_TO_UNSPACED = re.compile(f" (?=[{_UNSPACED}])|(?<=[{_UNSPACED}]) ")
_ZERO_WIDTH_SPACES = re.compile("[\u200b\ufeff]")
"""Khmer, Thai and Burmese texts may mark words with U+200B, for line breaks. U+FEFF may begin a text, as its
byte order mark. `str.split` splits at neither."""
_MAX_FOREIGN_SHARE = 0.005
"""Largest share of letters outside ASCII in English: `café` is rare. In French it is 3 %, in Italian 1 %."""


def comparable(text: str) -> str:
    """A text as it is compared: in NFC, with single spaces. Case and punctuation count.

    Unicode writes é as one code point or as two (NFC and NFD, which macOS and some corpora use).
    """
    text = unicodedata.normalize("NFC", text)
    return " ".join(text.split() if text.isascii() else _ZERO_WIDTH_SPACES.sub(" ", text).split())


def characters_of(text: str, all_unspaced: bool = False) -> str:
    """Return a comparable text as its characters are counted.

    The spaces next to a character of a script that puts none between words are removed.

    Args:
        text: a text that `comparable` returned.
        all_unspaced: remove all spaces, for a test set whose words are not separated.
    """
    if all_unspaced:
        return text.replace(" ", "")
    return text if text.isascii() else _SPACE_NEXT_TO_UNSPACED.sub("", text)


def separates_words(texts: Iterable[str]) -> bool:
    """Whether spaces separate the words of texts.

    They do unless the texts have more characters of scripts without such spaces than words of other scripts.
    """
    words = unspaced = 0
    for text in texts:
        # ASCII, which Python recognises in constant time, is spared the regular expression.
        others, count = (text, 0) if text.isascii() else _UNSPACED_CHARACTER.subn(" ", text)
        words += len(others.split())
        unspaced += count
    # Without any text both are 0, and words are counted.
    return unspaced <= words


def looks_english(texts: Iterable[str]) -> bool:
    """Whether texts of an unknown language may be English: hardly any letter is outside of ASCII."""
    letters = foreign = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        foreign += 0 if text.isascii() else sum(c.isalpha() and not c.isascii() for c in text)
    return foreign <= _MAX_FOREIGN_SHARE * letters


def is_english(language: str) -> bool:
    """Whether a language's name or code is that of English: `en`, `en-GB`, `en_US`, `eng`, `English`."""
    return re.split("[-_ ]", language.strip().lower())[0] in ("en", "eng", "english")


def is_latin(text: str) -> bool:
    """Whether at least half of a text's letters are Latin ones."""
    if text.isascii():
        return True
    latin = [unicodedata.name(c, "").startswith("LATIN") for c in text if c.isalpha()]
    # A text without letters, such as a number, counts as Latin.
    return 2 * sum(latin) >= len(latin)


@functools.cache
def whisper_english() -> Any:
    """transformers' normaliser for English, without its list of British spellings."""
    # Imported here because the import takes a second.
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def normalise_english(text: str) -> str:
    """Normalise an English text as Whisper's normaliser does, with single spaces."""
    try:
        return comparable(whisper_english()(text))
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError):
        # transformers' normaliser raises on some sequences of numbers, such as "zero and a half million".
        return comparable(re.sub(r"[^\w']+", " ", text.lower()))


def normalise_any_language(text: str) -> str:
    """Remove case, punctuation and symbols from a text of any language.

    Whisper's normaliser for other languages than English does it too, but removes combining marks: without
    its vowel signs, किताब would become क त ब. Here they remain, and so does the text between brackets.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text)
    return comparable(text)
