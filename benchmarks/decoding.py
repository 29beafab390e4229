"""Compare the speed of decoding with the reference's method, on the same encoder frames.

MODEL is a model folder or the name of a shipped model. MANIFEST is a test.jsonl that build-manifest wrote:

    python benchmarks/decoding.py MODEL MANIFEST
    python benchmarks/decoding.py MODEL MANIFEST --utterances 10 --repeats 2 --beams 4 1

The reference decodes one utterance at a time in fp32, with 4 beams and transformers' `generate`. This project
sorts utterances by length and batches them by positions. Both decode without CTC's scores. Features are
computed before anything is timed. The methods alternate, so that a change in the machine's load affects all
of them. Prints utterances per second, the multiple of real time, the ratio to the reference, how many texts
equal the reference's, the word error rate, and for bf16 how many texts differ from those in fp32.
"""

import argparse
import statistics
import time
from dataclasses import replace

import jiwer
import torch

from slam_asr.artifacts.manifest import read_manifest
from slam_asr.artifacts.utterances import load_utterance
from slam_asr.decoding.model import open_model
from slam_asr.models import slam
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.searcher import Searcher, plan_batches

REFERENCE = "reference: one by one, 4 beams, fp32"
Method = tuple[str, int, int]
"""Precision, number of beams, and positions per batch; 0 positions for the reference's method."""


class Decoder:
    """Decodes the same utterances with each method.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        opened = open_model(options.model)
        frames = options.frames or opened.trained.encoder.frames
        recipe = replace(opened.trained.encoder, frames=frames)
        manifest = read_manifest(options.manifest)
        self.utterances = manifest[:: max(1, len(manifest) // options.utterances)][: options.utterances]
        self.audio_seconds = sum(u.duration or 0.0 for u in self.utterances)
        print(
            f"{len(self.utterances)} utterances, {self.audio_seconds / len(self.utterances):.1f} s each on "
            f"average, {torch.get_num_threads()} threads, encoder.frames: {frames}"
        )
        encoder = describe_encoder(recipe).load(torch.float32)
        with torch.no_grad():
            self.frames = [encoder([encoder.prepare(load_utterance(u))])[0] for u in self.utterances]
        self.prompt = opened.prompt()
        self.audio_positions = [opened.positions(len(f)) for f in self.frames]
        # The reference has no scores of CTC.
        self.decoding = replace(opened.trained.decoding, nbest=1, ctc_weight=0.0)
        self.models = {
            p: opened.load(replace(self.decoding, precision=p), with_encoder=False)
            for p in {"fp32", *options.precisions}
        }
        self.beam_search = slam.beam_search

    def decode(self, precision: str, beams: int, positions: int) -> tuple[list[str], float]:
        """Decode all utterances with a `Method`; return the texts and the seconds."""
        # If this project's beam search returns None, transformers' own runs, as in the reference.
        slam.beam_search = self.beam_search if positions else lambda *_: None
        searcher = Searcher(self.models[precision], self.prompt, replace(self.decoding, beams=beams))
        around = self.prompt.main.positions
        lengths = [n + around for n in self.audio_positions]
        batches = (
            plan_batches(lengths, self.decoding.max_new_tokens, beams, positions)
            if positions
            else [[i] for i in range(len(lengths))]
        )
        texts = [""] * len(lengths)
        started = time.perf_counter()
        for batch in batches:
            frames, audio_positions = (
                [values[i] for i in batch] for values in (self.frames, self.audio_positions)
            )
            for i, answer in zip(batch, searcher.decode(frames, audio_positions), strict=True):
                texts[i] = answer.text
        return texts, time.perf_counter() - started


def main() -> None:
    """Print a line per method."""
    options = parse_options()
    decoder = Decoder(options)
    methods: dict[str, Method] = {REFERENCE: ("fp32", 4, 0)}
    methods |= {
        f"ours: {beams} beam{'s' * (beams > 1)}, {precision}, {budget} positions": (precision, beams, budget)
        for beams in options.beams
        for precision in options.precisions
        for budget in options.positions
    }
    seconds_of: dict[str, list[float]] = {name: [] for name in methods}
    texts_of: dict[str, list[str]] = {}
    for _ in range(options.repeats):
        for name, method in methods.items():
            texts_of[name], elapsed = decoder.decode(*method)
            seconds_of[name].append(elapsed)
    for name, (precision, beams, _) in methods.items():
        fp32_texts = next(
            (texts_of[n] for n, (p, b, size) in methods.items() if (p, b) == ("fp32", beams) and size), None
        )
        differing = ""
        if precision != "fp32" and fp32_texts:
            differing = f"  {differences(texts_of[name], fp32_texts)}/{len(fp32_texts)} differ from fp32"
        print(line_of(decoder, name, seconds_of, texts_of) + differing)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("manifest")
    parser.add_argument("--utterances", type=int, default=50)
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 1])
    parser.add_argument(
        "--positions",
        type=int,
        nargs="+",
        default=[20_000],
        help="decoding.positions_per_batch of this project's methods",
    )
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    parser.add_argument(
        "--frames",
        choices=("all", "speech"),
        help="encoder.frames; by default as in the model's training",
    )
    parser.add_argument("--repeats", type=int, default=2)
    return parser.parse_args()


def line_of(
    decoder: Decoder, name: str, seconds_of: dict[str, list[float]], texts_of: dict[str, list[str]]
) -> str:
    """Format the figures of one method.

    Args:
        decoder: has the utterances.
        name: label of the method.
        seconds_of: seconds of each repeat, by method.
        texts_of: texts of the last repeat, by method.
    """
    times, texts = seconds_of[name], texts_of[name]
    ratios = [r / t for r, t in zip(seconds_of[REFERENCE], times, strict=True)]
    median = statistics.median(times)
    equal = len(texts) - differences(texts, texts_of[REFERENCE])
    wer = jiwer.wer([u.target.lower() for u in decoder.utterances], [text.lower() for text in texts])
    return (
        f"{name:44} {len(texts) / median:7.2f} utterances/s "
        f"{decoder.audio_seconds / median:7.1f} × real time "
        f"{statistics.median(ratios):6.2f} × ({', '.join(f'{r:.2f}' for r in ratios)})  "
        f"{equal}/{len(texts)} texts equal  WER {100 * wer:.1f} %"
    )


def differences(texts: list[str], others: list[str]) -> int:
    """Return how many texts differ."""
    return sum(a != b for a, b in zip(texts, others, strict=True))


if __name__ == "__main__":
    main()
