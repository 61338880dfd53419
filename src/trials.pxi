# Steps, streams of them, and trials from both ends.


cdef void rest(Model *m) noexcept nogil:
    """The start of a trial: v = 0, z = phi(0), every trace 0; what is owed to the gradient is added first."""
    cdef real *v = m.v
    cdef real *pre = m.pre
    cdef Py_ssize_t n = m.n_rec, Q = m.stride, group, q
    settle(m)
    m.t = m.owed_until = 0
    m.ahead = m.driven = False
    if m.sparse and m.trace == TRACE_EXACT:
        memset(m.packed_traces, 0, m.rank * m.starts[m.n_places] * sizeof(real))
    if m.may_defer:
        memset(m.eps_owed, 0, SLOTS * Q * sizeof(real))
        memset(m.eps_placed, 0, SLOTS * m.n_places * sizeof(real))
        memset(m.own, 0, m.n_places * sizeof(real))
        memset(m.front, 0, m.n_places * sizeof(real))
        memset(m.local, 0, m.n_places * sizeof(real))
    for q in range(m.n_sources if m.deferred and m.trace == TRACE_EXACT else 0):  # else before they lie by source again
        memset(m.by_source + q * between_sources(m) + m.n_places, 0, m.rank * m.n_places * sizeof(real))
    if m.may_defer and m.rank:
        memset(m.onto_h, 0, SLOTS * m.n_drive * sizeof(real))
        memset(m.trace_sums, 0, m.rank * m.rank * m.rank * sizeof(double))
        memset(m.step_sums, 0, 7 * m.rank * sizeof(double))
    for group in range(m.n_groups):
        m.since[group] = 0
    rest_lazily(m)
    memset(v, 0, n * sizeof(real))
    memset(m.eps, 0, Q * sizeof(real))
    memset(pre, 0, Q * sizeof(real))
    if m.b_rec != NULL:
        pre[n + m.n_in] = 1
    activate(pre, m.h, v, n, m.activation)
    memset(m.awake, 0, m.n_places * sizeof(m.awake[0]))
    keep_h(m)
    if m.instant:
        follow_activity(m)
    memset(m.dummy, 0, Q * sizeof(real))
    if m.trace == TRACE_MEAN:
        memset(m.traces, 0, m.rank * m.rank * Q * sizeof(real))
    if m.self_traces != NULL:
        memset(m.self_traces, 0, m.rank * Q * sizeof(real))


cdef Status step(Model *m, const real *x, const real *target, long long label, ErrorSource source,
                 bint learn) noexcept nogil:
    """One time step.  A refused input leaves everything as it was; a readout that diverges leaves the weights, and rest."""
    cdef Py_ssize_t q
    if not finite(x, m.n_in):
        return X_NOT_FINITE
    if (source == FROM_TARGET or source == FROM_SIGNAL) and not finite(target, m.n_out):
        return TARGET_NOT_FINITE
    if source == FROM_LABEL and not 0 <= label < m.n_out:
        return LABEL_OUT_OF_RANGE
    if m.deferred and not (m.counted or m.frozen):
        settle(m)
        if not m.turned:
            bring_in(m)
        take_stock(m)
    if not forward(m, x):
        m.t -= 1  # that step was not made: what the rings hold ends before it
        for q in range(m.stride if spares(m) else 0):
            m.spoke[q] >>= 1
        rest(m)
        return DIVERGED
    if source == FROM_NOTHING:
        learn = False
    else:
        output_error(m, target, label, source)
    if learn:
        learning_signal(m, m.signal)
    trace_and_learn(m, learn)
    if m.instant:
        follow_activity(m)
    if learn:
        learn_readout(m)
    return OK


cdef ErrorSource source_at(Trials *trial, Py_ssize_t t) noexcept nogil:
    if trial.mask != NULL and not trial.mask[t]:
        return FROM_NOTHING
    if trial.target != NULL:
        return FROM_TARGET
    return FROM_LABEL if trial.label != NULL else FROM_NOTHING


