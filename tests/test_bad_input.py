"""Bad input: one precise sentence, and nothing has changed."""

import io
import json

import numpy as np
import pytest
from problems import copied, same_bits

import modprop_fast as mf
from modprop_fast import core, reference

pytestmark = pytest.mark.filterwarnings("ignore:rho")


def rng():
    return np.random.default_rng(0)


def net(**kwargs):
    return mf.Network(3, 5, 2, **{"rng": rng()} | kwargs)


def learner(rule=mf.ModProp(0.25), **kwargs):
    return mf.Learner(net(), rule, **kwargs)


x = np.ones(3, "float32")
y = np.ones(2, "float32")
nan = np.array([0, np.nan, 0], "float32")
XS = np.zeros((2, 4, 3))
YS = np.zeros((2, 4, 2))

STEPS = [
    # loss, arguments, exception, message
    ("mse", dict(x=np.ones(3)), TypeError, r"x: expected a C-contiguous float32 array of shape \(3,\), got float64 array of shape \(3,\)"),
    ("mse", dict(x=[1.0, 2.0, 3.0]), TypeError, r"x: expected .*, got \[1.0, 2.0, 3.0\]"),
    ("mse", dict(x=np.ones(2, "float32")), ValueError, r"x: expected .* shape \(3,\), got float32 array of shape \(2,\)"),
    ("mse", dict(x=np.ones((1, 3), "float32")), ValueError, r"x: .*got float32 array of shape \(1, 3\)"),
    ("mse", dict(x=np.ones(6, "float32")[::2]), ValueError, r"x: .*got float32 array of shape \(3,\), not C-contiguous"),
    ("mse", dict(x=nan), ValueError, "x: expected finite values, got nan at index 1"),
    ("mse", dict(x=x, target=np.array([np.inf, 0], "float32")), ValueError, "target: expected finite values, got inf at index 0"),
    ("mse", dict(x=x, target=1.0), TypeError, r"target: expected a C-contiguous float32 array of shape \(2,\), got 1.0"),
    ("mse", dict(x=x, target=x), ValueError, r"target: .* shape \(2,\), got float32 array of shape \(3,\)"),
    ("mse", dict(x=x, target=y, signal=y), ValueError, "step: expected a target or a signal, got both"),
    ("mse", dict(x=x, signal=nan[:2]), ValueError, "signal: expected finite values, got nan at index 1"),
    ("cross_entropy", dict(x=x, target=2), ValueError, r"target: expected a class in 0..1, got 2"),
    ("cross_entropy", dict(x=x, target=-1), ValueError, r"target: expected a class in 0..1, got -1"),
    ("cross_entropy", dict(x=x, target=0.5), TypeError, r"target: expected a class, an integer in 0..1, got 0.5"),
]


@pytest.mark.parametrize("loss, arguments, error, message", STEPS)
def test_step(loss, arguments, error, message):
    one = learner(loss=loss)
    for _ in range(3):
        one.step(x, y if loss == "mse" else 1)
    weights, state = copied(one.network.weights), copied(one._engine.arrays)
    with pytest.raises(error, match=message) as caught:
        one.step(**arguments)
    assert "\n" not in str(caught.value)
    assert same_bits(one.network.weights, weights) and same_bits(one._engine.arrays, state)
    one.step(x, y if loss == "mse" else 1)  # and it goes on


RAGGED = [[0], [0, 1]]


def broken():
    """A network with a weight that is not finite."""
    one = net()
    one.w_in[0, 1] = np.nan
    return one


