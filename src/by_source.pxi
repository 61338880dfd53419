# Weights by source.
#
# `by_source` holds what each source of s_t = [z_{t-1} | x_t | 1] sends: its weights, then its traces, by place; one type of
# units after the other.  A product with s_t is a sum over sources, and one that is silent, a relu unit at rest, is not
# read: in many networks that is half of all.  The network's own arrays, (N, N) by unit, get the weights when somebody
# asks for them (`settle`), and give them when somebody may have written there (`bring_in`).
#
# Here is what moves weights between the two, and what is read of vectors of places: `hear` the sources, `feel` what waits.
# What writes it is in writing.pxi; when, and what waits, in pending.pxi.


cdef enum:
    HEARD = 8  # sources whose weights are read at once, if not their traces too: so many streams memory can keep up with

cdef enum Classes:  # what counts for a type, or a unit, at some places
    ONE_TYPE, TWO_TYPES, BY_PLACE

# What waits, of each age: rows by place.
ctypedef struct Waiting:
    const real *of_type[2]     # (P,) whether a unit is of this type
    Py_ssize_t n_ages
    const real *local[SLOTS]   # L h
    const real *h[SLOTS]
    const real *onto[SLOTS]    # lam d, (D,): what counts for each h
    const real *eps[SLOTS]
    const real *dots           # (n_ages,) products of each eps with s_t, over the sources to which it has not been added
    const real *added          # (n_ages,) and over those of them that have its local part
    const real *front          # (P,) eps L h of the steps that these come from


cdef inline Py_ssize_t filled_lines(const Model *m) noexcept nogil:
    """Lines of places that there are units for."""
    return (m.n_rec + LANES - 1) // LANES


cdef inline Py_ssize_t end_of_part(const Model *m, Py_ssize_t line, Classes *of, Py_ssize_t *type) noexcept nogil:
    """Past the lines of places, from `line` on, that are of one type, `type`; or past four, as are worked on at once, among them one
    of two types."""
    cdef Py_ssize_t n_lines = filled_lines(m), a = 0, whole
    of[0], type[0] = ONE_TYPE, 0
    if m.type == NULL:
        of[0] = BY_PLACE
        return n_lines
    while a + 1 < m.rank and m.type_ends[a] <= line * LANES:
        a += 1
    type[0] = a
    if a + 1 == m.rank:
        return n_lines
    whole = m.type_ends[a] // LANES // 4 * 4
    if whole > line:
        return whole
    of[0] = TWO_TYPES
    return min(whole + 4, n_lines)


cdef inline Py_ssize_t tile_of(Py_ssize_t v, Py_ssize_t stop) noexcept nogil:
    """Vectors that are worked on at once: of whole lines, so that in narrow registers they are 4."""
    return 4 if v + 4 <= stop else 2 if v + 2 <= stop else 1


cdef inline vec counts_for(const real *d, Py_ssize_t type, Py_ssize_t v, const real **of_type, Classes of) noexcept nogil:
    """Of `d`, (types,) or (P,), what counts for vector v of places."""
    if of == BY_PLACE:
        return (<const vec *>d)[v]
    if of == TWO_TYPES:
        return madd((<const vec *>of_type[0])[v] * spread(d[0]), (<const vec *>of_type[1])[v], spread(d[1]))
    return spread(d[type])


# ---------------------------------------------------------------- between the network's arrays and these

cdef inline void move(real *a, real *b, bint back) noexcept nogil:
    """a = b, or b = a."""
    if back:
        b[0] = a[0]
    else:
        a[0] = b[0]


cdef inline void turn(Model *m, real *w, Py_ssize_t apart, bint placed, bint back) noexcept nogil:
    """w[q, p] = [W | W_in | b][p, q], rows `apart`: by unit, or by place; or `back`, the network's weights from these."""
    cdef Py_ssize_t p, q, at, n = m.n_rec, first = 0, last
    cdef real *row
    while first < n:  # a line's worth at a time
        last = min(first + LANES, n)
        for p in range(n):
            row, at = m.w_rec + p * n, m.place[p] if placed else p
            for q in range(first, last):
                move(w + q * apart + at, row + q, back)
        first = last
    for p in range(n):
        at = m.place[p] if placed else p
        for q in range(m.n_in):
            move(w + (n + q) * apart + at, m.w_in + p * m.n_in + q, back)
        if m.b_rec != NULL:
            move(w + (n + m.n_in) * apart + at, m.b_rec + p, back)