cdef Status step_of(Model *m, Trials *trial, Py_ssize_t t) noexcept nogil:
    """Step t of a stream."""
    cdef const real *target = trial.target
    cdef ErrorSource source = source_at(trial, t)
    cdef Status status
    trial.steps_done = t
    status = step(m, trial.x + t * m.n_in, target + t * m.n_out if target != NULL else NULL,
                  trial.label[t * trial.label_step] if source == FROM_LABEL else 0, source, trial.learn)
    if status == OK and trial.y != NULL:
        memcpy(trial.y + t * m.n_out, m.y, m.n_out * sizeof(real))
    return status


cdef Status run(Model *m, Trials *trial) noexcept nogil:
    """`step` from `begin` to `end`; with `chunk`, one update after every so many steps and after the last of all."""
    cdef Status status
    cdef Py_ssize_t t
    cdef bint owed = False
    for t in range(trial.begin, trial.end):
        owed = owed or (trial.learn and source_at(trial, t) != FROM_NOTHING)
        status = step_of(m, trial, t)
        if status != OK:
            return status
        if trial.chunk and (owed or m.frozen) and ((t + 1) % trial.chunk == 0 or t + 1 == trial.n_steps):
            end_chunk(m, owed)
            owed = False
        elif m.frozen and m.t - m.since[0] == m.window:
            write_within_chunk(m)
    return OK


