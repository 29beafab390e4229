"""Both readers give the same features, and handle audio longer than the encoder's window as configured."""

import numpy as np
import pytest
import torch

from slam_asr.artifacts.feature_store.index import to_array
from slam_asr.artifacts.feature_store.reader import AudioReader
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.utterances import fit_to_window, read_rows, samples_of, save_rows
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.feature_dtype import round_trip
from slam_asr.stages.extract_features import extract_features
from slam_asr.storage import sha256_of_file
from tests.conftest import make_tone, write_wav
from tests.utterances import write_manifest


@pytest.fixture
def utterances(tmp_path):
    utterances = []
    for seconds in (2.0, 30.0, 31.5):
        wav = write_wav(tmp_path / f"{seconds}.wav", make_tone(seconds, frequency=200 + seconds))
        utterances.append(
            Utterance(f"tone of {seconds} s", str(wav), "text", seconds, 16000, sha256_of_file(wav))
        )
    return utterances


def recipe(tiny_models, choice, frames="speech", dtype="fp32", shard_megabytes=512):
    return load_recipe(
        "librispeech",
        {
            "encoder.name": tiny_models["encoder"],
            "encoder.long_audio": choice,
            "encoder.frames": frames,
            "features.dtype": dtype,
            "features.shard_megabytes": shard_megabytes,
        },
    )


@pytest.mark.parametrize(
    ("choice", "frames"),
    [("cut", [100, 1500, 1500]), ("split", [100, 1500, 1575]), ("set-aside", [100, 1500])],
)
def test_long_audio_is_cut_split_or_skipped(tiny_models, utterances, tmp_path, capsys, choice, frames):
    options = recipe(tiny_models, choice)
    write_manifest(tmp_path / "m.jsonl", utterances)
    store = FeatureStore(
        extract_features(options, [str(tmp_path / "m.jsonl")], str(tmp_path / "store")).folder
    )
    logged = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "longer than the encoder's 30-s window" in line
    ]
    assert (
        len(logged) == 1
        and logged[0].startswith("1 of 3 utterances")
        and f"encoder.long_audio: {choice}" in logged[0]
    )
    fitting = fit_to_window(utterances, describe_encoder(options.encoder))
    assert (
        [store.index.entry(store.find(u.audio_id)).frames for u in fitting]
        == frames
        == [store.span(u) for u in fitting]
    )


@pytest.mark.parametrize("choice", ["cut", "split"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_audio_files_give_the_same_features_as_the_store(tiny_models, utterances, tmp_path, choice, dtype):
    options = recipe(tiny_models, choice, dtype=dtype)
    write_manifest(tmp_path / "m.jsonl", utterances)
    store = FeatureStore(
        extract_features(options, [str(tmp_path / "m.jsonl")], str(tmp_path / "store")).folder
    )
    spec = describe_encoder(options.encoder)
    encoder = spec.load(torch.float32)
    reader = AudioReader(spec, options.features)
    for utterance in utterances:
        assert reader.span(utterance) == store.span(utterance)
        from_audio = round_trip(encoder.encode([reader.read(utterance)])[0], dtype)
        # The batches differ, so sums may differ in their last bit, and may then be rounded to another value.
        error = {"fp32": 1e-5, "bf16": 2**-7, "fp8": 2**-3}[dtype]
        torch.testing.assert_close(from_audio, store.read(utterance), atol=error, rtol=error)


def test_both_readers_divide_utterances_into_the_same_shards(tiny_models, tmp_path):
    options = recipe(tiny_models, "cut", "all", shard_megabytes=1)
    files = [write_wav(tmp_path / f"{i}.wav", make_tone(0.3, frequency=200 + 9 * i)) for i in range(25)]
    many = [
        Utterance(f"k{i}", str(wav), "text", 0.3, 16000, sha256_of_file(wav)) for i, wav in enumerate(files)
    ]
    write_manifest(tmp_path / "m.jsonl", many)
    store = FeatureStore(
        extract_features(options, [str(tmp_path / "m.jsonl")], str(tmp_path / "store")).folder
    )
    audio_ids, samples = to_array([u.audio_id for u in many]), np.full(25, 4800)
    groups = []
    for reader in (store, AudioReader(describe_encoder(options.encoder), options.features)):
        numbers = reader.shards_of(audio_ids, samples)
        assert len(set(numbers)) == 3
        groups.append({frozenset(np.flatnonzero(numbers == n)) for n in set(numbers)})
    assert groups[0] == groups[1]


def test_skipping_all_audio_is_refused(tiny_models, utterances):
    spec = describe_encoder(recipe(tiny_models, "set-aside").encoder)
    with pytest.raises(UserError, match="All 1 utterances are longer"):
        fit_to_window(utterances[2:], spec)


def test_without_durations_lengths_come_from_the_files(utterances):
    for utterance in utterances:
        samples = samples_of(utterance)
        utterance.duration = None
        assert samples_of(utterance) == samples


def test_other_processes_get_the_rows_and_repeat_no_warning(utterances, tiny_models, tmp_path, capsys):
    spec = describe_encoder(recipe(tiny_models, "set-aside").encoder)
    fitting = fit_to_window(utterances, spec)
    assert capsys.readouterr().out.count("longer than the encoder's") == 1
    elsewhere = read_rows(utterances, save_rows(tmp_path / "rows.npy", fitting))
    assert list(elsewhere) == list(fitting) == utterances[:2]
    assert list(fit_to_window(utterances, spec, quiet=True)) == list(fitting)
    assert capsys.readouterr().out == ""
    all_fit = fit_to_window(utterances[:2], spec)
    assert save_rows(tmp_path / "none.npy", all_fit) is None and read_rows(all_fit, None) is all_fit