cdef inline Py_ssize_t between_sources(const Model *m) noexcept nogil:
    return (1 + (m.rank if m.trace == TRACE_EXACT else 0)) * m.n_places


cdef void bring_in(Model *m) noexcept nogil:
    """The weights as the network has them; nothing waits."""
    cdef Py_ssize_t q, n = m.n_rec
    for q in range(n):
        m.self_weights[q] = m.w_rec[q * n + q]
    for q in range(m.n_sources):  # places without a unit: of what has diverged they may have 0 x inf
        memset(m.by_source + q * between_sources(m) + n, 0, (m.n_places - n) * sizeof(real))
    turn(m, m.by_source, between_sources(m), True, False)
    m.turned = True


cdef void show(Model *m) noexcept nogil:
    """The network's arrays get what has been written since they were shown last."""
    if m.deferred and m.unwritten:
        turn(m, m.by_source, between_sources(m), True, True)
        m.unwritten = False


cdef void stand_still(Model *m) noexcept nogil:
    """From here to the end of a chunk, `still` is the weights, and what is learned of them lies in their place."""
    cdef real *row = m.by_source
    cdef Py_ssize_t q, P = m.n_places, apart = between_sources(m)
    for q in range(m.n_sources):
        memcpy(m.still + q * P, row, P * sizeof(real))
        memset(row, 0, P * sizeof(real))
        row += apart
    m.stands = True


cdef void go_on(Model *m, bint learn) noexcept nogil:
    """The weights where they belong, with what was learned."""
    cdef real *row = m.by_source
    cdef Py_ssize_t q, P = m.n_places, apart = between_sources(m)
    for q in range(m.n_sources if m.stands else 0):
        if not learn:
            memset(row, 0, P * sizeof(real))
        axpy(row, <real>1, m.still + q * P, P)
        row += apart
    m.stands = False


# ---------------------------------------------------------------- the product with s_t

cdef void list_by(Model *m, const real *s, Py_ssize_t rank, Py_ssize_t first) noexcept nogil:
    """Sources from `first` on that are not silent, and what they count for, and with `rank` their traces."""
    cdef real *count = m.heard_count
    cdef Py_ssize_t width = m.stride + LANES, group, q = first, end, i, a, n = 0
    cdef real c
    while q + LANES <= m.stride:
        n += pack(m.heard + n, count + n, <int>q, s + q)
        q += LANES
    for q in range(q, m.n_sources):
        m.heard[n], count[n] = <int>q, s[q]
        n += s[q] != 0
    m.n_heard, m.heard_rank, q = n, rank, 0
    for group in range(m.n_groups if rank else 0):
        end = q
        while end < n and m.heard[end] < m.bounds[group + 1]:
            end += 1
        for a in range(rank):
            c = -m.carried[group * rank + a]
            for i in range(q, end):
                count[(1 + a) * width + i] = count[i] * c
        q = end
    for q in range(n, n + HEARD - 1 if n else 0):  # the last one again, for nothing
        m.heard[q] = m.heard[n - 1]
        for a in range(1 + rank):
            count[a * width + q] = 0


cdef inline void hear_by(const Model *m, Py_ssize_t first, Py_ssize_t last, Py_ssize_t rank) noexcept nogil:
    cdef Py_ssize_t V = m.n_places // VEC_LANES, apart = V
    cdef Py_ssize_t some = HEARD if rank == 0 else TOGETHER, n = 0, i, a, v
    cdef vec *out = <vec *>m.placed
    cdef const vec *rows = <const vec *>(m.still if m.stands else m.by_source)
    cdef const vec *row[HEARD]
    cdef vec k[3 * HEARD]
    cdef vec s, t
    if m.trace == TRACE_EXACT and not m.stands:
        apart *= 1 + m.rank
    for v in range(first, last):
        out[v] = spread(0)
    while n < m.n_heard:
        for i in range(some):
            row[i] = rows + m.heard[n + i] * apart
            for a in range(1 + rank):
                k[i * (1 + rank) + a] = spread(m.heard_count[a * (m.stride + LANES) + n + i])
        for v in range(first, last):
            s, t = out[v], spread(0)
            for i in range(0, some, 2):
                for a in range(1 + rank):
                    s = madd(s, k[i * (1 + rank) + a], row[i][a * V + v])
                    t = madd(t, k[(i + 1) * (1 + rank) + a], row[i + 1][a * V + v])
            out[v] = s + t
        n += some


