# Weights by source.
#
# `by_source` holds what each source of s_t = [z_{t-1} | x_t | 1] sends: its weights, then its traces, by place; one type of
# units after the other.  A product with s_t is a sum over sources, and one that is silent, a relu unit at rest, is not
# read: in many networks that is half of all.  The network's own arrays, (N, N) by unit, get the weights when somebody
# asks for them (`settle`), and give them when somebody may have written there (`bring_in`).
#
# Here is what moves weights between the two, and what is done with vectors of places: `hear` the sources, `feel` what
# waits, `write` it.  When, and what waits, is in pending.pxi.


cdef enum:
    FEW_LINES = 16    # of places: in fewer it is quicker to add the rows of both types than to part them
    CACHED = 1 << 20  # bytes of weights and traces: more are called for before they are written

cdef enum Classes:  # what counts for a type, or a unit, at some places
    ONE_TYPE, TWO_TYPES, BY_PLACE

# What waits, of each age, and as the sums of `mean`: rows by place.
ctypedef struct Waiting:
    const void *of_type[2]     # (P,) whether a unit is of this type
    Py_ssize_t n_ages
    const void *local[SLOTS]   # L h
    const void *h[SLOTS]
    const void *onto[SLOTS]    # lam d, (D,): what counts for each h
    const void *eps[SLOTS]
    const void *dots           # (n_ages,) products of each eps (or sum) with s_t, over the sources to which it has not been added
    const void *added          # (n_ages,) and over those of them that have its local part
    const void *front          # (P,) eps L h of the steps that these come from

# An update of some sources.
ctypedef struct Writing:
    const void *of_type[2]
    void *rows                 # (n_sources, 1 + rank, width)
    Py_ssize_t width           # P
    bint far                   # they are not in the caches of one core: the next ones are called for in time
    const void *carry          # (rank,) what the traces count for
    const void *K              # (rank, rank) what becomes of them
    Py_ssize_t n_terms, n_traced, n_classes, type
    const void *terms[SLOTS + 2]  # (Q,) rows: the first n_traced count for the traces, too
    const void *local[SLOTS + 2]  # (P,) what they count for
    const void *h[SLOTS]          # of those, (P,) rows; what counts for them
    const void *onto[SLOTS]       # in the weights, (D,)
    const void *drives[SLOTS]     # and in the traces, (rank, D)
    void *coef                 # scratch, see `prepare`


cdef inline Py_ssize_t filled_lines(const Model *m) noexcept nogil:
    """Lines of places that there are units for."""
    return (m.n_rec + LANES - 1) // LANES


cdef inline Py_ssize_t end_of_part(const Model *m, Py_ssize_t line, Classes *of, Py_ssize_t *type) noexcept nogil:
    """Past the lines of places, from `line` on, that are of one type, `type`, or past one that is of two."""
    cdef Py_ssize_t n_lines = filled_lines(m), a = 0
    of[0], type[0] = ONE_TYPE, 0
    if m.type == NULL:
        of[0] = BY_PLACE
        return n_lines
    while a + 1 < m.rank and m.type_ends[a] <= line * LANES:
        a += 1
    type[0] = a
    if a + 1 == m.rank:
        return n_lines
    if m.type_ends[a] // LANES > line:
        return m.type_ends[a] // LANES
    of[0] = TWO_TYPES
    return line + 1


cdef inline vec counts_for(const vec *kind, const void *d, Py_ssize_t type, Py_ssize_t v, const void **of_type, Classes of) noexcept nogil:
    """Of `d`, (types,) or (P,), what counts for vector v of places."""
    if of == BY_PLACE:
        return (<const vec *>d)[v]
    if of == TWO_TYPES:
        return madd((<const vec *>of_type[0])[v] * spread(kind, d, 0), (<const vec *>of_type[1])[v], spread(kind, d, 1))
    return spread(kind, d, type)


# ---------------------------------------------------------------- between the network's arrays and these

