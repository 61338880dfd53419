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
# Online, every step brings the units of one group in `window` up to date, in turn: no step is longer than another.
# A network that learns at every step sums over m_t alone and descends at once; one that adds up a gradient lets
# that lag behind as well, and every `window` steps brings all units up to date: products of matrices of that rank.


cdef enum:
    AWAKE_FROM = 8  # units of a group, of each type, from which the sums of `sum_awake` pay
    STRETCH = 24  # lines of a row of weights and traces


cdef Tile open_tile(Model *m, Py_ssize_t rank, const real *carry) noexcept nogil:
    """A tile without terms, of no block yet; `rank` 0: without traces."""
    cdef Tile tile
    memset(&tile, 0, sizeof(Tile))
    tile.stride, tile.rank, tile.carry = m.stride, rank, <real *>carry
    tile.terms, tile.coef, tile.n_places = m.terms, m.coef, m.n_places
    return tile


# ---------------------------------------------------------------- the filter over a window

cdef inline void carry_by(Model *m, Py_ssize_t n_steps, Py_ssize_t r) noexcept nogil:
    cdef real *lam = m.back
    cdef Py_ssize_t n, a, c, i, s
    cdef real *onto = m.back_drive
    cdef const real *K
    cdef const real *d
    cdef real total
    memset(lam, 0, r * sizeof(real))
    for n in range(n_steps + 1):
        s = slot(m.t - n)
        for a in range(r if m.erred[s] and (n == 0 or n < n_steps and not m.online) else 0):
            lam[a] += m.modulator[s * r + a]
        if n == n_steps:
            return
        K = m.past_K + s * r * r if m.follows else m.K
        d = m.past_drive + s * m.n_drive * r if m.follows else m.drive
        for a in range(r):
            total = 0
            for c in range(r):
                total += K[c * r + a] * lam[c]
            lam[r + a] = total
        for i in range(m.n_drive):
            total = 0
            for a in range(r):
                total += d[i * r + a] * lam[a]
            onto[(n + 1) * m.n_drive + i] = total
        lam += r


cdef void carry_back(Model *m, Py_ssize_t n_steps) noexcept nogil:
    """back[n] = K^T lam_{t-n+1} at n = n_steps, and online at all n >= 1; at n = 0 m_t, or 0.  back_drive[n] = lam_{t-n+1} d."""
    if m.rank == 2:  # a constant to the compiler: in small networks it shows
        carry_by(m, n_steps, 2)
    else:
        carry_by(m, n_steps, m.rank)


cdef inline void powers_by(Model *m, Py_ssize_t n_steps, Py_ssize_t r) noexcept nogil:
    cdef real *P = m.power_K
    cdef Py_ssize_t n, a, b, c, i, s
    cdef real *D = m.power_drive
    cdef const real *K
    cdef const real *d
    cdef real total
    for a in range(r):
        for b in range(r):
            P[a * r + b] = 1 if a == b else 0
    for n in range(1, n_steps + 1):
        s = slot(m.t - n + 1) if m.follows else 0
        K = m.past_K + s * r * r if m.follows else m.K
        d = m.past_drive + s * m.n_drive * r if m.follows else m.drive
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


cdef void filter_powers(Model *m, Py_ssize_t n_steps) noexcept nogil:
    """P(t - n, t) and P(t - n + 1, t) d_{t-n+1} for n = 1 .. n_steps."""
    if m.rank == 2:
        powers_by(m, n_steps, 2)
    else:
        powers_by(m, n_steps, m.rank)


cdef Py_ssize_t tap_back(Model *m) noexcept nogil:
    """onto[n] = modulator F_n for the steps n ago that there were, of at most n_taps; their number."""
    cdef Py_ssize_t n, i, a, r = m.rank, n_steps = min(m.n_taps, m.t)
    cdef real *onto = m.back_drive
    cdef const real *modulator = m.modulator + slot(m.t) * r
    cdef const real *F = m.power_drive
    for n in range(1, n_steps + 1):
        for i in range(m.n_drive):
            onto[n * m.n_drive + i] = 0
            for a in range(r):
                onto[n * m.n_drive + i] += modulator[a] * F[(n * r + a) * m.n_drive + i]
    return n_steps


