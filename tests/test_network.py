"""Networks: types, signs, masks, initial weights, files."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from problems import problems

import modprop_fast as mf
from modprop_fast import core

LONG = np.longdouble
ACTIVATIONS = {  # with their derivatives
    "tanh": (np.tanh, lambda v: np.cosh(v) ** -2),
    "sigmoid": (lambda v: 1 / (1 + np.exp(-v)), lambda v: 1 / (2 + np.exp(v) + np.exp(-v))),
    "softplus": (lambda v: np.log1p(np.exp(-abs(v))) + np.maximum(v, 0), lambda v: 1 / (1 + np.exp(-v))),
}
E_I = {"types": {"E": 97, "I": 23}, "dale": {"E": 1, "I": -1}}


def test_types_by_fraction_count_and_array():
    rng = np.random.default_rng(0)
    by_fraction = mf.Network(1, 10, 1, types={"a": 0.25, "b": 0.25, "c": 0.5}, rng=rng)
    assert np.bincount(by_fraction.types).tolist() == [2, 3, 5] and by_fraction.type_names == ("a", "b", "c")
    assert mf.Network(1, 120, 1, **E_I, rng=rng).types.sum() == 23
    assert mf.Network(1, 4, 1, types=[1, 0, 1, 0], rng=rng).types.tolist() == [1, 0, 1, 0]
    assert mf.Network(1, 3, 1, rng=rng).n_types == 1


def test_weights_are_the_same_for_the_same_generator_and_of_the_documented_size():
    net = mf.Network(4, 400, 3, gain=1.5, rng=np.random.default_rng(0))
    again = mf.Network(4, 400, 3, gain=1.5, rng=np.random.default_rng(0))
    assert all(np.array_equal(w, again.weights[name]) for name, w in net.weights.items())
    assert net.w_rec.std() == pytest.approx(1.5 / 20, rel=0.02)
    assert net.w_in.std() == pytest.approx(0.5, rel=0.05) and net.w_out.std() == pytest.approx(1 / 20, rel=0.05)
    assert not net.b_out.any() and not np.diag(net.w_rec).any()
    assert all(w.flags.c_contiguous and w.ctypes.data % 64 == 0 for w in net.weights.values())


def test_the_signed_recipe_is_balanced_and_has_spectral_radius_one():
    net = mf.Network(2, 120, 2, **E_I, init="signed", autapses=True, dtype="float64", rng=np.random.default_rng(1))
    w, sign = net.w_rec, net.sign
    assert (w * sign >= 0).all() and (net.w_out * sign >= 0).all()
    assert np.abs(np.linalg.eigvals(w)).max() == pytest.approx(1, rel=1e-9)
    assert np.abs(w.sum(axis=1)).max() < 1e-12 * np.abs(w).sum(axis=1).min()  # what a unit receives sums to zero
    assert np.abs(net.w_out.sum(axis=1)).max() < 1e-12
    assert net.w_in.std() == pytest.approx(1, rel=0.1)
    masked = mf.Network(2, 120, 2, **E_I, init="signed", dtype="float64", rng=np.random.default_rng(1))
    assert np.array_equal(masked.w_rec, w * ~np.eye(120, dtype=bool))  # the diagonal goes last


ARRAYS = {  # that a caller hands over, and what is made of them
    "types": (np.array([0, 1, 1, 0]), lambda given: mf.Network(1, 4, 1, types=given, init="zeros")),
    "mask": (np.eye(4, dtype=bool), lambda given: mf.Network(1, 4, 1, mask=given, init="zeros")),
    "feedback": (np.ones((4, 1)), lambda given: mf.EProp(feedback=given)),
    "mu": (np.ones(2), lambda given: mf.ModProp(given)),
    "taps": (np.ones((3, 2, 2)), lambda given: mf.ModProp(taps=given)),
    "U": (np.ones((4, 2)), lambda given: mf.ModProp(modulation=(given, np.ones((2, 4))))),
    "V": (np.ones((2, 4)), lambda given: mf.ModProp(modulation=(np.ones((4, 2)), given))),
} | {
    f"dale in {dtype}": (np.ones(4, dtype), lambda given: mf.Network(1, 4, 1, dale=given, dtype=given.dtype, init="zeros"))
    for dtype in ("float32", "float64")
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_written_into_an_array_after_it_was_handed_over_changes_nothing(name):
    array, make = ARRAYS[name]
    given = array.copy()
    made = make(given)
    before = pickle.dumps(made)
    given[...] = 1 - given.astype(int)
    assert pickle.dumps(made) == before != pickle.dumps(make(given))


@settings(max_examples=25)
@given(problems("float32"))
def test_save_and_load(problem):
    import io

    file = io.BytesIO()
    problem.net.save(file)
    file.seek(0)
    again = mf.Network.load(file)
    assert vars(again).keys() == vars(problem.net).keys()
    for name, value in vars(problem.net).items():
        if name not in ("_weights", "_stamp"):
            assert np.array_equal(getattr(again, name), value), name
    for name, w in problem.net.weights.items():
        assert np.array_equal(again.weights[name], w) and again.weights[name].dtype == w.dtype


def test_saving_leaves_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "net.npz"
    mf.Network(1, 3, 1, rng=np.random.default_rng(0)).save(path)
    kept = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        mf.Network(1, 4, 1, rng=np.random.default_rng(0)).save(path)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]


def test_loading_something_else_says_so(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, a=1)
    with pytest.raises(ValueError, match="file: expected a network written by Network.save, got"):
        mf.Network.load(path)
    mf.Network(1, 3, 1, rng=np.random.default_rng(0)).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"settings": np.array(json.dumps(json.loads(str(arrays["settings"])) | {"format": 2}))})
    with pytest.raises(ValueError, match="file: expected a network of format 1, got format 2 in "):
        mf.Network.load(path)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match="file: expected a network written by Network.save, got"):
        mf.Network.load(path)


def test_assigning_a_weight_copies_into_the_engines_array():
    net = mf.Network(1, 3, 1, rng=np.random.default_rng(0))
    own = net.w_rec
    net.w_rec = np.eye(3)
    assert net.w_rec is own and own[1, 1] == 1
    with pytest.raises(ValueError, match=r"w_rec: expected shape \(3, 3\), got \(2, 3\)"):
        net.w_rec = np.ones((2, 3))
    with pytest.raises(AttributeError, match="b_rec: this network was made with bias=False"):
        net.b_rec  # noqa: B018


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "largest"), [("float32", 95), ("float64", 740)])
def test_activations_have_their_digits_however_small_and_the_same_on_every_instruction_set(name, dtype, largest, monkeypatch):
    """To 5 units in the last place, derivatives too, unless they are as good as subnormal."""
    n, rng = 700, np.random.default_rng(0)
    tiny = 10 ** rng.uniform(-30, 0, n) * rng.choice([-1, 1], n)
    v = np.concatenate([rng.uniform(-largest, largest, n), tiny, [0, -0.0, largest, -largest]]).astype(dtype)
    found = {}
    for isa in core.available_isas():
        monkeypatch.setenv("MODPROP_FAST_ISA", isa)
        net = mf.Network(1, len(v), 1, activation=name, tau=0, dtype=dtype, mask=np.zeros((len(v),) * 2, bool), init="zeros")
        net.w_in[:, 0] = v
        learner = mf.Learner(net, mf.EProp())
        learner.step(np.ones(1, dtype), learn=False)
        found[isa] = [learner._engine.arrays["pre"][: len(v)].copy(), learner._engine.arrays["h"].copy()]
    smallest = 8 * np.finfo(dtype).tiny
    with np.errstate(over="ignore", under="ignore"):
        expected = [function(v.astype(LONG)) for function in ACTIVATIONS[name]]
    for z_or_h, right in zip(found[isa], expected):
        last_place = np.spacing(np.maximum(np.abs(right), smallest).astype(dtype)).astype(LONG)
        assert (np.abs(z_or_h - right) <= np.where(np.abs(right) < smallest, smallest, 5 * last_place)).all()
    assert all(np.array_equal(a, b) for other in found.values() for a, b in zip(other, found[isa]))


@pytest.mark.parametrize("types", [[0, 1, 1], {0: 1, 1: 2}])
def test_types_that_are_numbers_have_signs_by_number(types):
    net = mf.Network(1, 3, 1, types=types, dale={0: 1, 1: -1}, init="zeros")
    assert net.type_names == ("0", "1") and net.sign.tolist() == [1, -1, -1]
