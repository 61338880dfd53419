"""The rules of the specification against each other, and against what they must become at the ends of their dials."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import SMOOTH, assert_close, moves, problems
from test_reference import FIXTURES, load, theirs

from modprop_fast import reference
from modprop_fast.reference_rules import uoro

# Sums of up to 8 steps x 37 units, each rounded to 1.1e-16 of its size: 3e-14.  The factor of 30 is for what cancels
# in them; the worst of 500 examples of every test was 5e-14.
EQUAL = 1e-12


def modulation(problem, kind):
    net, rng = problem.net, problem.rng
    rank = int(rng.integers(1, 4))
    return {
        "types": lambda: reference.type_means(net.w_rec, net.types),
        "no self": lambda: reference.type_means(net.w_rec, net.types, self_modulation=False),
        "cells": lambda: net.w_rec,
        "low rank": lambda: np.matmul(*reference.low_rank(net.w_rec, rank)),
    }[kind]()


@st.composite
def filters(draw, problem):
    """Keywords of a ModProp that nobody chose by hand."""
    net, rng = problem.net, problem.rng
    mu = draw(st.sampled_from(["scalar", "per unit", "instant"]), label="mu is")
    return {
        "rule": "modprop",
        "wb": modulation(problem, draw(st.sampled_from(["types", "no self", "cells", "low rank"]), label="modulation")),
        "mu": {"scalar": problem.mu, "per unit": rng.random(net.n_rec), "instant": "instant"}[mu],
        "factor": draw(st.sampled_from(["exact", "mean", "running"]), label="factor"),
        "hbar": rng.random(net.n_rec),
        "types": net.types,
    }


def differs(problem, grads):
    """Whether a rule says something that e-prop does not: its nonlocal term is there, and so is the local one."""
    eprop = problem.reference("eprop")
    return moves(eprop) and moves({"w_in": grads["w_in"] - eprop["w_in"]})


def small_enough(problem):
    assume(problem.net.n_rec <= 19)


@settings(max_examples=60)
@given(st.data(), problems(max_rec=8))
def test_modprop_is_the_same_forwards_and_backwards(data, problem):
    small_enough(problem)
    how = data.draw(filters(problem))
    backwards = problem.reference(mode="offline", **how)
    assume(differs(problem, backwards))
    assert_close(problem.reference(mode="online", **how), backwards, EQUAL)


@settings(max_examples=60)
@given(problems(max_rec=8), st.integers(1, 9))
def test_tbptt_is_the_same_forwards_and_backwards(problem, horizon):
    small_enough(problem)
    backwards = problem.reference("tbptt", horizon=horizon)
    assume(moves(backwards))
    assert_close(problem.reference("tbptt", mode="online", horizon=horizon), backwards, EQUAL)


@settings(max_examples=40)
@given(problems(), st.integers(0, 3), st.sampled_from(["online", "offline"]))
def test_tbptt_over_the_trial_is_bptt(problem, more, mode):
    small_enough(problem)
    expected = problem.reference("bptt")
    assume(differs(problem, expected))
    horizon = problem.inputs.shape[1] + more
    assert_close(problem.reference("tbptt", mode=mode, horizon=horizon), expected, EQUAL)


@settings(max_examples=40)
@given(st.data(), problems(activations=SMOOTH, max_rec=8))
def test_tbptt_of_a_window_is_bptt_of_every_error_from_the_windows_start(data, problem):
    """One error at a time, through a network that starts at the window's start in the state it was in."""
    small_enough(problem)
    net, n_steps = problem.net, problem.inputs.shape[1]
    horizon = data.draw(st.integers(1, n_steps), label="horizon")
    got = problem.reference("tbptt", horizon=horizon)
    assume(moves(got))
    path = reference.forward(net.weights, problem.inputs, leak=net.leak, activation=net.activation)
    _, error = reference.loss_and_error(problem.loss, path.y, problem.targets, problem.mask)
    m, k, w = (error @ net.w_out) * path.h, net.leak, net.w_rec
    expected = np.zeros_like(got["w_in"])
    for t in range(n_steps):
        transport = np.broadcast_to(np.eye(net.n_rec), (len(m), net.n_rec, net.n_rec))  # dv_t / dv_s
        for s in range(t, max(t - horizon, -1), -1):
            expected += (1 - k) * np.einsum("bj,bjp,bq->pq", m[:, t], transport, problem.inputs[:, s])
            transport = transport @ (k * np.eye(net.n_rec) + (1 - k) * w * path.h[:, s - 1, None])
    assert_close({"w_in": got["w_in"]}, {"w_in": expected}, EQUAL)


