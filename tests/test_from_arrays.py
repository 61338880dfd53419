"""Learners of arrays from elsewhere."""

import array

import numpy as np
import pytest

import modprop_fast as mf


class Exports:
    """A foreign array that speaks DLPack and nothing else."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **_):
        return self.values.__dlpack__()

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class Refuses(Exports):
    def __dlpack__(self, **_):
        raise BufferError("it requires gradient")

    def __array__(self, *_, **__):
        raise RuntimeError("detach it first")


RNG = np.random.default_rng(0)
W_REC = RNG.normal(size=(6, 6)).astype("float32") * (1 - np.eye(6, dtype="float32"))
W_IN, W_OUT = RNG.normal(size=(6, 2)).astype("float32"), RNG.normal(size=(3, 6)).astype("float32")
B_OUT, B_REC = RNG.normal(size=3).astype("float32"), RNG.normal(size=6).astype("float32")


def outputs(learner):
    xs, targets = (np.random.default_rng(1).normal(size=(30, n)) for n in (2, 3))
    return learner.run(xs, targets)


def test_learners_of_foreign_arrays_are_those_of_numpy():
    net = mf.Network(2, 6, 3, activation="tanh", bias=True, init="zeros")
    net.w_rec, net.w_in, net.w_out, net.b_out, net.b_rec = W_REC, W_IN, W_OUT, B_OUT, B_REC
    expected = outputs(mf.Learner(net, mf.EProp(), optimizer=mf.SGD(0.1)))
    makers = {
        "numpy": lambda a: a, "DLPack": Exports, "buffer": memoryview, "lists": lambda a: a.tolist(),
        "array": lambda a: array.array("f", a) if a.ndim == 1 else np.asfortranarray(a),
    }  # fmt: skip
    for kind, make in makers.items():
        given = [make(a) for a in (W_REC, W_IN, W_OUT, B_OUT, B_REC)]
        settings = {"activation": "tanh"} | ({"dtype": "float32"} if kind == "lists" else {})
        learner = mf.Learner.from_arrays(*given, rule=mf.EProp(), optimizer=mf.SGD(0.1), **settings)
        assert learner.network.dtype == "float32" and not learner.network.autapses
        assert np.array_equal(outputs(learner), expected), kind
    assert not np.shares_memory(mf.Learner.from_arrays(W_REC, W_IN, W_OUT).network.w_rec, W_REC)
    learner.run(Exports(np.ones((4, 2))), Exports(np.ones((4, 3))), Exports(np.ones(4, bool)))  # the other cold calls too


def test_the_dtype_and_the_diagonal_are_taken_from_the_arrays():
    learner = mf.Learner.from_arrays(W_REC.astype(float) + np.eye(6), W_IN, W_OUT)
    assert learner.network.dtype == "float64" and learner.network.autapses and learner.network.w_rec[2, 2] == 1
    assert not learner.network.b_out.any() and "b_rec" not in learner.network.weights


@pytest.mark.parametrize("change, sentence", [
    ({"w_rec": W_REC[:5]}, r"w_rec: expected shape \(5, 5\), got \(5, 6\)"),
    ({"w_in": W_IN[0]}, r"w_in: expected 2 dimensions and at least one number, got shape \(2,\)"),
    ({"w_out": W_OUT[:, :4]}, r"w_out: expected shape \(3, 6\), got \(3, 4\)"),
    ({"b_out": np.full(3, np.nan)}, "b_out: expected finite values"),
    ({"w_rec": Refuses(W_REC)}, r"w_rec: expected an array that NumPy can read, got Refuses \(detach it first\)"),
    ({"w_rec": [[0, 1], [2]]}, "w_rec: expected an array, got a ragged sequence"),
    ({"w_in": W_IN.astype(complex)}, "w_in: expected an array of float32, got complex64|w_in: expected .* got complex128"),
    ({"dale": np.ones(6)}, "w_rec: expected no weights where mask, dale or autapses allow none"),
    ({"w_rec": W_REC + np.eye(6), "autapses": False}, "w_rec: expected no weights where"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change, sentence):
    given = {"w_rec": W_REC, "w_in": W_IN, "w_out": W_OUT} | change
    with pytest.raises((TypeError, ValueError), match=sentence):
        mf.Learner.from_arrays(**given)
