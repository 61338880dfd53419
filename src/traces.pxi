# The trace convolution and the weight update.
#
# `exact`.  The traces of unit p obey  R_t[p] = K_t R_{t-1}[p] + d_t[p] h_{t-1}[p] eps_{t-1},  (r, Q) numbers a unit.
# Writing them at every step would cost more than all the rest, so a unit's traces lag behind: they stay
# as they were at a step t0, and what came since is kept as it came, as the last few h and eps (one row each
# for the whole network).  With  P(s, t) = K_t .. K_{s+1}  the traces now are
#
#     R_t[p] = P(t0, t) R_t0[p] + sum_{s in (t0, t]} P(s, t) d_s[p] h_{s-1}[p] eps_{s-1}
#
# and their product with modulators is found by carrying those back:  lam_s = m_s + K_{s+1}^T lam_{s+1},
#
#     sum_s m_s R_s[p] = (K_{t0+1}^T lam_{t0+1}) R_t0[p] + sum_s (lam_s d_s[p]) h_{s-1}[p] eps_{s-1}.
#
# Every step brings the units of one group in `window` up to date, in turn: no step is longer than another.
# A network that learns at every step sums over m_t alone and descends at once; one that adds up a gradient lets
# that lag behind as well, and both become products of matrices of rank `window`.


cdef inline Py_ssize_t slot(Model *m, Py_ssize_t t) noexcept nogil:
    return t % SLOTS


cdef void unit_rows(Model *m, Py_ssize_t block, void **rows, void *base, Py_ssize_t width, real *dummy) noexcept nogil:
    """Where the rows of the units of a block begin in a matrix of so many columns."""
    cdef Py_ssize_t i
    cdef int p
    for i in range(ROWS):
        p = m.unit[block * ROWS + i]
        rows[i] = <real *>base + p * width if p >= 0 else dummy


cdef Tile open_tile(Model *m, Py_ssize_t block, Py_ssize_t rank, const void *carry, const real *_) noexcept nogil:
    """A tile without terms; with the traces of the block, if `rank`."""
    cdef Tile tile
    tile.stride, tile.rank, tile.carry = m.stride, rank, <void *>carry
    tile.terms, tile.n_terms, tile.n_places, tile.old = m.terms, 0, m.n_blocks * ROWS, m.old
    tile.coef = <real *>m.coef + block * ROWS
    tile.traces = <real *>m.traces + block * ROWS * rank * m.stride if rank else NULL
    tile.sign = tile.sums = tile.tail = NULL
    return tile


# ---------------------------------------------------------------- the filter over a window

cdef void carry_back(Model *m, Py_ssize_t n_steps, real *lam) noexcept nogil:
    """lam_{t-n}, K^T lam_{t-n+1} (`carry`, the latter; m_t at n = 0) and lam_{t-n+1} d, for n = 0 .. n_steps."""
    cdef Py_ssize_t n, a, c, i, s, r = m.rank
    cdef real *carry = lam + SLOTS * r
    cdef real *onto = <real *>m.back_drive
    cdef const real *K
    cdef const real *d
    cdef const real *modulator
    cdef real total
    for n in range(n_steps + 1):
        s = slot(m, m.t - n)
        modulator = <const real *>m.modulator + s * r
        for a in range(r):
            lam[n * r + a] = carry[n * r + a] if n else 0
            if m.erred[s] and (n == 0 or not m.online):
                lam[n * r + a] += modulator[a]
            if n == 0:
                carry[a] = lam[a]
        if n == n_steps:
            return
        K = <const real *>m.past_K + s * r * r if m.follows else <const real *>m.K
        d = <const real *>m.past_drive + s * m.n_drive * r if m.follows else <const real *>m.drive
        for a in range(r):
            total = 0
            for c in range(r):
                total += K[c * r + a] * lam[n * r + c]
            carry[(n + 1) * r + a] = total
        for i in range(m.n_drive):
            total = 0
            for a in range(r):
                total += d[i * r + a] * lam[n * r + a]
            onto[(n + 1) * m.n_drive + i] = total