@settings(max_examples=60)
@given(st.data(), problems(max_rec=8))
def test_taps_are_the_same_forwards_and_backwards(data, problem):
    """Any taps, of cells and of types; one tap per pair of types is one per pair of cells."""
    small_enough(problem)
    net, rng, how = problem.net, problem.rng, data.draw(filters(problem))
    n_taps = data.draw(st.integers(1, 10), label="S")
    by_type = rng.normal(size=(n_taps, net.n_types, net.n_types))
    taps = data.draw(st.sampled_from([by_type[:, net.types][:, :, net.types], rng.normal(size=(n_taps, net.n_rec, net.n_rec))]))
    backwards = problem.reference(mode="offline", **how | {"taps": taps})
    assume(differs(problem, backwards))
    assert_close(problem.reference(mode="online", **how | {"taps": taps}), backwards, EQUAL)


@settings(max_examples=60)
@given(st.data(), problems())
def test_the_first_taps_of_modprop(data, problem):
    """None is e-prop, one is MDGL, as many as steps are ModProp."""
    how = data.draw(filters(problem)) | {"factor": "exact"}
    assume(not isinstance(how["mu"], str))
    whole = problem.reference(**how)
    assume(differs(problem, whole))
    assert_close(problem.reference(taps=0, **how), problem.reference("eprop"), EQUAL)
    assert_close(problem.reference(taps=1, **how), problem.reference("mdgl", wb=how["wb"]), EQUAL)
    n_steps = problem.inputs.shape[1]
    for factor in ("exact", "mean", "running"):
        how["factor"] = factor
        for n_taps in (n_steps - 1, n_steps, n_steps + 2):
            assert_close(problem.reference(taps=n_taps, **how), problem.reference(**how), EQUAL)


@settings(max_examples=40)
@given(problems(max_rec=8))
def test_taps_of_types_are_those_of_math_over_types(problem):
    """F_s = (1-k) K^{s-1} M with the C x C matrices K = k I + (1-k) M diag(n mu), expanded."""
    net = problem.net
    count = np.bincount(net.types)
    mu = problem.rng.random(net.n_types)
    U = np.eye(net.n_types)[net.types]
    M = U.T @ net.w_rec @ U / np.outer(count, count)
    assume(np.abs(M).max() > 1e-9)
    K = net.leak * np.eye(net.n_types) + (1 - net.leak) * M * (count * mu)
    got = reference.modprop_taps(reference.type_means(net.w_rec, net.types), mu[net.types], net.leak, 6)
    expected = np.stack([(1 - net.leak) * np.linalg.matrix_power(K, s) @ M for s in range(6)])[:, net.types][:, :, net.types]
    assert_close({"taps": got}, {"taps": expected}, EQUAL)


@settings(max_examples=40)
@given(st.data(), problems())
def test_the_running_factor_is_mean_where_hbar_is_mu(data, problem):
    mu = problem.rng.random(problem.net.n_rec)
    how = data.draw(filters(problem)) | {"mu": mu, "factor": "mean"}
    expected = problem.reference(**how)
    assume(differs(problem, expected))
    assert_close(problem.reference(**how | {"factor": "running", "hbar": mu}), expected, EQUAL)


@settings(max_examples=40)
@given(st.data(), problems(activations=("identity",)))
def test_the_running_factor_is_exact_where_h_does_not_move(data, problem):
    how = data.draw(filters(problem)) | {"factor": "exact"}
    expected = problem.reference(**how)
    assume(differs(problem, expected))
    assert_close(problem.reference(**how | {"factor": "running", "hbar": np.ones(problem.net.n_rec)}), expected, EQUAL)


