"""The joined model: audio positions, prompt and answer through the frozen LLM.

A batch is padded left to the longest audio and prompt and right to the longest answer, so that all
answers start at one column. Only from there on are logits computed.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from slam_asr.models.projector import LinearProjector

IGNORED = -100
"""Label of a position without a target, as torch's cross entropy has it."""


@dataclass
class Batch:
    """Utterances side by side.

    `L` columns: padding, audio, prompt; from `answer_start` on the answer, eos, padding.
    """

    frames: list[torch.Tensor]
    """Encoder outputs, each [frames, encoder width]."""
    token_ids: torch.Tensor
    """[utterances, L]; any token where there is audio or padding."""
    is_audio: torch.Tensor
    """[utterances, L] bool: filled with the projector's outputs."""
    mask: torch.Tensor
    """[utterances, L] int: 0 on padding."""
    labels: torch.Tensor
    """[utterances, L - answer_start]: the answer's tokens and eos, `IGNORED` elsewhere."""
    answer_start: int

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("token_ids", "is_audio", "mask", "labels")}
        return Batch(frames=[f.to(device) for f in self.frames], answer_start=self.answer_start, **moved)


def collate(
    frames: list[torch.Tensor], positions: list[int], prompts: list[list[int]], answers: list[list[int]]
) -> Batch:
    """Lay utterances out side by side.

    Args:
        frames: encoder outputs, each [frames, encoder width].
        positions: audio positions of each, after the projector.
        prompts: token ids of each prompt.
        answers: token ids of each answer with eos; empty lists where the answer is to be found.
    """
    heads = [n + len(p) for n, p in zip(positions, prompts, strict=True)]
    start, width = max(heads), max(heads) + max(map(len, answers))
    shape = (len(frames), width)
    token_ids = torch.zeros(shape, dtype=torch.long)
    is_audio = torch.zeros(shape, dtype=torch.bool)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full((len(frames), width - start), IGNORED)
    for row, (n, prompt, answer) in enumerate(zip(positions, prompts, answers, strict=True)):
        left = start - heads[row]
        is_audio[row, left : left + n] = True
        token_ids[row, left + n : start] = torch.tensor(prompt)
        token_ids[row, start : start + len(answer)] = torch.tensor(answer, dtype=torch.long)
        labels[row, : len(answer)] = torch.tensor(answer, dtype=torch.long)
        mask[row, left : start + len(answer)] = 1
    return Batch(frames, token_ids, is_audio, mask, labels, start)


class Slam(nn.Module):
    """Projector and LLM; the encoder's outputs come with the batch."""

    def __init__(self, projector: LinearProjector, llm: PreTrainedModel) -> None:
        super().__init__()
        self.projector, self.llm = projector, llm
        self._wanted: torch.Tensor | None = None
        # The LLM's own forward pass stays in charge of what it does to logits (scaling, capping); only
        # the rows that its output layer sees are chosen here. Besides, a row-by-row product of a
        # slice takes ten times longer on a CPU than one product of the chosen rows.
        llm.get_output_embeddings().register_forward_pre_hook(self._choose_rows)

    def _choose_rows(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return None if self._wanted is None else (inputs[0][:, :-1][self._wanted],)

    def embed(self, batch: Batch) -> torch.Tensor:
        """[utterances, L, LLM width]: token embeddings with the audio's positions filled in."""
        embeddings = self.llm.get_input_embeddings()(batch.token_ids)
        audio = self.projector(batch.frames).to(embeddings.dtype)
        return embeddings.masked_scatter(batch.is_audio.unsqueeze(-1), audio)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits that predict the target tokens: [targets, vocabulary].

        They stand in the order of `batch.labels[batch.labels != IGNORED]`; no others are computed.
        """
        arguments = {}
        if not bool(batch.mask.all()):
            # Positions count from each utterance's own start, for LLMs with absolute positions.
            arguments = {"attention_mask": batch.mask, "position_ids": (batch.mask.cumsum(1) - 1).clamp(min=0)}
        self._wanted = batch.labels != IGNORED
        try:
            output = self.llm(
                inputs_embeds=self.embed(batch), use_cache=False, logits_to_keep=batch.labels.shape[1] + 1, **arguments
            )
        finally:
            self._wanted = None
        return output.logits