cdef void filter_powers(Model *m, Py_ssize_t n_steps, real *P) noexcept nogil:
    """P(t - n, t) and P(t - n + 1, t) d_{t-n+1} for n = 1 .. n_steps."""
    cdef Py_ssize_t n, a, b, c, i, s, r = m.rank
    cdef real *D = <real *>m.power_drive
    cdef const real *K
    cdef const real *d
    cdef real total
    for a in range(r):
        for b in range(r):
            P[a * r + b] = 1 if a == b else 0
    for n in range(1, n_steps + 1):
        s = slot(m, m.t - n + 1) if m.follows else 0
        K = <const real *>m.past_K + s * r * r if m.follows else <const real *>m.K
        d = <const real *>m.past_drive + s * m.n_drive * r if m.follows else <const real *>m.drive
        for i in range(m.n_drive):
            for a in range(r):
                total = 0
                for c in range(r):
                    total += P[((n - 1) * r + a) * r + c] * d[i * r + c]
                D[(n * r + a) * m.n_drive + i] = total
        for a in range(r):
            for b in range(r):
                total = 0
                for c in range(r):
                    total += P[((n - 1) * r + a) * r + c] * K[c * r + b]
                P[(n * r + a) * r + b] = total


# ---------------------------------------------------------------- one block of units

cdef void spread_drive(Model *m, real *out, const real *h, const real *drive, Py_ssize_t first, Py_ssize_t step) noexcept nogil:
    """out[p] = h[p] drive[class of p] for the places p of every so many blocks: one class to a block, or to a place."""
    cdef Py_ssize_t block = first, apart = 0 if m.type != NULL else 1
    cdef const real *d
    while block < m.n_blocks:
        d = drive + (m.block_type[block] if m.type != NULL else block * ROWS)
        out[block * ROWS] = h[block * ROWS] * d[0]
        out[block * ROWS + 1] = h[block * ROWS + 1] * d[apart]
        out[block * ROWS + 2] = h[block * ROWS + 2] * d[2 * apart]
        out[block * ROWS + 3] = h[block * ROWS + 3] * d[3 * apart]
        block += step


cdef Py_ssize_t gradient_terms(Model *m, Py_ssize_t n_steps, Py_ssize_t first, Py_ssize_t step, real *coef) noexcept nogil:
    """Terms and coefficients (., P) of the gradient of every so many blocks over the last steps: those of now first.

    Of n steps ago: L h where there was an error to learn from, and in `exact` what modulators carry back to it.
    A block whose traces are younger uses fewer.  Online, there is no error but that of now.
    """
    cdef Py_ssize_t P = m.n_blocks * ROWS, n, p, s
    cdef const real *local
    cdef real *c
    for n in range(n_steps + 1):
        s = slot(m, m.t - n)
        c = coef + n * P
        m.terms[n] = <real *>m.eps + s * m.stride
        if n and m.trace == TRACE_EXACT:
            spread_drive(m, c, <real *>m.h_past + s * P, <real *>m.back_drive + n * m.n_drive, first, step)
        else:
            memset(c, 0, P * sizeof(real))
        if m.erred[s] and (n == 0 or not m.online and n < n_steps):
            local = <real *>m.local + s * P
            for p in range(P):
                c[p] += local[p]
    return n_steps + 1


cdef void trace_terms(Model *m, Py_ssize_t n_steps, Py_ssize_t first, real *coef) noexcept nogil:
    """Terms and coefficients (., r, P) of what the last steps add to the traces of a group: the last one first."""
    cdef Py_ssize_t P = m.n_blocks * ROWS, n, a, s
    for n in range(1, n_steps + 1):
        s = slot(m, m.t - n)
        m.terms[n - 1] = <real *>m.eps + s * m.stride
        for a in range(m.rank):
            spread_drive(m, coef + ((n - 1) * m.rank + a) * P, <real *>m.h_past + s * P,
                         <real *>m.power_drive + (n * m.rank + a) * m.n_drive, first, m.window)


cdef void own_terms(Model *m, Py_ssize_t block, Py_ssize_t n_terms, const real *_) noexcept nogil:
    """Without self-modulation each type has its own eps + l in place of eps."""
    cdef Py_ssize_t n
    if m.self_traces != NULL:
        for n in range(n_terms):
            m.terms[n] = <real *>m.class_eps + (slot(m, m.t - n) * m.n_class + m.block_type[block]) * m.stride


