# Online updates that are felt at once and written later.
#
# What a step needs of the updates before it is their product with its input s_t = [z_{t-1} | x_t | 1], and for that
# no weight has to be written.  Of a unit p whose weights and traces are those of step t0, with j the steps since,
#
#     W[p] now  =  W[p]  -  c R[p]  -  sum_j A_j[p] eps_j          A_j[p] = L_j h_j[p] + (lam_j d) h_j[p]
#
# where c (r numbers for all units of a group) and A (one number a step) sum what carry_back gives for each error.
# So a step reads W and R once, adds a few products of vectors, and writes nothing of that size; every step brings
# one group up to date, in turn, by one update of rank `window`.
#
# It is the plain sum that makes this possible: a sign or a mask that a weight must obey at every step does not.  For
# `exact` it saves most; e-prop and the `mean` factor by types, which have no R, gain from some size on (DEFER_FROM,
# core.pyx).  The rows of the latter, (C, Q) numbers a step, wait in a ring of their own, and count for a group through
# their sum over the steps that it lags behind.  The type means of W follow from sums over types of R, h and eps, without a
# look at W.
#
# In `run(chunk=)` weights stand still within a chunk: nothing that waits is felt before its end, when all is written.
#
# A step reads W and R unit by unit, three streams of rows, which reaches the caches' bandwidth where rows in step of four
# do not (measured: 1.7 against 2.0 us at N = 128, 136 against 173 at 1024, 1270 against 1940 at 2048).


cdef extern from "threads.h":
    void mpf_add(int *count, int n) noexcept nogil
    void mpf_wait(int *count, int value, bint other) noexcept nogil


cdef enum:
    ROW_BY_ROW = 16  # units from which rows of W alone are read one at a time: at 1024 1 %, at 2048 12 % quicker


