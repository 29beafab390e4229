"""What the reference implementation computed for its tiny models is what we compute."""

import json
from pathlib import Path

import pytest
import torch

from slam_asr.decoding.search import Searcher
from slam_asr.manifest import read_manifest
from slam_asr.models.llm import load_llm, load_tokenizer
from slam_asr.models.projector import LinearProjector, build_projector
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import IGNORED, Slam, collate
from slam_asr.recipe import Decoding, Llm, Projector
from slam_asr.training.objective import score_answers

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"


class Reference:
    """One encoder's numbers, and our model with the same weights."""

    def __init__(self, encoder: str) -> None:
        self.expected = json.loads((REFERENCE / "expected.json").read_text())[encoder]
        self.features = torch.load(REFERENCE / f"features_{encoder}.pt", weights_only=True)
        self.gradients = _without_prefix(torch.load(REFERENCE / f"gradients_{encoder}.pt", weights_only=True))
        weights = _without_prefix(torch.load(REFERENCE / f"model_{encoder}.pt", weights_only=True))
        hidden, joined = weights["linear1.weight"].shape
        llm = load_llm(REFERENCE / "llm", torch.float32)
        width = self.features[next(iter(self.features))].shape[1]
        self.projector = LinearProjector(Projector(downsampling=joined // width, hidden=hidden), width, len(weights["linear2.bias"]))
        self.projector.load_state_dict(weights)
        self.prompt = Prompt(load_tokenizer(REFERENCE / "llm"), Llm().prompt)
        self.model = Slam(self.projector, llm)
        by_key = {u.key: u for u in read_manifest(REFERENCE / "manifest.jsonl")}
        lines = (REFERENCE / "manifest.jsonl").read_text().splitlines()
        self.utterances = [by_key[json.loads(line)["key"]] for line in lines]

    def batch(self, indices):
        chosen = [self.utterances[i] for i in indices]
        frames = [self.features[u.key] for u in chosen]
        ids = [self.prompt.with_answer(u.target) for u in chosen]
        cut = len(self.prompt.ids)
        positions = [self.projector.positions(len(f)) for f in frames]
        return collate(frames, positions, [i[:cut] for i in ids], [i[cut:] for i in ids])

    def mean_loss(self, indices):
        batch = self.batch(indices)
        scores = score_answers(self.model(batch), batch.labels)
        return scores.loss / scores.sums[2]


def _without_prefix(tensors):
    return {name.removeprefix("encoder_projector."): tensor for name, tensor in tensors.items()}


@pytest.fixture(params=["whisper", "wavlm"], scope="module")
def reference(request):
    if not REFERENCE.is_dir():
        pytest.skip("the reference's numbers are not there")
    return Reference(request.param)


def name(indices):
    return f"{'single' if len(indices) == 1 else 'batch'}_{'_'.join(map(str, indices))}"


@pytest.mark.parametrize("indices", [[0], [1], [2], [3], [0, 1, 2, 3]], ids=name)
def test_sequences_are_laid_out_alike(reference, indices):
    batch, expected = reference.batch(indices), reference.expected
    assert batch.is_audio.sum(1).tolist() == expected[f"audio_tokens_{name(indices)}"]
    assert int((batch.labels != IGNORED).sum()) == expected[f"labels_{name(indices)}"]
    assert batch.mask.shape[1] == expected[f"input_len_{name(indices)}"]


@pytest.mark.parametrize("index", range(4))
def test_single_losses_agree(reference, index):
    assert reference.mean_loss([index]).item() == pytest.approx(reference.expected[f"loss_single_{index}"], abs=1e-5)


def test_a_batch_is_the_mean_of_its_utterances_weighted_by_targets(reference):
    labels = [reference.expected[f"labels_single_{i}"] for i in range(4)]
    singles = [reference.mean_loss([i]).item() for i in range(4)]
    mean = sum(n * loss for n, loss in zip(labels, singles, strict=True)) / sum(labels)
    assert reference.mean_loss([0, 1, 2, 3]).item() == pytest.approx(mean, abs=1e-5)


def test_batch_loss_and_gradients_agree(reference, request):
    # The reference lets one half-padded frame of each WavLM utterance through its mask.
    leaks = "wavlm" in request.node.name
    loss = reference.mean_loss([0, 1, 2, 3])
    assert loss.item() == pytest.approx(reference.expected["loss_batch_0_1_2_3"], abs=5e-4 if leaks else 1e-5)
    reference.projector.zero_grad()
    loss.backward()
    for parameter, tensor in reference.projector.named_parameters():
        wanted = reference.gradients[parameter]
        assert (tensor.grad - wanted).norm() / wanted.norm() < (1e-2 if leaks else 1e-4), parameter


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("index", range(4))
def test_single_utterances_are_decoded_alike(reference, beams, index):
    searcher = Searcher(reference.model, reference.prompt, Decoding(beams=beams, max_new_tokens=40))
    answer = searcher.decode([reference.features[reference.utterances[index].key]])[0]
    assert answer.text == reference.expected[f"text_beam{beams}_single_{index}"][0].strip()


def test_the_published_projector_has_the_published_size():
    projector = build_projector(Projector(), encoder_width=1024, llm_width=4096)
    assert sum(p.numel() for p in projector.parameters()) == 18_880_512


def test_a_new_projector_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = build_projector(Projector(hidden=4), 3, 2, seed=5)
    torch.manual_seed(2)
    again = build_projector(Projector(hidden=4), 3, 2, seed=5)
    other = build_projector(Projector(hidden=4), 3, 2, seed=6)
    assert torch.equal(first.linear1.weight, again.linear1.weight)
    assert not torch.equal(first.linear1.weight, other.linear1.weight)


def test_projecting_together_is_projecting_alone():
    projector = build_projector(Projector(hidden=16), 8, 4)
    utterances = [torch.randn(n, 8) for n in (5, 23, 4, 50)]
    together = projector(utterances)
    assert len(together) == 1 + 4 + 0 + 10
    torch.testing.assert_close(together, torch.cat([projector([u]) for u in utterances]))
