"""Steps, streams, updates and trials: what is the same must be the same to the bit."""

import gc
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import FUSED, RULES, assert_close, copied, moves, problems, same_bits, stream, twin

import modprop_fast as mf
from modprop_fast import core, reference

pytestmark = [pytest.mark.filterwarnings("ignore:rho"), pytest.mark.usefixtures("at_once_or_not")]


def one_of(rules):
    return st.sampled_from(sorted(rules)).map(rules.get)


FOLLOWING = {  # they follow at each reset, and in a stream every PLAN_EVERY steps
    "running": mf.ModProp(0.25, factor="running"),
    "auto": mf.ModProp("auto"),
    "low rank": mf.ModProp(0.25, mf.LowRank(1)),
}
CHUNKS = {
    "exact steps": mf.ModProp(0.25, exact_steps=3),
    "exact steps instant": mf.ModProp("instant", exact_steps=3),
    "eligibility tail": mf.EProp(exact_steps=2),
}
STEPWISE = {"rtrl": mf.RTRL(), "snap1": mf.SnAp1(), "mdgl cells": mf.MDGL("cells")}  # in NumPy
DRAWN = {"uoro": mf.UORO()}
WHOLE = {  # they need the whole trial
    "bptt": mf.BPTT(),
    "tbptt": mf.TBPTT(3),
    "cells mean": mf.ModProp(0.25, "cells", "mean"),
    "exact steps cells": mf.ModProp(0.25, "cells", exact_steps=3),
}
every_rule = one_of(RULES | FOLLOWING | STEPWISE | DRAWN)
accumulated = one_of(RULES | FOLLOWING | CHUNKS | STEPWISE)
any_rule = one_of(RULES | STEPWISE | DRAWN)
any_dtype = st.sampled_from(["float32", "float64"])


@settings(max_examples=60)
@given(problems("float32"), every_rule, st.sampled_from(["step", "apply"]))
def test_run_is_a_loop_of_steps(problem, rule, update):
    xs, each, targets, mask = stream(problem)
    by_step, by_run = twin(problem, rule, update=update), twin(problem, rule, update=update)
    ys = np.array([by_step.step(x, target) for x, target in zip(xs, each)])
    assert np.array_equal(by_run.run(xs, targets, mask), ys)
    assert same_bits(by_step.network.weights, by_run.network.weights)
    if update == "apply":
        assert same_bits(by_step.accumulated, by_run.accumulated)
    elif mask.any():
        assert not same_bits(by_run.network.weights, problem.net.weights)
    state = by_run._engine.arrays
    assert all(np.array_equal(state[name], a) for name, a in by_step._engine.arrays.items())


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("chunk", [1, 16])
def test_a_rule_that_follows_does_so_in_a_stream_without_end(name, chunk):
    rng = np.random.default_rng(0)
    n, late = 2 * core.PLAN_EVERY + 70, core.PLAN_EVERY + 20
    xs, targets = rng.normal(size=(n, 1)).astype("float32"), rng.normal(size=(n, 1)).astype("float32")

    def learner():
        net = mf.Network(1, 20, 1, types={"E": 0.5, "I": 0.5}, rng=np.random.default_rng(1))
        return mf.Learner(net, FOLLOWING[name], optimizer=mf.SGD(0.01))

    one, parts = learner(), learner()
    before, K = one.state(), one._engine.arrays["K"].copy()
    whole = one.run(xs, targets, chunk=chunk)
    evolved = {"running": "h_mean", "auto": "plan.mu", "low rank": "plan.u"}[name]
    assert not np.allclose(one.state()[evolved], before[evolved], rtol=1e-5)
    assert not np.allclose(one._engine.arrays["K"], K, rtol=1e-5)
    if chunk == 1:  # the same in parts, and step by step
        found = [*parts.run(xs[:33], targets[:33]), *(parts.step(x, t) for x, t in zip(xs[33:late], targets[33:]))]
        assert np.array_equal([*found, *parts.run(xs[late:], targets[late:])], whole)
        assert np.isclose(one.loss, np.sum((whole - targets) ** 2 / 2), rtol=1e-4)


