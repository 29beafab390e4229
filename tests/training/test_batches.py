"""Batches: each utterance and shard occurs once per epoch; steps do not depend on the number of processes."""

import itertools
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest

from slam_asr.config.recipe import Training
from slam_asr.training.batches import _canonical_numbers
from slam_asr.training.prefetch import prefetch
from slam_asr.training.step_plan import Budget, TrainingPlan, budget_for, plan_epoch, split_packed, split_step

CHANCE = random.Random(3)
LENGTHS = [CHANCE.randint(30, 330) for _ in range(500)]
SHARDS = np.array([CHANCE.randrange(20) for _ in range(500)])


def steps_of_one_shard(lengths, budget, seed, epoch):
    """Plan the steps of an epoch over a single shard."""
    windows = plan_epoch(lengths, np.zeros(len(lengths), int), 8, budget, seed, epoch)
    return [step for window in windows for step in window.steps]


@pytest.mark.parametrize("epoch", [0, 1])
def test_every_utterance_occurs_once_per_epoch(epoch):
    steps = steps_of_one_shard(LENGTHS, 1500, seed=0, epoch=epoch)
    assert sorted(i for step in steps for i in step) == list(range(500))


def test_steps_are_within_the_budget_and_nearly_fill_it():
    sizes = [sum(LENGTHS[i] for i in step) for step in steps_of_one_shard(LENGTHS, 1500, 0, 0)]
    assert max(sizes) <= 1500
    assert sum(sizes) / len(sizes) > 0.85 * 1500


def test_an_utterance_longer_than_the_budget_is_a_step_of_its_own():
    steps = steps_of_one_shard([10, 5000, 10], 100, 0, 0)
    assert [1] in steps and sorted(i for s in steps for i in s) == [0, 1, 2]


def test_the_order_is_a_function_of_seed_and_epoch():
    assert steps_of_one_shard(LENGTHS, 1500, 0, 0) == steps_of_one_shard(LENGTHS, 1500, 0, 0)
    assert (
        steps_of_one_shard(LENGTHS, 1500, 0, 0)
        != steps_of_one_shard(LENGTHS, 1500, 0, 1)
        != steps_of_one_shard(LENGTHS, 1500, 1, 1)
    )
    # A golden value: the order is the same on every machine.
    assert steps_of_one_shard(list(range(10, 20)), 60, 7, 0) == [[0, 1, 2, 3, 4], [8, 9], [5, 6, 7]]


def test_steps_mix_lengths_over_the_epoch():
    means = [sum(LENGTHS[i] for i in step) / len(step) for step in steps_of_one_shard(LENGTHS, 1500, 0, 0)]
    quarter = len(means) // 4
    assert abs(sum(means[:quarter]) / quarter - sum(means) / len(means)) < 40


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [400, 1500, 100_000])
def test_processes_divide_a_step_completely_into_equal_numbers_of_batches(processes, budget):
    for step in steps_of_one_shard(LENGTHS, 1500, 0, 0):
        shares = split_step(step, LENGTHS, processes, budget)
        assert len(shares) == processes
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for batch in share for i in batch) == sorted(step)
        for batch in (b for share in shares for b in share if b):
            assert len(batch) == 1 or len(batch) * max(LENGTHS[i] for i in batch) <= budget


def test_fewer_utterances_than_processes_give_empty_batches_instead_of_missing_ones():
    shares = split_step([0], [100], processes=4, budget=1000)
    assert sorted(len(batch) for share in shares for batch in share) == [0, 0, 0, 1]


@pytest.mark.parametrize("window", [1, 3, 8, 100])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_shard_is_in_one_window_and_every_utterance_in_one_step(window, epoch):
    windows = list(plan_epoch(LENGTHS, SHARDS, window, 1500, 0, epoch))
    assert sorted(s for w in windows for s in w.shards) == list(range(20))
    assert sorted(i for w in windows for step in w.steps for i in step) == list(range(500))
    for w in windows:
        assert {int(SHARDS[i]) for step in w.steps for i in step} == set(w.shards) and len(w.shards) <= window


def test_utterances_of_a_windows_shards_are_mixed():
    for window in plan_epoch(LENGTHS, SHARDS, 5, 1500, 0, 0):
        mixed = [len({int(SHARDS[i]) for i in step}) for step in window.steps if len(step) > 3]
        assert sum(mixed) / len(mixed) > 2


def test_the_order_does_not_depend_on_how_a_reader_numbers_shards():
    audio_ids = np.random.default_rng(0).integers(0, 256, (500, 32), dtype=np.uint8)
    renumbered = np.array(random.Random(1).sample(range(100), 20))
    one, numbers = _canonical_numbers(SHARDS, audio_ids)
    two, other_numbers = _canonical_numbers(renumbered[SHARDS], audio_ids)
    assert (one == two).all() and renumbered[numbers].tolist() == other_numbers
    assert (np.array(numbers)[one] == SHARDS).all()


