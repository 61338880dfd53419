"""What happens between steps: weights that are looked at and written into, copies, refusals; each of these once went wrong."""

import ctypes
import io
import json
import shutil
import subprocess
import threading

import numpy as np
import pytest
from c_face import STRICT
from test_streaming import same_bits

import modprop_fast as mf
from modprop_fast import core

pytestmark = [pytest.mark.filterwarnings("ignore:rho"), pytest.mark.usefixtures("at_once_or_not")]


def make(rule=mf.ModProp(0.5), n_rec=20, n_out=1, *, mask=None, how=None, **network):
    network = {"activation": "tanh", "dtype": "float64", "rng": np.random.default_rng(0)} | network
    return mf.Learner(mf.Network(2, n_rec, n_out, mask=mask, **network), rule, **({"optimizer": mf.SGD(0.01)} | (how or {})))


def draw(n):
    rng = np.random.default_rng(1)
    return rng.normal(size=(n, 2)), rng.normal(size=(n, 1))


@pytest.mark.parametrize("streamed", [False, True])
def test_the_type_means_are_those_of_the_weights_as_somebody_left_them(streamed):
    learner, (xs, targets) = make(autapses=True), draw(10)
    if streamed:
        learner.step(xs[0])
    learner.network.w_rec *= 3
    learner.gradient(xs[None], targets[None])
    np.testing.assert_allclose(learner._engine.means, learner.network.w_rec.mean(), rtol=1e-12)
    learner.run(xs, targets)
    learner.fit_trials(xs[None], targets[None])
    np.testing.assert_allclose(learner._engine.means, learner.network.w_rec.mean(), rtol=1e-12)


def test_a_held_mapping_shows_the_weights_of_now_and_takes_what_is_written():
    learner, (xs, targets) = make(), draw(20)
    weights = learner.network.weights
    for _ in range(2):
        learner.run(xs, targets)
        weights["w_in"][...] = 5
        learner.step(xs[0])
        shown = weights["w_rec"].copy()
        assert np.array_equal(shown, learner.network.w_rec) and (weights["w_in"] == 5).all()
    assert list(weights) == ["w_rec", "w_in", "w_out", "b_out"] and len(weights) == 4 and "b_rec" not in weights


@pytest.mark.parametrize("chunk", [1, 8, 40])
def test_with_few_connections_too_what_follows_a_divergence_starts_from_rest(chunk):
    xs, targets = draw(40)
    wild = xs.copy()
    wild[20] = 1e308
    mask = np.random.default_rng(2).random((160, 160)) < 0.2
    learner, fresh = (make(n_rec=160, mask=mask, activation="relu", how={"optimizer": mf.SGD(0.05)}) for _ in range(2))
    assert learner._engine.sparse
    for each in (learner, fresh):
        each.run(xs, targets)
    with pytest.raises(FloatingPointError):
        learner.run(wild, targets, chunk=chunk)
    for name, w in learner.network.weights.items():
        fresh.network.weights[name][...] = w
    fresh.reset()
    for each in (learner, fresh):
        each.run(xs, targets)
    assert same_bits(learner.network.weights, fresh.network.weights)


