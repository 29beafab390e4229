"""Measure the effect of `features.dtype`, the precision of saved features, on the loss of a trained model.

    python benchmarks/feature_precision.py MODEL MANIFEST

MODEL is a folder that convert-checkpoint wrote. MANIFEST has utterances that the model was not trained on.
The encoder runs once, on a CPU in fp32 (on a GPU, in the model's own `features.dtype`). Its outputs are
rounded to each `features.dtype`, and projector and LLM run on them in fp32. For each dtype, this
prints bytes per frame, the features' relative error (root mean square), the mean loss over all target tokens,
and the difference of the loss from that in fp32.
"""

import argparse
from dataclasses import replace

import torch

from slam_asr.artifacts.manifest import read_manifest
from slam_asr.artifacts.utterances import load_utterance, samples_of
from slam_asr.decoding.model import open_model
from slam_asr.models.answer_loss import IGNORED
from slam_asr.models.batch import Row, collate
from slam_asr.models.feature_dtype import DTYPES, bytes_per_frame, round_trip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("manifest")
    parser.add_argument("--utterances", type=int, default=72)
    options = parser.parse_args()
    opened = open_model(options.model)
    recipe, spec, prompt = opened.trained, opened.spec, opened.prompt()
    model = opened.load(replace(recipe.decoding, precision="fp32"), with_encoder=True)
    utterances = read_manifest(options.manifest)[: options.utterances]
    encoded = [
        model.encoder.encode([model.encoder.prepare(load_utterance(u))])[0].float() for u in utterances
    ]

    def loss(dtype: str) -> tuple[float, float]:
        """Return the mean loss per target token and the relative error of features rounded to `dtype`."""
        total = targets = error = power = 0.0
        for utterance, frames in zip(utterances, encoded, strict=True):
            rounded = round_trip(frames, dtype).float()
            error, power = error + float(((rounded - frames) ** 2).sum()), power + float((frames**2).sum())
            text, answer = prompt.with_answer(prompt.main, utterance.target)
            positions = opened.positions(spec.span_of(samples_of(utterance)))
            batch = collate([Row(rounded, positions, prompt.main.before, text, answer)]).to(model.llm.device)
            with torch.inference_mode():
                labels = batch.labels[batch.labels != IGNORED]
                total += float(
                    torch.nn.functional.cross_entropy(model(batch).float(), labels, reduction="sum")
                )
            targets += len(labels)
        return total / targets, (error / power) ** 0.5

    exact, _ = loss("fp32")
    print(f"{len(utterances)} utterances, frames: {recipe.encoder.frames}, width {spec.width}")
    for dtype in sorted(DTYPES, key=lambda d: -bytes_per_frame(spec.width, d)):
        value, error = loss(dtype)
        print(
            f"{dtype:5} {bytes_per_frame(spec.width, dtype):6} bytes per frame, relative error {error:.2e}, "
            f"loss {value:.5f} ({value - exact:+.5f})"
        )


if __name__ == "__main__":
    main()
