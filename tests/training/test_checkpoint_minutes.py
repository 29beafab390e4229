"""A checkpoint is due after some minutes by the first process's clock, and all processes save it together."""

from types import SimpleNamespace

import pytest
import torch

from slam_asr.artifacts.checkpoint import MAIN
from slam_asr.config.recipe import load_recipe
from slam_asr.training import resumer
from slam_asr.training.loop import Loop, Totals
from slam_asr.training.resumer import Progress, Resumer
from tests.ranks import fork_ranks


@pytest.mark.parametrize(
    ("minutes", "expected"), [(10.0, [False, False, True, True]), (0.5, [True] * 4), (0.0, [False] * 4)]
)
def test_minutes_count_from_the_last_checkpoint(monkeypatch, minutes, expected):
    now = [1000.0]
    monkeypatch.setattr(resumer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    resumes = Resumer.__new__(Resumer)
    resumes.options = load_recipe("demo", {"training.checkpoint_minutes": minutes}).training
    resumes.writer = SimpleNamespace(last_save=1000.0)
    due = []
    for seconds in (31, 599, 601, 1201):
        now[0] = 1000.0 + seconds
        due.append(resumes.minutes_have_passed())
    assert due == expected
    resumes.writer.last_save = now[0]
    assert not resumes.minutes_have_passed()


def test_ten_minutes_are_the_default():
    assert load_recipe("librispeech").training.checkpoint_minutes == 10.0


@pytest.mark.parametrize("due", [True, False])
def test_the_clock_of_the_first_process_decides_for_all(tmp_path, due):
    def step(rank: int) -> None:
        loop = Loop.__new__(Loop)
        loop.parts = SimpleNamespace(rank=rank, processes=2, device=torch.device("cpu"))
        loop.stop = SimpleNamespace(signal=None)
        # The clocks of the two processes contradict each other.
        loop.resumer = SimpleNamespace(
            minutes_have_passed=lambda: due == (rank == 0), writer=SimpleNamespace(pending=0, failure=None)
        )
        totals = Totals(torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64), filled=3, cells=4)
        loop._reduce(totals)
        (tmp_path / f"{rank}-{totals.due}-{totals.loss}").touch()

    assert fork_ranks(2, tmp_path, step) == [0, 0]
    assert {f.name for f in tmp_path.glob("[01]-*")} == {f"{rank}-{due}-0.5" for rank in (0, 1)}


@pytest.mark.parametrize(
    ("due", "pending", "saved"), [(False, 0.0, False), (True, 0.0, True), (True, 0.5, False)]
)
def test_a_checkpoint_that_is_due_is_saved_unless_another_is_being_written(
    tmp_path, monkeypatch, due, pending, saved
):
    taken = []
    monkeypatch.setattr(resumer, "take_snapshot", lambda engine, about, curve: about)
    resumes = Resumer.__new__(Resumer)
    recipe = load_recipe("demo", {"training.checkpoint_every": 0})
    resumes.options = recipe.training
    resumes.writer = SimpleNamespace(save=taken.append)
    resumes.parts = SimpleNamespace(
        recipe=recipe,
        rank=1,
        processes=2,
        folder=tmp_path,
        job=SimpleNamespace(inputs={}),
        engine=SimpleNamespace(updates=lambda: 7, loss_scale=dict),
        phase=SimpleNamespace(name=MAIN),
    )
    progress = Progress(done=7)
    resumes.save_if_due(progress, due, pending, dev_loss=None, forced=False)
    assert [about.step for about in taken] == [7] * saved
    assert progress.saved == 7 * saved
