"""CTC over token embeddings: the loss is torch's, outputs approach embeddings, train texts can be spelled."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from slam_asr.config.recipe import Projector
from slam_asr.models.augmentation import Augmentation
from slam_asr.models.ctc import CtcBatch, CtcHead
from slam_asr.models.ctc_vocabulary import CtcVocabulary, choose_tokens
from slam_asr.models.projector import build_projector
from slam_asr.training.ctc_model import CtcModel


def model_of(tokens: int, encoder_width: int, width: int, hidden: int, **options) -> CtcModel:
    projector = build_projector(Projector(downsampling=2, hidden=hidden), encoder_width, width)
    return CtcModel(projector, CtcHead(torch.randn(1 + tokens, width)), **options)


def test_the_loss_from_an_utterances_own_columns_equals_torchs_loss_over_all_tokens():
    torch.manual_seed(1)
    model = model_of(40, 6, 10, 8)
    frames = [torch.randn(30, 6), torch.randn(21, 6), torch.randn(5, 6)]
    # The third target has more tokens than its utterance has positions, so its CTC loss counts as 0.
    targets = [torch.tensor([7, 3, 3, 40]), torch.tensor([1, 7]), torch.tensor([5, 6, 7])]
    loss, sums = model(CtcBatch(frames, [15, 10, 2], targets, distance_weight=0.5))
    outputs = model.projector(frames)
    logits = model.head(outputs)
    expected = [
        functional.ctc_loss(row.log_softmax(1)[:, None], t[None], [len(row)], [len(t)], reduction="sum")
        for row, t in zip(logits.split([15, 10, 2]), targets, strict=True)
    ]
    assert expected[2] == torch.inf
    embeddings = model.head.embeddings
    nearest = logits.softmax(1) @ embeddings
    distances = (outputs / model.head.size - nearest).square().sum(1).split([15, 10, 2])
    weighted = sum(d.mean() * len(t) for d, t in zip(distances, targets, strict=True))
    assert loss.item() == pytest.approx((expected[0] + expected[1] + 0.5 * weighted).item(), rel=1e-5)
    assert sums[0].item() == pytest.approx((expected[0] + expected[1]).item(), rel=1e-5) and sums[2] == 9


def test_a_process_without_work_has_no_loss_and_a_zero_gradient_for_every_weight():
    model = model_of(4, 6, 10, 8)
    loss, sums = model(CtcBatch([torch.randn(8, 6)], [4], []))
    loss.backward()
    assert loss == 0 and not sums.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("distance_weight", [0.0, 0.5])
def test_utterances_that_are_all_too_short_for_a_position_have_no_loss(distance_weight):
    model = model_of(4, 6, 10, 8)
    targets = [torch.tensor([1, 2]), torch.tensor([3])]
    batch = CtcBatch([torch.randn(1, 6)] * 2, [0, 0], targets, distance_weight=distance_weight)
    loss, sums = model(batch)
    loss.backward()
    # No token counts as correct: the second sum is the tokens minus the errors.
    assert loss == 0 and sums.tolist() == [0, 0, 3]
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("seed", [2, 3])
def test_a_projector_learns_the_tokens_and_its_outputs_approach_their_embeddings(seed):
    torch.manual_seed(seed)
    sounds = torch.randn(6, 12)  # row 0 is silence, rows 1 to 5 are tokens
    targets = [[1, 2, 3], [4, 1, 5], [2, 5], [3]]
    frames = [
        torch.cat([torch.stack([sounds[t], sounds[t], sounds[0], sounds[0]]) for t in row]) for row in targets
    ]
    batch = CtcBatch(frames, [2 * len(row) for row in targets], [torch.tensor(row) for row in targets])
    model = model_of(5, 12, 16, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(400):
        batch.distance_weight = step / 400
        loss, sums = model(batch)
        losses.append(sums[0].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert model.spell(batch) == targets and sums[1] == sums[2] == 9
    similarities = (
        nn.functional.normalize(model.projector([frames[0][:2]]), dim=1)
        @ nn.functional.normalize(model.head.embeddings, dim=1).T
    )
    assert similarities.argmax() == targets[0][0] and similarities.max() > 0.9


def test_dropout_is_active_only_in_training():
    model = model_of(4, 6, 10, 8, augmentation=Augmentation(0.5))
    batch = CtcBatch([torch.randn(8, 6)], [4], [torch.tensor([1, 2])])
    assert model(batch)[0] != model(batch)[0]
    model.eval()
    assert model(batch)[0] == model(batch)[0]


TEXTS = ["the cat sat on the mat", "the dog and the cat", "a mat", "thé"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose tokens include complete words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [" " + t for t in TEXTS * 3],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>"]),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


def test_every_text_is_spelled_by_the_tokens_that_occur(tokenizer):
    ids = choose_tokens(tokenizer, TEXTS)
    vocabulary = CtcVocabulary(tokenizer, ids)
    assert tokenizer.convert_ids_to_tokens(ids[0]) == "Ċ" and ids[1:] == sorted(set(ids[1:]))
    spelled = [vocabulary.spell(text) for text in TEXTS]
    assert [vocabulary.text_of(row) for row in spelled] == TEXTS and all(0 not in row for row in spelled)
    # A word is one token, at the start of a text too.
    assert len(spelled[0]) == 6 and spelled[0][0] == spelled[0][4]
    # The LLM's answer begins without a space, so its first token stands for the one with a space.
    within, first = vocabulary.columns(len(tokenizer))
    assert [int(within[ids[i]]) for i in spelled[0]] == spelled[0]
    word = next(i for i in ids if tokenizer.convert_ids_to_tokens(i) == "Ġa")
    bare = tokenizer.convert_tokens_to_ids("a")
    assert first[bare] == first[word] == within[word] > 0 and within[bare] != within[word]
    assert within[ids[0]] == -1 and first[ids[spelled[0][1]]] == spelled[0][1]
    # A text with words that do not occur in train is spelled as far as possible.
    assert vocabulary.text_of(vocabulary.spell("a cat zapped")).startswith("a cat")