CALLS = [
    (lambda: net(rng=None), TypeError, "rng: expected a numpy.random.Generator .*, got None"),
    (lambda: net(rng=7), TypeError, "rng: expected a numpy.random.Generator"),
    (lambda: mf.Network(0, 5, 2, rng=rng()), ValueError, "n_in: expected an integer >= 1, got 0"),
    (lambda: mf.Network(1, 5.5, 2, rng=rng()), TypeError, "n_rec: expected an integer, got 5.5"),
    (lambda: net(tau=-1), ValueError, r"tau: expected a finite number in \[0, inf\), got -1"),
    (lambda: net(tau=np.nan), ValueError, "tau: expected a finite number"),
    (lambda: net(dt=0), ValueError, r"dt: expected a finite number in \(0, inf\), got 0"),
    (lambda: net(activation="swish"), ValueError, "activation: expected one of 'relu', .*, got 'swish'"),
    (lambda: net(dtype="float16"), ValueError, "dtype: expected one of 'float32', 'float64', got 'float16'"),
    (lambda: net(types={"E": 0.5, "I": 0.2}), ValueError, "types: expected fractions that sum to 1, got 0.7"),
    (lambda: net(types={"E": 4, "I": 2}), ValueError, "types: expected counts that sum to n_rec = 5, got 6"),
    (lambda: net(types=[0, 0, 2, 2, 2]), ValueError, r"types: expected the numbers 0..2, each at least once, got \[0 2\]"),
    (lambda: net(types=[0, 1]), ValueError, r"types: expected a mapping or an int array of shape \(5,\)"),
    (lambda: net(types={"E": 0.8, "I": 0.2}, dale={"E": 1}), ValueError, "dale: expected a sign for each of E, I, got E"),
    (lambda: net(dale=[1, 1, 1, 1, 2]), ValueError, r"dale: expected signs \+1, -1 or 0"),
    (lambda: net(mask=np.ones((5, 5))), ValueError, r"mask: expected a bool array of shape \(5, 5\), got float64"),
    (lambda: net(types=RAGGED), ValueError, "types: expected an array, got a ragged sequence"),
    (lambda: net(mask=RAGGED), ValueError, "mask: expected an array, got a ragged sequence"),
    (lambda: mf.ModProp(RAGGED), ValueError, "mu: expected an array, got a ragged sequence"),
    (lambda: mf.ModProp(taps=RAGGED), ValueError, "taps: expected an array, got a ragged sequence"),
    (lambda: broken().save(io.BytesIO()), ValueError, r"w_in: expected finite values in float32, got nan at index \(0, 1\)"),
    (lambda: net(init="signed"), ValueError, "init: 'signed' expects Dale's law"),
    (lambda: mf.ModProp(1.5), ValueError, r"mu: expected a finite number in \[0, 1\], got 1.5"),
    (lambda: mf.ModProp(np.nan), ValueError, "mu: expected a finite number"),
    (lambda: mf.ModProp([0.5, 2]), ValueError, r"mu: expected values in \[0, 1\]"),
    (lambda: mf.ModProp("big"), ValueError, r"mu: expected a number in \[0, 1\], several, 'auto' or 'instant', got 'big'"),
    (lambda: mf.ModProp("auto", "cells"), ValueError, "mu: expected numbers without modulation='types', got 'auto'"),
    (lambda: mf.ModProp("instant", factor="mean"), ValueError, "mu: 'instant' is defined for factor='exact'"),
    (lambda: mf.ModProp(exact_steps=0), ValueError, "exact_steps: expected an integer >= 1, got 0"),
    (lambda: mf.ModProp(exact_steps=4, factor="mean"), ValueError, "exact_steps: defined for factor='exact'"),
    (lambda: learner(mf.ModProp(exact_steps=99)).step(XS[0, 0]), ValueError, "step: ModProp with more than 32 exact_steps goes"),
    (lambda: learner(mf.ModProp(exact_steps=4), update="step"), ValueError, "update: expected 'apply' with exact_steps"),
    (lambda: mf.ModProp(taps=33), ValueError, "taps: expected 1 to 32, got 33"),
    (lambda: mf.ModProp(taps=3, factor="mean"), ValueError, "taps: defined for factor='exact' with types or low rank"),
    (lambda: learner(mf.ModProp(taps=np.ones((2, 3, 3)))), ValueError, r"taps: expected \(S, 1, 1\) numbers, got shape \(2, 3, 3\)"),
    (lambda: mf.TBPTT(0), ValueError, "horizon: expected an integer >= 1, got 0"),
    (lambda: learner(mf.ModProp(modulation=mf.LowRank(9))), ValueError, "modulation: expected a rank of at most n_rec = 5, got 9"),
    (lambda: reference.low_rank(np.full((9, 9), np.inf), 2), FloatingPointError, "low_rank: expected finite weights, got w_rec with NaN or Inf"),
    (lambda: mf.parse_rule("backprop"), ValueError, "rule: expected one of 'bptt', 'tbptt', 'eprop'"),
    (lambda: mf.RTRL(limit=np.nan), ValueError, r"limit: expected a finite number in \(0, inf\), got nan"),
    (lambda: mf.parse_rule("rtrl(limit=abc)"), ValueError, "rule: limit: expected a number, got 'abc'"),
    (lambda: mf.ModProp("auto", modulation=np.ones((2, 3))), ValueError, "modulation U: expected shape"),
    (lambda: mf.Network(1, 4, 5, types={"E": 3, "I": 1}, dale={"E": 1, "I": -1}, init="signed", rng=np.random.default_rng(0)), ValueError, "init: 'signed' expects at most as many outputs as units, n_rec = 4, got 5"),
    (lambda: mf.Learner.from_arrays(None, np.ones((3, 1)), np.ones((2, 3))), ValueError, r"w_rec: expected 2 dimensions and at least one number, got shape \(\)"),
    (lambda: mf.Learner.from_arrays(np.zeros((0, 0)), np.ones((3, 1)), np.ones((2, 3))), ValueError, r"w_rec: expected 2 dimensions and at least one number, got shape \(0, 0\)"),
    (lambda: learner(update=""), ValueError, "update: expected one of 'step', 'apply', got ''"),
    (lambda: mf.parse_rule("tbptt(steps=3)"), ValueError, r"rule: expected options of tbptt \(feedback, horizon\).* got 'steps=3'"),
    (lambda: mf.parse_rule("bptt()("), ValueError, r"rule: expected a name or name\(option=value, ..\)"),
    (lambda: learner(mf.ModProp([0.5, 0.5])), ValueError, "mu: expected a number or 1 of them, one per type, got 2"),
    (lambda: mf.ModProp(0.5, modulation="units"), ValueError, "modulation: expected one of 'types', 'cells', got 'units'"),
    (lambda: mf.ModProp(0.5, modulation=3), TypeError, r"modulation: expected 'types', 'cells', LowRank\(r\) or a pair \(U, V\), got 3"),
    (
        lambda: learner(mf.ModProp(0.5, modulation=(np.ones((4, 2)), np.ones((2, 4))))),
        ValueError,
        r"modulation: expected U of shape \(5, r\) and V of shape \(r, 5\), got \(4, 2\) and \(2, 4\)",
    ),
    (lambda: mf.ModProp(0.5, factor="median"), ValueError, "factor: expected one of 'exact', 'mean', 'running', got 'median'"),
    (lambda: mf.ModProp(0.5, refresh=0), ValueError, "refresh: expected an integer >= 1, got 0"),
    (lambda: mf.ModProp(0.5, refresh="daily"), ValueError, "refresh: expected one of 'update', 'never', got 'daily'"),
    (lambda: mf.ModProp(0.5, self_modulation=False), ValueError, "self_modulation: False is defined for factor='mean'"),
    (lambda: mf.EProp(feedback="none"), ValueError, "feedback: expected one of 'symmetric', 'random', got 'none'"),
    (lambda: learner(mf.EProp(feedback=np.ones((2, 5)))), ValueError, r"feedback: expected shape \(5, 2\), got \(2, 5\)"),
    (lambda: learner(mf.EProp(feedback="random")), TypeError, "rng: expected a numpy.random.Generator"),
    (lambda: learner("modprop"), TypeError, "rule: expected a rule such as .*, got 'modprop'"),
    (lambda: learner(loss="hinge"), ValueError, "loss: expected one of 'mse', 'cross_entropy', got 'hinge'"),
    (lambda: learner(optimizer=0.1), TypeError, "optimizer: expected SGD"),
    (lambda: learner(optimizer=mf.Adam(), update="step"), ValueError, r"optimizer: expected plain SGD\(lr\) with update='step', got Adam"),
    (lambda: learner(threads=0), ValueError, "threads: expected an integer >= 1, got 0"),
    (lambda: mf.SGD(0), ValueError, r"lr: expected a finite number in \(0, inf\), got 0"),
    (lambda: mf.SGD(np.inf), ValueError, "lr: expected a finite number"),
    (lambda: mf.Adam(betas=(0.9, 1.0)), ValueError, r"betas: expected numbers in \[0, 1\)"),
    (lambda: mf.StepDecay(0.5, 0), ValueError, "every: expected an integer >= 1, got 0"),
    (lambda: learner(mf.BPTT()).step(x), ValueError, "step: BPTT needs the whole trial; use gradient"),
    (lambda: learner(mf.BPTT()).gradient(XS, YS), ValueError, "gradient: BPTT needs the whole trial"),
    (lambda: learner(mf.ModProp(0.5, modulation="cells")).run(XS[0]), ValueError, "run: ModProp with modulation='cells' streams with factor='mean' only"),
    (lambda: learner().apply(), RuntimeError, "apply: expected update='apply'"),
    (lambda: learner().gradient(XS[0], YS), ValueError, r"inputs: expected shape \(\*, \*, 3\), got \(4, 3\)"),
    (lambda: learner().gradient(XS.astype(complex), YS), TypeError, "inputs: expected an array of float32, got complex128"),
    (lambda: learner().gradient(XS + np.nan, YS), ValueError, r"inputs: expected finite values in float32, got nan at index \(0, 0, 0\)"),
    (lambda: learner().gradient(XS + 1e300, YS), ValueError, "inputs: expected finite values in float32, got 1e"),
    (lambda: learner().gradient(XS[:0], YS[:0]), ValueError, r"inputs: expected shape \(\*, \*, 3\), got \(0, 4, 3\)"),
    (lambda: learner().gradient(XS, YS[:1]), ValueError, r"targets: expected shape \(2, 4, 2\), got \(1, 4, 2\)"),
    (lambda: learner().gradient(XS, YS, mode="sideways"), ValueError, "mode: expected one of 'online', 'offline', got 'sideways'"),
    (lambda: learner().gradient(XS, YS, np.ones(4)), TypeError, "mask: expected an array of bool, got float64"),
    (lambda: learner().gradient(XS, YS, np.ones(3, bool)), ValueError, r"mask: expected shape \(4,\) or \(2, 4\), got \(3,\)"),
    (lambda: learner().gradient(XS, YS, np.zeros(4, bool)), ValueError, "mask: expected at least one step in every trial, got none in trial 0"),
    (lambda: learner(loss="cross_entropy").gradient(XS, [0, 2]), ValueError, "targets: expected classes in 0..1, got 2"),
    (lambda: learner(loss="cross_entropy").gradient(XS, [0.0, 1.0]), TypeError, "targets: expected integer classes, got float64"),
    (lambda: learner(loss="cross_entropy").gradient(XS, [0]), ValueError, r"targets: expected classes of shape \(2,\) or \(2, 4\), got \(1,\)"),
    (lambda: learner().run(XS[0], mask=np.ones(4, bool)), ValueError, "mask: expected targets with it, got none"),
    (lambda: learner().run(XS[0], YS[0], np.ones(3, bool)), ValueError, r"mask: expected shape \(4,\), got \(3,\)"),
    (lambda: learner().run(XS[0], YS[0], np.ones((1, 4), bool)), ValueError, r"mask: expected shape \(4,\), got \(1, 4\)"),
]


