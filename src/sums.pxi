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


cdef inline void sum_traces(Model *m, const real *K, const real *drive, Py_ssize_t b, double eps, double weighted, Py_ssize_t r) noexcept nogil:
    """The sums of the traces of `mean` over type b, which obey the traces' own recursion; eps and factor eps: of a step ago."""
    cdef double *T = m.trace_sums + b  # (r, r, r) [class, modulator, pre]
    cdef double *own = m.step_sums + (3 + b) * r  # [modulator] of factor times the traces of class b
    cdef double mixed[2]
    cdef Py_ssize_t a, c, d
    for a in range(r):
        for c in range(r):
            mixed[c] = drive[a * r + c] * eps
            for d in range(r):
                mixed[c] += K[c * r + d] * T[(a * r + d) * r]
        for c in range(r):
            T[(a * r + c) * r] = mixed[c]
    for c in range(r):
        mixed[c] = drive[b * r + c] * weighted
        for d in range(r):
            mixed[c] += K[c * r + d] * own[d]
    for c in range(r):
        own[c] = mixed[c]


cdef void sum_mean(Model *m, const real *learned, real *scratch) noexcept nogil:
    """`mean`, r <= 2, over each type: eps and factor eps of now, the traces, and of an error L h, the modulators, and L h eps.

    step_sums: eps (r,), factor eps (r,), L h eps (r,), factor traces (r, r); trace_sums: traces.
    """
    cdef Py_ssize_t n = m.n_rec, r = m.rank, a, b, p
    cdef double *sums = m.step_sums
    cdef const real *eps = <const real *>m.eps + slot(m, m.t) * m.stride
    cdef const real *factor = <const real *>m.factor_by_unit
    cdef const real *of_type = <const real *>m.membership
    cdef real *modulator = <real *>m.modulator + slot(m, m.t) * r
    cdef real *weighted = scratch + n
    cdef real out[ROWS]
    cdef real edge[16]
    for p in range(n):
        scratch[p] = learned[p] * eps[p]
    for p in range(n if m.running else 0):
        weighted[p] = factor[p] * eps[p]
    for a in range(1, r if m.running else 0):
        for p in range(n):
            weighted[p] += factor[a * n + p] * eps[p]
    for b in range(r):
        if r == 2 and m.follows:
            sum_traces(m, <const real *>m.K, <const real *>m.class_drive, b, sums[b], sums[r + b], 2)
        elif m.follows:
            sum_traces(m, <const real *>m.K, <const real *>m.class_drive, b, sums[b], sums[r + b], 1)
        if n % (16 if real is float else 8):
            line_up(&edge[0], of_type, n)
        dot_rows(&out[0], learned, scratch, eps, weighted if m.running else eps, of_type, &edge[0], n)
        modulator[b], sums[2 * r + b], sums[b], sums[r + b] = out[0], out[1], out[2], out[3]
        of_type += n


cdef inline void learn_sums(Model *m, const real *modulator, const real *factor_sums, Py_ssize_t r) noexcept nogil:
    """What this step's error takes from the sums over types of W."""
    cdef const double *sums = m.step_sums
    cdef double change
    cdef Py_ssize_t a, b, c
    for a in range(r):
        for b in range(r):
            change = 0
            for c in range(r):
                change += modulator[c] * m.trace_sums[(a * r + c) * r + b]
            change = modulator[a] * sums[b] + factor_sums[a] * change
            if a == b and not m.autapses:
                change -= sums[2 * r + b]
                for c in range(r):
                    change -= modulator[c] * sums[(3 + b) * r + c]
            m.type_sums[a * r + b] -= change


cdef void follow_mean(Model *m, real *own) noexcept nogil:
    """The diagonal of what waits, and the sums over types of W, after this step's error."""
    cdef Py_ssize_t n = m.n_rec, r = m.rank, a, p
    cdef const real *modulator = <real *>m.modulator + slot(m, m.t) * r
    cdef const real *factor = <const real *>m.factor_by_unit
    cdef const real *row = <const real *>m.class_rows
    for a in range(r):
        for p in range(n):
            own[p] += factor[p] * row[p]
        factor += n
        row += m.stride
    if r == 2 and m.follows:
        learn_sums(m, modulator, <const real *>m.factor_sums, 2)
    elif m.follows:
        learn_sums(m, modulator, <const real *>m.factor_sums, 1)


cdef void take_stock_of_mean(Model *m, const real *eps) noexcept nogil:
    """The sums that `sum_mean` keeps up, from eps of now and the traces themselves."""
    cdef Py_ssize_t n = m.n_rec, r = m.rank, a, b, c, p
    cdef const real *factor = <const real *>m.factor_by_unit
    cdef const real *trace
    memset(m.step_sums, 0, 8 * r * sizeof(double))
    memset(m.trace_sums, 0, r * r * r * sizeof(double))
    for p in range(n):
        b = m.type[p]
        m.step_sums[b] += eps[p]
        m.step_sums[r + b] += factor[b * n + p] * eps[p]
        for a in range(r):
            for c in range(r):
                trace = <const real *>m.traces + (a * r + c) * m.stride
                m.trace_sums[(a * r + c) * r + b] += trace[p]
                if a == b:
                    m.step_sums[(3 + a) * r + c] += factor[a * n + p] * trace[p]


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


cdef void sum_weights(Model *m, real *scratch) noexcept nogil:
    """type_sums from weights by source: what would be heard of all sources of a type at 1, summed over the places of each."""
    cdef Py_ssize_t r = m.rank, n = m.n_rec, a, b
    cdef real *total = scratch
    cdef real *s = scratch + m.stride
    memset(s + n, 0, (m.stride - n) * sizeof(real))
    for b in range(r):
        memcpy(s, <const real *>m.membership + b * n, n * sizeof(real))
        list_by(m, s, <real *>m.heard_count, 0)
        share_out(m, False, 0, s)
        matvec(total, <const real *>m.u, <const real *>m.placed, r, m.n_places)
        for a in range(r):
            m.type_sums[a * r + b] = total[a]


cdef void sum_trace(Model *m, Py_ssize_t c, const real *by_source) noexcept nogil:
    """trace_sums of modulator c, (r, r) [post, pre] over types, from the traces themselves."""
    cdef Py_ssize_t r = m.rank, P = m.n_places, apart = between_sources(m), a, q = 0, i
    cdef double *sums = m.trace_sums + c * r * r
    cdef const real *row
    cdef const real *of_type
    cdef real out[TOGETHER]
    memset(sums, 0, r * r * sizeof(double))
    while q < m.n_rec:
        row = by_source + q * apart + (1 + c) * P
        for a in range(r):
            of_type = <const real *>m.u + a * P
            dot_rows(&out[0], row, row + apart, row + 2 * apart, row + 3 * apart, of_type, of_type, P)
            for i in range(min(TOGETHER, m.n_rec - q)):
                sums[a * r + m.type[q + i]] += out[i]
        q += TOGETHER
