"""With any causal LM, results depend on neither padding nor batch; inputs equal those of SLAM-LLM."""

import copy
import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from slam_asr.config.recipe import Decoding, Llm, Projector
from slam_asr.errors import UserError
from slam_asr.models import answer_loss as objective
from slam_asr.models.answer_loss import IGNORED, score_answers
from slam_asr.models.batch import Row, collate, pack
from slam_asr.models.llm import checkpoint_layers, llm_width
from slam_asr.models.packed_attention import NAME, allow_packing, packed_arguments
from slam_asr.models.projector import build_projector
from slam_asr.models.prompt import Prompt
from slam_asr.models.searcher import Searcher
from slam_asr.models.slam import Slam

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    # name: (transformers' model type, changes to SIZES, the tokenizer's bos token)
    "vicuna": ("llama", {"num_key_value_heads": 4}, "<s>"),
    "llama-3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "<s>"),
    "tinyllama": ("llama", {}, "<s>"),
    "qwen-2.5": ("qwen2", {"tie_word_embeddings": True}, None),
    "qwen-3": ("qwen3", {"head_dim": 16}, None),
    "phi-2": ("phi", {}, None),
    "phi-3": ("phi3", {"pad_token_id": 0}, None),
    "gemma": ("gemma", {"head_dim": 8, "tie_word_embeddings": True}, "<s>"),
    "gemma-2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}, "<s>"),
    "gemma-3": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}, "<s>"),
    "mistral": ("mistral", {"sliding_window": 64}, "<s>"),
    "smollm2": ("llama", {"tie_word_embeddings": True}, None),
    "gpt-2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, None),
    "gpt-neox": ("gpt_neox", {"max_position_embeddings": 256}, None),
}
UTTERANCES = ((12, "one"), (61, "two three four"), (7, "a much longer answer than the others"))
"""The number of encoder frames and the target of each utterance."""
WIDTH = 8


def byte_tokenizer(begin: str | None = None, adds_end: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges and without a padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("o", "n"), ("on", "e"), ("\u0120", "a"), (":", "o"), (":", "t")]
    tokens = ["<s>", "</s>", *alphabet, *("".join(p) for p in pairs)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    single = f"{begin or ''} $A {'</s>' if adds_end else ''}".split()
    if len(single) > 1:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(single), special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token="</s>")


@pytest.fixture(params=FAMILIES, scope="module")
def joined(request):
    kind, changes, begin = FAMILIES[request.param]
    tokenizer = byte_tokenizer(begin)
    config = CONFIG_MAPPING[kind](
        **{
            **SIZES,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,
            **changes,
        }
    )
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():  # random weights make all tokens about equally likely; scaled up, they do not
        llm.get_output_embeddings().weight.mul_(30)
    prompt = Prompt(tokenizer, Llm())
    model = Slam(build_projector(Projector(hidden=16), WIDTH, llm_width(llm)), llm)
    generator = torch.Generator().manual_seed(0)
    return model, prompt, [torch.randn(n, WIDTH, generator=generator) for n, _ in UTTERANCES]


