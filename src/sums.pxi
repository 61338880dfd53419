# Sums over types, from which the filter follows W.  Where updates wait they are kept up step by step, without a look at W.


cdef void sum_step(Model *m, real *scratch) noexcept nogil:
    """Over each type: h, eps, h eps and L h eps of now."""
    cdef Py_ssize_t n = m.n_rec, Q = m.stride, p, b
    cdef const real *h = <const real *>m.h
    cdef const real *eps = <real *>m.eps + slot(m, m.t) * Q
    cdef const real *local = <real *>m.local + slot(m, m.t) * m.n_places
    cdef real *product = scratch
    cdef real *learned = scratch + Q
    cdef real out[ROWS]
    for p in range(n):
        product[p] = h[p] * eps[p]
        learned[p] = local[m.place[p]] * eps[p]
    for b in range(m.rank):
        line_up(<real *>m.edge, <real *>m.membership + b * n, n)
        dot_rows(&out[0], h, eps, product, learned, <real *>m.membership + b * n, <real *>m.edge, n)
        m.step_sums[b], m.step_sums[m.rank + b] = out[0], out[1]
        m.step_sums[2 * m.rank + b] = 0 if m.autapses else out[2]
        m.step_sums[3 * m.rank + b] = 0 if m.autapses else out[3]


cdef void follow_rows(Model *m, bint learn, real *diagonal) noexcept nogil:
    """`mean`: the diagonal of what waits, and the sums over types of W, after this step."""
    cdef Py_ssize_t n = m.n_rec, P = m.n_places, Q = m.stride, r = m.rank, s = slot(m, m.t), a, b, i, first = 0
    cdef const real *eps = <real *>m.eps + s * Q
    cdef const real *local = <real *>m.local + s * P
    cdef const real *rows = <const real *>m.class_rows
    cdef const real *eps_placed = <real *>m.eps_placed + s * P
    cdef const real *factor = <real *>m.factor
    cdef real *placed = <real *>m.placed
    cdef real *own = <real *>m.own
    cdef real out[ROWS]
    cdef real factors[2]
    cdef real sums[2]
    cdef real x
    if not learn:
        return
    for a in range(r):
        to_places(m, placed, rows + a * Q)
        for i in range(first, m.type_ends[a]):
            x = factor[i] * placed[i]
            own[i] += x
            diagonal[i] = x + local[i] * eps_placed[i]
        first = m.type_ends[a]
    if not m.follows:
        return
    matvec(&sums[0], <const real *>m.u, diagonal, r, P)
    matvec(&factors[0], <const real *>m.u, factor, r, P)
    for b in range(r):
        line_up(<real *>m.edge, <real *>m.membership + b * n, n)
        dot_rows(&out[0], rows, rows + (r - 1) * Q, eps, eps, <real *>m.membership + b * n, <real *>m.edge, n)
        for a in range(r):
            m.type_sums[a * r + b] -= (<real *>m.modulator)[s * r + a] * out[2] + factors[a] * out[a]
        if not m.autapses:
            m.type_sums[b * r + b] += sums[b]


cdef void follow_sums(Model *m, bint learn, real *scratch) noexcept nogil:
    """The sums over types of W, and of R, which obey R's own recursion, after this step."""
    cdef Py_ssize_t r = m.rank, a, b, c, d
    cdef double *T = m.trace_sums      # (r, r, r) [modulator, post, pre]
    cdef double *before = m.step_sums + 4 * r
    cdef double *mixed = m.step_sums + 7 * r
    cdef const real *K = <const real *>m.K
    cdef const real *drive = <const real *>m.drive
    cdef const real *modulator = <real *>m.modulator + slot(m, m.t) * r
    cdef double change
    memcpy(before, m.step_sums, 3 * r * sizeof(double))
    sum_step(m, scratch)
    for a in range(r):
        for b in range(r):
            change = before[a] * before[r + b] - (before[2 * r + a] if a == b else 0)
            for c in range(r):
                mixed[c] = <double>drive[a * r + c] * change
                for d in range(r):
                    mixed[c] += <double>K[c * r + d] * T[(d * r + a) * r + b]
            for c in range(r):
                T[(c * r + a) * r + b] = mixed[c]
            if learn:
                change = modulator[a] * m.step_sums[r + b] - (m.step_sums[3 * r + a] if a == b else 0)
                for c in range(r):
                    change += modulator[c] * mixed[c]
                m.type_sums[a * r + b] -= change


cdef void sum_rows_by_type(Model *m, const real *w) noexcept nogil:
    """column_sums: of W, over the units of each type."""
    cdef Py_ssize_t n = m.n_rec, p
    memset(m.column_sums, 0, m.rank * n * sizeof(real))
    for p in range(n):
        axpy(<real *>m.column_sums + m.type[p] * n, <real>1, w + p * n, n)


cdef void sum_by_source(Model *m, double *sums, Py_ssize_t c, const real *by_source) noexcept nogil:
    """(r, r) [post, pre] over types: of the weights, or of the traces c - 1."""
    cdef Py_ssize_t r = m.rank, P = m.n_places, apart = between_sources(m), a, q = 0, i
    cdef const real *row
    cdef const real *of_type
    cdef real out[TOGETHER]
    memset(sums, 0, r * r * sizeof(double))
    while q < m.n_rec:
        row = by_source + q * apart + c * P
        for a in range(r):
            of_type = <const real *>m.u + a * P
            dot_rows(&out[0], row, row + apart, row + 2 * apart, row + 3 * apart, of_type, of_type, P)
            for i in range(min(TOGETHER, m.n_rec - q)):
                sums[a * r + m.type[q + i]] += out[i]
        q += TOGETHER
