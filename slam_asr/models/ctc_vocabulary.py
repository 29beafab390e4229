"""The LLM's tokens that a CTC head distinguishes, and the spelling of transcripts in these tokens."""

import itertools
import re
from collections.abc import Iterable
from typing import cast

import torch
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
        token_ids: ids of these tokens, from `choose_tokens`; the blank's id comes first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> None:
        self.tokenizer, self.token_ids = tokenizer, token_ids
        self._prefix = _prefix(tokenizer)
        # The blank is no part of a text, so it has no index here.
        self._index = {token: index for index, token in enumerate(token_ids) if index}
        self._by_string = {_string(tokenizer, token): index for token, index in self._index.items()}
        self._longest = max(map(len, self._by_string), default=0)
        self._pieces = {token: [index] for token, index in self._index.items()}

    def spell(self, text: str) -> list[int]:
        """Return a text's tokens as indices of `token_ids`; 0, the blank, is not among them.

        A token that does not occur in the train transcripts is replaced by the fewest shorter tokens that
        spell it. Characters that no token spells are left out.
        """
        tokens = self.tokenizer.encode(self._prefix + text, add_special_tokens=False)
        return [piece for token in tokens for piece in self._pieces_of(token)]

    def text_of(self, indices: list[int]) -> str:
        """Return the text that indices of `token_ids` spell."""
        ids = [self.token_ids[i] for i in indices]
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def columns(self, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the column of each of the LLM's tokens in CTC's scores: its index in `token_ids`.

        The index may be different for an answer's first token. CTC spells every word with a space before it,
        including the first. The LLM's answer begins without this space, so its first token gets the index of
        the same token with a space. If `llm.answer_prefix` ends with a space, the answer begins with one; the
        caller then uses the indices of tokens within an answer for the first token too.

        Args:
            vocabulary: number of the LLM's tokens.

        Returns:
            The indices of tokens within an answer and those of an answer's first token, each [vocabulary]
            int64; -1 for a token without such an index, and for the blank.
        """
        within = torch.full((vocabulary,), -1)
        within[list(self._index)] = torch.tensor(list(self._index.values()))
        first = within.clone()
        marker = _string(self.tokenizer, self.tokenizer.encode(" a", add_special_tokens=False)[0])[:-1]
        for token in range(min(vocabulary, len(self.tokenizer))):
            if (index := self._by_string.get(marker + _string(self.tokenizer, token))) is not None:
                first[token] = index
        return within, first

    def _pieces_of(self, token: int) -> list[int]:
        if token not in self._pieces:
            self._pieces[token] = self._divide(_string(self.tokenizer, token))
        return self._pieces[token]

    def _divide(self, string: str) -> list[int]:
        """Divide a token's string into the fewest tokens of the vocabulary; skip what none of them spells."""
        # A byte's token has a string such as `<0xE2>`. Dividing it would spell these six characters.
        if _BYTE.fullmatch(string):
            return []
        # `best[n]` divides the first n characters: number of skipped characters, number of tokens, indices.
        best: list[tuple[int, int, list[int]]] = [(0, 0, [])]
        for end in range(1, len(string) + 1):
            skipped, count, indices = best[end - 1]
            choices = [(skipped + 1, count, indices)]
            for start in range(max(0, end - self._longest), end):
                if (index := self._by_string.get(string[start:end])) is not None:
                    skipped, count, indices = best[start]
                    choices.append((skipped, count + 1, [*indices, index]))
            # Tuples compare from the left: fewest skipped characters first, then fewest tokens. The lists of
            # indices decide only ties, and so make the result unique.
            best.append(min(choices))
        return best[-1][2]


def choose_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[int]:
    """Return the tokens that spell the transcripts of a training run: all tokens that occur in them.

    A smaller vocabulary, in which shorter tokens spell the rarer ones, gave more errors
    (docs/measurements/accuracy.md).

    Args:
        tokenizer: the LLM's tokenizer.
        texts: the transcripts.

    Returns:
        Token ids: the blank's, and then the others in ascending order.
    """
    prefix, occurring, remaining = _prefix(tokenizer), set[int](), iter(texts)
    while some := list(itertools.islice(remaining, _AT_ONCE)):
        for ids in tokenizer([prefix + text for text in some], add_special_tokens=False)["input_ids"]:
            occurring.update(ids)
    # Some tokenizers put another token before the line break's.
    blank = tokenizer.encode(BLANK_TEXT, add_special_tokens=False)[-1]
    return [blank, *sorted(occurring - {blank})]


def _prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what must precede a text so that its first word is tokenised as within a text: "" or a space."""
    first = tokenizer.encode("a", add_special_tokens=False)
    return "" if tokenizer.encode("a a", add_special_tokens=False)[-len(first) :] == first else " "


def _string(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return cast(str, tokenizer.convert_ids_to_tokens(token))
