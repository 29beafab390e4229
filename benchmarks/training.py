"""Compare the speeds of two methods of training: this project's, and that of the reference, SLAM-LLM.

    python benchmarks/training.py MANIFEST                     # train.jsonl by build-manifest
    python benchmarks/training.py MANIFEST --utterances 96 --repeats 3 --precisions fp32 bf16

One process trains a linear projector between Whisper tiny.en and SmolLM2-135M.

The reference's method computes in fp32. In every step, it runs the encoder on each utterance's full 30-s
window. It pads batches of 4 to the longest utterance, and computes logits and cross entropy at every
position.

This project's method reads cached features, and packs utterances into batches up to a number of positions. It
computes logits only where they predict an answer, in chunks. It is measured with `frames: all` (as many audio
positions as the reference) and with `frames: speech`; with --compile, each also with `training.compile`.

Every method trains on the same utterances: forward, backward and AdamW. The methods alternate, so that a
change in the machine's load affects all of them. Prints utterances per second, and the ratio to the
reference.
"""

import argparse
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.nn import functional

from slam_asr.artifacts.manifest import Utterance, read_manifest
from slam_asr.artifacts.utterances import load_utterance
from slam_asr.config.recipe import Recipe, load_recipe
from slam_asr.models.answer_loss import IGNORED, allows_chunks, score_in_chunks
from slam_asr.models.batch import Batch, Row, collate, pack
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import llm_width, load_llm, load_tokenizer
from slam_asr.models.packed_attention import allow_packing
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import build_projector, positions_of
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import Slam
from slam_asr.pretrained.locate import locate_model
from slam_asr.training.kernels import compile_layers

BATCH = 4
"""Utterances per batch in the reference."""


class Method(ABC):
    """A method of training: a model, and the steps of an epoch.

    Args:
        name: the label in the output.
        recipe: the recipe.
        precision: precision of the LLM and the projector, `fp32` or `bf16`.
        utterances: the utterances of an epoch.
    """

    def __init__(self, name: str, recipe: Recipe, precision: str, utterances: list[Utterance]) -> None:
        self.name, self.recipe, self.utterances = name, recipe, utterances
        torch.manual_seed(0)
        folder = locate_model(recipe.llm.name)
        llm = load_llm(folder, DTYPES[precision])
        self.prompt = Prompt(load_tokenizer(folder), recipe.llm)
        self.spec = describe_encoder(recipe.encoder)
        self.model = Slam(
            build_projector(recipe.projector, self.spec.width, llm_width(llm), 0).to(DTYPES[precision]), llm
        )
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.projector.parameters(), lr=1e-4)

    def row(self, utterance: Utterance, frames: torch.Tensor) -> Row:
        """Return the LLM's input and target for an utterance.

        Args:
            utterance: the utterance.
            frames: the encoder's outputs, [frames, width].
        """
        positions = positions_of(self.recipe.projector, len(frames))
        return Row(
            frames,
            positions,
            self.prompt.main.before,
            *self.prompt.with_answer(self.prompt.main, utterance.target),
        )

    @abstractmethod
    def steps(self) -> Iterator[Callable[[], torch.Tensor]]:
        """Yield a function for each step, which computes the step's loss, a scalar."""

    def epoch(self) -> float:
        """Train on all utterances once, and return the seconds."""
        started = time.perf_counter()
        for step in self.steps():
            step().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - started


