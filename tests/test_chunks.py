"""Traces and gradients that lag behind: any number of steps at once is the same rule, and writes into W are noticed."""

import os

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import RULES, assert_close, moves, problems, twin
from test_identities import FLOAT64, rules

import modprop_fast as mf

pytestmark = pytest.mark.filterwarnings("ignore:rho")


def longer(problem, n_steps):
    """The problem with one trial of `n_steps`: more than any ring holds.  Inputs may stay as they are for a while, and so do units."""
    net, rng = problem.net, problem.rng
    problem.inputs = rng.normal(size=(1, n_steps, net.n_in)).astype(net.dtype)
    problem.inputs = problem.inputs[:, np.cumsum(rng.random(n_steps) < rng.choice([0.02, 0.2, 1.0])) % n_steps]
    if problem.loss == "mse":
        problem.targets = rng.normal(size=(1, n_steps, net.n_out)).astype(net.dtype)
    else:
        problem.targets = rng.integers(0, net.n_out, (1, n_steps))
    problem.mask = rng.random((1, n_steps)) < rng.choice([0.1, 0.5, 1.0])
    problem.mask[:, -1] = True
    return problem


# radius below 1, so that rounding is not carried through 80 steps of growth
stable = {"activations": ("relu", "tanh", "sigmoid"), "max_rec": 10}


@settings(max_examples=40)
@given(problems("float64", **stable), st.sampled_from([1, 2, 3, 5, 16, 32]), st.integers(33, 80))
def test_every_chunk_gives_the_gradient_of_the_reference(problem, chunk, n_steps):
    longer(problem, n_steps).net.w_rec *= 0.3
    for name, (rule, streams, how) in rules(problem).items():
        if not streams:
            continue
        learner = problem.learner(rule)
        if learner.filter_radius >= 1:
            continue
        expected = problem.reference(mode="offline", **how)
        assume(moves(expected))
        try:
            assert_close(learner.gradient(problem.inputs, problem.targets, problem.mask, chunk=chunk), expected, FLOAT64)
        except AssertionError as error:
            raise AssertionError(f"{name}, chunk {chunk}: {error}") from None


slow = problems("float64", activations=("relu",), tau=20.0, min_rec=24, max_rec=60)


@settings(max_examples=60)
@given(slow, st.sampled_from([1, 7, 32, "auto"]), st.integers(100, 400), st.integers(0, 3))
def test_units_that_stay_awake_or_at_rest_for_long(problem, chunk, n_steps, n_errors):
    """Their traces are made when they turn, over hundreds of steps at once; where many turn, by terms."""
    longer(problem, n_steps).net.w_rec *= 0.3
    problem.mask[:] = False
    problem.mask[0, problem.rng.integers(0, n_steps, n_errors)] = True
    problem.mask[:, -1] = True
    rule, _, how = rules(problem)["types exact"]
    learner = problem.learner(rule)
    assume(learner.filter_radius < 1)
    expected = problem.reference(mode="offline", **how)
    assume(moves(expected))
    for _ in range(2):  # nothing of a trial is left in the next
        assert_close(learner.gradient(problem.inputs, problem.targets, problem.mask, chunk=chunk), expected, FLOAT64)


@settings(max_examples=30)
@given(problems("float64", **stable), st.sampled_from(sorted(RULES)), st.integers(40, 90))
def test_online_updates_with_lagging_traces_are_those_of_traces_kept_at_every_step(problem, name, n_steps):
    """The online engine lags by 4 steps while its filter follows W; with a window of 1 nothing lags."""
    longer(problem, n_steps).net.w_rec *= 0.3
    xs, targets, mask = problem.inputs[0], problem.targets[0], problem.mask[0]
    learners = [twin(problem, RULES[name], optimizer=mf.SGD(0.01)) for _ in range(2)]
    learners[1]._engine.window = 1
    ys = [learner.run(xs, targets, mask) for learner in learners]
    assume(np.isfinite(ys).all())
    assume(np.abs(learners[0].network.w_in - problem.net.w_in).max() > 1e-6)
    assert_close(learners[0].network.weights, learners[1].network.weights, FLOAT64)


@settings(max_examples=30)
@given(problems("float64", **stable), st.sampled_from(sorted(RULES)), st.integers(1, 40))
def test_sgd_by_chunks_is_accumulation_and_application(problem, name, chunk):
    """`run(chunk=b)` against b steps of an accumulating learner and one SGD update; traces carry over."""
    compare_chunks_and_accumulation(longer(problem, 75), name, chunk)


@settings(max_examples=20)
@given(slow, st.integers(20, 40))
def test_traces_of_units_that_stay_awake_go_through_the_filter_of_their_time(problem, chunk):
    """It changes with every update, whether a unit has turned since or not."""
    compare_chunks_and_accumulation(longer(problem, 75), "exact", chunk)


def compare_chunks_and_accumulation(problem, name, chunk):
    problem.net.w_rec *= 0.3
    xs, targets, mask = problem.inputs[0], problem.targets[0], problem.mask[0]
    chunked = twin(problem, RULES[name], optimizer=mf.SGD(0.01))
    plain = twin(problem, RULES[name], optimizer=mf.SGD(0.01), update="apply")
    ys = chunked.run(xs, targets, mask, chunk=chunk)
    expected = []
    for first in range(0, len(xs), chunk):
        part = slice(first, first + chunk)
        if chunk == 1 and not mask[first]:  # a step without error is no update
            expected.append(plain.run(xs[part]))
            continue
        expected.append(plain.run(xs[part], targets[part], mask[part]))
        if mask[part].any():
            plain.apply()
    assume(np.isfinite(ys).all())
    assert np.allclose(ys, np.concatenate(expected), rtol=1e-9, atol=1e-11)
    assume(np.abs(plain.network.w_in - problem.net.w_in).max() > 1e-6)
    assert_close(chunked.network.weights, plain.network.weights, FLOAT64)
    try:
        more = chunked.run(xs, targets, mask)  # and it goes on, step by step
    except FloatingPointError:
        assume(False)  # which may be too much for a network: it learns at every step now
    assert np.allclose(more[0], plain.run(xs, targets, mask)[0], rtol=1e-9, atol=1e-11)


