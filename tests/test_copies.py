"""Learners by pickle, by deepcopy and in another process: they go on to the same bits as the one that they were made of."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest

import modprop_fast as mf

pytestmark = pytest.mark.usefixtures("at_once_or_not")
RULES = {
    "exact": mf.ModProp(0.25),
    "waiting": mf.ModProp(0.25, refresh=2),  # without signs and mask: updates that are not written yet
    "mean": mf.ModProp(0.25, factor="mean", self_modulation=False),
    "running": mf.ModProp("auto", factor="running"),
    "instant": mf.ModProp("instant"),
    "low rank": mf.ModProp(0.25, modulation=mf.LowRank(2)),
    "rtrl": mf.RTRL(),
    "uoro": mf.UORO(),
    "mdgl cells": mf.MDGL("cells"),
    "cells": mf.ModProp(0.25, "cells", "mean"),
    "taps": mf.ModProp(0.25, taps=3),
    "chunks": mf.ModProp(0.25, exact_steps=7),
    "rflo": mf.RFLO(),
}


def learner(rule, update, dtype="float32"):
    rng = np.random.default_rng(2)
    constraints = {} if rule is RULES["waiting"] else {"dale": {"E": 1, "I": -1}, "mask": rng.random((19, 19)) < 0.7}
    net = mf.Network(
        2, 19, 3, types={"E": 13, "I": 6}, activation="tanh", tau=3, bias=True, dtype=dtype, rng=rng, **constraints
    )
    optimizer = mf.SGD(0.05) if update == "step" else mf.Adam(0.01, schedule=mf.StepDecay(0.5, 1))
    return mf.Learner(net, rule, update=update, optimizer=optimizer, rng=rng)


def go_on(one, first, n_steps=50):
    """Outputs of so many steps, of which some have no error, and an update at the end where updates are made by hand."""
    rng, ys = np.random.default_rng(first), []
    for t in range(n_steps):
        x, target = (rng.normal(size=n).astype(one.network.dtype) for n in (2, 3))
        ys.append(one.step(x, target if t % 5 else None))
    if one.update == "apply":
        one.apply()
        ys.append(one.step(x))
    return np.concatenate(ys)


def everything(one):
    return dict(one.network.weights) | {f"state.{k}": v for k, v in one.state().items()} | one._engine.snapshot()["arrays"]


@pytest.mark.parametrize("name, update", [(n, u) for n in RULES for u in ("step", "apply") if (n, u) != ("chunks", "step")])
def test_a_copy_goes_on_to_the_same_bits(name, update):
    one = learner(RULES[name], update)
    same = np.array_equal
    if one._plan.stepwise:  # NumPy's sums depend on where arrays lie

        def same(a, b):
            return np.allclose(a, b, rtol=1e-4, atol=1e-5)

    go_on(one, 0)
    go_on(one, 0, n_steps=3)  # in the middle of a window
    copies = [pickle.loads(pickle.dumps(one)), copy.deepcopy(one)]
    before = {key: w.copy() for key, w in one.network.weights.items()}
    expected = go_on(one, 1)
    assert not np.array_equal(one.network.w_rec, before["w_rec"])
    for other in copies:
        assert all(np.array_equal(w, before[key]) for key, w in other.network.weights.items())  # its own
        assert same(go_on(other, 1), expected)
        for key, value in everything(one).items():
            assert (np.array_equal if value.dtype.kind in "SU" else same)(everything(other)[key], value), key


def test_worker_processes_take_learners_and_give_them_back():
    one = learner(RULES["waiting"], "step", "float64")
    go_on(one, 0)
    xs, targets = (np.random.default_rng(1).normal(size=(30, n)) for n in (2, 3))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        back = pool.apply_async(copy.deepcopy, (one,)).get(timeout=120)
        ys = pool.apply_async(one.run, (xs, targets)).get(timeout=120)
    assert np.array_equal(ys, one.run(xs, targets)) and np.ptp(ys) > 0
    assert np.array_equal(ys, back.run(xs, targets))
    assert np.array_equal(go_on(back, 2), go_on(one, 2))


def test_the_signs_of_uoro_continue_in_a_copy():
    one = learner(mf.UORO(), "apply")
    xs, targets = (np.random.default_rng(3).normal(size=(2, 6, n)) for n in (2, 3))
    one.fit_trials(xs, targets)
    other = pickle.loads(pickle.dumps(one))
    assert one.fit_trials(xs, targets) == other.fit_trials(xs, targets)
    assert np.array_equal(one.network.w_rec, other.network.w_rec)
    first, second = (one.gradient(xs, targets, mode="offline")["w_rec"] for _ in range(2))
    assert not np.array_equal(first, second)


def test_a_copy_of_a_learner_after_chunks_and_trials():
    one = learner(RULES["exact"], "step")
    xs, targets = (np.random.default_rng(3).normal(size=(6, 20, n)) for n in (2, 3))
    one.run(xs[0], targets[0], chunk=8)
    other = copy.deepcopy(one)
    for each in (one, other):
        each.fit_trials(xs, targets)
        each.run(xs[1], targets[1], chunk=8)
        each.run(xs[2], targets[2])
    assert np.array_equal(one.network.w_rec, other.network.w_rec)
    assert one.network.w_rec.ctypes.data % 64 == other.network.w_rec.ctypes.data % 64 == 0


@pytest.mark.parametrize("name", ["exact", "running", "rflo"])
def test_the_same_learner_is_the_same_bytes_and_may_come_in_memory_that_is_only_read(name):
    one = learner(RULES[name], "apply")
    go_on(one, 0)
    one.reset()
    assert pickle.dumps(one) == pickle.dumps(one)
    buffers = []
    data = pickle.dumps(one, protocol=5, buffer_callback=buffers.append)
    two = pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])
    assert len(buffers) > 5
    np.testing.assert_array_equal(go_on(one, 1), go_on(two, 1))
    np.testing.assert_array_equal(one.network.w_rec, two.network.w_rec)
