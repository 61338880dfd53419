# Traces of units that stay awake, or at rest.
#
# With relu h is 0 or 1, and of most units it stays so for many steps.  Let S_t[c] be the traces of a unit of type c that was always
# awake, and D what the traces of a unit differ from those, or from none:
#
#     S_t[c] = K S_{t-1}[c] + d[c] eps_{t-1},      R_t[p] = D_t[p] + b[p] S_t[type p],      b[p] = 0 or 1.
#
# As long as h[p] = b[p], D_t = K D_{t-1}: a power of K makes it of what it was, whenever it is needed.  When h[p] turns,
# D[p] += (b[p] - h[p]) S[type p].  `traces` holds D as it was at step `held_at[p]` (-1: it is zero, whatever they hold).  Where
# units turn often traces are renewed by terms, b = 0, and S may begin from zero at any step.
#
# For trials and other sums of gradients, where K does not follow the weights, and if it decays: else S outgrows what it is taken from.
# Measured, delayed XOR at the published setting: a unit turns in one window of 25.


cdef enum:
    UNITS_A_TURN = 8  # in a window; of more turns, terms for every step at which a unit was awake are cheaper


cdef inline void power_by(Model *m, Py_ssize_t n, real *power, Py_ssize_t r) noexcept nogil:
    cdef double *factor = m.power
    cdef double *product = factor + r * r
    cdef double *other = product + r * r
    cdef Py_ssize_t i
    for i in range(r * r):
        factor[i], product[i] = m.K[i], i % (r + 1) == 0
    while n:
        if n & 1:
            multiply(other, product, factor, r)
            other, product = product, other
        n >>= 1
        multiply(other, factor, factor, r)
        other, factor = factor, other
    for i in range(r * r):
        power[i] = <real>product[i]


cdef const real *filter_over(Model *m, Py_ssize_t n_steps) noexcept nogil:
    """K^n, (r, r): from `power_K`, (SLOTS + 1, r, r), or made in its last place, by squares in double."""
    cdef real *powers = m.power_K
    cdef Py_ssize_t r = m.rank, n = min(n_steps, SLOTS)
    if n == SLOTS and r == 2:
        power_by(m, n_steps, powers + n * r * r, 2)
    elif n == SLOTS:
        power_by(m, n_steps, powers + n * r * r, r)
    return powers + n * r * r


