"""What docstrings promise in passing: each of these a plausible mistake once broke without any other test noticing."""

import copy
import csv
import ctypes
import gc
import io
import json
import os
import pickle
import signal
import threading
import time
import tracemalloc
import warnings
import weakref
from dataclasses import replace

import c_face
import numpy as np
import pytest
from test_compare import TINY, fake
from test_sparse import function
from test_streaming import RULES, draw, same_bits, small

import modprop_fast as mf
from modprop_fast import core
from modprop_fast import learner as learner_module
from modprop_fast import train as training_module
from modprop_fast.align import _compare, _look, _lowers, _wilson, align
from modprop_fast.compare import SETTINGS, _best, build, compare, run, summarise
from modprop_fast.learner import _decays, _radius

pytestmark = pytest.mark.filterwarnings("ignore:rho")


def take_weights(into, of):
    for name, w in of.network.weights.items():
        into.network.weights[name][...] = w


def test_restore_updates():
    rule, (xs, targets) = mf.ModProp(0.25, refresh=2), draw(8)
    one, other = (small(rule, optimizer=mf.SGD(0.5)) for _ in range(2))
    one.run(xs[:3], targets[:3])  # an odd number of updates
    one.reset()
    other.restore(one.state())
    take_weights(other, one)
    for each in (one, other):
        each.run(xs[3:], targets[3:])
    assert same_bits(one.state(), other.state()) and same_bits(one.network.weights, other.network.weights)


FOLLOWERS = {
    "auto": mf.ModProp("auto", factor="running", horizon=1.5), "low rank": mf.ModProp(0.5, mf.LowRank(2)),
    "every 3": mf.ModProp(0.5, mf.LowRank(2), refresh=3), "never": mf.MDGL(mf.LowRank(2), refresh="never"),
}  # fmt: skip


@pytest.mark.parametrize("weights_first", [False, True])
@pytest.mark.parametrize("name", FOLLOWERS)
def test_restore_of_a_rule_that_follows(name, weights_first):
    """Its filter is the one of then, whether the weights are put in before or after."""
    trials = tuple(a.reshape(4, 10, 2) for a in draw(40))
    one, other = (small(FOLLOWERS[name], optimizer=mf.Adam(0.1), update="apply") for _ in range(2))
    for _ in range(4):
        one.fit_trials(*trials)
    if weights_first:
        take_weights(other, one)
    other.restore(one.state())
    take_weights(other, one)
    assert same_bits(one.gradient(*trials), other.gradient(*trials))
    streams = tuple(a[0] for a in trials)
    for each in (one, other):
        each.run(*streams)
        each.apply()
        each.fit_trials(*trials)
    assert same_bits(one.state(), other.state()) and same_bits(one.network.weights, other.network.weights)


