# The network itself, its loss and the learning signal.


cdef extern from "exponential.h":
    real exp_ "mpf_exp" (real x, real *less_one) noexcept nogil  # exp(x) and exp(x) - 1 of x <= 0
    real log1p_ "mpf_log1p" (real e) noexcept nogil              # log(1 + e) of 0 <= e <= 1


cdef void activate(real *z, real *h, const real *v, Py_ssize_t n, Activation kind) noexcept nogil:
    """z = phi(v), h = phi'(v); at v = 0 relu has h = 0.

    All from exp(-|v|), so that a derivative that is nearly zero has its digits: 1 - tanh(v)^2 would lose them.
    """
    cdef Py_ssize_t i
    cdef real x, far, e, less_one, one = 1, two = 2, four = 4  # a number by itself is a double: so would be what it is added to
    if kind == RELU:
        for i in range(n):
            h[i] = 1 if v[i] > 0 else 0
            z[i] = 0 if v[i] <= 0 else v[i]  # a NaN stays a NaN
    elif kind == SOFTPLUS:
        for i in range(n):
            x = v[i]
            e = exp_(-x if x > 0 else x, &less_one)
            z[i] = (x if x > 0 else 0) + log1p_(e)
            h[i] = (one if x > 0 else e) / (one + e)
    elif kind == TANH:
        for i in range(n):
            x = v[i]
            far = -x if x > 0 else x
            e = exp_(two * far, &less_one)
            far = less_one / (two + less_one)
            z[i] = -far if x > 0 else far
            h[i] = four * e / ((two + less_one) * (two + less_one))
    elif kind == SIGMOID:
        for i in range(n):
            x = v[i]
            e = exp_(-x if x > 0 else x, &less_one)
            z[i] = (one if x > 0 else e) / (one + e)
            h[i] = e / ((one + e) * (one + e))
    else:
        for i in range(n):
            z[i] = v[i]
            h[i] = 1


cdef inline Py_ssize_t slot(Py_ssize_t t) noexcept nogil:
    return t % SLOTS


cdef void by_place(Model *m, real *to, const real *x, bint back) noexcept nogil:
    """to[place[p]] = x[p]; or `back`, to[p] = x[place[p]]."""
    cdef const int *run = m.runs
    cdef Py_ssize_t i, p
    if m.n_runs > m.n_rec // 8:  # short ones
        for p in range(m.n_rec):
            if back:
                to[p] = x[m.place[p]]
            else:
                to[m.place[p]] = x[p]
        return
    for i in range(m.n_runs):
        memcpy(to + run[not back], x + run[back], run[2] * sizeof(real))
        run += 3


cdef void keep_h(Model *m) noexcept nogil:
    """h of now for the steps to come."""
    cdef real *h = m.h_past + slot(m.t) * m.n_places
    cdef Py_ssize_t i
    by_place(m, h, m.h, False)
    for i in range(0 if m.deferred else m.n_places):
        m.awake[i] = m.awake[i] << 1 | (h[i] != 0)


cdef inline bint at_once(const Model *m) noexcept nogil:
    """Whether, where weights lie by source, every step writes all."""
    return m.deferred and m.online and m.n_groups == 1


cdef inline bint constrained(const Model *m) noexcept nogil:
    """Whether, where weights lie by source, they have signs to keep, or some do not change."""
    return m.sign != NULL or m.keep_by_source != NULL


cdef inline bint spares(const Model *m) noexcept nogil:
    """Whether what waits is written as sums over s_t: where sources are silent at times, and many are written at once."""
    return m.deferred and m.spoke != NULL and m.n_sources >= SPARED_FROM * m.n_groups and not at_once(m)


cdef void keep_sent(Model *m, real take) noexcept nogil:
    """(1-k) s_t for the steps to come."""
    cdef real *sent = m.sent + slot(m.t) * m.stride
    cdef const real *s = m.pre
    cdef Py_ssize_t q
    for q in range(m.stride):
        sent[q] = take * s[q]
    for q in range(m.stride):
        m.spoke[q] = m.spoke[q] << 1 | (s[q] != 0)


cdef void through_w(Model *m, real *back, const real *lam) noexcept nogil:
    """back = (1-k) W^T lam."""
    cdef Py_ssize_t p, n = m.n_rec
    matvec_t(back, m.w_rec, lam, n, n)
    for p in range(n):
        back[p] *= <real>(1 - m.leak)