@settings(max_examples=40)
@given(any_dtype.flatmap(lambda d: problems(d)), any_rule)
def test_steps_that_update_are_steps_and_applications(problem, rule):
    """SGD inside the kernel against the accumulated gradient, applied after every step with an error."""
    xs, each, _, mask = stream(problem)
    assume(mask.any())
    assume(problem.net.activation != "relu" or problem.net.dtype == np.float64)
    fused = twin(problem, rule, optimizer=mf.SGD(0.1))
    plain = twin(problem, rule, optimizer=mf.SGD(0.1), update="apply")
    for x, target in zip(xs, each):
        try:
            expected = plain.step(x, target)
            if target is not None:
                plain.apply()
        except FloatingPointError:  # so large a step really diverges in some networks
            assume(False)
        assume(np.abs(expected).max() < 1e3)
        assert np.allclose(fused.step(x, target), expected, rtol=1e-3, atol=1e-4)
    assert plain.iteration == mask.sum()
    assert_close(fused.network.weights, plain.network.weights, 1e-10 if problem.net.dtype == np.float64 else 1e-4)
    w, sign = fused.network.w_rec, problem.net.sign
    assert not w[~problem.net.connections].any()
    if sign is not None:
        assert (w * sign >= 0).all() and (fused.network.w_out * sign >= 0).all()


@settings(max_examples=30)
@given(any_dtype.flatmap(lambda d: problems(d)), accumulated)
def test_a_stream_accumulates_the_gradient_of_its_trial(problem, rule):
    """`gradient` takes the mean over the masked steps, a stream their sum."""
    learner = twin(problem, rule, update="apply")
    mask = np.ones(problem.inputs.shape[1], bool) if problem.mask is None else problem.mask[0]
    labels = np.broadcast_to(problem.targets[0], len(mask)) if problem.loss != "mse" else problem.targets[0]
    expected = learner.gradient(problem.inputs[:1], labels[None], mask)
    assume(moves(expected))
    learner.run(problem.inputs[0], labels, mask)
    scaled = {name: g / int(mask.sum()) for name, g in learner.accumulated.items()}
    assert_close(scaled, expected, 1e-12 if problem.net.dtype == np.float64 else 1e-5)


@settings(max_examples=25)
@given(any_dtype.flatmap(lambda d: problems(d)), accumulated | one_of(WHOLE), st.sampled_from([1, 3, 4, 7, 20, 37]))
def test_a_batch_does_not_depend_on_the_threads(problem, rule, n_trials):
    """Nor on how many trials go through W together: at most sixteen, and fewer with more threads."""
    some = np.arange(n_trials) % len(problem.inputs)
    trial = problem.inputs[some] * problem.rng.normal(size=(n_trials, 1, 1)), problem.targets[some]
    trial += (None if problem.mask is None else problem.mask[some],)
    fits = []
    for threads in (1, 2, 3, 8):
        learner = twin(problem, rule, optimizer=mf.Adam(0.01), threads=threads)
        fits.append((learner.fit_trials(*trial), learner.network.weights, learner.evaluate(*trial)))
    for loss, weights, evaluation in fits[1:]:
        assert loss == fits[0][0] and evaluation.loss == fits[0][2].loss
        assert same_bits(weights, fits[0][1]) and np.array_equal(evaluation.outputs, fits[0][2].outputs)
    assert not same_bits(fits[0][1], problem.net.weights)