cdef void turn_weights(Model *m, real *w, Py_ssize_t apart, bint placed) noexcept nogil:
    """w[q, p] = [W | W_in | b][p, q], rows `apart`: by unit, or by place."""
    cdef Py_ssize_t p, q, at, n = m.n_rec, first = 0, last
    cdef const real *row
    while first < n:  # a line's worth at a time
        last = min(first + LANES, n)
        for p in range(n):
            row, at = <const real *>m.w_rec + p * n, m.place[p] if placed else p
            for q in range(first, last):
                w[q * apart + at] = row[q]
        first = last
    for p in range(n):
        at = m.place[p] if placed else p
        for q in range(m.n_in):
            w[(n + q) * apart + at] = (<const real *>m.w_in)[p * m.n_in + q]
        if m.b_rec != NULL:
            w[(n + m.n_in) * apart + at] = (<const real *>m.b_rec)[p]


cdef void turn_back(Model *m, const real *w, Py_ssize_t apart) noexcept nogil:
    """The network's weights from those by source and place."""
    cdef Py_ssize_t p, q, at, n = m.n_rec, first = 0, last
    cdef real *row
    while first < n:
        last = min(first + LANES, n)
        for p in range(n):
            row, at = <real *>m.w_rec + p * n, m.place[p]
            for q in range(first, last):
                row[q] = w[q * apart + at]
        first = last
    for p in range(n):
        for q in range(m.n_in):
            (<real *>m.w_in)[p * m.n_in + q] = w[(n + q) * apart + m.place[p]]
        if m.b_rec != NULL:
            (<real *>m.b_rec)[p] = w[(n + m.n_in) * apart + m.place[p]]


cdef inline Py_ssize_t between_sources(const Model *m) noexcept nogil:
    return (1 + (m.rank if m.trace == TRACE_EXACT else 0)) * m.n_places


cdef void bring_in(Model *m, real *by_source) noexcept nogil:
    """The weights as the network has them; nothing waits."""
    turn_weights(m, by_source, between_sources(m), True)
    m.turned = True


cdef void show(Model *m, const real *by_source) noexcept nogil:
    """The network's arrays get what has been written since they were shown last."""
    if m.deferred and m.unwritten:
        turn_back(m, by_source, between_sources(m))
        m.unwritten = False


# ---------------------------------------------------------------- the product with s_t

cdef inline void list_by(Model *m, const real *s, real *count, Py_ssize_t rank) noexcept nogil:
    cdef Py_ssize_t group, q, a, n = 0
    cdef real c[2]
    cdef real x
    for group in range(m.n_groups):
        for a in range(rank):
            c[a] = -(<const real *>m.carried)[group * rank + a]
        for q in range(m.bounds[group], min(m.bounds[group + 1], m.n_sources)):
            x = s[q]
            m.heard[n], count[n * (1 + rank)] = <int>q, x
            for a in range(rank):
                count[n * (1 + rank) + 1 + a] = x * c[a]
            n += x != 0  # half of the time, as in a relu network: not for a branch
    m.n_heard, m.heard_rank = n, rank
    for q in range(n, n + TOGETHER - 1 if n else 0):  # the last one again, for nothing
        m.heard[q] = m.heard[n - 1]
        for a in range(1 + rank):
            count[q * (1 + rank) + a] = 0


cdef void list_sources(Model *m, const real *s) noexcept nogil:
    """Which sources are not silent, and what they and their traces count for: s, -s c."""
    if m.trace != TRACE_EXACT or m.t >= m.owed_until:
        list_by(m, s, <real *>m.heard_count, 0)
    elif m.rank == 1:
        list_by(m, s, <real *>m.heard_count, 1)
    else:
        list_by(m, s, <real *>m.heard_count, 2)


