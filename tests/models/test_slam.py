"""The joined model: results do not depend on padding or on the rest of the batch, and only targets count."""

import pytest
import torch

from slam_asr.config.recipe import Llm, Projector
from slam_asr.models.answer_loss import IGNORED, score_answers, score_in_chunks
from slam_asr.models.augmentation import Augmentation
from slam_asr.models.batch import Row, collate, pack
from slam_asr.models.ctc import AuxiliaryCtc, BlankFilter, CtcHead, ctc_loss
from slam_asr.models.llm import load_llm, load_tokenizer
from slam_asr.models.packed_attention import allow_packing
from slam_asr.models.projector import build_projector
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import Slam

WIDTH = 8
UTTERANCES = ((12, "one"), (61, "two three four"), (7, "a much longer answer than the others"))
"""Encoder frames and answer of each utterance."""


@pytest.fixture(scope="module")
def joined(tiny_models):
    """The joined model, the prompt, and the encoder frames of each of `UTTERANCES`."""
    llm = load_llm(tiny_models["llm"], torch.float32)
    prompt = Prompt(load_tokenizer(tiny_models["llm"]), Llm())
    model = Slam(build_projector(Projector(hidden=16), WIDTH, llm.config.hidden_size), llm)
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(n, WIDTH, generator=generator) for n, _ in UTTERANCES]
    return model, prompt, frames


def rows_of(joined, indices):
    """Some of `UTTERANCES`, ready to be collated or packed."""
    _, prompt, frames = joined
    return [
        Row(
            frames[i],
            len(frames[i]) // 5,
            prompt.main.before,
            *prompt.with_answer(prompt.main, UTTERANCES[i][1]),
        )
        for i in indices
    ]


def make_batch(joined, indices):
    """Collate some of `UTTERANCES`."""
    return collate(rows_of(joined, indices))


def test_a_batchs_scores_are_the_sum_of_its_utterances(joined):
    together = make_batch(joined, [0, 1, 2])
    scores = score_answers(joined[0](together), together.labels)
    singles = [score_answers(joined[0](b), b.labels) for b in (make_batch(joined, [i]) for i in range(3))]
    torch.testing.assert_close(scores.loss, sum(s.loss for s in singles), rtol=1e-5, atol=1e-5)
    assert scores.sums[1:].tolist() == sum(s.sums for s in singles)[1:].tolist()


def test_target_logits_equal_those_of_the_full_sequence(joined):
    model, batch = joined[0], make_batch(joined, [1])
    full = model.llm(inputs_embeds=model.embed(batch)).logits[0]
    start = batch.answer_start - 1
    torch.testing.assert_close(
        model(batch), full[start : start + batch.labels.shape[1]], rtol=1e-5, atol=1e-5
    )


def test_each_row_has_its_audio_its_prompt_and_its_answer_which_ends_with_eos(joined):
    batch, prompt = make_batch(joined, [0, 1, 2]), joined[1]
    for row, (frames, answer) in enumerate(UTTERANCES):
        targets = batch.labels[row][batch.labels[row] != IGNORED].tolist()
        assert targets[-1] == prompt.tokenizer.eos_token_id
        assert prompt.answer_of(targets[:-1]) == answer
        assert batch.is_audio[row].sum() == frames // 5
        text = batch.token_ids[row][(batch.mask[row] == 1) & ~batch.is_audio[row]].tolist()
        ids, targets_with_end = prompt.with_answer(prompt.main, answer)
        assert text == ids + targets_with_end


