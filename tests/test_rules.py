"""Rules that change with the weights and with the activity, and rules as text."""

import numpy as np
import pytest
from problems import assert_close, same_bits

import modprop_fast as mf
from modprop_fast import reference

N, T, B = 20, 12, 5


def make(rule, autapses=False, dtype="float64", tau=5.0, **kwargs):
    rng = np.random.default_rng(0)
    net = mf.Network(2, N, 2, types={"E": 0.6, "I": 0.4}, dtype=dtype, tau=tau, autapses=autapses, gain=1.5, rng=rng)
    return net, mf.Learner(net, rule, **kwargs), rng.normal(size=(B, T, 2)), rng.normal(size=(B, T, 2))


def gradient(net, inputs, targets, **how):
    grads = reference.gradient(net.weights, inputs, targets, leak=net.leak, activation="relu", loss="mse", **how)[1]
    grads["w_rec"] = grads["w_rec"] * net.connections
    return grads


def mean_h(net, inputs):
    return reference.forward(net.weights, inputs, leak=net.leak, activation="relu").h.mean(axis=(0, 1))


@pytest.mark.parametrize("offline", [False, True], ids=["streamed", "adjoint"])
@pytest.mark.parametrize("factor", ["exact", "mean", "running"])
def test_auto_and_running_follow_the_activity_that_was_learned_from(factor, offline):
    rule = mf.ModProp("auto", factor=factor, horizon=12.0)
    net, learner, inputs, targets = make(rule, optimizer=mf.SGD(0.05), update="apply")
    seen = None
    for batch in range(3):  # nothing is known, then what the first batch showed, then a tenth of the way or half of it
        M = reference.type_means(net.w_rec, net.types)
        h = np.full(N, 0.5) if seen is None else seen
        n, first = np.bincount(net.types), [0, 12]
        mu = reference.auto_mu(np.bincount(net.types, h) / n, M[np.ix_(first, first)], n, net.leak, 12.0)
        expected = gradient(net, inputs, targets, rule="modprop", wb=M, mu=mu[net.types], factor=factor, hbar=h)
        mode = "offline" if offline else "online"
        assert_close(learner.gradient(inputs, targets, mode=mode), expected, 1e-9)
        assert_close(learner.gradient(inputs, targets, mode=mode), expected, 1e-9)  # looking changes nothing
        now = mean_h(net, inputs)
        learner.fit_trials(inputs, targets)
        seen = now if seen is None else seen + (now - seen) / (batch + 1)
    assert np.ptp(seen) > 0.2


def test_auto_keeps_the_filter_from_remembering_longer_than_its_horizon():
    net, learner, inputs, targets = make(mf.ModProp("auto", horizon=20.0))
    learner.run(inputs[0], targets[0])  # some activity is known
    net.w_rec = np.where(net.connections, 1.0, 0.0)  # with mu = 1/2: rho(K) far above 1
    learner.reset()
    assert learner.filter_radius == pytest.approx(0.95, abs=1e-6)
    with pytest.warns(RuntimeWarning, match="rho"):
        mf.Learner(net, mf.ModProp(0.5))


@pytest.mark.parametrize("types", [[0] * 20, [0, 1] * 10, [0, 1, 2, 1] * 5])
def test_a_filter_that_all_but_keeps_everything_is_no_reason_to_warn(types):
    net = mf.Network(1, 20, 1, types=types, tau=1e8, dtype="float64", rng=np.random.default_rng(1))
    learner = mf.Learner(net, mf.ModProp(0.25), optimizer=mf.SGD(1e-6))
    assert 1e-9 < 1 - learner.filter_radius < 1e-7
    learner.run(np.ones((50, 1)), np.ones((50, 1)))  # a warning would be an error


def test_auto_shrinks_mu_for_the_means_that_are_in_use():
    net, learner, inputs, targets = make(mf.ModProp("auto", horizon=20.0, refresh="never"), update="apply")
    net.w_rec = np.where(net.connections, 1.0, 0.0)
    learner.run(inputs[0], targets[0])
    learner.reset()
    assert np.allclose(learner._plan.mu, [learner._h_mean[net.types == a].mean() for a in (0, 1)])  # as they are: those means are small
    assert learner.filter_radius < 0.95


@pytest.mark.parametrize("rule", [mf.ModProp(0.25, mf.LowRank(3)), mf.MDGL(mf.LowRank(3))], ids=["modprop", "mdgl"])
def test_low_rank_follows_the_weights(rule):
    net, learner, inputs, targets = make(rule, optimizer=mf.SGD(0.5), update="apply")
    kind = "mdgl" if isinstance(rule, mf.MDGL) else "modprop"
    for _ in range(2):
        wb = np.matmul(*reference.low_rank(net.w_rec, 3))
        assert_close(learner.gradient(inputs, targets), gradient(net, inputs, targets, rule=kind, wb=wb, mu=0.25), 1e-9)
        learner.fit_trials(inputs, targets)
        assert np.abs(np.matmul(*reference.low_rank(net.w_rec, 3)) - wb).max() > 1e-4


