"""Few connections: an engine that keeps these alone learns what one that keeps all N x N does."""

import copy
import ctypes
import gc
import os
import pickle
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import FUSED, RULES, assert_close, copied, problems, same_bits, stream, twin

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
EVENTS = (
    "look", "hold", "release", "write", "write outside", "tell", "reset", "no learning", "chunk", "trials", "copy", "window",
    "diverge",
)  # fmt: skip
any_rule = st.sampled_from(sorted(SPARSE)).map(SPARSE.get)


@contextmanager
def limits(density, units=0):
    """Engines that are made meanwhile keep connections alone below this density."""
    before = core.SPARSE
    core.SPARSE = dict.fromkeys(before, (units, density))
    try:
        yield
    finally:
        core.SPARSE = before


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


def agree(dense, sparse, call):
    """Both answer alike, as long as they learn: where numbers grow, so do rounding errors."""
    try:
        expected = call(dense)
    except FloatingPointError:
        with pytest.raises(FloatingPointError):
            call(sparse)
        return
    found = call(sparse)
    assume(np.abs(expected).max() < 100)
    if dense._plan.v is not None:  # a modulator that has nothing in common with the one before it comes with either sign
        assume(np.vdot(dense._plan.v, sparse._plan.v) > 0)
    assert np.allclose(found, expected, rtol=1e-8, atol=1e-9)


def diverge(learner, x):
    """A step whose readout is not finite."""
    b_out = learner.network._weights["b_out"]
    kept = b_out.copy()
    b_out[0] = np.inf
    try:
        return learner.step(x)
    finally:
        b_out[...] = kept


@settings(max_examples=250)
@given(
    problems(max_rec=24, max_steps=30, gain=0.5),
    any_rule,
    st.lists(st.tuples(st.integers(0, 29), st.sampled_from(EVENTS)), max_size=8),
)
def test_connections_alone_learn_the_same(problem, rule, events):
    """Step by step, whatever happens on the way."""
    assume(masked(problem))
    xs, each, targets, mask = stream(problem)
    dense, sparse = both = pair(problem, rule, optimizer=mf.SGD(0.02))
    held = None
    for t, (x, target) in enumerate(zip(xs, each)):
        kwargs = {}
        for event in [event for at, event in events if at % len(xs) == t]:
            if event == "look":
                assert_close({"w": sparse.network.w_rec}, {"w": dense.network.w_rec}, 1e-9)
            elif event == "hold":
                held = sparse.network.w_rec
            elif event == "release":
                held = None
            elif event.startswith("write"):
                where = np.argwhere(problem.net.connections == (event == "write"))
                i, j = where[problem.rng.integers(len(where))] if len(where) else (0, 0)
                sign = problem.net.sign  # a weight against Dale's law would be cleared when its unit next learns
                by = 0.1 if sign is None or sign[j] == 0 else 0.1 * sign[j]
                for learner in both if len(where) else ():
                    (held if learner is sparse and held is not None else learner.network.w_rec)[i, j] += by
                    if held is None:  # else nothing but the array itself tells
                        learner.network.w_in[0] += 0.1
            elif event == "reset":
                [learner.reset() for learner in both]
            elif event == "no learning":
                kwargs = {"learn": False}
            elif event == "chunk":
                agree(*both, lambda learner: learner.run(xs, targets, mask, chunk=3))
            elif event == "trials":
                agree(*both, lambda learner: learner.fit_trials(problem.inputs, problem.targets))
                agree(*both, lambda learner: learner.evaluate(problem.inputs, problem.targets).outputs)
            elif event == "copy":
                with limits(2):
                    held, sparse = None, copy.deepcopy(sparse) if t % 2 else pickle.loads(pickle.dumps(sparse))
                both = dense, sparse
            elif event == "diverge":
                agree(*both, lambda learner, x=x: diverge(learner, x))
            elif event == "tell":
                sparse.network.settle()
                sparse.weights_changed()
            else:
                sparse._engine.window = t % 31 + 1
        agree(dense, sparse, lambda learner, x=x, target=target, kwargs=kwargs: learner.step(x, target, **kwargs))
        if held is not None:
            assert_close({"w": held}, {"w": dense.network.w_rec}, 1e-9)
    assert_close(sparse.network.weights, dense.network.weights, 1e-9)
    if dense._engine.means is not None:
        assert np.allclose(sparse._engine.means, dense._engine.means, rtol=1e-9, atol=1e-12)


@settings(max_examples=40)
@given(problems("float32", activations=("relu", "tanh"), gain=0.5), any_rule, st.integers(1, 5), st.booleans())
def test_instruction_sets_and_copies_and_onlookers_change_no_bit(problem, rule, at, looks):
    assume(masked(problem))
    xs, _, targets, mask = stream(problem)
    xs, targets, mask = np.tile(xs, (6, 1)), np.concatenate([targets] * 6), np.tile(mask, 6)
    found = []
    for isa in 2 * (FUSED or ["baseline"]):
        os.environ["MODPROP_FAST_ISA"] = isa
        try:
            learner = pair(problem, rule, optimizer=mf.SGD(0.01))[1]
            held = learner.network.w_rec if looks and found else None
            ys = [learner.run(xs[:at], targets[:at], mask[:at])]
            if found:
                with limits(2):
                    learner = copy.deepcopy(learner)
            del held
            ys.append(learner.run(xs[at:], targets[at:], mask[at:]))
        finally:
            del os.environ["MODPROP_FAST_ISA"]
        found.append((np.concatenate(ys), learner.network.weights, learner._engine.snapshot()["arrays"]))
    assert not mask.any() or not same_bits(found[0][1], problem.net.weights)
    for ys, weights, arrays in found[1:]:
        assert np.array_equal(ys, found[0][0]) and same_bits(weights, found[0][1])
        for name in ("packed", "packed_traces", "traces", "means"):
            assert np.array_equal(arrays[name], found[0][2][name]), name