# ---------------------------------------------------------------- one block of units

cdef void spread_drive(Model *m, real *out, const real *h, const real *drive) noexcept nogil:
    """out[i] = h[i] drive[class of the unit at place i]."""
    cdef Py_ssize_t a, i, first = 0
    for a in range(m.rank if m.type != NULL else 1):
        for i in range(first, m.type_ends[a]):
            out[i] = h[i] * (drive[i] if m.type == NULL else drive[a])
        first = m.type_ends[a]


cdef Py_ssize_t gradient_terms(Model *m, Py_ssize_t n_steps) noexcept nogil:
    """Terms and coefficients (., P) of the gradient over the last steps: those of now first.

    Of n steps ago: L h where there was an error to learn from, and in `exact` what modulators carry back to it.
    A block whose traces are younger uses fewer.  Online, there is no error but that of now.
    """
    cdef real *coef = m.coef
    cdef Py_ssize_t P = m.n_places, n, p, s
    cdef const real *local
    cdef real *c
    memset(coef, 0, (n_steps + 1) * P * sizeof(real))
    for n in range(n_steps + 1):
        s = slot(m.t - n)
        c = coef + n * P
        m.terms[n] = m.eps + s * m.stride
        if n and (m.trace == TRACE_EXACT or m.trace == TRACE_TAPS):
            spread_drive(m, c, m.h_past + s * P, m.back_drive + n * m.n_drive)
        if m.erred[s] and (n == 0 or not m.online and n < n_steps and m.trace != TRACE_TAPS):
            local = m.local + s * P
            for p in range(P):
                c[p] += local[p]
    return n_steps + 1


cdef void own_terms(Model *m, Py_ssize_t block, Py_ssize_t n_terms) noexcept nogil:
    """Without self-modulation each type has its own eps + l in place of eps."""
    cdef Py_ssize_t n
    if m.self_traces != NULL:
        for n in range(n_terms):
            m.terms[n] = m.class_eps + (slot(m.t - n) * m.rank + m.block_type[block]) * m.stride


cdef Py_ssize_t class_terms(Model *m, Py_ssize_t block, Py_ssize_t n_terms, const real *rows) noexcept nogil:
    """Append the nonlocal term of the `mean` factor: factor[p] rows[type p], or sum_c mu[p] V[c, p] rows[c]."""
    cdef Py_ssize_t P = m.n_places, at = block * ROWS, c
    for c in range(m.rank):
        if m.type == NULL or c == m.block_type[block]:
            memcpy(m.coef + n_terms * P + at, m.readout + c * P + at, ROWS * sizeof(real))
            m.terms[n_terms] = <real *>rows + c * m.stride
            n_terms += 1
    return n_terms


cdef void block_terms(Model *m, Py_ssize_t block, Py_ssize_t n_steps, Py_ssize_t a, real **rows, real *coef) noexcept nogil:
    """Rows of the last steps, [n] of n steps ago, and what they count for, (2, SLOTS, ROWS), in the traces of four units: of
    modulators a and a + 1."""
    cdef Py_ssize_t P = m.n_places, D = m.n_drive, r = m.rank, n, s = slot(m.t)
    cdef bint each = m.type == NULL
    cdef real *r0 = coef
    cdef real *r1 = r0 + SLOTS * ROWS
    cdef const real *h
    cdef const real *d0 = m.power_drive + a * D + (m.block_type[block] if m.type != NULL else block * ROWS)
    cdef const real *d1 = d0 + D
    for n in range(1, n_steps + 1):  # that of now is not in the traces
        s = s - 1 if s else SLOTS - 1
        d0 += r * D
        d1 += r * D
        rows[n] = m.eps + s * m.stride
        h = m.h_past + s * P + block * ROWS
        times_four(r0 + n * ROWS, h, d0, each)
        if a + 1 < r:
            times_four(r1 + n * ROWS, h, d1, each)


cdef Py_ssize_t used_terms(int *used, unsigned long long which) noexcept nogil:
    """The numbers of the bits that are set, in order; how many."""
    cdef Py_ssize_t count = 0
    while which:
        used[count] = lowest(which)
        which &= which - 1
        count += 1
    return count


