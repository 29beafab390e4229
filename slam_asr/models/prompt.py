"""The prompt, and which tokens the loss looks at.

As the reference has it: `USER: {}\\n ASSISTANT:` and the answer, without a space between them, are
tokenised as one string; the prompt's length is that of the prompt tokenised alone; eos is appended
to the ids. Where the tokenizer adds bos, it stands at the start of the text, behind the audio.
"""

from transformers import PreTrainedTokenizerBase

from slam_asr.errors import UserError

TEMPLATE = "USER: {}\n ASSISTANT:"


class Prompt:
    """A prompt as one tokenizer spells it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"The tokenizer of {tokenizer.name_or_path} has no eos token: choose another llm.name.")
        self.tokenizer = tokenizer
        self.text = TEMPLATE.format(text)
        self.ids: list[int] = tokenizer.encode(self.text)

    def with_answer(self, answer: str) -> list[int]:
        """Token ids of prompt, answer and eos; all behind `len(self.ids)` are targets."""
        return [*self.tokenizer.encode(self.text + answer), self.tokenizer.eos_token_id]

    def answer_of(self, ids: list[int]) -> str:
        """The text of generated ids, up to eos."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