cdef void renew_rows(Model *m, real *traces, const real *K, Py_ssize_t n_terms, real **rows, real *coef) noexcept nogil:
    """(r, Q) traces by K and so many rows; what these count for, (r, SLOTS, ROWS), in the first of ROWS."""
    cdef Py_ssize_t r = m.rank, a
    cdef int used[SLOTS]
    cdef Renewal job
    job.rank, job.stride, job.traces, job.old = r, m.stride, traces, traces if r <= 2 else m.old
    job.rows, job.used, job.n_terms, job.whole0 = rows, used, n_terms, NULL
    for a in range(n_terms):
        used[a] = <int>a
    if r > 2:
        memcpy(m.old, traces, r * m.stride * sizeof(real))
    for a in range(0, r, 2):
        job.K, job.r0, job.r1 = <real *>K + a * r, coef + a * SLOTS * ROWS, coef + (a + 1) * SLOTS * ROWS
        renew(&job, 0, m.stride // LANES, a)


cdef void shift(Model *m, Py_ssize_t place, Py_ssize_t to, Py_ssize_t ago, real by) noexcept nogil:
    """D of one unit at step `to`, plus `by` times what S of `ago` steps before has become by then."""
    cdef Py_ssize_t r = m.rank, Q = m.stride, n_terms = r if by != 0 else 0, a, c
    cdef real *traces = m.traces + place * r * Q
    cdef real *rows[SLOTS]
    cdef real coef[SLOTS * SLOTS * ROWS]
    if m.held_at[place] < 0:
        memset(traces, 0, r * Q * sizeof(real))
        m.held_at[place] = to
    if m.held_at[place] == to and by == 0:
        return
    for c in range(n_terms):
        rows[c] = m.always + (m.block_type[place // ROWS] * r + c) * Q
        for a in range(r):
            coef[(a * SLOTS + c) * ROWS] = by * m.power_K[(ago * r + a) * r + c]
    renew_rows(m, traces, filter_over(m, to - m.held_at[place]), n_terms, rows, coef)
    m.held_at[place] = to


cdef void carry_sums(Model *m, Py_ssize_t n_steps, Py_ssize_t ago, real *sums) noexcept nogil:
    """S of n_steps + ago steps ago becomes that of `ago` steps ago."""
    cdef Py_ssize_t r = m.rank, Q = m.stride, c, a, n
    cdef real *rows[SLOTS]
    cdef real coef[SLOTS * SLOTS * ROWS]
    for n in range(n_steps):
        rows[n] = m.eps + slot(m.t - ago - n - 1) * Q
    for c in range(r):
        for a in range(r):
            for n in range(n_steps):
                coef[(a * SLOTS + n) * ROWS] = m.power_drive[((n + 1) * r + a) * m.n_drive + c]
        renew_rows(m, sums + c * r * Q, m.power_K + n_steps * r * r, n_steps, rows, coef)


cdef Py_ssize_t find_turning(Model *m, Py_ssize_t n_steps) noexcept nogil:
    """Units that turned: their places, and in `turns` bit n: whether n steps ago, of the last n_steps, h was other than one step
    before, or in the first of them than b.  How many, or -1: too many turns for it to pay."""
    cdef Py_ssize_t place, n_turning = 0, left = m.n_rec // UNITS_A_TURN
    cdef unsigned long long h, turns, past = (<unsigned long long>2 << n_steps) - 2
    for place in range(m.n_places):
        h = m.awake[place]
        m.turns[place] = turns = (h ^ (h >> 1 & past >> 1 | <unsigned long long>m.based[place] << n_steps)) & past
        if turns:
            m.turning[n_turning] = place
            n_turning += 1
        while turns:
            turns &= turns - 1
            left -= 1
        if left < 0:
            return -1
    return n_turning


cdef void renew_all(Model *m, Py_ssize_t n_steps) noexcept nogil:
    """Bring all traces by the terms of the last steps; D = R, and S begins again from nothing."""
    cdef Py_ssize_t block, place, begin = m.t - n_steps
    for place in range(m.n_places):
        if m.unit[place] >= 0:
            shift(m, place, begin, 0, m.based[place] if m.always_from < begin else 0)
        m.held_at[place] = m.t
    sum_awake(m, n_steps)
    for block in range(m.n_blocks):
        renew_block(m, block, n_steps, True)
    memset(m.always, 0, m.rank * m.rank * m.stride * sizeof(real))
    m.always_from = m.t


cdef void follow_awake(Model *m, Py_ssize_t n_steps) noexcept nogil:
    """Bring S over the last steps, and D of the units that turned."""
    cdef Py_ssize_t place, i, n, ago = n_steps, n_turning
    cdef unsigned long long any = 0
    if m.always_from == m.t - n_steps:  # S is zero: D = R whatever b may be
        for place in range(m.n_places):
            m.based[place] = m.awake[place] >> n_steps & 1
    n_turning = find_turning(m, n_steps)
    if n_turning < 0:
        renew_all(m, n_steps)
        return
    for i in range(n_turning):
        any |= m.turns[m.turning[i]]
    while any:  # the earliest first
        n = ago
        while not any >> n & 1:
            n -= 1
        any ^= <unsigned long long>1 << n
        carry_sums(m, ago - n, n, m.always)
        ago = n
        for i in range(n_turning):
            place = m.turning[i]
            if m.turns[place] >> n & 1:
                shift(m, place, m.t, n, <real>(m.based[place] - <int>(m.awake[place] >> n & 1)))
                m.based[place] ^= 1
    carry_sums(m, ago, 0, m.always)


cdef Py_ssize_t lazy_terms(Model *m, Py_ssize_t block, Py_ssize_t n_terms, const real *carry) noexcept nogil:
    """Bring D of four units to the step at which the window began, and append S where it counts."""
    cdef Py_ssize_t r = m.rank, place, a, at = m.since[0]
    if not m.lazy or at == 0:
        return n_terms  # there are no traces
    for place in range(block * ROWS, block * ROWS + ROWS):
        if m.unit[place] >= 0:
            shift(m, place, at, 0, 0)
    for a in range(r if m.always_from < at else 0):
        m.terms[n_terms] = m.always + (m.block_type[block] * r + a) * m.stride
        for place in range(block * ROWS, block * ROWS + ROWS):
            m.coef[n_terms * m.n_places + place] = carry[a] * m.based[place]
        n_terms += 1
    return n_terms


cdef void bring_lazy(Model *m) noexcept nogil:
    """D of all units as of now: K is about to change."""
    cdef Py_ssize_t place
    for place in range(m.n_places if m.lazy else 0):
        if m.held_at[place] >= 0:
            shift(m, place, m.t, 0, 0)


cdef void rest_lazily(Model *m) noexcept nogil:
    """Where a trial begins."""
    cdef Py_ssize_t place
    m.lazy = m.always != NULL and not m.unstable
    m.always_from = 0
    if m.lazy:
        memset(m.always, 0, m.rank * m.rank * m.stride * sizeof(real))
    for place in range(m.n_places if m.lazy else 0):
        m.held_at[place] = -1