cdef void sum_awake(Model *m, Py_ssize_t n_steps) noexcept nogil:
    """What the last steps add to the traces of a unit of each type that was awake throughout, if that pays.

    Where h is 0 or 1 it is the same for all such units, and most of them stay awake or at rest from step to step.
    """
    cdef real *sums = m.awake_sums
    cdef Py_ssize_t r = m.rank, Q = m.stride
    m.summed_awake = m.awake_sums != NULL and n_steps > 2 and m.n_rec >= AWAKE_FROM * r * m.n_groups
    if not m.summed_awake:
        return
    memset(sums, 0, r * r * Q * sizeof(real))
    carry_sums(m, n_steps, 0, sums)


cdef void renew_block(Model *m, Py_ssize_t block, Py_ssize_t n_steps, bint held) noexcept nogil:
    """Bring the traces of four units over the last steps.

    By stretches of columns, so that terms are still in the first cache for the next unit.  Of steps at which a unit was at
    rest, h = 0, there is nothing; those at which it was awake may have been summed (`sum_awake`).
    """
    cdef Py_ssize_t r = m.rank, Q = m.stride, n_lines = Q // LANES, i, a = 0, first, last
    cdef const int *unit = m.unit + block * ROWS
    cdef real *traces = m.traces + block * ROWS * r * Q
    cdef real coef[2 * SLOTS * ROWS]
    cdef int used[ROWS * SLOTS]
    cdef real *rows[SLOTS]
    cdef Renewal job[ROWS]
    cdef unsigned long long past = (<unsigned long long>2 << n_steps) - 2
    cdef real *whole
    if not held:
        memset(traces, 0, ROWS * r * Q * sizeof(real))
    if r > 2:  # every new one is made of all the old ones
        memcpy(m.old, traces, ROWS * r * Q * sizeof(real))
    for i in range(ROWS):
        job[i].rank, job[i].stride, job[i].traces = r, Q, traces + i * r * Q
        job[i].old = job[i].traces if r <= 2 else m.old + i * r * Q
        job[i].rows, job[i].used = rows, &used[i * SLOTS]
        job[i].r0, job[i].r1 = &coef[i], &coef[SLOTS * ROWS + i]
    while a < r:
        block_terms(m, block, n_steps, a, rows, &coef[0])
        for i in range(ROWS):
            job[i].K = m.power_K + (n_steps * r + a) * r
            job[i].n_terms = used_terms(&used[i * SLOTS], m.awake[block * ROWS + i] & past)
            job[i].whole0 = NULL
            if m.summed_awake and a + 1 < r and m.awake[block * ROWS + i] & past == past:
                whole = m.awake_sums + (m.block_type[block] * r + a) * Q
                job[i].whole0, job[i].whole1 = whole, whole + Q
        first = 0
        while first < n_lines:
            last = min(first + STRETCH, n_lines)
            for i in range(ROWS):
                if unit[i] >= 0:
                    renew(&job[i], first, last, a)
            first = last
        a += 2
    for i in range(ROWS if not m.autapses else 0):  # no synapse is there
        for a in range(r if unit[i] >= 0 else 0):
            traces[(i * r + a) * Q + unit[i]] = 0


cdef void descend_rest(Model *m, const Tile *tile, const int *unit) noexcept nogil:
    """The columns that `descend` leaves: the last ones of W, W_in and b."""
    cdef Py_ssize_t n = m.n_rec, done = n // LANES * LANES, i, q, p
    cdef const real *sign = m.sign
    cdef real *g
    cdef real *w
    cdef real *w_in
    for i in range(ROWS):
        p = unit[i]
        if p < 0:
            break
        g = tile.tail + i * (LANES + m.stride) + LANES - done  # g[q] for q >= done
        if not m.autapses and p >= done:
            g[p] = 0
        w_in = m.w_in + p * m.n_in
        for q in range(m.n_in):
            w_in[q] -= g[n + q]
        if m.b_rec != NULL:
            m.b_rec[p] -= g[n + m.n_in]
        if done:
            continue
        w = tile.out[i]
        for q in range(n):
            w[q] -= g[q] if tile.keep == NULL or tile.keep[i][q] else 0
            if sign != NULL and sign[q] * w[q] < 0:
                w[q] = 0
            if tile.sums != NULL:
                tile.sums[q] += w[q]
    if done and done < n:
        descend_last(tile)


