"""The engine object: owns the state, checks what comes in, picks the kernels, runs them without the GIL."""

import math
import mmap
import os
from importlib import import_module

import numpy as np

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.number cimport PyNumber_Index
from cpython.ref cimport PyObject
from libc.string cimport memcpy, memset

from model cimport *

cimport numpy as cnp

from modprop_fast.checks import describe, number

cnp.import_array()

cdef extern from "Python.h":
    """
    /* Whether this is the interpreter's only thread: nobody waits for the GIL. */
    static inline int mpf_alone(void) {
        PyThreadState *own = PyThreadState_Get();
        return PyInterpreterState_ThreadHead(PyInterpreterState_Get()) == own && PyThreadState_Next(own) == NULL;
    }
    """
    Py_ssize_t Py_REFCNT(PyObject *) noexcept nogil
    bint mpf_alone()

cdef enum:
    PAGE = 4096  # bytes of memory
    WINDOW_ONLINE = 4  # measured: more reads of recent traces cost what fewer writes of old ones save
    WINDOW_DEFERRED = 8  # of less than 256 units; of more, WINDOW
    WINDOW = 16
    TEAM_FROM = 768  # units, measured with two threads: `exact` is 1.2 times as fast, 1.5 at 2048; `mean` 1.2 and 1.6
    TEAM_STEPS = 8  # fewer are over before the others have come
    HEARS_EVERY = 20000000  # ns: how often, at most, `run` looks whether Ctrl-C has come
    PLAN_EVERY_N = 1000  # PLAN_EVERY, below
    BRIEF = 128  # units up to which a step keeps the GIL if nobody wants it: giving it away takes 0.08 us

cdef enum Heed:  # what may have become of the weights since the last step: learned by others, not as the mask says, held or let go
    THEIRS, UNMASKED, PLACE

MAX_WINDOW = SLOTS - 1
PLAN_EVERY = PLAN_EVERY_N  # steps of a stream between plans of a rule that follows the weights or the activity
# Where an engine that is online keeps the connections that may exist alone: from so many units on, below that density.  Time of a step by
# that of all N x N by unit, at N = 256, 512, 1024, with 512-bit registers: density 0.1, exact 0.63, 0.35, 0.20; mean 1.15, 0.73, 0.54; e-prop
# 1.18, 0.72, 0.55; 0.2, exact 0.83, 0.55, 0.39; mean 1.45, 1.05, 0.98; e-prop 1.58, 1.03, 0.93; 0.3, exact 1.00, 0.72, 0.59.  With 256-bit
# ones: density 0.2, exact 0.60, 0.44, 0.28; mean 0.91, 0.80, 0.71; e-prop 1.04, 0.70, 0.72; 0.3, exact 0.75, 0.60, 0.45; mean 1.21, 1.00,
# 1.04.  Smaller networks write all at every step (`MASKED_AT_ONCE`), by which these took, at N = 64, 128, 192, exact, density 0.1, 1.7, 1.3,
# 0.7; 256-bit, 1.0, 0.7, 0.4; 0.3, 2.1, 1.6, 1.4.  Rules with other traces never do.
SPARSE = {"exact": (160, 0.4), "mean": (256, 0.2), "none": (256, 0.2)}

# Bytes of weights up to which every step writes all (pending.pxi); the updates of more wait.  Twice as many
# where no source is silent.  Measured with relu and 512-bit registers, time of a step by that with a window of 8, at N = 16, 32, 64, 96, 128,
# 160 (1, 5, 18, 39, 68, 105 KB): exact 0.45, 0.45, 0.63, 0.79, 0.88, 1.10; mean 0.75, 0.77, 0.79, 0.90, 0.97, 1.13; e-prop 0.69, 0.71, 0.81,
# 1.01, 1.13, 1.20.  With 256-bit ones: exact 0.46, 0.53, 0.75, 0.94, 1.12, 1.33; mean 0.72, 0.70, 0.76, 0.83, 0.91, 0.96; e-prop 0.64, 0.65,
# 0.73, 0.86, 0.94, 0.96; tanh at N = 64, 128, 192: exact 0.72, 0.93, 1.13; mean 0.75, 0.82, 0.84; e-prop 0.73, 0.81, 0.88.
AT_ONCE = 40 << 10