cdef Py_ssize_t class_terms(Model *m, Py_ssize_t block, Py_ssize_t n_terms, const real *rows, real *coef) noexcept nogil:
    """Append the nonlocal term of the `mean` factor: the row of the type, or sum_c mu[p] V[c, p] rows[c]."""
    cdef Py_ssize_t P = m.n_blocks * ROWS, c, i
    for c in range(m.n_class):
        if m.type != NULL and c != m.block_type[block]:
            continue
        for i in range(block * ROWS, block * ROWS + ROWS):
            if m.type == NULL:
                coef[n_terms * P + i] = (<real *>m.readout)[c * P + i]
            else:
                coef[n_terms * P + i] = m.unit[i] >= 0
        m.terms[n_terms] = <void *>(rows + c * m.stride)
        n_terms += 1
    return n_terms


cdef void advance_block(Model *m, Py_ssize_t block, const real *coef) noexcept nogil:
    """Bring the traces of four units from step `since` to step t; `coef` as `trace_terms` left it."""
    cdef Py_ssize_t n_steps = m.t - m.since[block % m.window], r = m.rank
    cdef Tile tile = open_tile(m, block, r, NULL, coef)
    tile.coef, tile.n_terms = <void *>(coef + block * ROWS), n_steps
    tile.K, tile.held = <real *>m.power_K + n_steps * r * r, m.since[block % m.window] > 0
    advance(&tile, coef)


cdef void descend_tail(Model *m, Py_ssize_t p, Py_ssize_t first, const real *g, real *sums) noexcept nogil:
    """What `descend` leaves of one unit: W from column `first`, W_in and b; all of W where there is a mask."""
    cdef Py_ssize_t q, n = m.n_rec
    cdef const real *sign = <const real *>m.sign
    cdef const unsigned char *mask = m.mask + p * n if m.mask != NULL else NULL
    cdef real *w = <real *>m.w_rec + p * n
    cdef real *w_in = <real *>m.w_in + p * m.n_in
    cdef real to
    for q in range(first, n):
        to = w[q] - (g[q] if mask == NULL else g[q] * mask[q])
        if sign != NULL and sign[q] * to < 0:
            to = 0
        w[q] = to
        if sums != NULL:
            sums[q] += to
    for q in range(m.n_in):
        w_in[q] -= g[n + q]
    if m.b_rec != NULL:
        (<real *>m.b_rec)[p] -= g[n + m.n_in]


cdef void descend_block(Model *m, Py_ssize_t block, Py_ssize_t n_terms, const real *carry, Py_ssize_t rank,
                        real *sums) noexcept nogil:
    """The gradient of four units, descended at once; then their W z of the step to come, while W is at hand."""
    cdef Py_ssize_t n = m.n_rec, i
    cdef Py_ssize_t lanes = F32_LANES if real is float else F64_LANES
    cdef Py_ssize_t whole = 0 if m.mask != NULL else n - n % lanes
    cdef Tile tile = open_tile(m, block, rank, carry, sums)
    cdef real own[ROWS]
    cdef real own_sum[ROWS]
    cdef real current[ROWS]
    cdef int *unit = m.unit + block * ROWS
    cdef int k
    unit_rows(m, block, tile.out, m.w_rec, n, <real *>m.dummy)
    if n_terms or rank or sums != NULL:
        tile.n_terms, tile.sign, tile.sums, tile.tail = n_terms, m.sign, sums, m.tail
        for i in range(ROWS):
            k = max(unit[i], 0)
            own[i] = (<real *>tile.out[i])[k]
            own_sum[i] = sums[k] if sums != NULL else 0
        descend(&tile, whole, sums)
        for i in range(ROWS):
            if unit[i] >= 0:
                descend_tail(m, unit[i], whole, <real *>m.tail + i * m.stride, sums)
        if not m.autapses:
            for i in range(ROWS):
                (<real *>tile.out[i])[max(unit[i], 0)] = own[i]
            for i in range(ROWS if sums != NULL else 0):
                k = unit[i]
                if k >= 0:
                    sums[k] = own_sum[i] + (((<real *>tile.out[0])[k] + (<real *>tile.out[1])[k])
                                            + ((<real *>tile.out[2])[k] + (<real *>tile.out[3])[k]))
    dot_rows(&current[0], <real *>tile.out[0], <real *>tile.out[1], <real *>tile.out[2], <real *>tile.out[3],
             <const real *>m.pre, <real *>m.edge, n)
    for i in range(ROWS):
        if unit[i] >= 0:
            (<real *>m.current)[unit[i]] = current[i]


