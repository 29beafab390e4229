"""The joined model: audio, prompt and answer run through the LLM as one sequence.

Logits are computed only at positions that predict an answer token.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from slam_asr.errors import ConfigurationError, ModelError
from slam_asr.generation.beam_search import Answers, beam_search, penalties, without_penalties
from slam_asr.models.answer_loss import IGNORED, score_answers
from slam_asr.models.augmentation import Augmentation
from slam_asr.models.batch import Batch, remove_positions
from slam_asr.models.ctc import AuxiliaryCtc, BlankFilter, Speller
from slam_asr.models.encoders.base import SpeechEncoder, encode_audio
from slam_asr.models.encoders.frontend import Prepared
from slam_asr.models.packed_attention import packed_arguments
from slam_asr.models.projector import SpeechProjector

Scorer = Callable[[torch.Tensor, nn.Module, torch.Tensor], tuple[torch.Tensor, ...]]
"""A function from the inputs of the output layer [targets, LLM width], the layer itself, and the target token
ids [targets] to any tensors, such as a loss."""


class Slam(nn.Module):
    """Joins the projector and the LLM, and the encoder if audio does not come as features, into one model.

    Args:
        projector: always trained.
        llm: frozen, or with weights that require a gradient.
        encoder: needed if audio is encoded on the fly. A frozen encoder is not registered as a submodule:
            it has its own precision, and no optimiser, checkpoint or sharding may include it.
        feature_dtype: dtype of saved features. A frozen encoder's outputs are rounded to it, so that features
            are the same whether or not they come from a feature store.
        augmentation: dropout and masks of the features in training; none by default.

    Raises:
        ModelError: the LLM has no output layer that predicts tokens.
    """

    def __init__(
        self,
        projector: SpeechProjector,
        llm: PreTrainedModel,
        encoder: SpeechEncoder | None = None,
        feature_dtype: str = "fp32",
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__()
        self.projector, self.llm, self.augment = projector, llm, augmentation or Augmentation()
        self.encoder: SpeechEncoder | None
        if encoder is not None and any(p.requires_grad for p in encoder.parameters()):
            self.encoder = encoder
        else:
            # nn.Module's own __setattr__ would register the encoder as a submodule.
            object.__setattr__(self, "encoder", encoder)
        self.feature_dtype = feature_dtype
        self.scorer: Scorer | None = None
        """If set, `forward` returns this function's result instead of logits."""
        self.ctc: AuxiliaryCtc | None = None
        """If set, its loss is added for batches that have `spelled`."""
        self.speller: Speller | None = None
        """If set, a search can add CTC's scores."""
        self.blank_filter: BlankFilter | None = None
        """If set, the LLM does not read the positions that this filter finds."""
        self._projected: torch.Tensor | None = None
        """[positions of all utterances, LLM width]: the projector's last outputs. `embed` sets them."""
        self._is_target: torch.Tensor | None = None
        """[rows, L - answer_start] bool: True at targets. Set during `forward` only."""
        self._target_inputs: torch.Tensor | None = None
        """[targets, LLM width]: inputs of the output layer. Set during `forward` only."""
        output_layer = llm.get_output_embeddings()
        if output_layer is None:
            raise ModelError(
                f"{type(llm).__name__} has no output layer that predicts tokens: choose a causal LM."
            )
        # The hook only selects the layer's inputs. The LLM's own forward pass still calls the layer, and may
        # scale or cap the logits afterwards. On a CPU, one matrix product of the selected rows is also ten
        # times faster than the product of a strided slice, which torch computes row by row.
        output_layer.register_forward_pre_hook(self._select_targets)

    def _select_targets(
        self, _: nn.Module, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        if self._is_target is None:  # `forward` is not running, so the layer gets all of its inputs
            return None
        # Labels cover the last n columns of the batch. Each token is predicted one position earlier, so the
        # inputs start one column earlier and leave out the last column.
        self._target_inputs = inputs[0][:, -self._is_target.shape[1] - 1 : -1][self._is_target]
        # A scorer applies the output layer itself, so the LLM's own call of this layer gets empty inputs.
        return (self._target_inputs if self.scorer is None else self._target_inputs[:0],)

    def train(self, mode: bool = True) -> "Slam":
        """Set the mode. Frozen parts remain in evaluation mode: their dropout would only add noise."""
        super().train(mode)
        for part in (self.llm, self._modules.get("encoder")):
            if mode and part is not None and not all(p.requires_grad for p in part.parameters()):
                part.eval()
                # An LLM with adapters is frozen except for these, whose dropout must be active in training.
                for name, module in part.named_modules():
                    if "lora_dropout" in name:
                        module.train()
        return self

    def encode(self, audio: list[torch.Tensor | Prepared]) -> list[torch.Tensor]:
        """Encode utterances; features are returned unchanged.

        Args:
            audio: one entry per utterance, features [frames, encoder width] or the encoder's input; all of
                one kind.

        Returns:
            Features, each [frames, encoder width], in the same order.
        """
        trained = "encoder" in self._modules
        return encode_audio(self.encoder, audio, None if trained else self.feature_dtype)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Return the embeddings of all positions [rows, L, LLM width]: of tokens and of projected audio."""
        # Some LLMs scale embeddings inside this layer (Gemma). Audio is inserted afterwards, so it is not
        # scaled.
        embeddings = self.llm.get_input_embeddings()(batch.token_ids)
        self._projected = self.projector(self.augment(self.encode(batch.audio)), batch.positions)
        audio = self._projected.to(embeddings.dtype)
        # Audio positions are filled row by row, in the order in which the projector concatenates utterances.
        return embeddings.masked_scatter(batch.is_audio.unsqueeze(-1), audio)

    def prepare(self, batch: Batch) -> tuple[Batch, torch.Tensor]:
        """Return what the LLM reads: the batch and its embeddings, [rows, positions, LLM width].

        If there is a filter, both are without the positions that it takes for blanks.
        """
        embeddings = self.embed(batch)
        if self.blank_filter is None or self._projected is None:
            return batch, embeddings
        return remove_positions(batch, embeddings, self.blank_filter.find(self._projected))

    def generate(
        self, batch: Batch, generation: GenerationConfig, watch: LogitsProcessor | None = None
    ) -> Any:  # transformers' GenerateOutput: one class per kind of search
        """Decode a batch with transformers' `generate`.

        Args:
            batch: padded, without answers.
            generation: beams, penalties and limits.
            watch: called with the scores of each step, after the penalties.

        Returns:
            transformers' output: `sequences`, the token ids [utterances · answers per utterance, tokens],
            padded after the end of each answer; and after a beam search, `sequences_scores`.
        """
        processors = penalties(generation)
        if watch:
            processors.append(watch)
        batch, embeddings = self.prepare(batch)
        return cast(Any, self.llm).generate(
            inputs_embeds=embeddings,
            attention_mask=batch.mask,
            generation_config=without_penalties(generation),
            logits_processor=processors,
        )

    def search(self, batch: Batch, generation: GenerationConfig, ctc_weight: float = 0.0) -> Answers | None:
        """Decode a batch with our own search, or with transformers' beam search if ours cannot run the LLM.

        Args:
            batch: padded, without answers.
            generation: beams, penalties and limits.
            ctc_weight: CTC's share of the scores; above 0, the model must have a speller.

        Returns:
            The best answers with their scores. None if the search is greedy and ours cannot run the LLM; in
            this case, call `generate`.

        Raises:
            ConfigurationError: CTC's scores are requested, but our search cannot run the LLM.
        """
        given, spelling = batch, None
        batch, embeddings = self.prepare(given)
        if ctc_weight:
            assert self.speller is not None and self._projected is not None, "the model has a speller"
            spelling = self.speller.spell(self._projected, given.positions)
        self._projected = None
        answers = beam_search(self.llm, embeddings, batch.mask, generation, spelling, ctc_weight)
        if answers is None and ctc_weight:
            raise ConfigurationError(
                f"decoding.ctc_weight needs an LLM with attention in every layer, unlike "
                f"{type(self.llm).__name__}: set it to 0."
            )
        if answers is None and generation.num_beams > 1:
            output, n = self.generate(given, generation), generation.num_return_sequences
            ids, scores = output.sequences.unflatten(0, (-1, n)), output.sequences_scores.view(-1, n)
            answers = Answers(ids, scores, None)
        return answers

    def try_llm(self, trial: Callable[[PreTrainedModel], bool]) -> bool:
        """Return `trial(llm)`.

        This is a method of the model because engines that shard weights can gather them around a method
        call.
        """
        return trial(self.llm)

    def forward(self, batch: Batch) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run the model for training or evaluation.

        Args:
            batch: padded or packed, with answers.

        Returns:
            Logits [targets, vocabulary] at the positions that predict targets, in the order of
            `batch.labels[batch.labels != IGNORED]`; or what the scorer returns, if one is set. No other
            logits are computed. If CTC's loss is added, the result is the fields of `AnswerScores`; its
            `loss` includes CTC's.
        """
        batch, embeddings = self.prepare(batch)
        arguments = {}
        if batch.lengths is not None:
            arguments = packed_arguments(batch.lengths, batch.token_ids.device)
        elif batch.padded:
            # Position ids start at 0 with each utterance, for LLMs with absolute positions. `clamp` changes
            # the padding before the utterance from -1, an invalid index of an embedding, to 0.
            arguments = {
                "attention_mask": batch.mask,
                "position_ids": (batch.mask.cumsum(1) - 1).clamp(min=0),
            }
        self._is_target = batch.labels != IGNORED
        try:
            output = self.llm(inputs_embeds=embeddings, use_cache=False, **arguments)
            result: torch.Tensor | tuple[torch.Tensor, ...] = output.logits
            if self.scorer is not None:
                assert self._target_inputs is not None, "the hook on the output layer has run"
                layer = self.llm.get_output_embeddings()
                result = self.scorer(self._target_inputs, layer, batch.labels[self._is_target])
            return self._with_ctc(result, batch) if self.ctc is not None and batch.spelled else result
        finally:
            # A remaining `_is_target` would make the hook select inputs in a later `generate` as well.
            self._is_target = self._target_inputs = self._projected = None

    def _with_ctc(
        self, result: torch.Tensor | tuple[torch.Tensor, ...], batch: Batch
    ) -> tuple[torch.Tensor, ...]:
        """Add CTC's loss to the LLM's; the counts remain the LLM's."""
        assert self.ctc is not None and self._projected is not None and batch.spelled is not None
        loss, *counts = score_answers(result, batch.labels) if isinstance(result, torch.Tensor) else result
        return loss + self.ctc.loss(self._projected, batch.positions, batch.spelled), *counts