@settings(max_examples=40)
@given(problems(activations=("identity",)), st.sampled_from(["exact", "mean"]))
def test_instant_mu_of_a_linear_network_is_one(problem, factor):
    how = {"wb": reference.type_means(problem.net.w_rec, problem.net.types), "factor": factor}
    expected = problem.reference("modprop", mu=1.0, **how)
    assume(differs(problem, expected))
    assert_close(problem.reference("modprop", mu="instant", types=problem.net.types, **how), expected, EQUAL)


@settings(max_examples=40)
@given(problems(), st.sampled_from(["exact", "mean"]))
def test_instant_mu_with_a_type_for_every_unit_is_bptt(problem, factor):
    expected = problem.reference("bptt")
    assume(differs(problem, expected))
    every = np.arange(problem.net.n_rec)
    got = problem.reference("modprop", mu="instant", types=every, wb=problem.net.w_rec, factor=factor)
    assert_close(got, expected, EQUAL)


@settings(max_examples=60)
@given(st.data(), problems(max_rec=8), st.integers(1, 9))
def test_exact_steps_are_the_same_forwards_and_backwards(data, problem, n_exact):
    small_enough(problem)
    how = data.draw(st.sampled_from([{"rule": "eprop"}, {"rule": "none"}, data.draw(filters(problem))]), label="tail")
    backwards = problem.reference(mode="offline", exact_steps=n_exact, **how)
    assume(moves(backwards))
    assert_close(problem.reference(mode="online", exact_steps=n_exact, **how), backwards, EQUAL)


@settings(max_examples=60)
@given(st.data(), problems(), st.integers(1, 9))
def test_exact_steps_with_traces_of_types(data, problem, n_exact):
    """MATH 6b as an engine runs it: R[a, p, q] per type, moved on by a whole chunk at once with powers of K."""
    net, k, w = problem.net, problem.net.leak, problem.net.w_rec
    got = problem.reference("modprop", wb=reference.type_means(w, net.types), exact_steps=n_exact)
    assume(differs(problem, got))
    path = reference.forward(net.weights, problem.inputs, leak=k, activation=net.activation)
    _, error = reference.loss_and_error(problem.loss, path.y, problem.targets, problem.mask)
    signal = error @ net.w_out
    U = np.eye(net.n_types)[net.types]
    M = (U.T @ w @ U) / np.outer(U.sum(0), U.sum(0))
    V = M @ U.T
    K = k * np.eye(net.n_types) + (1 - k) * problem.mu * V @ U
    n_trials, n_steps, n_rec = signal.shape
    for name in ("w_rec", "w_in"):
        eps, s = path.traces[name], path.sources[name]
        expected = np.zeros((n_rec, eps.shape[2]))
        for i in range(n_trials):
            R = np.zeros((net.n_types, n_rec, eps.shape[2]))  # R_{t0-1}
            for t0 in range(0, n_steps, n_exact):
                steps = range(t0, min(t0 + n_exact, n_steps))
                d = np.zeros(n_rec)
                for t in reversed(steps):
                    d = path.h[i, t] * (signal[i, t] + (1 - k) * w.T @ d) + k * d
                    expected += (1 - k) * np.outer(d, s[i, t])
                if t0 > 0:
                    a = k * d + (1 - k) * path.h[i, t0 - 1] * (w.T @ d)
                    expected += np.outer(a, eps[i, t0 - 1]) + np.einsum("c,cpq->pq", U.T @ a, R)
                # K^b over R_{t0-1}, then the drives of t0-1 .. t0+b-2 that enter R_{t0} .. R_{t0+b-1}
                R = np.einsum("ac,cpq->apq", np.linalg.matrix_power(K, len(steps)), R)
                for t in steps:
                    if t > 0:
                        power = np.linalg.matrix_power(K, steps[-1] - t)
                        R += (1 - k) * np.einsum("ac,cp,p,q->apq", power, V, path.h[i, t - 1], eps[i, t - 1])
        if name == "w_rec":
            expected *= net.connections
        assert_close({name: got[name]}, {name: expected}, EQUAL)


