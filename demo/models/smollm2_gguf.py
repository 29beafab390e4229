"""Converts SmolLM2 from llama.cpp's GGUF format to a folder that transformers can load.

The 4-bit weights are dequantized once, and the tokenizer is built from the vocabulary in the GGUF file.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slam_asr.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerFast

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""GGUF's token type for control tokens such as `<|im_start|>`."""


def require_gguf() -> None:
    """Check that GGUF files can be read. Call this before the download.

    Raises:
        ModelError: the package that reads GGUF is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "Reading SmolLM2 from GGUF needs the package gguf: pip install 'slam-asr[small-models]'."
        ) from error


def convert_smollm2(weights: Path, source: Path, folder: Path) -> None:
    """Write transformers' files for a SmolLM2 model in GGUF.

    Weights are saved in float16, whose 11 significant bits round a weight by at most 0.05 %. That is far less
    than the error of the 4-bit quantisation, and less than that of rounding to bfloat16 when the model runs.

    Args:
        weights: the `.gguf` file.
        source: the unpacked folder of the wheel. It is not used, because a GGUF file contains everything.
        folder: an existing folder for the result.
    """
    import torch
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaForCausalLM

    reader = GGUFReader(weights)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    special = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    state = _state(reader, fields)
    tied = "lm_head.weight" not in state
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    # On the meta device the model has no weights of its own, so `assign` inserts those of the file.
    with torch.device("meta"):
        model = LlamaForCausalLM(_config(fields, special, tied))
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    _tokenizer(fields, special).save_pretrained(folder)


def _state(reader: "GGUFReader", fields: dict[str, Any]) -> "dict[str, torch.Tensor]":
    """Dequantize the weights; return them in float16 by transformers' names, on the CPU."""
    import torch
    from gguf.quants import dequantize

    state = {}
    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            value = _unpermute(value, fields["llama.attention.head_count"])
        elif tensor.name.endswith("attn_k.weight"):
            value = _unpermute(value, fields["llama.attention.head_count_kv"])
        # Copied, because for float32 tensors `dequantize` returns a read-only view of the file, and torch
        # warns about read-only arrays.
        state[_transformers_name(tensor.name)] = torch.from_numpy(value.copy()).half()
    return state


def _config(fields: dict[str, Any], special: dict[str, Any], tied: bool) -> "LlamaConfig":
    """Translate the sizes to the configuration of a Llama.

    Args:
        fields: the header of the GGUF file.
        special: ids of the special tokens, by transformers' names.
        tied: whether the output layer and the embeddings are one tensor.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        # GGUF holds 1e-5 as a float32. Rounding restores the decimal number.
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        **special,
    )


def _transformers_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{_NAMES[part]}.{kind}"
    part, kind = name.split(".")
    return f"{_NAMES[part]}.{kind}"


def _unpermute(rows: "np.ndarray", heads: int) -> "np.ndarray":
    """Undo llama.cpp's order of the rows of a query or key projection.

    Rotary embeddings rotate pairs of dimensions. llama.cpp pairs neighbouring rows of each head; transformers
    pairs row i of the head's first half with row i of its second half.

    Args:
        rows: [heads · head width, input width], in llama.cpp's order.
        heads: number of query heads, or of key heads.

    Returns:
        The rows in transformers' order, in the same shape and dtype.
    """
    # Row 2i + j of a head becomes row j · head width / 2 + i, where j is 0 or 1.
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(fields: dict[str, Any], special: dict[str, Any]) -> "PreTrainedTokenizerFast":
    """Build SmolLM2's byte-level BPE. Every digit is its own token; no special token is added to a text.

    Args:
        fields: the header of the GGUF file, which contains the vocabulary.
        special: ids of the special tokens, by transformers' names.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=fields["llama.context_length"],
        bos_token=tokens[special["bos_token_id"]],
        eos_token=tokens[special["eos_token_id"]],
        pad_token=tokens[special["pad_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