def test_a_filter_that_is_restored_has_the_same_bits():
    for seed in range(10):  # a product of matrices depends on how they lie in memory
        net = mf.Network(2, 20, 1, dtype="float64", rng=np.random.default_rng(seed))
        one = mf.Learner(net, mf.ModProp(0.3, mf.LowRank(3), refresh=5), optimizer=mf.SGD(1e-2))
        one.run(np.ones((1000, 2)), np.ones((1000, 1)))
        other = mf.Learner(net, one.rule, optimizer=one.optimizer)
        other.restore(one.state())
        assert np.array_equal(one._engine.arrays["K"], other._engine.arrays["K"])


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_trials_take_no_memory_by_their_length(loss):
    net = mf.Network(2, 20, 2, rng=np.random.default_rng(0))
    learner, peaks = mf.Learner(net, mf.ModProp(0.25), loss=loss, optimizer=mf.Adam(1e-3), threads=1), []
    for n_steps in (100, 100, 20_000):  # the first makes engines
        xs = np.ones((8, n_steps, 2), "float32")
        targets = xs if loss == "mse" else np.arange(8) % 2
        masks = (None, np.arange(n_steps) > n_steps // 2, np.ones((8, n_steps), bool))
        tracemalloc.start()
        for mask in masks:
            learner.fit_trials(xs, targets, mask)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 80_000  # a byte for every step of every trial would be twice as much


def test_a_pickle_holds_the_mean_of_h_of_then():
    learner, buffers = small(mf.ModProp(0.25, factor="running"), optimizer=mf.SGD(1e-3)), []
    xs, targets = draw(core.PLAN_EVERY)
    learner.run(xs, targets)
    pickled, then = pickle.dumps(learner, protocol=5, buffer_callback=buffers.append), learner.state()
    learner.run(xs, targets)
    again = pickle.loads(pickled, buffers=buffers).state()
    assert then["h_batches"] == again["h_batches"] == 1 and np.array_equal(again["h_mean"], then["h_mean"])


@pytest.mark.parametrize("factor", ["exact", "running"])
@pytest.mark.parametrize("refresh", ["update", 700, 5000, "never"])
def test_low_rank_follows_as_refresh_says(refresh, factor):
    rule = mf.ModProp(0.5, mf.LowRank(1), factor, refresh)
    learner = small(rule, optimizer=mf.SGD(1e-3))
    before = learner._plan.u.copy()
    learner.run(*draw(1500))
    assert np.array_equal(learner._plan.u, before) == (refresh in (5000, "never"))
    learner = small(rule, optimizer=mf.SGD(1e-3), update="apply")
    learner.fit_trials(*(a[None] for a in draw(20)))
    assert np.array_equal(learner._plan.u, before) == (refresh != "update")


def test_restore_rng():
    trials = tuple(a.reshape(4, 10, 2) for a in draw(40))
    one, other = (small(mf.UORO(), update="apply", rng=np.random.default_rng(seed)) for seed in (3, 4))
    one.fit_trials(*trials)
    other.restore(one.state())
    take_weights(other, one)
    for each in (one, other):
        each.fit_trials(*trials)
    assert same_bits(one.network.weights, other.network.weights) and same_bits(one.state(), other.state())


def test_clip_never_lengthens():
    trials = tuple(a[None] for a in draw(10))
    plain, clipped = (small(optimizer=mf.SGD(0.1, clip=clip), update="apply") for clip in (None, 1e3))
    for each in (plain, clipped):
        each.fit_trials(*trials)
    assert same_bits(plain.network.weights, clipped.network.weights)


def test_files_keep_names_and_time():
    net = mf.Network(1, 10, 1, types={"E": 8, "I": 2}, tau=5.0, dt=0.5, rng=np.random.default_rng(0))
    assert net.leak == pytest.approx(np.exp(-0.1), rel=1e-15)
    file = io.BytesIO()
    net.save(file)
    file.seek(0)
    again = mf.Network.load(file)
    assert again.type_names == ("E", "I") and (again.tau, again.dt, again.leak) == (5.0, 0.5, net.leak)


def test_reset_begins_to_count_anew(monkeypatch):
    learner = small(mf.ModProp(0.25, mf.LowRank(1)), optimizer=mf.SGD(0.01))
    xs, targets = draw(600)
    learner.run(xs, targets)
    learner.reset()
    at_reset = learner._plan
    learner.run(xs, targets)  # 600 since
    assert learner._plan is at_reset
    learner.run(xs[:400], targets[:400])
    assert learner._plan is not at_reset


def test_reset_measures():
    learner = small(mf.ModProp(0.25, factor="running"), update="apply")
    xs, targets = draw(20)
    learner.run(xs, targets)
    learner.reset()
    assert learner.state()["h_batches"] == 1 and not (learner.state()["h_mean"] == 0.5).any()


def test_apply_measures():
    learner = small(mf.ModProp(0.25, factor="running"), update="apply")
    xs, targets = draw(20)
    h = np.zeros(9)
    for x, target in zip(xs, targets):
        learner.step(x, target)
        h += learner._engine.arrays["h"]
    learner.apply()
    assert learner.state()["h_batches"] == 1 and np.allclose(learner.state()["h_mean"], h / 20, rtol=1e-5)


def test_looking_does_not_count_as_activity():
    trials, others = (tuple(a.reshape(4, 10, 2) for a in draw(40, seed)) for seed in (1, 2))
    one, other = (small(mf.ModProp(0.25, factor="running"), update="apply") for _ in range(2))
    for each in (one, other):
        each.fit_trials(*trials)
    other.gradient(others[0] * 5, others[1])
    for each in (one, other):
        each.fit_trials(*trials)
    assert same_bits(one.state(), other.state())


def test_a_tenth_of_the_way():
    trials = tuple(a.reshape(4, 10, 2) for a in draw(40))
    one = small(mf.ModProp(0.25, factor="running"), optimizer=mf.SGD(1e-30), update="apply")
    for _ in range(20):
        one.fit_trials(*trials)
    before = one.state()["h_mean"]
    wild = small(mf.ModProp(0.25, factor="running"), optimizer=mf.SGD(1e-30), update="apply")
    wild.fit_trials(trials[0] * 5, trials[1])
    one.fit_trials(trials[0] * 5, trials[1])
    assert np.allclose(one.state()["h_mean"], before + (wild.state()["h_mean"] - before) / 10, rtol=1e-6)


def test_from_arrays_passes_everything_on():
    a = np.zeros((3, 3)), np.ones((3, 1)), np.ones((2, 3))
    learner = mf.Learner.from_arrays(*a, loss="cross_entropy", update="apply", threads=3, optimizer=mf.SGD(0.1))
    assert (learner.loss_name, learner.update, learner.threads, learner.optimizer) == ("cross_entropy", "apply", 3, mf.SGD(0.1))


def test_the_radius_of_a_filter_that_ends_is_the_leak():
    net, strong = small().network, 50 * np.ones((2, 2, 2))
    net.w_rec[...] = 100
    for rule in (mf.EProp(), mf.MDGL(), mf.MDGL("cells"), mf.MDGL(mf.LowRank(2)), mf.ModProp(taps=strong), mf.ModProp(taps=2)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it forgets: there is nothing to warn of
            learner = mf.Learner(net, rule, update="apply")
            learner.step(*(a[0] for a in draw(1)))
            learner.reset()
        assert learner.filter_radius == net.leak


@pytest.mark.parametrize("radius", [0.2, 0.999, 1.001, 30.0, np.inf, np.nan])
def test_a_filter_decays_if_its_radius_is_below_one(radius):
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 120):
        K = rng.normal(size=(n, n))
        K *= radius / _radius(K)
        assert _decays(K) == (radius < 1)
    assert _decays(np.triu(1e9 * rng.normal(size=(7, 7)), 1))  # nothing is left after seven steps


def test_weights_that_stand_still_are_not_followed_again(monkeypatch):
    learner = small(mf.ModProp(0.25, mf.LowRank(2)), update="apply")
    trials, plans = tuple(a.reshape(4, 10, 2) for a in draw(40)), []
    evolved = mf.ModProp.evolved
    monkeypatch.setattr(mf.ModProp, "evolved", lambda *args: plans.append(args) or evolved(*args))
    for _ in range(2):
        learner.gradient(*trials)  # makes engines, which ask for the weights
    plans.clear()
    learner.gradient(*trials)
    assert not plans
    learner.network.w_rec[...] *= 2
    learner.gradient(*trials)
    assert len(plans) == 1


@pytest.mark.parametrize("rule", [mf.ModProp("auto", horizon=20.0), mf.ModProp(0.25, mf.LowRank(2))], ids=["auto", "low rank"])
def test_what_was_written_through_an_array_that_somebody_holds_is_followed(rule):
    learner = small(rule, update="apply")
    held = learner.network.w_rec
    learner.reset()  # a plan, and after it nobody asks for the weights
    held *= 30
    del held
    learner.reset()
    fresh = mf.Learner(learner.network, rule, update="apply")
    assert learner.filter_radius == pytest.approx(fresh.filter_radius, rel=1e-5)


def test_a_plan_in_a_stream_does_not_hide_what_was_written_before():
    learner = small(mf.ModProp("auto", horizon=100.0))
    learner.network.w_rec *= 30
    learner.run(draw(core.PLAN_EVERY)[0])  # teaches nothing; its end is a plan, for the filter of then
    assert learner.filter_radius < 0.98
    learner.reset()
    assert learner.filter_radius == pytest.approx(0.99, rel=1e-5)


def test_a_state_that_does_not_fit_changes_nothing():
    learner = small(mf.UORO(), update="apply", rng=np.random.default_rng(0))
    for state, error in (({"rng": np.array("{")}, "state: rng: expected the state of a PCG64"), ({"iteration": 1.5}, "iteration: expected an integer")):
        with pytest.raises((TypeError, ValueError), match=error):
            learner.restore(learner.state() | {"iteration": np.array(7)} | state)
    assert learner.iteration == 0


def test_a_chunk_in_numpy_that_diverges_teaches_nothing():
    def make():
        net = mf.Network(2, 9, 2, activation="relu", tau=3.0, rng=np.random.default_rng(1))
        return mf.Learner(net, mf.RTRL(), optimizer=mf.SGD(0.05))

    one, fresh = make(), make()
    xs, targets = draw(8)
    wild = xs.copy()
    wild[5] = 3e38
    one.network.w_out *= 1000
    fresh.network.w_out *= 1000
    with pytest.raises(FloatingPointError, match="step 5"):
        one.run(wild, targets, chunk=8)
    one.reset()
    one.network.w_out /= 1000
    fresh.network.w_out /= 1000
    for each in (one, fresh):
        each.run(xs, targets, chunk=8)
    assert same_bits(one.network.weights, fresh.network.weights)


def test_the_test_score_is_of_the_test_trials():
    result = run(TINY, "eprop", 0, 1e-3)
    task, learner, training = build(TINY, "eprop", 0, 1e-3)
    for _ in range(TINY.iterations):
        learner.fit_trials(*task.sample(training, TINY.batch))
    assert learner.evaluate(*task.test()).accuracy != learner.evaluate(*task.validation()).accuracy
    assert result["test"] == learner.evaluate(*task.test()).accuracy


def test_quartiles():
    late = [fake([0.5] * n + [0.95] * 5) for n in range(4)]
    row = summarise(TINY, "x", late)
    assert (row["q25"], row["iterations"], row["q75"]) == (10.0, 20.0, 30.0)


def test_the_better_score_where_none_learns():
    for setting, better in ((TINY, 0.6), (SETTINGS["pattern"], 0.4)):
        assert _best(setting, [fake([0.5] * 6, 1.0), fake([better] * 6, 2.0)], [1.0, 2.0]) == 2.0


def test_the_setting_is_the_optimizers():
    _, learner, _ = build(replace(TINY, lr_every=7, l2=0.1, l1=0.2, clip=3.0), "bptt", 0, 1e-3)
    assert learner.optimizer == mf.Adam(1e-3, l2=0.1, l1=0.2, clip=3.0, schedule=mf.StepDecay(0.8, 7))


def test_lookers_follow_the_activity():
    from tqdm import tqdm

    task, learner, training = build(TINY, "eprop", 0, 1e-3)
    exact = mf.Learner(learner.network, mf.BPTT(), loss=task.loss, update="apply", threads=1)
    auto = mf.Learner(learner.network, mf.ModProp("auto"), loss=task.loss, update="apply", threads=1)
    _look(TINY, task, learner, "eprop", training, exact, {"auto": auto}, [], False, tqdm, False)
    assert auto.state()["h_batches"] == TINY.iterations + 1 and learner.iteration == TINY.iterations


def cosines(folder, rule):
    with open(folder / "align.csv") as file:
        return [float(row["cosine_w_rec"]) for row in csv.DictReader(file) if row["rule"] == rule]


def test_a_row_of_align_is_of_the_rule_that_learns(tmp_path):
    align(TINY, "rflo", ["eprop"], 0, tmp_path, progress=False)
    task, learner, training = build(TINY, "rflo", 0, TINY.lr)
    exact, expected = mf.Learner(learner.network, mf.BPTT(), loss=task.loss, update="apply", threads=1), []
    for iteration in range(TINY.iterations + 1):
        trials = task.sample(training, TINY.batch)
        if iteration % TINY.every == 0:
            found, true = (each.gradient(*trials, mode="offline")["w_rec"] for each in (learner, exact))
            expected.append(_compare(found, true)[0])
        learner.fit_trials(*trials)
    assert cosines(tmp_path, "rflo") == expected


def test_a_row_of_align_does_not_depend_on_the_others_and_its_type_means_follow(tmp_path):
    names = ["rflo", "modprop(refresh=5)", "modprop(refresh=never)"]
    for folder, passive in (("a", names), ("b", names[::-1])):
        align(TINY, "bptt", passive, 0, tmp_path / folder, progress=False)
    for name in names:
        assert cosines(tmp_path / "a", name) == cosines(tmp_path / "b", name)
    assert cosines(tmp_path / "a", names[1]) != cosines(tmp_path / "a", names[2])


def test_wilson():
    assert _wilson(5, 10) == (0.237, 0.763) and _wilson(6, 6) == (0.61, 1.0)


def test_ratio():
    a = np.array([3.0, 4.0])
    assert _compare(2 * a, a) == pytest.approx((1, 2)) and _compare(-a, a) == pytest.approx((-1, 1))


def test_a_probe_lowers_the_loss_by_one_percent(monkeypatch):
    task, learner, training = build(TINY, "bptt", 0, 1e-3)
    trials = task.sample(training, 8)
    grads, loss, seen = learner.gradient(*trials, mode="offline"), learner.evaluate(*trials).loss, []
    honest = learner.evaluate
    monkeypatch.setattr(learner, "evaluate", lambda *t: seen.append(honest(*t)) or seen[-1])
    for times in (1, 5):
        _lowers(learner, {name: times * g for name, g in grads.items()}, grads, trials, loss)
    assert [one.loss / loss for one in seen] == pytest.approx([0.99, 0.99], abs=2e-3)


def test_seconds_of_earlier_sessions(tmp_path, monkeypatch):
    config = training_module.Config(delay=10, cue=5, n_rec=12, tau=10.0, batch=4, iterations=5)
    training_module.train(config, tmp_path / "r", progress=False)
    with np.load(tmp_path / "r" / "checkpoint.npz") as file:
        state = dict(file) | {"seconds": np.array(1000.0)}
    np.savez(tmp_path / "r" / "checkpoint.npz", **state)
    result = training_module.train(replace(config, iterations=6), tmp_path / "r", resume=True, progress=False)
    assert 1000 < result.seconds < 1100


def test_a_run_has_its_dtype_and_dt():
    config = training_module.Config(n_rec=12, tau=10.0, dt=2.0, dtype="float64")
    net, _ = training_module.build(config, np.random.default_rng(0), np.random.default_rng(1))
    assert net.dtype == np.float64 and net.dt == 2.0 and net.tau == 10.0


def test_what_is_given_to_a_rule_stays_the_callers():
    given = np.ones((9, 2))
    rule = mf.EProp(feedback=given)
    given[0] = 7
    assert rule.feedback[0, 0] == 1


def test_an_array_of_another_library_is_let_go():
    learner, x = small(), bytearray(8)
    view = memoryview(x).cast("f")
    with pytest.raises(TypeError):
        learner.step(view, 3.0)
    view.release()  # BufferError while it is held
    x.append(0)


def test_a_copy_is_planned_anew_when_its_original_is():
    one, (xs, targets) = small(mf.ModProp(0.25, mf.LowRank(1)), optimizer=mf.SGD(0.05)), draw(1100)
    one.run(xs[:900], targets[:900])
    other = copy.deepcopy(one)
    assert np.array_equal(one.run(xs[900:], targets[900:]), other.run(xs[900:], targets[900:]))
    assert same_bits(one.network.weights, other.network.weights)


@pytest.mark.parametrize("name", ["w_in", "b_rec", "w_rec"])
def test_who_holds_one_array_sees_it_learn(name):
    net = mf.Network(2, 40, 2, bias=True, activation="tanh", rng=np.random.default_rng(0))
    learner, (xs, targets) = mf.Learner(net, mf.EProp(), optimizer=mf.SGD(0.1)), draw(10)
    held = getattr(net, name)
    learner.run(xs[:5], targets[:5])
    before = held.copy()
    learner.step(xs[5], targets[5])
    assert not np.array_equal(held, before)


AT, SIZE = ctypes.c_void_p, ctypes.c_size_t


def adopt(learner):
    handle = ctypes.c_void_p()
    assert function("mpf_adopt", AT, AT)(id(learner), ctypes.addressof(handle)) == 0
    return handle


def test_reset_in_c_takes_the_means_anew():
    learner = small(update="apply")
    handle, w = adopt(learner), learner.network.w_rec.copy() * 2
    before = learner._engine.means
    assert function("mpf_set", AT, ctypes.c_char_p, AT, SIZE)(handle, b"w_rec", w.ctypes.data, w.nbytes) == 0
    assert function("mpf_reset", AT)(handle) == 0
    assert np.allclose(learner._engine.means, 2 * before, rtol=1e-6)
    function("mpf_destroy", AT)(handle)


def test_a_handle_is_free_again_when_python_is_done():
    learner = small(optimizer=mf.SGD(1e-9))
    handle, (xs, targets), codes = adopt(learner), draw(300_000), []
    reset = function("mpf_reset", AT)
    thread = threading.Thread(target=learner.run, args=(xs, targets))
    thread.start()
    while thread.is_alive() and 3 not in codes:
        codes.append(reset(handle))
    thread.join()
    assert 3 in codes and reset(handle) == 0
    assert function("mpf_destroy", AT)(handle) == 0


def test_every_entry_of_the_config_counts():
    config = c_face.Config(
        ctypes.sizeof(c_face.Config), 1, 2, 9, 2, b"float32", b"tanh", 20, 5, 1, None, None, None, 1, 1, b"gaussian", 0.5, 3,
        b"modprop(mu=0.25)", b"mse", b"apply", 0.01,
    )  # fmt: skip
    handle, out = ctypes.c_void_p(), ctypes.c_void_p()
    assert function("mpf_create", AT, AT)(ctypes.addressof(config), ctypes.addressof(handle)) == 0
    assert function("mpf_object", AT, AT)(handle, ctypes.addressof(out)) == 0
    net = ctypes.cast(out, ctypes.py_object).value.network
    same = mf.Network(2, 9, 2, activation="tanh", tau=20, dt=5, autapses=True, bias=True, gain=0.5, rng=np.random.default_rng(3))
    assert same_bits(net.weights, same.weights) and net.leak == same.leak and net.autapses
    function("mpf_destroy", AT)(handle)


@pytest.mark.parametrize("signed", [False, True])
def test_a_chunk_that_diverges_leaves_no_gradient(signed):
    def make():
        dale = {"E": 1, "I": -1} if signed else None
        net = mf.Network(2, 40, 2, types={"E": 30, "I": 10}, dale=dale, rng=np.random.default_rng(0))
        return mf.Learner(net, mf.ModProp(0.25), optimizer=mf.SGD(0.01))

    one, fresh = make(), make()
    xs, targets = draw(40)
    wild = xs.copy()
    wild[30] = 3e38
    with pytest.raises(FloatingPointError, match="step 30"):
        one.run(wild, targets, chunk=40)
    one.reset()
    for each in (one, fresh):
        each.run(xs, targets, chunk=8)
    assert same_bits(one.network.weights, fresh.network.weights)


def test_where_a_long_stream_diverged():
    learner, xs = small(mf.ModProp(0.25, mf.LowRank(1))), np.zeros((1600, 2), "float32")
    sign = learner.network.sign
    learner.network.w_out[:], learner.network.w_in[:] = sign * 1e38, sign[:, None]
    xs[1500] = 1e3
    with pytest.raises(FloatingPointError, match="at step 1500"):
        learner.run(xs)


def test_a_target_of_another_library_is_let_go():
    learner, target = small(), bytearray(8)
    for how in ({"target": memoryview(target).cast("f")}, {"signal": memoryview(target).cast("f")}):
        learner.step(np.ones(2, "float32"), **how)
        next(iter(how.values())).release()  # BufferError while it is held
    target.append(0)


def test_random_feedback_is_as_large_as_w_out():
    net = mf.Network(2, 400, 3, rng=np.random.default_rng(0))
    b = mf.Learner(net, mf.RFLO(), rng=np.random.default_rng(1)).state()["feedback"]
    assert b.shape == (400, 3) and b.std() == pytest.approx(1 / 20, rel=0.1)


def test_signed_inputs():
    net = mf.Network(8, 120, 2, types={"E": 97, "I": 23}, dale={"E": 1, "I": -1}, init="signed", rng=np.random.default_rng(1))
    assert net.w_in.std() == pytest.approx(0.5, rel=0.1)


def test_a_filter_that_becomes_unstable_by_an_update_of_trials_is_named():
    net = mf.Network(1, 8, 1, tau=2.0, activation="identity", init="zeros")
    net.w_rec[...] = 0.1
    net.w_in[...] = net.w_out[...] = 0.3
    net.constrain()
    learner = mf.Learner(net, mf.ModProp(1.0), optimizer=mf.SGD(0.1), update="apply")
    assert learner.filter_radius < 1
    with pytest.warns(RuntimeWarning, match=r"rho\(K\) = "):
        learner.fit_trials(np.ones((1, 20, 1)), np.full((1, 20, 1), 30.0))
    assert learner.filter_radius >= 1


def test_weights_changed_by_a_bare_address():
    xs, targets = draw(2)
    found = []
    for how in ("address", "array"):
        learner = small()
        learner.step(xs[0])
        if how == "address":
            at = learner.network.w_rec.ctypes.data
            learner.step(xs[0], targets[0])  # nobody holds an array: W z of the next step is at hand
            learner.network.settle()
            (ctypes.c_float * 81).from_address(at)[1] = 5.0
            learner.weights_changed()
        else:
            learner.step(xs[0], targets[0])
            learner.network.w_rec[0, 1] = 5.0
        found.append(learner.step(xs[1]))
    assert np.array_equal(*found)


def test_a_single_rate_is_that_of_all(tmp_path):
    rows = compare(replace(TINY, iterations=4), ["eprop"], 1, tmp_path / "a", lrs=[3e-3], progress=False)
    assert rows[0]["lr"] == 3e-3


def test_a_state_of_another_size_is_refused():
    rule = mf.EProp(feedback="random")
    one = small(rule, rng=np.random.default_rng(0))
    before = one.state()
    with pytest.raises(ValueError, match=r"state: expected feedback of shape \(9, 2\), got \(1, 2\)"):
        one.restore(before | {"feedback": before["feedback"][:1], "updates": np.array(7)})
    assert same_bits(one.state(), before)


# ---------------------------------------------------------------- what goes wrong, and what must not with it

def learning(n_rec=40, rule=mf.ModProp(0.25), **how):
    net = mf.Network(2, n_rec, 2, types={"E": 0.75, "I": 0.25}, gain=0.5, rng=np.random.default_rng(0))
    return mf.Learner(net, rule, **{"optimizer": mf.SGD(0.01)} | how)


@pytest.mark.parametrize("n_rec", [12, 40, 300])
@pytest.mark.parametrize("name", sorted(RULES))
def test_a_step_that_diverges_leaves_the_weights_and_rest(name, n_rec):
    xs, targets = draw(40)
    one, other = learning(n_rec, RULES[name]), learning(n_rec, RULES[name])
    for each in (one, other):
        each.run(xs[:20], targets[:20])
    for _ in range(3):
        with pytest.raises(FloatingPointError, match="the next step starts from rest"):
            one.step(np.full(2, 3e38, "float32"), targets[20])
    other.reset()
    assert same_bits(one.network.weights, other.network.weights)
    assert np.array_equal(one.run(xs[20:], targets[20:]), other.run(xs[20:], targets[20:]))
    assert same_bits(one.network.weights, other.network.weights)


def test_a_refused_step_leaves_the_loss():
    learner, (xs, targets) = small(), draw(2)
    learner.step(xs[0], targets[0])
    loss = learner.loss
    with pytest.raises(ValueError, match="x: expected finite"):
        learner.step(np.full(2, np.nan, "float32"), targets[1])
    assert learner.loss == loss > 0
    handle, x, in_c = adopt(learner), np.full(2, np.nan, "float32"), ctypes.c_double()
    step = function("mpf_step", AT, AT, SIZE, AT, SIZE, ctypes.c_int, AT, SIZE)
    assert step(handle, x.ctypes.data, x.nbytes, targets[1].ctypes.data, x.nbytes, 1, None, 0) != 0
    assert function("mpf_loss", AT, AT)(handle, ctypes.addressof(in_c)) == 0 and in_c.value == loss
    function("mpf_destroy", AT)(handle)


def test_another_thread_is_refused_by_every_call():
    learner, (xs, targets) = learning(400, update="apply", optimizer=mf.Adam(1e-3)), draw(60_000)
    trials, state, before = (xs[None, :20], targets[None, :20]), learner.state(), learner.network.w_rec.copy()
    calls = {
        "fit_trials": lambda: learner.fit_trials(*trials), "gradient": lambda: learner.gradient(*trials),
        "evaluate": lambda: learner.evaluate(*trials), "reset": learner.reset, "weights_changed": learner.weights_changed,
        "apply": learner.apply, "accumulated": lambda: learner.accumulated, "state": learner.state,
        "restore": lambda: learner.restore(state), "run": lambda: learner.run(*draw(5)),
        "copy": lambda: copy.deepcopy(learner),
    }  # fmt: skip
    thread = threading.Thread(target=learner.run, args=(xs, targets))
    thread.start()
    refused = set()
    while thread.is_alive() and refused != set(calls):
        for name, call in calls.items():
            try:
                learner._engine.must_be_idle("")
            except RuntimeError:  # it runs, and has enough before it
                with pytest.raises(RuntimeError, match=f"{name}: this learner is already running in another thread"):
                    call()
                refused.add(name)
    thread.join()
    assert refused == set(calls) and np.array_equal(learner.network.w_rec, before)


def none(*_):
    raise MemoryError


def test_memory_that_runs_out_leaves_a_learner_that_works(monkeypatch):
    learner, (xs, targets) = learning(300), draw(22)
    learner.run(xs[:20], targets[:20])
    held, loss = learner.network.w_rec, learner.loss  # the next step moves weights and traces, for which it allocates

    with monkeypatch.context() as patched:
        patched.setattr(core, "aligned", none)
        with pytest.raises(MemoryError):
            learner.step(xs[20], targets[20])
        assert learner.loss == loss
        handle, step = adopt(learner), function("mpf_step", AT, AT, SIZE, AT, SIZE, ctypes.c_int, AT, SIZE)
        in_c = [xs[20].ctypes.data, xs[20].nbytes, targets[20].ctypes.data, targets[20].nbytes, 1, None, 0]
        assert step(handle, *in_c) != 0 and b"MemoryError" in function("mpf_last_error", returns=ctypes.c_char_p)()
    del held
    assert step(handle, *in_c) == 0
    function("mpf_destroy", AT)(handle)
    learner.step(xs[20], targets[20])
    assert all(np.isfinite(w).all() for w in learner.network.weights.values())


def test_weights_outside_the_mask_count_even_if_memory_ran_out_meanwhile(monkeypatch):
    mask, (xs, targets) = np.random.default_rng(0).random((300, 300)) < 0.05, draw(4)
    mask[0, 1] = False
    net = mf.Network(2, 300, 2, mask=mask, gain=0.5, rng=np.random.default_rng(0))
    learner = mf.Learner(net, mf.ModProp(0.25))
    learner.step(xs[0], targets[0])
    assert learner._engine.sparse
    net.w_rec[0, 1] = 1
    with monkeypatch.context() as patched:
        patched.setattr(core, "aligned", none)
        with pytest.raises(MemoryError):
            learner.step(xs[1], targets[1])
    learner.step(xs[1], targets[1])
    assert not learner._engine.sparse


@pytest.mark.parametrize("chunk", [1, 32])
@pytest.mark.parametrize("rule", ["masked", "free", "auto", "low rank"])
def test_ctrl_c_in_a_run_is_heard_between_steps_and_leaves_a_learner_that_made_those_before(rule, chunk):
    masked, rule = rule == "masked", FOLLOWERS.get(rule, mf.ModProp(0.25))
    mask = np.random.default_rng(0).random((300, 300)) < 0.1 if masked else None
    nets = [mf.Network(2, 300, 2, mask=mask, gain=0.5, rng=np.random.default_rng(0)) for _ in range(2)]
    one, other = (mf.Learner(net, rule, optimizer=mf.SGD(1e-4)) for net in nets)
    xs, targets = draw(100_000)

    def interrupt():
        while not one._engine.updates:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        one.run(xs, targets, chunk=chunk)
    made = chunk * one._engine.updates
    assert 0 < made < len(xs)
    other.run(xs[:made], targets[:made], chunk=chunk)
    assert one.loss == other.loss
    for each in (one, other):
        each.run(xs[:1100], targets[:1100])
    assert same_bits(one.network.weights, other.network.weights)


def test_threads_that_cannot_start_leave_a_learner_that_works(monkeypatch):
    """An executor keeps what it was given, and later has it done: that run is over then."""

    def start(*_):
        raise RuntimeError("can't start new thread")

    one, other, (xs, targets) = learning(800, threads=3), learning(800, threads=1), draw(40)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        patched.setattr(learner_module, "_available", lambda: 2)
        with pytest.raises(RuntimeError, match="can't start"):
            one.run(xs[:20], targets[:20])
    for each in (one, other):
        for part in (slice(20), slice(20, 40)):
            each.run(xs[part], targets[part])
    one._pool.shutdown()
    assert same_bits(one.network.weights, other.network.weights)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_has_threads_of_its_own():
    learner, trials = learning(update="apply", threads=2), tuple(a.reshape(8, 10, 2) for a in draw(80))
    want = learner.evaluate(*trials).loss
    child = os.fork()
    if not child:
        threading.Timer(20, os._exit, [1]).start()
        os._exit(0 if learner.evaluate(*trials).loss == want else 2)
    assert os.waitpid(child, 0)[1] == 0


def test_a_warning_made_an_error_does_not_apply_a_gradient_twice():
    learner = learning(rule=mf.ModProp(1.0), optimizer=mf.SGD(1e3), update="apply")  # into a filter that does not forget
    learner.run(*draw(20))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(RuntimeWarning, match="rho"):
            learner.apply()
    assert learner.iteration == 1 and not any(g.any() for g in learner.accumulated.values())


def test_a_learner_goes_when_nobody_has_it():
    gc.disable()
    try:
        learner = learning()
        gone = weakref.ref(learner)
        learner.run(*draw(5))
        del learner
        assert gone() is None
    finally:
        gc.enable()


def test_arrays_of_a_network_are_written_into_and_not_exchanged():
    net = learning().network
    with pytest.raises(TypeError):
        net.weights["w_out"] = np.zeros_like(net.w_out)
    learner = learning()
    learner.network.sign = None  # not what the engine reads
    learner.run(*draw(5))


@pytest.mark.parametrize("optimizer", [mf.Adam(1e-3), mf.SGD(3e38), mf.SGD(0.1, schedule=lambda _: float("nan"))])
def test_an_update_that_overflows_is_refused_whole(optimizer):
    weights, state = {"w_rec": np.ones((1, 1), "float32"), "b_out": np.ones(1, "float32")}, {}
    state = optimizer.start(weights)
    with pytest.raises(FloatingPointError, match="expected finite values after update 0"):
        optimizer.update(weights, {"w_rec": np.ones((1, 1), "float32"), "b_out": np.full(1, 1e30, "float32")}, state, 0)
    assert all((w == 1).all() for w in weights.values()) and not any(s.any() for s in state.values())


def test_addresses_written_before_they_are_up_to_date_are_refused():
    learner, (xs, targets) = learning(), draw(20)
    learner.run(xs, targets)
    with pytest.raises(RuntimeError, match=r"weights_changed: expected Network.settle\(\) before"):
        learner.weights_changed()
    other = learning()
    other.run(xs, targets)
    assert same_bits(learner.network.weights, other.network.weights)


@pytest.mark.parametrize("name", [b"v", b"z"])
@pytest.mark.parametrize("rule", [mf.ModProp(0.25), mf.ModProp(0.25, factor="mean"), mf.EProp()], ids=["exact", "mean", "e-prop"])
def test_what_c_sets_is_all_that_it_sets(rule, name):
    (xs, targets), changes, y = draw(60), [], np.empty(2, "float32")
    step = function("mpf_step", AT, AT, SIZE, AT, SIZE, ctypes.c_int, AT, SIZE)
    for looks in (False, True):
        learner, handle, size = learning(rule=rule), ctypes.c_void_p(), 40 * 4
        start, values = learner.network.w_rec.copy(), np.empty(40, "float32")
        assert function("mpf_adopt", AT, AT)(id(learner), ctypes.addressof(handle)) == 0
        for t in range(60):
            assert step(handle, xs[t].ctypes.data, 8, targets[t].ctypes.data, 8, 1, y.ctypes.data, 8) == 0
            if looks and t % 5 == 3:
                for call in ("mpf_get", "mpf_set"):
                    assert function(call, AT, ctypes.c_char_p, AT, SIZE)(handle, name, values.ctypes.data, size) == 0
        assert function("mpf_destroy", AT)(handle) == 0
        changes.append(learner.network.w_rec - start)
    assert np.linalg.norm(changes[1] - changes[0]) < 1e-4 * np.linalg.norm(changes[0])


def test_errors_name_what_was_given():
    learner, (xs, targets) = small(), draw(10)
    with pytest.raises(ValueError, match=r"targets: expected shape \(10, 2\), got \(5, 2\)"):
        learner.run(xs, targets[:5])
    for text in ("tbptt(horizon=x)", "modprop(modulation=lowrank:x)"):
        with pytest.raises(ValueError, match=r"^rule: \w+: expected an integer, got 'x'"):
            mf.parse_rule(text)
    for betas in (0.9, (0.9,)):
        with pytest.raises(ValueError, match="betas: expected two numbers"):
            mf.Adam(betas=betas)
    with pytest.raises(TypeError, match="lr: expected a number"):
        mf.SGD(10**400)
    with pytest.raises(ValueError, match="optimizer: expected a learning rate that float32 holds, got 1e[+]39"):
        small(optimizer=mf.SGD(1e39))
    file = io.BytesIO()
    np.savez(file, settings=json.dumps({"format": 1}))
    file.seek(0)
    with pytest.raises(ValueError, match="file: expected a network written by Network.save"):
        mf.Network.load(file)


@pytest.mark.parametrize("rule", [mf.EProp(), mf.ModProp(0.5), mf.ModProp(0.5, factor="mean")], ids=["e-prop", "exact", "mean"])
def test_a_unit_heard_by_itself_alone_is_at_rest_without_autapses(rule):
    """To the bit: relu has h = 0 at v = 0, and h = 1 where a rounding error is left."""
    net = mf.Network(1, 3, 1, types=[0, 0, 1], tau=0, rng=np.random.default_rng(0))
    net.w_in[:, 0], net.w_rec[1:, 0] = [1, -1, -1], -1
    learner = mf.Learner(net, rule, optimizer=mf.SGD(0.01))
    one, none, target = np.ones(1, "float32"), np.zeros(1, "float32"), np.array([0.3], "float32")
    for _ in range(20):
        learner.step(one, target)
        learner.step(none)
        assert learner._engine.arrays["v"][0] == 0
