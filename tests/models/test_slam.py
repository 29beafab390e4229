"""The joined model: padding and company change nothing, and only targets count."""

import pytest
import torch

from slam_asr.models.llm import load_llm, load_tokenizer
from slam_asr.models.projector import build_projector
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import IGNORED, Row, Slam, collate
from slam_asr.recipe import Llm, Projector
from slam_asr.training.objective import score_answers

WIDTH = 8
UTTERANCES = ((12, "one"), (61, "two three four"), (7, "a much longer answer than the others"))
"""Encoder frames and answer."""


@pytest.fixture(scope="module")
def world(tiny_models):
    llm = load_llm(tiny_models["llm"], torch.float32)
    prompt = Prompt(load_tokenizer(tiny_models["llm"]), Llm())
    model = Slam(build_projector(Projector(hidden=16), WIDTH, llm.config.hidden_size), llm)
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(n, WIDTH, generator=generator) for n, _ in UTTERANCES]
    return model, prompt, frames


def batch(world, indices):
    _, prompt, frames = world
    return collate(
        [
            Row(
                frames[i],
                len(frames[i]) // 5,
                prompt.main.before,
                *prompt.with_answer(prompt.main, UTTERANCES[i][1]),
            )
            for i in indices
        ]
    )


def test_a_batch_is_the_sum_of_its_utterances(world):
    together = batch(world, [0, 1, 2])
    scores = score_answers(world[0](together), together.labels)
    singles = [score_answers(world[0](b), b.labels) for b in (batch(world, [i]) for i in range(3))]
    torch.testing.assert_close(scores.loss, sum(s.loss for s in singles), rtol=1e-5, atol=1e-5)
    assert scores.sums[1:].tolist() == sum(s.sums for s in singles)[1:].tolist()


def test_chosen_logits_are_those_of_the_whole_sequence(world):
    model, given = world[0], batch(world, [1])
    whole = model.llm(inputs_embeds=model.embed(given)).logits[0]
    start = given.answer_start - 1
    torch.testing.assert_close(
        model(given), whole[start : start + given.labels.shape[1]], rtol=1e-5, atol=1e-5
    )


def test_answers_start_at_one_column_and_end_with_eos(world):
    given, prompt = batch(world, [0, 1, 2]), world[1]
    for row, (frames, answer) in enumerate(UTTERANCES):
        targets = given.labels[row][given.labels[row] != IGNORED].tolist()
        assert targets[-1] == prompt.tokenizer.eos_token_id
        assert prompt.answer_of(targets[:-1]) == answer
        assert given.is_audio[row].sum() == frames // 5
        text = given.token_ids[row][(given.mask[row] == 1) & ~given.is_audio[row]].tolist()
        ids, targets_with_end = prompt.with_answer(prompt.main, answer)
        assert text == ids + targets_with_end


def test_only_the_projector_learns(world):
    model, given = world[0], batch(world, [0, 1])
    model.zero_grad()
    score_answers(model(given), given.labels).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.llm.parameters())


def test_an_utterance_without_targets_changes_nothing_but_takes_part(world):
    model, given = world[0], batch(world, [0])
    given.labels.fill_(IGNORED)
    scores = score_answers(model(given), given.labels)
    model.zero_grad()
    scores.loss.backward()
    assert scores.sums.tolist() == [0, 0, 0]
    assert all(p.grad is None or not p.grad.any() for p in model.projector.parameters())
    assert scores.loss.requires_grad
