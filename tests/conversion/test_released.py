"""A released SLAM-LLM checkpoint, converted and decoded by two commands, gives the reference's texts."""

import json

import pytest
import torch

from slam_asr.cli import main
from tests.conftest import REFERENCE, require_reference


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("encoder", ["whisper", "wavlm"])
def test_texts_are_those_of_the_reference(tmp_path, monkeypatch, encoder, beams):
    require_reference()
    monkeypatch.setenv("SLAM_ASR_CACHE", str(tmp_path / "cache"))
    checkpoint = REFERENCE / f"model_{encoder}.pt"
    hidden = len(torch.load(checkpoint, weights_only=True)["encoder_projector.linear1.bias"])
    recipe = {"whisper": "whisper-large-v2-vicuna-7b", "wavlm": "wavlm-large-vicuna-7b"}[encoder]
    main(
        [
            "convert-checkpoint",
            "--checkpoint",
            str(checkpoint),
            "--recipe",
            recipe,
            "--encoder.name",
            str(REFERENCE / f"{encoder}.pt"),
            "--llm.name",
            str(REFERENCE / "llm"),
            "--projector.hidden",
            str(hidden),
            "--output",
            str(tmp_path / "model"),
        ]
    )
    main(
        [
            "decode",
            "--model",
            str(tmp_path / "model"),
            "--manifests",
            f"[{REFERENCE / 'manifest.jsonl'}]",
            "--output",
            str(tmp_path / "decoded"),
            "--decoding.precision",
            "fp32",
            "--decoding.beams",
            str(beams),
            "--decoding.max_new_tokens",
            "40",
            # One utterance at a time, as in the reference's results below.
            "--decoding.positions_per_batch",
            "1",
        ]
    )
    expected = json.loads((REFERENCE / "expected.json").read_text())[encoder]
    keys = [json.loads(line)["key"] for line in (REFERENCE / "manifest.jsonl").read_text().splitlines()]
    found = {
        h["key"]: h["hypothesis"]
        for h in map(json.loads, (tmp_path / "decoded/hypotheses.jsonl").read_text().splitlines())
    }
    assert found == {key: expected[f"text_beam{beams}_single_{i}"][0].strip() for i, key in enumerate(keys)}
