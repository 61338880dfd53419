"""The family of learning rules, as data.

Every rule computes ``L[p] e[p, q]``, learning signal times eligibility trace, for each synapse; they
differ in what they put in place of the rest of the gradient, which would need the future (BPTT) or
N^3 memory (RTRL).  A rule is a frozen dataclass; ``rule.plan(network)`` checks it against a network
and says what the engine has to do.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field, fields, replace

import numpy as np

from . import checks
from .core import MAX_WINDOW
from .reference_rules import auto_mu, low_rank, type_means


@dataclass(frozen=True, eq=False)
class Plan:
    """A rule resolved for one network: what `core.Engine` runs.

    ``trace`` and ``adjoint`` name the online and the offline form; the modulatory matrix (N, N) is
    given by ``types`` (its means over cell types), by ``u`` (N, r) times ``v`` (r, N), or is W itself
    (``cells``).  ``mu`` is one number per type, or per unit, or with ``instant`` the mean of h over each
    type at every step.  ``offline_because`` says why a rule cannot stream.
    """

    trace: str = "none"  # none, exact, mean, taps
    adjoint: str = "none"  # none, exact, mean, running, taps, bptt, snap1
    types: np.ndarray | None = None
    u: np.ndarray | None = None
    v: np.ndarray | None = None
    cells: bool = False
    mu: np.ndarray = field(default_factory=lambda: np.zeros(1))
    self_modulation: bool = True
    refresh_every: int = 0
    offline_because: str = ""
    one_tap: bool = False  # the filter forgets at once
    running: bool = False  # the factor is the running mean of h, which is the learner's
    instant: bool = False
    exact_steps: int = 0  # length of the chunks that are exact, 0: none
    horizon: int = 0  # of truncated BPTT, 0: not truncated
    measures_h: bool = False  # the mean of h is one of the things that it follows, see `Rule.evolved`
    taps: np.ndarray | None = None  # (S, C, C) filter, or (S,) zeros: the first S of the recursion
    stepwise: str = ""  # online it is this one of `influence`, in NumPy: slow

    @property
    def rank(self) -> int:
        """Number of modulators r."""
        if self.types is not None:
            return int(self.types.max()) + 1
        return 0 if self.u is None else self.u.shape[1]

    @property
    def has_adjoint(self) -> bool:
        """Whether the engine has another form than e-prop's, backwards in time."""
        return self.adjoint != "none"

    def evolving(self) -> dict[str, np.ndarray]:
        """What may follow the weights or the mean of h, by name."""
        return {name: array for name in ("mu", "u", "v") if (array := getattr(self, name)) is not None}

    def continuing(self, v) -> Plan:
        """The same plan with its modulators in the order and with the signs of ``v`` (r, N), those of a plan before it.

        Singular vectors come with any sign, and change places when their values cross; what a stream carries in its
        traces belongs to the modulators that it was summed for.
        """
        likeness = self.v @ v.T  # [now, before]
        order, left = np.empty(self.rank, int), np.abs(likeness)
        for _ in order:
            now, before = np.unravel_index(left.argmax(), left.shape)
            order[before] = now
            left[now], left[:, before] = -1, -1
        sign = np.where(likeness[order, np.arange(self.rank)] < 0, -1.0, 1.0)
        return replace(self, u=self.u[:, order] * sign, v=self.v[order] * sign[:, None])

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
        """Check the rule against a network and say what the engine has to do; the mean of h, not yet seen, is 1/2."""
        raise NotImplementedError

    @property
    def follows(self) -> bool:
        """Whether the plan changes with the weights, or with the mean of h."""
        return False

    def evolved(self, network, h_mean, means, weights) -> dict[str, np.ndarray]:
        """What of the plan, by name, follows the mean of h (N,), the filter's means of W (C, C) and, if ``weights``, W."""
        return {}

    def __eq__(self, other):
        return type(self) is type(other) and all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self):
        return hash(type(self))


