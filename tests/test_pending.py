"""Updates that are felt at once and written later, or with all others at every step: nobody may see a difference."""

import gc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import assert_close, problems, same_bits
from test_streaming import FOLLOWING, RULES, stream, twin

import modprop_fast as mf

pytestmark = [pytest.mark.filterwarnings("ignore:rho"), pytest.mark.usefixtures("at_once_or_not")]
WITHOUT = {"no cell": mf.ModProp(0.25, mf.LowRank(2), factor="mean")}


EVENTS = ("look", "hold", "release", "reset", "other learner", "window")
long = {"gain": 0.5, "max_rec": 40, "max_steps": 40}


@settings(max_examples=200)
@given(
    problems(**long),
    st.sampled_from(sorted(RULES | FOLLOWING | WITHOUT)).map((RULES | FOLLOWING | WITHOUT).get),
    st.lists(st.tuples(st.integers(0, 39), st.sampled_from(EVENTS)), max_size=6),
)
def test_updates_that_wait_are_updates(problem, rule, events):
    """Whatever happens on the way: against gradients that add up and are applied after every step, or, for a rule that
    stands still within a stream, against a learner that has to write at once because somebody holds its weights."""
    assume(problem.net.n_rec >= 2 or rule not in WITHOUT.values())  # of rank 2
    xs, each, targets, _ = stream(problem)
    applied = rule in RULES.values()
    waiting = twin(problem, rule, optimizer=mf.SGD(0.005))
    plain = twin(problem, rule, optimizer=mf.SGD(0.005), update="apply" if applied else "step")
    held, always = None, None if applied else plain.network.w_rec
    for t, (x, target) in enumerate(zip(xs, each)):
        for event in [event for at, event in events if at == t]:
            if event == "look":
                assert_close({"w": waiting.network.w_rec}, {"w": plain.network.w_rec}, 1e-9)
            elif event == "hold":
                held = waiting.network.w_in
            elif event == "release":
                held = None
            elif event == "reset":
                waiting.reset()
                plain.reset()
            elif event == "window":
                waiting._engine.window = t % 31 + 1
            else:
                loss = [learner.evaluate(xs[None], targets[None]).loss for learner in (waiting, plain)]
                assert np.isclose(*loss, rtol=1e-9)
        try:
            expected = plain.step(x, target)
        except FloatingPointError:
            assume(False)
        assume(np.abs(expected).max() < 100)  # it learns: else rounding errors grow
        y = waiting.step(x, target)
        assert np.allclose(y, expected, rtol=1e-8, atol=1e-10)
        if applied and target is not None:
            plain.apply()
        if held is not None:
            assert_close({"w": held}, {"w": plain.network.w_in}, 1e-9)
    assert always is None or not plain._engine.unwritten
    assert_close(waiting.network.weights, plain.network.weights, 1e-9)
    if waiting._engine.means is not None:
        assert np.allclose(waiting._engine.means, plain._engine.means, rtol=1e-9, atol=1e-12)


def learned(n_steps, factor="exact", **kwargs):
    rng = np.random.default_rng(0)
    net = mf.Network(2, 20, 1, types={"E": 0.8, "I": 0.2}, rng=rng, **kwargs)
    learner = mf.Learner(net, mf.ModProp(0.25, factor=factor), optimizer=mf.SGD(0.05))
    xs, targets = rng.normal(size=(n_steps, 2)), rng.normal(size=(n_steps, 1))
    learner.run(xs.astype(net.dtype), targets.astype(net.dtype))
    return net, learner


def test_weights_wait_and_nothing_waits_for_ever():
    net, learner = learned(11)
    before = net._weights["w_rec"].copy()  # behind the property's back
    assert learner._engine.unwritten
    net.settle()
    assert not learner._engine.unwritten
    assert not np.array_equal(net._weights["w_rec"], before)

    gone, learner = learned(11)
    del learner
    gc.collect()
    assert np.array_equal(gone.w_rec, net.w_rec)


