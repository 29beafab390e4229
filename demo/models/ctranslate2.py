"""Converts a Whisper model in CTranslate2's format to a folder that transformers can load.

`model.bin` is a little-endian file: a header, then the name, shape, dtype and data of each tensor. The names
are CTranslate2's own, and the projections of queries, keys and values are stacked in one matrix.
"""

import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slam_asr.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, WhisperConfig

_VERSION = 6
_ENGLISH_VOCABULARY = 51864
"""Number of tokens of an English-only Whisper. Multilingual ones have more."""
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
"""Patterns in CTranslate2's names and their replacements, which are applied one after the other."""
_STACKED = {
    ("self_attention", 0): ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attention", 1): ("self_attn", ("out_proj",)),
    ("attention", 0): ("encoder_attn", ("q_proj",)),
    ("attention", 1): ("encoder_attn", ("k_proj", "v_proj")),
    ("attention", 2): ("encoder_attn", ("out_proj",)),
}
"""(CTranslate2's block, number of its linear layer) → transformers' block, and the names of the matrices that
this layer stacks on axis 0."""


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a Whisper in CTranslate2's format.

    Args:
        path: `model.bin`.

    Returns:
        For each of CTranslate2's names, a read-only array in the shape and dtype of the file. Options such as
        the number of attention heads are arrays without dimensions.

    Raises:
        ModelError: the file is truncated, is not a Whisper in format version 6, or has a tensor whose dtype
            cannot be converted, such as bfloat16.
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
            # The length in the file includes the zero byte that ends the text.
            return exactly(number("H"))[:-1].decode(errors="replace")

        version = number("I")
        spec = string() if version == _VERSION else ""
        if spec != "WhisperSpec":
            raise ModelError(
                f"{path} is not a Whisper in CTranslate2's format version {_VERSION}: give another file."
            )
        # This skips the revision of WhisperSpec.
        number("I")
        variables = {}
        for _ in range(number("I")):
            name = string()
            shape = [number("I") for _ in range(number("B"))]
            code = number("B")
            if code not in _DTYPES:
                known = ", ".join(np.dtype(dtype).name for dtype in _DTYPES.values())
                raise ModelError(
                    f"{path} holds {name} with the dtype code {code}, which cannot be converted "
                    f"(only {known} can): give another file."
                )
            variables[name] = np.frombuffer(exactly(number("I")), _DTYPES[code]).reshape(shape)
        # The aliases at the end of the file are not read: `whisper_state` itself ties the output layer.
        return variables


def whisper_state(variables: dict[str, np.ndarray]) -> "dict[str, torch.Tensor]":
    """Rename and unstack the tensors for transformers' WhisperForConditionalGeneration.

    Whisper's key projections have no bias. CTranslate2 saves zeros for it; transformers has no such weight,
    so the zeros are dropped.

    Args:
        variables: the tensors by CTranslate2's names, from `read_variables`.

    Returns:
        The weights on the CPU by transformers' names, each in the dtype that it has in the file.
    """
    import torch

    state = {}
    for name, value in variables.items():
        # Arrays without dimensions are options, not weights.
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
    # Copied, because these views of the file's bytes are read-only, and torch warns about read-only arrays.
    return {name: torch.from_numpy(value.copy()) for name, value in state.items()}


def convert_whisper(weights: Path, source: Path, folder: Path) -> None:
    """Write transformers' files for a Whisper in CTranslate2's format. The weights' dtypes do not change.

    Args:
        weights: CTranslate2's `model.bin`.
        source: a folder with the model's `tokenizer.json`, and with CTranslate2's `config.json`, which lists
            the tokens that are never generated and the attention heads that align words with time.
        folder: an existing folder for the result.

    Raises:
        ModelError: the weights are truncated, are not a Whisper in format version 6, or have a dtype that
            cannot be converted; see `read_variables`.
    """
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    variables = read_variables(weights)
    tokenizer = (source / "tokenizer.json").read_bytes()
    ids = {token["content"]: token["id"] for token in json.loads(tokenizer)["added_tokens"]}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    special: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": start,
    }
    config = _config(variables, special)
    # On the meta device the model has no weights of its own, so `assign` inserts those of the file, in their
    # dtypes. The output layer and the embeddings are then two tensors, which `tie_weights` joins again.
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict(whisper_state(variables), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = _generation_config(
        config, special, ids, json.loads((source / "config.json").read_text(encoding="utf-8"))
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    settings = {
        "tokenizer_class": "WhisperTokenizer",
        "model_max_length": 1024,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _config(variables: dict[str, np.ndarray], special: dict[str, Any]) -> "WhisperConfig":
    """Derive the model's sizes from the tensors; `special` has the ids of the special tokens."""
    from transformers import WhisperConfig

    # The final norm, `decoder/layer_norm/gamma`, is named like a layer, but has only two slashes.
    layers = len({n.split("/")[1] for n in variables if n.startswith("decoder/layer_") and n.count("/") > 2})
    width, bins, _ = variables["encoder/conv1/weight"].shape
    heads = int(variables["encoder/num_heads"])
    return WhisperConfig(
        vocab_size=len(variables["decoder/embeddings/weight"]),
        num_mel_bins=bins,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        **special,
    )


def _generation_config(
    config: "WhisperConfig", special: dict[str, Any], ids: dict[str, int], hints: dict[str, Any]
) -> "GenerationConfig":
    """Translate CTranslate2's hints for decoding.

    Args:
        config: the model's configuration.
        special: ids of the special tokens, by transformers' names.
        ids: ids of all added tokens, by text.
        hints: content of CTranslate2's `config.json`.
    """
    from transformers import GenerationConfig

    english = config.vocab_size == _ENGLISH_VOCABULARY
    languages: dict[str, Any] = {}
    if not english:
        languages = {
            "lang_to_id": {token: i for token, i in ids.items() if i in hints["lang_ids"]},
            "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
            "task": "transcribe",
        }
    return GenerationConfig(
        **special,
        **languages,
        is_multilingual=not english,
        max_length=config.max_target_positions,
        suppress_tokens=hints["suppress_ids"],
        begin_suppress_tokens=hints["suppress_ids_begin"],
        alignment_heads=hints["alignment_heads"],
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_initial_timestamp_index=50,
        return_timestamps=False,
    )
