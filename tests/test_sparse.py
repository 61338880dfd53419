"""Few connections: an engine that keeps these alone learns what one that keeps all N x N does."""

import copy
import os
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import assert_close, problems
from test_streaming import RULES, same_bits, stream, twin

import modprop_fast as mf
from modprop_fast import core

pytestmark = pytest.mark.filterwarnings("ignore:rho")
SPARSE = {name: rule for name, rule in RULES.items() if name != "taps"} | {
    "running": mf.ModProp(0.25, factor="running"),
    "auto": mf.ModProp("auto"),
    "low rank": mf.ModProp(0.25, mf.LowRank(1)),
    "random feedback": mf.RFLO(feedback="symmetric"),
}
DENSE = {"taps": mf.ModProp(0.25, taps=3), "low-rank mean": mf.ModProp(0.25, mf.LowRank(1), factor="mean")}
EVENTS = ("look", "hold", "release", "write", "write where none may be", "reset", "no learning", "chunk", "trials", "copy", "window")
any_rule = st.sampled_from(sorted(SPARSE)).map(SPARSE.get)


@contextmanager
def limits(density, units=1):
    """Engines that are made meanwhile keep connections alone below this density."""
    before = core.SPARSE_DENSITY, core.SPARSE_UNITS
    core.SPARSE_DENSITY, core.SPARSE_UNITS = density, units
    try:
        yield
    finally:
        core.SPARSE_DENSITY, core.SPARSE_UNITS = before


def masked(problem):
    """Whether the problem has a mask; then with one of another density."""
    net = problem.net
    if net.mask is not None:
        net.mask[...] = problem.rng.random(net.mask.shape) < problem.rng.choice([0.05, 0.3, 0.6])
        net.constrain()
    return net.mask is not None


def pair(problem, rule, **kwargs):
    """The same learner with all N x N, and with its connections alone."""
    with limits(0):
        dense = twin(problem, rule, **kwargs)
    with limits(2):
        sparse = twin(problem, rule, **kwargs)
    assert sparse._engine.sparse and not dense._engine.sparse
    return dense, sparse


@settings(max_examples=250)
@given(
    problems(max_rec=24, max_steps=30),
    any_rule,
    st.lists(st.tuples(st.integers(0, 29), st.sampled_from(EVENTS)), max_size=6),
)
def test_connections_alone_learn_the_same(problem, rule, events):
    """Step by step, whatever happens on the way."""
    assume(masked(problem))
    xs, each, targets, mask = stream(problem)
    dense, sparse = both = pair(problem, rule, optimizer=mf.SGD(0.02))
    held = None
    for t, (x, target) in enumerate(zip(xs, each)):
        kwargs = {}
        for event in [event for at, event in events if at == t]:
            if event == "look":
                assert_close({"w": sparse.network.w_rec}, {"w": dense.network.w_rec}, 1e-9)
            elif event == "hold":
                held = sparse.network.w_rec
            elif event == "release":
                held = None
            elif event.startswith("write"):
                where = np.argwhere(problem.net.connections == (event == "write"))
                i, j = where[problem.rng.integers(len(where))] if len(where) else (0, 0)
                for learner in both if len(where) else ():
                    (held if learner is sparse and held is not None else learner.network.w_rec)[i, j] += 0.1
                    learner.network.w_in[0] += 0.1
            elif event == "reset":
                [learner.reset() for learner in both]
            elif event == "no learning":
                kwargs = {"learn": False}
            elif event == "chunk":
                assert np.allclose(*(learner.run(xs, targets, mask, chunk=3) for learner in both), rtol=1e-8, atol=1e-9)
            elif event == "trials":
                losses = [learner.fit_trials(problem.inputs, problem.targets) for learner in both]
                losses += [learner.evaluate(problem.inputs, problem.targets).loss for learner in both]
                assert np.allclose(losses[::2], losses[1::2], rtol=1e-8)
            elif event == "copy":
                with limits(2):
                    held, sparse = None, copy.deepcopy(sparse) if t % 2 else pickle.loads(pickle.dumps(sparse))
                both = dense, sparse
            else:
                sparse._engine.window = t % 31 + 1
        try:
            expected = dense.step(x, target, **kwargs)
        except FloatingPointError:
            assume(False)
        assume(np.abs(expected).max() < 100)
        assert np.allclose(sparse.step(x, target, **kwargs), expected, rtol=1e-9, atol=1e-10)
        if held is not None:
            assert_close({"w": held}, {"w": dense.network.w_rec}, 1e-9)
    assert_close(sparse.network.weights, dense.network.weights, 1e-9)
    if dense._engine.means is not None:
        assert np.allclose(sparse._engine.means, dense._engine.means, rtol=1e-9, atol=1e-12)
