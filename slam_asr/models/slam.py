"""The joined model: audio positions, prompt and answer through the LLM.

A batch is padded left to the longest audio and prompt and right to the longest answer, so that all
answers start at one column; or packed into a single row without padding. Logits are computed only where
they predict an answer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from slam_asr.errors import UserError
from slam_asr.models.beam_search import Found, beam_search, penalties, without_penalties
from slam_asr.models.encoder import SpeechEncoder, batches_of
from slam_asr.models.feature_dtype import round_trip
from slam_asr.models.frontend import Prepared
from slam_asr.models.packed_attention import packed_arguments
from slam_asr.models.projector import SpeechProjector

IGNORED = -100
"""Label of a position without a target, as torch's cross entropy has it."""


@dataclass
class Row:
    """An utterance as it goes into a batch."""

    audio: torch.Tensor | Prepared
    """Encoder output [frames, encoder width]; or what the encoder takes, where it runs with the model."""
    positions: int
    """LLM positions of the audio."""
    before: list[int]
    """Token ids in front of the audio; none in the reference."""
    prompt: list[int]
    """Token ids behind the audio."""
    answer: list[int]
    """Token ids with the one that ends it; none where the answer is to be found."""

    @property
    def head(self) -> int:
        """LLM positions up to the answer."""
        return len(self.before) + self.positions + len(self.prompt)