# The same of weights that have signs, or a mask, to keep, whose updates cannot wait: larger ones lie by unit (traces.pxi).  Time of a step
# by that, at N = 32, 64, 128, 192, 256, 384, 512, with 512-bit registers: signs, exact 0.45, 0.51, 0.66, 0.80, 0.90, 0.89, 0.88; mean 0.55,
# 0.53, 0.64, 0.78, 0.81, 0.90, 0.90; e-prop 0.46, 0.44, 0.57, 0.56, 0.69, 0.65, 0.76; a mask, exact 0.45, 0.55, 0.74, 0.90, 1.12; mean 0.54,
# 0.55, 0.69, 0.82, 0.92, 1.14; e-prop 0.52, 0.50, 0.66, 0.63, 0.99, 1.19.  With 256-bit ones: signs, exact 0.57, 0.70, 0.85, 1.02, 1.10, 0.95,
# 1.12; mean 0.65, 0.72, 0.86, 1.01, 1.10, 1.04, 1.08; e-prop 0.54, 0.56, 0.69, 0.69, 0.97, 0.76, 0.83; a mask, exact 0.60, 0.76, 0.98, 1.14;
# mean 0.66, 0.79, 0.89, 1.08; e-prop 0.54, 0.60, 0.75, 0.80.
SIGNED_AT_ONCE = 1 << 20
MASKED_AT_ONCE = 160 << 10

include "machine.pxi"
include "latency.pxi"


# ---------------------------------------------------------------- what comes in

def _first_bad(name, values):
    """The sentence for an array that is not finite."""
    values = np.asarray(values)
    at = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
    return f"{name}: expected finite values, got {values[at]} at index {at[0] if len(at) == 1 else at}"


include "memory.pxi"
include "arrangement.pxi"


