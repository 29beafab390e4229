"""Beam search: the answers, their order and their scores are those of transformers' own, whatever leaves the batch meanwhile."""

import contextlib

import pytest
import torch
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, GenerationConfig

from slam_asr.models import beam_cache
from slam_asr.models import beam_search as ours
from slam_asr.models.beam_cache import SharedLayer, for_beams
from slam_asr.models.beam_search import beam_search, penalties, without_penalties
from tests.models.test_llm_families import FAMILIES, SIZES

VOCABULARY, WIDTH = 60, 32
LENGTHS = (5, 9, 17, 12, 30, 8, 21)


def an_llm(family: str):
    kind, more, _ = FAMILIES[family]
    torch.manual_seed(4)
    config = CONFIG_MAPPING[kind](
        **{**({} if kind == "gpt2" else SIZES), **more, "vocab_size": VOCABULARY, "initializer_range": 0.4}
    )
    llm = AutoModelForCausalLM.from_config(config).eval()
    return llm


def a_batch(lengths=LENGTHS):
    """Embeddings of utterances, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    rows = [torch.randn(n, WIDTH, generator=generator) for n in lengths]
    embeddings = torch.stack([torch.cat([torch.zeros(longest - len(row), WIDTH), row]) for row in rows])
    return embeddings, torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])


def how(**more) -> GenerationConfig:
    options = {
        "num_beams": 4,
        "num_return_sequences": 3,
        "max_new_tokens": 25,
        "eos_token_id": [1, 7, 30],
        "pad_token_id": 2,
        "do_sample": False,
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
        **more,
    }
    return GenerationConfig(**options)


def theirs(llm, embeddings, mask, generation):
    output = llm.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        generation_config=without_penalties(generation, scores=True),
        logits_processor=penalties(generation),
    )
    of_each = generation.num_return_sequences
    return output.sequences.unflatten(0, (-1, of_each)), output.sequences_scores.view(-1, of_each)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("vicuna", "llama-3")])
@torch.inference_mode()
def test_answers_and_scores_are_those_of_transformers(family):
    llm, (embeddings, mask) = an_llm(family), a_batch()
    lengths = set()
    for more in (
        {},
        {"repetition_penalty": 1.3},
        {"length_penalty": 0.3},
        {"num_beams": 2, "num_return_sequences": 1},
        {"max_new_tokens": 3},
    ):
        generation = how(**more)
        found = beam_search(llm, embeddings, mask, generation)
        ids, scores = theirs(llm, embeddings, mask, generation)
        assert torch.equal(found.ids, ids), more
        torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-5)
        lengths |= {int((~torch.isin(row, torch.tensor([1, 7, 30, 2]))).sum()) for row in found.ids[:, 0]}
    # Answers of one length would not show that some leave before others. Gemma's later kinds, drawn at random, talk on and on.
    assert len(lengths) > 2 or family in ("gemma-2", "gemma-3")


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("vicuna", "llama-3")])
@torch.inference_mode()
def test_greedy_answers_are_those_of_transformers(family, penalty):
    llm, (embeddings, mask) = an_llm(family), a_batch()
    generation = how(num_beams=1, num_return_sequences=1, repetition_penalty=penalty)
    found = beam_search(llm, embeddings, mask, generation)
    output = llm.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        generation_config=without_penalties(generation),
        logits_processor=penalties(generation),
    )
    assert torch.equal(found.ids[:, 0], output.sequences)


@torch.inference_mode()
def test_what_is_settled_leaves_the_batch(monkeypatch):
    llm, (embeddings, mask) = an_llm("tinyllama"), a_batch()
    seen = counted(llm, monkeypatch)
    beam_search(llm, embeddings, mask, how(length_penalty=0.0))
    assert seen[0] == len(LENGTHS) and seen[1] == 4 * len(LENGTHS)
    assert seen[-1] < seen[1] and seen[1:] == sorted(seen[1:], reverse=True)


def counted(llm, monkeypatch) -> list[int]:
    """A list that gets the rows of each forward pass."""
    seen, forward = [], llm.forward

    def count(*arguments, **inputs):
        seen.append(len(inputs["attention_mask"]))
        return forward(*arguments, **inputs)

    count.__signature__ = ours.inspect.signature(forward)
    monkeypatch.setattr(llm, "forward", count)
    return seen


@torch.inference_mode()
def test_one_by_one_is_together_where_nothing_is_close():
    llm, (embeddings, mask) = an_llm("tinyllama"), a_batch()
    found = beam_search(llm, embeddings, mask, how())
    assert not any(found.close)
    for at, length in enumerate(LENGTHS):
        alone = beam_search(llm, embeddings[at : at + 1, -length:], mask[at : at + 1, -length:], how())
        width = alone.ids.shape[-1]
        assert torch.equal(alone.ids[0], found.ids[at, :, :width])


@torch.inference_mode()
def test_a_choice_that_rounding_may_decide_is_counted():
    llm, (embeddings, mask) = an_llm("tinyllama"), a_batch()
    # Each two tokens are one: of three beams and the next one after them, the last two are twins.
    llm.get_output_embeddings().weight[1::2] = llm.get_output_embeddings().weight[::2]
    assert all(beam_search(llm, embeddings, mask, how(num_beams=3)).close)
    assert all(beam_search(llm, embeddings, mask, how(num_beams=1, num_return_sequences=1)).close)


@torch.inference_mode()
def test_an_llm_with_another_cache_is_left_to_transformers():
    config = CONFIG_MAPPING["mamba"](
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, state_size=4
    )
    assert beam_search(AutoModelForCausalLM.from_config(config).eval(), *a_batch((6, 6)), how()) is None


@torch.inference_mode()
def test_what_cannot_be_reached_is_not_searched_for(monkeypatch):
    llm, (embeddings, mask) = an_llm("tinyllama"), a_batch()
    seen = counted(llm, monkeypatch)
    best_of = {
        answers: beam_search(
            llm, embeddings, mask, how(num_return_sequences=answers, length_penalty=0.3)
        ).ids[:, 0]
        for answers in (4, 1)
    }
    # Four answers are settled later than the best of them.
    first = seen.index(len(LENGTHS), 1)
    assert sum(seen[first:]) < sum(seen[:first])
    width = best_of[1].shape[-1]
    assert torch.equal(best_of[4][:, :width], best_of[1])


@pytest.mark.parametrize("family", ["tinyllama", "qwen-3", "phi-3", "gemma", "smollm2", "gpt-2", "gpt-neox"])
@torch.inference_mode()
def test_beams_share_what_they_heard(family, monkeypatch):
    llm, (embeddings, mask) = an_llm(family), a_batch()
    usual, seen = llm.config._attn_implementation, []
    monkeypatch.setattr(ours, "for_beams", lambda *arguments: seen.append(for_beams(*arguments)) or seen[-1])
    beam_search(llm, embeddings, mask, how())
    [cache] = seen
    assert (
        all(type(layer) is SharedLayer for layer in cache.layers) and llm.config._attn_implementation == usual
    )


@contextlib.contextmanager
def attention(function):
    """Have another function where `attend` is."""
    AttentionInterface.register(beam_cache.ATTENTION, function)
    try:
        yield
    finally:
        AttentionInterface.register(beam_cache.ATTENTION, beam_cache.attend)


@pytest.mark.parametrize("at", ["the first layer", "the second layer"])
@torch.inference_mode()
def test_an_attention_that_cannot_share_does_not(at):
    llm, (embeddings, mask) = an_llm("tinyllama"), a_batch()
    calls = []

    def attend_at_first(*arguments, **more):
        calls.append(1)
        if len(calls) > ["the first layer", "the second layer"].index(at):
            raise beam_cache.CannotShare
        return beam_cache.attend(*arguments, **more)

    with attention(attend_at_first):
        found = beam_search(llm, embeddings, mask, how())
    ids, _ = theirs(llm, embeddings, mask, how())
    assert calls and torch.equal(found.ids, ids)


@torch.inference_mode()
def test_an_attention_that_goes_its_own_way_is_noticed():
    llm, (embeddings, mask) = an_llm("tinyllama"), a_batch()
    # It would see the answers alone.
    with attention(AttentionInterface()["sdpa"]):
        found = beam_search(llm, embeddings, mask, how())
    ids, _ = theirs(llm, embeddings, mask, how())
    assert torch.equal(found.ids, ids)


@pytest.mark.parametrize("family", ["tinyllama", "gpt-2", "gemma-3"])
@torch.inference_mode()
def test_reading_in_groups_of_like_length_is_reading_at_once(family, monkeypatch):
    llm, (embeddings, mask) = an_llm(family), a_batch()
    together = beam_search(llm, embeddings, mask, how())
    monkeypatch.setattr(ours, "_READ", 40)
    seen = counted(llm, monkeypatch)
    found = beam_search(llm, embeddings, mask, how())
    assert torch.equal(found.ids, together.ids)
    torch.testing.assert_close(found.scores, together.scores, rtol=1e-4, atol=1e-5)
    assert seen[0] == 1 and (seen[1] == 1 or family == "gemma-3")