cdef void hear(const Model *m, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """The products of W and the traces with s_t, for some lines of places."""
    if m.heard_rank == 0:
        hear_by(m, first * PER_LINE, last * PER_LINE, 0)
    elif m.heard_rank == 1:
        hear_by(m, first * PER_LINE, last * PER_LINE, 1)
    else:
        hear_by(m, first * PER_LINE, last * PER_LINE, 2)


# ---------------------------------------------------------------- what waits

cdef inline void feel_some(vec *placed, vec *own, const Waiting *it, Py_ssize_t type, Py_ssize_t v, Py_ssize_t wide, bint traced, Classes of,
                           bint owned) noexcept nogil:
    cdef Py_ssize_t n, k
    cdef vec s[4]
    cdef vec t[4]
    cdef vec dot, add, onto, x, local
    for k in range(wide):
        s[k] = placed[v + k]
        if owned:
            t[k] = -(<const vec *>it.front)[v + k]
    for n in range(it.n_ages):
        dot = -spread(it.dots[n])
        if traced:
            add = spread(it.added[n])
            if of == ONE_TYPE:
                onto = spread(it.onto[n][type])
        for k in range(wide):
            x = local = (<const vec *>it.local[n])[v + k]
            if traced:
                s[k] = madd(s[k], add, local)
                if of != ONE_TYPE:
                    onto = counts_for(it.onto[n], type, v + k, <const real **>it.of_type, of)
                x = madd(local, onto, (<const vec *>it.h[n])[v + k])
            s[k] = madd(s[k], dot, x)
            if owned:
                t[k] = madd(t[k], x, (<const vec *>it.eps[n])[v + k])
    for k in range(wide):
        placed[v + k] = s[k]
        if owned:
            own[v + k] = t[k]


cdef inline void feel_by(vec *placed, vec *own, const Waiting *it, Py_ssize_t type, Py_ssize_t first, Py_ssize_t last, bint traced, Classes of,
                         bint owned) noexcept nogil:
    """placed -= sum_n dots[n] A[n] - added[n] local[n], and with `owned` own = sum_n A[n] eps[n] - front; A = local + onto h."""
    cdef Py_ssize_t v = first, wide
    while v < last:
        wide = tile_of(v, last)
        if wide == 4:
            feel_some(placed, own, it, type, v, 4, traced, of, owned)
        elif PER_LINE < 4 and wide == 2:
            feel_some(placed, own, it, type, v, 2, traced, of, owned)
        elif PER_LINE == 1:
            feel_some(placed, own, it, type, v, 1, traced, of, owned)
        v += wide


cdef inline void feel_part(vec *placed, vec *own, const Waiting *it, Py_ssize_t type, Py_ssize_t first, Py_ssize_t last, Classes of,
                           bint owned) noexcept nogil:
    if owned:
        feel_by(placed, own, it, type, first, last, True, of, True)
    else:
        feel_by(placed, own, it, type, first, last, True, of, False)


cdef void feel_parts(const Model *m, const Waiting *it) noexcept nogil:
    cdef vec *placed = <vec *>m.placed
    cdef vec *own = <vec *>m.own
    cdef bint owned = not m.autapses
    cdef Py_ssize_t line = 0, end, type
    cdef Classes of
    if m.trace != TRACE_EXACT:
        feel_by(placed, own, it, 0, 0, filled_lines(m) * PER_LINE, False, ONE_TYPE, False)
        return
    while line < filled_lines(m):
        end = end_of_part(m, line, &of, &type)
        if of == ONE_TYPE:
            feel_part(placed, own, it, type, line * PER_LINE, end * PER_LINE, ONE_TYPE, owned)
        elif of == TWO_TYPES:
            feel_part(placed, own, it, type, line * PER_LINE, end * PER_LINE, TWO_TYPES, owned)
        else:
            feel_part(placed, own, it, type, line * PER_LINE, end * PER_LINE, BY_PLACE, owned)
        line = end
