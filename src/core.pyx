"""The engine object: owns the state, checks what comes in, picks the kernels, runs them without the GIL."""

import os
from importlib import import_module

import numpy as np

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
from cpython.number cimport PyNumber_Index

from model cimport *

cdef extern from *:
    """
    #if defined(__clang__)
    #define MPF_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
    #define MPF_COMPILER "gcc " __VERSION__
    #else
    #define MPF_COMPILER "unknown compiler"
    #endif
    #if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
    /* __builtin_cpu_supports asks the processor and whether the system saves the wide registers. */
    static int mpf_cpu_is_v3(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    }
    #else
    static int mpf_cpu_is_v3(void) { return 0; }
    #endif
    """
    const char *MPF_COMPILER
    int mpf_cpu_is_v3()


# ---------------------------------------------------------------- instruction sets

def compiler() -> str:
    """Name and version of the compiler that built the engine."""
    return MPF_COMPILER.decode()


def available_isas() -> tuple[str, ...]:
    """Instruction sets that were built and that this processor runs, the widest last."""
    found = ["baseline"]
    if mpf_cpu_is_v3():
        try:
            import_module("modprop_fast._kernels_v3")
            found.append("v3")
        except ImportError:
            pass  # not built for this platform
    return tuple(found)


def isa() -> str:
    """Instruction set that a new engine uses: the widest, or the one named by MODPROP_FAST_ISA."""
    available = available_isas()
    forced = os.environ.get("MODPROP_FAST_ISA")
    if forced is None:
        return available[-1]
    if forced not in available:
        raise ValueError(f"MODPROP_FAST_ISA: expected one of {', '.join(available)} on this machine, got {forced!r}")
    return forced


# ---------------------------------------------------------------- what comes in

def describe(value) -> str:
    """What came, for an error message."""
    if isinstance(value, np.ndarray):
        order = "" if value.flags.c_contiguous else ", not C-contiguous"
        return f"{value.dtype} array of shape {value.shape}{order}"
    return f"{type(value).__name__} {value!r:.60}"


def _first_bad(name, values):
    """The sentence for an array that is not finite."""
    values = np.asarray(values)
    at = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
    return f"{name}: expected finite values, got {values[at]} at index {at[0] if len(at) == 1 else at}"


cdef void *address(array) except? NULL:
    """Where an array that the engine allocated, or has checked, begins."""
    return NULL if array is None or array.size == 0 else <void *><size_t>array.ctypes.data