@settings(max_examples=40)
@given(st.data(), problems(), st.integers(0, 3))
def test_exact_steps_over_the_trial_are_bptt(data, problem, more):
    how = data.draw(st.sampled_from([{"rule": "eprop"}, {"rule": "none"}, data.draw(filters(problem))]), label="tail")
    expected = problem.reference("bptt")
    assume(differs(problem, expected))
    n_exact = problem.inputs.shape[1] + more
    assert_close(problem.reference(exact_steps=n_exact, **how), expected, EQUAL)


@settings(max_examples=60)
@given(problems(max_rec=8), st.integers(1, 9), st.sampled_from(["online", "offline"]))
def test_exact_steps_with_an_exact_tail_are_bptt(problem, n_exact, mode):
    """By RTRL's own R beyond the chunk; by instant mu of every unit; and, in a linear network, by mu = 1."""
    small_enough(problem)
    expected = problem.reference("bptt")
    assume(differs(problem, expected))
    net, how = problem.net, {"exact_steps": n_exact, "mode": mode}
    assert_close(problem.reference("bptt", **how), expected, EQUAL)
    instant = {"mu": "instant", "types": np.arange(net.n_rec), "wb": net.w_rec}
    assert_close(problem.reference("modprop", **instant, **how), expected, EQUAL)
    if net.activation == "identity":
        assert_close(problem.reference("modprop", mu=1.0, wb=net.w_rec, **how), expected, EQUAL)


@settings(max_examples=60)
@given(st.data(), problems(max_rec=8))
def test_one_exact_step(data, problem):
    """With an eligibility tail it is MDGL of cells, with none TBPTT(1); a ModProp without modulators adds nothing."""
    small_enough(problem)
    net, how = problem.net, data.draw(filters(problem))
    mdgl = problem.reference("mdgl", wb=net.w_rec)
    assume(differs(problem, mdgl))
    assert_close(problem.reference("eprop", exact_steps=1), mdgl, EQUAL)
    assert_close(problem.reference("none", exact_steps=1), problem.reference("tbptt", horizon=1), EQUAL)
    nothing = how | {"wb": np.zeros_like(net.w_rec), "mu": 1.0}
    assert_close(problem.reference(exact_steps=1, **nothing), mdgl, EQUAL)


@settings(max_examples=40)
@given(problems(autapses=True, constrained=False, max_rec=8), st.sampled_from(["online", "offline"]))
def test_snap1_is_exact_for_a_diagonal_network(problem, mode):
    net = problem.net
    small_enough(problem)
    net.w_rec[...] = np.diag(problem.rng.normal(size=net.n_rec))
    expected = problem.reference("bptt", mode="online")
    assume(differs(problem, expected))
    assert_close(problem.reference("snap1", mode=mode), expected, EQUAL)


@settings(max_examples=40)
@given(problems(autapses=True, constrained=False, max_rec=8))
def test_snap1_keeps_the_influence_on_the_postsynaptic_unit(problem):
    """By the recursion of Menick et al.: J_t[p, q] = (k + (1-k) W[p, p] h_{t-1}[p]) J_{t-1}[p, q] + (1-k) s_t[q]."""
    small_enough(problem)
    net, k = problem.net, problem.net.leak
    problem.rng.shuffle(net.w_rec)
    got = problem.reference("snap1")
    assume(differs(problem, got))
    path = reference.forward(net.weights, problem.inputs, leak=k, activation=net.activation)
    _, error = reference.loss_and_error(problem.loss, path.y, problem.targets, problem.mask)
    m = (error @ net.w_out) * path.h
    expected, J = np.zeros_like(net.w_in, float), 0.0
    for t in range(problem.inputs.shape[1]):
        gain = k + (1 - k) * np.diag(net.w_rec) * path.h[:, t - 1] if t else np.zeros(net.n_rec)
        J = gain[..., None] * J + (1 - k) * problem.inputs[:, t, None, :]
        expected += np.einsum("bp,bpq->pq", m[:, t], np.broadcast_to(J, (*m[:, t].shape, net.n_in)))
    assert_close({"w_in": got["w_in"]}, {"w_in": expected}, EQUAL)