@pytest.mark.parametrize("call, error, message", CALLS, ids=lambda value: value if isinstance(value, str) else "")
def test_call(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_an_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("MODPROP_FAST_ISA", "v9")
    with pytest.raises(ValueError, match="MODPROP_FAST_ISA: expected one of baseline.* on this machine, got 'v9'"):
        core.isa()


def test_read_only_weights():
    one = net()
    one.w_in.flags.writeable = False
    with pytest.raises(ValueError, match="network: expected weights that can be written, got a read-only w_in"):
        mf.Learner(one)


def out_of_range(state):
    """The state of a generator with a number that it cannot hold."""
    rng = json.loads(str(state["rng"]))
    rng["state"]["state"] = 1 << 200
    return state | {"rng": np.array(json.dumps(rng)), "iteration": np.array(7)}


REFUSED = {  # the learner, what is done to it, the call, and what comes of it
    "read-only weights": (
        lambda: learner(optimizer=mf.Adam()),
        lambda one: one.network.b_out.setflags(write=False),
        lambda one: one.fit_trials(XS, YS),
        (ValueError, "b_out: expected weights that can be written, got a read-only array"),
    ),
    "a generator's state out of range": (
        lambda: learner(mf.UORO(), update="apply", rng=rng()),
        lambda one: None,
        lambda one: one.restore(out_of_range(one.state())),
        (ValueError, "state: rng: expected the state of a PCG64, got"),
    ),
    "an infinite weight": (
        lambda: learner(mf.ModProp("auto"), update="apply"),
        lambda one: one.network.w_rec.__setitem__((0, 1), np.inf),
        lambda one: one.reset(),
        (FloatingPointError, "auto_mu: expected finite weights, got means of W with NaN or Inf"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_is_refused_leaves_the_weights_and_the_state(name):
    make, spoil, call, (error, message) = REFUSED[name]
    one = make()
    one.fit_trials(XS + 1, YS + 1)
    one.run(XS[0] + 1, YS[0])
    spoil(one)
    weights, state = copied(one.network.weights), one.state()
    with pytest.raises(error, match=message) as caught:
        call(one)
    assert "\n" not in str(caught.value)
    assert same_bits(one.network.weights, weights) and same_bits(one.state(), state)


def test_inputs_are_never_modified():
    one = learner(update="apply")
    xs, ys, mask = XS + 1.0, YS + 2.0, np.ones(4, bool)
    one.run(xs[0], ys[0], mask)
    one.fit_trials(xs, ys, mask)
    assert (xs == 1).all() and (ys == 2).all() and mask.all()
    xs.flags.writeable = ys.flags.writeable = False
    one.fit_trials(xs, ys)


def test_a_network_that_diverges_leaves_the_weights():
    one = learner(optimizer=mf.SGD(1.0))
    one.network.b_out[...] = 3e38
    one.network.w_out[...] = 3e38
    one.network.w_in[...] = 3e38
    before = copied(one.network.weights)
    with pytest.raises(FloatingPointError, match="step: expected a finite readout"):
        one.step(x, y)
    with pytest.raises(FloatingPointError, match="run: expected a finite readout, got .* at step 0"):
        one.run(np.ones((3, 3)), np.ones((3, 2)))
    assert same_bits(one.network.weights, before)


def test_a_gradient_that_overflows_leaves_the_weights_and_the_optimizer():
    one = learner(optimizer=mf.Adam(), update="apply")
    for _ in range(3):
        one.step(x, signal=np.full(2, 3e38, "float32"))
    before, state = copied(one.network.weights), one.state()
    with pytest.raises(FloatingPointError, match="gradient: expected a finite norm, got (inf|nan) at update 0"):
        one.apply()
    assert same_bits(one.network.weights, before) and same_bits(one.state(), state)