cdef inline void foresee_body(vec *s, const Tile *tile, Py_ssize_t i, const void *edge, Py_ssize_t rank) noexcept nogil:
    """s[k] += lanes of (out[i] - carry R[i]) . z, of lines of 64 bytes the even and the odd ones apart: two chains of additions."""
    cdef Py_ssize_t of = LANES // F32_LANES, L = 16 if vec is f32v else 8, n_lines = tile.n // L, n_all = tile.stride // L, k, q = 0, line
    cdef const vec *z = <const vec *>tile.z
    cdef const vec *w = <const vec *>tile.out[i]
    cdef const vec *R0 = <const vec *>tile.traces + i * rank * n_all * of
    cdef const vec *R1 = R0 + n_all * of
    cdef vec g, c0 = spread(s, &ZERO, 0), c1 = c0
    for k in range(2 * of):
        s[k] = c0
    if rank:
        c0 = -spread(s, tile.carry, 0)
    if rank == 2:
        c1 = -spread(s, tile.carry, 1)
    for line in range(n_lines // 2):
        for k in range(2 * of):
            g = w[q]
            if rank:
                g = madd(g, c0, R0[q])
            if rank == 2:
                g = madd(g, c1, R1[q])
            s[k] = madd(s[k], g, z[q])
            q += 1
    for line in range(n_lines % 2):
        for k in range(of):
            g = w[q]
            if rank:
                g = madd(g, c0, R0[q])
            if rank == 2:
                g = madd(g, c1, R1[q])
            s[k] = madd(s[k], g, z[q])
            q += 1
    for line in range(n_lines, n_all if rank else n_lines):
        for k in range(of):
            g = c0 * R0[q]
            if rank == 2:
                g = madd(g, c1, R1[q])
            s[k] = madd(s[k], g, z[q])
            q += 1
    if tile.n % L:
        w = <const vec *>(<const char *>w + (tile.n - L) * (64 // L))
        for k in range(of):
            s[k] = madd(s[k], w[k], (<const vec *>edge)[k])
    for k in range(of):
        s[k] += s[of + k]


cdef inline void foresee_vectors(vec *s, const Tile *tile, Py_ssize_t i, const void *edge) noexcept nogil:
    if tile.rank == 0:
        foresee_body(s, tile, i, edge, 0)
    elif tile.rank == 1:
        foresee_body(s, tile, i, edge, 1)
    else:
        foresee_body(s, tile, i, edge, 2)


cdef real foresee(const Tile *tile, Py_ssize_t i, const real *edge) noexcept nogil:
    """Row i of W . z - carry R[i] . z; `edge`: the last line of z, see `line_up`."""
    cdef f32v s_f32[2 * LANES]
    cdef f64v s_f64[2 * LANES]
    if real is float:
        foresee_vectors(&s_f32[0], tile, i, edge)
        return fold(<real *>&s_f32[0])
    else:
        foresee_vectors(&s_f64[0], tile, i, edge)
        return fold(<real *>&s_f64[0])


cdef void dot_terms(Model *m, real *out, void **rows, Py_ssize_t n_rows) noexcept nogil:
    """out[j] = rows[j] . s_t, over (Q,) rows; space for ROWS - 1 more."""
    cdef Py_ssize_t j = 0, last = n_rows - 1
    while j < n_rows:
        dot_rows(out + j, <real *>rows[j], <real *>rows[min(j + 1, last)], <real *>rows[min(j + 2, last)], <real *>rows[min(j + 3, last)],
                 <real *>m.pre, <real *>m.edge, m.stride)
        j += ROWS


cdef void foresee_blocks(Model *m, Py_ssize_t first, Py_ssize_t last, real *placed) noexcept nogil:
    """The products of W and the traces of these blocks with s_t."""
    cdef Py_ssize_t r = m.rank if m.trace == TRACE_EXACT else 0, block, group = first % m.n_groups, i
    cdef bint pending = m.t < m.owed_until
    cdef Tile tile = open_tile(m, 0, NULL)
    tile.n, tile.z = m.n_rec, m.pre
    for block in range(first, last):
        tile.out = m.w_rows + block * ROWS
        tile.rank = r if pending and 0 < m.since[group] < m.t else 0  # of now: nothing waits
        tile.carry = <real *>m.carried + group * r
        group = group + 1 if group + 1 < m.n_groups else 0
        tile.traces = <real *>m.traces + block * ROWS * r * m.stride
        if tile.rank == 0 and m.n_rec < ROW_BY_ROW:
            dot_rows(placed + block * ROWS, <real *>tile.out[0], <real *>tile.out[1], <real *>tile.out[2], <real *>tile.out[3],
                     <real *>m.pre, <real *>m.edge, m.n_rec)
        else:
            for i in range(ROWS):
                placed[block * ROWS + i] = foresee(&tile, i, <real *>m.edge)


cdef void recall_rows(Model *m, real *placed) noexcept nogil:
    """What the rows of the `mean` factor, of the steps that a group lags behind, take from the products with s_t."""
    cdef Py_ssize_t C = m.n_class, n, c, i, block, group = 0, n_rows = 0
    cdef real *dots = <real *>m.eps_dots
    cdef real *sums = <real *>m.row_sums  # (S, C): of the last n steps
    cdef const real *factor = <real *>m.factor
    cdef real sum
    for n in range(min(m.window, m.t)):
        for c in range(C if m.erred[slot(m, m.t - n)] else 0):
            m.terms[n_rows] = <real *>m.class_past + (slot(m, m.t - n) * C + c) * m.stride
            n_rows += 1
    dot_terms(m, dots, m.terms, n_rows)
    n_rows = 0
    memset(sums, 0, C * sizeof(real))
    for n in range(min(m.window, m.t)):
        for c in range(C):
            sums[(n + 1) * C + c] = sums[n * C + c]
            if m.erred[slot(m, m.t - n)]:
                sums[(n + 1) * C + c] += dots[n_rows]
                n_rows += 1
    for block in range(m.n_blocks):
        sum = sums[(m.t - m.since[group]) * C + m.block_type[block]]
        group = group + 1 if group + 1 < m.n_groups else 0
        for i in range(block * ROWS, block * ROWS + ROWS):
            placed[i] -= factor[i] * sum


cdef inline void feel_vectors(vec *placed, vec *own, const void **a, const void **e, const void *dots, Py_ssize_t n_ages, Py_ssize_t n_vectors,
                              bint owned) noexcept nogil:
    """placed -= sum_n dots[n] a[n], and with `owned` own = sum_n a[n] e[n]."""
    cdef Py_ssize_t q, n
    cdef vec s, t, x
    for q in range(n_vectors):
        s = placed[q]
        t = spread(placed, &ZERO, 0)
        for n in range(n_ages):
            x = (<const vec *>a[n])[q]
            s = madd(s, -spread(placed, dots, n), x)
            if owned:
                t = madd(t, x, (<const vec *>e[n])[q])
        placed[q] = s
        if owned:
            own[q] = t


cdef void feel(Model *m, real *placed, real *own, const real *dots, Py_ssize_t n_ages, bint owned) noexcept nogil:
    """What the last steps' errors, each eps through its own numbers, take from the products with s_t."""
    cdef Py_ssize_t P = m.n_blocks * ROWS, L = 16 if real is float else 8, n, i, done = P // L * L
    cdef const void *a[SLOTS]
    cdef const void *e[SLOTS]
    cdef real x
    for n in range(n_ages):
        a[n] = <const void *>(<real *>m.pending + slot(m, m.t - n) * P)
        e[n] = <const void *>(<real *>m.eps_placed + slot(m, m.t - n) * P)
    if real is float and owned:
        feel_vectors(<f32v *>placed, <f32v *>own, a, e, dots, n_ages, done // F32_LANES, True)
    elif real is float:
        feel_vectors(<f32v *>placed, <f32v *>own, a, e, dots, n_ages, done // F32_LANES, False)
    elif owned:
        feel_vectors(<f64v *>placed, <f64v *>own, a, e, dots, n_ages, done // F64_LANES, True)
    else:
        feel_vectors(<f64v *>placed, <f64v *>own, a, e, dots, n_ages, done // F64_LANES, False)
    for i in range(done, P):
        if owned:
            own[i] = 0
        for n in range(n_ages):
            x = (<const real *>a[n])[i]
            placed[i] -= dots[n] * x
            if owned:
                own[i] += x * (<const real *>e[n])[i]


cdef void recurrent_input(Model *m, real *placed) noexcept nogil:
    """current = (W with all that is pending) s_t, for the step to come: m.t is still that of the last."""
    cdef Py_ssize_t Q = m.stride, n, p, n_ages = min(m.window, m.t) + 1
    cdef bint owned = m.trace == TRACE_EXACT and not m.autapses  # else `own` is kept up step by step
    cdef real *own = <real *>m.own
    cdef const real *z = <const real *>m.pre
    line_up(<real *>m.edge, z, m.n_rec)
    share_out(m, False, 0, placed)
    if m.t < m.owed_until:
        for n in range(n_ages):
            m.terms[n] = <real *>m.eps + slot(m, m.t - n) * Q
        dot_terms(m, <real *>m.eps_dots, m.terms, n_ages)
        feel(m, placed, own, <real *>m.eps_dots, n_ages, owned)
        if m.trace == TRACE_MEAN:
            recall_rows(m, placed)
    from_places(m, <real *>m.current, placed)
    if m.t < m.owed_until and not m.autapses:
        from_places(m, <real *>m.input, own)
        for p in range(m.n_rec):
            (<real *>m.current)[p] += (<real *>m.input)[p] * z[p]


# ---------------------------------------------------------------- after a step

cdef void place_eps(Model *m, real *placed) noexcept nogil:
    """eps of now by place."""
    to_places(m, placed, <const real *>m.eps + slot(m, m.t) * m.stride)


cdef void defer(Model *m, Py_ssize_t n_steps, bint learn, real *carry) noexcept nogil:
    """What this step's error says of the weights is added to what is pending; `n_steps`: the most that a group
    lags behind, `carry`: of `carry_back`."""
    cdef Py_ssize_t P = m.n_blocks * ROWS, r = m.rank, s = slot(m, m.t), n, i, a, group
    cdef real *A = <real *>m.pending + s * P
    cdef const real *onto
    cdef const real *h
    cdef real *carried
    place_eps(m, <real *>m.eps_placed + s * P)
    if not learn:
        return
    m.owed_until = m.t + m.n_groups
    memcpy(A, <real *>m.local + s * P, P * sizeof(real))
    if m.trace != TRACE_EXACT:
        for i in range(P):
            (<real *>m.own)[i] += A[i] * (<real *>m.eps_placed)[s * P + i]
        return
    for group in range(m.n_groups):
        carried = <real *>m.carried + group * r
        n = m.t - m.since[group]
        for a in range(r):
            carried[a] += carry[n * r + a]
    for n in range(1, n_steps + 1):
        A, h = <real *>m.pending + slot(m, m.t - n) * P, <real *>m.h_past + slot(m, m.t - n) * P
        onto = <real *>m.back_drive + n * m.n_drive
        for i in range(m.n_blocks):
            add_four(A + i * ROWS, h + i * ROWS, onto + (i * ROWS if m.type == NULL else m.block_type[i]), m.type == NULL)


cdef void write_blocks(Model *m, Py_ssize_t group, Py_ssize_t first, Py_ssize_t last, real *tail) noexcept nogil:
    """Bring the weights and the traces of those blocks of a group up to date that are among these."""
    cdef Py_ssize_t P = m.n_blocks * ROWS, Q = m.stride, n_steps = m.t - m.since[group], i, n
    cdef Py_ssize_t block = first + (group - first % m.n_groups + m.n_groups) % m.n_groups
    cdef bint owed = m.t - n_steps < m.owed_until, held = m.since[group] > 0
    cdef const int *unit
    cdef Tile tile = open_tile(m, 0, NULL)
    tile.n, tile.tail = m.n_rec, tail
    while block < last:
        renew_block(m, block, n_steps, held, owed, <real *>m.carried + group * m.rank, tail)
        if owed:
            tile.out = m.w_rows + block * ROWS
            unit = m.unit + block * ROWS
            for i in range(ROWS):
                if unit[i] < 0:
                    memset(tail + i * (LANES + Q) + LANES, 0, Q * sizeof(real))
            descend_rest(m, &tile, unit, <real *>NULL)
        if m.trace != TRACE_EXACT:
            memset(<real *>m.own + block * ROWS, 0, ROWS * sizeof(real))
        for n in range(1, n_steps + 1):
            memset(<real *>m.h_past + slot(m, m.t - n) * P + block * ROWS, 0, ROWS * sizeof(real))
        block += m.n_groups


cdef void sum_rows(Model *m, Py_ssize_t n_steps, real *sums) noexcept nogil:
    """The rows of the `mean` factor, (C, Q), summed over the last steps."""
    cdef Py_ssize_t n, size = m.n_class * m.stride
    memset(sums, 0, size * sizeof(real))
    for n in range(n_steps):
        if m.erred[slot(m, m.t - n)]:
            axpy(sums, <real>1, <real *>m.class_past + slot(m, m.t - n) * size, size)


cdef void write_group(Model *m, Py_ssize_t group, const real *_) noexcept nogil:
    """Bring the weights and the traces of one group of blocks up to date."""
    if m.trace == TRACE_MEAN:
        sum_rows(m, m.t - m.since[group], <real *>m.class_rows)
    if m.trace == TRACE_EXACT:
        sum_awake(m, m.t - m.since[group], <real *>m.awake_sums)
    share_out(m, True, group, _)
    if m.trace == TRACE_EXACT:
        memset(<real *>m.carried + group * m.rank, 0, m.rank * sizeof(real))
    m.since[group] = m.t


cdef void write_chunk(Model *m, bint learn, real *coef) noexcept nogil:
    """The end of a chunk of steps during which the weights stood still: with `learn` their update, and the traces after it."""
    cdef Py_ssize_t n_steps = m.t - m.since[0], P = m.n_blocks * ROWS, n
    if m.follows and m.trace == TRACE_EXACT:
        filter_powers(m, n_steps, <real *>m.power_K)
    if learn:
        if m.trace == TRACE_EXACT:
            carry_back(m, n_steps, <real *>m.back)
        gradient_terms(m, n_steps, 0, 1, coef)
        for n in range(n_steps + 1):
            memcpy(<real *>m.pending + slot(m, m.t - n) * P, coef + n * P, P * sizeof(real))
        if m.trace == TRACE_EXACT:
            memcpy(m.carried, <real *>m.back + (SLOTS + n_steps) * m.rank, m.rank * sizeof(real))
        m.owed_until = m.t
    write_group(m, 0, coef)


# ---------------------------------------------------------------- threads over rows

cdef void take_part(Model *m, bint write, Py_ssize_t group, int place, int n, const real *_) noexcept nogil:
    """One thread's part of a piece of work: the same blocks every time, which its caches may still hold."""
    cdef Py_ssize_t first = m.n_blocks * place // n, last = m.n_blocks * (place + 1) // n
    if write:
        write_blocks(m, group, first, last, <real *>m.tail + place * ROWS * (LANES + m.stride))
    else:
        foresee_blocks(m, first, last, <real *>m.placed)


cdef void share_out(Model *m, bint write, Py_ssize_t group, const real *_) noexcept nogil:
    """Do a piece of work, alone or with the team.  No number depends on how many share it: each is one thread's own."""
    cdef Team *team = m.team
    if team == NULL:
        take_part(m, write, group, 0, 1, _)
        return
    team.write, team.group, team.arrived = write, group, 0
    mpf_add(&team.ticket, 1)
    take_part(m, write, group, 0, team.n, _)
    mpf_wait(&team.arrived, team.n - 1, False)


cdef void assist_in(Model *m, int place, const real *_) noexcept nogil:
    """Be a thread of the team until there is no more to do."""
    cdef Team *team = m.team
    cdef int ticket = 0
    while True:
        mpf_wait(&team.ticket, ticket, True)
        ticket += 1
        if not team.go:
            return
        take_part(m, team.write, team.group, place, team.n, _)
        mpf_add(&team.arrived, 1)


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


cdef void follow_rows(Model *m, bint learn, real *_) noexcept nogil:
    """`mean`: the diagonal of what waits, and the sums over types of W, after this step."""
    cdef Py_ssize_t n = m.n_rec, Q = m.stride, r = m.rank, s = slot(m, m.t), a, b, i, first = 0
    cdef const real *eps = <real *>m.eps + s * Q
    cdef const real *local = <real *>m.local + s * m.n_blocks * ROWS
    cdef const real *rows = <real *>m.class_past + s * r * Q
    cdef const real *eps_placed = <real *>m.eps_placed + s * m.n_blocks * ROWS
    cdef const real *factor = <real *>m.factor
    cdef real *placed = <real *>m.placed
    cdef real *own = <real *>m.own
    cdef double factors[2]
    cdef double diagonal
    cdef real out[ROWS]
    if not learn:
        return
    for a in range(r):
        to_places(m, placed, rows + a * Q)
        factors[a] = diagonal = 0
        for i in range(first, m.type_ends[a]):
            own[i] += factor[i] * placed[i]
            factors[a] += factor[i]
            diagonal += factor[i] * placed[i] + local[i] * eps_placed[i]
        first = m.type_ends[a]
        if not m.autapses:
            m.type_sums[a * r + a] += diagonal
    for b in range(r if m.follows else 0):
        line_up(<real *>m.edge, <real *>m.membership + b * n, n)
        dot_rows(&out[0], rows, rows + (r - 1) * Q, eps, eps, <real *>m.membership + b * n, <real *>m.edge, n)
        for a in range(r):
            m.type_sums[a * r + b] -= (<real *>m.modulator)[s * r + a] * out[2] + factors[a] * out[a]


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


cdef void sum_rows_by_type(Model *m, const real *rows, Py_ssize_t apart, bint placed) noexcept nogil:
    """column_sums: of the first N columns of every unit's row, over the units of each type."""
    cdef Py_ssize_t n = m.n_rec, p
    memset(m.column_sums, 0, m.rank * n * sizeof(real))
    for p in range(n):
        axpy(<real *>m.column_sums + m.type[p] * n, <real>1, rows + (m.place[p] if placed else p) * apart, n)


cdef void take_stock(Model *m, real *scratch) noexcept nogil:
    """Before updates are deferred again: everything is up to date, and the sums are taken from W and R themselves."""
    cdef Py_ssize_t r = m.rank, n = m.n_rec, Q = m.stride, a, b, c, p
    cdef real *sums = <real *>m.column_sums
    place_eps(m, <real *>m.eps_placed + slot(m, m.t) * m.n_blocks * ROWS)
    m.counted = True
    if not m.follows:
        return
    sum_rows_by_type(m, <real *>m.w_rec, n, False)
    for a in range(r):
        matvec(scratch, <const real *>m.membership, sums + a * n, r, n)
        for b in range(r):
            m.type_sums[a * r + b] = scratch[b]
    if m.trace != TRACE_EXACT:
        return
    memset(m.trace_sums, 0, r * r * r * sizeof(double))
    sum_step(m, scratch)
    for c in range(r if m.since[0] else 0):
        sum_rows_by_type(m, <real *>m.traces + c * Q, r * Q, True)
        for a in range(r):
            matvec(scratch, <const real *>m.membership, sums + a * n, r, n)
            for b in range(r):
                m.trace_sums[(c * r + a) * r + b] = scratch[b]
