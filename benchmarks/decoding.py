"""Compare the speed of decoding with the reference's method, on the same encoder frames.

MODEL is a model folder or the name of a shipped model. MANIFEST is a test.jsonl that build-manifest wrote:

    python benchmarks/decoding.py MODEL MANIFEST
    python benchmarks/decoding.py MODEL MANIFEST --utterances 10 --repeats 2 --beams 4 1

The reference decodes one utterance at a time in fp32, with 4 beams and transformers' `generate`. This project
sorts utterances by length and batches them by positions. Features are computed before anything is timed. The
methods alternate, so that a change in the machine's load affects all of them. Prints utterances per second,
the multiple of real time, the ratio to the reference, how many texts equal the reference's, the word error
rate, and for bf16 how many texts differ from those in fp32.
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


def main() -> None:
    """Print a line per method."""
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
    options = parser.parse_args()
    opened = open_model(options.model)
    encoder_recipe = replace(opened.trained.encoder, frames=options.frames or opened.trained.encoder.frames)
    prompt = opened.prompt()
    manifest = read_manifest(options.manifest)
    utterances = manifest[:: max(1, len(manifest) // options.utterances)][: options.utterances]
    audio_seconds = sum(u.duration or 0.0 for u in utterances)
    print(
        f"{len(utterances)} utterances, {audio_seconds / len(utterances):.1f} s each on average, "
        f"{torch.get_num_threads()} threads, encoder.frames: {encoder_recipe.frames}"
    )
    encoder = describe_encoder(encoder_recipe).load(torch.float32)
    with torch.no_grad():
        frames = [encoder([encoder.prepare(load_utterance(u))])[0] for u in utterances]
    audio_positions = [opened.positions(len(f)) for f in frames]
    positions = [n + len(prompt.main.before) + len(prompt.main.ids) for n in audio_positions]
    decoding = replace(opened.trained.decoding, nbest=1)
    models = {
        p: opened.load(replace(decoding, precision=p), with_encoder=False)
        for p in {"fp32", *options.precisions}
    }

    ours = slam.beam_search

    def decode(precision: str, beams: int, budget: int) -> tuple[list[str], float]:
        """Decode all utterances, one at a time if `budget` is 0; return the texts and the seconds."""
        # If this project's beam search returns None, transformers' own runs, as in the reference.
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
                batch,
                searcher.decode([frames[i] for i in batch], [audio_positions[i] for i in batch]),
                strict=True,
            ):
                texts[i] = answer.text
        return texts, time.perf_counter() - started

    methods = {"reference: one by one, 4 beams, fp32": ("fp32", 4, 0)}
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
            texts_of[name], elapsed = decode(*method)
            seconds_of[name].append(elapsed)
    (reference, *_) = methods
    for (name, times), (precision, beams, _) in zip(seconds_of.items(), methods.values(), strict=True):
        ratios = [r / t for r, t in zip(seconds_of[reference], times, strict=True)]
        median = statistics.median(times)
        equal = sum(a == b for a, b in zip(texts_of[name], texts_of[reference], strict=True))
        wer = jiwer.wer([u.target.lower() for u in utterances], [text.lower() for text in texts_of[name]])
        fp32_texts = next(
            (texts_of[n] for n, (p, b, size) in methods.items() if (p, b) == ("fp32", beams) and size), None
        )
        differing = ""
        if precision != "fp32" and fp32_texts:
            count = sum(a != b for a, b in zip(texts_of[name], fp32_texts, strict=True))
            differing = f"  {count}/{len(fp32_texts)} differ from fp32"
        print(
            f"{name:44} {len(utterances) / median:7.2f} utterances/s "
            f"{audio_seconds / median:7.1f} × real time "
            f"{statistics.median(ratios):6.2f} × ({', '.join(f'{r:.2f}' for r in ratios)})  "
            f"{equal}/{len(texts_of[name])} texts equal  WER {100 * wer:.1f} %{differing}"
        )


if __name__ == "__main__":
    main()
