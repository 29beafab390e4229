"""The prompt's token ids, and which tokens are targets of the loss.

By default the layout is SLAM-LLM's. `USER: {}\\n ASSISTANT:` and the answer, without a space between
them, are tokenised as one string. The first ids are the prompt: as many as the prompt has when it is
tokenised alone. The other ids, followed by eos, are the targets. The text comes after the audio. If the
tokenizer adds bos, bos is the text's first token.

A user's template may place the audio elsewhere. With the model's own chat template, the audio is at the start
of the user's turn, and an answer ends with the template's end-of-turn token.
"""

import random
from dataclasses import dataclass
from itertools import takewhile
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from slam_asr.config.recipe import Llm
from slam_asr.config.schema import one_sentence
from slam_asr.errors import ModelError

AUDIO = "{audio}"
_MARK = "\u241eaudio\u241e"
"""Placeholder for the audio or the answer while a chat template is filled in. No template contains, strips or
escapes it."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """Text and token ids of one prompt."""

    text: str
    """The text after the audio."""
    before: list[int]
    """Token ids before the audio; empty in SLAM-LLM's layout."""
    ids: list[int]
    """Token ids of `text`."""

    @property
    def positions(self) -> int:
        """Number of LLM positions of the prompt, without the audio."""
        return len(self.before) + len(self.ids)


class Prompt:
    """A recipe's prompts, tokenised for one LLM.

    Args:
        tokenizer: the LLM's tokenizer.
        options: the prompt, the template, and the prompts that training draws from.

    Raises:
        ModelError: the tokenizer has no eos token, or has no usable chat template although the recipe
            requires one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Llm) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"The tokenizer of {tokenizer.name_or_path} has no eos token: choose another llm.name."
            )
        self.tokenizer = tokenizer
        # Some tokenizers append eos to every text. Only the answer must end with it: `_encode` removes it.
        self._adds_eos = tokenizer.encode("a")[-1] == tokenizer.eos_token_id
        self.chat = options.template == "chat"
        self.answer_prefix = options.answer_prefix
        self.end = _end_of_turn(tokenizer) if self.chat else tokenizer.eos_token_id
        """Id of the token that ends a target."""
        self.main = self._tokenize(options.prompt, options.template)
        """The prompt for decoding and validation."""
        training = [self._tokenize(p, options.template) for p in options.training_prompts]
        self.for_training = training or [self.main]
        """The prompts that training draws from."""

    @property
    def stops(self) -> list[int]:
        """Ids of the tokens at which decoding stops, in ascending order."""
        # With a chat template, both occur: training teaches the end of the turn, but the LLM itself may still
        # produce eos.
        return sorted({self.end, self.tokenizer.eos_token_id})

    def draw(self, seed: int, epoch: int, key: str) -> int:
        """Return the index in `for_training` of the prompt for an utterance in an epoch.

        It depends on the arguments only, so it is the same on every process and after a restart.
        """
        count = len(self.for_training)
        # Python hashes the string with SHA-512 to seed `Random`. Its `hash()` of a string would differ in
        # each process.
        return random.Random(f"{seed}/{epoch}/{key}").randrange(count) if count > 1 else 0

    def with_answer(self, prompt: TokenizedPrompt, answer: str) -> tuple[list[int], list[int]]:
        """Tokenise prompt and answer together, and divide the ids between the two.

        The prompt gets as many ids as it has when it is tokenised alone, even if one token contains both the
        end of the prompt and the start of the answer. This is SLAM-LLM's rule.

        Returns:
            Token ids of the prompt's text after the audio; and the targets, which are the token ids of
            `llm.answer_prefix` and the answer, and the end token.
        """
        ids = self._encode(prompt.text + self.answer_prefix + answer, start=not prompt.before)
        prompt_length = len(prompt.ids)
        return ids[:prompt_length], [*ids[prompt_length:], self.end]

    def answer_of(self, ids: list[int]) -> str:
        """Return the text of generated token ids up to the first end token."""
        stops = self.stops
        answer = list(takewhile(lambda token: token not in stops, ids))
        return cast(str, self.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def texts_around_audio(self, prompt: str, template: str) -> tuple[str, str]:
        """Return the texts before and after the audio, for a prompt and the value of `llm.template`."""
        if self.chat:
            turn = {"role": "user", "content": _MARK + prompt}
            before, _, text = _chat(self.tokenizer, [turn], True).partition(_MARK)
            return before, text
        before, text = template.split(AUDIO, 1) if AUDIO in template else ("", template)
        return before.replace("{}", prompt), text.replace("{}", prompt)

    def _tokenize(self, prompt: str, template: str) -> TokenizedPrompt:
        before, text = self.texts_around_audio(prompt, template)
        before_ids = self._encode(before, start=True) if before else []
        return TokenizedPrompt(text, before_ids, self._encode(text, start=not before_ids))

    def _encode(self, text: str, start: bool) -> list[int]:
        """Return the token ids of a text, without eos.

        With `start`, they begin with the tokenizer's bos, if any.
        """
        # A chat template writes its special tokens, bos included, as text.
        special = start and not self.chat
        ids = self.tokenizer.encode(text, add_special_tokens=special)
        return ids[:-1] if special and self._adds_eos else ids


def _chat(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], open_answer: bool) -> str:
    """Fill in the chat template. With `open_answer`, the text ends where the assistant's answer starts."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"llm.template is chat, but the tokenizer of {tokenizer.name_or_path} has no chat template: "
            "choose a chat model, or write a template."
        )
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tokenize=False,  # the result is a text
            add_generation_prompt=open_answer,
            # Otherwise, chat models such as Qwen3 would write down their thoughts before the transcript.
            enable_thinking=False,
            # Some templates print the current date, but a prompt must be the same on every day.
            date_string="26 Jul 2024",
        )
    except (TemplateError, ValueError) as error:
        raise ModelError(
            f"The chat template of {tokenizer.name_or_path} cannot be filled in, so set llm.template to a "
            f"text of your own: {one_sentence(error)}"
        ) from error
    return cast(str, text)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the special token with which the chat template ends an answer; without one, eos."""
    # `tail` is the text that the template adds after an answer. Its first special token ends the turn.
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    tail = _chat(tokenizer, turns, False).partition(_MARK)[2]
    ids = tokenizer.encode(tail, add_special_tokens=False) if tail else []
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return next((i for i in ids if i in special), tokenizer.eos_token_id)
