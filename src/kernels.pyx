"""All arithmetic of the engine.  Included by kernels_<isa>.pyx; never compiled by itself.

One step, in the order of this file (k = leak, s_t = [z_{t-1} | x_t | 1], N units, r modulators)::

    forward      v = k v + (1-k) (W z + W_in x + b),   z = phi(v),   h = phi'(v),   y = W_out z + b_out
    error        dE/dy from a target, a class label, or given
    signal       L = W_out^T dE/dy,   m[a] = sum_j U[j, a] L[j] h[j]
    traces       R[p] = K R[p] + (1-k) V[:, p] h_{t-1}[p] eps_{t-1}        (r, Q) for every unit p
    gradient     dW[p] = L[p] h[p] eps + m R[p],   accumulated or descended at once

Rules of this file.  One body per formula, over the fused type `real`; `table` at the end lists the
float32 and float64 names.  A kernel takes outputs, inputs, scalars, sizes; it allocates nothing, knows
no Python and is ``noexcept nogil``.

Vectors.  Loops run over blocks of LANES entries held in small local arrays, which the compiler keeps
in registers, and sums are taken lane by lane and then by halves: their order is written here, not left
to the compiler.  Together with ``-ffp-contract=off`` this makes every instruction set compute the same bits.
"""

from libc.math cimport INFINITY, exp, expf, fabs, log, log1p, log1pf, tanh, tanhf
from libc.string cimport memcpy, memset

from model cimport *

ctypedef fused real:
    float
    double


# ---------------------------------------------------------------- vectors and matrices

