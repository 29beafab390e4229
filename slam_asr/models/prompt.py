"""The prompt, and which tokens the loss looks at.

As the reference has it: `USER: {}\\n ASSISTANT:` and the answer, without a space between them, are
tokenised as one string; the prompt's length is that of the prompt tokenised alone; eos is appended
to the ids. Where the tokenizer adds bos, it stands at the start of the text, behind the audio.

With a template of the user's, the audio may stand elsewhere; with the model's own chat template it
stands at the start of the user's turn, and the answer ends as the template ends a turn.
"""

import random
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from slam_asr.configuration import one_sentence
from slam_asr.errors import UserError
from slam_asr.recipe import Llm

AUDIO = "{audio}"
_MARK = "\u241eaudio\u241e"
"""Stands for the audio while a chat template is filled in: no template strips, escapes or holds it."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """One prompt as the tokenizer spells it."""

    text: str
    """What stands behind the audio."""
    before: list[int]
    """Token ids in front of the audio; none in the reference."""
    ids: list[int]
    """Token ids of `text`."""


class Prompt:
    """A recipe's prompts as one tokenizer spells them.

    Args:
        tokenizer: the LLM's.
        options: prompt, template, and the prompts drawn in training.

    Raises:
        UserError: no eos token, or no chat template where one is asked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Llm) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path} has no eos token: choose another llm.name."
            )
        self.tokenizer = tokenizer
        # Some tokenizers append eos by themselves; here it ends the answer, and only that.
        self._adds_eos = tokenizer.encode("a")[-1] == tokenizer.eos_token_id
        self.chat = options.template == "chat"
        self.end = _end_of_turn(tokenizer) if self.chat else tokenizer.eos_token_id
        """Token that ends an answer."""
        self.main = self._spell(options.prompt, options.template)
        self.drawn = [self._spell(p, options.template) for p in options.training_prompts] or [self.main]

    @property
    def stops(self) -> list[int]:
        """Tokens at which decoding stops."""
        return sorted({self.end, self.tokenizer.eos_token_id})

    def draw(self, seed: int, epoch: int, key: str) -> int:
        """Which of `drawn` an utterance gets in an epoch: the same on every process, and after a restart."""
        return random.Random(f"{seed}/{epoch}/{key}").randrange(len(self.drawn)) if len(self.drawn) > 1 else 0

    def with_answer(self, spelling: TokenizedPrompt, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of the text behind the audio, and of answer and end: the targets.

        They are tokenised together and divided where the prompt alone would end.
        """
        ids = self._encode(spelling.text + answer, start=not spelling.before)
        cut = len(spelling.ids)
        return ids[:cut], [*ids[cut:], self.end]

    def answer_of(self, ids: list[int]) -> str:
        """The text of generated ids, up to the end."""
        stops = [i for i, token in enumerate(ids) if token in self.stops]
        return self.tokenizer.decode(ids[: stops[0]] if stops else ids, skip_special_tokens=True).strip()

    def _spell(self, prompt: str, template: str) -> TokenizedPrompt:
        if self.chat:
            before, _, text = _chat(
                self.tokenizer, [{"role": "user", "content": _MARK + prompt}], True
            ).partition(_MARK)
        elif AUDIO in template:
            before, text = (part.replace("{}", prompt) for part in template.split(AUDIO))
        else:
            before, text = "", template.replace("{}", prompt)
        before_ids = self._encode(before, start=True) if before else []
        return TokenizedPrompt(text, before_ids, self._encode(text, start=not before_ids))

    def _encode(self, text: str, start: bool) -> list[int]:
        """Token ids; at the start of all text with what the tokenizer puts there, never with an end."""
        # A chat template writes its special tokens out.
        special = start and not self.chat
        ids = self.tokenizer.encode(text, add_special_tokens=special)
        return ids[:-1] if special and self._adds_eos else ids


def _chat(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], open_answer: bool) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"llm.template is chat, but the tokenizer of {tokenizer.name_or_path} has no chat template: "
            "choose a chat model, or write a template."
        )
    try:
        return tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=open_answer,
            enable_thinking=False,
            # Some templates print the day: a prompt must be the same tomorrow.
            date_string="26 Jul 2024",
        )
    except (TemplateError, ValueError) as error:
        raise UserError(
            f"The chat template of {tokenizer.name_or_path} cannot be filled in: {one_sentence(error)}"
        ) from error


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The special token with which the chat template ends an answer; eos where it has none."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    tail = _chat(tokenizer, turns, False).partition(_MARK)[2]
    ids = tokenizer.encode(tail, add_special_tokens=False) if tail else []
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    return next((i for i in ids if i in special), tokenizer.eos_token_id)