@pytest.mark.parametrize("factor", ["exact", "mean"])
def test_traces_outlast_another_order_and_other_signs_of_singular_vectors(factor, monkeypatch):
    """In a stream the plan follows W while traces are carried on: those of a modulator stay its own."""
    weights, turned = [], False

    def low_rank(w, rank):
        u, v = reference.low_rank(w, rank)
        return (u[:, ::-1] * [-1, 1, -1], v[::-1] * [[-1], [1], [-1]]) if turned else (u, v)

    monkeypatch.setattr("modprop_fast.rules.low_rank", low_rank)
    for turns in (False, True):
        turned = False
        net, learner, inputs, targets = make(mf.ModProp(0.25, mf.LowRank(3), factor=factor), optimizer=mf.SGD(0.01))
        learner.run(inputs[0], targets[0])
        turned = turns
        learner.fit_trials(inputs, targets)
        before = net.w_rec.copy()
        learner.run(inputs[1][:3], targets[1][:3])
        assert np.abs(net.w_rec - before).max() > 1e-4
        other, resumed, *_ = make(learner.rule, optimizer=mf.SGD(0.01))
        for name, w in net.weights.items():
            other.weights[name][...] = w
        resumed.restore(learner.state())
        [one.fit_trials(inputs, targets) for one in (learner, resumed)]
        assert same_bits(other.weights, net.weights)
        weights.append(net.weights)
    assert_close(weights[1], weights[0], 1e-12)


def test_the_ends_of_the_dials():
    net, exact, inputs, targets = make(mf.BPTT())
    bptt = exact.gradient(inputs, targets, mode="offline")
    for rule in (mf.TBPTT(T), mf.ModProp(exact_steps=T), mf.EProp(exact_steps=T + 3)):
        assert_close(make(rule)[1].gradient(inputs, targets, mode="offline"), bptt, 1e-12)
    for rule in (mf.TBPTT(T // 2), mf.ModProp(exact_steps=T // 2), mf.EProp(exact_steps=T // 2)):
        assert np.abs(make(rule)[1].gradient(inputs, targets, mode="offline")["w_rec"] - bptt["w_rec"]).max() > 1e-6
    eprop = make(mf.EProp())[1].gradient(inputs, targets)
    assert_close(make(mf.SnAp1())[1].gradient(inputs, targets), eprop, 0)
    assert np.abs(eprop["w_rec"] - bptt["w_rec"]).max() > 1e-6


def test_snap1_is_exact_for_a_diagonal_w():
    net, _, inputs, targets = make(mf.BPTT(), autapses=True)
    net.w_rec = np.diag(np.random.default_rng(1).normal(size=N))
    bptt = mf.Learner(net, mf.BPTT()).gradient(inputs, targets, mode="offline")
    snap1 = mf.Learner(net, mf.SnAp1()).gradient(inputs, targets, mode="offline")
    eprop = mf.Learner(net, mf.EProp()).gradient(inputs, targets)
    for grads in (bptt, snap1, eprop):
        grads["w_rec"] = np.diag(np.diag(grads["w_rec"]))  # of the synapses that there are
    assert_close(snap1, bptt, 1e-12)
    assert np.abs(eprop["w_rec"] - bptt["w_rec"]).max() > 1e-6


def test_rtrl_is_bptt_while_there_is_memory():
    inputs, targets = (np.random.default_rng(2).normal(size=(2, 5, 2)) for _ in range(2))
    net = mf.Network(2, 4, 2, activation="tanh", dtype="float64", rng=np.random.default_rng(3))
    bptt = mf.Learner(net, mf.BPTT()).gradient(inputs, targets, mode="offline")
    assert_close(mf.Learner(net, mf.RTRL()).gradient(inputs, targets, mode="offline"), bptt, 1e-12)
    with pytest.raises(MemoryError, match="RTRL: expected at most 5e-07 GB, 4 units need 1\\.79e-06 GB"):
        mf.Learner(net, mf.RTRL(limit=500))


def test_state_holds_what_the_rule_follows():
    rule = mf.ModProp("auto", factor="running")
    net, learner, inputs, targets = make(rule, optimizer=mf.SGD(0.1), update="apply")
    learner.fit_trials(inputs, targets)
    twin_net, twin, _, _ = make(rule, optimizer=mf.SGD(0.1), update="apply")
    for name, w in twin_net.weights.items():
        w[...] = net.weights[name]
    twin.restore(learner.state())
    for each in (learner, twin):
        each.fit_trials(inputs, targets)
    assert np.array_equal(net.w_rec, twin_net.w_rec)


@pytest.mark.parametrize("text, rule", [
    ("bptt", mf.BPTT()),
    (" eprop ", mf.EProp()),
    ("rflo", mf.RFLO()),
    ("tbptt(horizon=7)", mf.TBPTT(7)),
    ("mdgl(modulation=cells)", mf.MDGL("cells")),
    ("modprop", mf.ModProp()),
    ("modprop(factor=running, mu=auto)", mf.ModProp("auto", factor="running")),
    ("modprop(modulation=lowrank:2, mu=0.5)", mf.ModProp(0.5, mf.LowRank(2))),
    ("modprop(exact_steps=20,self_modulation=True)", mf.ModProp(exact_steps=20)),
])  # fmt: skip
def test_rules_as_text(text, rule):
    assert mf.parse_rule(text) == rule
