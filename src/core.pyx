"""The engine object: owns the state, checks what comes in, picks the kernels, runs them without the GIL."""

import mmap
import os
from importlib import import_module

import numpy as np

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
from cpython.number cimport PyNumber_Index
from cpython.ref cimport PyObject
from libc.string cimport memcpy, memset

from model cimport *

cimport numpy as cnp

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
    WINDOW_ONLINE = 4  # measured: more reads of recent traces cost what fewer writes of old ones save
    WINDOW_DEFERRED = 8  # of less than 256 units; of more, WINDOW
    WINDOW = 16
    TEAM_FROM = 768  # units, measured with two threads: `exact` is 1.2 times as fast, 1.5 at 2048; `mean` 1.2 and 1.6
    TEAM_STEPS = 8  # fewer are over before the others have come
    BRIEF = 128  # units up to which a step keeps the GIL if nobody wants it: giving it away takes 0.08 us

MAX_WINDOW = SLOTS - 1
PLAN_EVERY = 1000  # steps of a stream between plans of a rule that follows the weights or the activity
# Where an engine that is online keeps the connections that may exist alone: from so many units on, below that density.  Measured
# with 256-bit registers, all N x N by that, at N = 64, 256, 512, 2048: density 0.2, exact 1.3, 2.1, 2.2, 3.5; mean 0.95, 1.3, 1.7, 2.3;
# e-prop 0.9, 1.2, 1.4, 2.0; 0.4, exact 1.1, 1.3, 1.4, 1.9; mean 0.8, 0.8, 0.9, 1.2.  With 512-bit ones, density 0.3: exact 1.0, 1.2,
# 1.4, 1.3; mean 0.7, 0.8, 0.8, 0.9.  Rules with other traces never do.
SPARSE = {"exact": (32, 0.4), "mean": (256, 0.25), "none": (256, 0.25)}

# Units from which updates wait (pending.pxi).  Measured with 256-bit registers and relu, time of a step by that of writing at
# once, at N = 64, 128, 256, 512: exact 0.54, 0.52, 0.35, 0.38; mean 0.59, 0.55, 0.51, 0.58; e-prop 0.62, 0.54, 0.57, 0.72.
DEFER_FROM = {"exact": 16, "mean": 16, "none": 16}

