"""Beam search returns the same answers, order and scores as transformers, even if the batch shrinks."""

import contextlib
import inspect

import pytest
import torch
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, GenerationConfig

from slam_asr.generation import beam_cache, prefill
from slam_asr.generation.beam_cache import SharedLayer, expand_for_beams
from slam_asr.generation.beam_search import beam_search, penalties, without_penalties
from tests.models.test_llm_families import FAMILIES, SIZES

VOCABULARY, WIDTH = 60, 32
LENGTHS = (5, 9, 17, 12, 30, 8, 21)


def random_llm(family: str):
    """Build a small LLM of a family, with random weights."""
    kind, more, _ = FAMILIES[family]
    torch.manual_seed(4)
    config = CONFIG_MAPPING[kind](
        **{**({} if kind == "gpt2" else SIZES), **more, "vocab_size": VOCABULARY, "initializer_range": 0.4}
    )
    llm = AutoModelForCausalLM.from_config(config).eval()
    return llm


def random_batch(lengths=LENGTHS):
    """Return random embeddings [utterances, positions, width], padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    rows = [torch.randn(n, WIDTH, generator=generator) for n in lengths]
    embeddings = torch.stack([torch.cat([torch.zeros(longest - len(row), WIDTH), row]) for row in rows])
    return embeddings, torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])


def configuration(**changes) -> GenerationConfig:
    options = {
        "num_beams": 4,
        "num_return_sequences": 3,
        "max_new_tokens": 25,
        "eos_token_id": [1, 7, 30],
        "pad_token_id": 2,
        "do_sample": False,
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
        **changes,
    }
    return GenerationConfig(**options)


def search_by_transformers(llm, embeddings, mask, generation):
    """Return token ids [utterances, answers, tokens] and scores [utterances, answers] from transformers."""
    output = llm.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        generation_config=without_penalties(generation),
        logits_processor=penalties(generation),
    )
    answers = generation.num_return_sequences
    return output.sequences.unflatten(0, (-1, answers)), output.sequences_scores.view(-1, answers)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("vicuna", "llama-3")])
@torch.inference_mode()
def test_answers_and_scores_are_those_of_transformers(family):
    llm, (embeddings, mask) = random_llm(family), random_batch()
    lengths = set()
    for changes in (
        {},
        {"repetition_penalty": 1.3},
        {"length_penalty": 0.3},
        {"num_beams": 2, "num_return_sequences": 1},
        {"max_new_tokens": 3},
    ):
        generation = configuration(**changes)
        found = beam_search(llm, embeddings, mask, generation)
        ids, scores = search_by_transformers(llm, embeddings, mask, generation)
        assert torch.equal(found.ids, ids), changes
        torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-5)
        lengths |= {int((~torch.isin(row, torch.tensor([1, 7, 30, 2]))).sum()) for row in found.ids[:, 0]}
    # If all answers had the same length, no utterance would leave the batch before the others. With random
    # weights, Gemma 2 and 3 rarely end an answer.
    assert len(lengths) > 2 or family in ("gemma-2", "gemma-3")


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("vicuna", "llama-3")])
@torch.inference_mode()
def test_greedy_answers_are_those_of_transformers(family, penalty):
    llm, (embeddings, mask) = random_llm(family), random_batch()
    generation = configuration(num_beams=1, num_return_sequences=1, repetition_penalty=penalty)
    found = beam_search(llm, embeddings, mask, generation)
    output = llm.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        generation_config=without_penalties(generation),
        logits_processor=penalties(generation),
    )
    assert torch.equal(found.ids[:, 0], output.sequences)


@torch.inference_mode()
def test_settled_utterances_leave_the_batch(monkeypatch):
    llm, (embeddings, mask) = random_llm("tinyllama"), random_batch()
    rows = count_rows(llm, monkeypatch)
    beam_search(llm, embeddings, mask, configuration(length_penalty=0.0))
    assert rows[0] == len(LENGTHS) and rows[1] == 4 * len(LENGTHS)
    assert rows[-1] < rows[1] and rows[1:] == sorted(rows[1:], reverse=True)


def count_rows(llm, monkeypatch) -> list[int]:
    """Return a list to which every forward pass appends its number of rows."""
    rows, forward = [], llm.forward

    def count(*arguments, **inputs):
        rows.append(len(inputs["attention_mask"]))
        return forward(*arguments, **inputs)

    count.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(llm, "forward", count)
    return rows


@torch.inference_mode()
def test_single_and_batched_answers_agree_without_near_ties():
    llm, (embeddings, mask) = random_llm("tinyllama"), random_batch()
    found = beam_search(llm, embeddings, mask, configuration())
    assert not any(found.nearly_tied)
    for i, length in enumerate(LENGTHS):
        alone = beam_search(llm, embeddings[i : i + 1, -length:], mask[i : i + 1, -length:], configuration())
        width = alone.ids.shape[-1]
        assert torch.equal(alone.ids[0], found.ids[i, :, :width])


@torch.inference_mode()
def test_answers_are_padded_with_token_0_if_that_is_the_pad_token():
    llm, (embeddings, mask) = random_llm("tinyllama"), random_batch()
    # transformers treats a pad token of 0 as a missing one, so its answers cannot serve as a reference here.
    padded_with_2, padded_with_0 = (
        beam_search(llm, embeddings, mask, configuration(pad_token_id=pad)).ids for pad in (2, 0)
    )
    ends = torch.isin(padded_with_0, torch.tensor([1, 7, 30])).long()
    is_padding = ends.cumsum(-1) > ends
    assert is_padding.any() and (padded_with_0[is_padding] == 0).all()
    assert torch.equal(padded_with_0[~is_padding], padded_with_2[~is_padding])


@torch.inference_mode()
def test_near_ties_are_reported():
    llm, (embeddings, mask) = random_llm("tinyllama"), random_batch()
    # Tokens 0 and 1 have equal weights, tokens 2 and 3 too, and so on. With an odd number of beams, the last
    # beam therefore ties with the first one that is left out.
    llm.get_output_embeddings().weight[1::2] = llm.get_output_embeddings().weight[::2]
    assert all(beam_search(llm, embeddings, mask, configuration(num_beams=3)).nearly_tied)
    assert all(
        beam_search(llm, embeddings, mask, configuration(num_beams=1, num_return_sequences=1)).nearly_tied
    )


@torch.inference_mode()
def test_an_llm_without_key_value_cache_is_left_to_transformers():
    config = CONFIG_MAPPING["mamba"](
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, state_size=4
    )
    assert (
        beam_search(AutoModelForCausalLM.from_config(config).eval(), *random_batch((6, 6)), configuration())
        is None
    )


@torch.inference_mode()
def test_search_stops_when_no_continuation_can_reach_the_requested_answers(monkeypatch):
    llm, (embeddings, mask) = random_llm("tinyllama"), random_batch()
    rows = count_rows(llm, monkeypatch)
    best_of = {
        answers: beam_search(
            llm, embeddings, mask, configuration(num_return_sequences=answers, length_penalty=0.3)
        ).ids[:, 0]
        for answers in (4, 1)
    }
    # If four answers are requested, utterances settle later, so the first search runs more rows in total.
    second_search = rows.index(len(LENGTHS), 1)
    assert sum(rows[second_search:]) < sum(rows[:second_search])
    width = best_of[1].shape[-1]
    assert torch.equal(best_of[4][:, :width], best_of[1])


@pytest.mark.parametrize("family", ["tinyllama", "qwen-3", "phi-3", "gemma", "smollm2", "gpt-2", "gpt-neox"])
@torch.inference_mode()
def test_beams_share_the_prefix(family, monkeypatch):
    llm, (embeddings, mask) = random_llm(family), random_batch()
    usual, caches = llm.config._attn_implementation, []
    monkeypatch.setattr(
        beam_cache,
        "expand_for_beams",
        lambda *arguments: caches.append(expand_for_beams(*arguments)) or caches[-1],
    )
    beam_search(llm, embeddings, mask, configuration())
    [cache] = caches
    assert (
        all(type(layer) is SharedLayer for layer in cache.layers) and llm.config._attn_implementation == usual
    )


@contextlib.contextmanager
def registered_attention(function):
    """Register another function in place of `attend`."""
    # Only the first call registers `attend`. If it came later, it would replace `function`.
    beam_cache.register_attention()
    AttentionInterface.register(beam_cache.ATTENTION, function)
    try:
        yield
    finally:
        AttentionInterface.register(beam_cache.ATTENTION, beam_cache.attend)


@pytest.mark.parametrize("working_layers", [0, 1])
@torch.inference_mode()
def test_search_falls_back_if_an_attention_cannot_share(working_layers):
    llm, (embeddings, mask) = random_llm("tinyllama"), random_batch()
    calls = []

    def attend_in_first_layers(*arguments, **more):
        calls.append(1)
        if len(calls) > working_layers:
            raise beam_cache.CannotShare
        return beam_cache.attend(*arguments, **more)

    with registered_attention(attend_in_first_layers):
        found = beam_search(llm, embeddings, mask, configuration())
    ids, _ = search_by_transformers(llm, embeddings, mask, configuration())
    assert calls and torch.equal(found.ids, ids)


@torch.inference_mode()
def test_an_attention_that_ignores_the_prefix_is_noticed():
    llm, (embeddings, mask) = random_llm("tinyllama"), random_batch()
    # This attention sees only the generated tokens.
    with registered_attention(AttentionInterface()["sdpa"]):
        found = beam_search(llm, embeddings, mask, configuration())
    ids, _ = search_by_transformers(llm, embeddings, mask, configuration())
    assert torch.equal(found.ids, ids)


@pytest.mark.parametrize("family", ["tinyllama", "gpt-2", "gemma-3"])
@torch.inference_mode()
def test_prefill_in_groups_equals_prefill_in_one_pass(family, monkeypatch):
    llm, (embeddings, mask) = random_llm(family), random_batch()
    together = beam_search(llm, embeddings, mask, configuration())
    monkeypatch.setattr(prefill, "PREFILL_POSITIONS", 40)
    rows = count_rows(llm, monkeypatch)
    found = beam_search(llm, embeddings, mask, configuration())
    assert torch.equal(found.ids, together.ids)
    torch.testing.assert_close(found.scores, together.scores, rtol=1e-4, atol=1e-5)
    # Gemma 3 has sliding windows, so after the first group its complete batch is prefilled in one pass.
    assert rows[0] == 1 and (rows[1] == 1 or family == "gemma-3")
