# Sums over types, from which the filter follows W.  Where updates wait they are kept up step by step, without a look at W.


cdef void sum_step(Model *m) noexcept nogil:
    """Over each type: h, eps, h eps and L h eps of now."""
    cdef Py_ssize_t P = m.n_places, s = slot(m.t), i, b
    cdef const real *h = m.h_past + s * P
    cdef const real *eps = m.eps_placed + s * P
    cdef const real *local = m.local + s * P
    cdef const real *of_type = m.u
    cdef real *product = m.old
    cdef real *learned = product + P
    cdef real out[ROWS]
    for i in range(P):
        product[i] = h[i] * eps[i]
        learned[i] = local[i] * eps[i]
    for b in range(m.rank):
        dot_rows(&out[0], h, eps, product, learned, of_type, of_type, P)
        m.step_sums[b], m.step_sums[m.rank + b] = out[0], out[1]
        m.step_sums[2 * m.rank + b] = 0 if m.autapses else out[2]
        m.step_sums[3 * m.rank + b] = 0 if m.autapses else out[3]
        of_type += P


cdef inline void follow_by(Model *m, bint learn, Py_ssize_t r) noexcept nogil:
    cdef Py_ssize_t a, b, c, d
    cdef double *T = m.trace_sums      # (r, r, r) [modulator, post, pre]
    cdef const double *now = m.step_sums
    cdef const double *before = now + 4 * r
    cdef const real *K = m.K
    cdef const real *drive = m.drive
    cdef const real *modulator = m.modulator + slot(m.t) * r
    cdef double mixed[2]
    cdef double change
    for a in range(r):
        for b in range(r):
            change = before[a] * before[r + b] - (before[2 * r + a] if a == b else 0)
            for c in range(r):
                mixed[c] = <double>drive[a * r + c] * change
                for d in range(r):
                    mixed[c] += <double>K[c * r + d] * T[(d * r + a) * r + b]
            change = modulator[a] * now[r + b] - (now[3 * r + a] if a == b else 0)
            for c in range(r):
                T[(c * r + a) * r + b] = mixed[c]
                change += modulator[c] * mixed[c]
            if learn:
                m.type_sums[a * r + b] -= change


cdef void follow_sums(Model *m, bint learn) noexcept nogil:
    """The sums over types of W, and of R, which obey R's own recursion, after this step; r <= 2."""
    memcpy(m.step_sums + 4 * m.rank, m.step_sums, 3 * m.rank * sizeof(double))
    sum_step(m)
    if m.rank == 2:  # a constant to the compiler: in small networks it shows
        follow_by(m, learn, 2)
    else:
        follow_by(m, learn, 1)


cdef void sum_weights(Model *m) noexcept nogil:
    """type_sums from weights by source: what would be heard of all sources of a type at 1, summed over the places of each."""
    cdef Py_ssize_t r = m.rank, a, b
    cdef real *total = m.old
    cdef real *s = total + m.stride
    for b in range(r):
        memcpy(s, m.membership + b * m.stride, m.stride * sizeof(real))
        list_by(m, s, 0, 0)
        share_out(m, False, 0)
        matvec(total, m.u, m.placed, r, m.n_places)
        for a in range(r):
            m.type_sums[a * r + b] = total[a]


cdef void sum_trace(Model *m, Py_ssize_t c) noexcept nogil:
    """trace_sums of modulator c, (r, r) [post, pre] over types, from the traces themselves."""
    cdef Py_ssize_t r = m.rank, P = m.n_places, apart = between_sources(m), a, q = 0, i
    cdef double *sums = m.trace_sums + c * r * r
    cdef const real *row
    cdef const real *of_type
    cdef real out[TOGETHER]
    memset(sums, 0, r * r * sizeof(double))
    while q < m.n_rec:
        row = m.by_source + q * apart + (1 + c) * P
        for a in range(r):
            of_type = m.u + a * P
            dot_rows(&out[0], row, row + apart, row + 2 * apart, row + 3 * apart, of_type, of_type, P)
            for i in range(min(TOGETHER, m.n_rec - q)):
                sums[a * r + m.type[q + i]] += out[i]
        q += TOGETHER