@settings(max_examples=40)
@given(problems(autapses=False, max_rec=8))
def test_snap1_without_autapses_is_eprop(problem):
    small_enough(problem)
    expected = problem.reference("eprop")
    assume(moves(expected) and not np.array_equal(problem.reference("bptt")["w_in"], expected["w_in"]))
    assert_close(problem.reference("snap1"), expected, EQUAL)


# Derandomised: 1 in 2e6 entries is more than five standard errors off by chance, and a test should not be.
@settings(max_examples=6, derandomize=True)
@given(problems(activations=("tanh", "softplus", "identity"), min_rec=2, max_rec=4, more_rec=(2, 3, 4), tau=1.5))
def test_uoro_is_unbiased(problem):
    """1e4 draws, as 100 batches of the same trial 100 times; their mean is BPTT's gradient and, to be told, not e-prop's."""
    net = problem.net
    assume(problem.inputs.shape[1] >= 3)
    problem.inputs, problem.targets, problem.mask = problem.inputs[:1], problem.targets[:1], None
    expected, eprop = problem.reference("bptt"), problem.reference("eprop")
    size = {name: np.abs(g).max() for name, g in expected.items()}
    assume(np.abs(expected["w_in"] - eprop["w_in"]).max() > 0.3 * size["w_in"] > 1e-3)
    problem.inputs, problem.targets = (np.repeat(x, 100, axis=0) for x in (problem.inputs, problem.targets))
    draws = [problem.reference("uoro", mode="online", rng=problem.rng) for _ in range(100)]
    told = 0.0
    for name in expected:
        drawn = np.array([g[name] for g in draws])
        mean, standard_error = drawn.mean(axis=0), drawn.std(axis=0, ddof=1) / 10
        assert np.all(np.abs(mean - expected[name]) <= 5 * standard_error + EQUAL * size[name]), name
        if name in ("w_in", "w_rec"):
            live = standard_error > 0
            assert live.any()
            told = max(told, np.max(np.abs(mean - eprop[name])[live] / standard_error[live]))
    assert told > 5


