"""The learning rate rises to its peak; then it stays there or falls to zero, as the schedule's kind says."""

import pytest

from slam_asr.training.phases import learning_rate_schedule


@pytest.mark.parametrize(("kind", "last"), [("constant", 1.0), ("linear", 0.0), ("cosine", 0.0)])
def test_the_rate_rises_to_its_peak_and_never_rises_again(kind, last):
    rate = learning_rate_schedule(kind, 1.0, warmup_steps=10, total_steps=100)
    assert [rate(step) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(100) == pytest.approx(last)
    assert all(rate(s) >= rate(s + 1) for s in range(10, 100))


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate_schedule("constant", 3e-4, 0, 10)(1) == 3e-4
