"""What becomes of a gradient: SGD and Adam, with schedules, L2, L1 and clipping.

An optimizer is a frozen dataclass; what evolves is in the dict that `start` returns and `update` changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import checks

_PENALISED = ("w_rec", "w_in", "w_out")  # L2
_SHRUNK = ("w_rec", "w_out")  # L1


@dataclass(frozen=True)
class StepDecay:
    """A staircase: the learning rate times ``factor`` before updates ``every``, 2 ``every``, ... (counted from 0).

    Examples
    --------
    >>> [StepDecay(0.5, 2)(i) for i in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    factor: float = 0.8
    every: int = 300

    def __post_init__(self):
        checks.number("factor", self.factor, low=0, above=True)
        checks.integer("every", self.every, least=1)

    def __call__(self, iteration: int) -> float:
        return float(self.factor) ** (iteration // self.every)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, ``w -= lr * g``.

    Parameters
    ----------
    lr : float
    l2 : float
        Strength of ``l2 / 2 ||w||^2`` on w_rec, w_in and w_out; its gradient is part of g, after clipping.
    l1 : float
        After the update, ``w -= lr * l1`` where w > 0, on w_rec and w_out (decoupled; as in the code of Liu et al. 2022).
    clip : float or None
        Largest Euclidean norm of the whole gradient; a longer one is scaled down to it.
    schedule : callable or None
        Factor on ``lr`` by the number of updates made so far.
    """

    lr: float = 1e-3
    l2: float = field(default=0.0, kw_only=True)
    l1: float = field(default=0.0, kw_only=True)
    clip: float | None = field(default=None, kw_only=True)
    schedule: Callable[[int], float] | None = field(default=None, kw_only=True)

    def __post_init__(self):
        checks.number("lr", self.lr, low=0, above=True)
        checks.number("l2", self.l2, low=0)
        checks.number("l1", self.l1, low=0)
        if self.clip is not None:
            checks.number("clip", self.clip, low=0, above=True)
        if self.schedule is not None and not callable(self.schedule):
            raise TypeError(f"schedule: expected a function of the number of updates, got {checks.describe(self.schedule)}")

    def start(self, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by name that `update` keeps between updates."""
        return {}

    def direction(self, name, g, state, iteration) -> np.ndarray:
        """What is subtracted from a weight, divided by the learning rate."""
        return g

    def update(self, weights, grads, state, iteration):
        """Change ``weights`` in place; ``iteration`` updates were made before.

        Raises
        ------
        FloatingPointError
            If the norm of the gradient, or a weight after the update, is not finite; nothing was changed.
        """
        with np.errstate(over="ignore"):  # said below
            norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values()))
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient: expected a finite norm, got {norm} at update {iteration}")
        scale = self.clip / norm if self.clip is not None and norm > self.clip else 1.0
        lr = self.lr * (self.schedule(iteration) if self.schedule else 1.0)
        after, new = {name: array.copy() for name, array in state.items()}, {}
        with np.errstate(over="ignore", invalid="ignore"):
            for name, w in weights.items():
                if not w.flags.writeable:
                    raise ValueError(f"{name}: expected weights that can be written, got a read-only array")
                g = grads[name] * w.dtype.type(scale)
                if self.l2 and name in _PENALISED:
                    g += w.dtype.type(self.l2) * w
                new[name] = w - w.dtype.type(lr) * self.direction(name, g, after, iteration)
                if self.l1 and name in _SHRUNK:
                    new[name][new[name] > 0] -= w.dtype.type(lr * self.l1)
        for name, array in (after | new).items():
            if not np.isfinite(array).all():
                raise FloatingPointError(
                    f"{name}: expected finite values after update {iteration}, at learning rate {lr:g}, got others"
                )
        for kept, values in ((state, after), (weights, new)):
            for name, array in values.items():
                kept[name][...] = array


def by_weight(network, arrays) -> dict[str, np.ndarray]:
    """An engine's gradient, (N, [W | W_in | b]) and of the readout, as one array per weight, 0 where no synapse may exist."""
    grad, n_rec = arrays["grad"], network.n_rec
    after_in = n_rec + network.n_in
    out = {
        "w_rec": np.where(network.connections, grad[:, :n_rec], 0),
        "w_in": grad[:, n_rec:after_in],
        "w_out": arrays["grad_w_out"],
        "b_out": arrays["grad_b_out"],
    }
    if "b_rec" in network.weights:
        out["b_rec"] = grad[:, after_in]
    with np.errstate(over="ignore"):
        return {name: np.array(g, network.dtype) for name, g in out.items()}


@dataclass(frozen=True)
class Adam(SGD):
    """Adam (Kingma & Ba 2015): ``w -= lr * m / (sqrt(s) + eps)`` with bias-corrected moments m and s of g.

    Parameters
    ----------
    lr, l2, l1, clip, schedule : as for `SGD`
    betas : (float, float)
    eps : float
    """

    betas: tuple[float, float] = field(default=(0.9, 0.999), kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {checks.describe(self.betas)}")
        for beta in self.betas:
            if not 0 <= checks.number("betas", beta) < 1:
                raise ValueError(f"betas: expected numbers in [0, 1), got {self.betas}")
        checks.number("eps", self.eps, low=0, above=True)

    def start(self, weights):
        return {f"{moment}.{name}": np.zeros_like(w) for name, w in weights.items() for moment in ("m", "s")}

    def direction(self, name, g, state, iteration):
        b1, b2 = self.betas
        m, s = state[f"m.{name}"], state[f"s.{name}"]
        m += (1 - b1) * (g - m)
        s += (1 - b2) * (g * g - s)
        correct_m, correct_s = 1 - b1 ** (iteration + 1), 1 - b2 ** (iteration + 1)
        return (m / correct_m) / (np.sqrt(s / correct_s) + self.eps)
