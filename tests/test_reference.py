"""The specification against the outside world: the authors' gradients, finite differences, and itself."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import SMOOTH, assert_close, assert_slopes, copied, moves, problems

import modprop_fast as mf
from modprop_fast import reference

FIXTURES = sorted((Path(__file__).parent / "data").glob("*.npz"))
NAMES = {"w_rec": "dW_rec", "w_in": "dW_in", "w_out": "dW_out", "b_out": "db_out"}


def load(path):
    data = dict(np.load(path))
    types = np.zeros(len(data["W_rec"]), int)
    for i, (start, stop) in enumerate(data["type_ranges"]):
        types[start:stop] = i
    loss = {"ce": "cross_entropy", "mse": "mse"}[str(data["loss_kind"])]
    return data, types, loss


def theirs(data, rule):
    return {ours: data[f"{rule}/{name}"] for ours, name in NAMES.items()}


def test_there_are_three_fixtures():
    assert len(FIXTURES) == 3


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_reference_matches_the_authors(path, mode):
    data, types, loss = load(path)
    w = data["W_rec"]
    raw, zeroed = reference.type_means(w, types), reference.type_means(w, types, self_modulation=False)
    rules = {
        "bptt": {"rule": "bptt"},
        "eprop": {"rule": "eprop"},
        "mdgl_cell": {"rule": "mdgl", "wb": w},
        "mdgl_type": {"rule": "mdgl", "wb": raw},
        "mdgl_type_zd": {"rule": "mdgl", "wb": zeroed},
        "modprop_cell": {"rule": "modprop", "wb": w, "factor": "mean"},
        "modprop_type": {"rule": "modprop", "wb": zeroed, "factor": "mean"},
        "modprop_type_raw": {"rule": "modprop", "wb": raw, "factor": "mean"},
    }
    weights = {"w_rec": w, "w_in": data["W_in"], "w_out": data["W_out"], "b_out": data["b_out"]}
    for name, how in rules.items():
        value, grads = reference.gradient(
            weights, data["inputs"], data["targets"], leak=np.exp(-data["dt"] / data["tau"]), activation="relu",
            loss=loss, mode=mode, mu=float(data["mu"]), **how,
        )  # fmt: skip
        assert value == pytest.approx(float(data["loss"]), rel=1e-13)
        np.fill_diagonal(grads["w_rec"], 0)
        expected = theirs(data, name)
        assert moves(grads)
        assert_close(grads, expected, 1e-13)


@pytest.mark.filterwarnings("ignore:rho")
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-4)])
@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_engine_matches_the_authors(path, dtype, tolerance):
    data, types, loss = load(path)
    net = mf.Network(
        data["W_in"].shape[1], len(types), len(data["b_out"]), types=types, tau=float(data["tau"]), dtype=dtype, init="zeros"
    )
    net.w_rec, net.w_in, net.w_out, net.b_out = data["W_rec"], data["W_in"], data["W_out"], data["b_out"]
    mu = float(data["mu"])
    both, offline = ("online", "offline"), ("offline",)
    rules = {
        "eprop": (mf.EProp(), both),
        "modprop_type": (mf.ModProp(mu, factor="mean", self_modulation=False), both),
        "modprop_type_raw": (mf.ModProp(mu, factor="mean"), both),
        "modprop_cell": (mf.ModProp(mu, modulation="cells", factor="mean"), offline),
        "bptt": (mf.BPTT(), offline),
    }
    for name, (rule, modes) in rules.items():
        learner = mf.Learner(net, rule, loss=loss)
        for mode in modes:
            assert_close(learner.gradient(data["inputs"], data["targets"], mode=mode), theirs(data, name), tolerance)


@settings(max_examples=25)
@given(problems(max_rec=6), st.sampled_from(["types", "cells", "low rank"]), st.sampled_from(["exact", "mean"]))
def test_every_rule_is_the_same_forwards_and_backwards(problem, modulation, factor):
    assume(problem.net.n_rec <= 19)
    w, rng = problem.net.w_rec, problem.rng
    wb = {
        "types": reference.type_means(w, problem.net.types, self_modulation=False),
        "cells": w,
        "low rank": rng.normal(size=(len(w), 2)) @ rng.normal(size=(2, len(w))),
    }[modulation]
    for how in ({"rule": "bptt"}, {"rule": "eprop"}, {"rule": "mdgl", "wb": wb}, {"rule": "modprop", "wb": wb, "factor": factor}):
        backwards = problem.reference(mode="offline", **how)
        assume(moves(backwards))
        assert_close(problem.reference(mode="online", **how), backwards, 1e-10)


@settings(max_examples=25)
@given(problems(activations=SMOOTH, max_rec=5, autapses=True, constrained=False))
def test_bptt_is_the_slope_of_the_loss(problem):
    assume(problem.net.n_rec <= 16)
    net, weights = problem.net, copied(problem.net.weights)

    def loss():
        y = reference.forward(weights, problem.inputs, leak=net.leak, activation=net.activation).y
        return reference.loss_and_error(problem.loss, y, problem.targets, problem.mask)[0]

    assert_slopes(loss, weights, problem.reference("bptt"), problem.rng, 5)
