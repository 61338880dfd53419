"""The family of learning rules, as data.

Every rule computes ``L[p] e[p, q]``, learning signal times eligibility trace, for each synapse; they
differ in what they put in place of the rest of the gradient, which would need the future (BPTT) or
N^3 memory (RTRL).  A rule is a frozen dataclass; ``rule.plan(network)`` checks it against a network
and says what the engine has to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np

from . import checks


@dataclass(frozen=True, eq=False)
class Plan:
    """A rule resolved for one network: what `core.Engine` runs.

    ``trace`` and ``adjoint`` name the online and the offline form; the modulatory matrix (N, N) is
    given by ``types`` (its means over cell types), by ``u`` (N, r) times ``v`` (r, N), or is W itself
    (``cells``).  ``mu`` is one number per type, or per unit.  ``offline_because`` says why a rule
    cannot stream.
    """

    trace: str = "none"  # none, exact, mean
    adjoint: str = "none"  # none, exact, mean, bptt
    types: np.ndarray | None = None
    u: np.ndarray | None = None
    v: np.ndarray | None = None
    cells: bool = False
    mu: np.ndarray = field(default_factory=lambda: np.zeros(1))
    self_modulation: bool = True
    refresh_every: int = 0
    offline_because: str = ""

    @property
    def rank(self) -> int:
        """Number of modulators r."""
        if self.types is not None:
            return int(self.types.max()) + 1
        return 0 if self.u is None else self.u.shape[1]

    def mu_of_units(self, n_rec) -> np.ndarray:
        """(N,) mu of every unit."""
        per_unit = self.mu if self.types is None else np.broadcast_to(self.mu, self.rank)[self.types]
        return np.broadcast_to(per_unit, n_rec)


@dataclass(frozen=True, eq=False)
class Rule:
    """What all rules share.

    Parameters
    ----------
    feedback : {"symmetric", "random"} or (n_rec, n_out) array
        How dE/dy reaches the units, L = B dE/dy: B = W_out^T, a fixed random matrix drawn by the
        learner's generator (N(0, 1/n_rec), as W_out), or the given one.
    """

    feedback: str | np.ndarray = field(default="symmetric", kw_only=True)

    def __post_init__(self):
        if isinstance(self.feedback, str):
            checks.choice("feedback", self.feedback, ("symmetric", "random"))
        else:
            object.__setattr__(self, "feedback", _frozen("feedback", self.feedback, (None, None)))

    def plan(self, network) -> Plan:
        """Check the rule against a network and say what the engine has to do."""
        raise NotImplementedError

    def __eq__(self, other):
        return type(self) is type(other) and all(
            _same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        )

    def __hash__(self):
        return hash(type(self))


@dataclass(frozen=True, eq=False)
class EProp(Rule):
    """e-prop (Bellec et al. 2020): the local term alone.  With random feedback it is RFLO (Murray 2019).

    Examples
    --------
    >>> EProp(feedback="random").feedback
    'random'
    """

    def plan(self, network) -> Plan:
        return Plan()


@dataclass(frozen=True, eq=False)
class BPTT(Rule):
    """The exact gradient, by back-propagation through time (Werbos 1990).

    Needs the whole trial, O(T N) memory: for `Learner.gradient` with ``mode="offline"`` and for `Learner.fit_trials`.
    """

    def plan(self, network) -> Plan:
        return Plan(adjoint="bptt", cells=True, offline_because="BPTT needs the whole trial")


@dataclass(frozen=True, eq=False)
class ModProp(Rule):
    """ModProp (Liu et al., NeurIPS 2022): modulators filter each synapse's eligibility trace.

    In the recursion that carries credit through time the derivative h is replaced by a constant mu
    and W by a matrix of few modulators, so that credit for all past steps costs O(r N^2) per step.

    Parameters
    ----------
    mu : float, (n_types,) or, with (U, V) or "cells", (n_rec,) array, in [0, 1]
        Stands for the mean derivative of the activation.
    modulation : "types", (U, V) or "cells"
        The modulatory matrix: means of W over pairs of cell types; the product of U (n_rec, r) and
        V (r, n_rec), which does not follow W; or W itself, offline only.
    factor : {"exact", "mean"}
        The postsynaptic factor in the drive of the filter: h[p] (the paper's rule, r N^2 numbers
        of state) or mu (what the authors' code computes, r^2 N numbers).
    refresh : "update", "never" or int
        When the type means follow W: at every update, never ("pre-determined" taps), or every so
        many updates.
    self_modulation : bool
        False zeroes the diagonal of the type-mean matrix, as the authors' code does; with
        ``factor="mean"`` and types only.

    Examples
    --------
    >>> ModProp(0.25, factor="mean")
    ModProp(feedback='symmetric', mu=0.25, modulation='types', factor='mean', refresh='update', self_modulation=True)
    """

    mu: float | np.ndarray = 0.25
    modulation: str | tuple[np.ndarray, np.ndarray] = "types"
    factor: str = "exact"
    refresh: str | int = "update"
    self_modulation: bool = True

    def __post_init__(self):
        super().__post_init__()
        if np.ndim(self.mu) == 0:
            object.__setattr__(self, "mu", checks.number("mu", self.mu, low=0, high=1))
        else:
            mu = _frozen("mu", self.mu, (None,))
            if mu.min() < 0 or mu.max() > 1:
                raise ValueError(f"mu: expected values in [0, 1], got {mu.min():g} to {mu.max():g}")
            object.__setattr__(self, "mu", mu)
        if isinstance(self.modulation, str):
            checks.choice("modulation", self.modulation, ("types", "cells"))
        else:
            try:
                u, v = self.modulation
            except (TypeError, ValueError):
                raise TypeError(
                    f"modulation: expected 'types', 'cells' or a pair (U, V), got {checks.describe(self.modulation)}"
                ) from None
            pair = _frozen("modulation U", u, (None, None)), _frozen("modulation V", v, (None, None))
            object.__setattr__(self, "modulation", pair)
        checks.choice("factor", self.factor, ("exact", "mean"))
        if isinstance(self.refresh, str):
            checks.choice("refresh", self.refresh, ("update", "never"))
        else:
            object.__setattr__(self, "refresh", checks.integer("refresh", self.refresh, least=1))
        if not self.self_modulation and (self.factor != "mean" or self.modulation != "types"):
            raise ValueError("self_modulation: False is defined for factor='mean' with modulation='types' only")

    def plan(self, network) -> Plan:
        n_rec = network.n_rec
        every = {"update": 1, "never": 0}.get(self.refresh, self.refresh)
        shared = {"adjoint": self.factor, "self_modulation": self.self_modulation}
        if self.modulation == "types":
            mu = np.broadcast_to(_fits("mu", self.mu, network.n_types, "one per type"), network.n_types)
            return Plan(trace=self.factor, types=network.types, mu=mu, refresh_every=every, **shared)
        mu = np.broadcast_to(_fits("mu", self.mu, n_rec, "one per unit"), n_rec)
        if self.modulation == "cells":
            why = "ModProp with modulation='cells' keeps N^3 numbers when streamed"
            return Plan(cells=True, mu=mu, offline_because=why, **shared)
        u, v = self.modulation
        if len(u) != n_rec or v.shape != u.shape[::-1]:
            raise ValueError(
                f"modulation: expected U of shape ({n_rec}, r) and V of shape (r, {n_rec}), got {u.shape} and {v.shape}"
            )
        return Plan(trace=self.factor, u=u, v=v, mu=mu, **shared)


def _frozen(name, value, shape):
    out = checks.array(name, value, shape, np.float64).copy()
    out.setflags(write=False)
    return out


def _fits(name, value, n, meaning):
    if np.ndim(value) and len(value) != n:
        raise ValueError(f"{name}: expected a number or {n} of them, {meaning}, got {len(value)}")
    return value


def _same(a, b):
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(map(_same, a, b))
    return np.array_equal(a, b)
