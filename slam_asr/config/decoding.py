"""The section `decoding` of a recipe."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slam_asr.config.schema import bounded


@dataclass
class Decoding:
    """How test utterances are transcribed and scored."""

    checkpoint: Literal["latest", "best", "average"] = "latest"
    """Checkpoint that the pipeline converts to a model: the last (`latest`), the one with the lowest dev loss
    (`best`), or the mean of all retained checkpoints (`average`; see training.checkpoints), without those of
    the beginning."""
    beams: int = bounded(4, at_least=1)
    """Hypotheses that beam search retains at each token; 1 is greedy search, the fastest. More beams can find
    better hypotheses but need more memory and time."""
    nbest: int = bounded(1, at_least=1)
    """Hypotheses per utterance that are written to nbest.jsonl with their scores, best first. Must not exceed
    beams. 1: no nbest.jsonl is written."""
    max_new_tokens: int = bounded(200, at_least=1)
    """Maximum number of tokens in a hypothesis; longer hypotheses are cut."""
    repetition_penalty: float = bounded(1.0, at_least=1e-06)
    """Above 1, tokens that the hypothesis already contains become less likely, which makes loops rarer."""
    length_penalty: float = 1.0
    """Exponent of the length in a beam's score; above 1 favours longer hypotheses."""
    ctc_weight: float = bounded(0.0, at_least=0.0, at_most=0.9)
    """CTC's share of a hypothesis' score; the LLM has the rest. With a share above 0, loops are rarer,
    and so are words that nobody said. This needs a model that was trained with `projector.ctc_weight` or
    `projector.beginning.keep_head`. A folder of `convert-checkpoint --to huggingface` decodes with the same
    share; one of `--to voxtral` decodes with the LLM alone."""
    positions_per_batch: int = bounded(20_000, at_least=1)
    """Maximum number of LLM positions in one decoding batch. Every utterance counts as many positions as the
    longest one of its batch: audio, prompt and max_new_tokens, multiplied by beams. Larger batches use the
    GPU better but need more memory."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of decoding."""
    parts: int = bounded(1, at_least=1)
    """Number of work shards into which the pipeline divides decoding. Each is a step that can run on any
    node. The transcripts are the same for any number."""
    processes: int = bounded(0, at_least=0)
    """Processes that decode on one machine, one per GPU. 0: as many as there are GPUs, or one on a CPU. The
    transcripts are the same for any number."""
    shuffled_control: bool = False
    """Also score every utterance with the hypothesis for another utterance's audio. A model that uses the
    audio scores far worse on this control; a model that ignores it does not."""
    seed: int = 0
    """Seed of the shuffle for `shuffled_control`."""
    report_audio: float = bounded(0.0, at_least=0.0)
    """Maximum megabytes of audio in the report, so that the worst utterances can be played on the page. With
    several work shards, the limit applies to each of them. 0: no audio."""

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence if more answers are requested than the search finds."""
        if self.nbest > self.beams:
            yield (
                f"decoding.nbest is {self.nbest} but decoding.beams is {self.beams}: a search finds as many "
                "answers as it has beams; lower nbest or raise beams."
            )