cdef bint finite(const real *x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        if x[i] - x[i] != 0:  # Inf - Inf and NaN - NaN are NaN
            return False
    return True


cdef void axpy(real *out, real a, const real *x, Py_ssize_t n) noexcept nogil:
    """out += a x."""
    cdef Py_ssize_t i
    for i in range(n):
        out[i] += a * x[i]


cdef inline real lane_sum(real *lane, Py_ssize_t lanes) noexcept nogil:
    cdef Py_ssize_t half = lanes // 2, j
    while half:
        for j in range(half):
            lane[j] += lane[j + half]
        half //= 2
    return lane[0]


cdef void matvec(real *out, const real *w, const real *x, Py_ssize_t n_rows, Py_ssize_t n) noexcept nogil:
    """out[p] = sum_q w[p, q] x[q].

    Four rows at a time: a dot product alone waits for its own additions, and x is loaded once for four.
    The last rows are doubled up instead of having a loop of their own.
    """
    cdef Py_ssize_t lanes = 16 if real is float else 8
    cdef Py_ssize_t p, q, j, p1, p2, p3
    cdef const real *w0
    cdef const real *w1
    cdef const real *w2
    cdef const real *w3
    cdef real s0[16]
    cdef real s1[16]
    cdef real s2[16]
    cdef real s3[16]
    cdef real t0, t1, t2, t3
    if n < 8:
        for p in range(n_rows):
            t0 = 0
            for q in range(n):
                t0 += w[p * n + q] * x[q]
            out[p] = t0
        return
    for p in range(0, n_rows, 4):
        p1, p2, p3 = min(p + 1, n_rows - 1), min(p + 2, n_rows - 1), min(p + 3, n_rows - 1)
        w0, w1, w2, w3 = w + p * n, w + p1 * n, w + p2 * n, w + p3 * n
        for j in range(lanes):
            s0[j] = s1[j] = s2[j] = s3[j] = 0
        q = 0
        while q + lanes <= n:
            for j in range(lanes):
                s0[j] += w0[q + j] * x[q + j]
                s1[j] += w1[q + j] * x[q + j]
                s2[j] += w2[q + j] * x[q + j]
                s3[j] += w3[q + j] * x[q + j]
            q += lanes
        if q + lanes // 2 <= n:
            for j in range(lanes // 2):
                s0[j] += w0[q + j] * x[q + j]
                s1[j] += w1[q + j] * x[q + j]
                s2[j] += w2[q + j] * x[q + j]
                s3[j] += w3[q + j] * x[q + j]
            q += lanes // 2
        t0 = t1 = t2 = t3 = 0
        while q < n:
            t0 += w0[q] * x[q]
            t1 += w1[q] * x[q]
            t2 += w2[q] * x[q]
            t3 += w3[q] * x[q]
            q += 1
        out[p] = lane_sum(s0, lanes) + t0
        out[p1] = lane_sum(s1, lanes) + t1
        out[p2] = lane_sum(s2, lanes) + t2
        out[p3] = lane_sum(s3, lanes) + t3


cdef void matvec_t(real *out, const real *w, const real *x, Py_ssize_t n_rows, Py_ssize_t n) noexcept nogil:
    """out[q] = sum_p w[p, q] x[p]; rows with x[p] = 0 (a unit at rest, an output without error) are not read."""
    cdef Py_ssize_t p
    memset(out, 0, n * sizeof(real))
    for p in range(n_rows):
        if x[p] != 0:
            axpy(out, x[p], w + p * n, n)


# ---------------------------------------------------------------- forward

cdef inline real exp_(real x) noexcept nogil:
    return expf(x) if real is float else exp(x)


cdef inline real log1p_(real x) noexcept nogil:
    return log1pf(x) if real is float else log1p(x)


cdef inline real tanh_(real x) noexcept nogil:
    return tanhf(x) if real is float else tanh(x)


cdef void activate(real *z, real *h, const real *v, Py_ssize_t n, Activation kind) noexcept nogil:
    """z = phi(v), h = phi'(v); at v = 0 relu has h = 0."""
    cdef Py_ssize_t i
    cdef real s
    if kind == RELU:
        for i in range(n):
            h[i] = 1 if v[i] > 0 else 0
            z[i] = 0 if v[i] <= 0 else v[i]  # a NaN stays a NaN
    elif kind == SOFTPLUS:
        for i in range(n):
            s = v[i] if v[i] > 0 else 0
            z[i] = s + log1p_(exp_(-v[i] if v[i] > 0 else v[i]))
            h[i] = <real>0.5 * (1 + tanh_(<real>0.5 * v[i]))
    elif kind == TANH:
        for i in range(n):
            z[i] = tanh_(v[i])
            h[i] = 1 - z[i] * z[i]
    elif kind == SIGMOID:
        for i in range(n):
            z[i] = <real>0.5 * (1 + tanh_(<real>0.5 * v[i]))
            h[i] = z[i] * (1 - z[i])
    else:
        for i in range(n):
            z[i] = v[i]
            h[i] = 1


cdef bint forward(Model *m, const real *x) noexcept nogil:
    """v, z, h, eps and y of this step; h_before and eps_before of the last.  False: y is not finite."""
    cdef real *pre = <real *>m.pre
    cdef real *v = <real *>m.v
    cdef real *eps = <real *>m.eps
    cdef real *y = <real *>m.y
    cdef const real *current = <real *>m.current
    cdef const real *input = <real *>m.input
    cdef const real *b_rec = <real *>m.b_rec
    cdef const real *b_out = <real *>m.b_out
    cdef real keep = <real>m.leak, take = <real>(1 - m.leak)
    cdef Py_ssize_t p, q, o, n = m.n_rec
    memcpy(m.h_before, m.h, n * sizeof(real))
    memcpy(m.eps_before, m.eps, m.stride * sizeof(real))
    memcpy(pre + n, x, m.n_in * sizeof(real))
    matvec(<real *>m.current, <const real *>m.w_rec, pre, n, n)
    matvec(<real *>m.input, <const real *>m.w_in, x, n, m.n_in)
    if b_rec != NULL:
        axpy(<real *>m.input, <real>1, b_rec, n)
    for p in range(n):
        v[p] = keep * v[p] + take * (current[p] + input[p])
    for q in range(m.stride):
        eps[q] = keep * eps[q] + take * pre[q]
    activate(pre, <real *>m.h, v, n, m.activation)
    matvec(y, <const real *>m.w_out, pre, m.n_out, n)
    for o in range(m.n_out):
        y[o] += b_out[o]
    return finite(y, m.n_out)


# ---------------------------------------------------------------- loss and learning signal

cdef Status output_error(Model *m, const real *target, long long label, ErrorSource source) noexcept nogil:
    """error = scale dE/dy; adds scale E to loss_sum (kept in double: it adds up over long streams).

    mse            E = sum_o (y - y*)^2 / (2 n_out)
    cross entropy  E = log sum_o exp(y) - y[label]
    """
    cdef const real *y = <real *>m.y
    cdef real *error = <real *>m.error
    cdef double e, loss = 0, total = 0, top = -INFINITY, scale = m.scale
    cdef Py_ssize_t o, n = m.n_out
    if source == FROM_SIGNAL:
        for o in range(n):
            error[o] = <real>(scale * target[o])
        return OK
    if source == FROM_TARGET:
        for o in range(n):
            e = <double>y[o] - target[o]
            error[o] = <real>(scale * e / n)
            loss += e * e / (2 * n)
    else:
        for o in range(n):
            top = max(top, <double>y[o])
        for o in range(n):
            total += exp(y[o] - top)
        for o in range(n):
            e = exp(y[o] - top) / total - (1 if o == label else 0)
            error[o] = <real>(scale * e)
        loss = log(total) - (y[label] - top)
    m.loss_sum += scale * loss
    return OK


cdef void modulators(Model *m, real *out, const real *values) noexcept nogil:
    """out[a] = sum_j U[j, a] values[j]; for types the sum over the units of type a."""
    cdef Py_ssize_t j, a
    cdef const real *u = <real *>m.u
    memset(out, 0, m.rank * sizeof(real))
    if m.type != NULL:
        for j in range(m.n_rec):
            out[m.type[j]] += values[j]
    else:
        for j in range(m.n_rec):
            for a in range(m.rank):
                out[a] += u[j * m.rank + a] * values[j]


cdef void learning_signal(Model *m, real *signal) noexcept nogil:
    """L = W_out^T dE/dy (or B dE/dy), local = L h."""
    cdef real *local = <real *>m.local
    cdef const real *h = <real *>m.h
    cdef Py_ssize_t p
    if m.feedback != NULL:
        matvec(signal, <const real *>m.feedback, <const real *>m.error, m.n_rec, m.n_out)
    else:
        matvec_t(signal, <const real *>m.w_out, <const real *>m.error, m.n_out, m.n_rec)
    for p in range(m.n_rec):
        local[p] = signal[p] * h[p]


# ---------------------------------------------------------------- traces

cdef inline void filter_body(real *R, real *out, const real *K, const real *d, const real *eps, const real *m,
                             real *old, Py_ssize_t rank, Py_ssize_t stride) noexcept nogil:
    cdef Py_ssize_t q, a, c, j
    cdef real s[LANES]
    cdef real total[LANES]
    q = 0
    while q < stride:
        for a in range(rank):
            for j in range(LANES):
                old[a * LANES + j] = R[a * stride + q + j]
        for j in range(LANES):
            total[j] = 0
        for a in range(rank):
            for j in range(LANES):
                s[j] = d[a] * eps[q + j]
            for c in range(rank):
                for j in range(LANES):
                    s[j] += K[a * rank + c] * old[c * LANES + j]
            for j in range(LANES):
                R[a * stride + q + j] = s[j]
            if m != NULL:
                for j in range(LANES):
                    total[j] += m[a] * s[j]
        if m != NULL:
            for j in range(LANES):
                out[q + j] = total[j]
        q += LANES


cdef void filter_traces(real *R, real *out, const real *K, const real *d, const real *eps, const real *m,
                        real *old, Py_ssize_t rank, Py_ssize_t stride) noexcept nogil:
    """R[a] = sum_c K[a, c] R[c] + d[a] eps; where there is an error (m given), out = sum_a m[a] R[a].

    The convolution of a trace with the taps K^{s-1} d, by its own recursion.  R (r, Q), eps and out (Q,).
    Up to four modulators the rank is a constant to the compiler and `old` stays in registers.
    """
    cdef real few[4 * LANES]
    if rank == 1:
        filter_body(R, out, K, d, eps, m, few, 1, stride)
    elif rank == 2:
        filter_body(R, out, K, d, eps, m, few, 2, stride)
    elif rank == 3:
        filter_body(R, out, K, d, eps, m, few, 3, stride)
    elif rank == 4:
        filter_body(R, out, K, d, eps, m, few, 4, stride)
    else:
        filter_body(R, out, K, d, eps, m, old, rank, stride)


cdef void exact_traces(Model *m, Py_ssize_t p, const real *modulator, real *drive) noexcept nogil:
    """R_t[p] from h_{t-1}[p] eps_{t-1}; with an error, row = sum_a m[a] R_t[p, a]."""
    cdef const real *v = <real *>m.drive + p * m.rank
    cdef real h_before = (<real *>m.h_before)[p]
    cdef Py_ssize_t a
    for a in range(m.rank):
        drive[a] = v[a] * h_before
    filter_traces(<real *>m.traces + p * m.rank * m.stride, <real *>m.row, <real *>m.K, drive,
                  <real *>m.eps_before, modulator, <real *>m.old, m.rank, m.stride)


cdef void mean_traces(Model *m, const real *modulator) noexcept nogil:
    """The drives of the `mean` factor differ only by class, so one (r, Q) trace per class serves all units.

    G[c] = K G[c] + d[c] (eps_{t-1} + l[c]),   class_rows[c] = sum_a m[a] G[c, a].
    l is zero but for `self_modulation` = False, where R[j, p] = G[type j, type p] + (j = p) l[type p]:
    l[b] = kept[b] l[b] - (1-k) mu[b] M[b, b] eps_{t-1},   kept[b] = k - (1-k) mu[b] M[b, b],
    and the local term becomes L[p] h[p] (eps + l[type p]): class_eps.
    """
    cdef const real *eps = <real *>m.eps_before
    cdef const real *kept = <real *>m.self_drive
    cdef const real *taken = kept + m.n_class
    cdef const real *drive_trace = eps
    cdef real *l
    cdef real *own
    cdef Py_ssize_t c, q, Q = m.stride
    for c in range(m.n_class):
        if m.self_traces != NULL:
            l, own = <real *>m.self_traces + c * Q, <real *>m.class_eps + c * Q
            drive_trace = <real *>m.row
            for q in range(Q):
                (<real *>m.row)[q] = eps[q] + l[q]
            for q in range(Q):
                l[q] = kept[c] * l[q] - taken[c] * eps[q]
            for q in range(Q):
                own[q] = (<real *>m.eps)[q] + l[q]
        filter_traces(<real *>m.traces + c * m.rank * Q, <real *>m.class_rows + c * Q, <real *>m.K,
                      <real *>m.class_drive + c * m.rank, drive_trace, modulator, <real *>m.old, m.rank, Q)


# ---------------------------------------------------------------- gradient and update

cdef inline void descend_block(real *w, real local, const real *eps, const real *rest, real lr, const real *sign,
                               real *sums, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t j
    cdef real to[LANES]
    cdef real total[LANES]
    for j in range(count):
        to[j] = w[j] - lr * (local * eps[j] + rest[j])
    for j in range(count):
        to[j] = 0 if sign[j] * to[j] < 0 else to[j]
    for j in range(count):
        total[j] = sums[j] + to[j]
    for j in range(count):
        w[j] = to[j]
    for j in range(count):
        sums[j] = total[j]


cdef void descend(real *w, real local, const real *eps, const real *rest, real lr, const real *sign, real *sums,
                  Py_ssize_t n) noexcept nogil:
    """w -= lr (local eps + rest); 0 where that crossed zero against its sign; sums += w.

    A NaN stays a NaN, so that it is found in y.  Loads come before stores in every block, which
    spares the compiler the question whether the arrays overlap.
    """
    cdef Py_ssize_t q = 0
    while q + LANES <= n:
        descend_block(w + q, local, eps + q, rest + q, lr, sign + q, sums + q, LANES)
        q += LANES
    if q + 8 <= n:
        descend_block(w + q, local, eps + q, rest + q, lr, sign + q, sums + q, 8)
        q += 8
    while q < n:
        descend_block(w + q, local, eps + q, rest + q, lr, sign + q, sums + q, 1)
        q += 1


cdef void accumulate(real *grad, real local, const real *eps, const real *rest, Py_ssize_t stride) noexcept nogil:
    """grad += local eps + rest, over whole blocks."""
    cdef Py_ssize_t q = 0, j
    cdef real g[LANES]
    while q < stride:
        for j in range(LANES):
            g[j] = grad[q + j] + (local * eps[q + j] + rest[q + j])
        for j in range(LANES):
            grad[q + j] = g[j]
        q += LANES


cdef const real *masked(Model *m, Py_ssize_t p, real local, const real *eps, const real *rest) noexcept nogil:
    """The row of the gradient written out, 0 where the mask allows no synapse."""
    cdef real *row = <real *>m.masked
    cdef const unsigned char *mask = m.mask + p * m.n_rec
    cdef Py_ssize_t q
    for q in range(m.stride):
        row[q] = local * eps[q] + rest[q]
    for q in range(m.n_rec):
        row[q] *= mask[q]
    return row


cdef void learn_row(Model *m, Py_ssize_t p, const real *eps, const real *rest, bint sum_columns) noexcept nogil:
    """dW[p] = L[p] h[p] eps + rest, added to the accumulated gradient or descended at once."""
    cdef real local = (<real *>m.local)[p], lr = <real>m.lr
    cdef const real *zeros = <real *>m.zeros
    cdef Py_ssize_t n = m.n_rec
    cdef real *w = <real *>m.w_rec + p * n
    cdef real *sums = <real *>m.spare
    cdef real own_weight = w[p], own_sum
    if not m.online:
        accumulate(<real *>m.grad + p * m.stride, local, eps, rest, m.stride)
        return
    if sum_columns:
        sums = <real *>m.column_sums + m.type[p] * m.stride
    if m.mask != NULL:
        rest = masked(m, p, local, eps, rest)
        local = 0
    own_sum = sums[p]
    descend(w, local, eps, rest, lr, <const real *>m.sign, sums, n)
    if not m.autapses:
        w[p] = own_weight
        sums[p] = own_sum + own_weight
    descend(<real *>m.w_in + p * m.n_in, local, eps + n, rest + n, lr, zeros, <real *>m.spare, m.n_in)
    if m.b_rec != NULL:
        (<real *>m.b_rec)[p] -= lr * (local * eps[n + m.n_in] + rest[n + m.n_in])


cdef void learn_readout(Model *m, const real *error, const real *z) noexcept nogil:
    """dW_out = dE/dy z^T, db_out = dE/dy: exact in every rule."""
    cdef Py_ssize_t o, n = m.n_rec
    cdef real lr = <real>m.lr
    for o in range(m.n_out):
        if error[o] == 0:
            continue
        if m.online:
            descend(<real *>m.w_out + o * n, error[o], z, <const real *>m.zeros, lr, <const real *>m.sign, <real *>m.spare, n)
            (<real *>m.b_out)[o] -= lr * error[o]
        else:
            axpy(<real *>m.grad_w_out + o * n, error[o], z, n)
            (<real *>m.grad_b_out)[o] += error[o]


cdef const real *class_row(Model *m, Py_ssize_t p, real *row) noexcept nogil:
    """Nonlocal term of unit p in the `mean` factor: that of its type, or sum_c mu[p] V[c, p] class_rows[c]."""
    cdef const real *rows = <real *>m.class_rows
    cdef const real *readout = <real *>m.readout + p * m.n_class
    cdef Py_ssize_t c
    if m.type != NULL:
        return rows + m.type[p] * m.stride
    memset(row, 0, m.stride * sizeof(real))
    for c in range(m.n_class):
        axpy(row, readout[c], rows + c * m.stride, m.stride)
    return row


cdef void trace_and_learn(Model *m, bint learn, real *row) noexcept nogil:
    """Advance every trace by one step and, with an error, take its gradient: one pass over rows."""
    cdef const real *modulator = NULL
    cdef const real *local = <real *>m.local
    cdef const real *eps = <real *>m.eps
    cdef const real *rest = <real *>m.zeros
    cdef Py_ssize_t p, n = m.n_rec
    cdef bint refresh
    if learn and m.trace != TRACE_NONE:
        modulators(m, <real *>m.modulator, local)
        modulator = <real *>m.modulator
    if m.trace == TRACE_MEAN:
        mean_traces(m, modulator)
    if not learn:
        if m.trace == TRACE_EXACT:
            for p in range(n):
                exact_traces(m, p, modulator, <real *>m.input)
        return
    m.updates += m.online
    refresh = (m.online and m.type != NULL and m.refresh_every > 0 and m.updates % m.refresh_every == 0)
    if refresh:
        memset(m.column_sums, 0, m.rank * m.stride * sizeof(real))
    for p in range(n):
        if m.trace == TRACE_EXACT:
            exact_traces(m, p, modulator, <real *>m.input)
            rest = row
        elif m.trace == TRACE_MEAN:
            rest = class_row(m, p, row)
            if m.self_traces != NULL:
                eps = <real *>m.class_eps + m.type[p] * m.stride
        elif local[p] == 0:
            continue
        learn_row(m, p, eps, rest, refresh)
    if refresh:
        means_from_sums(m, <real *>m.column_sums)
        derive_filter(m, <real *>m.K)


# ---------------------------------------------------------------- modulatory matrix

cdef void means_from_sums(Model *m, const real *sums) noexcept nogil:
    """M[a, b] = (sum of W over type a x type b) / (n[a] n[b]); added in double over N terms."""
    cdef Py_ssize_t a, b, q, r = m.rank
    memset(m.means, 0, r * r * sizeof(double))
    for a in range(r):
        for q in range(m.n_rec):
            m.means[a * r + m.type[q]] += sums[a * m.stride + q]
        for b in range(r):
            m.means[a * r + b] /= m.type_size[a] * m.type_size[b]


cdef void derive_filter(Model *m, real *K) noexcept nogil:
    """All that follows from M: K = k I + (1-k) M diag(n mu), the drives, and whether the filter decays."""
    cdef Py_ssize_t a, b, p, r = m.rank
    cdef real *drive = <real *>m.drive
    cdef real *class_drive = <real *>m.class_drive
    cdef real *kept = <real *>m.self_drive
    cdef double take = 1 - m.leak, own
    for a in range(r):
        for b in range(r):
            m.power[a * r + b] = take * m.means[a * r + b] * m.type_size[b] * m.type_mu[b]
            class_drive[b * r + a] = <real>(take * m.means[a * r + b] * m.type_mu[b])
        own = 0 if m.self_modulation else take * m.type_mu[a] * m.means[a * r + a]
        m.power[a * r + a] += m.leak - own
        kept[a] = <real>(m.leak - own)
        kept[r + a] = <real>own
    for a in range(r * r):
        K[a] = <real>m.power[a]
    for p in range(m.n_rec):
        for a in range(r):
            drive[p * r + a] = <real>(take * m.means[a * r + m.type[p]])
    m.unstable = not decays(m.power, m.power + r * r, r)
    for a in range(r):
        if not fabs(<double>kept[a]) < 1:
            m.unstable = True


cdef bint decays(double *power, double *scratch, Py_ssize_t r) noexcept nogil:
    """Whether rho(K) < 1: squares K until its row sums fall below 1 or it has plainly not decayed."""
    cdef Py_ssize_t a, b, c, squaring
    cdef double norm, row
    for squaring in range(40):
        norm = 0
        for a in range(r):
            row = 0
            for b in range(r):
                row += fabs(power[a * r + b])
            norm = row if not row <= norm else norm
        if norm < 1:
            return True
        if not norm < 1e100:
            return False
        for a in range(r):
            for b in range(r):
                row = 0
                for c in range(r):
                    row += power[a * r + c] * power[c * r + b]
                scratch[a * r + b] = row
        power, scratch = scratch, power
    return False


cdef void refresh_filter(Model *m, const real *w) noexcept nogil:
    """M, and all that follows from it, from W as it stands."""
    cdef Py_ssize_t p
    memset(m.column_sums, 0, m.rank * m.stride * sizeof(real))
    for p in range(m.n_rec):
        axpy(<real *>m.column_sums + m.type[p] * m.stride, <real>1, w + p * m.n_rec, m.n_rec)
    means_from_sums(m, <real *>m.column_sums)
    derive_filter(m, <real *>m.K)


# ---------------------------------------------------------------- steps and trials

cdef void rest(Model *m, real *v) noexcept nogil:
    """The start of a trial: v = 0, z = phi(0), every trace 0."""
    cdef real *pre = <real *>m.pre
    cdef Py_ssize_t n = m.n_rec, Q = m.stride, rows = 0
    memset(v, 0, n * sizeof(real))
    memset(m.eps, 0, Q * sizeof(real))
    memset(pre, 0, Q * sizeof(real))
    if m.b_rec != NULL:
        pre[n + m.n_in] = 1
    activate(pre, <real *>m.h, v, n, m.activation)
    if m.trace == TRACE_EXACT:
        rows = n
    elif m.trace == TRACE_MEAN:
        rows = m.n_class
    if rows:
        memset(m.traces, 0, rows * m.rank * Q * sizeof(real))
    if m.self_traces != NULL:
        memset(m.self_traces, 0, m.n_class * Q * sizeof(real))


cdef Status step(Model *m, const real *x, const real *target, long long label, ErrorSource source,
                 bint learn) noexcept nogil:
    """One time step.  A refused input leaves everything as it was; a diverged readout leaves the weights."""
    if not finite(x, m.n_in):
        return X_NOT_FINITE
    if (source == FROM_TARGET or source == FROM_SIGNAL) and not finite(target, m.n_out):
        return TARGET_NOT_FINITE
    if source == FROM_LABEL and not 0 <= label < m.n_out:
        return LABEL_OUT_OF_RANGE
    if not forward(m, x):
        return DIVERGED
    if source == FROM_NOTHING:
        learn = False
    else:
        output_error(m, target, label, source)
    if learn:
        learning_signal(m, <real *>m.signal)
    trace_and_learn(m, learn, <real *>m.row)
    if learn:
        learn_readout(m, <real *>m.error, <real *>m.pre)
    return OK


cdef ErrorSource source_at(Trials *trial, Py_ssize_t t) noexcept nogil:
    if trial.mask != NULL and not trial.mask[t]:
        return FROM_NOTHING
    if trial.target != NULL:
        return FROM_TARGET
    return FROM_LABEL if trial.label != NULL else FROM_NOTHING


cdef Status run(Model *m, Trials *trial, const real *x) noexcept nogil:
    """`step` over (T, n_in)."""
    cdef const real *target = <const real *>trial.target
    cdef ErrorSource source
    cdef Status status
    cdef Py_ssize_t t
    for t in range(trial.n_steps):
        trial.steps_done = t
        source = source_at(trial, t)
        status = step(m, x + t * m.n_in, target + t * m.n_out if target != NULL else NULL,
                      trial.label[t] if source == FROM_LABEL else 0, source, trial.learn)
        if status != OK:
            return status
        if trial.y != NULL:
            memcpy(<real *>trial.y + t * m.n_out, m.y, m.n_out * sizeof(real))
    return OK


# ---------------------------------------------------------------- the adjoint form

cdef Status record_trial(Model *m, Trials *trial, Record *rec, const real *x) noexcept nogil:
    """Run a trial without traces and keep what `adjoint` needs; the readout's gradient is added on the way."""
    cdef const real *target = <const real *>trial.target
    cdef real *pre = <real *>rec.pre
    cdef real *signal = <real *>rec.signal
    cdef ErrorSource source
    cdef Py_ssize_t t, n = m.n_rec, Q = m.stride
    for t in range(trial.n_steps):
        trial.steps_done = t
        memcpy(pre + t * Q, m.pre, n * sizeof(real))  # z_{t-1}: forward overwrites it
        if not forward(m, x + t * m.n_in):
            return DIVERGED
        memcpy(pre + t * Q + n, <real *>m.pre + n, (Q - n) * sizeof(real))
        memcpy(<real *>rec.eps + t * Q, m.eps, Q * sizeof(real))
        memcpy(<real *>rec.h + t * n, m.h, n * sizeof(real))
        source = source_at(trial, t)
        if source == FROM_NOTHING:
            memset(signal + t * n, 0, n * sizeof(real))
            continue
        output_error(m, target + t * m.n_out if target != NULL else NULL,
                     trial.label[t] if source == FROM_LABEL else 0, source)
        learning_signal(m, signal + t * n)
        learn_readout(m, <real *>m.error, <real *>m.pre)
    return OK


cdef void adjoint(Model *m, Record *rec, Adjoint kind, bint cells, const real *mu, Py_ssize_t n_steps) noexcept nogil:
    """Backwards in time; grad += sum_t rows_t eps_t^T (`exact`, none) or sum_t rows_t s_t^T (`mean`, BPTT).

    back = (1-k) Wb^T lam_{t+1}: two skinny products for U V, one pass over W for `cells` and BPTT.
    none   lam = h L                                         rows = lam
    exact  lam = h L + mu back + k lam_{t+1}                 rows = h (L + back)
    mean   lam = h L + mu back + k lam_{t+1}                 rows = (1-k) lam
    BPTT   lam = h (L + back) + k lam_{t+1}                  rows = (1-k) lam
    """
    cdef real *lam = <real *>m.local
    cdef real *back = <real *>m.current
    cdef real *modulator = <real *>m.modulator
    cdef const real *drive = <real *>m.drive
    cdef const real *kept = <real *>m.self_drive
    cdef const real *L
    cdef const real *h
    cdef real *rows
    cdef real keep = <real>m.leak, take = <real>(1 - m.leak), held
    cdef Py_ssize_t i, p, a, n = m.n_rec
    cdef bint onto_sources = kind == ADJOINT_MEAN or kind == ADJOINT_BPTT
    memset(lam, 0, n * sizeof(real))
    memset(back, 0, n * sizeof(real))
    for i in range(n_steps):
        L = <real *>rec.signal + (n_steps - 1 - i) * n
        h = <real *>rec.h + (n_steps - 1 - i) * n
        rows = <real *>rec.rows + (n_steps - 1 - i) * n
        if kind == ADJOINT_NONE:
            for p in range(n):
                rows[p] = h[p] * L[p]
            continue
        if cells:
            matvec_t(back, <const real *>m.w_rec, lam, n, n)
            for p in range(n):
                back[p] *= take
        else:
            modulators(m, modulator, lam)
            for p in range(n):
                back[p] = 0
                for a in range(m.rank):
                    back[p] += drive[p * m.rank + a] * modulator[a]
        for p in range(n):
            held = keep
            if kind == ADJOINT_MEAN and not m.self_modulation:
                held = kept[m.type[p]]
            if kind == ADJOINT_EXACT:
                rows[p] = h[p] * (L[p] + back[p])
            lam[p] = h[p] * (L[p] + back[p] if kind == ADJOINT_BPTT else L[p]) + held * lam[p]
            if kind != ADJOINT_BPTT:
                lam[p] += mu[p] * back[p]
            if kind != ADJOINT_EXACT:
                rows[p] = take * lam[p]
    add_products(<real *>m.grad, <real *>rec.rows, <real *>(rec.pre if onto_sources else rec.eps), n_steps, n, m.stride)


cdef void add_products(real *grad, const real *rows, const real *sources, Py_ssize_t n_steps, Py_ssize_t n,
                       Py_ssize_t stride) noexcept nogil:
    """grad[p, q] += sum_t rows[t, p] sources[t, q]; four steps for each pass over grad.  (N, Q), (T, N), (T, Q)."""
    cdef const real *r0
    cdef const real *r1
    cdef const real *r2
    cdef const real *r3
    cdef const real *s0
    cdef const real *s1
    cdef const real *s2
    cdef const real *s3
    cdef real *out
    cdef real g[LANES]
    cdef Py_ssize_t t = 0, p, q, j
    while t + 4 <= n_steps:
        r0, r1, r2, r3 = rows + t * n, rows + (t + 1) * n, rows + (t + 2) * n, rows + (t + 3) * n
        s0, s1, s2, s3 = (sources + t * stride, sources + (t + 1) * stride, sources + (t + 2) * stride,
                          sources + (t + 3) * stride)
        for p in range(n):
            if r0[p] == 0 and r1[p] == 0 and r2[p] == 0 and r3[p] == 0:  # a unit at rest
                continue
            out = grad + p * stride
            q = 0
            while q < stride:
                for j in range(LANES):
                    g[j] = out[q + j] + (r0[p] * s0[q + j] + r1[p] * s1[q + j] + (r2[p] * s2[q + j] + r3[p] * s3[q + j]))
                for j in range(LANES):
                    out[q + j] = g[j]
                q += LANES
        t += 4
    for t in range(t, n_steps):
        for p in range(n):
            axpy(grad + p * stride, rows[t * n + p], sources + t * stride, stride)


# ---------------------------------------------------------------- float32 and float64 names

cdef int step_f32(Model *m, const void *x, const void *target, long long label, ErrorSource source, bint learn) noexcept nogil:
    return step(m, <const float *>x, <const float *>target, label, source, learn)

cdef int step_f64(Model *m, const void *x, const void *target, long long label, ErrorSource source, bint learn) noexcept nogil:
    return step(m, <const double *>x, <const double *>target, label, source, learn)

cdef int run_f32(Model *m, Trials *trial) noexcept nogil:
    return run(m, trial, <const float *>trial.x)

cdef int run_f64(Model *m, Trials *trial) noexcept nogil:
    return run(m, trial, <const double *>trial.x)

cdef int record_f32(Model *m, Trials *trial, Record *rec) noexcept nogil:
    return record_trial(m, trial, rec, <const float *>trial.x)

cdef int record_f64(Model *m, Trials *trial, Record *rec) noexcept nogil:
    return record_trial(m, trial, rec, <const double *>trial.x)

cdef void adjoint_f32(Model *m, Record *rec, Adjoint kind, bint cells, const void *mu, Py_ssize_t n_steps) noexcept nogil:
    adjoint(m, rec, kind, cells, <const float *>mu, n_steps)

cdef void adjoint_f64(Model *m, Record *rec, Adjoint kind, bint cells, const void *mu, Py_ssize_t n_steps) noexcept nogil:
    adjoint(m, rec, kind, cells, <const double *>mu, n_steps)

cdef void reset_f32(Model *m) noexcept nogil:
    rest(m, <float *>m.v)

cdef void reset_f64(Model *m) noexcept nogil:
    rest(m, <double *>m.v)

cdef void refresh_f32(Model *m) noexcept nogil:
    refresh_filter(m, <const float *>m.w_rec)

cdef void refresh_f64(Model *m) noexcept nogil:
    refresh_filter(m, <const double *>m.w_rec)

cdef void derive_f32(Model *m) noexcept nogil:
    derive_filter(m, <float *>m.K)

cdef void derive_f64(Model *m) noexcept nogil:
    derive_filter(m, <double *>m.K)

cdef bint finite_f32(const void *values, Py_ssize_t n) noexcept nogil:
    return finite(<const float *>values, n)

cdef bint finite_f64(const void *values, Py_ssize_t n) noexcept nogil:
    return finite(<const double *>values, n)


cdef Kernels[2] kernel_table
kernel_table[0] = Kernels(step_f32, run_f32, record_f32, adjoint_f32, reset_f32, refresh_f32, derive_f32, finite_f32)
kernel_table[1] = Kernels(step_f64, run_f64, record_f64, adjoint_f64, reset_f64, refresh_f64, derive_f64, finite_f64)


def table() -> int:
    """Address of the two `Kernels` tables (float32, float64) of this instruction set."""
    return <size_t>&kernel_table[0]
