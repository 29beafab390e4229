"""Utterances a second in decoding, beside the reference's way of doing it, on the same frames.

    python benchmarks/decoding.py MODEL MANIFEST                      # a model folder or a shipped model's name, test.jsonl of build-manifest
    python benchmarks/decoding.py MODEL MANIFEST --utterances 10 --repeats 2 --beams 4 1

The reference's way: one utterance at a time, fp32, beam search with 4 beams and transformers' `generate`. Ours: sorted by length and
batched by positions. Features are computed once, before anything is timed. Ways take turns, so that a noisy machine hurts all alike. Prints
utterances a second, how many times real time, the ratio to the reference, how many texts are the reference's, the word error rate, and for bf16 how many
texts differ from those of fp32.
"""

import argparse
import statistics
import time
from dataclasses import replace

import jiwer
import torch

from slam_asr.audio import load_utterance
from slam_asr.decoding.model import open_model
from slam_asr.manifest import read_manifest
from slam_asr.models import slam
from slam_asr.models.encoder import describe_encoder
from slam_asr.models.search import Searcher, plan_batches


def main() -> None:
    """Print each way's speed."""
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
        help="of decoding.positions_per_batch, in our way",
    )
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    parser.add_argument(
        "--frames",
        choices=("all", "speech"),
        help="what the LLM hears of Whisper's window; without it, what the model was trained with",
    )
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    opened = open_model(options.model)
    heard = replace(opened.trained.encoder, frames=options.frames or opened.trained.encoder.frames)
    prompt = opened.prompt()
    everything = read_manifest(options.manifest)
    utterances = everything[:: max(1, len(everything) // options.utterances)][: options.utterances]
    seconds = sum(u.duration or 0.0 for u in utterances)
    print(
        f"{len(utterances)} utterances, {seconds / len(utterances):.1f} s each, {torch.get_num_threads()} threads, encoder.frames: {heard.frames}"
    )
    encoder = describe_encoder(heard).load(torch.float32)
    with torch.no_grad():
        frames = [encoder([encoder.prepare(load_utterance(u))])[0] for u in utterances]
    audio = [opened.positions(len(f)) for f in frames]
    positions = [n + len(prompt.main.before) + len(prompt.main.ids) for n in audio]
    decoding = replace(opened.trained.decoding, nbest=1)
    models = {
        p: opened.load(replace(decoding, precision=p), with_encoder=False)
        for p in {"fp32", *options.precisions}
    }

    ours = slam.beam_search

    def decode(precision: str, beams: int, budget: int) -> tuple[list[str], float]:
        """Texts, and the seconds that they took; a budget of 0 is one utterance at a time."""
        # The reference's beam search is transformers' own.
        slam.beam_search = ours if budget else lambda *_: None
        searcher = Searcher(models[precision], prompt, replace(decoding, beams=beams))
        batches = (
            list(plan_batches(positions, decoding.max_new_tokens, beams, budget))
            if budget
            else [[i] for i in range(len(utterances))]
        )
        texts = [""] * len(utterances)
        started = time.perf_counter()
        for batch in batches:
            for i, answer in zip(
                batch, searcher.decode([frames[i] for i in batch], [audio[i] for i in batch]), strict=True
            ):
                texts[i] = answer.text
        return texts, time.perf_counter() - started

    ways = {"reference: one by one, 4 beams, fp32": ("fp32", 4, 0)}
    ways |= {
        f"ours: {beams} beam{'s' * (beams > 1)}, {precision}, {budget} positions": (precision, beams, budget)
        for beams in options.beams
        for precision in options.precisions
        for budget in options.positions
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    said: dict[str, list[str]] = {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            said[name], spent = decode(*way)
            taken[name].append(spent)
    (first, *_) = ways
    for (name, times), (precision, beams, _) in zip(taken.items(), ways.values(), strict=True):
        ratios = [r / t for r, t in zip(taken[first], times, strict=True)]
        middle = statistics.median(times)
        same = sum(a == b for a, b in zip(said[name], said[first], strict=True))
        errors = jiwer.wer([u.target.lower() for u in utterances], [text.lower() for text in said[name]])
        exact = next(
            (said[n] for n, (p, b, size) in ways.items() if (p, b) == ("fp32", beams) and size), None
        )
        differing = (
            f"  {sum(a != b for a, b in zip(said[name], exact, strict=True))}/{len(exact)} other than in fp32"
            if precision != "fp32" and exact
            else ""
        )
        print(
            f"{name:44} {len(utterances) / middle:7.2f} utterances/s {seconds / middle:7.1f} × real time {statistics.median(ratios):6.2f} × "
            f"({', '.join(f'{r:.2f}' for r in ratios)})  {same}/{len(said[name])} texts the same  WER {100 * errors:.1f} %{differing}"
        )


if __name__ == "__main__":
    main()
