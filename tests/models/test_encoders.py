"""Every encoder gives the same frames alone and in a batch, and normalises as its checkpoint requires."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    HubertConfig,
    HubertForCTC,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from slam_asr.config.recipe import Encoder
from slam_asr.errors import UserError
from slam_asr.models.encoders.registry import describe_encoder
from tests.damage import damage

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 12,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
}
STYLES = {
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}
SECONDS = (0.31, 2.0, 0.9, 1.37)


def write_waveform_model(folder, kind: str, style: str, normalize: bool = True):
    torch.manual_seed(1)
    AutoModel.from_config(CONFIG_MAPPING[kind](**SMALL, **STYLES[style])).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=style == "large").save_pretrained(
        folder
    )
    return folder


def write_whisper(folder, mel_bins: int = 80):
    torch.manual_seed(1)
    config = WhisperConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_target_positions=8,
        num_mel_bins=mel_bins,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    WhisperModel(config).save_pretrained(folder)
    return folder


def waves(seconds=SECONDS):
    generator = np.random.default_rng(0)
    # The waves differ in loudness and are not centred, so normalisation changes them.
    return [
        (0.3 * (i + 1) * generator.normal(0.1, 0.1, round(16000 * s))).astype(np.float32)
        for i, s in enumerate(seconds)
    ]


def load(folder, **options):
    spec = describe_encoder(Encoder(name=str(folder), **options))
    return spec, spec.load(torch.float32)


@pytest.fixture(
    params=[f"{k}-{s}" for k in ("wavlm", "hubert", "wav2vec2") for s in STYLES]
    + ["whisper-80", "whisper-128"]
)
def model(request, tmp_path):
    kind, style = request.param.split("-")
    return (
        write_whisper(tmp_path / "m", int(style))
        if kind == "whisper"
        else write_waveform_model(tmp_path / "m", kind, style)
    )


def test_a_batch_of_unequal_lengths_gives_the_frames_of_each_alone(model):
    spec, encoder = load(model, frames="speech")
    prepared = [encoder.prepare(w) for w in waves()]
    for together, one, wave in zip(encoder.encode(prepared), prepared, waves(), strict=True):
        assert together.shape == (spec.frames_of(len(wave)), spec.width)
        torch.testing.assert_close(together, encoder.encode([one])[0], atol=1e-5, rtol=1e-5)


def test_one_utterance_gives_the_frames_of_transformers(model):
    wave = waves()[3]
    spec, encoder = load(model)
    complete = AutoModel.from_pretrained(model).eval()
    if spec.config.model_type == "whisper":
        mel = WhisperFeatureExtractor(feature_size=spec.config.num_mel_bins)(
            wave, sampling_rate=16000, return_tensors="pt"
        )
        expected = complete.encoder(mel.input_features).last_hidden_state[0]
    else:
        expected = complete(
            Wav2Vec2FeatureExtractor(do_normalize=True)(
                wave, sampling_rate=16000, return_tensors="pt"
            ).input_values
        )
        expected = expected.last_hidden_state[0]
    # transformers normalises with an epsilon of 1e-7, fairseq with 1e-5.
    torch.testing.assert_close(
        encoder.encode([encoder.prepare(wave)])[0], expected.detach(), atol=5e-3, rtol=1e-3
    )


@pytest.mark.parametrize("samples", [399, 400, 719, 720, 16000, 16320, 31999])
def test_frames_are_counted_without_weights(model, samples):
    spec, encoder = load(model, frames="speech")
    frames = encoder.encode([encoder.prepare(waves((samples / 16000,))[0])])[0]
    assert len(frames) == spec.frames_of(samples)
    assert spec.span_of(samples) - len(frames) in (0, 1) or samples < 400
    if spec.config.model_type == "whisper":
        assert len(frames) == math.ceil(samples / 320)


def test_parameters_are_counted_without_weights(model):
    spec, encoder = load(model)
    assert spec.count_parameters() == sum(p.numel() for p in encoder.parameters())


def test_the_checkpoint_decides_about_normalisation(tmp_path):
    wave = waves()[1]
    for normalize in (True, False):
        _, encoder = load(write_waveform_model(tmp_path / str(normalize), "wavlm", "large", normalize))
        prepared = encoder.prepare(wave).inputs[0]
        assert (abs(float(prepared.mean())) < 1e-3 and abs(float(prepared.std()) - 1) < 1e-2) == normalize
        assert torch.equal(prepared, torch.from_numpy(wave)) != normalize


def test_a_checkpoint_that_does_not_state_normalisation_is_refused(tmp_path):
    folder = write_waveform_model(tmp_path / "m", "hubert", "large")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="does not state whether the encoder needs normalised waveforms"):
        describe_encoder(Encoder(name=str(folder))).fingerprint()


def test_the_head_of_a_fine_tuned_checkpoint_is_dropped(tmp_path):
    torch.manual_seed(1)
    tuned = HubertForCTC(HubertConfig(**SMALL, **STYLES["large"])).eval()
    tuned.save_pretrained(tmp_path / "ctc")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "ctc")
    _, encoder = load(tmp_path / "ctc")
    prepared = encoder.prepare(waves()[0])
    expected = tuned.hubert(prepared.inputs[0][None]).last_hidden_state[0].detach()
    torch.testing.assert_close(encoder.encode([prepared])[0], expected)


def test_long_audio_is_cut_or_split(tmp_path):
    folder, wave = write_whisper(tmp_path / "m"), waves((37.0,))[0]
    spec, encoder = load(folder, frames="speech")
    cut = encoder.encode([encoder.prepare(wave)])[0]
    assert len(cut) == 1500 == spec.frames_of(len(wave)) and spec.is_too_long(len(wave))
    spec, encoder = load(folder, frames="speech", long_audio="split")
    split = encoder.encode([encoder.prepare(wave)])[0]
    assert len(split) == 37 * 50 == spec.frames_of(len(wave))
    torch.testing.assert_close(split[:1500], cut)
    torch.testing.assert_close(split[1500:], encoder.encode([encoder.prepare(wave[480_000:])])[0])


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "cut"])
def test_damaged_weights_are_refused_in_one_sentence(tmp_path, fault):
    folder = write_waveform_model(tmp_path / "m", "wavlm", "large")
    file = folder / "model.safetensors"
    name = "encoder.layers.1.feed_forward.intermediate_dense.weight"
    damage(file, name, fault)
    with pytest.raises(UserError, match="cannot be loaded" if fault == "cut" else name) as raised:
        load(folder)
    assert "\n" not in raised.value.args[0] and len(str(raised.value)) < 400


def test_an_encoder_in_training_mode_masks_nothing_and_drops_no_layer(tmp_path):
    _, encoder = load(write_waveform_model(tmp_path / "m", "wavlm", "large"))
    encoder.train()
    prepared = [encoder.prepare(w) for w in waves()]
    first = encoder(prepared)
    for again in (encoder(prepared), encoder(prepared)):
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(a, b)