RULES = {"exact": mf.ModProp(0.5), "mean": mf.ModProp(0.5, factor="mean"), "e-prop": mf.EProp()}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n_rec", [20, 300])
def test_what_was_learned_is_felt_however_long_nothing_is_learned_after_it(name, n_rec):
    xs, targets = draw(60)
    one, other = (make(RULES[name], n_rec, types={"E": 0.8, "I": 0.2}) for _ in range(2))
    for each in (one, other):
        each.run(xs[:10], targets[:10])
    other.network.settle()
    np.testing.assert_allclose(one.run(xs[10:]), other.run(xs[10:]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(one.network.w_rec, other.network.w_rec, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", RULES)
def test_a_chunk_that_diverges_teaches_nothing_and_those_before_it_do(name):
    xs, targets = draw(40)
    xs[20] = 1e308
    one, other = (make(RULES[name], 40, types={"E": 0.8, "I": 0.2}, activation="relu") for _ in range(2))
    with pytest.raises(FloatingPointError):
        one.run(xs, targets, chunk=8)
    other.run(xs[:16], targets[:16], chunk=8)
    assert same_bits(one.network.weights, other.network.weights)


@pytest.mark.parametrize("name", ["network", "rule", "loss_name", "optimizer", "update", "threads"])
def test_a_learner_stays_what_it_was_made(name):
    learner = make()
    with pytest.raises(AttributeError, match=f"^{name}: expected to stay"):
        setattr(learner, name, getattr(learner, name))


@pytest.mark.parametrize("factor", ["exact", "running"])
def test_what_is_measured_of_trials_does_not_depend_on_the_threads(factor):
    rng = np.random.default_rng(2)
    xs, labels = rng.normal(size=(3, 23, 2)), rng.integers(0, 4, 3)  # one after the other, by one thread or more
    found = []
    for threads in (1, 2, 3):
        how = {"loss": "cross_entropy", "optimizer": mf.Adam(1e-2), "threads": threads}
        learner = make(mf.ModProp("auto", factor=factor), 40, 4, dtype="float32", types={"E": 32, "I": 8}, how=how)
        for _ in range(20):
            learner.fit_trials(xs, labels)
        found.append(dict(learner.network.weights) | learner.state())
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


def test_a_gradient_that_is_not_finite_is_dropped():
    xs, targets = draw(5)
    learner, fresh = (make(dtype="float32", how={"update": "apply"}) for _ in range(2))
    learner.step(xs[0].astype("float32"), signal=np.full(1, 3e38, "float32"))
    before = {name: w.copy() for name, w in learner.network.weights.items()}
    with pytest.raises(FloatingPointError):
        learner.apply()
    assert same_bits(before, learner.network.weights) and learner.iteration == 0
    for each in (learner, fresh):
        each.reset()
        each.run(xs, targets)
        each.apply()
    assert same_bits(learner.network.weights, fresh.network.weights)


@pytest.mark.parametrize(
    "wrong", [{"means": [["x"]]}, {"means": [[np.nan]]}, {"iteration": -5}, {"iteration": 0.5j}, {"updates": [1]}]
)
def test_a_state_that_is_refused_changes_nothing(wrong):
    learner, (xs, targets) = make(how={"update": "apply"}), draw(5)
    learner.run(xs, targets)
    learner.apply()
    before = learner.state()
    with pytest.raises((ValueError, TypeError), match="^state: "):
        learner.restore(before | {"iteration": 7} | wrong)
    assert same_bits(before, learner.state())
    with pytest.raises(TypeError, match="^state: "):
        learner.restore(None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"w_rec": np.zeros((1, 20))}, {"w_out": np.array(1.0)}, {"w_rec": np.zeros((20, 20), complex)}, {"w_in": np.zeros(20)},
        {"b_out": np.array([np.nan])}, {"w_in": np.full((20, 2), "1.5")}, {"settings": np.array("[1]")},
        {"settings": np.array(json.dumps({"format": 1, "type_names": ["a", "b"], "tau": 1.0, "dt": 1.0}))},
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_whole_network_is_refused_as_one(wrong):
    whole, file = io.BytesIO(), io.BytesIO()
    make().network.save(whole)
    whole.seek(0)
    np.savez(file, **(dict(np.load(whole)) | wrong))
    file.seek(0)
    with pytest.raises(ValueError, match="^file: expected a network written by Network.save"):
        mf.Network.load(file)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: mf.Network(2, 5, 1, dtype=None, init="zeros"), "dtype: expected one of 'float32', 'float64', got None"),
        (lambda: mf.Network(2, 5, 1, dtype="foo", init="zeros"), "dtype: expected one of 'float32', 'float64', got 'foo'"),
        (lambda: mf.Network(True, 5, 1, init="zeros"), "n_in: expected an integer, got True"),
        (lambda: mf.TBPTT(10**30), "horizon: expected an integer >= 1 of 64 bits"),
        (lambda: mf.Network(2, 2, 1, types={"E": 1, "I": 1}, dale={"E": [1], "I": 1}, init="zeros"), "dale: expected"),
        (lambda: mf.ModProp(factor="mean", self_modulation="false"), "self_modulation: expected True or False, got 'false'"),
        (lambda: make().run(*draw(5), chunk="32"), "chunk: expected an integer >= 1 or 'auto', got '32'"),
        (lambda: make().run(*draw(5), chunk=1.5), "chunk: expected an integer >= 1 or 'auto', got 1.5"),
        (lambda: make().latency.start("abc"), "deadline: expected a number, got 'abc'"),
        (lambda: make().latency.start(np.inf), "deadline: expected a finite number in (0, 1e+09], got inf"),
    ],
)
def test_what_does_not_fit_gets_its_own_sentence(call, sentence):
    with pytest.raises((ValueError, TypeError)) as refused:
        call()
    assert str(refused.value).startswith(sentence)