def test_two_learners_of_one_network_take_turns():
    """Each update of one is there for the other at its next step."""
    rng = np.random.default_rng(1)
    nets = [mf.Network(2, 20, 1, dtype="float64", rng=np.random.default_rng(0)) for _ in range(2)]
    shared = [mf.Learner(nets[0], mf.EProp(), optimizer=mf.SGD(0.05)) for _ in range(2)]
    plain = [mf.Learner(nets[1], mf.EProp(), optimizer=mf.SGD(0.05), update="apply") for _ in range(2)]
    for _ in range(30):
        i, x, target = rng.integers(2), rng.normal(size=2), rng.normal(size=1)
        assert np.allclose(shared[i].step(x, target), plain[i].step(x, target), rtol=1e-9)
        plain[i].apply()
    assert_close(nets[0].weights, nets[1].weights, 1e-10)


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_new_plan_within_a_stream_counts_at_once(name):
    rng = np.random.default_rng(1)
    xs, targets, learners = rng.normal(size=(60, 2)), rng.normal(size=(60, 1)), []
    for _ in range(2):
        net = mf.Network(2, 20, 1, types=[0, 1] * 10, dtype="float64", activation="tanh", rng=np.random.default_rng(0))
        learners.append(mf.Learner(net, FOLLOWING[name], optimizer=mf.SGD(0.05)))
    waiting, plain = learners
    held = plain.network.w_rec
    for t, (x, target) in enumerate(zip(xs, targets)):
        if t in (20, 41):
            [learner._follow_stream() for learner in learners]
            assert waiting._engine.unwritten or name == "low rank"  # which asks for W
        assert np.allclose(waiting.step(x, target), plain.step(x, target), rtol=1e-10)
    assert waiting._engine.unwritten and not plain._engine.unwritten
    assert_close({"w": waiting.network.w_rec}, {"w": held}, 1e-10)
    if waiting._engine.means is not None:
        assert np.allclose(waiting._engine.means, plain._engine.means, rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_running_mean_in_c_is_that_of_python(dtype):
    rng = np.random.default_rng(1)
    xs, targets, learners = rng.normal(size=(2200, 2)).astype(dtype), rng.normal(size=(2200, 1)).astype(dtype), []
    for _ in range(2):
        net = mf.Network(2, 20, 1, types=[0, 1] * 10, dtype=dtype, activation="tanh", rng=np.random.default_rng(0))
        learners.append(mf.Learner(net, FOLLOWING["running"], optimizer=mf.SGD(0.05)))
    by_itself, by_hand = learners
    for part in (slice(0, 1000), slice(1000, 2000), slice(2000, None)):
        by_hand._engine.since_plan = -5000
        assert np.array_equal(by_itself.run(xs[part], targets[part]), by_hand.run(xs[part], targets[part]))
        if part.stop:
            assert not np.array_equal(by_itself._h_mean, by_hand._h_mean)
            by_hand._follow_stream()
        assert same_bits(by_itself.state() | {"planned_at": 0}, by_hand.state() | {"planned_at": 0})
    assert by_itself.state()["h_batches"] == 2


@pytest.mark.parametrize("factor", ["exact", "mean"])
def test_sums_over_types_are_taken_anew(factor):
    """They follow by their own recursion; after a long stream they are still those of W."""
    net, learner = learned(70_000, factor)
    exact = [[net.w_rec[np.ix_(net.types == a, net.types == b)].mean(dtype=float) for b in range(2)] for a in range(2)]
    assert np.allclose(learner._engine.means, exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_over_rows_change_no_bit(dtype):
    rng = np.random.default_rng(0)
    xs, targets = rng.normal(size=(40, 2)).astype(dtype), rng.normal(size=(40, 1)).astype(dtype)
    found = []
    for threads in (1, 2, 3, 11):
        net = mf.Network(2, 770, 1, types={"E": 0.8, "I": 0.2}, dtype=dtype, rng=np.random.default_rng(1))
        learner = mf.Learner(net, mf.ModProp(0.25), optimizer=mf.SGD(0.01), threads=threads)
        assert learner._engine.shares_rows
        ys = [learner.run(xs, targets), learner.run(xs[:9], targets[:9]), learner.run(xs, targets, chunk=35)]
        found.append({"ys": np.concatenate(ys), **net.weights})
    for other in found[1:]:
        assert all(np.array_equal(other[name], a) for name, a in found[0].items())


@settings(max_examples=100)
@given(
    problems(**(long | {"max_steps": 100})),
    st.sampled_from(sorted(RULES)).map(RULES.get),
    st.lists(st.just(1) | st.integers(1, 34) | st.integers(33, 99), min_size=1, max_size=4),
    st.booleans(),
)
def test_chunks_that_wait_are_chunks(problem, rule, chunks, hold):
    """Runs by chunks, and by steps between them, against gradients that add up and are applied at the end of each."""
    xs, _, targets, mask = stream(problem)
    waiting = twin(problem, rule, optimizer=mf.SGD(0.005))
    plain = twin(problem, rule, optimizer=mf.SGD(0.005), update="apply")
    held = waiting.network.w_rec if hold else None
    for chunk in chunks:
        expected = []
        for first in range(0, len(xs), chunk):
            part = slice(first, first + chunk)
            learn = mask is None or mask[part].any()
            try:
                expected.append(plain.run(xs[part], targets[part], None if mask is None else mask[part], learn=learn))
                if learn:
                    plain.apply()
            except FloatingPointError:
                assume(False)
        expected = np.concatenate(expected)
        assume(np.abs(expected).max() < 100)
        assert np.allclose(waiting.run(xs, targets, mask, chunk=chunk), expected, rtol=1e-8, atol=1e-10)
        if hold:
            assert_close({"w": held}, {"w": plain.network.w_rec}, 1e-9)
    assert_close(waiting.network.weights, plain.network.weights, 1e-9)


@pytest.mark.parametrize("name", ["exact", "mean", "e-prop"])
def test_a_chunk_that_diverges_teaches_nothing(name):
    """After 80 steps of which the engine has written 64, and kept what they say of the weights."""
    net = mf.Network(2, 40, 1, types={"E": 30, "I": 10}, rng=np.random.default_rng(0))
    learner = mf.Learner(net, (RULES | FOLLOWING)[name], optimizer=mf.SGD(0.01))
    xs, targets = np.random.default_rng(1).normal(size=(80, 3)).astype("float32")[:, :2], np.ones((80, 1), "float32")
    xs[-1] = 3e38
    before = {name: a.copy() for name, a in net.weights.items()}
    with pytest.raises(FloatingPointError, match="step 79"):
        learner.run(xs, targets, chunk=100)
    assert all(np.array_equal(a, before[name]) for name, a in net.weights.items())
    learner.reset()
    assert np.isfinite(learner.run(xs[:79], targets[:79], chunk=79)).all()
    assert not np.array_equal(net.w_rec, before["w_rec"])


@pytest.mark.parametrize("sizes", [(21, 19), (150, 106), (300, 230)])
@pytest.mark.parametrize("name", ["exact", "low rank", "mean", "e-prop"])
def test_types_of_neighbouring_units_are_copied_by_runs(name, sizes):
    """The blocks of four of the second type begin elsewhere than its units, a line of places is of both; rows of 256 units
    are kept a line apart; and the weights of 530 are more than a core's caches hold."""

    def learner():
        types = dict(zip("EI", sizes))
        net = mf.Network(2, sum(sizes), 1, types=types, activation="tanh", dtype="float64", gain=0.5, rng=np.random.default_rng(0))
        return mf.Learner(net, (RULES | FOLLOWING)[name], optimizer=mf.SGD(0.01))

    waiting, plain = learner(), learner()
    held = plain.network.w_rec  # nothing waits while somebody holds it
    rng = np.random.default_rng(1)
    for x, target in zip(rng.normal(size=(40, 2)), rng.normal(size=(40, 1))):
        assert np.allclose(waiting.step(x, target), plain.step(x, target), rtol=1e-9)
    assert_close(waiting.network.weights, plain.network.weights, 1e-9)
    del held


@pytest.mark.parametrize("types", [{"E": 300, "I": 230}, {"E": 530}])
def test_a_chunk_of_more_than_any_cache_of_one_core_holds(types):
    """It is written by stretches of places and a few sources at a time, without those that were silent."""

    def learner(update):
        net = mf.Network(2, 530, 1, types=types, dtype="float64", gain=0.5, rng=np.random.default_rng(0))
        return mf.Learner(net, RULES["exact"], optimizer=mf.SGD(0.01), update=update)

    waiting, plain = learner("step"), learner("apply")
    rng = np.random.default_rng(1)
    xs, targets = rng.normal(size=(70, 2)), rng.normal(size=(70, 1))
    for first, last in (0, 3), (3, 23), (23, 55), (55, 70):
        part = slice(first, last)
        assert np.allclose(waiting.run(xs[part], targets[part], chunk=last - first), plain.run(xs[part], targets[part]), rtol=1e-9)
        plain.apply()
    assert_close(waiting.network.weights, plain.network.weights, 1e-10)


@pytest.mark.parametrize("name", ["exact", "mean", "e-prop"])
def test_what_waited_before_a_chunk_is_over_after_it(name):
    """The chunk ends in a place of the rings that a step before it had; and somebody holds the weights for a while."""

    def learner(update):
        net = mf.Network(2, 20, 1, types={"E": 12, "I": 8}, dtype="float64", gain=0.5, rng=np.random.default_rng(0))
        return mf.Learner(net, RULES[name], optimizer=mf.SGD(0.05), update=update)

    waiting, plain = learner("step"), learner("apply")
    rng = np.random.default_rng(1)
    for chunk, first_again in ((1, False), (5, False), (1, False), (20, False), (1, True)):
        held = waiting.network.w_rec if chunk == 20 else None
        if first_again:
            waiting.reset()
            plain.reset()
        xs, targets = rng.normal(size=(20, 2)), rng.normal(size=(20, 1))
        for first in range(0, 20, chunk):
            part = slice(first, first + chunk)
            assert np.allclose(waiting.run(xs[part], targets[part], chunk=chunk), plain.run(xs[part], targets[part]), rtol=1e-9)
            plain.apply()
    del held
    assert_close(waiting.network.weights, plain.network.weights, 1e-10)


@pytest.mark.parametrize("chunk", [1, 45])
@pytest.mark.parametrize("name", ["exact", "mean", "e-prop"])
def test_a_weight_where_no_synapse_may_be_stays(name, chunk):
    """Of units from themselves, whoever wrote it there: it is heard, and not learned; in long chunks, too, where weights stand apart."""
    rng = np.random.default_rng(1)
    own, xs, targets = rng.normal(size=20) / 4, rng.normal(size=(90, 2)), rng.normal(size=(90, 1))

    def learner():
        net = mf.Network(2, 20, 1, types={"E": 12, "I": 8}, dtype="float64", gain=0.5, rng=np.random.default_rng(0))
        np.fill_diagonal(net.w_rec, own)
        return mf.Learner(net, RULES[name], optimizer=mf.SGD(0.01))

    waiting, plain = learner(), learner()
    held, before = plain.network.w_rec, plain.network.w_rec.copy()  # nothing waits while somebody holds it
    assert np.allclose(waiting.run(xs, targets, chunk=chunk), plain.run(xs, targets, chunk=chunk), rtol=1e-9)
    assert_close(waiting.network.weights, plain.network.weights, 1e-10)
    assert np.array_equal(waiting.network.w_rec.diagonal(), own) and not np.allclose(held, before)
