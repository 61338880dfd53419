# The modulatory matrix and the filter that follows from it.


cdef void sum_columns(Model *m) noexcept nogil:
    """Sums of W over pairs of types from those over the rows of each type, (r, Q)."""
    cdef const real *sums = m.column_sums
    cdef Py_ssize_t a, b, r = m.rank
    cdef real *total = m.old
    for a in range(r):
        matvec(total, m.membership, sums + a * m.stride, r, m.stride)
        for b in range(r):
            m.type_sums[a * r + b] = total[b]


cdef inline void multiply(double *out, const double *a, const double *b, Py_ssize_t r) noexcept nogil:
    """out = a b, (r, r)."""
    cdef Py_ssize_t i, j, k
    for i in range(r):
        for j in range(r):
            out[i * r + j] = 0
            for k in range(r):
                out[i * r + j] += a[i * r + k] * b[k * r + j]


cdef inline bint decays(double *power, double *scratch, Py_ssize_t r) noexcept nogil:
    """Whether rho(K) < 1: squares K until its row sums fall below 1 or it has plainly not decayed."""
    cdef Py_ssize_t a, b, squaring
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
        multiply(scratch, power, power, r)
        power, scratch = scratch, power
    return False


cdef inline bint two_decay(const double *K) noexcept nogil:
    """Whether rho(K) < 1, of (2, 2): |trace| < 1 + det and det < 1 (Schur, Cohn), so written that nothing cancels near 1."""
    cdef double across = K[1] * K[2]
    return (1 - K[0]) * (1 - K[3]) > across and (1 + K[0]) * (1 + K[3]) > across and K[0] * K[3] - across < 1


cdef inline void derive_by(Model *m, Py_ssize_t r, bint anew) noexcept nogil:
    cdef real *K = m.K
    cdef Py_ssize_t a, b, i
    cdef real *drive = m.drive
    cdef real *class_drive = m.class_drive
    cdef real *kept = m.self_drive
    cdef double take = 1 - m.leak, through, own, power
    for a in range(r):
        for b in range(r):
            i = a * r + b
            if anew:
                m.means[i] = m.type_sums[i] * (m.type_share[a] * m.type_share[b])
            through = take * m.means[i]
            drive[b * r + a] = <real>through
            class_drive[b * r + a] = <real>(through * (1 if m.running else m.type_mu[b]))
            power = through * m.type_size[b] * m.type_mu[b]
            if a == b:
                own = 0 if m.self_modulation else through * m.type_mu[a]
                power += m.leak - own
                kept[a], kept[r + a] = <real>(m.leak - own), <real>own
            m.power[i], K[i] = power, 0 if m.one_tap else <real>power
    m.unstable = False
    if m.one_tap or m.instant or m.trace == TRACE_TAPS:  # the filter ends, or one step's K says nothing of the next
        return
    m.unstable = not (two_decay(m.power) if r == 2 else decays(m.power, m.power + r * r, r))
    for a in range(r):
        if not fabs(<double>kept[a]) < 1:
            m.unstable = True


cdef void derive_filter(Model *m, bint anew) noexcept nogil:
    """All that follows from M: K = k I + (1-k) M diag(n mu), the drives, and whether the filter decays.

    `anew`: first M[a, b] = (sum of W over type a x type b) / (n[a] n[b]) itself.
    """
    if m.rank == 2:  # a constant to the compiler: in small networks it shows
        derive_by(m, 2, anew)
    else:
        derive_by(m, m.rank, anew)


cdef void instant_mu(Model *m, const real *h) noexcept nogil:
    """mu of each type = the mean of h over it."""
    cdef Py_ssize_t a, p
    memset(m.type_mu, 0, m.rank * sizeof(double))
    for p in range(m.n_rec):
        m.type_mu[m.type[p]] += h[p]
    for a in range(m.rank):
        m.type_mu[a] /= m.type_size[a]


cdef void follow_activity(Model *m) noexcept nogil:
    """The filter of the step to come, by the activity of this one."""
    instant_mu(m, m.h)
    derive_filter(m, False)


cdef void change_filter(Model *m, bint anew) noexcept nogil:
    """The filter changes between two steps: first complete all that was to go through the old one."""
    settle(m)
    bring_lazy(m)
    if m.type != NULL:
        derive_filter(m, anew)
    if (m.trace == TRACE_EXACT or m.trace == TRACE_TAPS) and not m.follows and not m.fixed_taps:
        filter_powers(m, SLOTS - 1)


cdef void filter_from_means(Model *m) noexcept nogil:
    """M, or mu, has changed."""
    change_filter(m, False)


cdef void set_factor(Model *m) noexcept nogil:
    """What `mean` has in place of h: 1, mu being in the drive, or the running mean of h."""
    cdef Py_ssize_t P = m.n_places, p, c, b, at
    cdef real factor = 1
    memset(m.factor_sums, 0, m.rank * sizeof(real))
    for p in range(m.n_rec):
        c, at = m.type[p], m.place[p]
        if m.running:
            factor = <real>m.h_mean[p]
        if m.deferred:
            m.factor_of[c * P + at] = factor
        for b in range(0 if m.deferred else m.rank):
            m.readout[b * P + at] = factor
        m.factor_by_unit[c * m.stride + p] = factor
        m.factor_sums[c] += factor


cdef void follow_h(Model *m) noexcept nogil:
    """The running mean of h follows what the stream has shown since, as `Learner._measure` says, and the factor follows it."""
    cdef Py_ssize_t p
    cdef double rate
    if m.h_count == 0:
        return
    settle(m)
    m.h_batches[0] += 1
    rate = max(0.1, 1 / <double>m.h_batches[0])
    for p in range(m.n_rec):
        m.h_mean[p] += (m.h_sum[p] / <double>m.h_count - m.h_mean[p]) * rate
        m.h_sum[p] = 0
    m.h_count = 0
    set_factor(m)


cdef void refresh_filter(Model *m) noexcept nogil:
    """M, and all that follows from it, from W as it stands."""
    cdef Py_ssize_t p
    settle(m)
    if m.deferred and m.turned:
        sum_weights(m)
    else:
        memset(m.column_sums, 0, m.rank * m.stride * sizeof(real))
        for p in range(m.n_rec):
            axpy(m.column_sums + m.type[p] * m.stride, <real>1, m.w_rec + p * m.n_rec, m.n_rec)
        sum_columns(m)
    change_filter(m, True)
