# Sums over types, from which the filter follows W.  Where updates wait they are kept up step by step, without a look at W.


cdef void sum_step(Model *m, real *scratch) noexcept nogil:
    """Over each type: h, eps, h eps and L h eps of now."""
    cdef Py_ssize_t P = m.n_places, s = slot(m, m.t), i, b
    cdef const real *h = <const real *>m.h_past + s * P
    cdef const real *eps = <const real *>m.eps_placed + s * P
    cdef const real *local = <const real *>m.local + s * P
    cdef const real *of_type = <const real *>m.u
    cdef real *product = scratch
    cdef real *learned = scratch + P
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


cdef inline void diagonal_of(vec *diagonal, vec *own, const vec *factor_of, const vec *rows, const vec *local, const vec *eps, Py_ssize_t n,
                             Py_ssize_t r) noexcept nogil:
    """own += what the rows put on each unit's own synapse; diagonal = that and its local part."""
    cdef Py_ssize_t i, a
    cdef vec x
    for i in range(n):
        x = factor_of[i] * rows[i]
        for a in range(1, r):
            x = madd(x, factor_of[a * n + i], rows[a * n + i])
        own[i] += x
        diagonal[i] = madd(x, local[i], eps[i])


cdef void follow_rows(Model *m, bint learn, real *rows) noexcept nogil:
    """`mean`: the diagonal of what waits, and the sums over types of W, after this step."""
    cdef Py_ssize_t P = m.n_places, r = m.rank, s = slot(m, m.t), a, b
    cdef real *local = <real *>m.local + s * P
    cdef real *eps = <real *>m.eps_placed + s * P
    cdef const real *modulator = <real *>m.modulator + s * r
    cdef const real *of_type = <const real *>m.u
    cdef real *diagonal = rows + r * P
    cdef real out[ROWS]
    if not learn:
        return
    for a in range(r):
        to_places(m, rows + a * P, <const real *>m.class_rows + a * m.stride)
        memset(rows + a * P + m.n_rec, 0, (P - m.n_rec) * sizeof(real))
    if real is float:
        diagonal_of(<f32v *>diagonal, <f32v *>m.own, <f32v *>m.factor_of, <f32v *>rows, <f32v *>local, <f32v *>eps, P // F32_LANES, r)
    else:
        diagonal_of(<f64v *>diagonal, <f64v *>m.own, <f64v *>m.factor_of, <f64v *>rows, <f64v *>local, <f64v *>eps, P // F64_LANES, r)
    for b in range(r if m.follows else 0):
        dot_rows(&out[0], rows, rows + (r - 1) * P, eps, diagonal, of_type, of_type, P)
        for a in range(r):
            m.type_sums[a * r + b] -= modulator[a] * out[2] + (<const real *>m.factor_sums)[a] * out[a]
        if not m.autapses:
            m.type_sums[b * r + b] += out[3]
        of_type += P


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
