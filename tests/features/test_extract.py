"""Extraction: frames as the recipe says, the same audio once, and nothing lost to an interruption."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from slam_asr.errors import UserError
from slam_asr.features.extract import extract_features
from slam_asr.features.store import FeatureStore
from slam_asr.manifest import Utterance, write_manifest
from slam_asr.models.encoder import describe_encoder
from slam_asr.recipe import load_recipe
from slam_asr.storage import sha256_of_file
from tests.conftest import make_tone, write_wav

LENGTHS = (0.1, 0.73, 1.0, 2.345)


@pytest.fixture
def manifest(tmp_path):
    utterances = []
    for i, seconds in enumerate(LENGTHS):
        wav = write_wav(tmp_path / f"{i}.wav", make_tone(seconds, frequency=200 + 50 * i))
        utterances.append(Utterance(f"k{i}", str(wav), "text", round(seconds * 16000) / 16000, 16000, sha256_of_file(wav)))
    again = dataclasses.replace(utterances[0], key="the same audio again")
    write_manifest(tmp_path / "manifest.jsonl", [*utterances, again])
    return tmp_path / "manifest.jsonl", utterances


def recipe(tiny_models, **overrides):
    return load_recipe("librispeech", {"encoder.name": tiny_models["encoder"], "features.dtype": "fp32", **overrides})


@pytest.mark.parametrize("frames", ["all", "speech"])
def test_frames_are_the_window_or_the_speech(tiny_models, manifest, tmp_path, frames):
    record = extract_features(recipe(tiny_models, **{"encoder.frames": frames}), [str(manifest[0])], str(tmp_path / "store"))
    store = FeatureStore(record.folder)
    assert len(store.index.entries) == len(LENGTHS)
    for utterance in manifest[1]:
        samples = round(utterance.duration * 16000)
        assert store.entry(utterance.sha256).frames == (1500 if frames == "all" else math.ceil(samples / 320))


def test_speech_frames_are_the_first_of_the_whole_window(tiny_models, manifest, tmp_path):
    stores = [
        FeatureStore(extract_features(recipe(tiny_models, **{"encoder.frames": f}), [str(manifest[0])], str(tmp_path / f)).folder)
        for f in ("all", "speech")
    ]
    for utterance in manifest[1]:
        whole, speech = (s.read(utterance.sha256) for s in stores)
        torch.testing.assert_close(whole[: len(speech)], speech)


def test_a_batch_gives_what_each_utterance_gives_alone(tiny_models, manifest, tmp_path):
    options = recipe(tiny_models, **{"encoder.batch_size": 4})
    store = FeatureStore(extract_features(options, [str(manifest[0])], str(tmp_path / "store")).folder)
    encoder = describe_encoder(options.encoder).load(torch.float32)
    for utterance in manifest[1]:
        from slam_asr.audio import load_audio

        wave = load_audio(utterance.source)
        alone = encoder.encode([encoder.prepare(wave)])[0]
        torch.testing.assert_close(store.read(utterance.sha256), alone, rtol=1e-4, atol=1e-5)


def test_shards_finished_before_an_interruption_are_kept(tiny_models, manifest, tmp_path, monkeypatch):
    from slam_asr.features import extract

    options = recipe(tiny_models, **{"encoder.frames": "all", "encoder.batch_size": 1})
    # 1 MB holds ten windows of the tiny encoder: four utterances in shards of one each.
    monkeypatch.setattr(extract, "plan_shards", lambda sizes, _, made_by: plan(sizes, 100_000, made_by))
    from slam_asr.features.store import plan_shards as plan

    done = []

    def dying(path, tensors):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        write(path, tensors)

    write = extract.write_shard
    monkeypatch.setattr(extract, "write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        extract_features(options, [str(manifest[0])], str(tmp_path / "store"))
    with pytest.raises(UserError, match="holds no feature store"):
        FeatureStore(tmp_path / "store")
    times = {p: p.stat().st_mtime_ns for p in done}
    monkeypatch.setattr(extract, "write_shard", write)
    record = extract_features(options, [str(manifest[0])], str(tmp_path / "store"))
    assert times == {p: p.stat().st_mtime_ns for p in done}
    whole = extract_features(options, [str(manifest[0])], str(tmp_path / "uninterrupted"))
    assert json.loads(record.file("index.json").read_text()) == json.loads(whole.file("index.json").read_text())


def test_audio_that_changed_under_its_manifest_is_refused(tiny_models, manifest, tmp_path):
    write_wav(tmp_path / "2.wav", np.zeros(16000, np.float32))
    with pytest.raises(UserError, match=r"2\.wav was changed since"):
        extract_features(recipe(tiny_models), [str(manifest[0])], str(tmp_path / "store"))


def test_audio_that_went_away_is_named(tiny_models, manifest, tmp_path):
    (tmp_path / "2.wav").unlink()
    with pytest.raises(UserError, match=r"There is no audio file .*2\.wav"):
        extract_features(recipe(tiny_models), [str(manifest[0])], str(tmp_path / "store"))


def test_audio_that_changed_is_extracted_again_where_the_manifest_has_no_digests(tiny_models, manifest, tmp_path):
    plain = tmp_path / "plain.jsonl"
    write_manifest(plain, [dataclasses.replace(u, sha256=None, duration=None) for u in manifest[1]])
    output = str(tmp_path / "{fingerprint}")
    before = extract_features(recipe(tiny_models), [str(plain)], output)
    write_wav(tmp_path / "2.wav", make_tone(0.5))
    after = extract_features(recipe(tiny_models), [str(plain)], output)
    assert before.folder != after.folder


def test_damaged_weights_are_one_sentence(tiny_models, manifest, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_models["encoder"], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        extract_features(recipe(tiny_models, **{"encoder.name": str(broken)}), [str(manifest[0])], str(tmp_path / "s"))


def test_a_folder_of_manifests_means_all_three_here_and_the_test_set_in_decoding(tmp_path, tiny_recipe, tiny_corpus):
    from slam_asr.corpora.build import build_manifest
    from slam_asr.features.extract import manifest_files

    built = build_manifest(load_recipe(str(tiny_recipe)), str(tiny_corpus), str(tmp_path / "m"))
    assert [f.name for f in manifest_files([built.folder])] == ["train.jsonl", "dev.jsonl", "test.jsonl"]
    assert [f.name for f in manifest_files([built.folder], ("test.jsonl",))] == ["test.jsonl"]
    built.file("stage.json").unlink()
    with pytest.raises(UserError, match="no finished build-manifest"):
        manifest_files([built.folder])


def test_an_encoder_of_another_kind_is_refused_by_name(tiny_models, manifest, tmp_path):
    with pytest.raises(UserError, match="a model of type llama; supported encoders: whisper"):
        extract_features(recipe(tiny_models, **{"encoder.name": tiny_models["llm"]}), [str(manifest[0])], str(tmp_path / "s"))
