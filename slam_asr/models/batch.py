"""A batch: several utterances, each with its audio, prompt and answer, collated or packed for the LLM.

A batch is either padded or packed. A padded batch has one row per utterance. Its rows are padded on the left
so that all answers start in the same column, and on the right to the longest answer. A packed batch is a
single row without padding.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from slam_asr.models.answer_loss import IGNORED
from slam_asr.models.encoders.frontend import Prepared


@dataclass
class Row:
    """One utterance, ready to be collated into a batch."""

    audio: torch.Tensor | Prepared
    """Features [frames, encoder width]; or the encoder's input, if the encoder runs as part of the model."""
    positions: int
    """Number of LLM positions that the audio takes."""
    before: list[int]
    """Token ids before the audio; empty in SLAM-LLM's layout."""
    prompt: list[int]
    """Token ids after the audio."""
    answer: list[int]
    """Target token ids including the end token; empty for decoding."""

    @property
    def head(self) -> int:
        """Number of LLM positions before the answer."""
        return len(self.before) + self.positions + len(self.prompt)


@dataclass
class Batch:
    """Collated utterances.

    In a padded batch, each utterance is a row of `L` columns: padding, `before`, audio and prompt; then, from
    column `answer_start` on, the answer with its end token, and padding. In a packed batch, all utterances
    are in one row of `L` columns, and `answer_start` is 1.
    """

    audio: list[torch.Tensor | Prepared]
    """One per utterance, as in `Row`; all of one kind."""
    positions: list[int]
    """Number of LLM positions of each utterance's audio."""
    token_ids: torch.Tensor
    """[rows, L] int64; the values at audio and padding positions are ignored."""
    is_audio: torch.Tensor
    """[rows, L] bool: True at positions that are filled with the projector's output."""
    mask: torch.Tensor
    """[rows, L] int64: 0 on padding, else 1."""
    labels: torch.Tensor
    """[rows, L - answer_start] int64: token ids at targets, `IGNORED` elsewhere."""
    answer_start: int
    padded: bool
    """Whether `mask` contains a 0."""
    lengths: list[int] | None = None
    """Number of positions of each utterance in a packed row; None for a padded batch."""
    spelled: list[torch.Tensor] | None = None
    """For CTC's loss: tokens of each utterance, [tokens] int64, as indices of `CtcVocabulary`, on the CPU.
    None if this loss is not computed, as in validation and decoding."""

    @property
    def filled(self) -> int:
        """Number of LLM positions, not counting padding."""
        return int(self.mask.sum())

    @property
    def cells(self) -> int:
        """Number of LLM positions, including padding."""
        return self.mask.numel()

    def to(self, device: torch.device | str) -> "Batch":
        """Return a copy of the batch on a device; `spelled` remains on the CPU."""
        moved = {name: getattr(self, name).to(device) for name in ("token_ids", "is_audio", "mask", "labels")}
        return replace(self, audio=[a.to(device) for a in self.audio], **moved)


def remove_positions(
    batch: Batch, embeddings: torch.Tensor, dropped: torch.Tensor
) -> tuple[Batch, torch.Tensor]:
    """Remove audio positions from a batch, before it enters the LLM.

    Args:
        batch: padded or packed.
        embeddings: [rows, L, LLM width], the LLM's input.
        dropped: [audio positions] bool, row by row; True at positions to remove.

    Returns:
        The batch and its embeddings without these positions, with at most L columns. A padded batch is still
        padded on the left, so that all answers begin in the same column. `audio` and `positions` are
        unchanged: they include the removed positions.
    """
    remaining = batch.mask.bool()
    remaining[batch.is_audio] = ~dropped
    if batch.lengths is not None:
        columns = remaining[0].nonzero().T
        # Labels begin at the second column. With a label for the first column too, the same indices select
        # labels and columns.
        labels = functional.pad(batch.labels, (1, 0), value=IGNORED).gather(1, columns)[:, 1:]
        lengths = [int(part.sum()) for part in remaining[0].split(batch.lengths)]
        batch = replace(batch, labels=labels, lengths=lengths)
    else:
        start, head = batch.answer_start, remaining[:, : batch.answer_start]
        # A stable sort moves what is removed to the left, and preserves the order of what remains.
        order = head.to(torch.uint8).argsort(dim=1, stable=True)
        width = int(head.sum(1).max())
        rest = torch.arange(start, batch.mask.shape[1], device=order.device).expand(len(order), -1)
        columns = torch.cat([order[:, start - width :], rest], 1)
        batch = replace(batch, answer_start=width)
    places = torch.arange(len(columns), device=columns.device)[:, None], columns
    mask = remaining[places]
    changed = replace(
        batch,
        token_ids=batch.token_ids[places],
        is_audio=batch.is_audio[places] & mask,
        mask=mask.to(batch.mask.dtype),
        padded=not bool(mask.all()),
    )
    return changed, embeddings[places]


def collate(rows: list[Row]) -> Batch:
    """Build a padded batch with one row per utterance."""
    # All answers begin in this column, so that one slice selects the positions that predict targets.
    start = max(row.head for row in rows)
    width = start + max(len(row.answer) for row in rows)
    shape = (len(rows), width)
    token_ids = torch.zeros(shape, dtype=torch.long)
    is_audio = torch.zeros(shape, dtype=torch.bool)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full((len(rows), width - start), IGNORED)
    for i, row in enumerate(rows):
        left, end = start - row.head, start + len(row.answer)
        audio = left + len(row.before)
        token_ids[i, left:audio] = torch.tensor(row.before, dtype=torch.long)
        is_audio[i, audio : audio + row.positions] = True
        token_ids[i, audio + row.positions : start] = torch.tensor(row.prompt, dtype=torch.long)
        token_ids[i, start:end] = torch.tensor(row.answer, dtype=torch.long)
        labels[i, : len(row.answer)] = torch.tensor(row.answer, dtype=torch.long)
        mask[i, left:end] = 1
    inputs, positions = [row.audio for row in rows], [row.positions for row in rows]
    padded = not bool(mask.all())
    return Batch(inputs, positions, token_ids, is_audio, mask, labels, start, padded)


def pack(rows: list[Row]) -> Batch:
    """Build a batch of a single row without padding.

    The LLM must be one that `packed_attention.allow_packing` accepts.
    """
    # Audio positions get token id 0, a valid index. `Slam.embed` overwrites these positions' embeddings.
    ids, is_audio, labels = [], [], []
    for row in rows:
        after = [*row.prompt, *row.answer]
        ids += [*row.before, *[0] * row.positions, *after]
        is_audio += [False] * len(row.before) + [True] * row.positions + [False] * len(after)
        labels += [*[IGNORED] * row.head, *row.answer]
    inputs, positions = [row.audio for row in rows], [row.positions for row in rows]
    lengths = [row.head + len(row.answer) for row in rows]
    mask = torch.ones((1, len(ids)), dtype=torch.long)
    # No position predicts the first token, so the labels start at the second.
    tensors = torch.tensor([ids]), torch.tensor([is_audio]), mask, torch.tensor([labels[1:]])
    return Batch(inputs, positions, *tensors, answer_start=1, padded=False, lengths=lengths)
