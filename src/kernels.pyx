"""All arithmetic of the engine.  Included by kernels_<isa>_<dtype>.pyx; never compiled by itself.

One step, in the order of the files below (k = leak, s_t = [z_{t-1} | x_t | 1], N units, r modulators)::

    forward      v = k v + (1-k) (W z + W_in x + b),   z = phi(v),   h = phi'(v),   y = W_out z + b_out
    error        dE/dy from a target, a class label, or given
    signal       L = W_out^T dE/dy,   m[a] = sum_j U[j, a] L[j] h[j]
    traces       R[p] = K R[p] + (1-k) V[:, p] h_{t-1}[p] eps_{t-1}        (r, Q) for every unit p
    gradient     dW[p] = L[p] h[p] eps + m R[p],   accumulated or descended at once

Online, weights and traces lie by source where updates may wait, and a silent source is not read (pending.pxi); with few
connections the last two and W z are one pass over these alone (sparse.pxi).

Rules of these files.  One body per formula, over `real`, which is float or double by how the file is built; a kernel takes
outputs, inputs, scalars, sizes; it allocates nothing, knows no Python and is ``noexcept nogil``.

Vectors.  The loops over a row are written in registers (`vec`, linear.pxi): one entry's additions come in the
order written here, and sums over entries are taken over a fixed number of lanes.  Products that are added up are fused
(`madd`: one rounding) where the instruction set can, in so many words: ``-ffp-contract=off`` keeps the compiler from
choosing.  So all instruction sets that can compute the same bits, and the baseline differs from them by rounding.
Measured: fused, 4 to 26 % less time for `exact` on a core with 256-bit registers; more where one unit multiplies and adds.
Subnormal numbers are flushed to zero while kernels run, by core.pyx.
"""

from libc.math cimport INFINITY, exp, fabs, log
from libc.string cimport memcpy, memset

from model cimport *

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


# ---------------------------------------------------------------- what the engine calls

cdef void settle_and_show(Model *m) noexcept nogil:
    settle(m)
    show(m)


cdef Kernels kernels
kernels = Kernels(
    step, run, run_together, adjoint, assist_in, rest, settle_and_show, settle, descend_by_gradient, refresh_filter, filter_from_means, set_factor,
    follow_h, gather, finite,
)  # fmt: skip


def table() -> int:
    """Address of the `Kernels` of this instruction set and this dtype."""
    return <size_t>&kernels