cdef Status run_together(Model **models, Trials *trials, Record *recs, Py_ssize_t n, real *w, Py_ssize_t width) noexcept nogil:
    """Up to TRIALS trials of one length through the same frozen weights, step by step; with `recs` for `adjoint`.

    Their input is one product of matrices, with `w`: (N + n_in (+ 1), width) zeros, scratch; or NULL: each its own.
    """
    cdef Status status = OK
    cdef Py_ssize_t t, i, n_in = models[0].n_in, n_rec = models[0].n_rec
    cdef real *pre[TRIALS]
    cdef real *current[TRIALS]
    if w != NULL:
        turn(models[0], w, width, False, False)
    for i in range(n):
        pre[i], current[i] = models[i].pre, models[i].current
    for t in range(trials[0].n_steps):
        for i in range(n if w != NULL else 0):
            memcpy(pre[i] + n_rec, trials[i].x + t * n_in, n_in * sizeof(real))
        if w != NULL:
            matmul(current, pre, n, w, models[0].n_sources, width // LANES)
        for i in range(n):
            models[i].driven = w != NULL
            status = step_of(models[i], &trials[i], t) if recs == NULL else record_step(models[i], &trials[i], &recs[i], t)
            if status != OK:
                trials[0].failed = i
                break
        if status != OK:
            break
    for i in range(n if recs != NULL else 0):
        models[i].t = 0  # no step that owes anything
    return status


cdef void descend_recurrent(Model *m) noexcept nogil:
    """W, W_in and b by the gradient that has been added up, which starts again from zero."""
    cdef Py_ssize_t p, q, n = m.n_rec, Q = m.stride
    cdef real lr = <real>m.lr, own
    cdef real *w
    cdef real *g
    settle(m)
    for p in range(n):
        w, g, own = m.w_rec + p * n, m.grad + p * Q, m.w_rec[p * n + p]
        if m.keep != NULL:
            for q in range(n):
                g[q] = g[q] if m.keep[p * n + q] else 0
        descend_row(w, g, lr, m.sign, n)
        if not m.autapses:
            w[p] = own
        axpy(m.w_in + p * m.n_in, -lr, g + n, m.n_in)
        if m.b_rec != NULL:
            m.b_rec[p] -= lr * g[n + m.n_in]
    memset(m.grad, 0, n * Q * sizeof(real))


cdef void end_chunk(Model *m, bint learn) noexcept nogil:
    """With `learn` one update by all errors since the last."""
    cdef Py_ssize_t o, n = m.n_rec
    cdef real lr = <real>m.lr
    if m.frozen:
        write_chunk(m, learn)
        go_on(m, True)
    else:
        descend_recurrent(m)
    if not learn:
        return
    for o in range(m.n_out):
        descend_row(m.w_out + o * n, m.grad_w_out + o * n, lr, m.sign, n)
    axpy(m.b_out, -lr, m.grad_b_out, m.n_out)
    memset(m.grad_w_out, 0, m.n_out * n * sizeof(real))
    memset(m.grad_b_out, 0, m.n_out * sizeof(real))
    m.updates += 1
    if m.type != NULL and m.refresh_every > 0 and m.updates % m.refresh_every == 0:
        refresh_filter(m)


cdef bint stays_finite(const real *w, const real *g, real step, Py_ssize_t n) noexcept nogil:
    """Whether w - step g is."""
    cdef Py_ssize_t q
    cdef real to
    for q in range(n):
        to = w[q] - step * g[q]
        if to - to != 0:
            return False
    return True


cdef bint descend_by_gradient(Model *m) noexcept nogil:
    """One update by what has been added up, which starts again from zero; False: a weight would not be finite, and none has changed."""
    cdef Py_ssize_t p, n = m.n_rec
    cdef const real *g = m.grad
    cdef real lr = <real>m.lr
    cdef bint stays = (stays_finite(m.w_out, m.grad_w_out, lr, m.n_out * n) and stays_finite(m.b_out, m.grad_b_out, lr, m.n_out))
    for p in range(n):
        stays = stays and stays_finite(m.w_rec + p * n, g, lr, n) and stays_finite(m.w_in + p * m.n_in, g + n, lr, m.n_in)
        stays = stays and (m.b_rec == NULL or stays_finite(m.b_rec + p, g + n + m.n_in, lr, 1))
        g += m.stride
    if stays:
        end_chunk(m, True)
    return stays


# ---------------------------------------------------------------- the adjoint form

cdef Status record_step(Model *m, Trials *trial, Record *rec, Py_ssize_t t) noexcept nogil:
    """Step t of a trial, without traces, and what `adjoint` needs of it; the readout's gradient is added on the way."""
    cdef const real *target = trial.target
    cdef Py_ssize_t n = m.n_rec, Q = m.stride
    cdef real *pre = rec.pre + t * Q
    cdef real *signal = rec.signal + t * n
    cdef ErrorSource source = source_at(trial, t)
    trial.steps_done = t
    memcpy(pre, m.pre, n * sizeof(real))  # z_{t-1}: forward overwrites it
    if not forward(m, trial.x + t * m.n_in):
        return DIVERGED
    memcpy(pre + n, m.pre + n, (Q - n) * sizeof(real))
    if rec.eps != NULL:
        memcpy(rec.eps + t * Q, m.eps + slot(m.t) * Q, Q * sizeof(real))
    memcpy(rec.h + t * n, m.h, n * sizeof(real))
    if source == FROM_NOTHING:
        memset(signal, 0, n * sizeof(real))
        return OK
    output_error(m, target + t * m.n_out if target != NULL else NULL,
                 trial.label[t * trial.label_step] if source == FROM_LABEL else 0, source)
    learning_signal(m, signal)
    learn_readout(m)
    return OK


cdef void through_modulators(Model *m, real *back, const real *lam) noexcept nogil:
    """back = (1-k) (U V)^T lam: two skinny products."""
    cdef real *placed = m.local
    cdef real *modulator = m.modulator
    cdef const real *drive = m.drive
    cdef Py_ssize_t p, a, r = m.rank
    memset(back, 0, m.n_rec * sizeof(real))
    by_place(m, placed, lam, False)
    matvec(modulator, m.u, placed, r, m.n_places)
    for p in range(m.n_rec):
        for a in range(r):
            back[p] += drive[m.drive_class[p] * r + a] * modulator[a]


cdef void through_taps(Model *m, real *back, const real *direct, Py_ssize_t t, Py_ssize_t later) noexcept nogil:
    """back = sum_n F_n^T of the modulators of up to `later` steps from t on; then those of t itself are kept."""
    cdef real *placed = m.local
    cdef const real *F = m.power_drive
    cdef const real *modulator
    cdef Py_ssize_t n, p, a, r = m.rank, D = m.n_drive
    memset(back, 0, m.n_rec * sizeof(real))
    for n in range(1, min(m.n_taps, later) + 1):
        modulator = m.modulator + slot(t + n) * r
        for p in range(m.n_rec):
            for a in range(r):
                back[p] += F[(n * r + a) * D + m.drive_class[p]] * modulator[a]
    by_place(m, placed, direct, False)
    matvec(m.modulator + slot(t) * r, m.u, placed, r, m.n_places)


cdef void through_together(Model **models, real **back, real **lam, Py_ssize_t n, const real *w, Py_ssize_t width) noexcept nogil:
    """back[i] = (1-k) W^T lam[i]: one product of matrices, with W in lines, or without each its own."""
    cdef Py_ssize_t i, p
    for i in range(n if w == NULL else 0):
        through_w(models[i], back[i], lam[i])
    if w == NULL:
        return
    matmul(back, lam, n, w, models[0].n_rec, width // LANES)
    for i in range(n):
        for p in range(models[0].n_rec):
            back[i][p] *= <real>(1 - models[0].leak)


cdef void adjoint(Model **models, Record *recs, Backwards *how, Py_ssize_t n, Py_ssize_t n_steps, real *w, Py_ssize_t width) noexcept nogil:
    """Trials backwards in time, step by step; grad += sum_t rows_t eps_t^T, or of a rule that is exact in sum_t rows_t s_t^T.

    m = h L, and back = (1-k) Wb^T lam_{t+1}: one pass over W for `cells` and BPTT, none otherwise.
    none     rows = m
    exact    lam = m + mu back + k lam_{t+1}      rows = m + h back
    running                                       rows = m + hbar back
    mean                                          rows = (1-k) lam, onto s
    BPTT     lam = m + h back + k lam_{t+1}       rows = (1-k) lam, onto s
    SnAp-1   the same with the diagonal of W
    MDGL     lam = m                              rows = m + h back
    taps     back = sum_s F_s^T m_{t+s}           rows = m + h back
    exact_steps: BPTT by chunks, each from lam = 0 behind it; what it says of the step before the chunk,
    dE_chunk / dv_{t0-1}, is the m of the rule, which is 0 elsewhere.
    """
    cdef Py_ssize_t i, p, t, n_rec = models[0].n_rec
    cdef Adjoint kind = how.kind
    cdef bint onto_sources = kind == ADJOINT_MEAN or kind == ADJOINT_BPTT or kind == ADJOINT_SNAP1
    cdef bint through_all = how.cells and kind != ADJOINT_SNAP1
    cdef real *lam[TRIALS]
    cdef real *back[TRIALS]
    cdef real *d[TRIALS]
    cdef real *direct[TRIALS]
    if how.horizon:
        for i in range(n):
            truncated(models[i], &recs[i], how.horizon, n_steps)
        return
    for p in range(n_rec if w != NULL and (how.exact_steps or through_all) else 0):
        memcpy(w + p * width, models[0].w_rec + p * n_rec, n_rec * sizeof(real))
    for i in range(n):
        lam[i], back[i], d[i], direct[i] = models[i].signal, models[i].current, recs[i].d, models[i].input
        memset(lam[i], 0, n_rec * sizeof(real))
        memset(d[i], 0, n_rec * sizeof(real))
    for t in range(n_steps - 1, -1, -1):
        if how.exact_steps:
            through_together(models, direct, d, n, w, width)
        if through_all:
            through_together(models, back, lam, n, w, width)
        for i in range(n):
            adjoint_step(models[i], &recs[i], &how[i], t, n_steps, onto_sources)
    for i in range(n):
        if how.exact_steps:
            add_products(models[i], recs[i].exact_rows, recs[i].pre, n_steps)
        add_products(models[i], recs[i].rows, recs[i].pre if onto_sources else recs[i].eps, n_steps)


cdef void adjoint_step(Model *m, Record *rec, const Backwards *how, Py_ssize_t t, Py_ssize_t n_steps, bint onto_sources) noexcept nogil:
    """One step of `adjoint`; the products with W^T, of d in `input`, are at hand."""
    cdef real *lam = m.signal
    cdef real *back = m.current
    cdef const real *through_d = m.input
    cdef real *d = rec.d
    cdef real *mu = how.mu
    cdef Py_ssize_t p, n = m.n_rec, b = how.exact_steps
    cdef const real *L = rec.signal + t * n
    cdef const real *h = rec.h + t * n
    cdef real *rows = rec.rows + t * n
    cdef real *exact
    cdef Adjoint kind = how.kind
    cdef const real *f = how.hbar if kind == ADJOINT_RUNNING else h
    cdef real keep = 0 if m.one_tap else <real>m.leak, leak = <real>m.leak, take = <real>(1 - m.leak), direct
    cdef bint last
    if b:
        exact, last = rec.exact_rows + t * n, (t + 1) % b == 0  # behind the last step d is 0
        for p in range(n):
            direct = leak * d[p] + h[p] * through_d[p]
            d[p] = h[p] * L[p] + (0 if last else direct)
            exact[p] = take * d[p]
            rows[p] = direct if last else 0
    else:
        for p in range(n):
            rows[p] = h[p] * L[p]
    if kind == ADJOINT_NONE:
        return
    if kind == ADJOINT_TAPS:
        through_taps(m, back, rows, t, n_steps - 1 - t)
    elif kind == ADJOINT_SNAP1:
        for p in range(n):
            back[p] = take * m.w_rec[p * n + p] * lam[p]
    elif not how.cells:
        through_modulators(m, back, lam)
    if m.instant:
        instant_mu(m, h)
        for p in range(n):
            mu[p] = <real>m.type_mu[m.type[p]]
    for p in range(n if kind == ADJOINT_MEAN and not m.self_modulation else 0):
        back[p] -= m.drive[m.type[p] * m.rank + m.type[p]] * lam[p]  # the diagonal, to the bit
    for p in range(n):
        lam[p] = rows[p] + keep * lam[p]
        if kind == ADJOINT_BPTT or kind == ADJOINT_SNAP1:
            lam[p] += h[p] * back[p]
        elif not m.one_tap:
            lam[p] += mu[p] * back[p]
        rows[p] = take * lam[p] if onto_sources else rows[p] + f[p] * back[p]


cdef void truncated(Model *m, Record *rec, Py_ssize_t horizon, Py_ssize_t n_steps) noexcept nogil:
    """TBPTT: the adjoints d_t of all errors, pulled back one step at a time; grad += (1-k) sum_{age < horizon} sum_t d_t s_{t-age}^T."""
    cdef real *back = m.current
    cdef const real *h
    cdef real *rows = rec.rows
    cdef real *d = rec.signal
    cdef real leak = <real>m.leak, take = <real>(1 - m.leak)
    cdef Py_ssize_t age, t, p, n = m.n_rec
    for p in range(n_steps * n):
        d[p] *= rec.h[p]  # h L
    memset(rows, 0, n_steps * n * sizeof(real))
    for age in range(min(horizon, n_steps)):
        for t in range(age, n_steps):
            axpy(rows + (t - age) * n, take, d + t * n, n)
            if t > age:
                h = rec.h + (t - age - 1) * n
                through_w(m, back, d + t * n)
                for p in range(n):
                    d[t * n + p] = leak * d[t * n + p] + h[p] * back[p]
    add_products(m, rows, rec.pre, n_steps)


cdef void add_products(Model *m, const real *rows, const real *sources, Py_ssize_t n_steps) noexcept nogil:
    """grad[p, q] += sum_t rows[t, p] sources[t, q]; many steps for each pass over grad.  (N, Q), (T, N), (T, Q)."""
    cdef real *coef = m.coef
    cdef Py_ssize_t block, t, first = 0, last, n = m.n_rec, P = m.n_places
    memset(coef, 0, SLOTS * P * sizeof(real))
    while first < n_steps:
        last = min(first + SLOTS, n_steps)
        for t in range(first, last):
            m.terms[t - first] = <real *>sources + t * m.stride
            by_place(m, coef + (t - first) * P, rows + t * n, False)
        for block in range(m.n_blocks):
            add_block(m, block, last - first, NULL, 0)
        first = last