cdef void descend_blocks(Model *m, Py_ssize_t due, Py_ssize_t n_steps, real *sums) noexcept nogil:
    """The weights descend by the gradient of this step; while a row is at hand, its W z of the step to come.

    The traces of the group that is due, `n_steps` late, are brought up to date on the way.
    """
    cdef Py_ssize_t r = m.rank, block, i, group = 0, lag = 0
    cdef bint exact = m.trace == TRACE_EXACT, held = m.since[due] > 0
    cdef int *unit
    cdef real *c
    cdef real current[ROWS]
    cdef real fix[ROWS]
    cdef Tile tile = open_tile(m, 0, NULL)
    tile.n, tile.sign, tile.z, tile.dots, tile.tail, tile.pick = m.n_rec, m.sign, m.pre, m.dots, m.tail, m.pick
    m.since[due] = m.t
    if exact:
        sum_awake(m, n_steps)
    if m.trace == TRACE_TAPS:
        lag = n_steps
    for block in range(m.n_blocks):
        if exact:
            if group == due:
                renew_block(m, block, n_steps, held)
            lag = m.t - m.since[group]
            tile.rank = r if m.since[group] else 0
            tile.traces = m.traces + block * ROWS * r * m.stride
            tile.carry = m.back + lag * r
            group = group + 1 if group + 1 < m.n_groups else 0
        unit, c = m.unit + block * ROWS, m.coef + block * ROWS
        tile.out, tile.coef, tile.n_terms = m.w_rows + block * ROWS, c, 1 + lag
        tile.own = NULL if m.autapses else unit
        if m.keep_rows != NULL:
            tile.keep = m.keep_rows + block * ROWS
        if m.trace == TRACE_MEAN:
            own_terms(m, block, 1)
            tile.n_terms = class_terms(m, block, 1, m.class_rows)
        if sums != NULL:
            tile.sums = sums + m.block_type[block] * m.stride
        if m.trace != TRACE_NONE or c[0] != 0 or c[1] != 0 or c[2] != 0 or c[3] != 0:
            descend(&tile, &fix[0])
            descend_rest(m, &tile, unit)
            finish_dots(&current[0], &tile, &fix[0], m.edge)
        else:  # four units at rest, or without an error
            dot_rows(&current[0], tile.out[0], tile.out[1], tile.out[2], tile.out[3],
                     m.pre, m.edge, m.n_rec)
        for i in range(ROWS):
            if unit[i] >= 0:
                m.current[unit[i]] = current[i]


cdef void add_block(Model *m, Py_ssize_t block, Py_ssize_t n_terms, const real *carry, Py_ssize_t rank) noexcept nogil:
    """The gradient of four units, added to what has been accumulated."""
    cdef real *rows[ROWS]
    cdef Tile tile = open_tile(m, rank, carry)
    cdef Py_ssize_t i
    cdef int p
    for i in range(ROWS):
        p = m.unit[block * ROWS + i]
        rows[i] = m.grad + p * m.stride if p >= 0 else m.dummy
    tile.out, tile.n_terms, tile.coef = rows, n_terms, m.coef + block * ROWS
    tile.traces = m.traces + block * ROWS * rank * m.stride
    add(&tile)


# ---------------------------------------------------------------- the `mean` factor