cdef void add_block(Model *m, Py_ssize_t block, Py_ssize_t n_terms, const real *carry, Py_ssize_t rank) noexcept nogil:
    """The gradient of four units, added to what has been accumulated."""
    cdef Tile tile = open_tile(m, block, rank, carry, <real *>m.dummy)
    if n_terms or rank:
        tile.n_terms = n_terms
        unit_rows(m, block, tile.out, m.grad, m.stride, <real *>m.dummy)
        add(&tile, carry)


# ---------------------------------------------------------------- the `mean` factor

cdef void mean_traces(Model *m, bint learn, real *G) noexcept nogil:
    """The drives of the `mean` factor differ only by class, so one (r, Q) trace per class serves all units.

    G[c] = K G[c] + d[c] (eps_{t-1} + l[c]),   class_rows[c] = sum_a m[a] G[c, a].
    l is zero but for `self_modulation` = False, where R[j, p] = G[type j, type p] + (j = p) l[type p]:
    l[b] = kept[b] l[b] - (1-k) mu[b] M[b, b] eps_{t-1},   kept[b] = k - (1-k) mu[b] M[b, b],
    and the local term becomes L[p] h[p] (eps + l[type p]): class_eps.
    """
    cdef Py_ssize_t Q = m.stride, r = m.rank, C = m.n_class, c, a, i, q
    cdef const real *eps_before = <real *>m.eps + slot(m, m.t - 1) * Q
    cdef const real *eps = <real *>m.eps + slot(m, m.t) * Q
    cdef const real *kept = <real *>m.self_drive
    cdef const real *taken = kept + C
    cdef real *l
    cdef real *own
    cdef real *rows = <real *>m.class_rows
    cdef real *dummy = <real *>m.dummy
    cdef real *coef = <real *>m.coef
    cdef Tile tile = open_tile(m, 0, r, <real *>m.modulator + slot(m, m.t) * r, dummy)
    if learn:
        memset(rows, 0, C * Q * sizeof(real))
    c = 0
    while c < C:
        tile.traces, tile.K, tile.held = G + c * r * Q, m.K, True
        tile.n_terms, tile.n_places, tile.coef = 1 + ROWS if m.self_traces != NULL else 1, ROWS, coef
        m.terms[0] = <void *>eps_before
        memset(coef, 0, tile.n_terms * r * ROWS * sizeof(real))
        for i in range(ROWS):
            if m.self_traces != NULL:
                m.terms[1 + i] = <real *>m.self_traces + (c + i) * Q if c + i < C else dummy
            for a in range(r if c + i < C else 0):
                coef[a * ROWS + i] = (<real *>m.class_drive)[(c + i) * r + a]
                if m.self_traces != NULL:
                    coef[((1 + i) * r + a) * ROWS + i] = coef[a * ROWS + i]
        advance(&tile, coef)
        if learn:
            for i in range(ROWS):
                tile.out[i] = rows + (c + i) * Q if c + i < C else dummy
            tile.n_terms = 0
            add(&tile, coef)
        c += ROWS
    if learn and not m.online:
        axpy(<real *>m.class_sums, <real>1, rows, C * Q)
        m.summed = True
    if m.self_traces != NULL:
        for c in range(C):
            l, own = <real *>m.self_traces + c * Q, <real *>m.class_eps + (slot(m, m.t) * C + c) * Q
            for q in range(Q):
                l[q] = kept[c] * l[q] - taken[c] * eps_before[q]
            for q in range(Q):
                own[q] = eps[q] + l[q]


# ---------------------------------------------------------------- steps

cdef bint any_error(Model *m, Py_ssize_t n_steps) noexcept nogil:
    cdef Py_ssize_t n
    for n in range(n_steps):
        if m.erred[slot(m, m.t - n)]:
            return True
    return False


cdef void settle_group(Model *m, Py_ssize_t group, real *coef) noexcept nogil:
    """Bring one group of blocks up to date: the gradient that it owes, then its traces."""
    cdef Py_ssize_t n_steps = m.t - m.since[group], block, n_terms
    cdef bint exact = m.trace == TRACE_EXACT
    cdef Py_ssize_t rank = m.rank if exact and m.since[group] else 0
    if not m.online and any_error(m, n_steps):
        n_terms = gradient_terms(m, n_steps, group, m.window, coef) - (not exact)
        block = group
        while block < m.n_blocks:
            own_terms(m, block, n_terms, coef)
            add_block(m, block, n_terms, <real *>m.back + (SLOTS + n_steps) * m.rank, rank)
            block += m.window
    if exact:
        trace_terms(m, n_steps, group, coef)
        block = group
        while block < m.n_blocks:
            advance_block(m, block, coef)
            block += m.window
    m.since[group] = m.t