@dataclass
class Batch:
    """Utterances side by side.

    `L` columns: padding, audio, prompt; from `answer_start` on the answer, eos, padding.
    """

    audio: list[torch.Tensor | Prepared]
    """As in `Row`."""
    positions: list[int]
    """LLM positions of each one's audio."""
    token_ids: torch.Tensor
    """[utterances, L]; any token where there is audio or padding."""
    is_audio: torch.Tensor
    """[utterances, L] bool: filled with the projector's outputs."""
    mask: torch.Tensor
    """[utterances, L] int: 0 on padding."""
    labels: torch.Tensor
    """[utterances, L - answer_start]: the answer's tokens and eos, `IGNORED` elsewhere."""
    answer_start: int
    padded: bool
    """Whether `mask` has a 0."""
    lengths: list[int] | None = None
    """Positions of each utterance, where they stand in one row one behind the other."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("token_ids", "is_audio", "mask", "labels")}
        return Batch(
            [a.to(device) for a in self.audio],
            self.positions,
            **moved,
            answer_start=self.answer_start,
            padded=self.padded,
            lengths=self.lengths,
        )


def collate(rows: list[Row]) -> Batch:
    """Lay utterances out side by side."""
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
    return Batch(
        [row.audio for row in rows],
        [row.positions for row in rows],
        token_ids,
        is_audio,
        mask,
        labels,
        start,
        padded=not bool(mask.all()),
    )


def pack(rows: list[Row]) -> Batch:
    """Lay utterances out in one row, one behind the other, for an LLM that can keep them apart (`models/packing.py`)."""
    ids, is_audio, labels = [], [], []
    for row in rows:
        ids += [*row.before, *[0] * row.positions, *row.prompt, *row.answer]
        is_audio += (
            [False] * len(row.before) + [True] * row.positions + [False] * (len(row.prompt) + len(row.answer))
        )
        labels += [*[IGNORED] * row.head, *row.answer]
    return Batch(
        [row.audio for row in rows],
        [row.positions for row in rows],
        torch.tensor([ids]),
        torch.tensor([is_audio]),
        torch.ones((1, len(ids)), dtype=torch.long),
        torch.tensor([labels[1:]]),
        answer_start=1,
        padded=False,
        lengths=[row.head + len(row.answer) for row in rows],
    )


Scorer = Callable[[torch.Tensor, nn.Module, torch.Tensor], tuple[torch.Tensor, ...]]
"""(inputs of the output layer [targets, LLM width], that layer, target tokens [targets]) → whatever is wanted of them."""


class Slam(nn.Module):
    """Projector, LLM and, unless its outputs come with the batch, encoder.

    Args:
        projector: trained.
        llm: frozen, or with weights that require a gradient.
        encoder: where audio is encoded on the way. A frozen one is no part of the module: it keeps its own precision, and no
            optimiser, checkpoint or partition knows of it.
        stored_as: dtype of the feature store whose numbers a frozen encoder's outputs are to be.

    Raises:
        UserError: the LLM has no output layer of its own.
    """

    def __init__(
        self,
        projector: SpeechProjector,
        llm: PreTrainedModel,
        encoder: SpeechEncoder | None = None,
        stored_as: str = "fp32",
    ) -> None:
        super().__init__()
        self.projector, self.llm = projector, llm
        self.encoder: SpeechEncoder | None
        if encoder is not None and any(p.requires_grad for p in encoder.parameters()):
            self.encoder = encoder
        else:
            object.__setattr__(self, "encoder", encoder)
        self.stored_as = stored_as
        self.scorer: Scorer | None = None
        """If set, `forward` gives what this makes of the output layer's inputs, and logits are its own affair."""
        self._wanted: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        if llm.get_output_embeddings() is None:
            raise UserError(
                f"{type(llm).__name__} has no output layer that predicts tokens: choose a causal LM."
            )
        # The LLM's own forward pass stays in charge of what it does to logits (scaling, capping); only
        # the rows that its output layer sees are chosen here. Besides, a row-by-row product of a
        # slice takes ten times longer on a CPU than one product of the chosen rows.
        llm.get_output_embeddings().register_forward_pre_hook(self._choose_rows)

    def _choose_rows(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._wanted is None:
            return None
        # What predicts a token stands one position before it.
        self._rows = inputs[0][:, -self._wanted.shape[1] - 1 : -1][self._wanted]
        return (self._rows if self.scorer is None else self._rows[:0],)

    def train(self, mode: bool = True) -> "Slam":
        """Training mode, for what is trained: dropout in frozen weights would be noise."""
        super().train(mode)
        for part in (self.llm, self._modules.get("encoder")):
            if mode and part is not None and not all(p.requires_grad for p in part.parameters()):
                part.eval()
                for name, module in part.named_modules():
                    if "lora_dropout" in name:
                        module.train()
        return self

    def encode(self, audio: list[torch.Tensor | Prepared]) -> list[torch.Tensor]:
        """Audio of any kind → encoder outputs, each [frames, encoder width]."""
        if self.encoder is None or isinstance(audio[0], torch.Tensor):
            return audio
        spec = self.encoder.spec
        groups = batches_of([spec.seconds_of(a.samples) for a in audio], spec.options.batch_seconds)
        encode = self.encoder if "encoder" in self._modules else self._encode_frozen
        return [f for group in groups for f in encode([audio[i] for i in group])]

    def _encode_frozen(self, audio: list[Prepared]) -> list[torch.Tensor]:
        """What a feature store would hold."""
        with torch.no_grad():
            return [round_trip(frames, self.stored_as) for frames in self.encoder(audio)]

    def embed(self, batch: Batch) -> torch.Tensor:
        """[utterances, L, LLM width]: token embeddings with the audio's positions filled in."""
        # Whatever the LLM does to its embeddings inside that layer (Gemma scales them), audio is spared.
        embeddings = self.llm.get_input_embeddings()(batch.token_ids)
        audio = self.projector(self.encode(batch.audio), batch.positions).to(embeddings.dtype)
        return embeddings.masked_scatter(batch.is_audio.unsqueeze(-1), audio)

    def generate(
        self, batch: Batch, generation: GenerationConfig, watch: LogitsProcessor | None = None
    ) -> torch.Tensor:
        """Answers to a batch without any: token ids [utterances · answers to each, tokens], filled up behind the end.

        Args:
            batch: what is to be answered.
            generation: how.
            watch: is shown the scores of each step.
        """
        return self._generate(batch, generation, watch).sequences

    def search(self, batch: Batch, generation: GenerationConfig) -> Found | None:
        """The best answers to a batch, with their scores.

        Args:
            batch: what is to be answered.
            generation: how.

        Returns:
            The answers, or None for greedy search in an LLM that only `generate` knows how to run.
        """
        found = beam_search(self.llm, self.embed(batch), batch.mask, generation)
        if found is None and generation.num_beams > 1:
            output = self._generate(batch, generation, scores=True)
            of_each = generation.num_return_sequences
            found = Found(
                output.sequences.unflatten(0, (-1, of_each)), output.sequences_scores.view(-1, of_each), None
            )
        return found

    def _generate(
        self,
        batch: Batch,
        generation: GenerationConfig,
        watch: LogitsProcessor | None = None,
        scores: bool = False,
    ) -> ModelOutput:
        processors = penalties(generation)
        if watch:
            processors.append(watch)
        return self.llm.generate(
            inputs_embeds=self.embed(batch),
            attention_mask=batch.mask,
            generation_config=without_penalties(generation, scores),
            logits_processor=processors,
        )

    def try_llm(self, trial: Callable[[PreTrainedModel], bool]) -> bool:
        """What `trial` finds out about the LLM: a method of the model, for engines that put weights together while one of it runs."""
        return trial(self.llm)

    def forward(self, batch: Batch) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Logits that predict the target tokens: [targets, vocabulary]; or what the scorer makes of them.

        They stand in the order of `batch.labels[batch.labels != IGNORED]`; no others are computed.
        """
        arguments = {}
        if batch.lengths is not None:
            arguments = packed_arguments(batch.lengths, batch.token_ids.device)
        elif batch.padded:
            # Positions count from each utterance's own start, for LLMs with absolute positions.
            arguments = {
                "attention_mask": batch.mask,
                "position_ids": (batch.mask.cumsum(1) - 1).clamp(min=0),
            }
        self._wanted = batch.labels != IGNORED
        try:
            output = self.llm(inputs_embeds=self.embed(batch), use_cache=False, **arguments)
            if self.scorer is None:
                return output.logits
            return self.scorer(self._rows, self.llm.get_output_embeddings(), batch.labels[self._wanted])
        finally:
            self._wanted = self._rows = None
