"""Teaches a projector to say the LLM's own words, without the LLM: a beginning for `projector.init_from`.

    python begin_projector.py --recipe librispeech --manifest data/train.jsonl --features features --out beginning

From random weights, a projector in front of a frozen LLM learns nothing for thousands of steps: it has to find out by
itself which position of the audio belongs to which word of the answer. Connectionist temporal classification (Graves et al.,
2006) finds that out at a hundredth of the cost. The projector's outputs are compared with the LLM's embeddings of the tokens that occur in
the transcripts, by their distance, and with that of a line break, which stands for nothing said: of what could stand between words, it
disturbs the LLM least (with one between any two tokens of a text, SmolLM2-135M still repeats 0.58 of them; with zeros 0.21, with commas 0.51).

To be told apart, outputs may lie anywhere on the right side of their neighbours, where the LLM has never seen a vector. So each is drawn to what
it says: the mean of the embeddings, weighted by their probabilities. What comes out looks to the LLM like the transcript's own tokens, and
`slam-asr train` goes on from there with the LLM's own loss.

Features are read from a store that `slam-asr extract-features` wrote. Writes a model folder.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from slam_asr.conversion.model import ModelConfig, read_config, read_projector, write_model
from slam_asr.errors import exit_on_user_error
from slam_asr.features.reader import StoreReader
from slam_asr.features.store import FeatureStore
from slam_asr.manifest import Utterance, read_manifest
from slam_asr.models.encoder import describe_encoder
from slam_asr.models.llm import llm_width, load_llm, load_tokenizer
from slam_asr.models.pretrained import locate_model, weights_sha256
from slam_asr.models.projector import SpeechProjector, build_projector
from slam_asr.recipe import dump_recipe, load_recipe

NOTHING_SAID = "\n"
BLANK = 0
POSITIONS = 1500
"""In a batch."""
SHARPNESS = 20.0
"""At the start: half of it is what a distance of an embedding's length costs in the logits."""
DRAWN = 1.0
"""Weight, at the end, of an output's squared distance from what it says, in lengths of an embedding. It grows from nothing: an output that
is drawn to what it says before it is right stays there."""
DROPPED = 0.2
"""Share of the encoder's values that is left out in training."""