@dataclass(frozen=True, eq=False)
class EProp(Rule):
    """e-prop (Bellec et al. 2020): the local term alone.  With random feedback it is `RFLO`.

    Parameters
    ----------
    exact_steps : int, optional
        Exact credit inside chunks of so many steps, eligibility traces beyond: see `ModProp`.

    Examples
    --------
    >>> EProp(feedback="random").feedback
    'random'
    """

    exact_steps: int | None = None

    def __post_init__(self):
        super().__post_init__()
        _exact_steps(self)

    def plan(self, network) -> Plan:
        return Plan(exact_steps=self.exact_steps or 0, offline_because=_why_chunks(self))


@dataclass(frozen=True, eq=False)
class RFLO(Rule):
    """Random feedback local online learning (Murray 2019): e-prop with a learning signal through a random matrix."""

    feedback: str | np.ndarray = field(default="random", kw_only=True)

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
class TBPTT(Rule):
    """Truncated back-propagation through time (Williams & Peng 1990): an error reaches back `horizon` steps, its own included.

    ``horizon`` >= T is `BPTT`.  O(T N) memory, and O(horizon N^2) time for every step with an error.
    """

    horizon: int = 20

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "horizon", checks.integer("horizon", self.horizon, least=1))

    def plan(self, network) -> Plan:
        why = "TBPTT goes back through recorded steps"
        return Plan(adjoint="bptt", cells=True, horizon=self.horizon, offline_because=why)


@dataclass(frozen=True, eq=False)
class SnAp1(Rule):
    """SnAp-1 (Menick et al. 2021): RTRL of a synapse's own postsynaptic unit alone.

    Exact for a diagonal W; without autapses it is e-prop, and streams as such; with them it streams in NumPy.
    """

    def plan(self, network) -> Plan:
        if network.autapses:
            return Plan(adjoint="snap1", cells=True, stepwise="snap1")
        return Plan()


@dataclass(frozen=True, eq=False)
class RTRL(Rule):
    """Real-time recurrent learning (Williams & Zipser 1989): BPTT's gradient, forwards in time, with N^3 numbers and N^4 time.

    For small networks, as a check: in NumPy.

    Parameters
    ----------
    limit : float
        Most memory to use, in bytes.
    """

    limit: float = 2e9

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "limit", checks.number("limit", self.limit, low=0, above=True))

    def plan(self, network) -> Plan:
        need = 16 * network.n_rec**2 * (network.n_rec + network.n_in + 1)  # of this step and of the next
        if need > self.limit:
            most = f"{self.limit / 1e9:.3g} GB"
            raise MemoryError(f"RTRL: expected at most {most}, {network.n_rec} units need {need / 1e9:.3g} GB")
        return Plan(stepwise="rtrl")


@dataclass(frozen=True, eq=False)
class UORO(Rule):
    """Unbiased online recurrent optimization (Tallec & Ollivier 2018): RTRL's tensor by one random outer product.

    For comparison: in NumPy.  The learner's ``rng`` is its source of signs.
    """

    def plan(self, network) -> Plan:
        return Plan(stepwise="uoro")


@dataclass(frozen=True, eq=False)
class MDGL(Rule):
    """Multidigraph learning (Liu et al. 2021): the first tap of `ModProp`, one hop further than e-prop.

    Parameters
    ----------
    modulation : "types", "cells", LowRank(r) or (U, V)
        As for `ModProp`.
    refresh : "update", "never" or int
        As for `ModProp`.
    """

    modulation: str | LowRank | tuple[np.ndarray, np.ndarray] = "types"
    refresh: str | int = "update"

    def __post_init__(self):
        super().__post_init__()
        twin = self._twin()
        for name in ("modulation", "refresh"):
            object.__setattr__(self, name, getattr(twin, name))

    @property
    def follows(self) -> bool:
        return isinstance(self.modulation, LowRank)

    def plan(self, network) -> Plan:
        plan = self._twin().plan(network)
        return replace(plan, one_tap=True, offline_because="", stepwise="mdgl" if plan.cells else "")

    def evolved(self, network, h_mean, means, weights) -> dict[str, np.ndarray]:
        return self._twin().evolved(network, h_mean, means, weights)

    def _twin(self):
        return ModProp(0.0, self.modulation, refresh=self.refresh)