cdef void settle(Model *m, real *coef) noexcept nogil:
    """Bring everything up to date, so that the gradient is complete and the filter may change."""
    cdef Py_ssize_t group, block, n_steps = 0
    for group in range(m.window):
        n_steps = max(n_steps, m.t - m.since[group])
    if n_steps:
        if m.trace == TRACE_EXACT:
            if m.follows:
                filter_powers(m, n_steps, <real *>m.power_K)
            if not m.online and any_error(m, n_steps):
                carry_back(m, n_steps, <real *>m.back)
        for group in range(m.window):
            if m.since[group] < m.t:
                settle_group(m, group, coef)
    if m.summed:
        for block in range(m.n_blocks):
            add_block(m, block, class_terms(m, block, 0, <real *>m.class_sums, coef), <real *>NULL, 0)
        memset(m.class_sums, 0, m.n_class * m.stride * sizeof(real))
        m.summed = False


cdef void trace_and_learn(Model *m, bint learn, const real *signal) noexcept nogil:
    """Advance the traces by one step and, with an error, learn: each matrix is passed over once."""
    cdef Py_ssize_t n = m.n_rec, r = m.rank, s = slot(m, m.t), due = m.t % m.window, block, p, n_steps, n_terms
    cdef real *local = <real *>m.local + s * m.n_blocks * ROWS
    cdef real *h_past = <real *>m.h_past + s * m.n_blocks * ROWS
    cdef real *modulator = <real *>m.modulator + s * r
    cdef real *coef = <real *>m.coef
    cdef real *sums = NULL
    cdef const real *h = <const real *>m.h
    cdef real scale = <real>m.lr if m.online else 1
    cdef bint refresh, exact = m.trace == TRACE_EXACT
    m.erred[s] = learn
    for p in range(n):
        h_past[m.place[p]] = h[p]
    if learn:
        for p in range(n):
            local[m.place[p]] = scale * signal[p] * h[p]
        if r:
            matvec(modulator, <const real *>m.u, local, r, m.n_blocks * ROWS)
    if m.follows and m.trace == TRACE_EXACT:
        memcpy(<real *>m.past_K + s * r * r, m.K, r * r * sizeof(real))
        memcpy(<real *>m.past_drive + s * m.n_drive * r, m.drive, m.n_drive * r * sizeof(real))
    if m.trace == TRACE_MEAN:
        mean_traces(m, learn, <real *>m.traces)
    n_steps = m.t - m.since[due]
    if m.trace == TRACE_EXACT:
        if m.follows:
            filter_powers(m, n_steps, <real *>m.power_K)
        if learn if m.online else any_error(m, n_steps):
            carry_back(m, n_steps, <real *>m.back)
    if not (m.online and learn):
        settle_group(m, due, coef)
        return

    m.updates += 1
    line_up(<real *>m.edge, <const real *>m.pre, n)
    refresh = m.type != NULL and m.refresh_every > 0 and m.updates % m.refresh_every == 0
    if refresh:
        memset(m.column_sums, 0, r * n * sizeof(real))
    if exact:
        trace_terms(m, n_steps, due, coef)
        block = due
        while block < m.n_blocks:
            advance_block(m, block, coef)
            block += m.window
    m.since[due] = m.t
    gradient_terms(m, n_steps if exact else 0, 0, 1, coef)
    for block in range(m.n_blocks):
        n_terms = 1
        if exact:
            n_terms += m.t - m.since[block % m.window]
        elif m.trace == TRACE_MEAN:
            own_terms(m, block, 1, coef)
            n_terms = class_terms(m, block, 1, <real *>m.class_rows, coef)
        if refresh:
            sums = <real *>m.column_sums + m.block_type[block] * n
        descend_block(m, block, n_terms, <real *>m.back + (SLOTS + n_terms - 1) * r,
                      r if exact and m.since[block % m.window] else 0, sums)
    m.ahead = True
    if refresh:
        means_from_sums(m, <real *>m.column_sums)
        derive_filter(m, <real *>m.K)
