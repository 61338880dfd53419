"""The rules that stream in NumPy: RTRL, UORO, and those that read the whole of W."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import assert_close, moves, problems
from test_streaming import same_bits, twin

import modprop_fast as mf

pytestmark = pytest.mark.filterwarnings("ignore:rho")
CELLS = mf.ModProp(0.4, "cells", "mean")


def rules(net):
    """name -> (rule, what the reference calls it)."""
    mu = np.random.default_rng(0).random(net.n_rec)
    cells = {"rule": "modprop", "wb": net.w_rec, "factor": "mean"}
    return {
        "rtrl": (mf.RTRL(), {"rule": "bptt"}),
        "uoro": (mf.UORO(feedback="random"), {"rule": "uoro"}),
        "snap1": (mf.SnAp1(), {"rule": "snap1"}),
        "mdgl": (mf.MDGL("cells"), {"rule": "mdgl", "wb": net.w_rec}),
        "cells": (CELLS, cells | {"mu": 0.4}),
        "cells, mu per unit": (mf.ModProp(mu, "cells", "mean"), cells | {"mu": mu}),
    }


def condition(net, mu):
    """Of the eigenvectors of K; infinite where there is no basis of them."""
    K = net.leak * np.eye(net.n_rec) + (1 - net.leak) * net.w_rec * mu
    return np.linalg.cond(np.linalg.eig(K)[1])


@settings(max_examples=60)
@given(problems("float64"), st.sampled_from(sorted(rules(mf.Network(1, 1, 1, init="zeros")))))
def test_streams_are_the_reference(problem, name):
    """Two trials, of which the second begins by `reset`: with the same signs, where signs are drawn."""
    rule, how = rules(problem.net)[name]
    learner = twin(problem, rule, update="apply")
    if name == "uoro":
        how |= {"feedback": learner._feedback, "rng": np.random.default_rng(0)}
        how["rng"].normal(size=learner._feedback.shape)  # that was drawn before
    assume("mu" not in how or condition(problem.net, how["mu"]) < 1e5)
    n = min(2, len(problem.inputs))
    problem.inputs, problem.targets = problem.inputs[:n], problem.targets[:n]
    problem.mask = np.ones(problem.inputs.shape[:2], bool) if problem.mask is None else problem.mask[:n]
    problem.mask[1:] = problem.mask[0]  # a stream takes the sum over the steps
    targets = np.broadcast_to(problem.targets if problem.loss == "mse" else problem.targets.reshape(n, -1),
                              (n, problem.inputs.shape[1], *problem.targets.shape[2:]))  # fmt: skip
    problem.targets = targets
    expected = problem.reference(mode="online", **how)
    assume(moves(expected))
    for i in range(n):
        learner.run(problem.inputs[i], targets[i], problem.mask[i])
        learner.reset()
    streamed = {key: g / (n * problem.mask[0].sum()) for key, g in learner.accumulated.items()}
    assert_close(streamed, expected, 1e-10)
    if name != "uoro":
        assert_close(learner.gradient(problem.inputs, targets, problem.mask), expected, 1e-10)


def small(rule, update="step", lr=0.05, seed=1, **kwargs):
    net = mf.Network(2, 9, 2, activation="tanh", tau=3.0, rng=np.random.default_rng(seed), **{"dtype": "float64"} | kwargs)
    return mf.Learner(net, rule, update=update, optimizer=mf.SGD(lr), rng=np.random.default_rng(2))


def draw(*shape):
    rng = np.random.default_rng(3)
    return rng.normal(size=(*shape, 2)), rng.normal(size=(*shape, 2))


@pytest.mark.parametrize("name", ["rtrl", "uoro", "mdgl", "cells"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_updates_within_a_stream_are_gradients_that_are_applied(name, chunk):
    """With signs and a mask; 4 steps to a chunk leave 3 at the end."""
    how = {"dale": [1, 1, 1, -1, -1, -1, 0, 0, 0], "mask": np.random.default_rng(4).random((9, 9)) < 0.7, "bias": True}
    rule = rules(small(mf.EProp()).network)[name][0]
    one, plain = small(rule, **how), small(rule, "apply", **how)
    xs, targets = draw(31)
    ys = one.run(xs, targets, chunk=chunk)
    expected = []
    for first in range(0, 31, chunk):
        expected.append(plain.run(xs[first : first + chunk], targets[first : first + chunk]))
        plain.apply()
    assert np.allclose(ys, np.concatenate(expected), rtol=1e-12, atol=1e-14)
    assert_close(one.network.weights, plain.network.weights, 1e-12)
    assert one._engine.updates == plain.iteration == -(-31 // chunk)
    net = one.network
    assert not net.w_rec[~net.connections].any() and (net.w_rec * net.sign >= 0).all()
    assert np.abs(net.w_rec - small(rule, **how).network.w_rec).max() > 1e-3


def test_trials_one_by_one_in_a_stream_are_those_that_go_backwards():
    """Cells, with an update after each: every trial meets the eigenvectors of its own W."""
    streamed, fitted = small(CELLS, "apply", 0.5), small(CELLS, "apply", 0.5)
    for xs, targets in zip(*draw(6, 12)):
        streamed.run(xs, targets)
        backwards = fitted.gradient(xs[None], targets[None], mode="offline")
        assert_close(streamed.accumulated, {name: 12 * g for name, g in backwards.items()}, 1e-10)
        streamed.optimizer.update(fitted.network.weights, streamed.accumulated, {}, 0)
        fitted.network.constrain()
        streamed.apply()
        streamed.reset()
    assert same_bits(streamed.network.weights, fitted.network.weights)
    assert np.abs(streamed.network.w_rec - small(CELLS).network.w_rec).max() > 0.1


def with_the_whole_tensor(learner, xs, targets, before=lambda t: None):
    """The same steps with all N^3 numbers of J beside them, J_t = K_t J_{t-1} + (1-k) (j = p) s_t: sum_t m_t J_t of the inputs.

    Yields what the learner's update and this say of w_in at each step.
    """
    net, k = learner.network, learner.network.leak
    J = np.zeros((net.n_rec, net.n_rec, net.n_in))
    for t, (x, target) in enumerate(zip(xs, targets)):
        before(t)
        w, w_in = net.w_rec.copy(), net.w_in.copy()
        K = k * np.eye(net.n_rec) + (1 - k) * 0.4 * w
        J = np.einsum("ij,jpq->ipq", K, J)
        J[range(net.n_rec), range(net.n_rec)] += (1 - k) * x
        w_out = net.w_out.copy()
        y = learner.step(x, target)
        m = w_out.T @ (y - target) / 2 * learner._engine.engine.arrays["h"]
        yield (w_in - net.w_in) / learner.optimizer.lr, np.einsum("j,jpq->pq", m, J)


def test_what_cells_remember_when_k_changes():
    """All of it where the new K has the eigenvectors of the old, in whatever order; else up to the size of the change."""
    xs, targets = draw(40)
    learner = small(CELLS, lr=1e-9, gain=1.2)

    def turn(t):
        learner.network.w_rec *= -0.9 if t % 3 == 1 else 1.0

    for got, expected in with_the_whole_tensor(learner, xs, targets, turn):
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()  # the difference of two weights, over 1e-9

    def error(lr):
        pairs = list(with_the_whole_tensor(small(CELLS, lr=lr, gain=1.2), xs, targets))
        return np.mean([np.linalg.norm(got - expected) / np.linalg.norm(expected) for got, expected in pairs])

    errors = [error(lr) for lr in (0.01, 0.0025)]
    assert errors[0] < 0.005 and 3 < errors[0] / errors[1] < 6


def test_what_is_owed_to_the_gradient_is_that_of_its_time():
    """W is written into between an error and `accumulated`; steps without one, or without learning, add nothing."""
    xs, targets = draw(9)
    found = []
    for write in (False, True):
        one = small(CELLS, "apply")
        one.run(xs[:8], targets[:8])
        if write:
            one.network.w_rec *= -2
            one.step(xs[8])
            one.step(xs[8], targets[8], learn=False)
            assert one.loss > 0
        found.append(one.accumulated)
    assert_close(found[1], found[0], 1e-12)


def test_the_loss_of_trials_is_their_mean():
    one = small(mf.RTRL())
    trials = draw(3, 7)
    expected = one.evaluate(*trials).loss
    assert one.fit_trials(*trials) == pytest.approx(expected, rel=1e-12)


def test_uoro_is_unbiased():
    """1e4 draws, as 400 batches of one trial 25 times."""
    net = mf.Network(1, 3, 1, activation="tanh", tau=1.0, dtype="float64", gain=1.5, rng=np.random.default_rng(0))
    xs, targets = np.random.default_rng(1).normal(size=(2, 1, 3, 1))
    expected = mf.Learner(net, mf.BPTT()).gradient(xs, targets, mode="offline")
    eprop = mf.Learner(net, mf.EProp()).gradient(xs, targets)
    uoro = mf.Learner(net, mf.UORO(), rng=np.random.default_rng(2))
    batch = np.repeat(xs, 25, axis=0), np.repeat(targets, 25, axis=0)
    draws = [uoro.gradient(*batch) for _ in range(400)]
    there = net.connections
    for name, where in {"w_rec": there, "w_in": np.ones((3, 1), bool)}.items():
        drawn = np.array([g[name][where] for g in draws])
        error = drawn.std(axis=0, ddof=1) / 20
        assert (error > 0).all() and (np.abs(drawn.mean(axis=0) - expected[name][where]) < 4 * error).all()
        assert (np.abs(drawn.mean(axis=0) - eprop[name][where]) > 4 * error).any()  # it can be told from another rule


# ---------------------------------------------------------------- what is refused, and what is counted


def test_w_without_loops_has_no_eigenvectors():
    one = small(CELLS, mask=np.tri(9, k=-1, dtype=bool))
    xs, targets = draw(2, 4)
    before = {name: w.copy() for name, w in one.network.weights.items()}
    sentence = r"modulation: expected eigenvectors of K with a condition number <= 1e\+08, got .*fit_trials"
    for call in (lambda: one.step(xs[0, 0], targets[0, 0]), lambda: one.run(xs[0]), lambda: one.gradient(xs, targets)):
        with pytest.raises(ValueError, match=sentence):
            call()
    assert same_bits(one.network.weights, before)
    one.fit_trials(xs, targets)
    assert not same_bits(one.network.weights, before)


def test_an_unstable_filter_of_cells_is_named_within_a_stream():
    one = small(mf.ModProp(1.0, "cells", "mean"))
    one.network.w_rec *= 10
    with pytest.warns(RuntimeWarning, match=r"rho\(K\) = "):
        one.step(*(each[0] for each in draw(1)))


@pytest.mark.parametrize("rule", [mf.RTRL(), CELLS], ids=["rtrl", "cells"])
def test_a_gradient_that_is_not_finite_is_not_descended(rule):
    one = small(rule, dtype="float32")
    one.network.w_out *= 100
    xs = draw(3)[0].astype("float32")
    one.step(xs[0])
    before = {name: w.copy() for name, w in one.network.weights.items()}
    with pytest.raises(FloatingPointError, match="gradient: expected a finite norm"):
        one.step(xs[1], signal=np.full(2, 3e38, "float32"))
    assert same_bits(one.network.weights, before)
    one.step(xs[2], signal=np.ones(2, "float32"))  # and it goes on
    assert not same_bits(one.network.weights, before)
    one.network.w_out[...] = np.inf
    with pytest.raises(FloatingPointError, match=r"run: expected a finite readout, got .* at step 0"):
        one.run(xs, xs)


def test_one_thread_at_a_time_and_steps_are_timed():
    one = small(mf.RTRL())
    xs, targets = draw(5)
    one.latency.start()
    for x, target in zip(xs, targets):
        one.step(x, target)
    assert one.latency.count == 5 and 0 < one.latency.p50 < 1
    with one._engine._alone("run"), pytest.raises(RuntimeError, match="step: this learner is already running in another"):
        one.step(xs[0])
    one.step(xs[0])
