"""Every tensor of an original file is converted to transformers' name for it, or is named in an error.

The tests write files in fairseq's layout from the weights of transformers' own models. The converted models
must compute the same frames.
"""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperModel,
)

from slam_asr.config.recipe import Encoder
from slam_asr.errors import UserError
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.pretrained.original_checkpoints import convert_original, map_tensors, recognise
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from tests.conftest import REFERENCE, require_reference

LAYOUT = "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
STYLES = {
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}
KINDS = {
    "hubert": (HubertConfig, HubertModel),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    "wavlm": (WavLMConfig, WavLMModel),
}


def fairseq_names(model, style: str) -> dict[str, torch.Tensor]:
    """Return the weights of transformers' model under the names that fairseq gives them."""
    own = dict(model.state_dict())
    out = {"mask_emb": own.pop("masked_spec_embed")}
    for i in range(len(model.config.conv_dim)):
        at = f"feature_extractor.conv_layers.{i}"
        for kind in ("weight", "bias"):
            if f"{at}.conv.{kind}" in own:
                out[f"{at}.0.{kind}"] = own.pop(f"{at}.conv.{kind}")
            if f"{at}.layer_norm.{kind}" in own:
                norm = "2.1" if style == "large" else "2"
                out[f"{at}.{norm}.{kind}"] = own.pop(f"{at}.layer_norm.{kind}")
    for kind in ("weight", "bias"):
        out[f"layer_norm.{kind}"] = own.pop(f"feature_projection.layer_norm.{kind}")
        out[f"post_extract_proj.{kind}"] = own.pop(f"feature_projection.projection.{kind}")
        out[f"encoder.layer_norm.{kind}"] = own.pop(f"encoder.layer_norm.{kind}")
    out["encoder.pos_conv.0.bias"] = own.pop("encoder.pos_conv_embed.conv.bias")
    out["encoder.pos_conv.0.weight_g"] = own.pop(
        "encoder.pos_conv_embed.conv.parametrizations.weight.original0"
    )
    out["encoder.pos_conv.0.weight_v"] = own.pop(
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    )
    for i in range(model.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            at = f"encoder.layers.{i}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                out[f"{at}.self_attn.{part}.{kind}"] = own.pop(f"{at}.attention.{part}.{kind}")
            out[f"{at}.self_attn_layer_norm.{kind}"] = own.pop(f"{at}.layer_norm.{kind}")
            out[f"{at}.fc1.{kind}"] = own.pop(f"{at}.feed_forward.intermediate_dense.{kind}")
            out[f"{at}.fc2.{kind}"] = own.pop(f"{at}.feed_forward.output_dense.{kind}")
            out[f"{at}.final_layer_norm.{kind}"] = own.pop(f"{at}.final_layer_norm.{kind}")
            if f"{at}.attention.gru_rel_pos_linear.{kind}" in own:
                out[f"{at}.self_attn.grep_linear.{kind}"] = own.pop(
                    f"{at}.attention.gru_rel_pos_linear.{kind}"
                )
        if f"{at}.attention.gru_rel_pos_const" in own:
            out[f"{at}.self_attn.grep_a"] = own.pop(f"{at}.attention.gru_rel_pos_const")
        if f"{at}.attention.rel_attn_embed.weight" in own:
            out[f"{at}.self_attn.relative_attention_bias.weight"] = own.pop(
                f"{at}.attention.rel_attn_embed.weight"
            )
    assert not own
    return out


def random_model(kind: str, style: str, device: str = "cpu", **sizes):
    config, model = KINDS[kind]
    torch.manual_seed(2)
    with torch.device(device):
        return model(config(**{**SIZES, **sizes}, **STYLES[style])).eval()


def options(kind: str, style: str, layout: str = LAYOUT, heads: int = 4) -> dict:
    return {
        "_name": kind,
        "extractor_mode": "layer_norm" if style == "large" else "default",
        "conv_feature_layers": layout,
        "encoder_attention_heads": heads,
        "layer_norm_first": style == "large",
        "max_distance": 800,
    }


def fairseq_file(kind: str, style: str, model, tuned: bool = False, normalize: bool = True, **more) -> dict:
    """Return a checkpoint in the layout of fairseq or, for WavLM, of its authors."""
    tensors, width = fairseq_names(model, style), model.config.hidden_size
    device = next(iter(tensors.values())).device
    if kind == "wavlm":
        return {"cfg": options(kind, style, **more) | {"normalize": normalize}, "model": tensors}
    if tuned:
        tensors = {f"w2v_encoder.w2v_model.{n}": t for n, t in tensors.items()}
        tensors |= {
            "w2v_encoder.proj.weight": torch.zeros(32, width, device=device),
            "w2v_encoder.proj.bias": torch.zeros(32, device=device),
        }
        inner = {"model": options(kind, style, **more), "task": {"normalize": not normalize}}
        cfg = {
            "model": {"_name": f"{kind}_ctc", "w2v_args": inner, "normalize": normalize},
            "task": {"normalize": normalize},
        }
    else:
        heads = {
            "hubert": ("label_embs_concat", "final_proj.weight"),
            "wav2vec2": ("quantizer.vars", "project_q.weight", "final_proj.bias"),
        }
        tensors |= {n: torch.zeros(504, 3, device=device) for n in heads[kind]}
        cfg = {"model": options(kind, style, **more), "task": {"normalize": normalize}}
    return {"cfg": cfg, "args": None, "model": tensors, "optimizer_history": [{"lr": 1e-4}]}


def saved(content: dict, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("kind", "tuned"),
    [("hubert", False), ("hubert", True), ("wav2vec2", False), ("wav2vec2", True), ("wavlm", False)],
)
def test_converted_weights_compute_what_transformers_computes(tmp_path, kind, tuned, style):
    model = random_model(kind, style)
    file = saved(fairseq_file(kind, style, model, tuned), tmp_path / "file.pt")
    convert_original(file, tmp_path / "converted")
    spec = describe_encoder(Encoder(name=str(tmp_path / "converted")))
    assert spec.config.model_type == kind and spec.normalize
    encoder = spec.load(torch.float32)
    wave = np.random.default_rng(0).normal(0.1, 0.2, 9000).astype(np.float32)
    prepared = encoder.prepare(wave)
    expected = model(prepared.inputs[0][None]).last_hidden_state[0].detach()
    torch.testing.assert_close(encoder.encode([prepared])[0], expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tuned", [True, False])
def test_the_file_decides_about_normalisation(tmp_path, normalize, tuned):
    content = fairseq_file("hubert", "large", random_model("hubert", "large"), tuned, normalize)
    convert_original(saved(content, tmp_path / "file.pt"), tmp_path / "c")
    assert describe_encoder(Encoder(name=str(tmp_path / "c"))).normalize is normalize


def test_options_in_a_namespace_are_read(tmp_path):
    content = fairseq_file("wav2vec2", "large", random_model("wav2vec2", "large"))
    flat = content.pop("cfg")["model"] | {"normalize": True}
    content["args"] = argparse.Namespace(**flat, arch="wav2vec2")
    assert "wav2vec2" in convert_original(saved(content, tmp_path / "file.pt"), tmp_path / "c")


@pytest.mark.parametrize("form", ["pointer", "namespace inside", "old and tuned", "old and an empty new"])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_form_of_fairseqs_configuration_is_read(tmp_path, form, normalize):
    model = random_model("hubert", "large")
    content = fairseq_file("hubert", "large", model, form != "old and an empty new", normalize)
    flat = options("hubert", "large") | {"normalize": normalize}
    match form:
        case "pointer":
            content["cfg"] = {"model": content["cfg"]["model"] | {"normalize": "${task.normalize}"}}
            content["cfg"]["model"]["w2v_args"]["task"]["normalize"] = normalize
        case "namespace inside":
            content["cfg"]["model"]["w2v_args"] = argparse.Namespace(**flat)
        case "old and tuned":
            content["args"] = argparse.Namespace(
                w2v_args=argparse.Namespace(**flat), normalize=normalize, arch="hubert_ctc"
            )
            del content["cfg"]
        case "old and an empty new":
            content |= {"args": argparse.Namespace(**flat), "cfg": None}
    convert_original(saved(content, tmp_path / "file.pt"), tmp_path / "c")
    spec = describe_encoder(Encoder(name=str(tmp_path / "c")))
    assert (spec.config.model_type, spec.config.num_attention_heads, spec.normalize) == (
        "hubert",
        4,
        normalize,
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("encoder_layers", 3, r"encoder\.layers\.2\."),
        ("encoder_layers", 1, r"encoder\.layers\.1\."),
        ("encoder_embed_dim", 64, r"mask_emb is \(32,\).*\(64,\)"),
        ("encoder_ffn_embed_dim", 64, r"fc1\.weight is \(48, 32\).*\(64, 32\)"),
        ("conv_pos_groups", 8, r"weight_v is \(32, 8, 16\).*\(32, 4, 16\)"),
        ("conv_bias", False, r"conv_layers\.0\.0\.bias"),
        ("encoder_attention_heads", 5, "no model has the sizes"),
        ("encoder_attention_heads", "4", "expected int"),
        ("activation_fn", "tanh", "tanh"),
        ("conv_feature_layers", "[(16,10,5)]" + "*99" * 6, "99 times 99"),
        ("conv_feature_layers", "-" * 200_000 + "1", "200001 characters"),
    ],
)
def test_a_configuration_that_its_tensors_contradict_is_refused(tmp_path, option, value, message):
    content = fairseq_file("hubert", "large", random_model("hubert", "large"))
    content["cfg"]["model"][option] = value
    with pytest.raises(UserError, match=message) as raised:
        convert_original(saved(content, tmp_path / "file.pt"), tmp_path / "c")
    assert "\n" not in raised.value.args[0] and not (tmp_path / "c" / "config.json").exists()


@pytest.mark.parametrize("value", [3, "x", torch.ones(16, dtype=torch.int8)])
def test_a_weight_that_is_not_a_tensor_of_floats_is_named(tmp_path, value):
    content = fairseq_file("hubert", "large", random_model("hubert", "large"))
    content["model"]["layer_norm.weight"] = value
    with pytest.raises(UserError, match=r"'layer_norm\.weight'.*not a tensor of floats"):
        convert_original(saved(content, tmp_path / "file.pt"), tmp_path / "c")


@pytest.mark.parametrize("tuned", [True, False])
def test_every_tensor_of_hubert_x_large_is_mapped(tuned):
    layout = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
    sizes = {
        "hidden_size": 1280,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "conv_dim": [512] * 7,
        "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 16,
    }
    model = random_model("hubert", "large", "meta", **sizes)
    original = recognise(fairseq_file("hubert", "large", model, tuned, layout=layout, heads=16), "file")
    assert original.config.model_type == "hubert" and original.config.num_attention_heads == 16
    mapped = map_tensors(original, "file")
    assert {n: t.shape for n, t in mapped.items()} == {n: t.shape for n, t in model.state_dict().items()}
    # Published as 964 million parameters (Hsu et al., 2021, arXiv:2106.07447, table 1).
    assert sum(t.numel() for t in mapped.values()) == pytest.approx(964e6, rel=0.01)


@pytest.mark.parametrize("name", ["whisper", "wavlm"])
def test_reference_files_are_converted_by_the_stage(tmp_path, name):
    require_reference()
    for option, value in (("half", True), ("adapter", str(tmp_path)), ("to", "llm")):
        with pytest.raises(UserError, match=f"--{option}"):
            convert_checkpoint(str(REFERENCE / f"{name}.pt"), str(tmp_path / "c"), **{option: value})
    record = convert_checkpoint(str(REFERENCE / f"{name}.pt"), str(tmp_path / "c"))
    spec = describe_encoder(Encoder(name=record.folder))
    assert spec.config.model_type == name and spec.width == 48
    if name == "whisper":
        assert WhisperModel.from_pretrained(record.folder).config.decoder_layers == 1


@pytest.mark.parametrize("fault", ["missing", "left over", "shape", "nan"])
@pytest.mark.parametrize("kind", ["hubert", "whisper"])
def test_a_faulty_tensor_is_named(tmp_path, fault, kind):
    if kind == "whisper":
        require_reference()
        content = torch.load(REFERENCE / "whisper.pt", weights_only=True)
        tensors, name = content["model_state_dict"], "encoder.blocks.1.mlp.0.weight"
    else:
        content = fairseq_file(kind, "large", random_model(kind, "large"))
        tensors, name = content["model"], "encoder.layers.1.fc1.weight"
    expected = {
        "missing": r"layers\.1\.",
        "left over": "encoder.surprise",
        "shape": name,
        "nan": r"layers\.1\.",
    }[fault]
    match fault:
        case "missing":
            del tensors[name]
        case "left over":
            tensors["encoder.surprise"] = torch.ones(2)
        case "shape":
            tensors[name] = tensors[name][:-1]
        case "nan":
            tensors[name] = tensors[name].clone().index_fill_(0, torch.tensor(1), torch.nan)
    with pytest.raises(UserError, match=expected) as raised:
        convert_original(saved(content, tmp_path / "file.pt"), tmp_path / "c")
    assert "\n" not in raised.value.args[0] and not (tmp_path / "c" / "config.json").exists()


@pytest.mark.parametrize(
    "content",
    [{"model": {}}, [1, 2], {"cfg": {}, "model": {"w": torch.ones(1)}}, {"dims": {}, "model_state_dict": {}}],
)
def test_other_files_are_refused(tmp_path, content):
    with pytest.raises(UserError, match="not a checkpoint"):
        convert_original(saved(content, tmp_path / "file.pt"), tmp_path / "c")


def test_the_layout_of_convolutions_is_parsed_not_run(tmp_path):
    content = fairseq_file("hubert", "large", random_model("hubert", "large"))
    content["cfg"]["model"]["conv_feature_layers"] = (
        f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"
    )
    with pytest.raises(UserError, match="lacks a part of an encoder, or describes one wrongly"):
        convert_original(saved(content, tmp_path / "file.pt"), tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_an_original_file_serves_as_an_encoder_and_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLAM_ASR_CACHE", str(tmp_path / "cache"))
    file = saved(fairseq_file("hubert", "large", random_model("hubert", "large")), tmp_path / "file.pt")
    first = describe_encoder(Encoder(name=str(file)))
    times = {f: f.stat().st_mtime_ns for f in first.folder.iterdir()}
    again = describe_encoder(Encoder(name=str(file)))
    assert times == {f: f.stat().st_mtime_ns for f in again.folder.iterdir()}
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        describe_encoder(Encoder(name=str(file)))


def whisper_file(width: int, text_width: int) -> dict:
    """Return a checkpoint in the layout of OpenAI's Whisper, with one layer each in encoder and decoder."""
    dims = {
        "n_mels": 80,
        "n_audio_ctx": 1500,
        "n_audio_state": width,
        "n_audio_layer": 1,
        "n_audio_head": 2,
        "n_vocab": 32,
        "n_text_ctx": 8,
        "n_text_state": text_width,
        "n_text_layer": 1,
        "n_text_head": 2,
    }
    block = {
        f"attn.{part}.{kind}": (width, width) if kind == "weight" else (width,)
        for part in ("query", "key", "value", "out")
        for kind in ("weight", "bias")
        if (part, kind) != ("key", "bias")
    }
    block |= {f"{norm}.{kind}": (width,) for norm in ("attn_ln", "mlp_ln") for kind in ("weight", "bias")}
    block |= {"mlp.0.weight": (4 * width, width), "mlp.0.bias": (4 * width,)}
    block |= {"mlp.2.weight": (width, 4 * width), "mlp.2.bias": (width,)}
    shapes = {f"encoder.blocks.0.{name}": shape for name, shape in block.items()} | {
        "encoder.positional_embedding": (1500, width),
        "encoder.conv1.weight": (width, 80, 3),
        "encoder.conv1.bias": (width,),
        "encoder.conv2.weight": (width, width, 3),
        "encoder.conv2.bias": (width,),
        "encoder.ln_post.weight": (width,),
        "encoder.ln_post.bias": (width,),
        "decoder.token_embedding.weight": (32, text_width),
        "decoder.blocks.0.mlp.0.weight": (4 * text_width, text_width),
    }
    torch.manual_seed(4)
    return {"dims": dims, "model_state_dict": {name: torch.randn(shape) for name, shape in shapes.items()}}


def test_a_whisper_whose_decoder_has_another_width_gives_its_encoder(tmp_path):
    content = whisper_file(width=16, text_width=24)
    line = convert_original(saved(content, tmp_path / "file.pt"), tmp_path / "c")
    assert "without 2 tensors" in line
    spec = describe_encoder(Encoder(name=str(tmp_path / "c")))
    spec.require_weights()
    weights = spec.load(torch.float32).model.state_dict()
    for ours, theirs in {"conv2.weight": "conv2.weight", "layers.0.fc1.bias": "blocks.0.mlp.0.bias"}.items():
        assert torch.equal(weights[ours], content["model_state_dict"][f"encoder.{theirs}"])
    assert spec.width == 16