class Reference(Method):
    """The encoder runs in every step, batches have a fixed size, and every position gets logits."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.encoder = self.spec.load(torch.float32)

    def steps(self) -> Iterator[Callable[[], torch.Tensor]]:
        for start in range(0, len(self.utterances), BATCH):
            yield lambda batch=self.utterances[start : start + BATCH]: self._loss(batch)

    def _loss(self, utterances: list[Utterance]) -> torch.Tensor:
        with torch.no_grad():
            features = self.encoder([self.encoder.prepare(load_utterance(u)) for u in utterances])
        batch = collate([self.row(u, frames) for u, frames in zip(utterances, features, strict=True)])
        logits = self.model.llm(
            inputs_embeds=self.model.embed(batch), attention_mask=batch.mask, use_cache=False
        ).logits
        # `batch.labels` begin where the answers do; no position before that is a target.
        labels = torch.full(batch.token_ids.shape, IGNORED)
        labels[:, batch.answer_start :] = batch.labels
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class Ours(Method):
    """Features are cached, batches are packed up to a number of positions, and only answers get logits.

    Args:
        name: the label in the output.
        recipe: the recipe.
        precision: precision of the LLM and the projector, `fp32` or `bf16`.
        utterances: the utterances of an epoch.
        budget: maximum number of LLM positions per batch.
        compiled: whether to compile the LLM's layers.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        precision: str,
        utterances: list[Utterance],
        budget: int,
        compiled: bool = False,
    ) -> None:
        super().__init__(name, recipe, precision, utterances)
        encoder = self.spec.load(torch.float32)
        with torch.no_grad():
            rows = [
                self.row(u, encoder([encoder.prepare(load_utterance(u))])[0].to(torch.bfloat16))
                for u in utterances
            ]
        self.packing = allow_packing(self.model.llm)
        self.model.scorer = score_in_chunks if allows_chunks(self.model.llm) else None
        if compiled:
            compile_layers(self.model.llm)
        self.groups: list[list[Row]] = [[]]
        for row in sorted(rows, key=lambda r: r.head + len(r.answer)):
            if sum(r.head + len(r.answer) for r in [*self.groups[-1], row]) > budget and self.groups[-1]:
                self.groups.append([])
            self.groups[-1].append(row)
        self.model.train()

    def steps(self) -> Iterator[Callable[[], torch.Tensor]]:
        for group in self.groups:
            yield lambda group=group: self._loss(pack(group) if self.packing else collate(group))

    def _loss(self, batch: Batch) -> torch.Tensor:
        # The third sum is the number of target tokens.
        loss, sums = self.model(batch)
        return loss / sums[2]


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest")
    parser.add_argument("--utterances", type=int, default=48)
    parser.add_argument("--positions", type=int, default=1600, help="LLM positions per batch, in our method")
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    parser.add_argument("--frames", nargs="+", default=["all", "speech"], choices=("all", "speech"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also measure our method with torch.compile, after an epoch in which it compiles",
    )
    return parser.parse_args()


def methods_of(options: argparse.Namespace, utterances: list[Utterance]) -> list[Method]:
    """Return the requested methods; the first one is the reference."""
    base = load_recipe("librispeech")

    def recipe(frames: str) -> Recipe:
        return replace(base, encoder=replace(base.encoder, frames=frames))

    label = "reference: fp32, encoder in each step, batches of 4, all logits"
    return [
        Reference(label, recipe("all"), "fp32", utterances),
        *(
            Ours(
                f"ours: {precision}, frames: {frames}{', compiled' * compiled}",
                recipe(frames),
                precision,
                utterances,
                options.positions,
                compiled,
            )
            for frames in options.frames
            for precision in options.precisions
            for compiled in ((False, True) if options.compile else (False,))
        ),
    ]


def main() -> None:
    """Print a line per method."""
    options = parse_options()
    manifest = read_manifest(options.manifest)
    utterances = manifest[:: max(1, len(manifest) // options.utterances)][: options.utterances]
    seconds = sum(u.duration or 0.0 for u in utterances)
    print(
        f"{len(utterances)} utterances, {seconds / len(utterances):.1f} s each, "
        f"{torch.get_num_threads()} threads"
    )
    methods = methods_of(options, utterances)
    if options.compile:
        for method in methods:
            method.epoch()
    seconds_of: dict[str, list[float]] = {method.name: [] for method in methods}
    for _ in range(options.repeats):
        for method in methods:
            seconds_of[method.name].append(method.epoch())
    reference = seconds_of[methods[0].name]
    for name, times in seconds_of.items():
        ratios = [r / t for r, t in zip(reference, times, strict=True)]
        listed = ", ".join(f"{r:.2f}" for r in ratios)
        print(
            f"{name:66} {len(utterances) / statistics.median(times):7.2f} utterances/s "
            f"{statistics.median(ratios):6.2f} × ({listed})"
        )


if __name__ == "__main__":
    main()