@pytest.mark.parametrize("name", WHOLE)
def test_trials_too_long_to_be_kept_together_go_alone(name, monkeypatch):
    """One learner throughout: what it keeps of trials of one length is not for those of another."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(8, 30, 3)), rng.normal(size=(8, 30, 2))
    learner = mf.Learner(mf.Network(3, 20, 2, types={"E": 16, "I": 4}, activation="tanh", rng=rng), WHOLE[name])
    singly = [learner.gradient(inputs[i : i + 1], targets[i : i + 1], mode="offline") for i in range(8)]
    expected = {key: sum(one[key] / 8 for one in singly) for key in singly[0]}  # an eighth is exact
    together = learner.gradient(inputs, targets, mode="offline")
    assert moves(expected) and not same_bits(together, expected)
    assert_close(together, expected, 1e-5)
    long, kept = np.concatenate([inputs, inputs], axis=1), 4 * 5 * 20 * 30
    monkeypatch.setattr("modprop_fast.learner._RECORD_BYTES", 8 * kept)
    assert same_bits(learner.gradient(inputs, targets, mode="offline"), together)
    monkeypatch.setattr("modprop_fast.learner._RECORD_BYTES", 4 * kept - 1)
    assert same_bits(learner.gradient(inputs, targets, mode="offline"), expected)
    learner.gradient(long, np.concatenate([targets, targets], axis=1), mode="offline")
    assert same_bits(learner.gradient(inputs, targets, mode="offline"), expected)


@given(problems("float32", activations=("relu", "tanh")))
@settings(max_examples=15)
def test_every_instruction_set_computes_the_same(problem):
    """To the bit where products and sums are fused; the baseline to rounding (and test_identities to the reference)."""
    xs, _, targets, mask = stream(problem)
    found = {}
    for isa in core.available_isas():
        os.environ["MODPROP_FAST_ISA"] = isa
        try:
            learner = twin(problem, mf.ModProp(0.25))
        finally:
            del os.environ["MODPROP_FAST_ISA"]
        found[isa] = (learner.run(xs, targets, mask), learner.network.weights)
    for isa in FUSED[1:]:
        assert np.array_equal(found[isa][0], found[FUSED[0]][0]) and same_bits(found[isa][1], found[FUSED[0]][1])
    for isa in FUSED[:1] if problem.net.activation == "tanh" else ():  # a relu unit near its threshold may be on either side
        assert_close(found[isa][1], found["baseline"][1], 1e-4)


def learned_in_all_ways():
    """Weights and gradients by way of learning, of networks with many connections and with few."""
    out = {}
    for dtype, rule, n_rec, update in itertools.product(("float32", "float64"), ("exact", "mean", "e-prop"), (21, 70), ("step", "apply")):
        rng = np.random.default_rng(0)
        mask = rng.random((n_rec, n_rec)) < 0.15 if n_rec == 70 else None
        net = mf.Network(2, n_rec, 1, types={"E": 0.6, "I": 0.4}, activation="tanh", dtype=dtype, mask=mask, rng=rng)
        learner = mf.Learner(net, RULES[rule], optimizer=mf.SGD(0.01), update=update)
        learner.run(rng.normal(size=(40, 2)).astype(dtype), rng.normal(size=(40, 1)).astype(dtype))
        of = net.weights if update == "step" else learner.accumulated
        out |= {f"{dtype} {rule} {n_rec} {update} {name}": array.copy() for name, array in of.items()}
    return out


PLAIN = """
import sys, importlib.util as util, numpy as np
for name in ("_kernels_baseline_f32", "_kernels_baseline_f64"):
    spec = util.spec_from_file_location(f"modprop_fast.{name}", f"{name}.so")
    sys.modules[spec.name] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