cdef bint forward(Model *m, const real *x) noexcept nogil:
    """v, z, h, eps and y of the next step; its slot of the rings is that of m.t from here on.  False: y is not finite."""
    cdef real *pre = m.pre
    cdef real *v = m.v
    cdef real *y = m.y
    cdef const real *current = m.current
    cdef const real *input = m.input
    cdef const real *b_rec = m.b_rec
    cdef const real *b_out = m.b_out
    cdef const real *eps_before = m.eps + slot(m.t) * m.stride
    cdef real *eps
    cdef real keep = <real>m.leak, take = <real>(1 - m.leak)
    cdef Py_ssize_t p, q, o, n = m.n_rec
    memcpy(pre + n, x, m.n_in * sizeof(real))
    if m.driven:
        pass
    elif m.deferred and m.ahead:
        inputs_alone(m)
    elif m.deferred:
        recurrent_input(m)
    elif m.sparse and not m.ahead:
        pass_over(m, False, False, NULL)
    elif not m.ahead:
        matvec(m.current, m.w_rec, pre, n, n)
    m.t += 1
    eps = m.eps + slot(m.t) * m.stride
    if m.sources != NULL:
        memcpy(m.sources + slot(m.t) * m.stride, pre, m.stride * sizeof(real))
    if m.sparse:
        packed_input(m)
    elif not (m.driven or m.deferred):
        matvec(m.input, m.w_in, x, n, m.n_in)
        if b_rec != NULL:
            axpy(m.input, <real>1, b_rec, n)
    if m.driven:
        for p in range(n):
            v[p] = keep * v[p] + take * current[p]
    else:
        for p in range(n):
            v[p] = keep * v[p] + take * (current[p] + input[p])
    m.ahead = m.driven = False
    for q in range(m.stride):
        eps[q] = keep * eps_before[q] + take * pre[q]
    if spares(m):
        keep_sent(m, take)
    activate(pre, m.h, v, n, m.activation)
    matvec(y, m.w_out, pre, m.n_out, n)
    for o in range(m.n_out):
        y[o] += b_out[o]
    if not finite(y, m.n_out):
        return False
    if m.h_sum != NULL:
        axpy(m.h_sum, <real>1, m.h, n)
        m.h_count += 1
    return True


# ---------------------------------------------------------------- loss and learning signal

cdef void output_error(Model *m, const real *target, long long label, ErrorSource source) noexcept nogil:
    """error = scale dE/dy; adds scale E to loss_sum (kept in double: it adds up over long streams).

    mse            E = sum_o (y - y*)^2 / (2 n_out)
    cross entropy  E = log sum_o exp(y) - y[label]
    """
    cdef const real *y = m.y
    cdef real *error = m.error
    cdef double e, loss = 0, total = 0, top = -INFINITY, scale = m.scale
    cdef Py_ssize_t o, n = m.n_out
    if source == FROM_SIGNAL:
        for o in range(n):
            error[o] = <real>(scale * target[o])
        return
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


cdef void learning_signal(Model *m, real *signal) noexcept nogil:
    """L = W_out^T dE/dy, or B dE/dy."""
    if m.feedback != NULL:
        matvec(signal, m.feedback, m.error, m.n_rec, m.n_out)
    else:
        matvec_t(signal, m.w_out, m.error, m.n_out, m.n_rec)


cdef void descend_row(real *w, const real *g, real step, const real *sign, Py_ssize_t n) noexcept nogil:
    """w -= step g, 0 where a weight crossed zero against its sign (NULL: free)."""
    cdef Py_ssize_t q
    cdef real to
    if sign == NULL:
        axpy(w, -step, g, n)
        return
    for q in range(n):
        to = w[q] - step * g[q]
        w[q] = 0 if sign[q] * to < 0 else to


cdef void learn_readout(Model *m) noexcept nogil:
    """dW_out = dE/dy z^T, db_out = dE/dy: exact in every rule."""
    cdef Py_ssize_t o, n = m.n_rec
    cdef const real *error = m.error
    cdef const real *z = m.pre
    cdef real lr = <real>m.lr
    for o in range(m.n_out):
        if error[o] == 0:
            continue
        if m.online:
            descend_row(m.w_out + o * n, z, lr * error[o], m.sign, n)
            m.b_out[o] -= lr * error[o]
        else:
            axpy(m.grad_w_out + o * n, error[o], z, n)
            m.grad_b_out[o] += error[o]