def test_true_and_false_are_values_of_a_text():
    assert mf.parse_rule("modprop(factor=mean, self_modulation=false)") == mf.ModProp(factor="mean", self_modulation=False)


LOOP = """
#include <stddef.h>
int loop(int (*step)(void *, const void *, size_t, const void *, size_t, int, void *, size_t), void *learner, const double *x,
         const double *target, double *y, size_t n_steps) {
    size_t t;
    for (t = 0; t < n_steps; t++) {
        int code = step(learner, x + 2 * t, 2 * sizeof *x, target + t, sizeof *target, 1, y, sizeof *y);
        if (code) return code;
    }
    return 0;
}
"""


def function_at(name):
    of, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    of.restype, of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = core.__pyx_capi__[name]
    return pointer(capsule, of(capsule))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_a_program_that_steps_without_the_gil_is_not_disturbed_by_who_reads_the_weights(tmp_path):
    (tmp_path / "loop.c").write_text(LOOP)
    command = ["gcc", "-std=c89", *STRICT, "-O1", "-shared", "-fPIC", tmp_path / "loop.c", "-o", tmp_path / "loop.so"]
    subprocess.run(command, check=True)
    loop = ctypes.CDLL(str(tmp_path / "loop.so")).loop
    loop.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_size_t]
    adopt = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(function_at("mpf_adopt"))
    xs, targets = draw(40000)
    y, found = np.empty(1), []
    for looks in (False, True):
        learner = make(n_rec=100, types={"E": 0.5, "I": 0.5}, how={"optimizer": mf.SGD(0.001)})
        handle, codes = ctypes.c_void_p(), []
        assert adopt(learner, ctypes.addressof(handle)) == 0

        def host(handle=handle, codes=codes):
            codes.append(loop(function_at("mpf_step"), handle, xs.ctypes.data, targets.ctypes.data, y.ctypes.data, len(xs)))

        thread = threading.Thread(target=host)
        thread.start()
        while looks and thread.is_alive():
            learner.network.settle()
        thread.join()
        assert codes == [0]
        found.append(learner.network.w_rec.copy())
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("factor", ["exact", "mean"])
@pytest.mark.parametrize("n_rec, dale", [(10, None), (20, None), (16, None), (20, {"E": 1, "I": -1})], ids=str)
def test_weights_put_right_after_a_divergence_learn_again(n_rec, dale, factor):
    """What was infinite is left nowhere, nor what 0 x inf made where there is no unit."""
    rng = np.random.default_rng(1)
    xs, targets = rng.normal(size=(60, 2)).astype("float32"), rng.normal(size=(60, 1)).astype("float32")
    wild = np.where(np.arange(60)[:, None] < 10, targets, np.float32(3e38))
    learners = [
        make(mf.ModProp(0.25, factor=factor), n_rec, types={"E": 0.8, "I": 0.2}, dale=dale, dtype="float32", rng=np.random.default_rng(0))
        for _ in range(2)
    ]
    again, fresh = learners
    with pytest.raises(FloatingPointError):
        again.run(xs, wild)
    for name, w in again.network.weights.items():
        w[...] = fresh.network.weights[name]
    del w
    again.reset()
    found, expected = again.run(xs, targets)[0], fresh.run(xs, targets)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(again._engine.means, fresh._engine.means, rtol=0, atol=1e-6)
