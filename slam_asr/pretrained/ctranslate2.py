"""Converts a Whisper in CTranslate2's format to a folder that transformers loads.

`model.bin` is a little-endian file: a header, then the name, shape, type and data of each tensor. The names
are CTranslate2's own, and the projections of queries, keys and values are stacked in one matrix.
"""

import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slam_asr.errors import ModelError

if TYPE_CHECKING:
    import torch

_VERSION = 6
_ENGLISH_VOCABULARY = 51864
"""Multilingual Whispers have more tokens."""
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_NAMES = [
    (r"position_encodings/encodings$", "embed_positions.weight"),
    (r"^decoder/embeddings/weight$", "decoder/embed_tokens.weight"),
    (r"self_attention/layer_norm/", "self_attn_layer_norm/"),
    (r"(?<=/)attention/layer_norm/", "encoder_attn_layer_norm/"),
    (r"ffn/layer_norm/", "final_layer_norm/"),
    (r"ffn/linear_0/", "fc1/"),
    (r"ffn/linear_1/", "fc2/"),
    (r"/gamma$", "/weight"),
    (r"/beta$", "/bias"),
    (r"layer_(\d+)/", r"layers/\1/"),
]
_STACKED = {
    ("self_attention", 0): ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attention", 1): ("self_attn", ("out_proj",)),
    ("attention", 0): ("encoder_attn", ("q_proj",)),
    ("attention", 1): ("encoder_attn", ("k_proj", "v_proj")),
    ("attention", 2): ("encoder_attn", ("out_proj",)),
}
"""(CTranslate2's block, number of its linear) → transformers' block and the matrices stacked on axis 0."""


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a CTranslate2 Whisper, by CTranslate2's names.

    Raises:
        ModelError: the file is truncated, or is not a Whisper of format version 6.
    """
    with open(path, "rb") as file:

        def number(code: str) -> int:
            return struct.unpack(f"<{code}", exactly(struct.calcsize(code)))[0]

        def exactly(size: int) -> bytes:
            data = file.read(size)
            if len(data) != size:
                raise ModelError(f"{path} ends too early for a CTranslate2 model: fetch it again.")
            return data

        def string() -> str:
            return exactly(number("H"))[:-1].decode(errors="replace")

        version = number("I")
        spec = string() if version == _VERSION else ""
        if spec != "WhisperSpec":
            raise ModelError(
                f"{path} is not a Whisper in CTranslate2's format version {_VERSION}: give another file."
            )
        number("I")
        variables = {}
        for _ in range(number("I")):
            name = string()
            shape = [number("I") for _ in range(number("B"))]
            dtype = _DTYPES[number("B")]
            variables[name] = np.frombuffer(exactly(number("I")), dtype).reshape(shape)
        return variables


def whisper_state(variables: dict[str, np.ndarray]) -> "dict[str, torch.Tensor]":
    """Rename and unstack the tensors for transformers' WhisperForConditionalGeneration; dtypes are unchanged.

    Whisper's keys have no bias: CTranslate2 saves zeros for it, transformers has no such weight.
    """
    import torch

    state = {}
    for name, value in variables.items():
        if value.ndim == 0:
            continue
        stacked = re.fullmatch(
            r"(\w+)/layer_(\d+)/(self_attention|attention)/linear_(\d)/(weight|bias)", name
        )
        if stacked:
            side, layer, block, linear, kind = stacked.groups()
            block, parts = _STACKED[block, int(linear)]
            for part, rows in zip(parts, np.split(value, len(parts)), strict=True):
                if (part, kind) != ("k_proj", "bias"):
                    state[f"model.{side}.layers.{layer}.{block}.{part}.{kind}"] = rows
            continue
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        state["model." + name.replace("/", ".")] = value
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return {name: torch.from_numpy(value.copy()) for name, value in state.items()}


def convert_whisper(weights: Path, tokenizer: Path, hints: Path, folder: Path) -> None:
    """Write a folder with transformers' files for a CTranslate2 Whisper.

    Args:
        weights: `model.bin`.
        tokenizer: its `tokenizer.json`.
        hints: CTranslate2's `config.json`: tokens that are never generated, and attention heads that align
            words with time.
        folder: an existing folder for the result. The weights' dtypes are unchanged.
    """
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    variables = read_variables(weights)
    state = whisper_state(variables)
    generation = json.loads(hints.read_text())
    ids = {token["content"]: token["id"] for token in json.loads(tokenizer.read_text())["added_tokens"]}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    layers = len({n.split("/")[1] for n in variables if n.startswith("decoder/layer_") and n.count("/") > 2})
    width, bins, _ = variables["encoder/conv1/weight"].shape
    heads, feed_forward = int(variables["encoder/num_heads"]), 4 * width
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    config = WhisperConfig(
        vocab_size=len(variables["decoder/embeddings/weight"]),
        num_mel_bins=bins,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=feed_forward,
        decoder_ffn_dim=feed_forward,
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        **special,
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    english = config.vocab_size == _ENGLISH_VOCABULARY
    languages = (
        {}
        if english
        else {
            "lang_to_id": {token: i for token, i in ids.items() if i in generation["lang_ids"]},
            "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
            "task": "transcribe",
        }
    )
    model.generation_config = GenerationConfig(
        **special,
        **languages,
        is_multilingual=not english,
        max_length=config.max_target_positions,
        suppress_tokens=generation["suppress_ids"],
        begin_suppress_tokens=generation["suppress_ids_begin"],
        alignment_heads=generation["alignment_heads"],
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_initial_timestamp_index=50,
        return_timestamps=False,
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=bins).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "WhisperTokenizer",
                "model_max_length": 1024,
                "add_prefix_space": False,
                **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
            },
            indent=2,
        )
    )