cdef class Engine(_Arrangement):
    """One network bound to one rule: its state, its traces, and the kernels that advance them.

    The public face is `modprop_fast.Learner`; this class checks what `step` is given and trusts the rest.

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
    sparse : bool
        Whether an engine that is online may keep the connections that exist alone, if they are few.
    on_unstable : callable, optional
        Called after a step that left the filter with rho(K) >= 1.
    on_plan : callable, optional
        Called in a stream after every PLAN_EVERY steps: time for another plan.
    h_mean, h_batches : (n_rec,) float64 and (1,) int64 arrays, optional
        The running mean of h, of so many stretches of a stream or batches, for ``plan.running``: the learner's own; default 1/2.
    follows_h : bool
        After every PLAN_EVERY steps of a stream `h_mean` follows what they showed, and the filter follows it: no other plan is needed.
    """

    cdef Team team
    cdef long long *stamp  # of the network: changes whenever somebody may write into its weights
    cdef long long seen
    cdef PyObject *w_rec
    cdef PyObject *w_in
    cdef PyObject *b_rec
    cdef PyObject *block
    cdef object __weakref__
    cdef Py_ssize_t n_weights
    cdef char format
    cdef int type_number
    cdef int calls  # of a team, so far
    cdef object failed  # what `_heed` caught
    cdef int busy  # taken and released by `mpf_take` and `mpf_release`: the C face does not hold the GIL
    cdef int brief  # not 0: it is settled or reset by a thread that keeps the GIL meanwhile, and whoever took `busy` waits
    cdef bint streams
    cdef readonly Latency latency
    cdef readonly object y  # (n_out,) readout of the last step, overwritten by the next
    cdef object given, given_before  # what the last two steps returned
    cdef int given_flags
    cdef object on_unstable, on_plan, h_batches
    cdef bint follows_h
    cdef object recorded  # arrays of `_record`, for the next trial too
    cdef public Py_ssize_t since_plan  # steps

    GRADIENT = ("grad", "grad_w_out", "grad_b_out")

    def __init__(self, network, plan, loss, feedback=None, *, bint online=False, double lr=0.0, bint sparse=True, on_unstable=None,
                 on_plan=None, h_mean=None, h_batches=None, bint follows_h=False):
        cdef Model *m = &self.m
        cdef bint double_precision = network.dtype == np.float64
        cdef size_t kernels = import_module(f"modprop_fast._kernels_{isa()}_{'f64' if double_precision else 'f32'}").table()
        super().__init__(network, plan, loss, feedback, online, lr, sparse)
        self.kernels = <const Kernels *>kernels
        self.format, self.type_number = b"d" if double_precision else b"f", network.dtype.num
        self.on_unstable, self.on_plan, self.follows_h = on_unstable, on_plan, follows_h
        self.h_mean = np.full(network.n_rec, 0.5) if h_mean is None else h_mean
        self.h_batches = np.zeros(1, np.int64) if h_batches is None else h_batches
        m.h_mean, m.h_batches = <double *>address(self.h_mean), <long long *>address(self.h_batches)
        self.streams = not plan.offline_because
        self.latency, self.y = Latency(), self.arrays["y"]
        self._watch_weights()
        self._set_modulation()
        self.window = self._usual_window() if online else WINDOW
        self.reset()
        self._defer(m.may_defer)
        if m.may_defer or m.sparse:
            network.settled_by(self)

    def __del__(self):
        if self.m.deferred or self.m.unwritten:
            self.settle()

    cdef _watch_weights(self):
        """What tells whether others may see or write them, see `_notice_writes`."""
        weights = self.network.weights
        self.stamp = <long long *>address(self.network._stamp)
        self.w_rec, self.w_in = <PyObject *>weights["w_rec"], <PyObject *>weights["w_in"]
        self.b_rec = <PyObject *>weights["b_rec"] if "b_rec" in weights else NULL
        self.block = <PyObject *>weights["w_rec"].base
        self.n_weights = len(weights)

    # ------------------------------------------------------------ copies

    def snapshot(self) -> dict:
        """All that a step reads or leaves behind, as copies; no addresses."""
        cdef Model *m = &self.m
        if mpf_take(&self.busy):
            self._refuse("copy")
        try:
            if m.deferred or m.unwritten:
                flushed(m, self.kernels.settle)  # the weights go with the network
            m.ahead = m.counted = m.turned = False  # nor in the copy: the weights may have been written into since the last step
            numbers = (m.window, m.n_groups, m.t, m.h_count, m.updates, m.loss_sum, m.follows, m.summed, m.unstable,
                       m.deferred, m.owed_until, self.since_plan, m.lazy, m.always_from)
            arrays = {name: a.copy() for name, a in (self.constants | self.arrays).items() if name not in ("terms", "w_rows", "keep_rows")}
            return {"numbers": numbers, "sparse": m.sparse, "arrays": arrays}
        finally:
            mpf_release(&self.busy)

    def take_over(self, snapshot):
        """Go on where another engine of the same make was."""
        cdef Model *m = &self.m
        if m.sparse and not snapshot["sparse"]:
            self._unpack()
        if m.may_defer:
            self._make_room("by_source" in snapshot["arrays"])
            self._make_room(not snapshot["arrays"]["traces"].size)
        m.ahead = m.counted = m.turned = False
        (m.window, m.n_groups, m.t, m.h_count, m.updates, m.loss_sum, m.follows, m.summed, m.unstable,
         m.deferred, m.owed_until, self.since_plan, m.lazy, m.always_from) = snapshot["numbers"]
        self._bind_places()
        own = self.constants | self.arrays
        for name, a in snapshot["arrays"].items():
            if own[name].shape == a.shape:  # else that of a gradient by chunks, which is zero between them
                own[name][...] = a
        self._tell_writes()

    @property
    def loss(self) -> float:
        """Loss of the last step or run, times `scale`."""
        return self.m.loss_sum

    # ------------------------------------------------------------ steps

    cdef bint _briefly(self, void (*work)(Model *m) noexcept nogil) noexcept:
        """Do that while no other thread may start; False: one runs this engine."""
        cdef bint idle
        mpf_add(&self.brief, 1)
        idle = not mpf_read(&self.busy)
        if idle:
            flushed(&self.m, work)
        mpf_add(&self.brief, -1)
        return idle

    def refresh(self):
        """Let the type means follow W as it stands."""
        self._enter("refresh")
        try:
            if self.m.type != NULL:
                self._notice()
                flushed(&self.m, self.kernels.refresh)
        finally:
            mpf_release(&self.busy)

    def reset(self):
        """State and traces at the start of a trial."""
        if not self._briefly(self.kernels.reset):
            self._refuse("reset")

    def settle(self):
        """Write what lags behind: the accumulated gradient, or updates that have been felt but not written."""
        self._briefly(self.kernels.settle)  # or it settles when it is done

    def clear(self):
        """Accumulated gradient to zero."""
        flushed(&self.m, self.kernels.settle)
        for name in self.GRADIENT:
            self.arrays[name][...] = 0

    def must_stream(self, str call):
        """Refuse a rule that needs the whole trial."""
        if not self.streams:
            raise ValueError(f"{call}: {self.plan.offline_because}; use gradient(mode='offline') or fit_trials")

    cdef int _acquire(self, Py_buffer *view, value, str name, Py_ssize_t n) except -1:
        """A (n,) C-contiguous buffer of the network's dtype, or one sentence.  An array is looked at, not asked: it is quicker."""
        cdef bint held = False
        if (cnp.PyArray_CheckExact(value) and cnp.PyArray_TYPE(value) == self.type_number and cnp.PyArray_NDIM(value) == 1
                and cnp.PyArray_DIM(value, 0) == n and cnp.PyArray_ISCARRAY_RO(value)):
            view.buf = cnp.PyArray_DATA(value)
            return 0
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
        order = ", not C-contiguous" if isinstance(value, np.ndarray) and not value.flags.c_contiguous else ""
        raise error(f"{name}: expected a C-contiguous {self.network.dtype} array of shape ({n},), got {describe(value)}{order}")

    def must_be_idle(self, str call):
        """Refuse a call while another thread runs this engine."""
        if mpf_read(&self.busy):
            self._refuse(call)

    def step(self, x, target=None, *, signal=None, bint learn=True):
        """`Learner.step`."""
        cdef Py_buffer x_view, t_view
        cdef ErrorSource source = FROM_NOTHING
        cdef long long label = 0
        cdef const void *aim = NULL
        cdef int status
        cdef double loss
        cdef long long began = mpf_now() if self.latency.on else 0
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
        memset(&x_view, 0, sizeof(x_view))  # without an owner there is nothing to release
        memset(&t_view, 0, sizeof(t_view))
        try:
            self._acquire(&x_view, x, "x", self.m.n_in)
            if source == FROM_SIGNAL or source == FROM_TARGET:
                self._acquire(&t_view, target if signal is None else signal, "target" if signal is None else "signal", self.m.n_out)
                aim = t_view.buf
            self._enter("step")
            try:
                self._notice()
                loss, self.m.loss_sum = self.m.loss_sum, 0
                if self.m.n_rec <= BRIEF and mpf_alone():
                    status = self._advance(x_view.buf, aim, label, source, learn)
                else:
                    with nogil:
                        status = self._advance(x_view.buf, aim, label, source, learn)
                self._tell_writes()
                if status != OK:
                    self.m.loss_sum = loss
            finally:
                mpf_release(&self.busy)
        finally:
            PyBuffer_Release(&x_view)
            PyBuffer_Release(&t_view)
        if status != OK:
            if status == X_NOT_FINITE:
                raise ValueError(_first_bad("x", x))
            if status == TARGET_NOT_FINITE:
                raise ValueError(_first_bad("target" if signal is None else "signal", target if signal is None else signal))
            if status == LABEL_OUT_OF_RANGE:
                raise ValueError(f"target: expected a class in 0..{self.m.n_out - 1}, got {label}")
            raise FloatingPointError(f"step: expected a finite readout, got {self.y}; the weights were left as they were, the next step starts from rest")
        if self.m.unstable and self.on_unstable is not None:
            self.on_unstable()
        if self.follows_h or self.on_plan is not None:
            self._count(1)
        y = self._answer()
        if self.latency.on:
            self.latency.note(mpf_now() - began)
        return y

    cdef inline int _advance(self, const void *x, const void *aim, long long label, ErrorSource source, bint learn) noexcept nogil:
        cdef unsigned long long fp = mpf_flush()
        cdef int status = self.kernels.step(&self.m, <const real *>x, <const real *>aim, label, source, learn)
        mpf_unflush(fp)
        return status

    cdef _answer(self):
        """y, in an array of the caller's own.  The last but one is given again if nobody has kept it: NumPy takes 0.1 us to make one."""
        cdef cnp.npy_intp n_out = self.m.n_out
        y = self.given_before
        self.given_before = self.given
        if y is None or Py_REFCNT(<PyObject *>y) > 1 or cnp.PyArray_FLAGS(y) != self.given_flags or cnp.PyArray_NDIM(y) != 1 or (
                cnp.PyArray_TYPE(y) != self.type_number or cnp.PyArray_DIM(y, 0) != n_out):
            y = cnp.PyArray_EMPTY(1, &n_out, self.type_number, 0)
            self.given_flags = cnp.PyArray_FLAGS(y)
        memcpy(cnp.PyArray_DATA(y), self.m.y, n_out * cnp.PyArray_ITEMSIZE(y))
        self.given = y
        return y

    cdef long long _label(self, target) except? -1:
        try:
            return PyNumber_Index(target)
        except (TypeError, OverflowError):
            raise TypeError(f"target: expected a class, an integer in 0..{self.m.n_out - 1}, got {describe(target)}") from None

    cdef _count(self, Py_ssize_t n_steps):
        self.since_plan += n_steps
        if self.since_plan >= PLAN_EVERY_N:
            self.since_plan = 0
            if self.follows_h:
                self._briefly(self.kernels.follow_h)  # while another thread runs it: next time
            else:
                self.on_plan()

    cdef inline int _notice(self) except -1:
        if not self._notice_writes(False):
            error, self.failed = self.failed, None
            raise error
        return 0

    cdef inline bint _notice_writes(self, bint alone) noexcept nogil:
        """Whether others may see or write the weights: then W z of this step is not at hand, nor may updates wait.

        Whoever asks the network for its weights, and whoever updates them, changes the stamp; whoever still holds
        an array or a part of one is seen in the reference counts.  `alone`: no other learner has these weights.
        False: see `failed`.
        """
        cdef Model *m = &self.m
        cdef bint held = self._held()
        if held or m.shared or self.stamp[0] != self.seen:  # now, or until a moment ago
            m.ahead = m.counted = m.turned = False
            if self.stamp[0] != self.seen:
                if not alone and not self._heed(THEIRS):
                    return False
                self.seen = self.stamp[0]
        m.shared = held
        if m.sparse and not m.counted and not self.kernels.gather(m) and not self._heed(UNMASKED):
            return False
        return (m.may_defer and m.online and not held) == m.deferred or self._heed(PLACE)

    cdef bint _heed(self, Heed what) noexcept with gil:
        """What of it takes Python; False: see `failed`."""
        try:
            if what == THEIRS:
                self.network.settle()  # other learners of these weights may have put off to write
            elif what == UNMASKED:
                self._unpack()  # there are weights where the mask allows none: they count
            else:
                self._defer(not self.m.deferred)
            return True
        except BaseException as error:
            self.failed, self.m.counted, self.m.ahead = error, False, False  # the next step looks again
            return False

    cdef inline bint _held(self) noexcept nogil:
        return (not MPF_COUNTS_TELL or Py_REFCNT(self.w_rec) > 1 or Py_REFCNT(self.w_in) > 1
                or (self.b_rec != NULL and Py_REFCNT(self.b_rec) > 1) or Py_REFCNT(self.block) > self.n_weights)

    @property
    def held(self) -> bool:
        """Whether somebody holds an array of the weights, and may write into it at any time."""
        return self._held()

    def forget_ahead(self):
        """Somebody has written into W by an address that the reference counts do not show."""
        if self.m.unwritten:
            raise RuntimeError("weights_changed: expected Network.settle() before the weights were written into, and no step between; "
                               "what has been learned is kept, what was written is lost")
        self.m.ahead = self.m.counted = self.m.turned = False

    cdef inline void _tell_writes(self) noexcept nogil:
        if self.stamp[0] != self.seen or self._held():  # it may be by another thread, meanwhile
            self.m.shared = True
            if self.m.deferred or self.m.unwritten:
                flushed(&self.m, self.kernels.settle)
        self.stamp[0] += 1
        self.seen = self.stamp[0]

    def run(self, xs, target, label, mask, bint learn, ys=None, Py_ssize_t chunk=0, *, pool=None, int threads=1):
        """`step` over checked arrays: xs (T, n_in), target (T, n_out) or label (T,), which may be one broadcast, mask (T,); None where absent.

        chunk > 0, for an engine that is online: weights frozen for so many steps, then one update.
        pool: an executor of so many threads, which share the rows of a large network.
        Returns the sum of the losses, each times `scale`.
        """
        cdef Py_ssize_t first = 0, last, n = len(xs), size = max(chunk, 1)
        cdef double total = 0
        if not self.follows_h and self.on_plan is None:
            return self._run(xs, target, label, mask, learn, ys, chunk, 0, 0, pool, threads)
        self._count(0)  # what an interrupted run has left due
        while True:  # up to when a plan is due, by whole chunks
            last = min(n, first + (PLAN_EVERY_N - self.since_plan + size - 1) // size * size)
            part = slice(first, last)
            aims = [None if each is None else each[part] for each in (target, label, mask, ys)]
            total += self._run(xs[part], aims[0], aims[1], aims[2], learn, aims[3], chunk, first, total, pool, threads)
            self._count(last - first)
            first = last
            if first == n:
                self.m.loss_sum = total
                return total

    cdef double _run(self, xs, target, label, mask, bint learn, ys, Py_ssize_t chunk, Py_ssize_t first,
                     double before, pool, int threads) except? -1:
        """`run`, of a stretch that begins at step `first`; `before`: the loss up to there."""
        cdef bint chunked = chunk > 0 and self.m.online, sparse = False
        cdef Trials trial = _trials(xs, target, label, mask, learn, ys, chunk if chunked else 0)
        cdef Py_ssize_t some = chunk if chunked else 16  # steps between two looks at the clock
        cdef long long began
        cdef int status = DIVERGED
        cdef unsigned long long fp
        self._enter("run")
        try:
            self._notice()
            self.m.loss_sum = 0
            try:
                sparse = self.m.sparse and chunked
                if sparse:
                    self._unpack()
                if chunked:
                    self._by_chunks(True, chunk)
                if pool is not None and self.m.deferred and trial.n_steps >= TEAM_STEPS:
                    self._call_team(pool, threads)
                while trial.begin < trial.n_steps:
                    began = mpf_now()
                    with nogil:
                        fp = mpf_flush()
                        while trial.begin < trial.n_steps and mpf_now() - began < HEARS_EVERY:
                            trial.end = min(trial.begin + some, trial.n_steps)
                            status = self.kernels.run(&self.m, &trial)
                            if status != OK:
                                break
                            trial.begin = trial.end
                        mpf_unflush(fp)
                    if status != OK:
                        break
                    try:
                        PyErr_CheckSignals()  # Ctrl-C shows here, not where weights are moved
                    except BaseException:
                        self.m.loss_sum += before
                        self.since_plan += trial.begin
                        raise
            finally:
                self._dismiss_team()
                if chunked and not self.m.online:
                    if status != OK:
                        self.clear()
                    self._by_chunks(False, self._usual_window())
                if sparse and not self.m.sparse:
                    self._pack()
                self._tell_writes()
        finally:
            mpf_release(&self.busy)
        trial.steps_done += first
        self._check("run", status, &trial)
        if self.m.unstable and self.on_unstable is not None:
            self.on_unstable()
        return self.m.loss_sum

    cdef _call_team(self, pool, int threads):
        """Threads of the pool that wait for their parts."""
        self.calls += 1
        self.team.n, self.team.ticket, self.team.inside, self.team.go, self.m.team = 1, 0, 0, True, &self.team
        for place in range(1, min(threads, TEAM)):
            pool.submit(self.assist, place, self.calls)
            self.team.n += 1

    cdef void _dismiss_team(self) noexcept:
        """Wait until they have left; without Python code, where Ctrl-C may come."""
        if self.m.team != NULL:
            self.calls += 1
            self.team.go, self.team.arrived = False, 0
            mpf_add(&self.team.ticket, 1)
            with nogil:
                mpf_wait(&self.team.arrived, self.team.inside, False)
            self.m.team = NULL

    def assist(self, int place, int call):
        """Be a thread of the team; returns when the run is over."""
        cdef unsigned long long fp
        if call != self.calls:  # that run is over: a pool keeps what it was given, even if it could not start a thread for it
            return
        self.team.inside += 1
        with nogil:
            fp = mpf_flush()
            self.kernels.assist(&self.m, place)
            mpf_unflush(fp)
            mpf_add(&self.team.arrived, 1)

    cdef _record(self, Py_ssize_t n_steps, Record *rec, Backwards *how):
        """Room for what the adjoint form needs of a trial, and what it is to compute."""
        plan, N, Q, T = self.plan, self.m.n_rec, self.m.stride, n_steps
        if self.recorded is None or len(self.recorded["h"]) < T:
            self.recorded = None  # before there is more
            self.recorded = aligned({
                "pre": (T, Q), "eps": (0 if plan.adjoint in ("mean", "bptt", "snap1") else T, Q), "h": (T, N), "signal": (T, N),
                "rows": (T if plan.horizon else 0, N), "exact_rows": (T if plan.exact_steps else 0, N), "d": (N,), "mu": (N,), "hbar": (N,),
            }, self.network.dtype)  # fmt: skip
        room = self.recorded
        room["mu"][:] = plan.mu_of_units(N)
        room["hbar"][:] = self.h_mean if plan.running else 0
        rec.pre, rec.eps, rec.h, rec.signal = _real(room["pre"]), _real(room["eps"]), _real(room["h"]), _real(room["signal"])
        rec.rows = _real(room["rows"]) if plan.horizon else rec.signal
        rec.exact_rows, rec.d, how.mu, how.hbar = _real(room["exact_rows"]), _real(room["d"]), _real(room["mu"]), _real(room["hbar"])
        how.kind = {"none": ADJOINT_NONE, "exact": ADJOINT_EXACT, "mean": ADJOINT_MEAN, "running": ADJOINT_RUNNING, "taps": ADJOINT_TAPS,
                    "bptt": ADJOINT_BPTT, "snap1": ADJOINT_SNAP1}[plan.adjoint]
        how.cells, how.exact_steps, how.horizon = plan.cells, plan.exact_steps, plan.horizon

    cdef _enter(self, str call):
        if mpf_take(&self.busy):
            self._refuse(call)
        mpf_wait(&self.brief, 0, False)

    cdef _refuse(self, str call):
        raise RuntimeError(f"{call}: this learner is already running in another thread; give each thread its own")

    cdef _check(self, str call, int status, Trials *trial):
        if status != OK:
            raise FloatingPointError(f"{call}: expected a finite readout, got {self.y} at step {trial.steps_done}")


cdef Trials _trials(xs, target, label, mask, bint learn, ys, Py_ssize_t chunk):
    cdef Trials trial
    trial.n_steps, trial.steps_done, trial.begin = len(xs), 0, 0
    trial.x, trial.target, trial.y = _real(xs), _real(target), _real(ys)
    trial.label, trial.mask = <const long long *>address(label), <const unsigned char *>address(mask)
    trial.label_step = 0 if label is None else cnp.PyArray_STRIDE(label, 0) // <Py_ssize_t>sizeof(long long)
    trial.learn, trial.chunk = learn, chunk
    return trial


MAX_TOGETHER = TRIALS


def run_trials(list engines, list trials, bint learn, list ys=None, *, bint alone=False, bint backwards=False):
    """Up to MAX_TOGETHER trials of one length, each from rest on its own engine, all on one network whose weights stand still.

    Parameters
    ----------
    engines : list of Engine
    trials : list of (xs, target, label, mask, scale), checked, as for `Engine.run`
    learn : bool
        Leave each trial's gradient, times its `scale`, in its engine.
    ys : list of (T, n_out) arrays, optional
    alone : bool
        Each with its own products, not one with W for all.
    backwards : bool
        By the rule's adjoint form: O(T (N + Q)) memory for each.
    """
    cdef Model *models[TRIALS]
    cdef Trials streams[TRIALS]
    cdef Record recs[TRIALS]
    cdef Backwards how[TRIALS]
    cdef Engine engine, first = engines[0]
    cdef Py_ssize_t i, n = len(engines), n_entered = 0
    cdef int status = OK
    cdef unsigned long long fp
    cdef Py_ssize_t width = first.arrays["current"].size
    turned = aligned({"w": (0 if alone else first.m.stride, width)}, first.network.dtype)["w"]  # as many rows as sources, or more
    cdef real *w = _real(turned)
    for i in range(n):
        engine = engines[i]
        xs, target, label, mask, scale = trials[i]
        engine.reset()
        if learn:
            engine.clear()
        if backwards:
            engine._record(len(xs), &recs[i], &how[i])
        streams[i] = _trials(xs, target, label, mask, learn, None if ys is None else ys[i], 0)
        models[i] = &engine.m
    try:
        for engine, (*_, scale) in zip(engines, trials, strict=True):
            engine._enter("run")
            n_entered += 1
            engine.m.scale, engine.m.loss_sum = scale, 0
        with nogil:
            fp = mpf_flush()
            status = first.kernels.run_together(models, streams, recs if backwards else NULL, n, w, width)
            if backwards and status == OK:
                first.kernels.adjoint(models, recs, how, n, streams[0].n_steps, w, width)
            for i in range(n):
                first.kernels.settle(models[i])
            mpf_unflush(fp)
    finally:
        for i in range(n_entered):
            engine = engines[i]
            engine.m.scale = 1.0
            mpf_release(&engine.busy)
    if status != OK:
        engine = engines[streams[0].failed]
        engine._check("trials", status, &streams[streams[0].failed])


include "capi.pxi"
