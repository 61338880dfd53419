"""The latency monitor against times that Python measured around the same steps, and against a known list of times."""

import math
from time import perf_counter

import numpy as np
import pytest

import modprop_fast as mf


def make(n_rec=64):
    return mf.Learner(mf.Network(1, n_rec, 1, rng=np.random.default_rng(0)), mf.ModProp(0.25))


def test_it_agrees_with_a_clock_around_the_call():
    learner, x = make(), np.ones(1, "float32")
    latency = learner.latency
    assert not latency.on and latency.count == 0 and math.isnan(latency.p50) and "off" in repr(latency)
    learner.step(x)
    assert latency.count == 0
    latency.start(deadline=1e-7)  # nothing is that quick
    outside = []
    for _ in range(2000):
        begin = perf_counter()
        learner.step(x, x)
        outside.append(perf_counter() - begin)
    latency.stop()
    learner.step(x)
    assert latency.count == latency.misses == 2000
    assert np.median(outside) / 4 < latency.p50 <= 1.04 * np.median(outside)  # which sees the call besides; 3 % of a bucket
    assert latency.p50 <= latency.p99 <= latency.max <= max(outside)
    assert latency.percentile(100) == latency.max and latency.percentile(0) <= latency.p50
    assert "2000 steps" in repr(latency) and "2000 over 0.1 us" in repr(latency)
    latency.start(deadline=10)
    assert latency.count == latency.misses == 0 and latency.max == 0
    learner.step(x)
    assert (latency.count, latency.misses) == (1, 0)


def test_bad_input():
    latency = make().latency
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"deadline: expected a finite number in \(0, 1e\+09\], got"):
            latency.start(bad)
    assert not latency.on
    with pytest.raises(ValueError, match=r"q: expected a percentage in \[0, 100\], got 101"):
        latency.percentile(101)


def test_a_known_list_of_times():
    latency = make().latency
    latency.start(deadline=50.5e-6)
    for i in range(1, 101):
        latency.note(1000 * i)
    assert (latency.count, latency.misses, latency.max) == (100, 50, pytest.approx(100e-6))
    for q in (1, 25, 50, 90, 99):
        assert q * 1e-6 <= latency.percentile(q) <= 1.035 * q * 1e-6, q
    assert (latency.p50, latency.p99) == (latency.percentile(50), latency.percentile(99))
    latency.start()
    latency.note(5)
    latency.note(2_000_000)  # more than any before
    latency.note(2_000_000)
    assert latency.percentile(0) == pytest.approx(5e-9) and 2e-3 <= latency.p50 == latency.p99 == latency.max
