"""MATH identities on the engine: online == offline == reference, and what the rules must agree on."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import ALL, SMOOTH, assert_close, assert_slopes, moves, problems

import modprop_fast as mf
from modprop_fast import reference

pytestmark = pytest.mark.filterwarnings("ignore:rho")
FLOAT64 = 1e-10  # of the largest entry, as in the fixtures
FLOAT32 = 1e-4  # hundreds of roundings of 6e-8, and a factor for cancellation between types


def rules(problem):
    """name -> (rule, whether it streams, what the reference calls it)."""
    net, mu, rng = problem.net, problem.mu, problem.rng
    rank = int(rng.integers(1, 7))
    u, v = rng.normal(size=(net.n_rec, rank)), rng.normal(size=(rank, net.n_rec)) / net.n_rec
    feedback = rng.normal(size=(net.n_rec, net.n_out))
    per_type, per_unit = rng.random(net.n_types), rng.random(net.n_rec)
    means = reference.type_means(net.w_rec, net.types)
    zeroed = reference.type_means(net.w_rec, net.types, self_modulation=False)
    out = {
        "bptt": (mf.BPTT(), False, {"rule": "bptt"}),
        "e-prop": (mf.EProp(), True, {"rule": "eprop"}),
        "random feedback": (mf.EProp(feedback=feedback), True, {"rule": "eprop", "feedback": feedback}),
        "no self": (
            mf.ModProp(mu, factor="mean", self_modulation=False),
            True,
            {"rule": "modprop", "wb": zeroed, "factor": "mean"},
        ),
        "no self, mu per type": (
            mf.ModProp(per_type, factor="mean", self_modulation=False),
            True,
            {"rule": "modprop", "wb": zeroed, "factor": "mean", "mu": per_type[net.types]},
        ),
    }
    for factor in ("exact", "mean"):
        how = {"rule": "modprop", "factor": factor}
        out |= {
            f"types {factor}": (mf.ModProp(mu, factor=factor), True, how | {"wb": means}),
            f"types {factor}, mu per type": (
                mf.ModProp(per_type, factor=factor, feedback=feedback),
                True,
                how | {"wb": means, "mu": per_type[net.types], "feedback": feedback},
            ),
            f"low rank {factor}": (mf.ModProp(mu, modulation=(u, v), factor=factor), True, how | {"wb": u @ v}),
            f"low rank {factor}, mu per unit": (
                mf.ModProp(per_unit, modulation=(u, v), factor=factor),
                True,
                how | {"wb": u @ v, "mu": per_unit},
            ),
            f"cells {factor}": (mf.ModProp(mu, modulation="cells", factor=factor), False, how | {"wb": net.w_rec}),
        }
    return out | others(problem, u, v, means)


def others(problem, u, v, means):
    """The rest of the family."""
    net, mu = problem.net, problem.mu
    b, half = int(problem.rng.integers(1, 10)), np.full(net.n_rec, 0.5)  # before any activity was measured
    rank = min(int(problem.rng.integers(1, 4)), net.n_rec)
    low = np.matmul(*reference.low_rank(net.w_rec, rank))
    n = np.bincount(net.types)
    first = np.unique(net.types, return_index=True)[1]
    auto = reference.auto_mu(np.full(len(n), 0.5), means[np.ix_(first, first)], n, net.leak, 3.0)[net.types]
    modprop, chunks = {"rule": "modprop", "wb": means}, {"exact_steps": b}
    running = {"factor": "running", "hbar": half}
    given = problem.rng.normal(size=(b, len(n), len(n)))
    out = {
        "taps": (mf.ModProp(mu, taps=b), True, modprop | {"taps": b}),
        "taps low rank": (mf.ModProp(mu, (u, v), taps=b), True, modprop | {"taps": b, "wb": u @ v}),
        "taps given": (mf.ModProp(taps=given), True, modprop | {"taps": given[:, net.types][:, :, net.types]}),
        "tbptt": (mf.TBPTT(b), False, {"rule": "tbptt", "horizon": b}),
        "rtrl": (mf.RTRL(), True, {"rule": "bptt"}),
        "snap1": (mf.SnAp1(), True, {"rule": "snap1"}),
        "mdgl types": (mf.MDGL(), True, {"rule": "mdgl", "wb": means}),
        "mdgl cells": (mf.MDGL("cells"), True, {"rule": "mdgl", "wb": net.w_rec}),
        "mdgl low rank": (mf.MDGL((u, v)), True, {"rule": "mdgl", "wb": u @ v}),
        "running types": (mf.ModProp(mu, factor="running"), True, modprop | running),
        "running low rank": (mf.ModProp(mu, (u, v), "running"), True, modprop | running | {"wb": u @ v}),
        "running cells": (mf.ModProp(mu, "cells", "running"), False, modprop | running | {"wb": net.w_rec}),
        "truncated svd": (mf.ModProp(mu, mf.LowRank(rank)), True, modprop | {"wb": low}),
        "auto": (mf.ModProp("auto", horizon=3.0), True, modprop | {"mu": auto}),
        "auto running": (mf.ModProp("auto", factor="running", horizon=3.0), True, modprop | running | {"mu": auto}),
        "instant": (mf.ModProp("instant"), True, modprop | {"mu": "instant", "types": net.types}),
        "exact steps": (mf.ModProp(mu, exact_steps=b), True, modprop | chunks),
        "exact steps low rank": (mf.ModProp(mu, (u, v), exact_steps=b), True, modprop | chunks | {"wb": u @ v}),
        "exact steps cells": (mf.ModProp(mu, "cells", exact_steps=b), False, modprop | chunks | {"wb": net.w_rec}),
        "exact steps instant": (
            mf.ModProp("instant", exact_steps=b),
            True,
            modprop | chunks | {"mu": "instant", "types": net.types},
        ),
        "exact steps eprop": (mf.EProp(exact_steps=b), True, {"rule": "eprop"} | chunks),
    }
    return out


def check_all_rules(problem, tolerance):
    for name, (rule, streams, how) in rules(problem).items():
        expected = problem.reference(mode="offline", **how)
        assume(moves(expected))
        learner = problem.learner(rule)
        for mode in ("online", "offline") if streams else ("offline",):
            got = learner.gradient(problem.inputs, problem.targets, problem.mask, mode=mode)
            try:
                assert_close(got, expected, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{name}, {mode}: {error}") from None


@settings(max_examples=60)
@given(problems("float64"))
def test_engine_is_the_reference_in_float64(problem):
    check_all_rules(problem, FLOAT64)


@settings(max_examples=60)
@given(problems("float32"))
def test_engine_is_the_reference_in_float32(problem):
    # a relu unit within rounding of its threshold is rightly on either side of it
    assume(problem.net.activation != "relu" or np.abs(problem.membrane()).min() > 1e-4)
    check_all_rules(problem, FLOAT32)


@pytest.mark.parametrize("isa", mf.core.available_isas())
@pytest.mark.parametrize("dtype, tolerance", [("float64", FLOAT64), ("float32", FLOAT32)])
def test_every_instruction_set(isa, dtype, tolerance, monkeypatch):
    monkeypatch.setenv("MODPROP_FAST_ISA", isa)

    @settings(max_examples=15)
    @given(problems(dtype, activations=("tanh", "softplus")))
    def check(problem):
        check_all_rules(problem, tolerance)

    check()


@settings(max_examples=30)
@given(problems("float64", activations=SMOOTH, max_rec=5, autapses=True, constrained=False))
def test_bptt_is_rtrl_is_the_slope_of_the_engines_loss(problem):
    assume(problem.net.n_rec <= 19)
    learner = problem.learner(mf.BPTT())
    trial = problem.inputs, problem.targets, problem.mask
    grads = learner.gradient(*trial, mode="offline")
    assert_slopes(lambda: learner.evaluate(*trial).loss, problem.net.weights, grads, problem.rng, 3)
    assert_close(grads, problem.reference("bptt", mode="online"), FLOAT64)


def both_dtypes(test):
    return pytest.mark.parametrize("dtype, tolerance", [("float64", FLOAT64), ("float32", FLOAT32)])(test)


@both_dtypes
@pytest.mark.parametrize("factor", ["exact", "mean"])
def test_linear_network_with_a_type_for_every_unit_is_bptt(dtype, tolerance, factor):
    @settings(max_examples=20)
    @given(problems(dtype, activations=("identity",), autapses=True, constrained=False))
    def check(problem):
        net = problem.net
        own_type = mf.Network(
            net.n_in, net.n_rec, net.n_out, types=np.arange(net.n_rec), activation="identity", tau=net.tau,
            autapses=True, bias="b_rec" in net.weights, dtype=dtype, init="zeros",
        )  # fmt: skip
        for name, w in net.weights.items():
            own_type.weights[name][...] = w
        problem.net = own_type
        expected = problem.reference("bptt")
        assume(moves(expected))
        trial = problem.inputs, problem.targets, problem.mask
        assert_close(problem.learner(mf.ModProp(1.0, factor=factor)).gradient(*trial), expected, tolerance)

    check()


@both_dtypes
def test_without_recurrent_weights_every_rule_is_bptt(dtype, tolerance):
    @settings(max_examples=20)
    @given(problems(dtype, activations=("tanh", "relu")))
    def check(problem):
        assume(problem.net.activation != "relu" or np.abs(problem.membrane()).min() > 1e-4)
        problem.net.w_rec[...] = 0
        expected = problem.reference("bptt")
        assume(moves(expected))
        trial = problem.inputs, problem.targets, problem.mask
        for rule in (mf.EProp(), mf.ModProp(problem.mu), mf.ModProp(problem.mu, factor="mean")):
            assert_close(problem.learner(rule).gradient(*trial), expected, tolerance)

    check()


@both_dtypes
@given(data=st.data())
@settings(max_examples=20)
def test_no_tap_is_eprop_and_one_tap_is_mdgl(dtype, tolerance, data):
    """V = 0 leaves no tap; without leak, mu = 0 leaves the first one, F_1 = M."""
    problem = data.draw(problems(dtype, activations=SMOOTH, tau=0.0))
    net, trial = problem.net, (problem.inputs, problem.targets, problem.mask)
    nothing = np.zeros((net.n_rec, 2)), np.zeros((2, net.n_rec))
    expected = problem.reference("eprop")
    assume(moves(expected))
    assert_close(problem.learner(mf.ModProp(0.5, modulation=nothing)).gradient(*trial), expected, tolerance)
    expected = problem.reference("mdgl", wb=reference.type_means(net.w_rec, net.types))
    assert_close(problem.learner(mf.ModProp(0.0)).gradient(*trial), expected, tolerance)


@both_dtypes
@given(data=st.data())
@settings(max_examples=20)
def test_without_leak_the_taps_are_powers_of_w(dtype, tolerance, data):
    """The paper's form: the eligibility traces of s steps ago, times mu^(s-1) (W^s)[j, p]."""
    problem = data.draw(problems(dtype, activations=SMOOTH, tau=0.0, max_rec=8))
    net = problem.net
    path = reference.forward(net.weights, problem.inputs, leak=0.0, activation=net.activation)
    _, error = reference.loss_and_error(problem.loss, path.y, problem.targets, problem.mask)
    modulator = (error @ net.w_out.astype(float)) * path.h  # L_t[j] h_t[j]
    wb = reference.type_means(net.w_rec, net.types)
    expected = {}
    for name, eps in path.traces.items():
        grad = np.einsum("btp,btq->pq", modulator, eps)
        for s in range(1, eps.shape[1]):
            tap = problem.mu ** (s - 1) * np.linalg.matrix_power(wb, s)
            grad += np.einsum("btj,jp,btp,btq->pq", modulator[:, s:], tap, path.h[:, :-s], eps[:, :-s])
        expected[name] = grad[:, 0] if name == "b_rec" else grad
    expected["w_rec"] *= net.connections
    assume(moves(expected))
    got = problem.learner(mf.ModProp(problem.mu)).gradient(problem.inputs, problem.targets, problem.mask)
    assert_close({name: got[name] for name in expected}, expected, tolerance)


