"""Random problems for the property tests: sizes, types, masks and signs that nobody chose by hand."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

import modprop_fast as mf
from modprop_fast import core, reference

SMOOTH = ("softplus", "tanh", "sigmoid", "identity")
ALL = ("relu", *SMOOTH)
FUSED = [isa for isa in core.available_isas() if isa != "baseline"]  # those that round a product and its sum once
RULES = {  # that stream, and follow W at their updates
    "e-prop": mf.EProp(),
    "exact": mf.ModProp(0.25),
    "mean": mf.ModProp(0.25, factor="mean"),
    "no self": mf.ModProp(0.25, factor="mean", self_modulation=False),
    "every third": mf.ModProp(0.25, refresh=3),
    "never": mf.ModProp(0.25, refresh="never", factor="mean"),
    "mdgl": mf.MDGL(),
    "taps": mf.ModProp(0.25, taps=3),
    "instant": mf.ModProp("instant", refresh=2),
}


@dataclass
class Problem:
    """A network with trials and targets, and its seed for whatever else a test draws."""

    net: mf.Network
    loss: str
    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray | None
    mu: float
    rng: np.random.Generator

    def learner(self, rule, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # rho(K) >= 1 is wanted here too
            return mf.Learner(self.net, rule, loss=self.loss, **kwargs)

    def reference(self, rule, **kwargs):
        """Gradients by name as the specification sees them, inside the network's connections."""
        net = self.net
        _, grads = reference.gradient(
            net.weights, self.inputs, self.targets, leak=net.leak, activation=net.activation, loss=self.loss,
            mask=self.mask, rule=rule, mu=kwargs.pop("mu", self.mu), **kwargs,
        )  # fmt: skip
        grads["w_rec"] = grads["w_rec"] * net.connections
        return grads

    def membrane(self):
        return reference.forward(self.net.weights, self.inputs, leak=self.net.leak, activation=self.net.activation).v


@st.composite
def problems(draw, dtype="float64", activations=ALL, constrained=True, min_rec=1, max_rec=12, more_rec=(16, 19, 33, 37),
             max_steps=8, gain=None, **fixed):  # fmt: skip
    """Networks of 1 to 37 units, with the tails and odd sizes that vector code gets wrong."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    n_rec = draw(st.one_of(st.integers(min_rec, max_rec), st.sampled_from(more_rec)), label="n_rec")
    n_in = draw(st.sampled_from([1, 2, 3, 9, 17, 33]), label="n_in")
    loss = draw(st.sampled_from(["mse", "cross_entropy"]), label="loss")
    n_out = draw(st.sampled_from([1, 2, 3, 8, 17][loss != "mse" :]), label="n_out")
    n_types = draw(st.integers(1, min(n_rec, 6)), label="n_types")
    types = rng.permutation(np.concatenate([np.arange(n_types), rng.integers(0, n_types, n_rec - n_types)]))
    dale = rng.choice([-1, 0, 1], n_rec) if constrained and draw(st.booleans(), label="dale") else None
    mask = rng.random((n_rec, n_rec)) < 0.6 if constrained and draw(st.booleans(), label="mask") else None
    settings = {
        "types": types,
        "activation": draw(st.sampled_from(activations), label="activation"),
        "tau": draw(st.sampled_from([0.0, 1.5, 10.0]), label="tau"),
        "dale": dale,
        "mask": mask,
        "autapses": draw(st.booleans(), label="autapses"),
        "bias": draw(st.booleans(), label="bias"),
        "dtype": dtype,
    } | fixed
    net = mf.Network(n_in, n_rec, n_out, gain=gain or draw(st.sampled_from([0.5, 1.5])), rng=rng, **settings)
    net.b_out = rng.normal(size=n_out)
    if settings["bias"]:
        net.b_rec = rng.normal(size=n_rec)
    n_trials, n_steps = draw(st.sampled_from([1, 2, 3, 4, 6]), label="B"), draw(st.integers(1, max_steps), label="T")
    inputs = rng.normal(size=(n_trials, n_steps, n_in)).astype(dtype)
    if loss == "mse":
        targets = rng.normal(size=(n_trials, n_steps, n_out)).astype(dtype)
    else:
        shape = draw(st.sampled_from([(n_trials,), (n_trials, n_steps)]), label="targets")
        targets = rng.integers(0, n_out, shape)
    mask = None
    if draw(st.booleans(), label="mask of steps"):
        mask = rng.random((n_trials, n_steps)) < 0.5
        mask[:, rng.integers(n_steps)] = True
    return Problem(net, loss, inputs, targets, mask, draw(st.sampled_from([0.0, 0.25, 1.0]), label="mu"), rng)


def twin(problem, rule, **kwargs):
    """A learner on a copy of the problem's network."""
    return mf.Learner(copy.deepcopy(problem.net), rule, loss=problem.loss, rng=np.random.default_rng(0), **kwargs)


def stream(problem):
    """One trial as `step` wants it: xs, a target or None for each step, the same for `run`."""
    xs, mask = problem.inputs[0], problem.rng.random(len(problem.inputs[0])) < 0.7
    if problem.loss == "mse":
        targets = problem.targets[0]
    else:
        targets = problem.rng.integers(0, problem.net.n_out, len(xs))
    return xs, [t if m else None for t, m in zip(targets, mask)], targets, mask


def copied(arrays):
    return {name: array.copy() for name, array in arrays.items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def assert_close(got, expected, tolerance):
    """Every array within ``tolerance`` of its largest entry.

    One that is zero throughout has no size of its own, and may be what is left when terms cancel (a type of one unit
    that does not modulate itself): it is measured by the largest of the others.  Nor can a single number that nearly
    cancels, such as the bias of one unit summed over steps and trials, be nearer than the rounding of the largest: so
    nothing may come in a wider dtype than what it is compared with, which would allow it less rounding than it had.
    """
    assert got.keys() == expected.keys()
    largest = max(1e-300, *(np.abs(each).max() for each in expected.values()))
    for name in expected:
        size = np.abs(expected[name]).max() or largest
        given = np.asarray(got[name])
        assert given.dtype.itemsize <= np.asarray(expected[name]).dtype.itemsize, f"{name}: {given.dtype}"
        rounding = np.finfo(given.dtype).eps * largest if given.dtype.kind == "f" else 0
        error = np.abs(given.astype(float) - expected[name]).max() - rounding  # a NaN stays one, and fails
        assert error <= tolerance * size, f"{name}: off by {error / size:.2g} of its largest entry {size:.2g}"


def assert_slopes(loss, weights, grads, rng, n):
    """``grads`` are the slopes of ``loss()``, at ``n`` places of every weight.

    Central differences with step 1e-5 err by step^2 and by rounding / step, each about 1e-10.
    """
    scale = max(np.abs(g).max() for g in grads.values())
    assume(scale > 1e-3)
    for name, w in weights.items():
        for at in rng.permutation(w.size)[:n]:
            kept = w.flat[at]
            w.flat[at] = kept + 1e-5
            up = loss()
            w.flat[at] = kept - 1e-5
            down = loss()
            w.flat[at] = kept
            assert (up - down) / 2e-5 == pytest.approx(grads[name].flat[at], rel=1e-5, abs=1e-7 * scale)


def moves(grads):
    """Whether a gradient is worth comparing: the recurrent layer has one."""
    return np.abs(grads["w_in"]).max() > 1e-9