def test_uoro_of_nothing_is_nothing_and_of_a_seed_the_same():
    rng = np.random.default_rng(0)
    m, h, s = (rng.normal(size=(2, 5, n)) for n in (3, 3, 4))
    w = rng.normal(size=(3, 3))
    once, again, other = (uoro(m, h, s, w, 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.abs(once).max() > 0
    assert np.array_equal(once, again) and not np.array_equal(once, other)
    assert not uoro(m, h, np.zeros_like(s), w, 0.5, rng).any()
    silent_start = s.copy()
    silent_start[:, :2] = 0
    assert np.isfinite(uoro(m, h, silent_start, w, 0.5, rng)).all()


@settings(max_examples=60)
@given(st.data(), problems(max_rec=8))
def test_eigenvectors_carry_modprop_of_cells(data, problem):
    net = problem.net
    wb = modulation(problem, data.draw(st.sampled_from(["cells", "types"])))
    mu = data.draw(st.sampled_from([problem.mu, problem.rng.random(net.n_rec)]))
    _, X = np.linalg.eig(net.leak * np.eye(net.n_rec) + (1 - net.leak) * wb * mu)
    conditioning = np.linalg.cond(X)
    assume(conditioning < 1e6)
    how = {"wb": wb, "factor": "mean", "mu": mu}
    expected = problem.reference("modprop", mode="offline", **how)
    assume(differs(problem, expected))
    got = problem.reference("modprop", mode="eigenvectors", **how)
    # what no error ever sees is zero in the one and rounding in the other: the size that counts is that of all weights
    got, expected = ({"all": np.concatenate([grads["w_rec"], grads["w_in"]], axis=1)} for grads in (got, expected))
    assert_close(got, expected, EQUAL * conditioning)


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.floats(1.5, 1000))
def test_auto_mu_ends_the_memory_within_the_horizon(seed, n_types, leak, horizon):
    rng = np.random.default_rng(seed)
    h, M, n = rng.random(n_types), rng.normal(size=(n_types, n_types)), rng.integers(1, 20, n_types)
    M *= rng.choice([0.03, 1.0])

    def radius(mu):
        return np.abs(np.linalg.eigvals(leak * np.eye(n_types) + (1 - leak) * M * (n * mu))).max()

    mu = reference.auto_mu(h, M, n, leak, horizon)
    c = mu[0] / h[0]
    bound = max(1 - 1 / horizon, (1 + leak) / 2)
    assert 0 < c <= 1
    assert mu == pytest.approx(c * h, rel=1e-12)
    # the roots of an ill-conditioned K move by far more than its rounding errors
    for part in (0.1, 0.5, 0.9, 1.0):
        assert radius(part * mu) <= bound + 1e-8
    if radius(h) <= bound - 1e-8 and c < 1:
        assert radius(h * (c + 1e-4)) >= bound - 1e-8  # out of bounds in between
    elif c < 1:
        assert radius(mu) == pytest.approx(bound, abs=1e-8)
    else:
        assert np.array_equal(mu, h)


def test_auto_mu_by_hand():
    """One excitatory type: K = k + (1-k) M n mu.  The leak's own memory of 100 steps leaves room for as much again."""
    auto = reference.auto_mu
    assert auto([0.5], [[0.1]], [10], 0.0, 100) == [0.5]
    assert auto([1.0], [[0.2]], [10], 0.0, 100) == pytest.approx([0.99 / 2])
    assert auto([1.0], [[0.1]], [10], 0.99, 20) == pytest.approx([0.5])
    assert auto([1.0], [[-0.1]], [10], 0.0, 100) == pytest.approx([0.99])
    assert auto([0.3], [[0.0]], [10], 0.5, 100) == [0.3]
    assert auto([0.0, 0.0], np.ones((2, 2)), [10, 10], 0.5, 100).tolist() == [0, 0]


@settings(max_examples=40)
@given(problems())
def test_low_rank_is_the_best_of_its_rank(problem):
    w = problem.net.w_rec
    sizes = np.linalg.svd(w, compute_uv=False)
    assume(sizes[0] > 1e-9)
    for rank in {1, len(w) // 2, len(w)} - {0}:
        U, V = reference.low_rank(w, rank)
        assert U.shape == V.T.shape == (len(w), rank)
        left = np.sqrt(np.sum(sizes[rank:] ** 2))  # Eckart & Young: no matrix of this rank comes nearer
        assert np.linalg.norm(U @ V - w) == pytest.approx(left, abs=EQUAL * sizes[0])


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_the_authors_mdgl_is_one_tap_and_one_exact_step(path, mode):
    data, types, loss = load(path)
    weights = {"w_rec": data["W_rec"], "w_in": data["W_in"], "w_out": data["W_out"], "b_out": data["b_out"]}
    leak = float(np.exp(-data["dt"] / data["tau"]))
    means = reference.type_means(data["W_rec"], types)
    for name, how in {
        "mdgl_type": {"rule": "modprop", "taps": (1 - leak) * means[None]},
        "mdgl_cell": {"rule": "eprop", "exact_steps": 1},
    }.items():
        _, grads = reference.gradient(
            weights, data["inputs"], data["targets"], leak=leak, activation="relu", loss=loss, mode=mode, **how
        )
        np.fill_diagonal(grads["w_rec"], 0)
        assert moves(grads)
        assert_close(grads, theirs(data, name), 1e-13)


def test_what_has_no_such_form_says_so():
    weights = {"w_rec": np.eye(2), "w_in": np.ones((2, 1)), "w_out": np.ones((1, 2)), "b_out": np.zeros(1)}
    run = {"inputs": np.ones((1, 3, 1)), "targets": np.zeros((1, 3, 1)), "leak": 0.5, "activation": "tanh", "loss": "mse"}
    with pytest.raises(ValueError, match="uoro: there is only an online form"):
        reference.gradient(weights, rule="uoro", mode="offline", **run)
    with pytest.raises(ValueError, match="factor='mean' only"):
        reference.gradient(weights, rule="modprop", wb=np.eye(2), mode="eigenvectors", **run)
    with pytest.raises(ValueError, match="unknown 'bppt'"):
        reference.gradient(weights, rule="bppt", **run)