cdef inline void mean_body(Model *m, vec *G, vec *row, vec *sums, Py_ssize_t r, bint learn, bint follow) noexcept nogil:
    """See `mean_traces`; with `sums`, they get what else is `row`.

    `follow`: the sums of W over types are to follow: what the error takes from all its entries, a register's worth for each.
    """
    cdef Py_ssize_t of = IN_64_BYTES, n_lines = m.stride // LINE, n = n_lines * of, s = slot(m.t), line, j, a, b, c, at, q = 0
    cdef const vec *before = <const vec *>m.eps + slot(m.t - 1) * n
    cdef const vec *eps = <const vec *>m.eps + s * n
    cdef const vec *learned = <const vec *>m.input
    cdef const vec *own = <const vec *>m.self_traces
    cdef const vec *member = <const vec *>m.membership
    cdef const vec *factor = <const vec *>m.factor_by_unit
    cdef const real *modulator = m.modulator + s * r
    cdef const real *K = m.K
    cdef const real *drive = m.class_drive
    cdef bint autapses = m.autapses
    cdef vec *was = <vec *>m.old
    cdef vec two[2]
    cdef vec k[4]  # of up to two modulators all is at hand, where no store can touch it
    cdef vec d[4]
    cdef vec mod[2]
    cdef vec factor_sum[2]
    cdef vec sum[4 * LANES]
    cdef vec x, g, total, own_part = spread(0)
    if r <= 2:
        was = &two[0]
        for a in range(r * r):
            k[a], d[a] = spread(K[a]), spread(drive[a])
        for a in range(r):
            mod[a], factor_sum[a] = spread(modulator[a]), spread(m.factor_sums[a])
    for j in range(4 * of):
        sum[j] = spread(0)
    for line in range(n_lines):
        for j in range(of):
            if follow:
                own_part = learned[q] * eps[q]
            for c in range(r):
                x, total = before[q] if own == NULL else before[q] + own[c * n + q], spread(0)
                for a in range(r):
                    was[a] = G[(c * r + a) * n + q]
                for a in range(r):
                    g = (d[c * r + a] if r <= 2 else spread(drive[c * r + a])) * x
                    for b in range(r):
                        g = madd(g, k[a * r + b] if r <= 2 else spread(K[a * r + b]), was[b])
                    G[(c * r + a) * n + q] = g
                    if learn:
                        total = madd(total, mod[a] if r <= 2 else spread(modulator[a]), g)
                at = c * n + q
                if follow or sums != NULL:
                    sums[at] += total
                elif learn:
                    row[at] = total
                if follow:
                    g = madd(mod[c] * eps[q], factor_sum[c], total)
                    for b in range(r):
                        x = sum[(c * r + b) * of + j]
                        if autapses or b != c:
                            x = madd(x, member[b * n + q], g)
                        else:  # no synapse of a unit onto itself
                            x = msub(madd(x, member[at], g - own_part), factor[at], total)
                        sum[(c * r + b) * of + j] = x
            q += 1
    for c in range(r if follow else 0):
        for b in range(r):
            m.type_sums[c * r + b] -= fold(<real *>&sum[(c * r + b) * of])


cdef void mean_by(Model *m, vec *G, vec *row, vec *sums, bint learn, bint follow) noexcept nogil:
    if m.rank == 2 and follow:
        mean_body(m, G, row, sums, 2, True, True)
    elif m.rank == 2:
        mean_body(m, G, row, sums, 2, learn, False)
    elif m.rank == 1:
        mean_body(m, G, row, sums, 1, learn, follow)
    else:
        mean_body(m, G, row, sums, m.rank, learn, False)


cdef void mean_traces(Model *m, bint learn) noexcept nogil:
    """The drives of the `mean` factor differ only by class, so one (r, Q) trace per class serves all units.

    G[c] = K G[c] + d[c] (eps_{t-1} + l[c]),   class_rows[c] = sum_a m[a] G[c, a], or class_sums[c] += that.
    l is zero but for `self_modulation` = False, where R[j, p] = G[type j, type p] + (j = p) l[type p]:
    l[b] = kept[b] l[b] - (1-k) mu[b] M[b, b] eps_{t-1},   kept[b] = k - (1-k) mu[b] M[b, b],
    and the local term becomes L[p] h[p] (eps + l[type p]): class_eps.
    """
    cdef real *G = m.traces
    cdef Py_ssize_t Q = m.stride, r = m.rank, c, q
    cdef const real *eps_before = m.eps + slot(m.t - 1) * Q
    cdef const real *eps = m.eps + slot(m.t) * Q
    cdef const real *kept = m.self_drive
    cdef const real *taken = kept + r
    cdef real *l
    cdef real *own
    cdef real *sums = NULL
    cdef bint free = m.deferred and not constrained(m), follow = learn and free and m.online and m.follows
    if learn and (free or not m.online):
        sums, m.summed = m.class_sums, True
    mean_by(m, <vec *>G, <vec *>m.class_rows, <vec *>sums, learn, follow)
    if m.self_traces != NULL:
        for c in range(r):
            l, own = m.self_traces + c * Q, m.class_eps + (slot(m.t) * r + c) * Q
            for q in range(Q):
                l[q] = kept[c] * l[q] - taken[c] * eps_before[q]
                own[q] = eps[q] + l[q]