@both_dtypes
@pytest.mark.parametrize("factor", ["exact", "mean"])
@given(data=st.data())
@settings(max_examples=15)
def test_permuting_units_within_a_type_permutes_the_gradient(dtype, tolerance, factor, data):
    problem = data.draw(problems(dtype, activations=SMOOTH, constrained=False))
    net, rng = problem.net, problem.rng
    order = np.arange(net.n_rec)
    for a in range(net.n_types):
        members = np.flatnonzero(net.types == a)
        order[members] = rng.permutation(members)
    trial = problem.inputs, problem.targets, problem.mask
    before = problem.learner(mf.ModProp(problem.mu, factor=factor)).gradient(*trial)
    assume(moves(before))
    net.w_rec, net.w_in, net.w_out = net.w_rec[np.ix_(order, order)], net.w_in[order], net.w_out[:, order]
    if "b_rec" in net.weights:
        net.b_rec = net.b_rec[order]
        before["b_rec"] = before["b_rec"][order]
    before |= {"w_rec": before["w_rec"][np.ix_(order, order)], "w_in": before["w_in"][order], "w_out": before["w_out"][:, order]}
    after = problem.learner(mf.ModProp(problem.mu, factor=factor)).gradient(*trial)
    assert_close(after, before, tolerance)


@both_dtypes
@given(data=st.data())
@settings(max_examples=20)
def test_a_batch_is_the_mean_of_its_trials(dtype, tolerance, data):
    problem = data.draw(problems(dtype, activations=ALL))
    learner = problem.learner(mf.ModProp(problem.mu))
    whole = learner.gradient(problem.inputs, problem.targets, problem.mask)
    assume(moves(whole))
    n_trials = len(problem.inputs)
    parts = [
        learner.gradient(problem.inputs[i : i + 1], problem.targets[i : i + 1], problem.mask if problem.mask is None else problem.mask[i])
        for i in range(n_trials)
    ]
    assert_close(whole, {name: sum(np.asarray(part[name], float) for part in parts) / n_trials for name in whole}, tolerance)


@both_dtypes
@given(data=st.data())
@settings(max_examples=20)
def test_scaling_the_error_scales_the_gradient(dtype, tolerance, data):
    problem = data.draw(problems(dtype, activations=ALL))
    xs = problem.inputs[0]
    signals = problem.rng.normal(size=(len(xs), problem.net.n_out)).astype(dtype)
    grads = []
    for factor in (1, -4):
        learner = problem.learner(mf.ModProp(problem.mu), update="apply")
        for x, signal in zip(xs, factor * signals):
            learner.step(x, signal=signal)
        grads.append(learner.accumulated)
    assume(moves(grads[0]))
    assert_close(grads[1], {name: -4.0 * g for name, g in grads[0].items()}, tolerance)
