"""A plateau is named once it is there, and not where there is none."""

import random

from slam_asr.training.plateau import Plateau


def said(accuracies) -> list[tuple[int, str]]:
    plateau = Plateau()
    return [(step, line) for step, a in enumerate(accuracies, start=1) if (line := plateau.see(step, a))]


def noisy(values):
    draw = random.Random(0)
    return [v + draw.gauss(0, 0.04) for v in values]


def test_a_plateau_is_named_and_again_when_it_has_doubled():
    lines = said(noisy([min(0.31, 0.001 * s) for s in range(5000)]))
    steps = [step for step, _ in lines]
    assert 1000 < steps[0] < 1700 and steps == [steps[0], steps[0] + 1000, steps[0] + 3000]
    assert [
        f"for {n} steps" in line for n, (_, line) in zip(("1,000", "2,000", "4,000"), lines, strict=True)
    ] == [True] * 3


def test_a_rise_ends_it():
    assert said(noisy([min(0.95, 0.0004 * s) for s in range(8000)])) == []
    jump = noisy([0.3] * 900 + [0.9] * 3000)
    assert said(jump) == []


def test_a_high_accuracy_that_stays_is_no_plateau():
    assert said(noisy([0.93] * 5000)) == []


def test_an_accuracy_that_is_no_number_is_passed_over():
    assert said([float("nan")] * 3000) == []