include "machine.pxi"
include "latency.pxi"


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
    block, at = _block(sum(-(-size // 64) * 64 for size in sizes.values()))
    arrays = {}
    for name, shape in shapes.items():
        arrays[name] = block[at : at + sizes[name]].view(dtype).reshape(shape)
        at += -(-sizes[name] // 64) * 64
    return arrays


def _block(size):
    """(zeroed bytes, offset of an aligned beginning); large ones on huge pages where the system has them.

    The matrices of 512 units and more are passed over at every step: with small pages the time of a step depends on
    where they happen to lie.
    """
    page = 1 << 21
    if size >= page and hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets none
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # this kernel has none
        block = np.frombuffer(memory, np.uint8)
        return block, -block.ctypes.data % page
    block = np.zeros(size + 64, np.uint8)
    return block, -block.ctypes.data % 64


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
    sparse : bool
        Whether an engine that is online may keep the connections that exist alone, if they are few.
    on_unstable : callable, optional
        Called after a step that left the filter with rho(K) >= 1.
    on_plan : callable, optional
        Called in a stream after every PLAN_EVERY steps: time for another plan.
    """

    cdef Model m
    cdef Team team
    cdef const Kernels *kernels
    cdef object network, plan, feedback
    cdef readonly dict arrays  # state, scratch and gradient by name
    cdef dict constants  # of other dtypes
    cdef long long *stamp  # of the network: changes whenever somebody may write into its weights
    cdef long long seen
    cdef PyObject *w_rec
    cdef PyObject *w_in
    cdef PyObject *b_rec
    cdef PyObject *block
    cdef object __weakref__
    cdef Py_ssize_t n_weights, window_online
    cdef char format
    cdef int type_number
    cdef int busy  # taken and released by `mpf_take` and `mpf_release`: the C face does not hold the GIL
    cdef bint streams
    cdef readonly Latency latency
    cdef readonly object y  # (n_out,) readout of the last step, overwritten by the next
    cdef object given, given_before  # what the last two steps returned
    cdef int given_flags
    cdef object on_unstable, on_plan
    cdef public Py_ssize_t since_plan  # steps

    GRADIENT = ("grad", "grad_w_out", "grad_b_out")

    def __init__(self, network, plan, loss, feedback=None, *, bint online=False, double lr=0.0, bint sparse=True, on_unstable=None,
                 on_plan=None):
        cdef Model *m = &self.m
        self.network, self.plan, self.feedback = network, plan, feedback
        self.on_unstable, self.on_plan = on_unstable, on_plan
        self.streams = not plan.offline_because
        self.latency = Latency()
        cdef bint double_precision = network.dtype == np.float64
        cdef size_t tables = import_module(f"modprop_fast._kernels_{isa()}").table()
        self.kernels = <const Kernels *>tables + double_precision
        self.format, self.type_number = b"d" if double_precision else b"f", network.dtype.num

        m.n_in, m.n_rec, m.n_out = network.n_in, network.n_rec, network.n_out
        m.rank = plan.rank
        m.n_class = plan.rank
        sources = m.n_rec + m.n_in + ("b_rec" in network.weights)
        m.n_sources, m.stride = sources, -(-sources // LANES) * LANES
        m.activation = {"relu": RELU, "softplus": SOFTPLUS, "tanh": TANH, "sigmoid": SIGMOID, "identity": IDENTITY}[
            network.activation
        ]
        m.loss = {"mse": MSE, "cross_entropy": CROSS_ENTROPY}[loss]
        m.trace = {"none": TRACE_NONE, "exact": TRACE_EXACT, "mean": TRACE_MEAN, "taps": TRACE_TAPS}[plan.trace]
        m.online, m.autapses = online, network.autapses
        m.self_modulation, m.refresh_every = plan.self_modulation, plan.refresh_every
        m.instant = plan.instant
        m.follows = plan.instant or (online and plan.types is not None and plan.refresh_every > 0 and plan.taps is None)
        m.leak, m.lr, m.scale = network.leak, lr, 1.0
        m.may_defer = online and self._may_defer(plan)
        self.window_online = WINDOW_ONLINE if not m.may_defer else WINDOW_DEFERRED if m.n_rec < 256 else WINDOW
        m.window = self.window_online if online else WINDOW
        m.n_groups = m.window if online else 1
        m.exact_steps = plan.exact_steps if plan.exact_steps < SLOTS and not plan.offline_because else 0
        if m.exact_steps:
            m.window = m.exact_steps
        if plan.taps is not None:
            m.n_taps, m.fixed_taps, m.window, m.n_groups = len(plan.taps), plan.taps.ndim > 1, 1, 1
        m.one_tap, m.running = plan.one_tap, plan.hbar is not None
        m.sparse = sparse and online and self.streams and self._few(plan)
        if m.sparse:
            m.n_groups = 1
        self._bind_weights()
        self._lay_out()
        self._allocate()
        self._set_modulation()
        self.reset()
        if m.may_defer:
            self._part_sources()
            self._defer(True)
        if m.may_defer or m.sparse:
            network.settled_by(self)

    def __del__(self):
        if self.m.deferred or self.m.unwritten:
            self.settle()

    def _may_defer(self, plan):
        """Whether updates may wait (pending.pxi), and whether that pays."""
        network = self.network
        if network.sign is not None or network.mask is not None or plan.exact_steps or plan.offline_because:
            return False
        if plan.trace == "mean" and (plan.types is None or not plan.self_modulation):
            return False
        return plan.trace in DEFER_FROM and plan.rank <= 2 and network.n_rec >= DEFER_FROM[plan.trace]

    def _few(self, plan):
        """Whether the rule is one that `sparse.pxi` knows and the connections are few enough for it to pay."""
        network = self.network
        known = plan.trace in SPARSE and not plan.exact_steps and (plan.trace != "mean" or plan.types is not None)
        if not known or network.mask is None:
            return False
        units, density = SPARSE[plan.trace]
        return network.n_rec >= units and network.connections.mean() < density

    cdef _bind_weights(self):
        cdef Model *m = &self.m
        weights = self.network.weights
        m.w_rec, m.w_in = address(weights["w_rec"]), address(weights["w_in"])
        m.w_out, m.b_out = address(weights["w_out"]), address(weights["b_out"])
        m.b_rec = address(weights.get("b_rec"))
        m.sign = address(self.network.sign)
        m.feedback = address(self.feedback)
        self.stamp = <long long *>address(self.network._stamp)
        self.w_rec, self.w_in = <PyObject *>weights["w_rec"], <PyObject *>weights["w_in"]
        self.b_rec = <PyObject *>weights["b_rec"] if "b_rec" in weights else NULL
        self.block = <PyObject *>weights["w_rec"].base
        self.n_weights = len(weights)

    cdef _lay_out(self):
        """Units in blocks of one type, and arrays of other dtypes."""
        cdef Model *m = &self.m
        N, r, C, S = m.n_rec, m.rank, m.n_class, SLOTS
        types = np.zeros(N, np.intc) if self.plan.types is None else self.plan.types.astype(np.intc)
        units = [np.flatnonzero(types == a) for a in range(types.max() + 1)]
        low_rank = r and self.plan.types is None
        whole = LANES if low_rank and m.may_defer else ROWS
        full = [np.append(u, np.full((whole - len(u) % whole) % whole, -1)).reshape(-1, ROWS) for u in units]
        unit = np.concatenate(full).astype(np.intc)
        place = np.flatnonzero(unit.ravel() >= 0)[np.argsort(unit[unit >= 0])].astype(np.intc)
        by_source = np.argsort(types, kind="stable")
        spares = m.may_defer and m.trace == TRACE_EXACT and m.activation == RELU
        c = self.constants = {
            "unit": unit,
            "place": place,
            "place_by_source": np.argsort(by_source).astype(np.intc),
            "block_type": np.repeat(np.arange(len(full)), list(map(len, full))).astype(np.intc),
            "type": types,
            "drive_class": place if low_rank else types,
            "since": np.zeros(S, np.intp),
            "erred": np.zeros(S, np.uint8),
            "terms": np.zeros(S * max(C, 1) + C + 1, np.uintp),
            "type_ends": (ROWS * np.cumsum(list(map(len, full)))).astype(np.intc),
            "type_ends_by_source": np.cumsum(np.bincount(types)).astype(np.intc),
            "awake": np.zeros(max(unit.size, self._n_places_by_source()), np.uint64),
            "heard": np.zeros((m.n_sources + LANES) * m.may_defer, np.intc),
            "spoke": np.zeros(m.stride * spares, np.uint32),
            "bounds": np.zeros(S + 1, np.intp),
            "held_at": np.zeros(unit.size, np.intp),
            "based": np.zeros(unit.size, np.uint8),
            "turns": np.zeros(unit.size, np.uint64),
            "turning": np.zeros(unit.size, np.intc),
        } | aligned(
            {"size": (r,), "mu": (r,), "means": (r, r), "power": (3, r, r), "type_sums": (r, r), "trace_sums": (r, r, r), "step_sums": (8, r)},
            np.float64,
        )
        m.n_blocks = len(unit)
        m.n_drive = unit.size if low_rank else r
        m.n_places = unit.size
        for by in ("", "_by_source"):
            where = c["place" + by]
            starts = np.flatnonzero(np.diff(where, prepend=-2) != 1)
            c["runs" + by] = np.stack([starts, where[starts], np.diff(starts, append=N)], axis=1).astype(np.intc)
        m.keeps_h = m.trace in (TRACE_EXACT, TRACE_TAPS) or m.exact_steps > 0
        m.unit, m.block_type = <int *>address(c["unit"]), <int *>address(c["block_type"])
        m.type = <int *>address(c["type"]) if self.plan.types is not None else NULL
        m.drive_class, m.since = <int *>address(c["drive_class"]), <Py_ssize_t *>address(c["since"])
        m.erred, m.terms = <unsigned char *>address(c["erred"]), <void **>address(c["terms"])
        m.awake, m.heard = <unsigned long long *>address(c["awake"]), <int *>address(c["heard"])
        m.spoke = <unsigned int *>address(c["spoke"]) if spares else NULL
        m.bounds = <Py_ssize_t *>address(c["bounds"])
        m.held_at, m.based = <Py_ssize_t *>address(c["held_at"]), <unsigned char *>address(c["based"])
        m.turns, m.turning = <unsigned long long *>address(c["turns"]), <int *>address(c["turning"])
        m.type_size, m.type_mu = <double *>address(c["size"]), <double *>address(c["mu"])
        m.means, m.power = <double *>address(c["means"]), <double *>address(c["power"])
        m.type_sums, m.trace_sums = <double *>address(c["type_sums"]), <double *>address(c["trace_sums"])
        m.step_sums = <double *>address(c["step_sums"])

        if m.sparse:
            self._lay_out_connections()

    cdef _lay_out_connections(self):
        """Sources of each unit, as they are placed: units that may send to it by type, inputs, and Q up to whole lines."""
        cdef Model *m = &self.m
        c, connections, line = self.constants, self.network.connections, 64 // self.network.dtype.itemsize
        by_type = np.argsort(c["type"], kind="stable")
        n_inputs = m.n_in + (m.b_rec != NULL)
        rows, inputs_at, starts = [], [], [0]
        stops = np.zeros((c["unit"].size, m.rank), np.intc)
        for place, p in enumerate(c["unit"].ravel()):
            synapses = by_type[connections[p, by_type]] if p >= 0 else by_type[:0]
            row = np.append(synapses, np.arange(m.n_rec, m.n_rec + n_inputs)) if p >= 0 else synapses
            inputs_at.append(starts[-1] + len(synapses))
            starts.append(starts[-1] + -(-len(row) // line) * line)
            rows += [row, np.full(starts[-1] - starts[-2] - len(row), m.stride)]
            if self.plan.types is not None:
                stops[place] = np.searchsorted(c["type"][synapses], np.arange(m.rank), side="right")
        c["columns"], c["type_stops"] = np.concatenate(rows).astype(np.intc), stops
        c["starts"], c["inputs_at"] = np.array(starts, np.intp), np.array(inputs_at, np.intp)
        m.packed_width = np.diff(c["starts"][::ROWS]).max()
        m.columns, m.type_stops = <int *>address(c["columns"]), <int *>address(stops)
        m.starts, m.inputs_at = <Py_ssize_t *>address(c["starts"]), <Py_ssize_t *>address(c["inputs_at"])

    cdef _allocate(self):
        """Every array that a step touches, in one block of memory."""
        cdef Model *m = &self.m
        N, Q, r, C, D, S, n_out = m.n_rec, m.stride, m.rank, m.n_class, m.n_drive, SLOTS, m.n_out
        P = max(self.constants["unit"].size, self._n_places_by_source())
        exact, mean = m.trace == TRACE_EXACT, m.trace == TRACE_MEAN
        own = mean and not m.self_modulation
        sparse = len(self.constants["columns"]) if m.sparse else 0
        past = S * (exact and m.follows)
        lazy = exact and not m.online and not m.follows and m.type != NULL and m.activation == RELU and r < SLOTS
        kept, masked = 0 if m.online else N, self.network.mask is not None and not sparse
        a = self.arrays = aligned(
            {
                "pre": (Q,), "v": (N,), "h": (N,), "h_past": (S, P), "eps": (S, Q), "local": (S, P), "modulator": (S, r),
                "traces": (C, r, Q) if mean else (m.n_places * (exact and not sparse and not m.may_defer), r, Q), "self_traces": (C * own, Q), "class_eps": (S * own, C, Q),
                "past_K": (past, r, r), "past_drive": (past, D, r),
                "current": (-(-N // LANES) * LANES,), "input": (N,), "y": (n_out,), "error": (n_out,), "signal": (N,),
                "class_rows": (C * mean, Q), "class_sums": (C * mean, Q),
                "power_K": (S + 1, r, r), "always": (r * lazy, r, Q), "awake_sums": (r * (exact and m.type != NULL and m.activation == RELU and 2 <= r < SLOTS), r, Q), "power_drive": (S * (exact or m.n_taps > 0), r, D), "back": (2, S, r), "back_drive": (S * (exact or m.n_taps > 0), D),
                "coef": (S + C + 1, max(r, 1), max(P, ROWS)), "old": (ROWS, max(r, 1), Q), "tail": (ROWS, LANES + Q), "dots": (ROWS, LANES), "pick": (2 * LANES,),
                "keep": (N * masked, N), "factor": (P,), "factor_by_source": (P,), "factor_of": (r, self._n_places_by_source()), "factor_by_unit": (r, N), "factor_sums": (r,), "h_sum": (N * self.plan.measures_h,),
                "sources": (S * (m.exact_steps > 0), Q),
                "sent": (S * (m.spoke != NULL), Q), "still": (0, P), "eps_owed": (S * m.may_defer, Q), "onto_h": (S * m.may_defer, D), "carried": (S * m.may_defer, r),
                "eps_placed": (S * m.may_defer, P), "front": (P * m.may_defer,), "heard_count": ((Q + LANES) * m.may_defer, 1 + r),
                "counts": (m.may_defer * (TEAM if self._shares_rows() else 1), 3 * S * STRETCH_WRITTEN * LANES),
                "packed": (sparse,), "packed_traces": (r * exact, sparse), "table": (Q + 1, 4), "gathered": (4 * m.packed_width + LANES + r,),
                "type_lanes": (r, r, LANES * (sparse > 0 and self.plan.types is not None)),
                "own": (P,), "placed": (P,), "eps_dots": (2, S + ROWS),
                "dummy": (Q,), "zeros": (max(P, Q),), "edge": (LANES,), "grad": (kept, Q), "grad_w_out": (n_out, kept), "grad_b_out": (n_out,),
                "column_sums": (r, N), "u": (r, m.n_places), "u_by_source": (r, self._n_places_by_source()), "membership": (r, N), "K": (r, r), "drive": (D, r), "class_drive": (C, r),
                "readout": (C, m.n_places), "self_drive": (2, C),
            },
            self.network.dtype,
        )  # fmt: skip
        self.y = a["y"]
        m.pre, m.v, m.h, m.eps = address(a["pre"]), address(a["v"]), address(a["h"]), address(a["eps"])
        m.h_past, m.local, m.modulator = address(a["h_past"]), address(a["local"]), address(a["modulator"])
        m.membership, m.edge = address(a["membership"]), address(a["edge"])
        m.traces, m.self_traces, m.class_eps = address(a["traces"]), address(a["self_traces"]), address(a["class_eps"])
        m.past_K, m.past_drive = address(a["past_K"]), address(a["past_drive"])
        m.current, m.input, m.y, m.error = address(a["current"]), address(a["input"]), address(a["y"]), address(a["error"])
        m.signal, m.class_rows, m.class_sums = address(a["signal"]), address(a["class_rows"]), address(a["class_sums"])
        m.power_K, m.power_drive = address(a["power_K"]), address(a["power_drive"])
        m.awake_sums, m.always = address(a["awake_sums"]), address(a["always"])
        m.back, m.back_drive = address(a["back"]), address(a["back_drive"])
        m.coef, m.old = address(a["coef"]), address(a["old"])
        m.tail, m.dots, m.pick = address(a["tail"]), address(a["dots"]), address(a["pick"])
        m.dummy, m.zeros = address(a["dummy"]), address(a["zeros"])
        m.keep, m.factor_of, m.factor_sums, m.h_sum = address(a["keep"]), address(a["factor_of"]), address(a["factor_sums"]), address(a["h_sum"])
        m.factor_by_unit, m.sources = address(a["factor_by_unit"]), address(a["sources"])
        m.sent = address(a["sent"])
        m.eps_owed, m.onto_h, m.carried = address(a["eps_owed"]), address(a["onto_h"]), address(a["carried"])
        m.eps_placed, m.front, m.heard_count = address(a["eps_placed"]), address(a["front"]), address(a["heard_count"])
        m.counts = address(a["counts"])
        m.own, m.placed, m.eps_dots = address(a["own"]), address(a["placed"]), address(a["eps_dots"])
        m.packed, m.packed_traces, m.table = address(a["packed"]), address(a["packed_traces"]), address(a["table"])
        m.gathered, m.type_lanes = address(a["gathered"]), address(a["type_lanes"])
        a["pick"][LANES:] = 1
        if masked:
            a["keep"][:] = self.network.mask
        self._point_at_rows()
        self._bind_places()
        m.column_sums, m.K, m.drive = address(a["column_sums"]), address(a["K"]), address(a["drive"])
        m.class_drive, m.readout, m.self_drive = address(a["class_drive"]), address(a["readout"]), address(a["self_drive"])
        self._bind_gradient()

    cdef _point_at_rows(self):
        """Rows of W and of the mask by place; where there is no unit, a row of zeros, that stays so."""
        def rows(array):
            at = array.ctypes.data + self.constants["unit"].ravel().astype(np.intp) * array.strides[0]
            return np.where(self.constants["unit"].ravel() >= 0, at, self.arrays["dummy"].ctypes.data).astype(np.uintp)

        c = self.constants
        c["w_rows"] = rows(self.network.weights["w_rec"])
        self.m.w_rows = <void **>address(c["w_rows"])
        self.m.keep_rows = NULL
        if self.m.keep != NULL:
            c["keep_rows"] = rows(self.arrays["keep"])
            self.m.keep_rows = <void **>address(c["keep_rows"])

    cdef Py_ssize_t _n_places_by_source(self):
        n_lines = (self.m.n_rec + LANES - 1) // LANES
        apart = n_lines * LANES * self.network.dtype.itemsize
        return (n_lines + (apart % 2048 == 0)) * LANES  # rows that are halves of a page apart are in each other's way in the first cache

    cdef _bind_places(self):
        """Where each unit has its place: in a block of ROWS of one type; or by source, one after the other, type by type."""
        cdef Model *m = &self.m
        c, a, by = self.constants, self.arrays, "_by_source" if m.deferred else ""
        m.n_places = self._n_places_by_source() if m.deferred else c["unit"].size
        m.place, m.runs, m.n_runs = <int *>address(c["place" + by]), <int *>address(c["runs" + by]), len(c["runs" + by])
        m.type_ends, m.u, m.factor = <int *>address(c["type_ends" + by]), address(a["u" + by]), address(a["factor" + by])

    cdef _set_factor(self, factor):
        c, a = self.constants, self.arrays
        a["factor"][c["place"]] = a["factor_by_source"][c["place_by_source"]] = factor
        if self.plan.types is not None:
            a["factor_of"][self.plan.types, c["place_by_source"]] = factor
            a["factor_by_unit"][self.plan.types, np.arange(self.m.n_rec)] = factor
            a["factor_sums"][:] = a["factor_of"].sum(axis=1)
            self.m.counted = False

    cdef _bind_gradient(self):
        cdef Model *m = &self.m
        a = self.arrays
        m.grad, m.grad_w_out, m.grad_b_out = address(a["grad"]), address(a["grad_w_out"]), address(a["grad_b_out"])

    def follow(self, plan):
        """Another plan of the same make: the filter, mu or hbar has changed."""
        self.kernels.settle(&self.m)
        self.plan = plan
        if plan.types is None:
            self._set_modulation()
        else:  # the means of W are refreshed apart
            self.constants["mu"][:] = plan.mu
            self._set_factor(1 if plan.hbar is None else plan.hbar)
            self.kernels.derive(&self.m)

    cdef _set_modulation(self):
        """Types: the constants of the mean matrix.  Low rank: the filter itself, which does not follow W."""
        cdef Model *m = &self.m
        plan, a, c = self.plan, self.arrays, self.constants
        self._set_factor(1 if plan.hbar is None else plan.hbar)
        if plan.types is not None:
            c["size"][:] = np.bincount(plan.types, minlength=m.rank)
            c["mu"][:] = plan.mu
            a["membership"][plan.types, np.arange(m.n_rec)] = 1
            a["u"][plan.types, c["place"]] = a["u_by_source"][plan.types, c["place_by_source"]] = 1
            if m.fixed_taps:
                a["power_drive"][1 : 1 + m.n_taps] = plan.taps
            self.kernels.refresh(m)
        elif m.rank:
            k, V, mu = m.leak, plan.v, np.broadcast_to(plan.mu, m.n_rec)
            a["u"][:, c["place"]] = a["u_by_source"][:, c["place_by_source"]] = plan.u.T
            a["K"][:] = 0 if plan.one_tap else k * np.eye(m.rank) + (1 - k) * (V * mu) @ plan.u
            a["drive"][c["place"]] = (1 - k) * V.T
            a["class_drive"][:] = (1 - k) * np.eye(m.n_class)
            a["readout"][:, c["place"]] = V * (mu if plan.hbar is None else plan.hbar)
            self.kernels.derive(m)

    def take_h(self):
        """(sum over steps of h (n_rec,), number of steps) since the last call."""
        total, count = self.arrays["h_sum"].astype(float), self.m.h_count
        self.arrays["h_sum"][:], self.m.h_count = 0, 0
        return total, count

    # ------------------------------------------------------------ copies

    ADDRESSES = ("terms", "w_rows", "keep_rows")

    def snapshot(self) -> dict:
        """All that a step reads or leaves behind, as copies; no addresses."""
        cdef Model *m = &self.m
        if mpf_read(&self.busy):
            self._refuse("copy")
        if m.deferred or m.unwritten:
            self.kernels.settle(m)  # the weights go with the network
        m.ahead = m.counted = m.turned = False  # nor in the copy: the weights may have been written into since the last step
        numbers = (m.window, m.n_groups, m.t, m.h_count, m.updates, m.loss_sum, m.follows, m.summed, m.unstable,
                   m.deferred, m.owed_until, self.since_plan, m.lazy, m.always_from)
        arrays = {name: a.copy() for name, a in (self.constants | self.arrays).items() if name not in self.ADDRESSES}
        return {"numbers": numbers, "sparse": m.sparse, "arrays": arrays}

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

    def settle(self):
        """Write what lags behind: the accumulated gradient, or updates that have been felt but not written."""
        if not mpf_read(&self.busy):  # in another thread: it settles when it is done
            self.kernels.settle(&self.m)

    def clear(self):
        """Accumulated gradient to zero."""
        self.kernels.settle(&self.m)
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
            memset(view, 0, sizeof(Py_buffer))  # without an owner there is nothing to release
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
        raise error(f"{name}: expected a C-contiguous {self.network.dtype} array of shape ({n},), got {describe(value)}")

    def step(self, x, target=None, *, signal=None, bint learn=True):
        """`Learner.step`."""
        cdef Py_buffer x_view, t_view
        cdef ErrorSource source = FROM_NOTHING
        cdef long long label = 0
        cdef const void *aim = NULL
        cdef int status
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
        if mpf_take(&self.busy):
            PyBuffer_Release(&x_view)
            if aim != NULL:
                PyBuffer_Release(&t_view)
            self._refuse("step")
        self.m.loss_sum = 0
        self._notice_writes()
        if self.m.n_rec <= BRIEF and mpf_alone():
            status = self._advance(x_view.buf, aim, label, source, learn)
        else:
            with nogil:
                status = self._advance(x_view.buf, aim, label, source, learn)
        self._tell_writes()
        mpf_release(&self.busy)
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
        if self.on_plan is not None:
            self._count(1)
        y = self._answer()
        if self.latency.on:
            self.latency.note(mpf_now() - began)
        return y

    cdef inline int _advance(self, const void *x, const void *aim, long long label, ErrorSource source, bint learn) noexcept nogil:
        cdef unsigned long long fp = mpf_flush()
        cdef int status = self.kernels.step(&self.m, x, aim, label, source, learn)
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
        except TypeError:
            raise TypeError(f"target: expected a class, an integer in 0..{self.m.n_out - 1}, got {describe(target)}") from None

    cdef _count(self, Py_ssize_t n_steps):
        self.since_plan += n_steps
        if self.since_plan >= PLAN_EVERY:
            self.since_plan = 0
            self.on_plan()

    cdef inline int _notice_writes(self, bint alone=False) except -1 nogil:
        """Whether others may see or write the weights: then W z of this step is not at hand, nor may updates wait.

        Whoever asks the network for its weights, and whoever updates them, changes the stamp; whoever still holds
        an array or a part of one is seen in the reference counts.  `alone`: no other learner has these weights.
        """
        cdef Model *m = &self.m
        cdef bint held = self._held()
        if held or m.shared or self.stamp[0] != self.seen:  # now, or until a moment ago
            m.ahead = m.counted = m.turned = False
            if self.stamp[0] != self.seen:
                if not alone:
                    with gil:
                        self.network.settle()
                self.seen = self.stamp[0]
        m.shared = held
        if m.sparse and not m.counted and not self.kernels.gather(m):
            with gil:
                self._unpack()  # there are weights where the mask allows none: they count
        if (m.may_defer and m.online and not held) != m.deferred:
            with gil:
                self._defer(not m.deferred)
        return 0

    cdef _defer(self, bint on):
        """From now on updates may wait, or not: weights and traces lie by source, or by unit."""
        cdef Model *m = &self.m
        if on == m.deferred:
            return
        self.kernels.settle(m)
        self._make_room(on)
        m.deferred, m.counted, m.ahead, m.turned = on, False, False, False
        self._bind_places()
        c, a, n = self.constants, self.arrays, m.n_sources
        place = c["place_by_source" if on else "place"]
        for name in ("h_past", "local"):
            a[name][...] = 0
        a["h_past"].ravel()[m.t % SLOTS * m.n_places + place] = a["h"]
        c["awake"][c["place"]] = a["h"] != 0
        if m.trace == TRACE_EXACT and on and m.t == 0:
            a["by_source"][:, 1:] = 0  # by unit, those at rest are not cleared
        elif m.trace == TRACE_EXACT and len(a["traces"]) and on:
            a["by_source"][:n, 1:, place] = a["traces"][c["place"], :, :n].transpose(2, 1, 0)
        elif m.trace == TRACE_EXACT and not on:
            a["traces"][place, :, :n] = a["by_source"][:n, 1:, c["place_by_source"]].transpose(2, 1, 0)

    cdef _make_room(self, bint deferred):
        """Allocate where weights and traces are to lie."""
        cdef Model *m = &self.m
        r, dtype = m.rank if m.trace == TRACE_EXACT else 0, self.network.dtype
        if deferred and m.by_source == NULL:
            self.arrays |= aligned({"by_source": (m.n_sources + LANES, 1 + r, self._n_places_by_source())}, dtype)
            m.by_source = address(self.arrays["by_source"])
        if not deferred and m.trace == TRACE_EXACT and not len(self.arrays["traces"]):
            self.arrays |= aligned({"traces": (self.constants["unit"].size, r, m.stride)}, dtype)
            m.traces = address(self.arrays["traces"])

    cdef inline bint _held(self) noexcept nogil:
        return (not MPF_COUNTS_TELL or Py_REFCNT(self.w_rec) > 1 or Py_REFCNT(self.w_in) > 1
                or (self.b_rec != NULL and Py_REFCNT(self.b_rec) > 1) or Py_REFCNT(self.block) > self.n_weights)

    def forget_ahead(self):
        """Somebody has written into W by an address that the reference counts do not show."""
        self.m.ahead = self.m.counted = self.m.turned = False

    cdef inline void _tell_writes(self) noexcept nogil:
        if self.stamp[0] != self.seen or self._held():  # it may be by another thread, meanwhile
            self.m.shared = True
            if self.m.deferred or self.m.unwritten:
                self.kernels.settle(&self.m)
        self.stamp[0] += 1
        self.seen = self.stamp[0]

    def run(self, xs, target, label, mask, bint learn, ys=None, Py_ssize_t chunk=0, *, pool=None, int threads=1):
        """`step` over checked arrays: xs (T, n_in), target (T, n_out) or label (T,), mask (T,); None where absent.

        chunk > 0, for an engine that is online: weights frozen for so many steps, then one update.
        pool: an executor of so many threads, which share the rows of a large network.
        Returns the sum of the losses, each times `scale`.
        """
        cdef Py_ssize_t first = 0, last, n = len(xs), size = max(chunk, 1)
        cdef double total = 0
        if self.on_plan is None:
            return self._run(xs, target, label, mask, learn, ys, chunk, 0, pool, threads)
        while True:  # up to when a plan is due, by whole chunks
            last = min(n, first + -(-(PLAN_EVERY - self.since_plan) // size) * size)
            part = slice(first, last)
            aims = [None if each is None else each[part] for each in (target, label, mask, ys)]
            total += self._run(xs[part], aims[0], aims[1], aims[2], learn, aims[3], chunk, first, pool, threads)
            self._count(last - first)
            first = last
            if first == n:
                self.m.loss_sum = total
                return total

    cdef double _run(self, xs, target, label, mask, bint learn, ys, Py_ssize_t chunk, Py_ssize_t first,
                     pool, int threads) except? -1:
        """`run`, of a stretch that begins at step `first`."""
        cdef Trials trial = self._trials(xs, target, label, mask)
        cdef bint chunked = chunk > 0 and self.m.online
        cdef int status
        cdef unsigned long long fp
        trial.learn, trial.y, trial.chunk = learn, address(ys), chunk if chunked else 0
        self._enter("run")
        self._notice_writes()
        sparse = self.m.sparse and chunked
        if sparse:
            self._unpack()
        if chunked:
            self._by_chunks(True, chunk)
        others = self._call_team(pool, threads) if self.m.deferred and trial.n_steps >= TEAM_STEPS else []
        with nogil:
            fp = mpf_flush()
            status = self.kernels.run(&self.m, &trial)
            mpf_unflush(fp)
        self._dismiss_team(others)
        if chunked:
            if status != OK:
                self.clear()
            self._by_chunks(False, self.window_online)
        if sparse:
            self._pack()
        self._tell_writes()
        mpf_release(&self.busy)
        trial.steps_done += first
        self._check(status, &trial)
        if self.m.unstable and self.on_unstable is not None:
            self.on_unstable()
        return self.m.loss_sum

    cdef bint _shares_rows(self):
        return self.m.may_defer and self.m.n_rec >= TEAM_FROM

    @property
    def shares_rows(self) -> bool:
        """Whether `run` can use several threads."""
        return self._shares_rows()

    cdef list _call_team(self, pool, int threads):
        """Threads of the pool that wait for their parts."""
        self.team.n = min(threads, TEAM)
        if pool is None or self.team.n < 2 or not self._shares_rows():
            return []
        self.team.ticket = self.team.arrived = 0
        self.team.go, self.m.team = True, &self.team
        return [pool.submit(self.assist, place) for place in range(1, self.team.n)]

    cdef _dismiss_team(self, list others):
        if others:
            self.team.go = False
            mpf_add(&self.team.ticket, 1)
            for other in others:
                other.result()
            self.m.team = NULL

    def assist(self, int place):
        """Be a thread of the team; returns when the run is over."""
        cdef unsigned long long fp
        with nogil:
            fp = mpf_flush()
            self.kernels.assist(&self.m, place)
            mpf_unflush(fp)

    cdef _traces_of_connections(self):
        """(those among all traces [place, modulator, source], the same [modulator, connection])."""
        c, Q = self.constants, self.m.stride
        real = np.flatnonzero(c["columns"] < Q)
        place, q = np.repeat(np.arange(c["unit"].size), np.diff(c["starts"]))[real], c["columns"][real]
        return (place, slice(None), q), real

    cdef _unpack(self):
        """From the connections that exist to all of N x N: for whole trials, for chunks."""
        cdef Model *m = &self.m
        self.kernels.settle(m)
        if m.trace == TRACE_EXACT:
            if not len(self.arrays["traces"]):
                self.arrays |= aligned({"traces": (m.n_blocks * ROWS, m.rank, m.stride)}, self.network.dtype)
                m.traces = address(self.arrays["traces"])
            at, of = self._traces_of_connections()
            self.arrays["traces"][at] = self.arrays["packed_traces"][:, of].T
        if not len(self.arrays["keep"]):
            self.arrays |= aligned({"keep": (m.n_rec, m.n_rec)}, self.network.dtype)
            self.arrays["keep"][:] = self.network.mask
            m.keep = address(self.arrays["keep"])
            self._point_at_rows()
        m.sparse = False
        self._set_window(WINDOW_ONLINE)

    cdef _pack(self):
        """And back."""
        cdef Model *m = &self.m
        if m.trace == TRACE_EXACT:
            at, of = self._traces_of_connections()
            self.arrays["packed_traces"][:, of] = self.arrays["traces"][at].T
        m.sparse, m.counted = True, False
        self._set_window(1)

    cdef _by_chunks(self, bint on, Py_ssize_t window):
        """Between two steps, from learning at once to one update after every so many, or back.

        Where updates may wait, its end writes them; else the gradient is added up.
        """
        cdef Model *m = &self.m
        cdef bint waits = m.may_defer if on else m.frozen
        self.kernels.write(m)
        self._defer(waits)
        m.online, m.frozen, m.counted = not on, on and waits, False
        m.follows = m.instant or (not on and m.type != NULL and m.refresh_every > 0 and not m.n_taps)
        if on and not self.arrays["grad_w_out"].size:
            self.arrays |= aligned({"grad_w_out": (m.n_out, m.n_rec)}, self.network.dtype)
        if on and waits and window > MAX_WINDOW and m.still == NULL:
            self.arrays |= aligned({"still": (m.n_sources, self._n_places_by_source())}, self.network.dtype)
            m.still = address(self.arrays["still"])
        if on and not waits and not self.arrays["grad"].size:
            self.arrays |= aligned({"grad": (m.n_rec, m.stride)}, self.network.dtype)
        self._bind_gradient()
        self._set_window(min(window, MAX_WINDOW))
        m.owed_until = m.t
        self.kernels.derive(m)

    cdef _set_window(self, Py_ssize_t window):
        self.kernels.write(&self.m)
        self.m.window = 1 if self.m.n_taps else self.m.exact_steps or window
        self.m.n_groups = self.m.window if self.m.online and not self.m.sparse else 1
        self.constants["since"][:] = self.m.t
        self._part_sources()

    cdef _part_sources(self):
        """In groups, as even as blocks of TOGETHER can be."""
        n_groups, n_blocks = self.m.n_groups, (self.m.n_sources + TOGETHER - 1) // TOGETHER
        self.constants["bounds"][: n_groups + 1] = TOGETHER * (n_blocks * np.arange(n_groups + 1) // n_groups)

    @property
    def sparse(self) -> bool:
        """Whether it keeps the connections that may exist alone, see sparse.pxi."""
        return self.m.sparse

    @property
    def unwritten(self) -> bool:
        """Whether the network's arrays do not show yet what has been learned."""
        return self.m.unwritten

    @property
    def window(self) -> int:
        """Steps that traces may lag behind, 1 to MAX_WINDOW: a matter of speed."""
        return self.m.window

    @window.setter
    def window(self, Py_ssize_t window):
        self._set_window(window)

    def adjoint(self, xs, target, label, mask, double scale):
        """Gradient of one trial, from rest, times `scale`, in the rule's adjoint form: O(T (N + Q)) memory."""
        self.reset()
        self.clear()
        self.m.scale = scale
        try:
            self._adjoint(xs, target, label, mask)
        finally:
            self.m.scale = 1.0

    cdef _adjoint(self, xs, target, label, mask):
        cdef Trials trial = self._trials(xs, target, label, mask)
        cdef Record rec
        cdef int status
        cdef unsigned long long fp
        cdef Backwards how
        plan = self.plan
        T, N, Q, dtype = len(xs), self.m.n_rec, self.m.stride, self.network.dtype
        pre, eps = np.empty((2, T, Q), dtype)
        h, signal, rows = np.empty((3, T, N), dtype)
        exact_rows, d = np.empty((T if plan.exact_steps else 0, N), dtype), np.empty(N, dtype)
        mu = np.array(plan.mu_of_units(N), dtype)
        hbar = None if plan.hbar is None else np.array(plan.hbar, dtype)
        rec.pre, rec.eps, rec.h = address(pre), address(eps), address(h)
        rec.signal, rec.rows, rec.exact_rows, rec.d = address(signal), address(rows), address(exact_rows), address(d)
        how.kind = {"none": ADJOINT_NONE, "exact": ADJOINT_EXACT, "mean": ADJOINT_MEAN, "running": ADJOINT_RUNNING, "taps": ADJOINT_TAPS,
                    "bptt": ADJOINT_BPTT, "snap1": ADJOINT_SNAP1}[plan.adjoint]
        how.cells, how.exact_steps, how.horizon = plan.cells, plan.exact_steps, plan.horizon
        how.mu, how.hbar = address(mu), address(hbar)
        self._enter("gradient")
        with nogil:
            fp = mpf_flush()
            status = self.kernels.record(&self.m, &trial, &rec)
            if status == OK:
                self.kernels.adjoint(&self.m, &rec, &how, trial.n_steps)
            mpf_unflush(fp)
        mpf_release(&self.busy)
        self._check(status, &trial)

    cdef Trials _trials(self, xs, target, label, mask):
        cdef Trials trial
        trial.n_steps, trial.steps_done = len(xs), 0
        trial.x, trial.target = address(xs), address(target)
        trial.label, trial.mask = <const long long *>address(label), <const unsigned char *>address(mask)
        trial.learn, trial.y, trial.chunk = True, NULL, 0
        return trial

    cdef _enter(self, str call):
        if mpf_take(&self.busy):
            self._refuse(call)
        self.m.loss_sum = 0

    cdef _refuse(self, str call):
        raise RuntimeError(f"{call}: this learner is already running in another thread; give each thread its own")

    cdef _check(self, int status, Trials *trial):
        if status != OK:
            raise FloatingPointError(f"run: expected a finite readout, got {self.y} at step {trial.steps_done}")


MAX_TOGETHER = LANES


def run_trials(list engines, list trials, bint learn, list ys=None, *, bint alone=False):
    """Up to MAX_TOGETHER trials of one length, each from rest on its own engine, all on one network whose weights stand still.

    Parameters
    ----------
    engines : list of Engine
    trials : list of (xs, target, label, mask, scale), checked, as for `Engine.run`
    learn : bool
        Leave each trial's gradient, times its `scale`, in its engine.
    ys : list of (T, n_out) arrays, optional
    alone : bool
        One after the other, not step by step together with one product W z for all.
    """
    cdef Model *models[LANES]
    cdef Trials streams[LANES]
    cdef Engine engine, first = engines[0]
    cdef Py_ssize_t i, n = len(engines)
    cdef int status = OK
    cdef unsigned long long fp
    cdef Py_ssize_t width = first.arrays["current"].size
    turned = aligned({"w": (first.m.stride, width)}, first.network.dtype)["w"]  # as many rows as sources, or more
    cdef void *w = address(turned)
    for i in range(n):
        engine = engines[i]
        xs, target, label, mask, scale = trials[i]
        engine.reset()
        if learn:
            engine.clear()
        engine._enter("run")
        engine.m.scale = scale
        streams[i] = engine._trials(xs, target, label, mask)
        streams[i].learn, streams[i].y = learn, address(None if ys is None else ys[i])
        models[i] = &engine.m
    with nogil:
        fp = mpf_flush()
        if not alone:
            status = first.kernels.run_together(models, streams, n, w, width)
        for i in range(n if alone else 0):
            status = first.kernels.run(models[i], &streams[i])
            if status != OK:
                streams[0].failed = i
                break
        for i in range(n):
            first.kernels.settle(models[i])
        mpf_unflush(fp)
    for i in range(n):
        engine = engines[i]
        engine.m.scale = 1.0
        mpf_release(&engine.busy)
    if status != OK:
        engine = engines[streams[0].failed]
        engine._check(status, &streams[streams[0].failed])


include "capi.pxi"