@dataclass(frozen=True)
class LowRank:
    """Modulation by the best approximation U V of W of this rank (truncated SVD), which follows W."""

    rank: int

    def __post_init__(self):
        object.__setattr__(self, "rank", checks.integer("rank", self.rank, least=1))


@dataclass(frozen=True, eq=False)
class ModProp(Rule):
    """ModProp (Liu et al., NeurIPS 2022): modulators filter each synapse's eligibility trace.

    In the recursion that carries credit through time the derivative h is replaced by a constant mu
    and W by a matrix of few modulators, so that credit for all past steps costs O(r N^2) per step.

    Parameters
    ----------
    mu : float, (n_types,) or, with (U, V), LowRank or "cells", (n_rec,) array, in [0, 1]; "auto" or "instant"
        Stands for the mean derivative of the activation.  "auto": the running mean of h over each type, made
        smaller where the filter, with the type means that it has, would not forget within `horizon` steps; taken
        anew at every update by `apply` or `fit_trials`, at every `reset`, and with update="step" every 1000 steps.
        "instant": the mean of h over each type at every step; with factor="exact".  Both with types only.
    modulation : "types", "cells", LowRank(r) or (U, V)
        The modulatory matrix: means of W over pairs of cell types; W itself, offline, or with factor="mean" online
        too, in the eigenvectors of K (in NumPy: N^3 after each update, N^2 a step); its best approximation of rank r, taken
        anew as `refresh` says; or the product of U (n_rec, r) and V (r, n_rec), which does not follow W.
    factor : {"exact", "mean", "running"}
        The postsynaptic factor in the drive of the filter: h[p] (the paper's rule, r N^2 numbers
        of state), mu (what the authors' code computes, r^2 N numbers), or at the same price as mu the
        running mean of h[p], taken anew when mu="auto" is.
    refresh : "update", "never" or int
        When the type means, or the matrices of LowRank, follow W: at every update (LowRank in a stream: every 1000
        steps, by an SVD, N^3: "never" where that would miss a deadline), never ("pre-determined" taps), or every so many
        updates.
    self_modulation : bool
        False zeroes the diagonal of the type-mean matrix, as the authors' code does; with
        ``factor="mean"`` and types only.
    exact_steps : int, optional
        Exact credit inside chunks of so many steps, modulators for what came before: a dial from ModProp
        to BPTT at O(N^2) per step and O(exact_steps N) more memory.  It streams with ``update="apply"`` and at most
        32 steps, and the gradient is complete at the end of each chunk.  With ``factor="exact"``.
    taps : int or (S, n_types, n_types) array, optional
        In place of the recursion, which has no end: its first S taps, or any filter F_1 .. F_S by pairs of types [post,
        pre].  From a ring of S <= 32 steps, at O(S N^2) for a step with an error.  With ``factor="exact"``.
    horizon : float
        Of mu="auto": rho(K) <= 1 - 1 / horizon, in steps.

    Examples
    --------
    >>> ModProp(0.25, factor="mean").factor
    'mean'
    """

    mu: float | np.ndarray | str = 0.25
    modulation: str | LowRank | tuple[np.ndarray, np.ndarray] = "types"
    factor: str = "exact"
    refresh: str | int = "update"
    self_modulation: bool = True
    exact_steps: int | None = None
    taps: int | np.ndarray | None = None
    horizon: float = 1000.0

    def __post_init__(self):
        super().__post_init__()
        _exact_steps(self)
        object.__setattr__(self, "horizon", checks.number("horizon", self.horizon, low=1, above=True))
        if isinstance(self.modulation, str):
            checks.choice("modulation", self.modulation, ("types", "cells"))
        elif not isinstance(self.modulation, LowRank):
            try:
                u, v = self.modulation
            except (TypeError, ValueError):
                raise TypeError(
                    "modulation: expected 'types', 'cells', LowRank(r) or a pair (U, V), "
                    f"got {checks.describe(self.modulation)}"
                ) from None
            pair = _frozen("modulation U", u, (None, None)), _frozen("modulation V", v, (None, None))
            object.__setattr__(self, "modulation", pair)
        self._check_taps()
        self._check_mu()
        checks.choice("factor", self.factor, ("exact", "mean", "running"))
        if self.exact_steps and self.factor != "exact":
            raise ValueError(f"exact_steps: defined for factor='exact', got factor={self.factor!r}")
        if isinstance(self.refresh, str):
            checks.choice("refresh", self.refresh, ("update", "never"))
        else:
            object.__setattr__(self, "refresh", checks.integer("refresh", self.refresh, least=1))
        if not isinstance(self.self_modulation, (bool, np.bool_)):
            raise TypeError(f"self_modulation: expected True or False, got {checks.describe(self.self_modulation)}")
        if not self.self_modulation and (self.factor != "mean" or self.modulation != "types"):
            raise ValueError("self_modulation: False is defined for factor='mean' with modulation='types' only")

    def _check_mu(self):
        if isinstance(self.mu, str):
            if self.mu not in ("auto", "instant"):
                raise ValueError(f"mu: expected a number in [0, 1], several, 'auto' or 'instant', got {self.mu!r}")
            if self.modulation != "types":
                raise ValueError(f"mu: expected numbers without modulation='types', got {self.mu!r}")
            if self.mu == "instant" and self.factor != "exact":
                raise ValueError(f"mu: 'instant' is defined for factor='exact', got factor={self.factor!r}")
        elif checks.read("mu", self.mu).ndim == 0:
            object.__setattr__(self, "mu", checks.number("mu", self.mu, low=0, high=1))
        else:
            mu = _frozen("mu", self.mu, (None,))
            if mu.min() < 0 or mu.max() > 1:
                raise ValueError(f"mu: expected values in [0, 1], got {mu.min():g} to {mu.max():g}")
            object.__setattr__(self, "mu", mu)

    def _check_taps(self):
        if self.taps is None:
            return
        if checks.read("taps", self.taps).ndim == 0:
            n = checks.integer("taps", self.taps, least=1)
        else:
            object.__setattr__(self, "taps", _frozen("taps", self.taps, (None, None, None)))
            n = len(self.taps)
            if self.modulation != "types":
                raise ValueError("taps: expected a number without modulation='types', got an array")
        if not 1 <= n <= MAX_WINDOW:
            raise ValueError(f"taps: expected 1 to {MAX_WINDOW}, got {n}")
        if self.factor != "exact" or self.exact_steps or self.modulation == "cells" or _is(self.mu, "instant"):
            raise ValueError("taps: defined for factor='exact' with types or low rank, without exact_steps and mu='instant'")

    @property
    def follows(self) -> bool:
        return isinstance(self.modulation, LowRank) or _is(self.mu, "auto") or self.factor == "running"

    def plan(self, network) -> Plan:
        n_rec, types = network.n_rec, network.types
        means = None
        if _is(self.mu, "auto"):
            first = np.unique(types, return_index=True)[1]
            means = type_means(network.w_rec, types)[np.ix_(first, first)]
        if isinstance(self.modulation, LowRank) and self.modulation.rank > n_rec:
            raise ValueError(f"modulation: expected a rank of at most n_rec = {n_rec}, got {self.modulation.rank}")
        evolved = self.evolved(network, np.full(n_rec, 0.5), means, True)
        shared = {
            "adjoint": self.factor,
            "self_modulation": self.self_modulation,
            "exact_steps": self.exact_steps or 0,
            "refresh_every": {"update": 1, "never": 0}.get(self.refresh, self.refresh),
            "measures_h": _is(self.mu, "auto") or self.factor == "running",
            "running": self.factor == "running",
            "instant": _is(self.mu, "instant"),
            "offline_because": _why_chunks(self),
        }
        trace = "mean" if self.factor == "running" else self.factor
        if self.taps is not None:
            trace = shared["adjoint"] = "taps"
            shared["taps"] = np.zeros(self.taps) if np.ndim(self.taps) == 0 else self.taps
            if np.ndim(self.taps) and self.taps.shape[1:] != (network.n_types,) * 2:
                n = network.n_types
                raise ValueError(f"taps: expected (S, {n}, {n}) numbers, got shape {self.taps.shape}")
        if self.modulation == "types":
            mu = 0.0 if shared["instant"] else evolved.get("mu", self.mu)
            mu = np.broadcast_to(_fits("mu", mu, network.n_types, "one per type"), network.n_types)
            return Plan(trace=trace, types=types, mu=mu, **shared)
        mu = np.broadcast_to(_fits("mu", self.mu, n_rec, "one per unit"), n_rec)
        if self.modulation == "cells":
            if self.factor == "mean":
                return Plan(cells=True, mu=mu, stepwise="cells", **shared)
            shared["offline_because"] = "ModProp with modulation='cells' streams with factor='mean' only"
            return Plan(cells=True, mu=mu, **shared)
        if isinstance(self.modulation, LowRank):
            u, v = evolved["u"], evolved["v"]
        else:
            u, v = self.modulation
            shared["refresh_every"] = 0
        if len(u) != n_rec or v.shape != u.shape[::-1]:
            raise ValueError(
                f"modulation: expected U of shape ({n_rec}, r) and V of shape (r, {n_rec}), got {u.shape} and {v.shape}"
            )
        return Plan(trace=trace, u=u, v=v, mu=mu, **shared)

    def evolved(self, network, h_mean, means, weights) -> dict[str, np.ndarray]:
        out = {}
        if _is(self.mu, "auto"):
            n = np.bincount(network.types)
            out["mu"] = auto_mu(np.bincount(network.types, h_mean) / n, means, n, network.leak, self.horizon)
        if weights and isinstance(self.modulation, LowRank):
            out["u"], out["v"] = low_rank(network.w_rec, self.modulation.rank)
        return out


