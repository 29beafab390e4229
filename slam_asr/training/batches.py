"""Utterances as inputs of the LLM, and batches of them with their audio."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from slam_asr.artifacts.feature_store.index import argsort_audio_ids
from slam_asr.artifacts.feature_store.reader import FeatureReader
from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.utterances import samples_of
from slam_asr.config.recipe import Projector
from slam_asr.errors import InputError
from slam_asr.models.answer_loss import IGNORED
from slam_asr.models.batch import Batch, Row, collate, pack
from slam_asr.models.ctc import CtcBatch
from slam_asr.models.ctc_vocabulary import CtcVocabulary
from slam_asr.models.encoders.frontend import Prepared
from slam_asr.models.projector import positions_of
from slam_asr.models.prompt import Prompt, TokenizedPrompt


class Examples:
    """Utterances as inputs of the LLM, without their audio.

    Only a few numbers per utterance are held in memory. Texts are tokenised again when a batch needs them.

    Args:
        utterances: the utterances of a manifest.
        reader: gives the length and the shard of each utterance's audio.
        projector: determines how many LLM positions the audio takes.
        recipe_prompts: tokenises the answers that follow a prompt.
        prompts: the prompts that may be drawn for an utterance.
        limit: maximum number of LLM positions of an utterance, or None if the LLM has no limit.

    Raises:
        InputError: an utterance has no features, or does not fit the LLM.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        reader: FeatureReader,
        projector: Projector,
        recipe_prompts: Prompt,
        prompts: list[TokenizedPrompt],
        limit: int | None,
    ) -> None:
        self.utterances, self.recipe_prompts, self.prompts = utterances, recipe_prompts, prompts
        count = len(utterances)
        self.audio_positions = np.zeros(count, np.int32)
        """[utterances] int32: LLM positions of the audio."""
        self.target_counts = np.zeros((count, len(prompts)), np.int32)
        """[utterances, prompts] int32: number of target tokens."""
        self.positions: list[int] = []
        """[utterances] LLM positions of audio and text with the longest of `prompts`: a batch then fits,
        whichever prompt is drawn."""
        self.hours = 0.0
        # 32 bytes per utterance. A list of the same ids as Python strings would take about four times the
        # memory.
        audio_ids, samples = bytearray(), []
        for index, utterance in enumerate(utterances):
            audio_ids += bytes.fromhex(utterance.audio_id)
            samples.append(samples_of(utterance))
            texts = [self.token_ids(utterance, p) for p in prompts]
            self.audio_positions[index] = positions_of(projector, reader.span(utterance))
            self.target_counts[index] = [len(answer) for _, _, answer in texts]
            before, after, answer = max(texts, key=lambda text: sum(map(len, text)))
            self.positions.append(int(self.audio_positions[index]) + len(before) + len(after) + len(answer))
            self.hours += (utterance.duration or 0.0) / 3600
            if limit is not None and self.positions[-1] > limit:
                raise InputError(
                    f"Utterance {utterance.key} needs {self.positions[-1]} LLM positions (audio "
                    f"{self.audio_positions[index]}, prompt {len(before) + len(after)}, "
                    f"answer {len(answer)}) but the LLM holds {limit}: lower data.max_duration and "
                    "build the manifest again, which leaves such utterances out, or shorten the prompt."
                )
        rows = np.frombuffer(bytes(audio_ids), np.uint8).reshape(-1, 32)
        self.shards, self.reader_shards = _canonical_numbers(
            reader.shards_of(rows, np.array(samples, np.int64)), rows
        )
        """`shards`: [utterances] int32, the canonical shard number of each utterance. `reader_shards`: the
        reader's number for each canonical one."""

    def __len__(self) -> int:
        return len(self.utterances)

    def token_ids(
        self, utterance: Utterance, prompt: TokenizedPrompt
    ) -> tuple[list[int], list[int], list[int]]:
        """Tokenise one of the prompts with an utterance's transcript as its answer.

        Returns:
            Token ids of the prompt before the audio, of the prompt after it, and of the answer: the
            transcript and the token that ends it. The loss is computed on the answer.
        """
        return prompt.before, *self.recipe_prompts.with_answer(prompt, utterance.target)