cdef inline void hear_by(vec *out, const Model *m, Py_ssize_t first, Py_ssize_t last, Py_ssize_t rank) noexcept nogil:
    cdef Py_ssize_t V = m.n_places // (F32_LANES if vec is f32v else F64_LANES), apart = V
    cdef Py_ssize_t n = 0, i, v, n_heard = m.n_heard
    cdef const vec *rows = <const vec *>m.by_source
    cdef const vec *a
    cdef const vec *b
    cdef const vec *c
    cdef const vec *d
    cdef vec k[3 * TOGETHER]
    cdef vec s, t
    if m.trace == TRACE_EXACT:
        apart *= 1 + m.rank
    for v in range(first, last):
        out[v] = spread(out, &ZERO, 0)
    while n < n_heard:
        a, b, c, d = rows + m.heard[n] * apart, rows + m.heard[n + 1] * apart, rows + m.heard[n + 2] * apart, rows + m.heard[n + 3] * apart
        for i in range((1 + rank) * TOGETHER):
            k[i] = spread(out, m.heard_count, n * (1 + rank) + i)
        for v in range(first, last):
            s = madd(out[v], k[0], a[v])
            t = k[1 + rank] * b[v]
            s = madd(s, k[2 * (1 + rank)], c[v])
            t = madd(t, k[3 * (1 + rank)], d[v])
            for i in range(1, 1 + rank):
                s = madd(s, k[i], a[i * V + v])
                t = madd(t, k[1 + rank + i], b[i * V + v])
                s = madd(s, k[2 * (1 + rank) + i], c[i * V + v])
                t = madd(t, k[3 * (1 + rank) + i], d[i * V + v])
            out[v] = s + t
        n += TOGETHER


