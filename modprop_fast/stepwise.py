"""`Stepwise` stands where `core.Engine` does for the rules that the kernels do not have: see `influence`.

The network's step, its loss, its error and the gradient of its readout are an engine's.
"""

from __future__ import annotations

from contextlib import contextmanager
from threading import Lock
from time import perf_counter_ns

import numpy as np

from .core import Engine, Latency
from .influence import INFLUENCES
from .optimizers import SGD, by_weight
from .rules import Plan


class Stepwise:
    """The face of `core.Engine` that a `Learner` uses, for ``plan.stepwise``.

    Parameters
    ----------
    network, plan, loss, feedback, online, lr, on_unstable : as for `Engine`
    rng : numpy.random.Generator
        Of `UORO`.
    """

    means = None  # of W over types
    shares_rows = False

    def __init__(self, network, plan, loss, feedback=None, *, online=False, lr=0.0, rng=None, on_unstable=None):
        self.network, self.online, self.optimizer, self.on_unstable = network, online, SGD(lr) if online else None, on_unstable
        self.engine = Engine(network, Plan(), loss, feedback)
        n_sources = network.n_rec + network.n_in + ("b_rec" in network.weights)
        self.influence = INFLUENCES[plan.stepwise](network.n_rec, n_sources, plan, network.leak, rng)
        self.latency, self.updates, self.loss, self._lock = Latency(), 0, 0.0, Lock()

    @property
    def arrays(self):
        """The gradient, (N, Q) and of the readout."""
        return {name: self.engine.arrays[name] for name in Engine.GRADIENT} | {"grad": self.influence.grad}

    def step(self, x, target=None, *, signal=None, learn=True):
        """`Learner.step`."""
        began = perf_counter_ns()
        with self._alone("step"):
            y = self._step(x, target, signal, learn)
            self.loss = self.engine.loss
            if self.online and learn and (target is not None or signal is not None):
                self._descend()
        if self.latency.on:
            self.latency.note(perf_counter_ns() - began)
        return y

    def run(self, xs, target, label, mask, learn, ys=None, chunk=0, **threads):
        """`Engine.run`."""
        aims, total, owed = target if label is None else label, 0.0, False
        with self._alone("run"):
            try:
                for t, x in enumerate(xs):
                    aim = None if aims is None or (mask is not None and not mask[t]) else aims[t]
                    try:
                        y = self._step(x, aim, None, learn)
                    except FloatingPointError:
                        raise FloatingPointError(f"run: expected a finite readout, got {self.engine.y} at step {t}") from None
                    if ys is not None:
                        ys[t] = y
                    total, owed = total + self.engine.loss, owed or (learn and aim is not None)
                    if self.online and owed and ((t + 1) % max(chunk, 1) == 0 or t + 1 == len(xs)):
                        self._descend()
                        owed = False
            finally:
                self.loss = total
                if self.online:
                    self.clear()
        return total

    def _step(self, x, target, signal, learn):
        state, n = self.engine.arrays, self.network.n_rec
        w, h, z = (np.asarray(a, float) for a in (self.network.weights["w_rec"], state["h"].copy(), state["pre"][:n].copy()))
        self.influence.follow(w)
        if self.influence.unstable and self.on_unstable is not None:
            self.on_unstable()
        try:
            y = self.engine.step(x, target, signal=signal, learn=learn)
        except FloatingPointError:  # the engine is at rest
            self.influence.rest()
            raise
        s = state["pre"][: self.influence.shape[1]].astype(float)
        s[:n] = z
        with np.errstate(over="ignore", invalid="ignore"):  # an update by what is not finite is refused
            self.influence.advance(w, h, s)
            if learn and (target is not None or signal is not None):
                self.influence.learn(state["signal"].astype(float) * state["h"])
        return y

    def adjoint(self, xs, target, label, mask, scale):
        """Gradient of one trial, from rest, times `scale`; forwards all the same."""
        self.reset()
        self.clear()
        self.run(xs, target, label, mask, True)
        self.settle()
        self.loss *= scale
        for gradient in self.arrays.values():
            gradient *= scale

    def _descend(self):
        self.settle()
        try:
            self.optimizer.update(self.network.weights, by_weight(self.network, self.arrays), {}, self.updates)
        finally:
            self.clear()
        self.network.constrain()
        self.updates += 1

    def reset(self):
        """State and traces at the start of a trial."""
        self.engine.reset()
        self.influence.rest()

    def settle(self):
        """The accumulated gradient is complete."""
        self.influence.settle()

    def clear(self):
        """Accumulated gradient to zero."""
        self.settle()
        self.engine.clear()
        self.influence.grad[...] = 0

    def must_be_idle(self, call):
        """As for `Engine`."""
        with self._alone(call):
            pass

    def must_stream(self, call):
        """These rules do."""

    def refresh(self):
        """They follow W without being told."""

    def forget_ahead(self):
        """As for `Engine`."""
        self.engine.forget_ahead()

    @contextmanager
    def _alone(self, call):
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(f"{call}: this learner is already running in another thread; give each thread its own")
        try:
            yield
        finally:
            self._lock.release()

    def snapshot(self):
        """As for `Engine`."""
        with self._alone("copy"):
            kept = {name: a.copy() for name, a in vars(self.influence).items() if isinstance(a, np.ndarray)}
            return {"engine": self.engine.snapshot(), "arrays": kept, "numbers": (self.updates, self.loss)}

    def take_over(self, snapshot):
        """As for `Engine`."""
        self.engine.take_over(snapshot["engine"])
        vars(self.influence).update({name: a.copy() for name, a in snapshot["arrays"].items()})
        self.updates, self.loss = snapshot["numbers"]