RULES: dict[str, type[Rule]] = {
    "bptt": BPTT, "tbptt": TBPTT, "eprop": EProp, "rflo": RFLO, "snap1": SnAp1, "mdgl": MDGL, "modprop": ModProp,
    "rtrl": RTRL, "uoro": UORO,
}  # fmt: skip


def parse_rule(text: str) -> Rule:
    """The rule that a text such as ``bptt``, ``tbptt(horizon=20)`` or ``modprop(modulation=lowrank:2, factor=mean)`` names.

    Examples
    --------
    >>> parse_rule("modprop(exact_steps=20)").exact_steps
    20
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", str(text))
    if not match:
        raise ValueError(f"rule: expected a name or name(option=value, ..), got {text!r}")
    name = checks.choice("rule", match[1], tuple(RULES))
    try:
        return RULES[name](**dict(_options(name, match[2] or "")))
    except TypeError as error:  # in a text, a value of another type is a wrong value
        raise ValueError(f"rule: {error}") from None


def _options(rule, text):
    """(name, value) of each option in a text."""
    known = [f.name for f in fields(RULES[rule])]
    for part in filter(None, map(str.strip, re.split(r",(?=\s*[\w-]*\s*=)", text))):  # commas, but for those within a value
        key, _, value = map(str.strip, part.partition("="))
        if key in known:
            known.remove(key)
        else:
            raise ValueError(f"rule: expected options of {rule} ({', '.join(known)}), each once, got {part!r}")
        low_rank = value.startswith("lowrank:")
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value, value.removeprefix("lowrank:")))
        except (ValueError, SyntaxError):
            value = value.removeprefix("lowrank:")
        yield key, LowRank(value) if low_rank else value


def _exact_steps(rule):
    if rule.exact_steps is not None:
        object.__setattr__(rule, "exact_steps", checks.integer("exact_steps", rule.exact_steps, least=1))


def _why_chunks(rule) -> str:
    if (rule.exact_steps or 0) <= MAX_WINDOW:
        return ""
    return f"{type(rule).__name__} with more than {MAX_WINDOW} exact_steps goes back through the recorded trial"


def _frozen(name, value, shape):
    out = checks.array(name, value, shape, np.float64).copy()
    out.setflags(write=False)
    return out


def _fits(name, value, n, meaning):
    if np.ndim(value) and len(value) != n:
        raise ValueError(f"{name}: expected a number or {n} of them, {meaning}, got {len(value)}")
    return value


def _is(value, name) -> bool:
    return isinstance(value, str) and value == name


def _same(a, b):
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(map(_same, a, b))
    return np.array_equal(a, b)
