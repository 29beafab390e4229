"""The folder of checkpoints: which checkpoints are retained, ignored, removed or refused."""

import pytest

from slam_asr.artifacts import checkpoint
from slam_asr.errors import UserError
from slam_asr.training.launch import require_same_training


def test_a_checkpoint_of_another_recipe_is_refused_with_the_keys_that_differ(tmp_path):
    inputs = {
        "llm_sha256": "a" * 64,
        "recipe": {
            "training": {"learning_rate": 1e-4, "max_steps": 10, "schedule": "constant", "validate_every": 5}
        },
    }
    folder = str(tmp_path)
    checkpoint.publish(folder, checkpoint.Checkpoint(3, 0, 3, "ddp", 1, inputs), keep=1)
    require_same_training(folder, inputs, overwrite=False)

    def changed(**training) -> dict:
        return inputs | {"recipe": {"training": inputs["recipe"]["training"] | training}}

    require_same_training(folder, changed(max_steps=20, validate_every=1), overwrite=False)
    with pytest.raises(
        UserError, match=r"another training run \(1 key differs: training\.learning_rate 0\.0001 → 0\.001\)"
    ):
        require_same_training(folder, changed(learning_rate=1e-3, max_steps=20), overwrite=False)
    # With a constant schedule, max_steps may change. With any other schedule, it affects the learning rates.
    with pytest.raises(
        UserError,
        match=r"3 keys differ: llm_sha256 aaaaaaaaaaaa… → b, training\.max_steps 10 → 20, "
        r"training\.schedule constant → linear",
    ):
        require_same_training(
            folder, changed(schedule="linear", max_steps=20) | {"llm_sha256": "b"}, overwrite=False
        )
    require_same_training(folder, changed(learning_rate=1e-3), overwrite=True)
    assert checkpoint.find(folder) is None


def test_the_last_and_the_best_checkpoints_are_retained(tmp_path):
    folder = str(tmp_path / "c")
    for step, dev_loss in ((5, None), (10, 2.0), (15, 1.0), (20, None), (25, 1.5), (30, float("nan"))):
        about = checkpoint.Checkpoint(step, 0, step, "ddp", 1, {}, dev_loss=dev_loss)
        (tmp_path / "c" / about.name).mkdir(parents=True)
        (tmp_path / "c" / about.name / "weights-00000-of-00001.safetensors").write_bytes(b"x")
        checkpoint.publish(folder, about, keep=2)
    assert sorted(f.name for f in (tmp_path / "c").iterdir() if f.is_dir()) == [
        "step-00000015",
        "step-00000025",
        "step-00000030",
    ]
    assert checkpoint.require(folder).step == 30 and checkpoint.require(folder, "best").step == 15


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    folder = str(tmp_path)
    checkpoint.publish(folder, checkpoint.Checkpoint(5, 0, 5, "ddp", 1, {}), keep=2)
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000010" / "weights-00000-of-00002.safetensors").write_bytes(b"half")
    assert checkpoint.require(folder).step == 5
    checkpoint.publish(folder, checkpoint.Checkpoint(8, 0, 8, "ddp", 1, {}), keep=2)
    assert (tmp_path / "step-00000010").exists(), "another process may be writing it"
    checkpoint.publish(folder, checkpoint.Checkpoint(12, 0, 12, "ddp", 1, {}), keep=2)
    assert not (tmp_path / "step-00000010").exists() and (tmp_path / "step-00000008").exists()


def test_anything_after_the_latest_checkpoint_is_removed_before_resuming(tmp_path):
    folder = str(tmp_path)
    for step in (5, 9):
        checkpoint.publish(folder, checkpoint.Checkpoint(step, 0, step, "ddp", 1, {}), keep=2)
    (tmp_path / "latest").write_text("step-00000005")
    # The process was killed after writing a pointer's new content, before renaming the file.
    (tmp_path / ".latest.2780.140456.partial").write_text("step-00000009")
    checkpoint.discard_newer_than_latest(folder)
    assert not list(tmp_path.rglob("*.partial"))
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == ["step-00000005"] and checkpoint.require(
        folder
    ).step == 5


def test_no_checkpoint_and_a_missing_one_are_reported(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.require(str(tmp_path))
    (tmp_path / "latest").write_text("step-00000009")
    with pytest.raises(UserError, match="names step-00000009, which is missing or incomplete"):
        checkpoint.require(str(tmp_path))