class Speller(nn.Module):
    """A projector, and the tokens that its outputs may be.

    Args:
        projector: in float32.
        embeddings: [1 + tokens, LLM width]: of what stands for nothing said, and of the tokens that occur.
    """

    def __init__(self, projector: SpeechProjector, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.projector = projector
        self.size = embeddings.norm(dim=1).mean()
        self.register_buffer("embeddings", embeddings / self.size)
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(SHARPNESS)))

    def forward(self, frames: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder outputs, each [frames, width] → logits [positions of all, 1 + tokens], and squared distances from what they say [positions of all]."""
        words = self.embeddings
        with torch.autocast("cpu", torch.bfloat16):
            outputs = self.projector(frames) / self.size
            products = outputs @ words.T
            # The squared length of the output itself is the same for all words.
            logits = (products.float() - words.square().sum(1) / 2) * self.log_sharpness.exp()
            with torch.no_grad():
                said = logits.softmax(1) @ words
        return logits, (outputs.float() - said.float()).square().sum(1)


def loss_of(
    speller: Speller, frames: list[torch.Tensor], targets: list[torch.Tensor], drawn: float
) -> torch.Tensor:
    """Mean over tokens of CTC's loss, and what draws outputs to what they say, by that weight."""
    positions = [len(f) // speller.projector.downsampling for f in frames]
    logits, distances = speller(frames)
    # Of all tokens, CTC looks at an utterance's own alone: a hundred columns instead of ten thousand.
    scores, numbers = [], []
    for rows, total, target in zip(
        logits.split(positions), logits.logsumexp(1, keepdim=True).split(positions), targets, strict=True
    ):
        own, number = torch.unique(target, return_inverse=True)
        scores.append((rows[:, torch.cat([torch.tensor([BLANK]), own])] - total).T)
        numbers.append(number + 1)
    padded = nn.utils.rnn.pad_sequence(
        [functional.pad(s, (0, max(positions) - s.shape[1])) for s in scores], batch_first=True
    )
    sums = functional.ctc_loss(
        padded.permute(2, 0, 1),
        torch.cat(numbers),
        torch.tensor(positions),
        torch.tensor([len(t) for t in targets]),
        blank=0,
        reduction="sum",
        zero_infinity=True,
    )
    return sums / sum(len(t) for t in targets) + drawn * distances.mean()


def spelled(speller: Speller, frames: torch.Tensor) -> list[int]:
    """The best path: repeated tokens once, without blanks."""
    best = speller([frames])[0].argmax(1)
    return [int(t) for t in torch.unique_consecutive(best) if t != BLANK]


def batches(utterances: list[Utterance], lengths: list[int], rng: random.Random) -> list[list[int]]:
    """Utterances of like lengths together, in random order."""
    order = sorted(range(len(utterances)), key=lambda i: lengths[i] * rng.uniform(0.9, 1.1))
    groups: list[list[int]] = [[]]
    for at in order:
        if (len(groups[-1]) + 1) * lengths[at] > POSITIONS:
            groups.append([])
        groups[-1].append(at)
    rng.shuffle(groups)
    return [g for g in groups if g]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="librispeech")
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--dev", help="manifest to validate on")
    parser.add_argument("--features", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--begin", help="model whose projector it goes on from; a random one if not given")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--minutes", type=float, default=60, help="after which it ends in any case (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()

    recipe = load_recipe(args.recipe)
    torch.manual_seed(recipe.training.seed)
    spec, folder = describe_encoder(recipe.encoder), locate_model(recipe.llm.name)
    tokenizer, llm = load_tokenizer(folder), load_llm(folder, torch.float32)
    projector = build_projector(recipe.projector, spec.width, llm_width(llm), recipe.training.seed)
    if args.begin:
        projector.load_state_dict(read_projector(args.begin, read_config(args.begin)).state_dict())
    sets = {name: read_manifest(path) for name, path in (("train", args.manifest), ("dev", args.dev)) if path}
    # Each word with the space in front that it has within a text: one sound, one token.
    ids = {
        name: [tokenizer.encode(" " + u.target, add_special_tokens=False) for u in us]
        for name, us in sets.items()
    }
    tokens = [
        tokenizer.encode(NOTHING_SAID, add_special_tokens=False)[0],
        *sorted({t for row in ids["train"] for t in row}),
    ]
    number = {t: n for n, t in enumerate(tokens)}
    speller = Speller(projector, llm.get_input_embeddings().weight[tokens].detach())
    del llm
    reader = StoreReader(FeatureStore(args.features, spec.fingerprint(), recipe.features.dtype))
    train = list(sets["train"])
    lengths = [reader.span(u) // recipe.projector.downsampling for u in train]
    targets = [torch.tensor([number[t] for t in row]) for row in ids["train"]]
    print(f"{len(train)} utterances, {sum(lengths)} positions, {len(tokens) - 1} tokens", flush=True)

    optimizer = torch.optim.AdamW(speller.parameters(), lr=args.learning_rate, weight_decay=0.01)
    started, step, done, running = time.monotonic(), 0, 0.0, 0.0
    rng = random.Random(recipe.training.seed)
    for epoch in range(args.epochs):
        groups = batches(train, lengths, rng)
        for at, group in enumerate(groups):
            done = max(
                (epoch + at / len(groups)) / args.epochs, (time.monotonic() - started) / 60 / args.minutes
            )
            if done >= 1:
                break
            for settings in optimizer.param_groups:
                settings["lr"] = (
                    args.learning_rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
                )
            frames = [functional.dropout(reader.read(train[i]).float(), DROPPED) for i in group]
            loss = loss_of(speller, frames, [targets[i] for i in group], DRAWN * done)
            loss.backward()
            nn.utils.clip_grad_norm_(speller.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            running, step = 0.98 * running + 0.02 * loss.item(), step + 1
            if step % 50 == 0:
                far = speller(frames)[1].mean().sqrt().item()
                print(
                    f"epoch {epoch} step {step} {done:4.0%} loss {running / (1 - 0.98**step):.3f} distance {far:.2f} {time.monotonic() - started:.0f} s",
                    flush=True,
                )
        _validate(speller, reader, list(sets.get("dev", ())), tokenizer, tokens)
    config = ModelConfig(
        dump_recipe(recipe),
        encoder=spec.fingerprint(),
        llm_sha256=weights_sha256(folder),
        encoder_width=spec.width,
        llm_width=speller.embeddings.shape[1],
        training={
            "steps": step,
            "recipe": recipe.name,
            "encoder": recipe.encoder.name,
            "llm": recipe.llm.name,
        },
    )
    args.out.mkdir(parents=True, exist_ok=True)
    write_model(args.out, projector.state_dict(), config)


@torch.no_grad()
def _validate(
    speller: Speller, reader: StoreReader, dev: list[Utterance], tokenizer, tokens: list[int]
) -> None:
    """Print the word error rate of the best path, and a text."""
    import jiwer

    if not dev:
        return
    texts = [
        tokenizer.decode([tokens[t] for t in spelled(speller, reader.read(u).float())]).strip() for u in dev
    ]
    print(
        f"dev: WER {jiwer.wer([u.target for u in dev], texts):.1%}; {dev[0].target!r} → {texts[0]!r}",
        flush=True,
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
