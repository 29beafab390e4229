"""Batches: every utterance once an epoch, steps that do not depend on the number of processes, none left waiting."""

import random

import pytest

from slam_asr.training.batches import plan_epoch, split_step, training_steps

LENGTHS = [random.Random(3).randint(30, 330) for _ in range(500)]


@pytest.mark.parametrize("epoch", [0, 1])
def test_every_utterance_occurs_once_an_epoch(epoch):
    steps = plan_epoch(LENGTHS, 1500, seed=0, epoch=epoch)
    assert sorted(i for step in steps for i in step) == list(range(500))


def test_steps_keep_to_the_budget_and_fill_it():
    sizes = [sum(LENGTHS[i] for i in step) for step in plan_epoch(LENGTHS, 1500, 0, 0)]
    assert max(sizes) <= 1500
    assert sum(sizes) / len(sizes) > 0.85 * 1500


def test_an_utterance_longer_than_the_budget_is_a_step_of_its_own():
    steps = plan_epoch([10, 5000, 10], 100, 0, 0)
    assert [1] in steps and sorted(i for s in steps for i in s) == [0, 1, 2]


def test_the_order_is_a_function_of_seed_and_epoch():
    assert plan_epoch(LENGTHS, 1500, 0, 0) == plan_epoch(LENGTHS, 1500, 0, 0)
    assert plan_epoch(LENGTHS, 1500, 0, 0) != plan_epoch(LENGTHS, 1500, 0, 1) != plan_epoch(LENGTHS, 1500, 1, 1)
    # Golden: the same on every machine.
    assert plan_epoch(list(range(10, 20)), 60, 7, 0)[0] == [0, 1, 2, 3]


def test_steps_mix_lengths_over_the_epoch():
    means = [sum(LENGTHS[i] for i in step) / len(step) for step in plan_epoch(LENGTHS, 1500, 0, 0)]
    quarter = len(means) // 4
    assert abs(sum(means[:quarter]) / quarter - sum(means) / len(means)) < 40


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [400, 1500, 100_000])
def test_processes_share_a_step_without_loss_and_in_equal_numbers(processes, budget):
    for step in plan_epoch(LENGTHS, 1500, 0, 0):
        shares = split_step(step, LENGTHS, processes, budget)
        assert len(shares) == processes
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for batch in share for i in batch) == sorted(step)
        for batch in (b for share in shares for b in share if b):
            assert len(batch) == 1 or len(batch) * max(LENGTHS[i] for i in batch) <= budget


def test_fewer_utterances_than_processes_leave_empty_batches_not_missing_ones():
    shares = split_step([0], [100], processes=4, budget=1000)
    assert sorted(len(batch) for share in shares for batch in share) == [0, 0, 0, 1]


def test_training_ends_after_its_epochs_or_its_steps():
    whole = list(training_steps(LENGTHS, 1500, 0, epochs=3, max_steps=10**9))
    assert {epoch for epoch, _ in whole} == {0, 1, 2}
    assert list(training_steps(LENGTHS, 1500, 0, epochs=3, max_steps=5)) == whole[:5]
