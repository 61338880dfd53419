"""All arithmetic of the engine.  Included by kernels_<isa>.pyx; never compiled by itself.

One step, in the order of the files below (k = leak, s_t = [z_{t-1} | x_t | 1], N units, r modulators)::

    forward      v = k v + (1-k) (W z + W_in x + b),   z = phi(v),   h = phi'(v),   y = W_out z + b_out
    error        dE/dy from a target, a class label, or given
    signal       L = W_out^T dE/dy,   m[a] = sum_j U[j, a] L[j] h[j]
    traces       R[p] = K R[p] + (1-k) V[:, p] h_{t-1}[p] eps_{t-1}        (r, Q) for every unit p
    gradient     dW[p] = L[p] h[p] eps + m R[p],   accumulated or descended at once

Online, weights and traces lie by source where updates may wait, and a silent source is not read (pending.pxi); with few
connections the last two and W z are one pass over these alone (sparse.pxi).

Rules of these files.  One body per formula, over the fused type `real`; `kernel_table` at the end lists the
float32 and float64 names.  A kernel takes outputs, inputs, scalars, sizes; it allocates nothing, knows
no Python and is ``noexcept nogil``.

Vectors.  The loops over a row are written in registers (`vec`, linear.pxi): one entry's additions come in the
order written here, and sums over entries are taken over a fixed number of lanes.  Products that are added up are fused
(`madd`: one rounding) where the instruction set can, in so many words: ``-ffp-contract=off`` keeps the compiler from
choosing.  So all instruction sets that can compute the same bits, and the baseline differs from them by rounding.
Measured: fused, 4 to 26 % less time for `exact` on a core with 256-bit registers; more where one unit multiplies and adds.
Subnormal numbers are flushed to zero while a kernel runs, by core.pyx.
"""

from libc.math cimport INFINITY, exp, fabs, log
from libc.string cimport memcpy, memset

from model cimport *

ctypedef fused real:
    float
    double

include "linear.pxi"
include "forward.pxi"
include "sparse.pxi"
include "traces.pxi"
include "lazy.pxi"
include "by_source.pxi"
include "writing.pxi"
include "pending.pxi"
include "sums.pxi"
include "filter.pxi"
include "trials.pxi"


# ---------------------------------------------------------------- float32 and float64 names

cdef int step_f32(Model *m, const void *x, const void *target, long long label, ErrorSource source, bint learn) noexcept nogil:
    return step(m, <const float *>x, <const float *>target, label, source, learn)

cdef int step_f64(Model *m, const void *x, const void *target, long long label, ErrorSource source, bint learn) noexcept nogil:
    return step(m, <const double *>x, <const double *>target, label, source, learn)

cdef int run_f32(Model *m, Trials *trial) noexcept nogil:
    return run(m, trial, <const float *>trial.x)

cdef int run_f64(Model *m, Trials *trial) noexcept nogil:
    return run(m, trial, <const double *>trial.x)

cdef int run_together_f32(Model **models, Trials *trials, Record *recs, Py_ssize_t n, void *w, Py_ssize_t width) noexcept nogil:
    return run_together(models, trials, recs, n, <float *>w, width)

cdef int run_together_f64(Model **models, Trials *trials, Record *recs, Py_ssize_t n, void *w, Py_ssize_t width) noexcept nogil:
    return run_together(models, trials, recs, n, <double *>w, width)

cdef void adjoint_f32(Model **models, Record *recs, Backwards *how, Py_ssize_t n, Py_ssize_t n_steps, void *w, Py_ssize_t width) noexcept nogil:
    adjoint(models, recs, how, n, n_steps, <float *>w, width)

cdef void adjoint_f64(Model **models, Record *recs, Backwards *how, Py_ssize_t n, Py_ssize_t n_steps, void *w, Py_ssize_t width) noexcept nogil:
    adjoint(models, recs, how, n, n_steps, <double *>w, width)

cdef void assist_f32(Model *m, int place) noexcept nogil:
    assist_in(m, place, <const float *>NULL)

cdef void assist_f64(Model *m, int place) noexcept nogil:
    assist_in(m, place, <const double *>NULL)

cdef void reset_f32(Model *m) noexcept nogil:
    rest(m, <float *>m.v)

cdef void reset_f64(Model *m) noexcept nogil:
    rest(m, <double *>m.v)

cdef void settle_f32(Model *m) noexcept nogil:
    settle(m, <float *>m.coef)
    show(m, <const float *>m.by_source)

cdef void settle_f64(Model *m) noexcept nogil:
    settle(m, <double *>m.coef)
    show(m, <const double *>m.by_source)

cdef void write_f32(Model *m) noexcept nogil:
    settle(m, <float *>m.coef)

cdef void descend_f32(Model *m) noexcept nogil:
    end_chunk(m, True, <float *>m.grad)

cdef void write_f64(Model *m) noexcept nogil:
    settle(m, <double *>m.coef)

cdef void descend_f64(Model *m) noexcept nogil:
    end_chunk(m, True, <double *>m.grad)

cdef void refresh_f32(Model *m) noexcept nogil:
    refresh_filter(m, <const float *>m.w_rec)

cdef void refresh_f64(Model *m) noexcept nogil:
    refresh_filter(m, <const double *>m.w_rec)

cdef void derive_f32(Model *m) noexcept nogil:
    filter_from_means(m, <float *>m.coef)

cdef void derive_f64(Model *m) noexcept nogil:
    filter_from_means(m, <double *>m.coef)

cdef bint gather_f32(Model *m) noexcept nogil:
    return gather(m, <float *>m.packed)

cdef bint gather_f64(Model *m) noexcept nogil:
    return gather(m, <double *>m.packed)

cdef bint finite_f32(const void *values, Py_ssize_t n) noexcept nogil:
    return finite(<const float *>values, n)

cdef bint finite_f64(const void *values, Py_ssize_t n) noexcept nogil:
    return finite(<const double *>values, n)


cdef Kernels[2] kernel_table
kernel_table[0] = Kernels(step_f32, run_f32, run_together_f32, adjoint_f32, assist_f32, reset_f32, settle_f32, write_f32, descend_f32, refresh_f32, derive_f32, gather_f32, finite_f32)
kernel_table[1] = Kernels(step_f64, run_f64, run_together_f64, adjoint_f64, assist_f64, reset_f64, settle_f64, write_f64, descend_f64, refresh_f64, derive_f64, gather_f64, finite_f64)


def table() -> int:
    """Address of the two `Kernels` tables (float32, float64) of this instruction set."""
    return <size_t>&kernel_table[0]
