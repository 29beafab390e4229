"""The LLM's tokens that a CTC head distinguishes, and transcripts spelled in them."""

import re
from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

BLANK_TEXT = "\n"
"""The text whose embedding serves as CTC's blank."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""Matches a token that stands for a byte of a character that the vocabulary lacks (SentencePiece)."""
_AT_ONCE = 1000
"""Number of texts that are tokenised in one call."""


class CtcVocabulary:
    """Spells texts in some of the LLM's tokens.

    Args:
        tokenizer: the LLM's tokenizer.
        token_ids: the tokens, from `choose_tokens`: the blank's first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> None:
        self.tokenizer, self.token_ids = tokenizer, token_ids
        self._prefix = _prefix(tokenizer)
        # The blank is no part of a text, so it has no index here.
        self._index = {token: index for index, token in enumerate(token_ids) if index}
        self._by_string = {_string(tokenizer, token): index for token, index in self._index.items()}
        self._longest = max(map(len, self._by_string), default=0)
        self._pieces: dict[int, list[int]] = {}

    def spell(self, text: str) -> list[int]:
        """Return a text's tokens as indices of `token_ids`; 0, the blank, is not among them.

        A token that is not in the vocabulary is spelled by the fewest shorter ones. What no token can spell
        is left out.
        """
        spelled: list[int] = []
        for token in self.tokenizer.encode(self._prefix + text, add_special_tokens=False):
            if token in self._index:
                spelled.append(self._index[token])
            else:
                spelled += self._pieces_of(token)
        return spelled

    def text_of(self, indices: list[int]) -> str:
        """Return the text that indices of `token_ids` spell."""
        text = self.tokenizer.decode([self.token_ids[i] for i in indices], skip_special_tokens=True)
        assert isinstance(text, str), "one list of ids gives one text"
        return text.strip()

    def _pieces_of(self, token: int) -> list[int]:
        if token not in self._pieces:
            self._pieces[token] = self._divide(_string(self.tokenizer, token))
        return self._pieces[token]

    def _divide(self, string: str) -> list[int]:
        """Divide a token's string into the fewest tokens of the vocabulary; skip what none of them spells."""
        if _BYTE.fullmatch(string):
            return []
        # For each length, the division of the first characters that skips least and then has fewest tokens.
        best: list[tuple[int, int, list[int]]] = [(0, 0, [])]
        for end in range(1, len(string) + 1):
            skipped, count, indices = best[end - 1]
            choices = [(skipped + 1, count, indices)]
            for start in range(max(0, end - self._longest), end):
                if (index := self._by_string.get(string[start:end])) is not None:
                    skipped, count, indices = best[start]
                    choices.append((skipped, count + 1, [*indices, index]))
            best.append(min(choices))
        return best[-1][2]


def choose_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], limit: int = 0) -> list[int]:
    """Choose the tokens that spell the transcripts of a training run.

    Args:
        tokenizer: the LLM's tokenizer.
        texts: the transcripts.
        limit: number of the most frequent tokens to take. For each other token, its characters are added; if
            one of them is not a token, the other token itself is added. 0: all tokens that occur.

    Returns:
        Token ids: the blank's, and then the others in ascending order.
    """
    prefix, counts = _prefix(tokenizer), Counter[int]()
    pending: list[str] = []

    def count() -> None:
        for ids in tokenizer(pending, add_special_tokens=False)["input_ids"] if pending else ():
            counts.update(ids)
        pending.clear()

    for text in texts:
        pending.append(prefix + text)
        if len(pending) == _AT_ONCE:
            count()
    count()
    # Some tokenizers put a token of its own before the line break.
    blank = tokenizer.encode(BLANK_TEXT, add_special_tokens=False)[-1]
    del counts[blank]
    ordered = sorted(counts, key=lambda token: (-counts[token], token))
    chosen = set(ordered[: limit or None])
    vocabulary = tokenizer.get_vocab()
    for token in ordered[len(chosen) :]:
        string = _string(tokenizer, token)
        characters = [vocabulary.get(c) for c in string]
        if _BYTE.fullmatch(string) or None in characters:
            chosen.add(token)
        else:
            chosen.update(c for c in characters if c is not None)
    return [blank, *sorted(chosen - {blank})]


def _prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text after which a word has the same token at the start of a text as within it."""
    first = tokenizer.encode("a", add_special_tokens=False)
    return "" if tokenizer.encode("a a", add_special_tokens=False)[-len(first) :] == first else " "


def _string(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    string = tokenizer.convert_ids_to_tokens(token)
    assert isinstance(string, str), "one id gives one token"
    return string