def small(rule=mf.ModProp(0.25), density=0.1, n_rec=260, lr=0.1):
    rng = np.random.default_rng(0)
    net = mf.Network(2, n_rec, 1, types={"E": 0.8, "I": 0.2}, dale={"E": 1, "I": -1}, bias=True, activation="tanh",
                     mask=rng.random((n_rec, n_rec)) < density, rng=rng)  # fmt: skip
    return mf.Learner(net, rule, optimizer=mf.SGD(lr))


def draw(n_steps):
    rng = np.random.default_rng(1)
    return rng.normal(size=(n_steps, 2)).astype("float32"), rng.normal(size=(n_steps, 1)).astype("float32")


def test_which_engines_keep_connections_alone():
    assert small()._engine.sparse and small(mf.EProp())._engine.sparse and small(mf.ModProp(factor="mean"))._engine.sparse
    assert small(density=0.38)._engine.sparse and not small(density=0.42)._engine.sparse and not small(n_rec=159)._engine.sparse
    assert small(mf.EProp(), density=0.18)._engine.sparse and not small(mf.EProp(), density=0.22)._engine.sparse
    assert not any(small(rule)._engine.sparse for rule in DENSE.values())
    assert not mf.Learner(small().network, mf.ModProp(), update="apply")._engine.sparse
    engine = small()._engine
    assert engine.arrays["packed"].size < 0.2 * 260 * 260 and not engine.arrays["traces"].size


@pytest.mark.parametrize("how", ["ask", "settle", "forget"])
def test_weights_are_written_when_somebody_asks(how):
    learner = small()
    net = learner.network
    before = copied(net._weights)  # behind the property's back
    learner.run(*draw(9))
    for name in ("w_rec", "w_in", "b_rec"):
        assert np.array_equal(net._weights[name], before[name]), name
    if how == "ask":
        assert net.b_out is not None  # any of them
    elif how == "settle":
        net.settle()
    else:
        del learner
        gc.collect()
    for name in ("w_rec", "w_in", "b_rec"):
        assert not np.array_equal(net._weights[name], before[name]), name
    assert not net.w_rec[~net.connections].any()


def test_who_holds_the_weights_sees_them_learn():
    """In another thread too, while a long run is under way."""
    learner, seen = small(lr=1e-4), set()
    held = learner.network.w_rec
    thread = threading.Thread(target=learner.run, args=draw(3000))
    thread.start()
    while thread.is_alive():
        seen.add(float(held.sum()))
    assert len(seen) > 3  # before, after, and between the two


def test_two_learners_of_one_network_take_turns():
    xs, targets = draw(40)
    nets = [small().network for _ in range(2)]
    with limits(0):
        plain = [mf.Learner(nets[1], rule, optimizer=mf.SGD(0.1)) for rule in (mf.EProp(), mf.ModProp(0.25))]
    mixed = [mf.Learner(nets[0], rule, optimizer=mf.SGD(0.1)) for rule in (mf.EProp(), mf.ModProp(0.25))]
    for t, (x, target) in enumerate(zip(xs, targets)):
        i = t // 3 % 2
        assert np.allclose(mixed[i].step(x, target), plain[i].step(x, target), rtol=1e-4, atol=1e-5)
    assert_close(nets[0].weights, nets[1].weights, 1e-4)


def test_weights_where_none_may_be_count_in_a_copy_too():
    """An engine that finds them goes back to all N x N for good."""
    one, (xs, targets) = small(lr=0.01), draw(30)
    one.run(xs[:10], targets[:10])
    i, j = np.argwhere(~one.network.connections)[700]
    one.network.w_rec[i, j] = value = 2 * one.network.sign[j]
    assert one._engine.sparse and np.ptp(one.run(xs[10:20], targets[10:20])) and not one._engine.sparse
    other = copy.deepcopy(one)
    assert not other._engine.sparse and other.network.w_rec[i, j] == value
    assert np.array_equal(other.run(xs[20:], targets[20:]), one.run(xs[20:], targets[20:]))
    assert same_bits(other.network.weights, one.network.weights)


def function(name, *types, returns=ctypes.c_int):
    """One of the C face."""
    of, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    of.restype, of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = core.__pyx_capi__[name]
    return ctypes.CFUNCTYPE(returns, *types)(pointer(capsule, of(capsule)))


def test_the_c_face_reads_what_was_learned_and_writes_what_counts():
    xs, targets = draw(10)
    one, other = small(), small()
    at, size, handle = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p()
    assert function("mpf_adopt", at, at)(id(one), ctypes.addressof(handle)) == 0
    get, put = (function(name, at, ctypes.c_char_p, at, size) for name in ("mpf_get", "mpf_set"))
    for _ in range(2):
        assert np.array_equal(one.run(xs, targets), other.run(xs, targets))
        w = np.empty((260, 260), "float32")
        assert get(handle, b"w_rec", w.ctypes.data, w.nbytes) == 0
        assert np.array_equal(w, other.network.w_rec)
        w *= 0.5
        other.network.w_rec *= 0.5
        assert put(handle, b"w_rec", w.ctypes.data, w.nbytes) == 0
    assert same_bits(one.network.weights, other.network.weights)
    assert function("mpf_destroy", at)(handle) == 0
