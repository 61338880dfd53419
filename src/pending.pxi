# Online updates that are felt at once and written later.
#
# What a step needs of the updates before it is their product with its input s_t = [z_{t-1} | x_t | 1], and for that
# no weight has to be written.  Of a unit p whose weights and traces are those of step t0, with j the steps since,
#
#     W[p] now  =  W[p]  -  c R[p]  -  sum_j A_j[p] eps_j          A_j[p] = L_j h_j[p] + (lam_j d) h_j[p]
#
# where c (r numbers for all units of a group) and A (one number a step) sum what carry_back gives for each error.
# So a step reads W and R once, adds a few products of vectors, and writes nothing of that size; every step brings
# one group up to date, in turn, by one update of rank `window`.  The `mean` factor adds rows that units share.
#
# It is the plain sum that makes this possible: a sign or a mask that a weight must obey at every step does not.
# The type means of W follow their own recursion, from sums over types of R, h and eps, without a look at W.


cdef inline void foresee_body(vec *s, const Tile *tile, Py_ssize_t rank) noexcept nogil:
    """s[i] += lanes of (out[i] - carry R[i]) . z, over whole LANES of W and all of R."""
    cdef Py_ssize_t of = per_line(s), n_lines = tile.n // LANES, n_all = tile.stride // LANES, lanes = LANES // F32_LANES, line, k, at, q = 0
    cdef const vec *R = <const vec *>tile.traces
    cdef const vec *z = <const vec *>tile.z
    cdef const vec *w0 = <const vec *>tile.out[0]
    cdef const vec *w1 = <const vec *>tile.out[1]
    cdef const vec *w2 = <const vec *>tile.out[2]
    cdef const vec *w3 = <const vec *>tile.out[3]
    cdef const void *carry = tile.carry
    cdef vec g[ROWS]
    cdef vec e
    for line in range(n_lines):
        for k in range(of):
            e, at = z[q], k % (LANES // F32_LANES)
            combine(g, NULL, NULL, 0, 0, carry, rank, R + k, q)
            s[at] += (w0[q] - g[0]) * e
            s[lanes + at] += (w1[q] - g[1]) * e
            s[2 * lanes + at] += (w2[q] - g[2]) * e
            s[3 * lanes + at] += (w3[q] - g[3]) * e
            q += 1
        R += rank * ROWS * of
    for line in range(n_lines, n_all if rank else n_lines):
        for k in range(of):
            e, at = z[q], k % (LANES // F32_LANES)
            combine(g, NULL, NULL, 0, 0, carry, rank, R + k, q)
            s[at] -= g[0] * e
            s[lanes + at] -= g[1] * e
            s[2 * lanes + at] -= g[2] * e
            s[3 * lanes + at] -= g[3] * e
            q += 1
        R += rank * ROWS * of


cdef inline void foresee_vectors(vec *s, const Tile *tile) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(ROWS * (LANES // F32_LANES)):
        s[i] = spread(s, &ZERO, 0)
    if tile.rank == 0:
        foresee_body(s, tile, 0)
    elif tile.rank == 1:
        foresee_body(s, tile, 1)
    elif tile.rank == 2:
        foresee_body(s, tile, 2)
    else:
        foresee_body(s, tile, tile.rank)


cdef void foresee(real *out, const Tile *tile, const real *edge) noexcept nogil:
    """out[i] = row i of W . z - carry R[i] . z, for the four units of a block."""
    cdef Py_ssize_t L = 16 if real is float else 8, first = tile.n // LANES * LANES // L, i
    cdef f32v s_f32[ROWS * LANES]
    cdef f64v s_f64[ROWS * LANES]
    if real is float:
        foresee_vectors(&s_f32[0], tile)
        if first * L < tile.n:
            dot_lines(&s_f32[0], tile.out[0], tile.out[1], tile.out[2], tile.out[3], tile.z, edge, tile.n, first)
        for i in range(ROWS):
            out[i] = fold(<real *>&s_f32[0] + L * i)
    else:
        foresee_vectors(&s_f64[0], tile)
        if first * L < tile.n:
            dot_lines(&s_f64[0], tile.out[0], tile.out[1], tile.out[2], tile.out[3], tile.z, edge, tile.n, first)
        for i in range(ROWS):
            out[i] = fold(<real *>&s_f64[0] + L * i)


cdef void dot_terms(Model *m, real *out, void **rows, Py_ssize_t n_rows) noexcept nogil:
    """out[j] = rows[j] . s_t, over (Q,) rows; space for ROWS - 1 more."""
    cdef Py_ssize_t j = 0, last = n_rows - 1
    while j < n_rows:
        dot_rows(out + j, <real *>rows[j], <real *>rows[min(j + 1, last)], <real *>rows[min(j + 2, last)], <real *>rows[min(j + 3, last)],
                 <real *>m.pre, <real *>m.edge, m.stride)
        j += ROWS


cdef inline Py_ssize_t end_of_type(Model *m, Py_ssize_t c) noexcept nogil:
    """Places before which those of type c end; all, where there are no types."""
    return m.type_ends[c] if m.type != NULL else m.n_blocks * ROWS


cdef void recurrent_input(Model *m, real *placed) noexcept nogil:
    """current = (W with all that is pending) s_t, for the step to come: m.t is still that of the last."""
    cdef Py_ssize_t P = m.n_blocks * ROWS, r = m.rank, C = m.n_class, Q = m.stride, group = 0, block, n, c, i, first, age
    cdef Py_ssize_t n_ages = min(m.window, m.t) + 1, kinds = C if m.self_traces != NULL else 1
    cdef bint pending = m.t < m.owed_until, exact = m.trace == TRACE_EXACT, mean = m.trace == TRACE_MEAN
    cdef real *own = <real *>m.own
    cdef real *dots = <real *>m.eps_dots
    cdef real *total = dots + (SLOTS + ROWS) * max(C, 1)
    cdef const real *z = <const real *>m.pre
    cdef const real *a
    cdef const real *e
    cdef real dot
    cdef int p
    cdef Tile tile = open_tile(m, 0, NULL)
    tile.n, tile.z = m.n_rec, m.pre
    line_up(<real *>m.edge, z, m.n_rec)
    for block in range(m.n_blocks):
        tile.out = m.w_rows + block * ROWS
        if exact:
            tile.rank = r if pending and m.since[group] else 0
            tile.carry = <real *>m.carried + group * r
            tile.traces = <real *>m.traces + block * ROWS * r * Q
            group = group + 1 if group + 1 < m.n_groups else 0
        foresee(placed + block * ROWS, &tile, <real *>m.edge)
    memcpy(own, m.own_rows, P * sizeof(real))
    if pending:
        for n in range(n_ages):
            for c in range(kinds):
                m.terms[n * kinds + c] = <real *>(m.eps if m.self_traces == NULL else m.class_eps) + (slot(m, m.t - n) * kinds + c) * Q
        dot_terms(m, dots, m.terms, n_ages * kinds)
        for n in range(n_ages):
            a, e = <real *>m.pending + slot(m, m.t - n) * P, <real *>m.eps_placed + slot(m, m.t - n) * P
            first = 0
            for c in range(kinds):
                dot = dots[n * kinds + c]
                for i in range(first, P if kinds == 1 else end_of_type(m, c)):
                    placed[i] -= a[i] * dot
                    own[i] += a[i] * e[i]
                first = end_of_type(m, c)
    if pending and mean:
        for n in range(n_ages):
            for c in range(C):
                m.terms[n * C + c] = <real *>m.class_rows + (slot(m, m.t - n) * C + c) * Q
        dot_terms(m, dots, m.terms, n_ages * C)
        memset(total, 0, C * sizeof(real))
        for n in range(n_ages):  # total[n]: of the last n steps
            for c in range(C):
                total[(n + 1) * C + c] = total[n * C + c] + dots[n * C + c]
        group = 0
        for block in range(m.n_blocks):
            age = m.t - m.since[group]
            group = group + 1 if group + 1 < m.n_groups else 0
            for c in range(C):
                if m.type == NULL:
                    a = <real *>m.readout + c * P
                elif c == m.block_type[block]:
                    a = <real *>m.factor
                else:
                    continue
                for i in range(block * ROWS, block * ROWS + ROWS):
                    placed[i] -= a[i] * total[age * C + c]
    for i in range(P):
        p = m.unit[i]
        if p >= 0:
            (<real *>m.current)[p] = placed[i] if m.autapses else placed[i] + own[i] * z[p]


# ---------------------------------------------------------------- after a step

cdef void defer(Model *m, Py_ssize_t n_steps, bint learn, real *carry) noexcept nogil:
    """What this step's error says of the weights is added to what is pending; `n_steps`: the most that a group
    lags behind, `carry`: of `carry_back`."""
    cdef Py_ssize_t P = m.n_blocks * ROWS, r = m.rank, C = m.n_class, Q = m.stride, s = slot(m, m.t), n, c, i, a, group, first, end
    cdef real *eps_placed = <real *>m.eps_placed + s * P
    cdef real *A = <real *>m.pending + s * P
    cdef real *own_rows = <real *>m.own_rows
    cdef const real *onto
    cdef const real *h
    cdef const real *row = <real *>m.eps + s * Q
    cdef real *carried
    cdef int p
    for i in range(P):
        p = m.unit[i]
        if p >= 0:
            if m.self_traces != NULL:
                row = <real *>m.class_eps + (s * C + m.type[p]) * Q
            eps_placed[i] = row[p]
    if not learn:
        return
    m.owed_until = m.t + m.n_groups
    memcpy(A, <real *>m.local + s * P, P * sizeof(real))
    if m.trace == TRACE_MEAN:
        row = <real *>m.class_rows + s * C * Q
        for c in range(C):
            for i in range(P):
                p = m.unit[i]
                if p >= 0 and (m.type == NULL or m.type[p] == c):
                    own_rows[i] += ((<real *>m.factor)[i] if m.type != NULL else (<real *>m.readout)[c * P + i]) * row[c * Q + p]
    if m.trace != TRACE_EXACT:
        return
    for group in range(m.n_groups):
        carried = <real *>m.carried + group * r
        n = m.t - m.since[group]
        for a in range(r):
            carried[a] += carry[n * r + a]
    for n in range(1, n_steps + 1):
        A, h = <real *>m.pending + slot(m, m.t - n) * P, <real *>m.h_past + slot(m, m.t - n) * P
        onto = <real *>m.back_drive + n * m.n_drive
        if m.type == NULL:
            for i in range(P):
                A[i] += onto[i] * h[i]
            continue
        first = 0
        for c in range(r):
            end = m.type_ends[c]
            axpy(A + first, onto[c], h + first, end - first)
            first = end


cdef void write_group(Model *m, Py_ssize_t group, real *coef) noexcept nogil:
    """Bring the weights and the traces of one group of blocks up to date."""
    cdef Py_ssize_t P = m.n_blocks * ROWS, r = m.rank, C = m.n_class, Q = m.stride, n_steps = m.t - m.since[group]
    cdef Py_ssize_t block = group, n, i, c, n_terms, q
    cdef bint exact = m.trace == TRACE_EXACT, owed = m.t - n_steps < m.owed_until, held = m.since[group] > 0
    cdef real *sums = <real *>m.class_sums
    cdef real *A
    cdef real *R
    cdef real *carried = <real *>m.carried + group * r
    cdef int *unit
    cdef Tile tile = open_tile(m, 0, carried)
    tile.n, tile.z, tile.dots, tile.tail, tile.pick = m.n_rec, NULL, m.dots, m.tail, m.pick
    tile.coef, tile.n_places = coef, ROWS
    if owed and m.trace == TRACE_MEAN:
        memcpy(sums, <real *>m.class_rows + slot(m, m.t) * C * Q, C * Q * sizeof(real))
        for n in range(1, n_steps):
            axpy(sums, <real>1, <real *>m.class_rows + slot(m, m.t - n) * C * Q, C * Q)
    while block < m.n_blocks:
        unit = m.unit + block * ROWS
        n_terms = 0
        for n in range(n_steps + 1 if owed else 0):
            A = <real *>m.pending + slot(m, m.t - n) * P + block * ROWS
            if A[0] != 0 or A[1] != 0 or A[2] != 0 or A[3] != 0:
                m.terms[n_terms] = <real *>m.eps + slot(m, m.t - n) * Q
                if m.self_traces != NULL:
                    m.terms[n_terms] = <real *>m.class_eps + (slot(m, m.t - n) * C + m.block_type[block]) * Q
                for i in range(ROWS):
                    coef[n_terms * ROWS + i] = A[i]
                    A[i] = 0
                n_terms += 1
        for c in range(C if owed and m.trace == TRACE_MEAN else 0):
            if m.type == NULL or c == m.block_type[block]:
                m.terms[n_terms] = sums + c * Q
                for i in range(ROWS):
                    coef[n_terms * ROWS + i] = (<real *>m.factor)[block * ROWS + i] if m.type != NULL else (<real *>m.readout)[c * P + block * ROWS + i]
                n_terms += 1
        for i in range(ROWS):
            (<real *>m.own_rows)[block * ROWS + i] = 0
        if exact:
            tile.rank, tile.traces = r if owed and held else 0, <real *>m.traces + block * ROWS * r * Q
        if n_terms or tile.rank:
            tile.out, tile.n_terms, tile.own = m.w_rows + block * ROWS, n_terms, NULL if m.autapses else unit
            descend(&tile, coef)
            descend_rest(m, &tile, unit, <real *>NULL)
        if exact:
            advance_block(m, block, n_steps, held, coef)
            for n in range(1, n_steps + 1):
                memset(<real *>m.h_past + slot(m, m.t - n) * P + block * ROWS, 0, ROWS * sizeof(real))
        block += m.n_groups
    memset(carried, 0, r * sizeof(real))
    m.since[group] = m.t


# ---------------------------------------------------------------- sums over types

cdef void sum_step(Model *m, real *scratch) noexcept nogil:
    """Over each type: h, eps, h eps and L h eps of now."""
    cdef Py_ssize_t n = m.n_rec, Q = m.stride, p, b
    cdef const real *h = <const real *>m.h
    cdef const real *eps = <real *>m.eps + slot(m, m.t) * Q
    cdef const real *local = <real *>m.local + slot(m, m.t) * m.n_blocks * ROWS
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


cdef void follow_sums(Model *m, bint learn, real *scratch) noexcept nogil:
    """The sums over types of W (and of R, which obey R's own recursion) after this step."""
    cdef Py_ssize_t r = m.rank, n = m.n_rec, Q = m.stride, s = slot(m, m.t), a, b, c, d, p
    cdef double *W = m.type_sums
    cdef double *T = m.trace_sums      # (r, r, r) [modulator, post, pre]
    cdef double *before = m.step_sums + 4 * r
    cdef const real *K = <const real *>m.K
    cdef const real *drive = <const real *>m.drive
    cdef const real *modulator = <real *>m.modulator + s * r
    cdef const real *row
    cdef double change, own, e
    cdef double *mixed = m.step_sums + 7 * r
    cdef real out[ROWS]
    if m.trace == TRACE_EXACT:
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
                    W[a * r + b] -= change
        return
    for a in range(r if learn else 0):  # `mean`: of the row of eps, and of the row that units of the type share
        row = <real *>m.eps + s * Q if m.self_traces == NULL else <real *>m.class_eps + (s * r + a) * Q
        for p in range(n):
            scratch[p] = (<real *>m.local)[s * m.n_blocks * ROWS + m.place[p]] * row[p]
            scratch[Q + p] = (<real *>m.factor)[m.place[p]] * (<real *>m.class_rows)[(s * r + a) * Q + p]
            scratch[2 * Q + p] = (<real *>m.factor)[m.place[p]]
        own = 0
        for b in range(r):
            line_up(<real *>m.edge, <real *>m.membership + b * n, n)
            if b == a:
                dot_rows(&out[0], scratch, scratch + Q, scratch + 2 * Q, scratch, <real *>m.membership + b * n, <real *>m.edge, n)
                own, e = 0 if m.autapses else <double>out[0] + <double>out[1], out[2]
        for b in range(r):
            line_up(<real *>m.edge, <real *>m.membership + b * n, n)
            dot_rows(&out[0], row, <real *>m.class_rows + (s * r + a) * Q, row, row, <real *>m.membership + b * n, <real *>m.edge, n)
            W[a * r + b] -= <double>modulator[a] * out[0] + e * out[1] - (own if a == b else 0)


cdef void take_stock(Model *m, real *scratch) noexcept nogil:
    """Before updates are deferred again: everything is up to date, and the sums are taken from W and R themselves."""
    cdef Py_ssize_t P = m.n_blocks * ROWS, r = m.rank, n = m.n_rec, Q = m.stride, a, b, c, p, q, now = slot(m, m.t), s
    cdef const real *w
    cdef const real *R
    for s in range(SLOTS):
        if s != now:
            memset(<real *>m.h_past + s * P, 0, P * sizeof(real))
    m.counted = True
    if m.type == NULL or not m.refresh_every or not r:
        return
    memset(m.type_sums, 0, r * r * sizeof(double))
    for p in range(n):
        w = <real *>m.w_rec + p * n
        for q in range(n):
            m.type_sums[m.type[p] * r + m.type[q]] += w[q]
    if m.trace != TRACE_EXACT:
        return
    memset(m.trace_sums, 0, r * r * r * sizeof(double))
    sum_step(m, scratch)
    if m.since[0] == 0:
        return
    for p in range(n):
        R = <real *>m.traces + (m.place[p] // ROWS) * ROWS * r * Q + m.place[p] % ROWS * LANES
        for c in range(r):
            for q in range(n):
                if q != p or m.autapses:
                    m.trace_sums[(c * r + m.type[p]) * r + m.type[q]] += R[(q // LANES * r + c) * ROWS * LANES + q % LANES]