def _canonical_numbers(numbers: np.ndarray, audio_ids: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Number shards by the smallest audio id in each.

    A reader's own numbers depend on how the store was written. Canonical numbers depend on the audio alone,
    so training takes utterances in the same order whether features are cached, merged from several stores,
    or computed on the fly.

    Args:
        numbers: [utterances] integers: the reader's number for the shard of each utterance.
        audio_ids: [utterances, 32] uint8.

    Returns:
        The canonical shard number of each utterance, [utterances] int32; and the reader's number for each
        canonical one.
    """
    # When utterances are sorted by audio id, a shard's first utterance has the shard's smallest audio id.
    # `first` gives its place in that order.
    by_audio_id = argsort_audio_ids(audio_ids)
    shards, first = np.unique(numbers[by_audio_id], return_index=True)
    ranked = shards[np.argsort(first)]
    rank = np.zeros(int(shards.max(initial=-1)) + 1, np.int32)
    rank[ranked] = np.arange(len(ranked))
    return rank[numbers], ranked.tolist()


class BatchReader:
    """Makes batches of examples, with their audio.

    Args:
        examples: the utterances.
        reader: reads their audio.
        draw: function (epoch, key of an utterance) → index in `examples.prompts` of the utterance's prompt.
            A single prompt is not drawn.
        threads: number of threads that read a batch's audio.
    """

    def __init__(
        self, examples: Examples, reader: FeatureReader, draw: Callable[[int, str], int], threads: int
    ) -> None:
        self.examples, self.reader = examples, reader
        self.draw = draw if len(examples.prompts) > 1 else lambda epoch, key: 0
        self.packs = False
        """Whether the utterances of a batch are packed into one row, instead of padded to the longest."""
        self.vocabulary: CtcVocabulary | None = None
        """If set, batches also contain the transcripts in the tokens of this vocabulary, for CTC."""
        self.without_llm = False
        """Whether batches are for CTC alone, without prompts. This needs `vocabulary`."""
        self._pool = ThreadPoolExecutor(threads, "read-audio") if threads > 1 else None

    def batch(self, indices: list[int], epoch: int = 0) -> Batch | CtcBatch:
        """Read utterances, and make a batch of them: a `CtcBatch` if `without_llm`, or else a `Batch`.

        Args:
            indices: indices of the utterances in `examples`. An empty list gives a batch of one utterance
                without targets. With such a batch, a process without work takes part in the communication
                but adds nothing to the loss.
            epoch: number of the epoch, from 0. The drawn prompts depend on it.
        """
        utterances = [self.examples.utterances[i] for i in indices or [0]]
        positions = [int(self.examples.audio_positions[i]) for i in indices or [0]]
        # The pool reads several utterances at once, and yields them in order; `map` reads one after another.
        # Threads suffice, because the GIL is released while libsndfile decodes.
        read: Callable[[Utterance], torch.Tensor | Prepared] = self.reader.read
        audio = (self._pool.map if self._pool else map)(read, utterances)
        spelled = None
        if self.vocabulary is not None:
            spelled = [torch.tensor(self._spelled(i)).long() for i in indices]
        if self.without_llm:
            assert spelled is not None, "a phase without the LLM sets a vocabulary"
            return CtcBatch(list(audio), positions, spelled)
        rows = []
        for utterance, features, length in zip(utterances, audio, positions, strict=True):
            prompt = self.examples.prompts[self.draw(epoch, utterance.key)]
            rows.append(Row(features, length, *self.examples.token_ids(utterance, prompt)))
        batch = pack(rows) if self.packs else collate(rows)
        batch.spelled = spelled
        if not indices:
            batch.labels.fill_(IGNORED)
        return batch

    def count_targets(self, indices: Iterable[int], epoch: int = 0) -> int:
        """Count the target tokens of utterances: CTC's tokens if `without_llm`, or else the LLM's.

        Args:
            indices: indices of the utterances in `examples`.
            epoch: number of the epoch, from 0. The number of the LLM's tokens may depend on the drawn prompt.
        """
        if self.without_llm:
            return sum(len(self._spelled(i)) for i in indices)
        utterances, counts = self.examples.utterances, self.examples.target_counts
        # With a single prompt, the index is always 0, and the keys would be read for nothing.
        several = counts.shape[1] > 1
        return sum(int(counts[i, self.draw(epoch, utterances[i].key) if several else 0]) for i in indices)

    def _spelled(self, index: int) -> list[int]:
        assert self.vocabulary is not None, "utterances are spelled only if `vocabulary` is set"
        return self.vocabulary.spell(self.examples.utterances[index].target)

    def expect(self, shards: Iterable[int]) -> None:
        """Announce the shards that are needed now and next, so that the reader can prefetch them.

        The reader may evict all other shards.

        Args:
            shards: canonical numbers of the shards.
        """
        self.reader.expect([self.examples.reader_shards[s] for s in shards])