cdef void hear_vectors(vec *out, const Model *m, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Py_ssize_t of = per_line(out)
    if m.heard_rank == 0:
        hear_by(out, m, first * of, last * of, 0)
    elif m.heard_rank == 1:
        hear_by(out, m, first * of, last * of, 1)
    else:
        hear_by(out, m, first * of, last * of, 2)


cdef void hear(Model *m, Py_ssize_t first, Py_ssize_t last, real *placed) noexcept nogil:
    """The products of W and the traces with s_t, for some lines of places."""
    if real is float:
        hear_vectors(<f32v *>placed, m, first, last)
    else:
        hear_vectors(<f64v *>placed, m, first, last)


# ---------------------------------------------------------------- what waits, felt and written

cdef inline void feel_by(vec *placed, vec *own, const Waiting *it, Py_ssize_t type, Py_ssize_t first, Py_ssize_t last, bint traced, Classes of,
                         bint owned) noexcept nogil:
    """placed -= sum_n dots[n] A[n] - added[n] local[n], and with `owned` own = sum_n A[n] eps[n] - front; A = local + onto h."""
    cdef Py_ssize_t a_line = per_line(placed), v = first, n, k
    cdef vec s[LANES]
    cdef vec t[LANES]
    cdef vec dot, add, onto, x, local
    while v < last:
        for k in range(a_line):
            s[k] = placed[v + k]
            if owned:
                t[k] = -(<const vec *>it.front)[v + k]
        for n in range(it.n_ages):
            dot = -spread(placed, it.dots, n)
            if traced:
                add = spread(placed, it.added, n)
                if of == ONE_TYPE:
                    onto = spread(placed, it.onto[n], type)
            for k in range(a_line):
                x = local = (<const vec *>it.local[n])[v + k]
                if traced:
                    s[k] = madd(s[k], add, local)
                    if of != ONE_TYPE:
                        onto = counts_for(placed, it.onto[n], type, v + k, it.of_type, of)
                    x = madd(local, onto, (<const vec *>it.h[n])[v + k])
                s[k] = madd(s[k], dot, x)
                if owned:
                    t[k] = madd(t[k], x, (<const vec *>it.eps[n])[v + k])
        for k in range(a_line):
            placed[v + k] = s[k]
            if owned:
                own[v + k] = t[k]
        v += a_line


cdef inline void feel_part(vec *placed, vec *own, const Waiting *it, Py_ssize_t type, Py_ssize_t first, Py_ssize_t last, Classes of,
                           bint owned) noexcept nogil:
    if owned:
        feel_by(placed, own, it, type, first, last, True, of, True)
    else:
        feel_by(placed, own, it, type, first, last, True, of, False)


cdef void feel_vectors(vec *placed, vec *own, const Model *m, const Waiting *it, bint owned) noexcept nogil:
    cdef Py_ssize_t a_line = per_line(placed), line = 0, end, type
    cdef Classes of
    if m.trace != TRACE_EXACT:
        feel_by(placed, own, it, 0, 0, filled_lines(m) * a_line, False, ONE_TYPE, False)
        return
    while line < filled_lines(m):
        end = end_of_part(m, line, &of, &type)
        if of == ONE_TYPE:
            feel_part(placed, own, it, type, line * a_line, end * a_line, ONE_TYPE, owned)
        elif of == TWO_TYPES:
            feel_part(placed, own, it, type, line * a_line, end * a_line, TWO_TYPES, owned)
        else:
            feel_part(placed, own, it, type, line * a_line, end * a_line, BY_PLACE, owned)
        line = end


cdef inline void prepare(const vec *kind, vec *out, const Writing *it, Py_ssize_t v, Py_ssize_t size, Py_ssize_t rank, bint owed, Classes of) noexcept nogil:
    """What traced terms count for at some places, (n_traced, 1 + rank, size): in the weights, and in the traces."""
    cdef Py_ssize_t apart = it.n_classes * sizeof(vec) // (F32_LANES if vec is f32v else F64_LANES), n, k
    cdef const vec *h
    cdef const vec *local
    cdef const void *drive
    cdef vec d = spread(kind, &ZERO, 0), e = d, f = d, x
    for n in range(it.n_traced):
        h, local, drive = <const vec *>it.h[n] + v, <const vec *>it.local[n] + v, it.drives[n]
        if of == ONE_TYPE:
            d, e = spread(kind, it.onto[n], it.type), spread(kind, drive, it.type)
            if rank == 2:
                f = spread(kind, <const char *>drive + apart, it.type)
        for k in range(size):
            x = h[k]
            if of != ONE_TYPE:
                e = counts_for(kind, drive, it.type, v + k, it.of_type, of)
                if owed:
                    d = counts_for(kind, it.onto[n], it.type, v + k, it.of_type, of)
                if rank == 2:
                    f = counts_for(kind, <const char *>drive + apart, it.type, v + k, it.of_type, of)
            if owed:
                out[k] = madd(-local[k], -d, x)
            out[size + k] = e * x
            if rank == 2:
                out[2 * size + k] = f * x
        out += (1 + rank) * size


cdef inline void write_some(vec *row, const Writing *it, const vec *carry, const vec *K, const vec *coef, const vec **rest, const vec *eps, Py_ssize_t v,
                            Py_ssize_t size, Py_ssize_t wide, Py_ssize_t rank, bint owed) noexcept nogil:
    """So many vectors of TOGETHER sources: each is read and written once, however many terms there are."""
    cdef Py_ssize_t V = it.width // (F32_LANES if vec is f32v else F64_LANES), apart = (1 + rank) * V, n, i, k, at = 0
    cdef vec w[2 * TOGETHER]
    cdef vec R0[2 * TOGETHER]
    cdef vec R1[2 * TOGETHER]
    cdef vec a, b, c, e
    for i in range(TOGETHER):
        for k in range(1 + rank if it.far and (<size_t>row & 63) < sizeof(vec) else 0):
            prefetch(row + (TOGETHER + i) * apart + k * V)
        for k in range(wide):
            if owed:
                w[2 * i + k] = row[i * apart + k]
            if rank:
                a = row[i * apart + V + k]
                R0[2 * i + k] = K[0] * a
                if owed:
                    w[2 * i + k] = madd(w[2 * i + k], carry[0], a)
            if rank == 2:
                b = row[i * apart + 2 * V + k]
                R0[2 * i + k] = madd(R0[2 * i + k], K[1], b)
                R1[2 * i + k] = madd(K[2] * a, K[3], b)
                if owed:
                    w[2 * i + k] = madd(w[2 * i + k], carry[1], b)
    for n in range(it.n_traced if rank else 0):
        for k in range(wide):
            if owed:
                a = coef[k]
            b = coef[size + k]
            if rank == 2:
                c = coef[2 * size + k]
            for i in range(TOGETHER):
                e = spread(row, eps, at + i)
                if owed:
                    w[2 * i + k] = madd(w[2 * i + k], a, e)
                R0[2 * i + k] = madd(R0[2 * i + k], b, e)
                if rank == 2:
                    R1[2 * i + k] = madd(R1[2 * i + k], c, e)
        coef += (1 + rank) * size
        at += TOGETHER
    for n in range(it.n_traced if rank else 0, it.n_terms if owed else 0):
        for k in range(wide):
            a = -rest[n][v + k]
            for i in range(TOGETHER):
                w[2 * i + k] = madd(w[2 * i + k], a, spread(row, eps, at + i))
        at += TOGETHER
    for i in range(TOGETHER):
        for k in range(wide):
            if owed:
                row[i * apart + k] = w[2 * i + k]
            if rank:
                row[i * apart + V + k] = R0[2 * i + k]
            if rank == 2:
                row[i * apart + 2 * V + k] = R1[2 * i + k]


cdef inline void write_by(const vec *kind, const Writing *it, Py_ssize_t first, Py_ssize_t last, Py_ssize_t v, Py_ssize_t end, Py_ssize_t rank,
                          bint owed, Classes of) noexcept nogil:
    """By stretches of places: what terms count for there stays in the first cache."""
    cdef Py_ssize_t lanes = F32_LANES if vec is f32v else F64_LANES, V = it.width // lanes, size = sizeof(vec) // lanes
    cdef Py_ssize_t wide = 1 if rank else 2, stop, at, q, n  # eight chains of additions, twelve with two traces
    cdef vec *coef = <vec *>it.coef
    cdef vec eps[(SLOTS + 2) * TOGETHER]
    cdef const vec *rest[SLOTS + 2]
    cdef vec carry[2]
    cdef vec K[4]
    cdef vec *rows
    for n in range(rank):
        carry[n] = -spread(kind, it.carry, n)
    for n in range(rank * rank):
        K[n] = spread(kind, it.K, n)
    while v < end:
        stop, q = min(v + STRETCH_WRITTEN * per_line(kind), end), first
        if rank and of == ONE_TYPE:
            prepare(kind, coef, it, v, stop - v, rank, owed, ONE_TYPE)
        elif rank and of == TWO_TYPES:
            prepare(kind, coef, it, v, stop - v, rank, owed, TWO_TYPES)
        elif rank:
            prepare(kind, coef, it, v, stop - v, rank, owed, BY_PLACE)
        for n in range(it.n_traced if rank else 0, it.n_terms):
            rest[n] = <const vec *>it.local[n] + v
            if it.far and not rank:  # whole rows apart, they would be in each other's way in the first cache
                memcpy(coef + n * (stop - v), rest[n], (stop - v) * sizeof(vec))
                rest[n] = coef + n * (stop - v)
        while q < last:
            rows, at = <vec *>it.rows + q * (1 + rank) * V, v
            for n in range(it.n_terms):
                memcpy(<char *>&eps[0] + n * TOGETHER * size, <const char *>it.terms[n] + q * size, TOGETHER * size)
            while at + wide <= stop:
                write_some(rows + at, it, carry, K, coef + at - v, rest, eps, at - v, stop - v, wide, rank, owed)
                at += wide
            if wide == 2 and at < stop:
                write_some(rows + at, it, carry, K, coef + at - v, rest, eps, at - v, stop - v, 1, rank, owed)
            q += TOGETHER
        v = stop


cdef void write_vectors(const vec *kind, const Writing *it, Py_ssize_t first, Py_ssize_t last, Py_ssize_t v, Py_ssize_t end, Py_ssize_t rank,
                        bint owed, Classes of) noexcept nogil:
    if rank == 0:
        write_by(kind, it, first, last, v, end, 0, True, of)
    elif rank == 1 and owed:
        write_by(kind, it, first, last, v, end, 1, True, of)
    elif rank == 1:
        write_by(kind, it, first, last, v, end, 1, False, of)
    elif owed:
        write_by(kind, it, first, last, v, end, 2, True, of)
    else:
        write_by(kind, it, first, last, v, end, 2, False, of)
