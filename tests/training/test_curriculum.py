"""The schedules of training: the exits of a step, their weights, the layers it skips, its rate."""

import itertools

import pytest

from hispec_training.checkpoints import learning_rate
from hispec_training.curriculum import drop_rates, dropped_layers, exit_weights, exits_at


def test_curricula():
    assert [exits_at(s, 10, (8, 4), "all") for s in (0, 9)] == [[4, 8], [4, 8]]
    assert [exits_at(s, 10, (4, 8, 12), "rotate")[0] for s in range(4)] == [12, 8, 4, 12]
    gradual = [exits_at(s, 12, (4, 8, 12), "gradual") for s in range(12)]
    assert gradual[0] == [12] and gradual[2] == [8, 12] and gradual[4] == [4, 8, 12]
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(gradual))


def test_exit_weights_add_up_and_grow_with_depth():
    assert exit_weights((2, 4), 0.0) == {2: 0.5, 4: 0.5}
    weights = exit_weights((2, 4, 9), 0.1)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights[2] < weights[4] < weights[9]
    assert weights[9] / weights[4] == pytest.approx((1 + 3.6) / (1 + 0.6))


def test_layer_dropout_grows_with_depth_and_is_a_function_of_the_step():
    rates = drop_rates(30, 0.2)
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2)
    assert rates == sorted(rates)
    counts = [0] * 30
    for step in range(2000):
        dropped = dropped_layers(rates, 0, step)
        assert dropped == dropped_layers(rates, 0, step)
        for layer in dropped:
            counts[layer] += 1
    assert counts[0] == 0
    assert abs(counts[-1] / 2000 - 0.2) < 0.05  # 5.6 sigma


def test_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(2e-3, 10, 100, step) for step in range(100)]
    assert rates[0] == pytest.approx(2e-4)
    assert max(rates) == pytest.approx(2e-3)
    assert rates[-1] < 2e-5