def examples(lengths=LENGTHS, shards=SHARDS):
    return SimpleNamespace(positions=lengths, shards=shards)


def test_training_ends_after_its_epochs_or_its_steps():
    plan = TrainingPlan(examples(), Budget(1500, 1500), 4, 0, epochs=3, max_steps=10**9)
    steps = [(window.epoch, step) for window, _, step in plan.after(0)]
    assert {epoch for epoch, _ in steps} == {0, 1, 2} and plan.steps == len(steps) and plan.epochs == 3
    cut = TrainingPlan(examples(), Budget(1500, 1500), 4, 0, epochs=3, max_steps=5)
    assert [(window.epoch, step) for window, _, step in cut.after(0)] == steps[:5]
    assert (cut.steps, cut.epochs) == (5, 1)


def test_each_window_comes_with_the_next_one_across_epochs():
    plan = TrainingPlan(examples(), Budget(1500, 1500), 8, 0, epochs=2, max_steps=10**9)
    pairs = list({id(window): (window, next_window) for window, next_window, _ in plan.after(0)}.values())
    assert len(pairs) == 6 and pairs[-1][1] is None
    assert all(next_window is following for (_, next_window), (following, _) in itertools.pairwise(pairs))


def test_prefetched_items_are_the_same_and_their_number_is_bounded():
    produced = []

    def items():
        for i in range(10):
            produced.append(i)
            yield i

    taken = []
    for item in prefetch(items(), depth=2):
        time.sleep(0.01)
        taken.append(item)
        assert len(produced) <= len(taken) + 4
    assert taken == list(range(10))


def test_a_failure_while_prefetching_is_raised_in_the_items_place():
    def items():
        yield 1
        raise ValueError("no more")

    iterator = prefetch(items())
    assert next(iterator) == 1
    with pytest.raises(ValueError, match="no more"):
        next(iterator)


def test_steps_already_done_are_skipped_and_the_rest_is_the_same():
    plan = TrainingPlan(examples(), Budget(1500, 1500), 4, 0, epochs=3, max_steps=10**9)
    steps = [(window.epoch, window.shards, step) for window, _, step in plan.after(0)]
    for done in (1, 7, plan.steps // 2, plan.steps - 1, plan.steps):
        assert [(window.epoch, window.shards, step) for window, _, step in plan.after(done)] == steps[done:]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_order_of_two_epochs_is_the_same_for_any_number_of_processes(processes):
    options = Training(positions_per_step=1500, positions_per_batch=400)
    plan = TrainingPlan(examples(), budget_for(options, processes), 4, 0, epochs=2, max_steps=10**9)
    alone = TrainingPlan(examples(), budget_for(options, 1), 4, 0, epochs=2, max_steps=10**9)
    assert [step for _, _, step in plan.after(0)] == [step for _, _, step in alone.after(0)]
    for _, _, step in plan.after(0):
        shares = split_step(step, LENGTHS, processes, 400)
        assert sorted(i for share in shares for batch in share for i in batch) == sorted(step)
        assert len({len(share) for share in shares}) == 1


def test_batches_of_a_fixed_number_of_utterances_as_in_the_reference_implementation():
    budget = budget_for(Training(utterances_per_batch=4, accumulation=2), processes=3)
    assert (budget.step, budget.batch) == (24, 4)
    plan = TrainingPlan(examples(), budget, 4, 0, epochs=1, max_steps=10**9)
    sizes = budget.sizes(LENGTHS)
    steps = [step for _, _, step in plan.after(0)]
    assert max(map(len, steps)) == 24 and sorted(i for step in steps for i in step) == list(
        range(len(LENGTHS))
    )
    shares = split_step(next(s for s in steps if len(s) == 24), LENGTHS, 3, budget.batch, sizes)
    assert [[len(batch) for batch in share] for share in shares] == [[4, 4]] * 3


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("budget", [300, 700, 5000])
def test_packed_batches_contain_every_utterance_within_the_budget_and_are_equally_many_per_process(
    processes, budget
):
    for step in steps_of_one_shard(LENGTHS, 1500, 0, 0):
        shares = split_packed(step, LENGTHS, processes, budget)
        batches = [batch for share in shares for batch in share]
        assert sorted(i for batch in batches for i in batch) == sorted(step)
        assert len({len(share) for share in shares}) == 1
        assert all(sum(LENGTHS[i] for i in batch) <= budget or len(batch) == 1 for batch in batches)
        # Each process has at most one batch more than necessary, unless an utterance may take more than half
        # of the budget.
        fewest = -(-sum(LENGTHS[i] for i in step) // (budget * processes))
        assert len(shares[0]) <= fewest + 1 or max(LENGTHS) > budget // 2


def test_packed_batches_are_about_equally_full():
    step = steps_of_one_shard(LENGTHS, 6000, 0, 0)[0]
    loads = [sum(LENGTHS[i] for i in share[0]) for share in split_packed(step, LENGTHS, 4, 6000)]
    assert max(loads) - min(loads) <= max(LENGTHS[i] for i in step)