sys.path.insert(0, sys.argv[1])
import test_streaming
np.savez("found.npz", **test_streaming.learned_in_all_ways())
"""


def test_a_compiler_without_vector_types_makes_the_same_of_it(tmp_path):
    source, cc = Path(core.__file__).parents[1] / "src", shutil.which("gcc")
    if not (source / "kernels_baseline_f32.c").exists() or cc is None:
        pytest.skip("no gcc, or not built in this tree")
    flags = ["-O0", "-w", "-shared", "-fPIC", "-DMPF_PLAIN", f"-I{source}", f"-I{sysconfig.get_path('include')}"]
    for bits in (32, 64):
        name = f"kernels_baseline_f{bits}"
        subprocess.run([cc, *flags, f"-DMPF_BITS={bits}", str(source / f"{name}.c"), "-o", str(tmp_path / f"_{name}.so")], check=True)
    env = os.environ | {"MODPROP_FAST_ISA": "baseline"}
    subprocess.run([sys.executable, "-c", PLAIN, str(Path(__file__).parent)], check=True, env=env, cwd=tmp_path)
    with np.load(tmp_path / "found.npz") as plain:
        for name, array in learned_in_all_ways().items():
            assert_close({name: plain[name]}, {name: array}, 1e-10 if name.startswith("float64") else 1e-4)


def test_the_instruction_sets_of_this_processor_were_compared():
    """All that the processor has must be there, or the test above compares one with itself."""
    with open("/proc/cpuinfo") as file:
        flags = set(file.read().split())
    expected = ["baseline"] + ["v3"] * ("avx2" in flags) + ["v4"] * ("avx512vl" in flags)
    assert list(core.available_isas()) == expected


# ---------------------------------------------------------------- what a step means


def small(rule=mf.ModProp(0.25), seed=0, **kwargs):
    net = mf.Network(2, 9, 2, types={"E": 6, "I": 3}, dale={"E": 1, "I": -1}, activation="tanh", rng=np.random.default_rng(seed))
    return mf.Learner(net, rule, **kwargs)


def draw(n, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 2)).astype("float32"), rng.normal(size=(n, 2)).astype("float32")


def test_a_step_without_error_or_learning_keeps_the_weights_and_the_traces_going():
    xs, targets = draw(6)
    learners = small(), small(), small()
    learners[0].run(xs[:5])
    learners[1].run(xs[:5], targets[:5], learn=False)
    for x in xs[:5]:
        learners[2].step(x)
    before = copied(learners[0].network.weights)
    for learner in learners:
        assert same_bits(learner.network.weights, before)
        learner.step(xs[5], targets[5])
        assert not same_bits(learner.network.weights, before)
        assert same_bits(learner.network.weights, learners[0].network.weights)
    assert learners[0].loss > 0


def test_signal_is_the_gradient_of_the_readout():
    xs, targets = draw(20)
    by_target, by_signal = small(), small()
    for x, target in zip(xs, targets):
        y = by_target.step(x, target)
        # the readout before this step's update is only known after it: ask a copy of the state
        by_signal.step(x, signal=(y - target) / 2)
    assert_close(by_signal.network.weights, by_target.network.weights, 1e-6)


@pytest.mark.parametrize("awake", range(8))
def test_a_unit_awake_among_units_at_rest_learns(awake):
    """Blocks of units at rest are passed over."""
    net = mf.Network(1, 8, 1, activation="relu", init="zeros")
    net.w_in[:] = -1
    net.w_in[awake] = 1
    net.w_out[:] = 1
    before = net.w_in.copy()
    mf.Learner(net, mf.EProp(), optimizer=mf.SGD(0.1)).step(np.ones(1, "f"), target=np.zeros(1, "f"))
    assert np.flatnonzero(net.w_in != before).tolist() == [awake]


def test_a_step_returns_an_array_of_the_callers_own():
    """An array that nobody has kept is given again: not one that is kept in part, or that was changed in its make."""
    xs, targets = draw(64)
    learner, expected = small(), small().run(xs, targets)
    kept = []
    for t, (x, target, wanted) in enumerate(zip(xs, targets, expected)):
        y = learner.step(x, target)
        assert y.shape == (2,) and y.dtype == np.float32 and y.flags.writeable and y.flags.c_contiguous
        assert np.array_equal(y, wanted) and not np.shares_memory(y, learner._engine.y)
        if t % 6 == 0:
            kept.append((y, y.copy()))
        elif t % 6 == 1:
            kept.append((y[1:], y[1:].copy()))
        elif t % 6 == 2:
            kept.append((memoryview(y), y.copy()))
        elif t % 6 == 3:
            y.flags.writeable = False
        elif t % 6 == 4 and t % 4:
            y.resize(1, refcheck=False)
        elif t % 6 == 4:
            y.resize((2, 1), refcheck=False)
        else:
            y.dtype = "int32"
    assert all(np.array_equal(array, before) for array, before in kept)


def test_what_is_written_into_the_weights_counts_at_the_next_step():
    learner, x = small(), draw(1)[0][0]
    learner.network.w_out[...] = 0
    learner.network.b_out[...] = [3, 4]
    assert learner.step(x).tolist() == [3, 4]
    learner.network.w_in = np.zeros((9, 2))
    learner.reset()
    learner.network.w_out[...] = 1
    assert learner.step(x).tolist() == [3, 4]  # nothing drives the units: z = 0


@pytest.mark.parametrize("rule", ["e-prop", "exact"])
def test_what_is_written_before_an_array_is_let_go_counts(rule):
    xs, targets = draw(2)
    learners = small(RULES[rule]), small(RULES[rule])
    w = learners[0].network.w_rec
    for learner in learners:
        learner.step(xs[0], targets[0])
    w *= 2
    del w
    learners[1].network.w_rec *= 2
    after = [learner.step(xs[1]) for learner in learners]
    assert np.array_equal(*after) and np.ptp(after)


def test_reset_starts_a_trial_anew():
    xs, targets = draw(7)
    learner = small(optimizer=mf.SGD(1e-30))
    first = learner.run(xs, targets)
    assert not np.array_equal(learner.run(xs, targets), first)
    learner.reset()
    assert np.array_equal(learner.run(xs, targets), first)


@pytest.mark.parametrize("rule", [mf.ModProp, mf.MDGL])
@pytest.mark.parametrize("refresh, follows", [("update", True), ("never", False)])
def test_when_the_type_means_follow(rule, refresh, follows):
    learner = small(rule(refresh=refresh), optimizer=mf.SGD(0.5))
    before = learner._engine.means
    learner.run(*draw(5))
    learner.fit_trials(draw(5)[0][None], draw(5)[1][None])
    after = learner._engine.means
    expected = np.array([[learner.network.w_rec[np.ix_(learner.network.types == a, learner.network.types == b)].mean() for b in (0, 1)] for a in (0, 1)])
    assert np.allclose(after, expected, rtol=1e-5) == follows
    assert np.array_equal(after, before) != follows
    learner.network.w_rec[0, 1] += 1
    learner.reset()
    assert np.array_equal(learner._engine.means, after) != follows


def test_every_other_update():
    learner = small(mf.ModProp(0.25, refresh=2), optimizer=mf.SGD(0.5))
    xs, targets = draw(4)
    seen = [learner._engine.means]
    for x, target in zip(xs, targets):
        learner.step(x, target)
        seen.append(learner._engine.means)
    assert [not np.array_equal(a, b) for a, b in zip(seen, seen[1:])] == [False, True, False, True]


def test_state_and_restore_go_on_to_the_same_bits():
    xs, targets = draw(40)
    trials = xs.reshape(4, 10, 2), targets.reshape(4, 10, 2)
    rule = mf.ModProp(0.25, feedback="random", refresh=2)
    one = small(rule, optimizer=mf.Adam(0.01), rng=np.random.default_rng(3))
    for _ in range(3):
        one.fit_trials(*trials)
    other = small(rule, optimizer=mf.Adam(0.01), rng=np.random.default_rng(4))
    other.restore(one.state())
    for name, w in one.network.weights.items():
        other.network.weights[name][...] = w
    for learner in (one, other):
        for _ in range(3):
            learner.fit_trials(*trials)
    assert same_bits(one.network.weights, other.network.weights)
    assert same_bits(one.state(), other.state())
    with pytest.raises(ValueError, match="state: expected"):
        small().restore(one.state())


def test_adam_with_everything_against_its_equations():
    """Kingma & Ba 2015, algorithm 1, on one weight at a time, with L2 in the gradient, L1 after, clipping before."""
    rng = np.random.default_rng(0)
    net = mf.Network(2, 9, 2, dale=[1] * 6 + [-1] * 3, activation="tanh", bias=True, dtype="float64", rng=rng)
    net.b_rec, net.b_out = rng.normal(size=9), rng.normal(size=2)
    optimizer = mf.Adam(0.01, betas=(0.5, 0.9), eps=0.02, l2=0.1, l1=0.5, clip=0.05, schedule=mf.StepDecay(0.5, 2))
    learner, trials = mf.Learner(net, optimizer=optimizer), rng.normal(size=(2, 1, 10, 2))
    weights = copied(net.weights)
    m, s = ({name: np.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for i in range(4):
        grads = learner.gradient(*trials)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm > 0.05
        learner.fit_trials(*trials)
        for name, w in weights.items():
            g = grads[name] * 0.05 / norm + (0.1 * w if name.startswith("w_") else 0)
            m[name] = 0.5 * m[name] + 0.5 * g
            s[name] = 0.9 * s[name] + 0.1 * g**2
            lr = 0.01 * 0.5 ** (i // 2)
            w -= lr * (m[name] / (1 - 0.5 ** (i + 1))) / (np.sqrt(s[name] / (1 - 0.9 ** (i + 1))) + 0.02)
            if name in ("w_rec", "w_out"):
                w[w > 0] -= lr * 0.5
                w[w * net.sign < 0] = 0
        np.fill_diagonal(weights["w_rec"], 0)
    assert_close(net.weights, weights, 1e-12)


def test_accuracy_is_the_share_of_the_counted_steps_that_are_right():
    rng = np.random.default_rng(0)
    inputs, labels, mask = rng.normal(size=(5, 8, 2)), rng.integers(0, 3, (5, 8)), np.arange(8) < [[3], [8], [1], [5], [2]]
    learner = mf.Learner(mf.Network(2, 9, 3, rng=rng), loss="cross_entropy")
    found = learner.evaluate(inputs, labels, mask)
    right = [found.outputs[b, t].argmax() == labels[b, t] for b in range(5) for t in range(8) if mask[b, t]]
    assert 0 < found.accuracy == sum(right) / 19 < 1
    assert learner.evaluate(inputs, labels[:, 7]).accuracy == np.mean(found.outputs[:, 7].argmax(axis=1) == labels[:, 7])
    assert small().evaluate(inputs, inputs).accuracy is None


@pytest.mark.parametrize("size", [1e200, 1e308])
def test_a_gradient_that_is_not_finite_is_said_once_and_changes_nothing(size):
    """By an error, and not by warnings of NumPy as well."""
    net = mf.Network(1, 5, 1, dtype="float64", activation="tanh", rng=np.random.default_rng(0))
    learner = mf.Learner(net, mf.ModProp(0.25), update="apply")
    learner.run(np.full((4, 1), 30.0), np.full((4, 1), size))
    before = copied(net.weights)
    with pytest.raises(FloatingPointError, match="gradient: expected a finite norm"):
        learner.apply()
    assert same_bits(net.weights, before) and not learner.accumulated["w_rec"].diagonal().any()


def test_the_example_of_the_readme_learns(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    exec(example, {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5 and max(losses) < 0.1  # guessing zero costs 0.5


# ---------------------------------------------------------------- stability, threads, memory


def test_an_unstable_filter_is_named_once():
    net = mf.Network(1, 20, 1, tau=10.0, init="zeros")
    net.w_rec[...] = 0.5
    np.fill_diagonal(net.w_rec, 0)
    with pytest.warns(RuntimeWarning, match=r"rho\(K\) = 1\.") as seen:
        learner = mf.Learner(net, mf.ModProp(1.0))
        learner.reset()
        learner.run(np.zeros((5, 1)), np.ones((5, 1)))
    assert len(seen) == 1
    k = np.exp(-0.1)
    assert learner.filter_radius == pytest.approx(k + (1 - k) * 20 * 0.5 * 19 / 20, rel=1e-6)


def test_the_radius_of_a_filter_without_self_modulation_is_that_of_all_n_by_n():
    """Of two units that inhibit each other: what tells them apart lasts longer than what they share."""
    net = mf.Network(1, 2, 1, tau=10.0, dtype="float64", init="zeros")
    net.w_rec = [[0, -1], [-1, 0]]
    wb = reference.type_means(net.w_rec, net.types, self_modulation=False)
    radius = np.abs(np.linalg.eigvals(net.leak * np.eye(2) + (1 - net.leak) * 0.5 * wb)).max()
    assert mf.Learner(net, mf.ModProp(0.5, factor="mean", self_modulation=False)).filter_radius == pytest.approx(radius)


def test_a_filter_that_becomes_unstable_within_a_stream_is_named_once():
    net = mf.Network(1, 8, 1, tau=2.0, activation="identity", init="zeros")
    net.w_rec[...] = 0.1
    net.w_in[...] = net.w_out[...] = 0.3
    np.fill_diagonal(net.w_rec, 0)
    learner = mf.Learner(net, mf.ModProp(1.0), optimizer=mf.SGD(0.2))
    assert learner.filter_radius < 1
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(30):
            learner.step(np.ones(1, "float32"), signal=-np.ones(1, "float32"))
            if seen:
                break
        learner.step(np.ones(1, "float32"), signal=-np.ones(1, "float32"))
    assert learner.filter_radius > 1
    assert [str(w.message).startswith("rho(K)") for w in seen] == [True]


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_filter_in_the_kernel_knows_when_it_decays(rank):
    """The warning within a stream uses squarings of K; eigenvalues must agree on either side of 1."""
    rng = np.random.default_rng(rank)
    for radius, unstable in ((0.999, False), (1.001, True)):
        net = mf.Network(1, 4 * rank, 1, types=np.repeat(np.arange(rank), 4), tau=0.0, autapses=True, rng=rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learner = mf.Learner(net, mf.ModProp(1.0))
        net.w_rec *= radius / learner.filter_radius
        heard = []
        learner._warned = True
        engine = core.Engine(net, learner._plan, "mse", online=True, lr=1e-12, on_unstable=lambda heard=heard: heard.append(1))
        engine.step(np.ones(1, "float32"), signal=np.ones(1, "float32"))
        assert bool(heard) == unstable


def test_two_threads_on_one_learner_are_told_so():
    learner, other = small(), []
    xs, targets = draw(200_000)

    def run():
        try:
            learner.run(xs, targets)
        except RuntimeError as error:
            other.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(other) == 1 and "another thread" in other[0]


def test_two_learners_in_two_threads_compute_what_they_compute_alone():
    xs, targets = draw(5000)
    alone = small().run(xs, targets)
    learners, found = [small(), small()], [None, None]

    def run(i):
        found[i] = np.array([learners[i].step(x, target) for x, target in zip(xs, targets)])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(found[0], alone) and np.array_equal(found[1], alone)


SUBNORMAL = """
import numpy as np
tiny = np.full(64, 1e-40, "float32")
assert (tiny * np.float32(0.5) > 0).all()
import modprop_fast as mf
assert (tiny * np.float32(0.5) > 0).all(), "importing changed the process"
learner = mf.Learner(mf.Network(1, 40, 1, rng=np.random.default_rng(0)), mf.ModProp(0.25))
x = np.ones((3, 1), "float32")
learner.step(x[0], x[0]); learner.run(x, x); learner.fit_trials(x[None], x[None]); learner.gradient(x[None], x[None], mode="offline")
assert (tiny * np.float32(0.5) > 0).all(), "a kernel left its setting behind"
for _ in range(3000):
    learner.step(np.zeros(1, "float32"))
traces = np.concatenate([a.ravel() for name, a in learner._engine.arrays.items() if name in ("eps", "traces", "v")])
assert not ((traces != 0) & (abs(traces) < 1.1e-38)).any(), "a network at rest has subnormal traces"
"""


def test_subnormals_of_other_code_are_left_alone_and_ours_are_none():
    subprocess.run([sys.executable, "-c", SUBNORMAL], check=True)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("rule", ["exact", "no self"])
def test_a_million_steps_allocate_nothing(rule):
    learner = small(RULES[rule])
    xs, targets = draw(1000)
    pairs = list(zip(xs, targets))

    def steps(n):
        for _ in range(n // 1000):
            for x, target in pairs:
                learner.step(x, target)

    steps(10_000)
    gc.collect()
    tracemalloc.start()
    steps(10_000)
    traced, before = tracemalloc.get_traced_memory()[0], resident()
    steps(1_000_000)
    grown = tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    assert grown < 2_000  # bytes: less than one per 500 steps
    assert resident() - before < 1 << 20