# ---------------------------------------------------------------- steps

cdef bint any_error(Model *m, Py_ssize_t n_steps) noexcept nogil:
    cdef Py_ssize_t n
    for n in range(n_steps):
        if m.erred[slot(m.t - n)]:
            return True
    return False


cdef void bring_group(Model *m, Py_ssize_t group, Py_ssize_t n_terms, const real *carry) noexcept nogil:
    """One group of blocks: with `n_terms` what they owe to the gradient, then their traces as of now."""
    cdef Py_ssize_t n_steps = m.t - m.since[group], block = group
    cdef bint exact = m.trace == TRACE_EXACT, held = m.since[group] > 0, renewed = exact and not m.lazy
    if renewed:
        sum_awake(m, n_steps)
    while block < m.n_blocks and (n_terms or renewed):
        if n_terms:
            own_terms(m, block, n_terms)
            add_block(m, block, lazy_terms(m, block, n_terms, carry), carry, m.rank if exact and held else 0)
        if renewed:
            renew_block(m, block, n_steps, held)
        block += m.n_groups
    if m.lazy:
        follow_awake(m, n_steps)
    m.since[group] = m.t


cdef void settle_group(Model *m, Py_ssize_t group) noexcept nogil:
    """Bring one group of blocks up to date; if a gradient is added up, there is but one."""
    cdef Py_ssize_t n_steps = m.t - m.since[group], n_terms = 0
    if not m.online and any_error(m, n_steps):
        n_terms = gradient_terms(m, n_steps) - (m.trace != TRACE_EXACT)
    bring_group(m, group, n_terms, m.back + n_steps * m.rank)


cdef void close_chunk(Model *m) noexcept nogil:
    """The gradient of the errors of the last steps, a chunk that begins at t0: exact within, the rule's beyond.

    d_t = m_t + k d_{t+1} + (1-k) h_t (W^T d_{t+1}),   m = h L,   and a = what d_{t0-1} would be without an error there:
    grad += sum_t (1-k) d_t s_t^T + a eps_{t0-1}^T + sum_c (U^T a)[c] R_{t0-1}[c].  Then the traces R follow.
    """
    cdef real *coef = m.coef
    cdef Py_ssize_t n_steps = m.t - m.since[0], P = m.n_places, n, p, at
    cdef bint owed = any_error(m, n_steps)
    cdef real leak = <real>m.leak, take = <real>(1 - m.leak)
    cdef real *d = m.input
    cdef real *back = m.current
    cdef real *modulator = m.modulator
    cdef const real *h
    cdef const real *local
    if owed:
        memset(d, 0, m.n_rec * sizeof(real))
        memset(coef, 0, (n_steps + 1) * P * sizeof(real))
        for n in range(n_steps + 1):
            h, local = m.h_past + slot(m.t - n) * P, m.local + slot(m.t - n) * P
            through_w(m, back, d)
            for p in range(m.n_rec):
                at = m.place[p]
                d[p] = leak * d[p] + h[at] * back[p]
                if n < n_steps and m.erred[slot(m.t - n)]:
                    d[p] += local[at]
                coef[n * P + at] = d[p] if n == n_steps else take * d[p]
            m.terms[n] = (m.eps if n == n_steps else m.sources) + slot(m.t - n) * m.stride
        matvec(modulator, m.u, coef + n_steps * P, m.rank, P)
    if m.follows:
        filter_powers(m, n_steps)
    bring_group(m, 0, n_steps + 1 if owed else 0, modulator)