def make_batch(joined, indices, lay_out=collate):
    """Lay out some of `UTTERANCES`."""
    _, prompt, frames = joined
    return lay_out(
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


def test_a_batchs_scores_are_the_sum_of_its_utterances(joined):
    together = make_batch(joined, [0, 1, 2])
    scores = score_answers(joined[0](together), together.labels)
    singles = [score_answers(joined[0](b), b.labels) for b in (make_batch(joined, [i]) for i in range(3))]
    torch.testing.assert_close(scores.loss, sum(s.loss for s in singles), rtol=1e-5, atol=1e-5)
    assert scores.sums[1:].tolist() == sum(s.sums for s in singles)[1:].tolist()


NOT_PACKED = {"gemma-2"}
"""Gemma 2 caps its attention scores, which torch's attention cannot do; it gets padded batches."""


def test_packed_padded_and_single_losses_and_gradients_agree(joined, request):
    model, name = copy.deepcopy(joined[0]), request.node.callspec.params["joined"]
    model = Slam(model.projector.requires_grad_(True), model.llm)
    assert allow_packing(model.llm) == (name not in NOT_PACKED)
    if name in NOT_PACKED:
        assert model.llm.config._attn_implementation != NAME
        return

    def sums_and_gradients(batches):
        model.zero_grad()
        scores = [score_answers(model(b), b.labels) for b in batches]
        sum(s.loss for s in scores).backward()
        return sum(s.sums for s in scores), [p.grad.clone() for p in model.projector.parameters()]

    packed, gradients = sums_and_gradients([make_batch(joined, [0, 1, 2], pack)])
    for others in (
        [make_batch(joined, [0, 1, 2])],
        [make_batch(joined, [i]) for i in range(3)],
        [make_batch(joined, [i], pack) for i in range(3)],
    ):
        sums, theirs = sums_and_gradients(others)
        torch.testing.assert_close(sums, packed, rtol=1e-5, atol=1e-5)
        for ours, other in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_packed_utterances_stay_separate_with_attention_dropout():
    """In training, GPT-2 has attention dropout: its logits are random, but depend on one utterance only."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["gpt2"](
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=64,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0.5,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    assert allow_packing(llm)
    llm.train()
    row = torch.randn(1, 12, 32)

    def logits_of(row):
        torch.manual_seed(1)
        return (
            llm(inputs_embeds=row, use_cache=False, **packed_arguments([5, 7], row.device))
            .logits[0]
            .split([5, 7])
        )

    changed = row.clone()
    changed[0, 5:] = torch.randn(7, 32)
    (first, second), (same, other) = logits_of(row), logits_of(changed)
    torch.testing.assert_close(first, same)
    assert not torch.allclose(second, other)
    torch.manual_seed(2)
    assert not torch.allclose(
        first, llm(inputs_embeds=row, use_cache=False, **packed_arguments([5, 7], row.device)).logits[0, :5]
    )


def test_chunked_loss_and_gradients_equal_the_unchunked_ones(joined, request, monkeypatch):
    """Output layers are tied or untied, with or without bias. Gemma 2 caps its logits: no chunks there."""
    model, name = copy.deepcopy(joined[0]), request.node.callspec.params["joined"]
    model = Slam(model.projector.requires_grad_(True), model.llm)
    assert objective.allows_chunks(model.llm) == (name != "gemma-2")
    if name == "gemma-2":
        return
    batch = make_batch(joined, [0, 1, 2])
    unchunked = score_answers(model(batch), batch.labels)
    (3 * unchunked.loss).backward()
    expected = [p.grad.clone() for p in model.projector.parameters()]
    monkeypatch.setattr(objective, "CHUNK", 7 * model.llm.get_output_embeddings().weight.shape[0])
    model.zero_grad()
    model.scorer = objective.score_in_chunks
    loss, sums = model(batch)
    (3 * loss).backward()
    torch.testing.assert_close(sums, unchunked.sums, rtol=1e-6, atol=1e-5)
    for parameter, gradient in zip(model.projector.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(batch)[1], sums)


SEARCHES = [(1, 1.0), (3, 1.5), *([(3, 1.0), (1, 1.5)] if os.environ.get("SLAM_ASR_SOAK") else [])]


@pytest.mark.slow
@pytest.mark.parametrize(("beams", "penalty"), SEARCHES)
def test_batched_and_single_decoding_agree(joined, beams, penalty):
    model, prompt, frames = joined
    searcher = Searcher(model, prompt, Decoding(beams=beams, max_new_tokens=16, repetition_penalty=penalty))
    positions = [len(f) // 5 for f in frames]
    single = [searcher.decode([f], [n])[0] for f, n in zip(frames, positions, strict=True)]
    assert [a.text for a in searcher.decode(frames, positions)] == [a.text for a in single]


@torch.no_grad()
def test_projected_audio_enters_unscaled(joined):
    model, batch = joined[0], make_batch(joined, [1])
    torch.testing.assert_close(
        model.embed(batch)[batch.is_audio], model.projector(batch.audio, batch.positions)
    )


@torch.no_grad()
def test_logits_from_embeddings_equal_those_from_token_ids(joined):
    llm, batch = joined[0].llm, make_batch(joined, [1])
    ids = batch.token_ids[~batch.is_audio][None]
    embedded = llm(inputs_embeds=llm.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(embedded, llm(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_target_logits_equal_those_of_the_full_sequence(joined):
    model, batch = joined[0], make_batch(joined, [1])
    full = model.llm(inputs_embeds=model.embed(batch)).logits[0]
    start = batch.answer_start - 1
    torch.testing.assert_close(
        model(batch), full[start : start + batch.labels.shape[1]], rtol=1e-4, atol=1e-4
    )


def test_targets_are_tokenised_as_in_slam_llm(joined):
    tokenizer, batch = joined[1].tokenizer, make_batch(joined, [0, 1, 2])
    text = "USER: Transcribe speech to text. \n ASSISTANT:"
    for row, (_, answer) in enumerate(UTTERANCES):
        expected = [*tokenizer(text + answer)["input_ids"], tokenizer.eos_token_id][
            len(tokenizer(text)["input_ids"]) :
        ]
        assert batch.labels[row][batch.labels[row] != IGNORED].tolist() == expected


def test_gradient_checkpointing_changes_no_gradient(joined):
    batch, gradients = make_batch(joined, [0, 1]), []
    for checkpointed in (False, True):
        model = copy.deepcopy(joined[0])
        model = Slam(model.projector, model.llm).train()
        if checkpointed:
            checkpoint_layers(model.llm)
        score_answers(model(batch), batch.labels).loss.backward()
        gradients.append(model.projector.linear1.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("begin", ["<s>", None])
@pytest.mark.parametrize("adds_end", [False, True])
def test_bos_follows_the_audio_and_eos_ends_the_answer_once(begin, adds_end):
    tokenizer = byte_tokenizer(begin, adds_end)
    prompt = Prompt(tokenizer, Llm())
    ids, answer = prompt.with_answer(prompt.main, "one")
    assert (ids[0] == 0) == (begin is not None) and 0 not in ids[1:] + answer
    assert ids.count(1) == 0 and answer.count(1) == 1 and answer[-1] == 1
    assert prompt.answer_of(answer) == "one" and prompt.main.before == []


def test_a_template_may_place_text_before_the_audio():
    tokenizer = byte_tokenizer("<s>")
    prompt = Prompt(tokenizer, Llm(prompt="Say it.", template="Listen: {audio} {}\nAnswer:"))
    assert tokenizer.decode(prompt.main.before) == "<s>Listen: "
    ids, answer = prompt.with_answer(prompt.main, "one")
    assert tokenizer.decode(ids) == " Say it.\nAnswer:" and prompt.answer_of(answer) == "one"
    assert [*prompt.main.before, *ids].count(0) == 1


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_chat_template_surrounds_audio_and_prompt():
    tokenizer = byte_tokenizer("<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    prompt = Prompt(tokenizer, Llm(prompt="Say it.", template="chat"))
    ids, answer = prompt.with_answer(prompt.main, "one")
    assert tokenizer.decode(prompt.main.before) == "<|im_start|>user\n"
    assert tokenizer.decode(ids) == "Say it.<|im_end|>\n<|im_start|>assistant\n"
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") in prompt.stops
    assert prompt.answer_of([*answer, 1, 1]) == "one"


def test_a_model_without_a_chat_template_is_refused():
    with pytest.raises(Exception, match="has no chat template"):
        Prompt(byte_tokenizer(), Llm(template="chat"))


def test_a_chat_template_that_raises_is_refused_with_advice():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('one turn only') }}"
    with pytest.raises(UserError, match=r"set llm\.template to a text of your own: one turn only"):
        Prompt(tokenizer, Llm(template="chat"))


def test_prompts_are_drawn_by_seed_epoch_and_key():
    prompt = Prompt(byte_tokenizer(), Llm(training_prompts=["one. ", "two. ", "three. "]))
    drawn = [prompt.draw(0, epoch, f"key{i}") for epoch in range(3) for i in range(50)]
    assert drawn == [prompt.draw(0, epoch, f"key{i}") for epoch in range(3) for i in range(50)]
    assert {0, 1, 2} == set(drawn) and drawn[:50] != drawn[50:100]
    assert prompt.main.text == "USER: Transcribe speech to text. \n ASSISTANT:"
    assert {s.text for s in prompt.for_training} == {
        f"USER: {n}. \n ASSISTANT:" for n in ("one", "two", "three")
    }
