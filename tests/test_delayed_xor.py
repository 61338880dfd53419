"""The delayed XOR against an independent statement of its trials."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modprop_fast.tasks import TASKS, DelayedXOR


def test_published_trials():
    """Channels, windows, bump, baseline, noise and classes of the published setting, said in plain Python."""
    task = TASKS["delayed-xor"]()
    n = 400
    inputs, targets, _ = task.sample(np.random.default_rng(1), n)
    assert inputs.shape == (n, 900, 2) == (n, task.n_steps, task.n_in) and inputs.dtype == np.float32
    assert targets.shape == (n,) and targets.dtype == np.int64

    bump = [2.0 * math.exp(-((-50 + 100 * i / 99) ** 2) / (2 * 25.0**2)) for i in range(100)]
    present = inputs.max(axis=1) > 1.0
    expected = np.full(inputs.shape, 0.02)
    for i, (a, b) in enumerate(present):
        expected[i, :100, 0] += np.multiply(bump, a)
        expected[i, 800:, 1] += np.multiply(bump, b)
        assert targets[i] == (1 if (a and b) or not (a or b) else 0)

    noise = inputs - expected
    count = noise.size
    assert abs(noise.mean()) < 5 * 0.01 / math.sqrt(count)
    assert abs(noise.std() / 0.01 - 1) < 5 / math.sqrt(2 * count)
    assert np.abs(noise).max() < 0.01 * 7  # 7 sigma among 7e5 draws
    for cues in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = (present == cues).all(axis=1).mean()
        assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)


@given(delay=st.integers(0, 30), cue=st.integers(1, 20), batch=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_any_duration(delay, cue, batch, seed):
    task = DelayedXOR(delay, cue)
    inputs, targets, _ = task.sample(np.random.default_rng(seed), batch)
    assert inputs.shape == (batch, 2 * cue + delay, 2)
    quiet = np.concatenate([inputs[:, cue:, 0], inputs[:, : cue + delay, 1]])
    assert np.abs(quiet - 0.02).max() < 0.1
    again = task.sample(np.random.default_rng(seed), batch)
    assert np.array_equal(inputs, again[0]) and np.array_equal(targets, again[1])


@pytest.mark.parametrize("bad", [{"delay": -1}, {"cue": 0}, {"delay": 1.5}, {"cue": "10"}])
def test_bad_durations(bad):
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(bad))}: expected an integer"):
        DelayedXOR(**bad)