cdef void settle(Model *m) noexcept nogil:
    """Bring everything up to date, so that the gradient is complete and the filter may change."""
    cdef Py_ssize_t group, block, n_steps = 0
    if m.sparse:
        if m.unwritten:
            scatter(m)
        return
    if m.exact_steps:
        if m.t > m.since[0]:
            close_chunk(m)
        return
    for group in range(m.n_groups):
        n_steps = max(n_steps, m.t - m.since[group])
    if m.follows and m.trace == TRACE_EXACT:
        filter_powers(m, n_steps)
    if m.deferred:
        for group in range(m.n_groups):
            if m.since[group] < m.t or m.summed:
                write_group(m, group, True)
        m.ahead = m.ahead and not m.summed  # W z was taken without them
        m.summed = False
        go_on(m, False)  # of a chunk that came to no end
        return
    if m.trace == TRACE_EXACT and not m.online and any_error(m, n_steps):
        carry_back(m, n_steps)
    for group in range(m.n_groups):
        if m.since[group] < m.t:
            settle_group(m, group)
    if m.summed:
        for block in range(m.n_blocks):
            add_block(m, block, class_terms(m, block, 0, m.class_sums), NULL, 0)
        memset(m.class_sums, 0, m.rank * m.stride * sizeof(real))
        m.summed = False


cdef void trace_and_learn(Model *m, bint learn) noexcept nogil:
    """Advance the traces by one step and, with an error, learn: each matrix is passed over once."""
    cdef const real *signal = m.signal
    cdef Py_ssize_t n = m.n_rec, r = m.rank, s = slot(m.t), due = m.t % m.n_groups if m.n_groups > 1 else 0, block, p, n_steps = 0
    cdef real *local = m.local + s * m.n_places
    cdef real *modulator = m.modulator + s * r
    cdef real *learned = m.input
    cdef const real *h = m.h
    cdef real scale = <real>m.lr if m.online or m.frozen else 1
    cdef bint refresh, exact = m.trace == TRACE_EXACT
    m.erred[s] = learn
    if m.keeps_h:
        keep_h(m)
    if learn:
        for p in range(n):
            learned[p] = scale * signal[p] * h[p]
        by_place(m, local, learned, False)
        if r:
            matvec_at_hand(modulator, m.u, local, r, m.n_places)
    if m.follows and m.trace == TRACE_EXACT:
        memcpy(m.past_K + s * r * r, m.K, r * r * sizeof(real))
        memcpy(m.past_drive + s * m.n_drive * r, m.drive, m.n_drive * r * sizeof(real))
    if m.trace == TRACE_MEAN:
        mean_traces(m, learn)
    if m.trace == TRACE_TAPS and learn:
        n_steps = tap_back(m)
    if m.trace == TRACE_TAPS and not m.online:
        if learn:
            gradient_terms(m, n_steps)
        for block in range(m.n_blocks if learn else 0):
            add_block(m, block, n_steps + 1, NULL, 0)
        m.since[0] = m.t
        return
    if not m.online:
        if m.t - m.since[0] == m.window and not m.frozen:
            settle(m)
        return
    if m.trace != TRACE_TAPS:
        n_steps = m.t - m.since[due]
    if exact and not m.sparse:
        if m.follows:
            filter_powers(m, n_steps)
        if learn and not at_once(m):
            carry_back(m, n_steps)
    m.updates += learn
    refresh = learn and m.type != NULL and m.refresh_every > 0 and (m.refresh_every == 1 or m.updates % m.refresh_every == 0)
    if m.sparse:
        packed_step(m, learn, refresh)
        return
    if m.deferred:
        defer(m, n_steps, learn)
        if m.follows and exact and not constrained(m):  # else they are taken while weights are written
            follow_sums(m, learn)
        if at_once(m):
            write_and_hear(m)
        else:
            write_group(m, due, False)
        if refresh:
            derive_filter(m, True)
        if learn and m.updates % STOCK_EVERY == 0:
            m.counted = False
        return
    m.counted = False
    if not learn:
        settle_group(m, due)
        return

    line_up(m.edge, m.pre, n)
    if refresh:
        memset(m.column_sums, 0, r * m.stride * sizeof(real))
    gradient_terms(m, n_steps if exact or m.trace == TRACE_TAPS else 0)
    descend_blocks(m, due, n_steps, m.column_sums if refresh else NULL)
    m.ahead = True
    if refresh:
        sum_columns(m)
        derive_filter(m, True)
        if m.trace == TRACE_TAPS and not m.fixed_taps:
            filter_powers(m, m.n_taps)
