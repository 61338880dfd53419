"""The learner: one network, one rule, one loss and one optimizer, bound to an engine."""

from __future__ import annotations

import json
import math
import os
import warnings
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from . import checks
from .core import MAX_TOGETHER, MAX_WINDOW, Engine, Latency, run_trials
from .losses import LOSSES, check_targets
from .network import Network
from .optimizers import SGD, by_weight
from .rules import ModProp, Plan, Rule
from .stepwise import Stepwise

_FIXED = frozenset(("network", "rule", "loss_name", "optimizer", "update", "threads"))
_STATE_BYTES = 1 << 28  # for the traces and gradients of trials that go through W together, per thread
_RECORD_BYTES = 1 << 26  # and for what is kept of their steps, by rules that need the whole trial


class Evaluation(NamedTuple):
    """What `Learner.evaluate` found: batch-mean loss, accuracy (None for mse), outputs (B, T, n_out)."""

    loss: float
    accuracy: float | None
    outputs: np.ndarray


class Learner:
    """Learns a network's weights, step by step or by batches of trials.

    Parameters
    ----------
    network : Network
        Its arrays are learned in place.
    rule : Rule
        `ModProp`, `EProp`, `BPTT` or another of `RULES`.
    loss : {"mse", "cross_entropy"}
        Of one step: mean over the outputs of (y - y*)^2 / 2, or softmax cross entropy.
    optimizer : SGD or Adam
    update : {"step", "apply"}, optional
        ``step``: plain SGD within every step that has an error.  ``apply``: gradients add up until `apply`.
        Default: ``step`` where the optimizer is plain SGD(lr), else ``apply``.
    threads : int, optional
        Threads over the trials of a batch, and over the units in `run` from 768 units on (without signs
        and mask; it pays where as many processors have nothing else to do); by default all that are available.
        No result depends on it.
    rng : numpy.random.Generator, optional
        Source of random feedback and of the signs of `UORO`, needed for these alone.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> net = Network(1, 50, 1, activation="tanh", tau=1.0, rng=rng)
    >>> learner = Learner(net, ModProp(0.25), optimizer=SGD(0.02))
    >>> x = rng.normal(size=(3000, 1)).astype("float32")
    >>> losses = []
    >>> for t in range(2, 3000):
    ...     y = learner.step(x[t], target=x[t - 2])  # recall what came two steps before
    ...     losses.append(learner.loss)
    >>> bool(np.mean(losses[-300:]) < 0.1)  # of 0.5, the loss of guessing zero
    True
    """

    def __init__(self, network, rule=ModProp(), *, loss="mse", optimizer=SGD(), update=None, threads=None, rng=None):
        if not isinstance(network, Network):
            raise TypeError(f"network: expected a Network, got {checks.describe(network)}")
        if not isinstance(rule, Rule):
            raise TypeError(f"rule: expected a rule such as ModProp(0.25) or EProp(), got {checks.describe(rule)}")
        if not isinstance(optimizer, SGD):
            raise TypeError(f"optimizer: expected SGD(...) or Adam(...), got {checks.describe(optimizer)}")
        for name, weight in network.weights.items():
            if not weight.flags.writeable:
                raise ValueError(f"network: expected weights that can be written, got a read-only {name}")
        checks.choice("loss", loss, LOSSES)
        plain = optimizer == SGD(optimizer.lr)
        chunks = bool(getattr(rule, "exact_steps", None))
        if update is None:
            update = "step" if plain and not chunks else "apply"
        checks.choice("update", update, ("step", "apply"))
        if update == "step" and chunks:
            raise ValueError(f"update: expected 'apply' with exact_steps, got {update!r}")
        if update == "step" and not plain:
            raise ValueError(f"optimizer: expected plain SGD(lr) with update='step', got {optimizer}")
        if optimizer.lr > float(np.finfo(network.dtype).max):
            raise ValueError(f"optimizer: expected a learning rate that {network.dtype} holds, got {optimizer.lr:g}")
        self.network, self.rule, self.loss_name, self.optimizer, self.update = network, rule, loss, optimizer, update
        self.threads = _available() if threads is None else checks.integer("threads", threads, least=1)
        self.iteration = 0  # updates made by apply and fit_trials
        self._plan = rule.plan(network)
        self._planned_for, self._planned_at = -1, 0
        self._h_mean, self._h_batches = np.full(network.n_rec, 0.5), np.zeros(1, np.int64)  # of the rules that follow it
        self._feedback = _feedback(rule.feedback, network, rng)
        self._rng = checks.generator("rng", rng) if self._plan.stepwise == "uoro" else None
        self._optimizer_state = optimizer.start(network.weights)
        self._bind(self._new_engine(self.update == "step"))
        self._workers: list[Engine] = []
        self._pool: ThreadPoolExecutor | None = None
        self._pool_of = 0  # the process whose threads these are
        self._warned = self._plan.instant  # its K is that of one step: nothing follows for the next
        self._check_filter()

    @classmethod
    def from_arrays(cls, w_rec, w_in, w_out, b_out=None, b_rec=None, *, rule=ModProp(), loss="mse", optimizer=SGD(),
                    update=None, threads=None, rng=None, **network) -> Learner:  # fmt: skip
        """A learner of a new network with these weights, which are copied.

        Parameters
        ----------
        w_rec (n_rec, n_rec) [post, pre], w_in (n_rec, n_in), w_out (n_out, n_rec), b_out (n_out,), b_rec (n_rec,) : arrays
            Of whatever can hand an array over: by the buffer protocol, by DLPack (PyTorch, JAX), or as a sequence.
            Without `b_out` it is 0; without `b_rec` the recurrent units have no bias.
        rule, loss, optimizer, update, threads, rng : as for `Learner`
        **network : as for `Network`
            types, activation, tau, dt, dale, mask, autapses (default: whether the diagonal of `w_rec` is in use) and dtype
            (default: float64 if `w_rec` is, else float32).

        Raises
        ------
        TypeError, ValueError
            If an array cannot be read or does not fit, is not finite, or has weights where `mask`, `dale` or
            `autapses` allow none.

        Examples
        --------
        >>> learner = Learner.from_arrays(np.zeros((3, 3)), np.ones((3, 1)), np.ones((2, 3)), activation="tanh")
        >>> learner.step(np.zeros(1)).tolist()
        [0.0, 0.0]
        """
        given = {"w_rec": w_rec, "w_in": w_in, "w_out": w_out, "b_out": b_out, "b_rec": b_rec}
        given = {name: checks.read(name, array) for name, array in given.items() if array is not None or name.startswith("w_")}
        for name, array in given.items():
            n = 1 + name.startswith("w_")
            if array.ndim != n or not array.size:
                wanted = f"{n} dimension{'s' * (n > 1)} and at least one number"
                raise ValueError(f"{name}: expected {wanted}, got shape {array.shape}")
        dtype = "float64" if given["w_rec"].dtype == np.float64 else "float32"
        network = {"dtype": dtype, "autapses": bool(np.diag(given["w_rec"]).any())} | network
        n_in, n_rec, n_out = given["w_in"].shape[1], len(given["w_rec"]), len(given["w_out"])
        net = Network(n_in, n_rec, n_out, bias="b_rec" in given, init="zeros", **network)
        for name, array in given.items():
            setattr(net, name, array)
        net.constrain()
        for name, array in given.items():
            if not np.array_equal(net.weights[name], np.asarray(array, net.dtype)):
                raise ValueError(f"{name}: expected no weights where mask, dale or autapses allow none")
        return cls(net, rule, loss=loss, optimizer=optimizer, update=update, threads=threads, rng=rng)

    def __setattr__(self, name, value):
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(
                f"{name}: expected to stay as the learner was made with; make another one for the same network"
            )
        super().__setattr__(name, value)

    def _bind(self, engine):
        """`step` becomes the engine's own, with the same arguments: a call from Python to Python would take a tenth of a small
        network's step."""
        self._engine = engine
        if type(self).step is Learner.step:
            self.__dict__["step"] = engine.step

    def _new_engine(self, online):
        warn = weakref.WeakMethod(self._warn)  # else a learner and its engine would wait for the garbage collector
        how = {"online": online, "lr": self.optimizer.lr, "on_unstable": lambda: (known := warn()) and known()}
        if self._plan.stepwise:
            return Stepwise(self.network, self._plan, self.loss_name, self._feedback, rng=self._rng, **how)
        plan = self._plan
        follows_h = online and plan.running and plan.types is not None and not isinstance(self.rule.mu, str)  # and nothing else
        if online and self.rule.follows and not follows_h:
            how["on_plan"] = self._follow_stream
        how |= {"h_mean": self._h_mean, "h_batches": self._h_batches, "follows_h": follows_h}
        return Engine(self.network, plan, self.loss_name, self._feedback, **how)

    # ------------------------------------------------------------ streaming

    def step(self, x, target=None, *, signal=None, learn=True) -> np.ndarray:
        """One time step, one call into C.

        Parameters
        ----------
        x : (n_in,) array of the network's dtype, C-contiguous
        target : (n_out,) array of the same dtype for mse, int for cross_entropy, optional
            The error is the gradient of the loss of this step.
        signal : (n_out,) array of the same dtype, optional
            dE/dy itself, in place of a target: a reward, an error from another program.
        learn : bool
            False: the step runs, keeps its traces and measures the loss, but adds no gradient.

        Returns
        -------
        y : (n_out,) array, the readout of this step (before its update)

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit or is not finite; nothing has changed.
        FloatingPointError
            If the readout is not finite; the weights have not changed, and the next step starts from rest.
        """
        return self._engine.step(x, target, signal=signal, learn=learn)

    def run(self, xs, targets=None, mask=None, *, learn=True, chunk=1) -> np.ndarray:
        """`step` over a stream, the same loop in C and the same numbers.

        Parameters
        ----------
        xs : (T, n_in) array
        targets : (T, n_out) array for mse; int (T,), or one int for the last step, for cross_entropy; optional
        mask : (T,) bool, optional
            The steps that have an error; default all, or the last for a single class.
        learn : bool
            As for `step`.
        chunk : int or "auto"
            With ``update="step"``: weights stand still for so many steps, then follow their gradient at once.
            Weights and traces are then passed over once a chunk, or every 32 steps of a longer one: with 32 and more
            `ModProp` with factor="exact" is two to three times as fast.  1 updates at every step.  "auto" chooses by
            the size of the network.  Without updates it changes numbers by rounding alone.

        Returns
        -------
        ys : (T, n_out) array

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit or is not finite; no step was made.
        FloatingPointError
            If a readout is not finite; the steps before it were made (of a chunk, none), and the next one starts from rest.
        KeyboardInterrupt
            After Ctrl-C; the steps (chunks) up to then were made, and the next one goes on from there.  (Rules in NumPy may
            be left within a step: `reset` them.)
        """
        network = self.network
        self._engine.must_stream("run")
        chunk = _chunk(chunk, network.n_rec)
        xs = checks.array("xs", xs, (None, network.n_in), network.dtype)
        if targets is None and mask is not None:
            raise ValueError("mask: expected targets with it, got none")
        trial = (None, None, None)
        if mask is not None and (shape := checks.read("mask", mask).shape) != (len(xs),):
            raise ValueError(f"mask: expected shape ({len(xs)},), got {shape}")
        if targets is not None:
            targets = checks.read("targets", targets)
            shapes = ((len(xs), network.n_out),) if self.loss_name == "mse" else ((), (len(xs),))
            if targets.shape not in shapes:
                raise ValueError(f"targets: expected shape {' or '.join(map(str, shapes))}, got {targets.shape}")
            trial = check_targets(self.loss_name, targets[None], mask, 1, len(xs), network.n_out, network.dtype).trial(0)
        chunk = min(chunk, max(len(xs), 2))
        ys = np.empty((len(xs), network.n_out), network.dtype)
        pool = self._threads() if self.threads > 1 and self._engine.shares_rows else None
        self._engine.run(xs, *trial, learn, ys, chunk if chunk > 1 else 0, pool=pool, threads=min(self.threads, _available()))
        return ys

    def weights_changed(self):
        """For a program that wrote into the weights through a bare address, which nothing else can notice.

        Before it reads or writes there it calls `Network.settle`: what was learned since somebody last asked for a weight may
        not be there yet.

        Raises
        ------
        RuntimeError
            If it is not: what was written there is lost, what was learned is not.
        """
        self._engine.must_be_idle("weights_changed")
        self._engine.forget_ahead()

    def reset(self):
        """Start a trial: state and traces to zero.  With ``refresh="update"`` the type means are taken from W anew."""
        self._engine.must_be_idle("reset")
        self._follow_weights()
        self._measure_stream()
        self._engine.reset()
        self._engine.since_plan = 0

    @property
    def latency(self) -> Latency:
        """How long each `step` takes: ``latency.start(deadline=1e-3)``, then p50, p99, max and misses."""
        return self._engine.latency

    @property
    def loss(self) -> float:
        """Loss of the last `step`, or the sum over the steps of the last `run`; 0 without a target."""
        return self._engine.loss

    @property
    def accumulated(self) -> dict[str, np.ndarray]:
        """The gradient that `apply` would use, by weight; a copy.  Sum over steps, with ``update="apply"``.

        With ``exact_steps`` a look is the end of a chunk: what comes is exact from there on.
        """
        return self._accumulated("accumulated")

    def _accumulated(self, call):
        if self.update == "step":
            raise RuntimeError(f"{call}: expected update='apply', got 'step', where no gradient adds up")
        self._engine.must_be_idle(call)
        self._engine.settle()
        return by_weight(self.network, self._engine.arrays)

    def apply(self):
        """One update by the optimizer with the accumulated gradient, which starts again from zero.

        Raises
        ------
        FloatingPointError
            If the norm of the gradient, or a weight after the update, is not finite; the weights have not changed.  A
            gradient that is itself not finite is dropped.
        ValueError
            If a weight array has become read-only; nothing has changed.
        """
        grads = self._accumulated("apply")
        try:
            self._update(grads)
        except FloatingPointError:
            if not all(np.isfinite(g).all() for g in grads.values()):
                self._engine.clear()
            raise
        self._engine.clear()
        self._follow_update()
        self._measure_stream()

    # ------------------------------------------------------------ trials

    def fit_trials(self, inputs, targets, mask=None, *, chunk="auto") -> float:
        """One update from B trials, each from rest, with the weights frozen until all are done.

        Memory does not depend on T, nor on B beyond the sixteen trials that a thread holds at most (with a rule that
        cannot stream: O(T N) per thread, of several trials while they fit into 64 MB).

        Parameters
        ----------
        inputs, targets, mask : as for `gradient`
        chunk : int or "auto"
            Steps that traces and gradient are advanced by at once, at most 32: a matter of speed alone.

        Returns
        -------
        loss : float, batch mean before the update

        Raises
        ------
        FloatingPointError
            If a readout, the gradient, or a weight after the update is not finite; the weights have not changed.
        ValueError
            If an argument does not fit, or a weight array has become read-only; the weights have not changed.
        """
        self._engine.must_be_idle("fit_trials")
        plan = self._plan
        offline = bool(plan.offline_because or (plan.stepwise and plan.has_adjoint))  # it is quicker than steps in NumPy
        loss, grads, seen = self._batch_gradient(inputs, targets, mask, offline, chunk)
        self._update(grads)
        self._follow_update()
        self._measure(seen)
        return loss

    def gradient(self, inputs, targets, mask=None, mode="online", *, chunk="auto") -> dict[str, np.ndarray]:
        """Gradient of the batch-mean loss as the rule sees it; nothing is updated.

        A rule that follows the weights follows them here too, as it does at a `reset`: a stream goes on with its filter of now.

        Parameters
        ----------
        inputs : (B, T, n_in) array
        targets : (B, T, n_out) array for mse; int (B, T), or (B,) for one class per trial, for cross_entropy
        mask : (T,) or (B, T) bool, optional
            The steps that have an error; default all, or the last where there is one class per trial.
        mode : {"online", "offline"}
            Forwards with traces, or backwards over the recorded trial (O(T N) memory): the same numbers.  `RTRL` and
            `UORO` go forwards in either.
        chunk : int or "auto"
            As for `fit_trials`, with mode "online".

        Returns
        -------
        dict of w_rec, w_in, w_out, b_out (and b_rec) arrays; 0 where no synapse may exist
        """
        self._engine.must_be_idle("gradient")
        checks.choice("mode", mode, ("online", "offline"))
        if mode == "online":
            self._engine.must_stream("gradient")
        return self._batch_gradient(inputs, targets, mask, mode == "offline", chunk)[1]

    def evaluate(self, inputs, targets, mask=None) -> Evaluation:
        """Loss, accuracy over the masked steps, and outputs on B trials; nothing is learned.

        Parameters
        ----------
        inputs, targets, mask : as for `gradient`
        """
        self._engine.must_be_idle("evaluate")
        network = self.network
        inputs, targets, weights = self._check_trials(inputs, targets, mask)
        outputs = np.empty((*inputs.shape[:2], network.n_out), network.dtype)

        def new():
            return Engine(network, Plan(), self.loss_name, online=True, sparse=False)

        loss = sum(engine.loss for engine in self._over_trials([], new, inputs, targets, weights, "evaluate", outputs))
        accuracy = None
        if self.loss_name == "cross_entropy":
            hits = outputs.argmax(axis=2) == targets.labels
            accuracy = float(hits.mean() if targets.mask is None else hits[targets.mask.astype(bool)].mean())
        return Evaluation(loss, accuracy, outputs)

    def _check_trials(self, inputs, targets, mask):
        network = self.network
        inputs = checks.array("inputs", inputs, (None, None, network.n_in), network.dtype)
        targets = check_targets(self.loss_name, targets, mask, *inputs.shape[:2], network.n_out, network.dtype)
        return inputs, targets, targets.weights(*inputs.shape[:2])

    def _batch_gradient(self, inputs, targets, mask=None, offline=False, chunk="auto"):
        """(loss, gradient by weight, what `_measure` takes)."""
        inputs, targets, weights = self._check_trials(inputs, targets, mask)
        window = min(_chunk(chunk, self.network.n_rec, frozen=True), MAX_WINDOW)
        self._follow_weights()

        def new():
            engine = Engine(self.network, self._plan, self.loss_name, self._feedback, h_mean=self._h_mean)
            engine.means = self._engine.means
            return engine

        for worker in self._workers:
            worker.reset()  # its trial is over: no traces that the filter of then has to bring up to date
            worker.means = self._engine.means
            if self.rule.follows:
                worker.follow(self._plan)
            worker.take_h()
        loss, total, seen = 0.0, None, []
        mode = "offline" if offline else "online"
        if self._plan.stepwise and not (offline and self._plan.has_adjoint):
            engines = self._one_by_one(inputs, targets, weights)
        else:
            engines = self._over_trials(self._workers, new, inputs, targets, weights, mode, window=window)
        for engine in engines:
            loss += engine.loss
            if total is None:
                total = {name: np.zeros_like(engine.arrays[name]) for name in Engine.GRADIENT}
            for name, part in total.items():
                part += engine.arrays[name]
            if self._plan.measures_h:
                seen.append(engine.take_h())
        return loss, by_weight(self.network, total), seen

    def _one_by_one(self, inputs, targets, weights):
        """The same for the rules that the kernels do not have: forwards, in the trials' order."""
        engine = self._new_engine(online=False)
        for i, xs in enumerate(inputs):
            engine.adjoint(xs, *targets.trial(i), weights[i])
            yield engine

    def _over_trials(self, engines, new, inputs, targets, weights, mode, outputs=None, window=1):
        """An engine for every trial in their order, after it has run; as many at a time as threads and memory allow.

        From four trials on, and if memory allows, several go through W together.  That, and nothing else,
        changes the order of additions: so it does not depend on the number of threads.
        """
        self.network.settle()
        n_trials, backwards, n_rec = len(inputs), mode == "offline", self.network.n_rec
        size = self.network.dtype.itemsize
        fit = min(MAX_TOGETHER, _STATE_BYTES // (size * n_rec**2 * (self._plan.rank + 1)))
        if backwards:
            fit = min(fit, MAX_TOGETHER // 2, _RECORD_BYTES // (size * 5 * n_rec * max(inputs.shape[1], 1)))  # half is quicker
        alone = min(n_trials, fit) < 4
        together = 1 if alone else min(fit, max(4, -(-n_trials // self.threads)))
        parts = [range(i, min(i + together, n_trials)) for i in range(0, n_trials, together)]
        while len(engines) < min(self.threads, len(parts)) * together:
            engines.append(new())
        for engine in engines:
            engine.window = window

        def one(engines, part):
            trials = [(inputs[i], *targets.trial(i), weights[i]) for i in part]
            ys = None if outputs is None else [outputs[i] for i in part]
            run_trials(engines, trials, mode != "evaluate", ys, alone=alone, backwards=backwards)
            return engines

        for first in range(0, len(parts), self.threads):
            wave = parts[first : first + self.threads]
            slots = [engines[k * together : k * together + len(part)] for k, part in enumerate(wave)]
            if len(wave) == 1:
                yield from one(slots[0], wave[0])
                continue
            futures = [self._threads().submit(one, *task) for task in zip(slots, wave)]
            try:
                wait(futures)
            except BaseException:  # Ctrl-C: they are still at work on these
                self._workers.clear()
                raise
            for future in futures:
                yield from future.result()

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool_of != os.getpid():  # a forked child has the executor but not its threads
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="modprop_fast")
            self._pool_of = os.getpid()
        return self._pool

    # ------------------------------------------------------------ updates

    def _update(self, grads):
        self.optimizer.update(dict(self.network.weights), grads, self._optimizer_state, self.iteration)
        self.network.constrain()
        self.iteration += 1

    def _follow_update(self):
        if self._plan.refresh_every and self.iteration % self._plan.refresh_every == 0:
            self._engine.refresh()
            if self.rule.follows:
                self._replan()
            self._check_filter()

    def _follow_weights(self):
        """What the user wrote into W counts for its means too, where these follow every update."""
        if self._plan.refresh_every == 1:
            before = self._engine.means
            self._engine.refresh()
            if self.rule.follows and self._planned_for != self.network._stamp[0]:
                try:
                    self._replan()
                except BaseException:
                    self._engine.means = before
                    raise

    def _follow_stream(self):
        """A stream that learns has no end at which to follow: a rule that follows does so from time to time."""
        every = self._plan.refresh_every
        due = bool(every) and (every == 1 or self._engine.updates - self._planned_at >= every)
        if self._plan.measures_h:
            self._measure_stream(due)
        elif due:
            self._replan()
        self._planned_for = -1  # for the filter's means: W may have been written into since

    def _replan(self, weights=True, h_mean=None):
        """The rule as it stands for this mean of h and, if `weights`, for these; its modulators go on from those before."""
        h_mean = self._h_mean if h_mean is None else h_mean
        evolved = self.rule.evolved(self.network, h_mean, self._engine.means, weights)
        plan = replace(self._plan, **evolved)
        self._h_mean[...] = h_mean
        self._follow_plan(plan.continuing(self._plan.v) if "v" in evolved else plan)
        if weights:
            self._planned_at = self._engine.updates
            # since when somebody may have written into them: at any time, where one holds an array
            self._planned_for = -1 if self._engine.held else int(self.network._stamp[0])

    def _follow_plan(self, plan):
        self._plan = plan
        self._engine.follow(plan)  # those of trials when these come

    def _measure_stream(self, weights=False):
        if self._plan.measures_h:
            self._measure([self._engine.take_h()], weights)

    def _measure(self, seen, weights=False):
        """Let the mean of h follow what was seen, (sum of h, steps) of each trial: first at once, then a tenth of the way."""
        totals, counts = zip(*seen) if seen else ((), ())
        if sum(counts):
            batches = self._h_batches[0] + 1
            mean = self._h_mean + (sum(totals) / sum(counts) - self._h_mean) * max(0.1, 1 / batches)
            self._replan(weights, mean)
            self._h_batches[0] = batches

    # ------------------------------------------------------------ filter

    @property
    def filter_radius(self) -> float:
        """rho(K), the spectral radius of the rule's filter: the memory of past activity decays only below 1.

        With mu="instant": of the last step's K, which may be above 1 now and then.
        """
        K, alone = self._filter()
        return max(_radius(K), alone)

    def _filter(self):
        """K, and the largest factor by which something is kept beside it."""
        plan, network = self._plan, self.network
        ends = plan.one_tap or plan.taps is not None  # then what is left is the eligibility trace
        if plan.rank and not ends:
            arrays = self._engine.arrays
            return arrays["K"], float(np.abs(arrays["self_drive"][0]).max()) if plan.types is not None else 0.0
        if plan.adjoint in ("exact", "mean", "running") and not ends:  # the whole of W
            return network.leak * np.eye(network.n_rec) + (1 - network.leak) * network.w_rec * plan.mu, 0.0
        return np.zeros((1, 1)), network.leak

    def _check_filter(self):
        if not self._warned:
            K, alone = self._filter()
            if not (alone < 1 and _decays(K)):
                self._warn()

    def _warn(self):
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"rho(K) = {self.filter_radius:.4g} >= 1: the filter's memory of past activity does not decay; "
                "choose a smaller mu or weaker recurrent weights",
                RuntimeWarning,
                stacklevel=3,
            )

    # ------------------------------------------------------------ state

    def __getstate__(self):
        """For pickle and copy.deepcopy: everything, in mid-stream too, but the threads and the times of `latency`."""
        state = self.__dict__ | {"_engine": self._engine.snapshot(), "_workers": [], "_pool": None, "_planned_for": -1}
        state |= {"_h_mean": self._h_mean.copy(), "_h_batches": self._h_batches.copy()}  # of the time of the engine's snapshot
        state.pop("step", None)
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        # what comes may be read-only, as memory that processes share is
        self._feedback = None if self._feedback is None else self._feedback.copy()
        self._h_mean, self._h_batches = self._h_mean.copy(), self._h_batches.copy()
        self._optimizer_state = {name: array.copy() for name, array in self._optimizer_state.items()}
        self._bind(self._new_engine(self.update == "step"))
        self._engine.take_over(state["_engine"])

    def state(self) -> dict[str, np.ndarray]:
        """All that evolves between trials besides the weights, by name: for checkpoints."""
        self._engine.must_be_idle("state")
        out = {"iteration": np.array(self.iteration), "updates": np.array(self._engine.updates)}
        if self._engine.means is not None:
            out["means"] = self._engine.means
        if self._feedback is not None:
            out["feedback"] = self._feedback.copy()
        if self._rng is not None:
            out["rng"] = np.array(json.dumps(self._rng.bit_generator.state, default=np.ndarray.tolist))
        if self._plan.measures_h:
            out |= {"h_mean": self._h_mean.copy(), "h_batches": np.array(self._h_batches[0])}
        if self.rule.follows:
            out |= {f"plan.{name}": array.copy() for name, array in self._plan.evolving().items()}
            out["planned_at"] = np.array(self._planned_at)
        return out | {f"optimizer.{name}": array.copy() for name, array in self._optimizer_state.items()}

    def restore(self, state):
        """Take over what `state` returned, of a learner made in the same way.

        Raises
        ------
        ValueError
            If the names, shapes or kinds differ from this learner's, or a number is not finite; nothing has changed.
        """
        self._engine.must_be_idle("restore")
        own = self.state()
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected what Learner.state returned, got {checks.describe(state)}")
        if state.keys() != own.keys():
            raise ValueError(f"state: expected {', '.join(sorted(own))}, got {', '.join(sorted(state))}")
        for name, array in own.items():
            if np.shape(state[name]) != array.shape:
                raise ValueError(f"state: expected {name} of shape {array.shape}, got {np.shape(state[name])}")
        given, counts = state, {}
        state = {n: checks.array(f"state: {n}", given[n], own[n].shape, own[n].dtype) for n in own.keys() - {"rng"}}
        for name in {"iteration", "updates", "h_batches", "planned_at"} & own.keys():
            counts[name] = checks.integer(f"state: {name}", np.asarray(given[name]).item(), least=0)
        if self._rng is not None:
            try:
                self._rng.bit_generator.state = json.loads(str(given["rng"]))
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                kind = type(self._rng.bit_generator).__name__
                raise ValueError(f"state: rng: expected the state of a {kind}, got {given['rng']!s:.40} ({error})") from None
        self.iteration, self._engine.updates = counts["iteration"], counts["updates"]
        if self._plan.measures_h:
            self._h_mean[...], self._h_batches[0] = state["h_mean"], counts["h_batches"]
        if self.rule.follows:
            self._follow_plan(replace(self._plan, **{name: state[f"plan.{name}"].copy() for name in self._plan.evolving()}))
            self._planned_for, self._planned_at = -1, counts["planned_at"]
        self._engine.means = state.get("means")
        if self._feedback is not None:
            self._feedback[...] = state["feedback"]
        for name, array in self._optimizer_state.items():
            array[...] = state[f"optimizer.{name}"]


def _radius(K) -> float:
    """rho(K); infinite where K is not finite."""
    return float(np.abs(np.linalg.eigvals(K.astype(float))).max()) if np.isfinite(K).all() else math.inf


def _decays(K) -> bool:
    """Whether rho(K) < 1, without eigenvalues, which would be a seventh of an iteration if K is N x N: squares K until its
    row sums fall below 1, or it has plainly not decayed."""
    K = K.astype(float)
    for _ in range(40):
        norm = np.abs(K).sum(axis=1).max()
        if norm < 1 or not norm < 1e100:
            return bool(norm < 1)
        K = K @ K
    return False


def _available() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunk(chunk, n_rec, frozen=False) -> int:
    """Steps per chunk.  While the weights stand still any number gives the same result, and the most is the quickest."""
    if isinstance(chunk, str) and chunk == "auto":
        return 32 if frozen else 16 if n_rec >= 256 else 1
    try:
        return checks.integer("chunk", chunk, least=1)
    except (TypeError, ValueError) as error:
        raise type(error)(f"chunk: expected an integer >= 1 or 'auto', got {checks.describe(chunk)}") from None


def _feedback(feedback, network, rng):
    """(n_rec, n_out) feedback matrix, or None for W_out^T."""
    if isinstance(feedback, str) and feedback == "symmetric":
        return None
    shape = (network.n_rec, network.n_out)
    if isinstance(feedback, str):
        return (checks.generator("rng", rng).normal(size=shape) / np.sqrt(network.n_rec)).astype(network.dtype)
    return checks.array("feedback", feedback, shape, network.dtype).copy()
