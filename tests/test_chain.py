"""All six programs together train a model that knows four real utterances by heart."""

import json
import subprocess
import sys

import pytest

from slam_asr.artifacts.stage_record import read_record

UTTERANCES, STEPS = 4, 90
OVERRIDES = [
    "--training.max_steps",
    str(STEPS),
    "--training.epochs",
    "1000",
    "--training.learning_rate",
    "1e-3",
    "--training.positions_per_step",
    "120",
    "--training.positions_per_batch",
    "120",
    "--training.warmup_steps",
    "10",
    "--training.schedule",
    "linear",
    "--training.validate_every",
    "1000",
]


def program(stage, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "slam_asr", stage, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def short_utterances(libri_mini):
    """Yield manifest lines of utterances that last 2 to 4.5 s."""
    import soundfile

    for transcript in sorted(libri_mini.glob("train-clean-100/*/*/*.trans.txt")):
        for line in transcript.read_text().splitlines():
            key, text = line.split(" ", 1)
            audio = transcript.parent / f"{key}.flac"
            if 2 <= soundfile.info(audio).duration <= 4.5:
                yield {"key": key, "source": str(audio), "target": text}


@pytest.mark.slow
def test_a_model_trained_by_all_stages_knows_four_utterances_by_heart(libri_mini, tmp_path):
    chosen = [u for u, _ in zip(short_utterances(libri_mini), range(UTTERANCES), strict=False)]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    # The test set is the train set under other keys; features are looked up by audio, so they are shared.
    for split, rows in (("train", chosen), ("dev", chosen[:4]), ("test", chosen)):
        lines = [json.dumps(u | {"key": f"{split}-{u['key']}"}) for u in rows]
        (corpus / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    common = ["--recipe", "librispeech", *OVERRIDES]
    manifests, store, trained, model, decoded = (
        tmp_path / name for name in ("manifests", "store", "trained", "model", "decoded")
    )
    program("build-manifest", *common, "--corpus", corpus, "--output", manifests)
    program("extract-features", *common, "--manifests", f"[{manifests}]", "--output", store)
    program(
        "train",
        *common,
        "--train-manifest",
        manifests / "train.jsonl",
        "--dev-manifest",
        manifests / "dev.jsonl",
        "--feature-store",
        store,
        "--output",
        trained,
    )
    program("convert-checkpoint", "--checkpoint", trained, "--output", model)
    assert {f.name for f in model.iterdir()} == {"projector.safetensors", "config.json", "stage.json"}
    program(
        "decode",
        "--model",
        model,
        "--manifests",
        f"[{manifests / 'test.jsonl'}]",
        "--feature-store",
        store,
        "--output",
        decoded,
    )

    [extraction] = store.glob("*/runs/*/stage.json")
    assert read_record(extraction.parent).metrics["utterances"] == UTTERANCES
    program("score", "--model", model, "--parts", decoded, "--output", tmp_path / "scored")
    metrics = read_record(tmp_path / "scored").metrics
    assert metrics["wer"] == 0.0
    assert metrics["wer shuffled audio"] > 50
    hypotheses = [json.loads(line) for line in (decoded / "hypotheses.jsonl").read_text().splitlines()]
    assert len(hypotheses) == UTTERANCES and all(h["reference"] == h["hypothesis"] for h in hypotheses)

    # Decoding from audio gives the same texts as decoding from cached features.
    program(
        "decode",
        "--model",
        model,
        "--manifests",
        f"[{manifests / 'test.jsonl'}]",
        "--output",
        tmp_path / "from-audio",
    )
    texts = [(folder / "hypotheses.jsonl").read_text() for folder in (decoded, tmp_path / "from-audio")]
    assert texts[0] == texts[1]
