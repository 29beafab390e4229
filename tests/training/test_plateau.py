"""A plateau is reported when it has lasted long enough, and nothing else is reported."""

import random

from slam_asr.training.monitor import Plateau


def reports(accuracies) -> list[tuple[int, str]]:
    plateau = Plateau()
    return [(step, line) for step, a in enumerate(accuracies, start=1) if (line := plateau.update(a))]


def noisy(values):
    draw = random.Random(0)
    return [v + draw.gauss(0, 0.04) for v in values]


def test_a_plateau_is_reported_again_each_time_its_length_has_doubled():
    lines = reports(noisy([min(0.31, 0.001 * s) for s in range(5000)]))
    steps = [step for step, _ in lines]
    assert 1000 < steps[0] < 1700 and steps == [steps[0], steps[0] + 1000, steps[0] + 3000]
    assert [
        f"for {n} steps" in line for n, (_, line) in zip(("1,000", "2,000", "4,000"), lines, strict=True)
    ] == [True] * 3


def test_a_rise_ends_a_plateau():
    assert reports(noisy([min(0.95, 0.0004 * s) for s in range(8000)])) == []
    jump = noisy([0.3] * 900 + [0.9] * 3000)
    assert reports(jump) == []


def test_a_constant_high_accuracy_is_no_plateau():
    assert reports(noisy([0.93] * 5000)) == []


def test_an_accuracy_that_is_not_finite_is_ignored():
    assert reports([float("nan")] * 3000) == []