def aligned(shapes, dtype):
    """Zeroed arrays of `dtype`, each on a 64-byte boundary, carved from one allocation.

    Parameters
    ----------
    shapes : dict of name -> shape
    dtype : anything that names a dtype

    Returns
    -------
    dict of name -> C-contiguous array
    """
    dtype = np.dtype(dtype)
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, shape in shapes.items()}
    block = np.zeros(sum(-(-size // 64) * 64 for size in sizes.values()) + 64, np.uint8)
    at = -block.ctypes.data % 64
    arrays = {}
    for name, shape in shapes.items():
        arrays[name] = block[at : at + sizes[name]].view(dtype).reshape(shape)
        at += -(-sizes[name] // 64) * 64
    return arrays


cdef class Engine:
    """One network bound to one rule: its state, its traces, and the kernels that advance them.

    The public face is `modprop_fast.Learner`; this class checks the two hot calls and trusts the rest.

    Parameters
    ----------
    network : Network
        Its arrays are bound, not copied.
    plan : Plan
        What `rule.plan(network)` says.
    loss : {"mse", "cross_entropy"}
    feedback : (n_rec, n_out) array of the network's dtype, or None for symmetric
    online : bool
        Descend by `lr` at every step with an error; otherwise the gradient is accumulated in `arrays`.
    on_unstable : callable, optional
        Called after a step that left the filter with rho(K) >= 1.
    """

    cdef Model m
    cdef const Kernels *kernels
    cdef object network, plan, feedback, copy_y
    cdef readonly dict arrays  # state, scratch and gradient by name
    cdef dict constants  # of other dtypes
    cdef char format
    cdef bint busy, streams
    cdef readonly object y  # (n_out,) readout of the last step, overwritten by the next
    cdef object on_unstable

    GRADIENT = ("grad", "grad_w_out", "grad_b_out")

    def __init__(self, network, plan, loss, feedback=None, *, bint online=False, double lr=0.0, on_unstable=None):
        cdef Model *m = &self.m
        self.network, self.plan, self.feedback, self.on_unstable = network, plan, feedback, on_unstable
        self.streams = not plan.offline_because
        cdef bint double_precision = network.dtype == np.float64
        cdef size_t tables = import_module(f"modprop_fast._kernels_{isa()}").table()
        self.kernels = <const Kernels *>tables + double_precision
        self.format = b"d" if double_precision else b"f"

        m.n_in, m.n_rec, m.n_out = network.n_in, network.n_rec, network.n_out
        m.rank = plan.rank
        m.n_class = plan.rank
        sources = m.n_rec + m.n_in + ("b_rec" in network.weights)
        m.stride = -(-sources // LANES) * LANES
        m.activation = {"relu": RELU, "softplus": SOFTPLUS, "tanh": TANH, "sigmoid": SIGMOID, "identity": IDENTITY}[
            network.activation
        ]
        m.loss = {"mse": MSE, "cross_entropy": CROSS_ENTROPY}[loss]
        m.trace = {"none": TRACE_NONE, "exact": TRACE_EXACT, "mean": TRACE_MEAN}[plan.trace]
        m.online, m.autapses = online, network.autapses
        m.self_modulation, m.refresh_every = plan.self_modulation, plan.refresh_every
        m.leak, m.lr, m.scale = network.leak, lr, 1.0
        self._bind_weights()
        self._allocate()
        self._set_modulation()
        self.reset()

    cdef _bind_weights(self):
        cdef Model *m = &self.m
        weights = self.network.weights
        m.w_rec, m.w_in = address(weights["w_rec"]), address(weights["w_in"])
        m.w_out, m.b_out = address(weights["w_out"]), address(weights["b_out"])
        m.b_rec = address(weights.get("b_rec"))
        m.mask = <unsigned char *>address(self.network.mask)
        m.feedback = address(self.feedback)

    cdef _allocate(self):
        """Every array that a step touches, in one block of memory."""
        cdef Model *m = &self.m
        N, Q, r, C, n_out = m.n_rec, m.stride, m.rank, m.n_class, m.n_out
        rows = {TRACE_NONE: 0, TRACE_EXACT: N, TRACE_MEAN: C}[m.trace]
        kept = 0 if m.online else N
        a = self.arrays = aligned(
            {
                "pre": (Q,), "v": (N,), "h": (N,), "h_before": (N,), "eps": (Q,), "eps_before": (Q,),
                "traces": (rows, r, Q), "self_traces": (0 if m.self_modulation else C, Q),
                "current": (N,), "input": (max(N, r),), "y": (n_out,), "error": (n_out,), "signal": (N,),
                "local": (N,), "modulator": (r,), "row": (Q,), "masked": (Q,), "zeros": (Q,), "spare": (Q,),
                 "class_rows": (C, Q), "class_eps": (0 if m.self_modulation else C, Q), "old": (r, LANES),
                "grad": (kept, Q), "grad_w_out": (n_out, kept), "grad_b_out": (n_out,),
                "column_sums": (r, Q), "u": (N, r), "K": (r, r), "drive": (N, r), "class_drive": (C, r),
                "readout": (N, C), "self_drive": (2, C),
            },
            self.network.dtype,
        )  # fmt: skip
        self.y, self.copy_y = a["y"], a["y"].copy
        m.pre, m.v, m.h, m.h_before = address(a["pre"]), address(a["v"]), address(a["h"]), address(a["h_before"])
        m.eps, m.eps_before = address(a["eps"]), address(a["eps_before"])
        m.traces, m.self_traces = address(a["traces"]), address(a["self_traces"])
        m.current, m.input, m.y, m.error = address(a["current"]), address(a["input"]), address(a["y"]), address(a["error"])
        m.signal, m.local, m.modulator = address(a["signal"]), address(a["local"]), address(a["modulator"])
        m.row, m.masked, m.zeros, m.spare = address(a["row"]), address(a["masked"]), address(a["zeros"]), address(a["spare"])
        m.sign, m.old = address(a["zeros"] if self.network.sign is None else self.network.sign), address(a["old"])
        m.class_rows, m.class_eps = address(a["class_rows"]), address(a["class_eps"])
        m.grad, m.grad_w_out, m.grad_b_out = address(a["grad"]), address(a["grad_w_out"]), address(a["grad_b_out"])
        m.column_sums, m.u, m.K, m.drive = address(a["column_sums"]), address(a["u"]), address(a["K"]), address(a["drive"])
        m.class_drive, m.readout, m.self_drive = address(a["class_drive"]), address(a["readout"]), address(a["self_drive"])

    cdef _set_modulation(self):
        """Types: the constants of the mean matrix.  Low rank: the filter itself, which does not follow W."""
        cdef Model *m = &self.m
        plan, a = self.plan, self.arrays
        r, C = m.rank, m.n_class
        c = self.constants = aligned({"size": (r,), "mu": (r,), "means": (r, r), "power": (2, r, r)}, np.float64)
        m.type_size, m.type_mu = <double *>address(c["size"]), <double *>address(c["mu"])
        m.means, m.power = <double *>address(c["means"]), <double *>address(c["power"])
        if plan.types is not None:
            c["type"] = np.ascontiguousarray(plan.types, np.intc)
            m.type = <int *>address(c["type"])
            c["size"][:] = np.bincount(plan.types, minlength=r)
            c["mu"][:] = plan.mu
            self.kernels.refresh(m)
        elif r:
            k, V, mu = m.leak, plan.v, np.broadcast_to(plan.mu, m.n_rec)
            a["u"][:] = plan.u
            a["K"][:] = k * np.eye(r) + (1 - k) * (V * mu) @ plan.u
            a["drive"][:] = (1 - k) * V.T
            a["class_drive"][:] = (1 - k) * np.eye(C)
            a["readout"][:] = (V * mu).T

    # ------------------------------------------------------------ modulation

    @property
    def means(self):
        """(C, C) type means of W as the filter uses them, a copy; None for other modulations."""
        return self.constants["means"].copy() if self.m.type != NULL else None

    @means.setter
    def means(self, values):
        if self.m.type != NULL:
            self.constants["means"][:] = values
            self.kernels.derive(&self.m)

    def refresh(self):
        """Let the type means follow W as it stands."""
        if self.m.type != NULL:
            self.kernels.refresh(&self.m)

    @property
    def updates(self) -> int:
        """Updates so far: of the weights at every step, or as counted by the learner."""
        return self.m.updates

    @updates.setter
    def updates(self, Py_ssize_t count):
        self.m.updates = count

    @property
    def loss(self) -> float:
        """Loss of the last step or run, times `scale`."""
        return self.m.loss_sum

    # ------------------------------------------------------------ steps

    def reset(self):
        """State and traces at the start of a trial."""
        self.kernels.reset(&self.m)

    def clear(self):
        """Accumulated gradient to zero."""
        for name in self.GRADIENT:
            self.arrays[name][...] = 0

    def must_stream(self, str call):
        """Refuse a rule that needs the whole trial."""
        if not self.streams:
            raise ValueError(f"{call}: {self.plan.offline_because}; use gradient(mode='offline') or fit_trials")

    cdef int _acquire(self, Py_buffer *view, value, str name, Py_ssize_t n) except -1:
        """A (n,) C-contiguous buffer of the network's dtype, or one sentence."""
        cdef bint held = False
        try:
            PyObject_GetBuffer(value, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
            held = True
        except (TypeError, ValueError, BufferError):
            pass
        if held:
            if view.ndim == 1 and view.shape[0] == n and view.format[0] == self.format and view.format[1] == 0:
                return 0
            PyBuffer_Release(view)
        same_type = held and np.asarray(value).dtype == self.network.dtype
        error = ValueError if same_type or (isinstance(value, np.ndarray) and value.dtype == self.network.dtype) else TypeError
        raise error(f"{name}: expected a C-contiguous {self.network.dtype} array of shape ({n},), got {describe(value)}")

    def step(self, x, target=None, signal=None, bint learn=True):
        """`Learner.step`."""
        cdef Py_buffer x_view, t_view
        cdef ErrorSource source = FROM_NOTHING
        cdef long long label = 0
        cdef const void *aim = NULL
        cdef int status
        if self.busy:
            raise RuntimeError("step: this learner is already running in another thread; give each thread its own")
        if not self.streams:
            self.must_stream("step")
        if signal is not None:
            if target is not None:
                raise ValueError("step: expected a target or a signal, got both")
            source = FROM_SIGNAL
        elif target is not None:
            if self.m.loss == CROSS_ENTROPY:
                source = FROM_LABEL
                label = self._label(target)
            else:
                source = FROM_TARGET
        self._acquire(&x_view, x, "x", self.m.n_in)
        if source == FROM_SIGNAL or source == FROM_TARGET:
            try:
                if source == FROM_SIGNAL:
                    self._acquire(&t_view, signal, "signal", self.m.n_out)
                else:
                    self._acquire(&t_view, target, "target", self.m.n_out)
            except BaseException:
                PyBuffer_Release(&x_view)
                raise
            aim = t_view.buf
        self.busy = True
        self.m.loss_sum = 0
        with nogil:
            status = self.kernels.step(&self.m, x_view.buf, aim, label, source, learn)
        self.busy = False
        PyBuffer_Release(&x_view)
        if aim != NULL:
            PyBuffer_Release(&t_view)
        if status != OK:
            if status == X_NOT_FINITE:
                raise ValueError(_first_bad("x", x))
            if status == TARGET_NOT_FINITE:
                raise ValueError(_first_bad("target" if signal is None else "signal", target if signal is None else signal))
            if status == LABEL_OUT_OF_RANGE:
                raise ValueError(f"target: expected a class in 0..{self.m.n_out - 1}, got {label}")
            raise FloatingPointError(f"step: expected a finite readout, got {self.y}; the weights were left as they were")
        if self.m.unstable and self.on_unstable is not None:
            self.on_unstable()
        return self.copy_y()

    cdef long long _label(self, target) except? -1:
        try:
            return PyNumber_Index(target)
        except TypeError:
            raise TypeError(f"target: expected a class, an integer in 0..{self.m.n_out - 1}, got {describe(target)}") from None

    def run(self, xs, target, label, mask, bint learn, ys=None):
        """`step` over checked arrays: xs (T, n_in), target (T, n_out) or label (T,), mask (T,); None where absent.

        Returns the sum of the losses, each times `scale`.
        """
        cdef Trials trial = self._trials(xs, target, label, mask)
        cdef int status
        trial.learn, trial.y = learn, address(ys)
        self._enter("run")
        with nogil:
            status = self.kernels.run(&self.m, &trial)
        self.busy = False
        self._check(status, &trial)
        if self.m.unstable and self.on_unstable is not None:
            self.on_unstable()
        return self.m.loss_sum

    def gradient(self, xs, target, label, mask, double scale, bint offline):
        """Add the gradient of one trial, from rest, to the accumulated one; returns its loss, both times `scale`.

        Online: the stream of steps itself.  Offline: the adjoint form, O(T (N + Q)) memory.
        """
        self.reset()
        self.m.scale = scale
        try:
            if not offline:
                return self.run(xs, target, label, mask, True)
            return self._adjoint(xs, target, label, mask)
        finally:
            self.m.scale = 1.0

    cdef _adjoint(self, xs, target, label, mask):
        cdef Trials trial = self._trials(xs, target, label, mask)
        cdef Record rec
        cdef int status
        cdef Adjoint kind = {"none": ADJOINT_NONE, "exact": ADJOINT_EXACT, "mean": ADJOINT_MEAN, "bptt": ADJOINT_BPTT}[
            self.plan.adjoint
        ]
        cdef bint cells = self.plan.cells
        T, N, Q, dtype = len(xs), self.m.n_rec, self.m.stride, self.network.dtype
        pre, eps = np.empty((2, T, Q), dtype)
        h, signal, rows = np.empty((3, T, N), dtype)
        mu = np.ascontiguousarray(self.plan.mu_of_units(N), dtype)
        rec.pre, rec.eps, rec.h = address(pre), address(eps), address(h)
        rec.signal, rec.rows = address(signal), address(rows)
        cdef const void *mu_data = address(mu)
        self._enter("gradient")
        with nogil:
            status = self.kernels.record(&self.m, &trial, &rec)
            if status == OK:
                self.kernels.adjoint(&self.m, &rec, kind, cells, mu_data, trial.n_steps)
        self.busy = False
        self._check(status, &trial)
        return self.m.loss_sum

    cdef Trials _trials(self, xs, target, label, mask):
        cdef Trials trial
        trial.n_steps, trial.steps_done = len(xs), 0
        trial.x, trial.target = address(xs), address(target)
        trial.label, trial.mask = <const long long *>address(label), <const unsigned char *>address(mask)
        trial.learn, trial.y = True, NULL
        return trial

    cdef _enter(self, str call):
        if self.busy:
            raise RuntimeError(f"{call}: this learner is already running in another thread; give each thread its own")
        self.busy = True
        self.m.loss_sum = 0

    cdef _check(self, int status, Trials *trial):
        if status != OK:
            raise FloatingPointError(f"run: expected a finite readout, got {self.y} at step {trial.steps_done}")
