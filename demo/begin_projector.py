"""Pretrain a projector without the LLM's forward pass, as a starting point for `projector.init_from`.

    python begin_projector.py --recipe librispeech --manifest data/train.jsonl --features features --out begun

With random weights, a projector in front of a frozen LLM learns nothing for thousands of steps, because it
has to discover which position of the audio belongs to which word of the answer. Connectionist temporal
classification (CTC; Graves et al., 2006) learns this alignment at a hundredth of the cost. The logits for CTC
are negative squared distances between the projector's outputs and the LLM's embeddings of the tokens that
occur in the transcripts. CTC's blank is the embedding of a line break. Among the vectors that could be
between words, this one disturbs the LLM least: with a line break between any two tokens of a text,
SmolLM2-135M still repeats 0.58 of the tokens, but only 0.21 with zeros and 0.51 with commas.

CTC alone only needs outputs to be closer to the right token than to others; they may be anywhere, even where
the LLM has never seen an embedding. A second loss therefore draws each output to its expected embedding, the
mean weighted by the token probabilities. The LLM then sees outputs that resemble the transcript's own tokens,
and `slam-asr train` can continue from there with the LLM's own loss.

Reads features from a store written by `slam-asr extract-features`. Writes a model folder.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from slam_asr.artifacts.feature_store.reader import StoreReader
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.manifest import Utterance, read_manifest
from slam_asr.artifacts.model_folder import ModelConfig, read_config, read_projector, write_model
from slam_asr.config.recipe import dump_recipe, load_recipe
from slam_asr.errors import exit_on_user_error
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import llm_width, load_llm, load_tokenizer
from slam_asr.models.projector import SpeechProjector, build_projector
from slam_asr.pretrained.locate import locate_model
from slam_asr.pretrained.model_files import weights_sha256

BLANK_TEXT = "\n"
"""The text whose embedding serves as CTC's blank."""
BLANK = 0
"""Index of the blank among the tokens."""
BATCH_POSITIONS = 1500
"""Maximum number of LLM positions per batch, including padding."""
INITIAL_SHARPNESS = 20.0
"""Initial factor of the logits: a distance of one embedding's length lowers a logit by half of the factor."""
DISTANCE_WEIGHT = 1.0
"""Final weight of an output's squared distance from its expected embedding, in units of an embedding's
length. The weight grows from zero, because an output that is drawn to a wrong token early stays there."""
DROPOUT = 0.2
"""Share of the encoder's values that is zeroed in training."""