def test_what_is_owed_to_the_gradient_goes_through_the_filter_of_its_time():
    """A reset takes the type means anew: the steps before it are completed with the old ones."""
    xs, targets = np.random.default_rng(0).normal(size=(2, 9, 2)).astype("float32")
    found = []
    for write in (False, True):
        net = mf.Network(2, 9, 2, activation="tanh", rng=np.random.default_rng(1))
        learner = mf.Learner(net, mf.ModProp(0.5), update="apply")
        learner.run(xs, targets)
        if write:
            net.w_rec *= -3
            learner.reset()
        found.append(learner.accumulated)
    assert np.abs(found[0]["w_rec"]).max() > 0.01
    assert_close(found[1], {name: g.astype(float) for name, g in found[0].items()}, 1e-6)


WRITES = {
    "attribute": lambda net, kept: net.w_rec.__setitem__((0, 1), 2.0),
    "assignment": lambda net, kept: setattr(net, "w_rec", np.full((9, 9), 0.25)),
    "dict": lambda net, kept: net.weights["w_rec"].__setitem__((0, 1), 2.0),
    "array kept from before": lambda net, kept: kept[0].__setitem__((0, 1), 2.0),
    "row kept from before": lambda net, kept: kept[1].__setitem__(1, 2.0),
    "memoryview kept from before": lambda net, kept: kept[2].__setitem__((0, 1), 2.0),
    "another learner": lambda net, kept: mf.Learner(net, mf.EProp(), optimizer=mf.SGD(1.0)).step(
        np.ones(2, "float32"), np.ones(2, "float32")
    ),
}


@pytest.mark.parametrize("write", WRITES, ids=str)
@pytest.mark.parametrize("call", ["step", "run"])
def test_a_write_into_the_weights_counts_at_the_next_step(write, call):
    """W z of the next step is computed while W is at hand, so the engine has to notice whoever wrote into it since."""
    if "row" in write and "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("arrays that lie apart have no memory in common, whose holders the engine counts")
    rng = np.random.default_rng(0)
    nets = [mf.Network(2, 9, 2, activation="tanh", rng=np.random.default_rng(1)) for _ in range(2)]
    kept = [None, None, None]
    if "array" in write:
        kept[0] = nets[0].w_rec
    elif "row" in write:
        kept[1] = nets[0].w_rec[0]
    elif "memoryview" in write:
        kept[2] = memoryview(nets[0].w_rec)
    learner, fresh = (mf.Learner(net, mf.ModProp(0.25), optimizer=mf.SGD(0.1)) for net in nets)
    fresh_write_kept = [nets[1].w_rec, nets[1].w_rec[0], memoryview(nets[1].w_rec)]
    xs, targets = rng.normal(size=(2, 7, 2)).astype("float32")
    for each in (learner, fresh):
        each.run(xs[:6], targets[:6])
    WRITES[write](nets[0], kept)
    WRITES[write](nets[1], fresh_write_kept)
    fresh.weights_changed()
    if call == "step":
        found, expected = learner.step(xs[6]), fresh.step(xs[6])
    else:
        found, expected = learner.run(xs[6:])[0], fresh.run(xs[6:])[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # whoever looks changes the order of additions
    untouched = mf.Network(2, 9, 2, activation="tanh", rng=np.random.default_rng(1))
    other = mf.Learner(untouched, mf.ModProp(0.25), optimizer=mf.SGD(0.1))
    other.run(xs[:6], targets[:6])
    assert np.abs(other.step(xs[6]) - found).max() > 1e-4


@pytest.mark.parametrize("n_rec, chunk", [(255, 1), (256, 16)])
def test_auto_chooses_the_chunk_by_the_size_of_the_network(n_rec, chunk):
    xs, targets = np.random.default_rng(0).normal(size=(2, 40, 1))
    nets = [mf.Network(1, n_rec, 1, rng=np.random.default_rng(1)) for _ in range(3)]
    learners = [mf.Learner(net, mf.EProp(), optimizer=mf.SGD(0.1)) for net in nets]
    ys = [learner.run(xs, targets, chunk=n) for learner, n in zip(learners, ("auto", chunk, 8))]
    assert np.array_equal(ys[0], ys[1]) and not np.allclose(ys[0], ys[2], rtol=1e-3)


def test_bad_chunks():
    learner = mf.Learner(mf.Network(1, 3, 1, rng=np.random.default_rng(0)))
    xs = np.zeros((4, 1))
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"chunk: expected an integer >= 1 or 'auto', got {bad}"):
            learner.run(xs, xs, chunk=bad)
    with pytest.raises(TypeError, match="chunk: expected an integer >= 1 or 'auto', got 'all'"):
        learner.fit_trials(xs[None], xs[None], chunk="all")
    with pytest.raises(TypeError, match="chunk: expected an integer >= 1 or 'auto', got 2.5"):
        learner.gradient(xs[None], xs[None], chunk=2.5)