class NegativeFirstValue:
    """A filter whose choice depends on each position alone."""

    def find(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs[:, 0] < 0


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_without_its_blanks_has_the_logits_of_one_that_never_had_them(joined, packed):
    model = joined[0]
    rows = rows_of(joined, [0, 1, 2])
    batch = pack(rows) if packed else collate(rows)
    assert not packed or allow_packing(model.llm)
    blanks = NegativeFirstValue().find(model.projector(batch.audio, batch.positions)).split(batch.positions)
    expected = []
    for row, dropped in zip(rows, blanks, strict=True):
        single = collate([row])
        remaining = torch.ones(single.token_ids.shape[1], dtype=torch.bool)
        remaining[single.is_audio[0]] = ~dropped
        assert 0 < dropped.sum() < len(dropped) or len(dropped) < 3
        logits = model.llm(inputs_embeds=model.embed(single)[:, remaining]).logits[0]
        expected.append(logits[-len(row.answer) - 1 : -1])
    model.blank_filter = NegativeFirstValue()
    try:
        found = model(batch)
        reduced, embeddings = model.prepare(batch)
    finally:
        model.blank_filter = None
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert embeddings.shape[1] == reduced.mask.shape[1] < batch.mask.shape[1]
    assert reduced.filled == batch.filled - int(torch.cat(blanks).sum())
    assert int(reduced.is_audio.sum()) == int((~torch.cat(blanks)).sum())
    assert reduced.lengths is None or sum(reduced.lengths) == reduced.filled


def test_a_filter_finds_the_positions_at_which_ctc_gives_the_blank_at_least_the_threshold():
    torch.manual_seed(0)
    head, outputs = CtcHead(torch.randn(4, 6)), torch.randn(50, 6)
    probabilities = head(outputs).softmax(1)[:, 0]
    for threshold in (0.1, 0.5, 0.95):
        found = BlankFilter(head, threshold).find(outputs)
        assert torch.equal(found, probabilities >= threshold) and 0 < found.sum() < len(found)


def test_ctcs_loss_is_added_for_batches_with_ctc_targets(joined):
    model, batch = joined[0], make_batch(joined, [0, 1])
    model.ctc = AuxiliaryCtc(CtcHead(torch.randn(5, model.llm.config.hidden_size)), weight=0.25)
    try:
        alone = score_answers(model(batch), batch.labels)
        batch.spelled = [torch.tensor([1, 2]), torch.tensor([3, 3, 4])]
        outputs = model.projector(batch.audio, batch.positions)
        expected = alone.loss + 0.25 * ctc_loss(model.ctc.head(outputs), batch.positions, batch.spelled)
        for scorer in (None, score_in_chunks):
            model.scorer = scorer
            loss, sums = model(batch)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
            # The reported sums remain those of the LLM.
            torch.testing.assert_close(sums, alone.sums, rtol=1e-5, atol=1e-4)
    finally:
        model.ctc = model.scorer = None


def test_dropout_is_active_only_in_training(joined):
    model, batch = joined[0], make_batch(joined, [1])
    model.augment = Augmentation(0.5)
    try:
        model.eval()
        evaluated = model.embed(batch)
        model.train()
        # Two random draws differ, but only at the audio's positions.
        first, second = model.embed(batch), model.embed(batch)
    finally:
        model.augment = Augmentation()
        model.eval()
    torch.testing.assert_close(evaluated, model.embed(batch), rtol=0, atol=0)
    assert not torch.equal(first[batch.is_audio], second[batch.is_audio])
    assert torch.equal(first[~batch.is_audio], evaluated[~batch.is_audio])


def test_an_answer_prefix_gives_the_first_word_the_same_tokens_as_later_words(tiny_models):
    tokenizer = load_tokenizer(tiny_models["llm"])
    without, with_space = (Prompt(tokenizer, Llm(answer_prefix=prefix)) for prefix in ("", " "))
    assert with_space.main == without.main
    ids = with_space.with_answer(with_space.main, "one")[1]
    assert ids == [*tokenizer.encode(" one", add_special_tokens=False), with_space.end]
    assert ids != without.with_answer(without.main, "one")[1] and with_space.answer_of(ids) == "one"


def test_only_the_projector_gets_gradients(joined):
    model, batch = joined[0], make_batch(joined, [0, 1])
    model.zero_grad()
    score_answers(model(batch), batch.labels).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.llm.parameters())


def test_an_utterance_without_targets_has_a_zero_loss_with_zero_gradients(joined):
    model, batch = joined[0], make_batch(joined, [0])
    batch.labels.fill_(IGNORED)
    scores = score_answers(model(batch), batch.labels)
    model.zero_grad()
    scores.loss.backward()
    assert scores.sums.tolist() == [0, 0, 0]
    assert all(p.grad is None or not p.grad.any() for p in model.projector.parameters())
    assert scores.loss.requires_grad