class Speller(nn.Module):
    """A projector, and the token embeddings that its outputs are classified by.

    Args:
        projector: the projector, in float32.
        embeddings: [1 + tokens, LLM width], the blank's first, then those of the tokens that occur.
    """

    def __init__(self, projector: SpeechProjector, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.projector = projector
        self.size = embeddings.norm(dim=1).mean()
        self.register_buffer("embeddings", embeddings / self.size)
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(INITIAL_SHARPNESS)))

    def forward(self, frames: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify the projector's outputs.

        Args:
            frames: the encoder's outputs for each utterance, [frames, width].

        Returns:
            Logits [positions of all utterances, 1 + tokens], and the squared distance of each output from its
            expected embedding [positions of all utterances].
        """
        embeddings = self.embeddings
        with torch.autocast("cpu", torch.bfloat16):
            outputs = self.projector(frames) / self.size
            products = outputs @ embeddings.T
            # -|output - embedding|² / 2, without |output|², which is the same for all tokens.
            logits = (products.float() - embeddings.square().sum(1) / 2) * self.log_sharpness.exp()
            # Without a gradient, outputs are drawn to their expected embedding, but not the other way round.
            with torch.no_grad():
                expected = logits.softmax(1) @ embeddings
        return logits, (outputs.float() - expected.float()).square().sum(1)


def loss_of(
    speller: Speller, frames: list[torch.Tensor], targets: list[torch.Tensor], distance_weight: float
) -> torch.Tensor:
    """Return the CTC loss per target token, plus the weighted mean squared distance, as a scalar.

    Args:
        speller: the projector with the token embeddings.
        frames: the encoder's outputs for each utterance, [frames, width].
        targets: the tokens of each utterance, [tokens], as indices of the speller's embeddings.
        distance_weight: the weight of the mean squared distance from the expected embeddings.
    """
    positions = [len(f) // speller.projector.downsampling for f in frames]
    logits, distances = speller(frames)
    # CTC needs only the columns of an utterance's own tokens: about a hundred instead of ten thousand.
    # `total` normalises them over all tokens, so the loss is the same.
    scores, indices = [], []
    for rows, total, target in zip(
        logits.split(positions), logits.logsumexp(1, keepdim=True).split(positions), targets, strict=True
    ):
        own_tokens, index = torch.unique(target, return_inverse=True)
        scores.append((rows[:, torch.cat([torch.tensor([BLANK]), own_tokens])] - total).T)
        indices.append(index + 1)  # column 0 is the blank's
    padded = nn.utils.rnn.pad_sequence(
        [functional.pad(s, (0, max(positions) - s.shape[1])) for s in scores], batch_first=True
    )
    sums = functional.ctc_loss(
        padded.permute(2, 0, 1),
        torch.cat(indices),
        torch.tensor(positions),
        torch.tensor([len(t) for t in targets]),
        blank=0,
        reduction="sum",
        zero_infinity=True,
    )
    return sums / sum(len(t) for t in targets) + distance_weight * distances.mean()


def best_path(speller: Speller, frames: torch.Tensor) -> list[int]:
    """Return CTC's best path for frames [frames, width]: token indices, without repetitions and blanks."""
    best = speller([frames])[0].argmax(1)
    return [int(t) for t in torch.unique_consecutive(best) if t != BLANK]


def batches(utterances: list[Utterance], lengths: list[int], rng: random.Random) -> list[list[int]]:
    """Group utterances of similar lengths, given in LLM positions; return their indices, in random order."""
    order = sorted(range(len(utterances)), key=lambda i: lengths[i] * rng.uniform(0.9, 1.1))
    groups: list[list[int]] = [[]]
    for i in order:
        if (len(groups[-1]) + 1) * lengths[i] > BATCH_POSITIONS:
            groups.append([])
        groups[-1].append(i)
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
    parser.add_argument("--begin", help="model whose projector to start from (default: random weights)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--minutes", type=float, default=60, help="limit on the training time (default: %(default)s)"
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
    # With a leading space, a word has the same token at the start of a text as within it.
    ids = {
        name: [tokenizer.encode(" " + u.target, add_special_tokens=False) for u in utterances]
        for name, utterances in sets.items()
    }
    tokens = [
        tokenizer.encode(BLANK_TEXT, add_special_tokens=False)[0],
        *sorted({t for row in ids["train"] for t in row}),
    ]
    index_of = {token: index for index, token in enumerate(tokens)}
    speller = Speller(projector, llm.get_input_embeddings().weight[tokens].detach())
    del llm
    reader = StoreReader(FeatureStore(args.features, spec.fingerprint(), recipe.features.dtype))
    train = list(sets["train"])
    lengths = [reader.span(u) // recipe.projector.downsampling for u in train]
    targets = [torch.tensor([index_of[t] for t in row]) for row in ids["train"]]
    print(f"{len(train)} utterances, {sum(lengths)} positions, {len(tokens) - 1} tokens", flush=True)

    optimizer = torch.optim.AdamW(speller.parameters(), lr=args.learning_rate, weight_decay=0.01)
    started, step, progress, average = time.monotonic(), 0, 0.0, 0.0
    rng = random.Random(recipe.training.seed)
    for epoch in range(args.epochs):
        groups = batches(train, lengths, rng)
        for number, group in enumerate(groups):
            minutes = (time.monotonic() - started) / 60
            # The limit that is reached first ends the training; by then, the learning rate is nearly zero.
            progress = max((epoch + number / len(groups)) / args.epochs, minutes / args.minutes)
            if progress >= 1:
                break
            # Linear warm-up over 100 steps, and cosine decay over the run.
            decay = 0.5 * (1 + math.cos(math.pi * progress))
            for settings in optimizer.param_groups:
                settings["lr"] = args.learning_rate * min(1, (step + 1) / 100) * decay
            frames = [functional.dropout(reader.read(train[i]).float(), DROPOUT) for i in group]
            loss = loss_of(speller, frames, [targets[i] for i in group], DISTANCE_WEIGHT * progress)
            loss.backward()
            nn.utils.clip_grad_norm_(speller.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average, step = 0.98 * average + 0.02 * loss.item(), step + 1
            if step % 50 == 0:
                distance = speller(frames)[1].mean().sqrt().item()
                print(
                    # The average starts at 0; dividing removes that bias, as in Adam (Kingma and Ba, 2015).
                    f"epoch {epoch} step {step} {progress:4.0%} loss {average / (1 - 0.98**step):.3f} "
                    f"distance {distance:.2f} {time.monotonic() - started:.0f} s",
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
    """Print the word error rate of CTC's best paths, and an example."""
    import jiwer

    if not dev:
        return
    texts = [
        tokenizer.decode([tokens[t] for t in best_path(speller, reader.read(u).float())]).strip() for u in dev
    ]
    print(
        f"dev: WER {jiwer.wer([u.target for u in dev], texts):.1%}; {dev[0].target!r} → {texts[0]!r}",
        flush=True,
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
