"""The network: sizes, cell types, signs, connections and weights.  How it learns is in `learner.py`."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping

import numpy as np

from . import checks
from .core import aligned
from .files import read_npz, write_npz

ACTIVATIONS = ("relu", "softplus", "tanh", "sigmoid", "identity")
INITS = ("gaussian", "signed", "zeros")
_FORMAT = 1


class _Weights(Mapping):
    """The arrays of a network by name, each up to date when it is asked for; whoever asks may write into it, which the stamp
    tells the engines."""

    def __init__(self, network):
        self._network = network

    def __getitem__(self, name):
        self._network.settle()
        self._network._stamp[0] += 1
        return self._network._weights[name]

    def __contains__(self, name):  # to ask whether there is one is not to ask for it
        return name in self._network._weights

    def __iter__(self):
        return iter(self._network._weights)

    def __len__(self):
        return len(self._network._weights)

    def __repr__(self):
        return repr(dict(self))


class Network:
    """Leaky rate neurons with cell types (Liu et al. 2022, eq. 1).

    ``v_t = k v_{t-1} + (1-k) (W z_{t-1} + W_in x_t + b)``, ``z_t = phi(v_t)``, ``y_t = W_out z_t + b_out``
    with ``k = exp(-dt / tau)``.

    Parameters
    ----------
    n_in, n_rec, n_out : int
        Inputs, recurrent units, outputs.
    types : None, mapping of name to fraction or count, or (n_rec,) int array
        Cell types.  A mapping lays the types out one after the other: floats are fractions of the
        units and sum to 1, ints are counts and sum to ``n_rec``.  Default: one type.
    activation : {"relu", "softplus", "tanh", "sigmoid", "identity"}
    tau, dt : float
        Membrane time constant and time step, in the same unit (ms); ``tau=0`` is no leak, k = 0.
    dale : None, mapping of type name to +1, -1 or 0, or (n_rec,) array of these
        Dale's law: the sign of all that a unit sends, in W and W_out; 0 is free.  Every update keeps it.
    mask : None or (n_rec, n_rec) bool array, [post, pre]
        Where a recurrent synapse may exist.  Every update keeps it; if it allows few of all, a learner that
        updates at every step passes over these alone.  A weight that you set elsewhere counts, and stays until the next
        update by `apply` or `fit_trials`, or `constrain`: learned steps do not change it.
    autapses : bool
        Whether a unit may send to itself.
    bias : bool
        Whether the recurrent units have a bias ``b_rec``; the readout always has ``b_out``.
    dtype : {"float32", "float64"}
    init : {"gaussian", "signed", "zeros"}
        ``gaussian``: W ~ N(0, gain^2 / n_rec), W_in ~ N(0, 1 / n_in), W_out ~ N(0, 1 / n_rec), given the signs of
        Dale's law.  ``signed``: the balanced recipe behind the published results, see `signed_weights`; W_out are
        rows of another such matrix, W_in ~ N(0, 2 / n_in).  Biases are zero.
    gain : float
    rng : numpy.random.Generator
        Source of the initial weights; not needed for ``init="zeros"``.

    Attributes
    ----------
    w_rec (n_rec, n_rec) [post, pre], w_in (n_rec, n_in), w_out (n_out, n_rec), b_out (n_out,), b_rec (n_rec,)
        C-contiguous arrays, the engine's own: what is written into them counts at the next step.
    weights : dict of the same by name
    types : (n_rec,) int array;  type_names : tuple of str
    leak : float, k

    Examples
    --------
    >>> net = Network(2, 100, 1, types={"E": 0.8, "I": 0.2}, dale={"E": 1, "I": -1}, rng=np.random.default_rng(0))
    >>> bool((net.w_rec[:, :80] >= 0).all() and (net.w_rec[:, 80:] <= 0).all())
    True
    """

    def __init__(self, n_in, n_rec, n_out, *, types=None, activation="relu", tau=10.0, dt=1.0, dale=None, mask=None,
                 autapses=False, bias=False, dtype="float32", init="gaussian", gain=1.0, rng=None):  # fmt: skip
        self.n_in = checks.integer("n_in", n_in, least=1)
        self.n_rec = checks.integer("n_rec", n_rec, least=1)
        self.n_out = checks.integer("n_out", n_out, least=1)
        self.activation = checks.choice("activation", activation, ACTIVATIONS)
        self.tau = checks.number("tau", tau, low=0)
        self.dt = checks.number("dt", dt, low=0, above=True)
        self.leak = math.exp(-self.dt / self.tau) if self.tau else 0.0
        self.autapses = bool(autapses)
        self.dtype = _real(dtype)
        self.types, self.type_names = _cell_types(types, self.n_rec)
        self.sign = _signs(dale, self.types, self.type_names, self.dtype)
        self.mask = _connections(mask, self.n_rec)
        checks.choice("init", init, INITS)
        gain = checks.number("gain", gain, low=0)
        shapes = {
            "w_rec": (self.n_rec, self.n_rec),
            "w_in": (self.n_rec, self.n_in),
            "w_out": (self.n_out, self.n_rec),
            "b_out": (self.n_out,),
        }
        if bias:
            shapes["b_rec"] = (self.n_rec,)
        self._stamp = np.zeros(1, np.int64)
        self._engines = []  # weak references
        self._weights = aligned(shapes, self.dtype)
        if init != "zeros":
            with np.errstate(over="ignore"):
                self._draw(init, gain, checks.generator("rng", rng))
        if not np.isfinite(self._weights["w_rec"]).all():
            raise ValueError(f"gain: expected one with which weights are finite in {self.dtype}, got {gain:g}")

    @property
    def weights(self) -> Mapping[str, np.ndarray]:
        """The arrays by name."""
        return _Weights(self)

    def settle(self):
        """Have every engine that learns these weights online write what it has put off; asking for a weight does the same."""
        for reference in tuple(self._engines):  # not a WeakSet: to go through one takes as long as a step
            engine = reference()
            if engine is not None:
                engine.settle()

    def settled_by(self, engine):
        """An engine that may put off its writes, for as long as it lives."""
        self._engines.append(weakref.ref(engine, self._engines.remove))

    @property
    def n_types(self) -> int:
        return len(self.type_names)

    def _draw(self, init, gain, rng):
        n_in, n_rec, n_out = self.n_in, self.n_rec, self.n_out
        if init == "signed":
            if self.sign is None or not ((self.sign > 0).any() and (self.sign < 0).any() and self.sign.all()):
                raise ValueError("init: 'signed' expects Dale's law with both signs and no free unit (argument dale)")
            if n_out > n_rec:
                raise ValueError(f"init: 'signed' expects at most as many outputs as units, n_rec = {n_rec}, got {n_out}")
            self.w_rec[:] = signed_weights(self.sign, rng)
            self.w_out[:] = signed_weights(self.sign, rng)[:n_out]
            self.w_in[:] = rng.normal(size=(n_rec, n_in)) * math.sqrt(2 / n_in)
        else:
            self.w_rec[:] = rng.normal(size=(n_rec, n_rec)) * (gain / math.sqrt(n_rec))
            self.w_in[:] = rng.normal(size=(n_rec, n_in)) / math.sqrt(n_in)
            self.w_out[:] = rng.normal(size=(n_out, n_rec)) / math.sqrt(n_rec)
            if self.sign is not None:
                for w in (self.w_rec, self.w_out):
                    w[:] = np.where(self.sign == 0, w, np.abs(w) * self.sign)
        self.constrain()

    @property
    def connections(self) -> np.ndarray:
        """(n_rec, n_rec) bool: where a recurrent synapse may exist, [post, pre]."""
        out = np.ones((self.n_rec, self.n_rec), bool) if self.mask is None else self.mask.astype(bool)
        if not self.autapses:
            np.fill_diagonal(out, False)
        return out

    def constrain(self):
        """Set to zero what the mask or the signs do not allow."""
        if self.mask is not None:
            np.multiply(self.w_rec, self.mask, out=self.w_rec)
        if not self.autapses:
            np.fill_diagonal(self.w_rec, 0)
        if self.sign is not None:
            for w in (self.w_rec, self.w_out):
                w[w * self.sign < 0] = 0

    def __getstate__(self):
        """For pickle and copy.deepcopy.  Without the stamp, so that the same network is the same bytes twice."""
        state = self.__dict__ | {"_weights": dict(self.weights), "_engines": None}
        del state["_stamp"]
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._stamp = np.zeros(1, np.int64)
        self._engines = []  # weak references
        self._weights = aligned({name: w.shape for name, w in state["_weights"].items()}, self.dtype)
        for name, w in state["_weights"].items():
            self._weights[name][...] = w

    def save(self, file):
        """Write the network as ``.npz`` (a path, written aside and renamed; or a binary file object).

        ValueError if a weight is not finite: `load` would not take it.
        """
        settings = {
            "format": _FORMAT, "activation": self.activation, "tau": self.tau, "dt": self.dt,
            "autapses": self.autapses, "type_names": self.type_names, "dtype": self.dtype.name,
        }  # fmt: skip
        weights = {name: checks.array(name, w, w.shape, w.dtype) for name, w in self.weights.items()}
        arrays = {"settings": np.array(json.dumps(settings)), "types": self.types, **weights}
        if self.sign is not None:
            arrays["sign"] = self.sign
        if self.mask is not None:
            arrays["mask"] = self.mask
        write_npz(file, arrays)

    @classmethod
    def load(cls, file) -> Network:
        """Read what `save` wrote."""
        try:
            arrays = read_npz(file)
            settings = json.loads(str(arrays.pop("settings")))
            version, names = settings.pop("format"), settings.pop("type_names")
            if missing := {"w_rec", "w_in", "w_out", "b_out", "types"} - arrays.keys():
                raise KeyError(min(missing))
            shapes = arrays["w_in"].shape[1], len(arrays["w_in"]), len(arrays["b_out"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"file: expected a network written by Network.save, got {file} ({error})") from None
        if version != _FORMAT:
            raise ValueError(f"file: expected a network of format {_FORMAT}, got format {version} in {file}")
        sign, mask = arrays.pop("sign", None), arrays.pop("mask", None)
        try:
            net = cls(
                *shapes, types=arrays.pop("types"), dale=sign, mask=None if mask is None else mask.astype(bool),
                bias="b_rec" in arrays, init="zeros", **settings,
            )  # fmt: skip
            for name, w in net.weights.items():
                w[...] = checks.array(name, arrays[name], w.shape, w.dtype)
            if len(names) != net.n_types:
                raise ValueError(f"type_names: expected {net.n_types}, got {len(names)}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"file: expected a network written by Network.save, got {file} ({error})") from None
        net.type_names = tuple(names)
        return net

    def __repr__(self):
        types = ", ".join(f"{name}: {n}" for name, n in zip(self.type_names, np.bincount(self.types)))
        return (
            f"Network({self.n_in} -> {self.n_rec} ({types}) -> {self.n_out}, {self.activation}, "
            f"tau={self.tau:g}, dt={self.dt:g}, {self.dtype.name})"
        )


def _weight(name):
    def get(self) -> np.ndarray:
        try:
            return self.weights[name]
        except KeyError:
            raise AttributeError(f"{name}: this network was made with bias=False") from None

    def put(self, values):
        own = get(self)
        own[...] = checks.array(name, values, own.shape, own.dtype)

    return property(get, put, doc=f"{name}, the engine's own array; assigning copies into it.")


for _name in ("w_rec", "w_in", "b_rec", "w_out", "b_out"):
    setattr(Network, _name, _weight(_name))


def signed_weights(sign, rng) -> np.ndarray:
    """The balanced recipe behind the published results: (N, N) [post, pre], spectral radius 1.

    |N(0, 1)| magnitudes; the inhibitory ones scaled so that total inhibition equals total excitation; for
    every postsynaptic unit the weaker side raised evenly until its inputs sum to zero; divided by
    the spectral radius.  Source: the code released with Liu et al. 2022.
    """
    excitatory, inhibitory = sign > 0, sign < 0
    size = np.abs(rng.normal(size=(len(sign), len(sign)))).T  # drawn [pre, post]
    size[:, inhibitory] *= size[:, excitatory].sum() / size[:, inhibitory].sum()
    missing = size[:, excitatory].sum(axis=1) - size[:, inhibitory].sum(axis=1)  # of inhibition
    size[:, inhibitory] += (np.maximum(missing, 0) / inhibitory.sum())[:, None]
    size[:, excitatory] += (np.maximum(-missing, 0) / excitatory.sum())[:, None]
    w = size * np.asarray(sign, float)
    return w / np.abs(np.linalg.eigvals(w)).max()


def _real(dtype):
    """np.float32 or np.float64, however it was named."""
    try:
        name = None if dtype is None else np.dtype(dtype).name
    except TypeError:
        name = None
    if name not in ("float32", "float64"):
        raise ValueError(f"dtype: expected one of 'float32', 'float64', got {checks.describe(dtype)}")
    return np.dtype(name)


def _cell_types(types, n_rec):
    """(types (n_rec,), names)."""
    if types is None:
        return np.zeros(n_rec, np.int64), ("all",)
    if isinstance(types, Mapping):
        if not types:
            raise ValueError("types: expected at least one type, got an empty mapping")
        amounts = list(types.values())
        if all(isinstance(a, (int, np.integer)) and not isinstance(a, bool) for a in amounts):
            counts = [checks.integer("types", a, least=1) for a in amounts]
            if sum(counts) != n_rec:
                raise ValueError(f"types: expected counts that sum to n_rec = {n_rec}, got {sum(counts)}")
        else:
            fractions = [checks.number("types", a, low=0, high=1, above=True) for a in amounts]
            if not math.isclose(sum(fractions), 1.0, rel_tol=1e-6):
                raise ValueError(f"types: expected fractions that sum to 1, got {sum(fractions):g}")
            edges = np.rint(np.cumsum([0.0, *fractions]) * n_rec).astype(int)
            counts = np.diff(edges)
            if (counts == 0).any():
                raise ValueError(f"types: expected at least one unit of every type, got {dict(zip(types, counts.tolist()))}")
        return np.repeat(np.arange(len(counts)), counts), tuple(map(str, types))
    given = checks.read("types", types)
    if given.dtype.kind not in "iu" or given.shape != (n_rec,):
        raise ValueError(f"types: expected a mapping or an int array of shape ({n_rec},), got {checks.describe(types)}")
    n_types = int(given.max()) + 1
    if given.min() < 0 or len(np.unique(given)) != n_types:
        raise ValueError(f"types: expected the numbers 0..{n_types - 1}, each at least once, got {np.unique(given)}")
    return given.astype(np.int64), tuple(map(str, range(n_types)))


def _signs(dale, types, names, dtype):
    """(n_rec,) +1, -1 or 0, or None."""
    if dale is None:
        return None
    if isinstance(dale, Mapping):
        dale = {str(name): sign for name, sign in dale.items()}
        if set(dale) != set(names):
            raise ValueError(f"dale: expected a sign for each of {', '.join(names)}, got {', '.join(dale)}")
        dale = checks.array("dale", [dale[name] for name in names], (len(names),), dtype)[types]
    sign = checks.array("dale", dale, (len(types),), dtype)
    if not np.isin(sign, (-1, 0, 1)).all():
        raise ValueError(f"dale: expected signs +1, -1 or 0, got {np.unique(sign)}")
    return sign.copy()  # it may be the caller's array


def _connections(mask, n_rec):
    """(n_rec, n_rec) uint8, or None."""
    if mask is None:
        return None
    given = checks.read("mask", mask)
    if given.dtype != bool or given.shape != (n_rec, n_rec):
        raise ValueError(f"mask: expected a bool array of shape ({n_rec}, {n_rec}), got {checks.describe(given)}")
    return np.ascontiguousarray(given, np.uint8)
