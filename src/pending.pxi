# Online updates that are felt at once and written later, and weights by source.
#
# What a step needs of the updates before it is their product with its input s_t = [z_{t-1} | x_t | 1], and for that
# no weight has to be written.  Of a source q whose weights and traces are those of step t0, with j the steps since,
#
#     W[:, q] now  =  W[:, q]  -  c R[:, q]  -  sum_j A_j eps_j[q]          A_j = L_j h_j + (lam_j d) h_j
#
# where c (r numbers for all sources of a group) and lam d (a number for each type) sum what carry_back gives for each
# error; of step t0 itself the local part L h is in W, while R, which has come to eps_{t0-1}, leaves the other to come.
# So a step reads W and R once, adds a few products of vectors, and writes nothing of that size; every step brings
# one group of sources up to date, in turn, by one update of rank `window`.
#
# `by_source` holds what each source sends: its weights, then its traces, by place.  A source that is silent, a relu
# unit at rest, is not read: in many networks that is half of all.  The network's own arrays, (N, N) by unit, get the
# weights when somebody asks for them (`settle`), and give them when somebody may have written there (`bring_in`).
#
# It is the plain sum that makes this possible: a sign or a mask that a weight must obey at every step does not.
# The rows of the `mean` factor by types wait as their sum over the steps that a source lags behind.  The type
# means of W follow from sums over types of R, h and eps, without a look at W.
#
# In `run(chunk=)` weights stand still within a chunk: nothing that waits is felt before its end, when all is written.


cdef extern from "threads.h":
    void mpf_add(int *count, int n) noexcept nogil
    void mpf_wait(int *count, int value, bint other) noexcept nogil


cdef enum:
    CACHED = 1 << 20  # bytes

cdef enum Classes:  # what counts for a type, or a unit, at some places
    ONE_TYPE, TWO_TYPES, BY_PLACE

# What waits, of each age: rows by place.
ctypedef struct Waiting:
    const void *of_type[2]     # (P,) whether a unit is of this type
    Py_ssize_t n_ages
    const void *local[SLOTS]   # L h
    const void *h[SLOTS]
    const void *onto[SLOTS]    # lam d, (D,): what counts for each h
    const void *eps[SLOTS]
    const void *dots           # (n_ages,) products of each eps with s_t, over the sources to which it has not been added
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
    const void *local[SLOTS + 2]  # (P,) what they count for, or NULL: nothing
    const void *h[SLOTS]          # of those, (P,) rows; what counts for them
    const void *onto[SLOTS]       # in the weights, (D,), or NULL: nothing
    const void *drives[SLOTS]     # and in the traces, (rank, D)
    void *coef                 # scratch, see `prepare`


cdef inline Py_ssize_t end_of_part(const Model *m, Py_ssize_t line, Classes *of, Py_ssize_t *type) noexcept nogil:
    """Past the lines of places, from `line` on, that are of one type, `type`, or past one that is of two."""
    cdef Py_ssize_t n_lines = m.n_places // LANES, a = 0
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


# ---------------------------------------------------------------- what a step reads

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
        feel_by(placed, own, it, 0, 0, m.n_places // LANES * a_line, False, ONE_TYPE, False)
        return
    while line < m.n_places // LANES:
        end = end_of_part(m, line, &of, &type)
        if of == ONE_TYPE:
            feel_part(placed, own, it, type, line * a_line, end * a_line, ONE_TYPE, owned)
        elif of == TWO_TYPES:
            feel_part(placed, own, it, type, line * a_line, end * a_line, TWO_TYPES, owned)
        else:
            feel_part(placed, own, it, type, line * a_line, end * a_line, BY_PLACE, owned)
        line = end


cdef void dot_terms(Model *m, real *out, void **rows, Py_ssize_t n_rows) noexcept nogil:
    """out[j] = rows[j] . s_t, over (Q,) rows; space for ROWS - 1 more."""
    cdef Py_ssize_t j = 0, last = n_rows - 1
    while j < n_rows:
        dot_rows(out + j, <real *>rows[j], <real *>rows[min(j + 1, last)], <real *>rows[min(j + 2, last)], <real *>rows[min(j + 3, last)],
                 <real *>m.pre, <real *>m.edge, m.stride)
        j += ROWS


cdef void dot_added(Model *m, real *out, Py_ssize_t n_ages) noexcept nogil:
    """out[n] = eps of n steps ago . s_t, over the sources that were written at that step."""
    cdef Py_ssize_t group, n, q
    cdef const real *s = <const real *>m.pre
    cdef const real *eps
    cdef real a, b, c, d
    memset(out, 0, n_ages * sizeof(real))
    for group in range(m.n_groups):
        n = m.t - m.since[group]
        if n >= n_ages:
            continue
        eps, a, b, c, d = <const real *>m.eps_owed + slot(m, m.t - n) * m.stride, 0, 0, 0, 0
        q = m.bounds[group]
        while q < m.bounds[group + 1]:
            a, b, c, d = a + eps[q] * s[q], b + eps[q + 1] * s[q + 1], c + eps[q + 2] * s[q + 2], d + eps[q + 3] * s[q + 3]
            q += TOGETHER
        out[n] += (a + b) + (c + d)


cdef void feel(Model *m, real *placed, real *own) noexcept nogil:
    """What the last steps' errors take from the products with s_t."""
    cdef Py_ssize_t P = m.n_places, n, s, n_ages = min(m.window, m.t) + 1, a, i, first = 0
    cdef real *dots = <real *>m.eps_dots
    cdef real *added = dots + SLOTS + ROWS
    cdef Waiting it
    for n in range(n_ages):
        s = slot(m, m.t - n)
        m.terms[n] = <real *>m.eps_owed + s * m.stride
        it.local[n], it.h[n], it.eps[n] = <real *>m.local + s * P, <real *>m.h_past + s * P, <real *>m.eps_placed + s * P
        it.onto[n] = <real *>m.onto_h + s * m.n_drive
    dot_terms(m, dots, m.terms, n_ages)
    if m.trace == TRACE_EXACT:
        dot_added(m, added, n_ages)
    it.n_ages, it.dots, it.added, it.front = n_ages, dots, added, m.front
    it.of_type[0], it.of_type[1] = m.u, <real *>m.u + P
    if real is float:
        feel_vectors(<f32v *>placed, <f32v *>own, m, &it, m.trace == TRACE_EXACT and not m.autapses)
    else:
        feel_vectors(<f64v *>placed, <f64v *>own, m, &it, m.trace == TRACE_EXACT and not m.autapses)
    if m.trace != TRACE_MEAN:
        return
    for a in range(m.n_class):
        m.terms[a] = <real *>m.class_sums + a * m.stride
    dot_terms(m, dots, m.terms, m.n_class)
    for a in range(m.n_class):
        for i in range(first, m.type_ends[a]):
            placed[i] -= dots[a] * (<const real *>m.factor)[i]
        first = m.type_ends[a]


cdef void recurrent_input(Model *m, real *placed) noexcept nogil:
    """current = ([W | W_in | b] with all that waits) s_t, for the step to come: m.t is still that of the last."""
    cdef Py_ssize_t p
    cdef const real *own = <const real *>m.own
    cdef const real *z = <const real *>m.pre
    if not m.turned:
        bring_in(m, <real *>m.by_source)
    list_sources(m, z)
    share_out(m, False, 0, placed)
    if m.t < m.owed_until:
        feel(m, placed, <real *>m.own)
    from_places(m, <real *>m.current, placed)
    if m.t < m.owed_until and not m.autapses:
        from_places(m, <real *>m.input, own)
        for p in range(m.n_rec):
            (<real *>m.current)[p] += (<real *>m.input)[p] * z[p]
    m.driven = True


# ---------------------------------------------------------------- after a step

cdef void place_eps(Model *m, real *placed) noexcept nogil:
    """eps of now by place."""
    to_places(m, placed, <const real *>m.eps + slot(m, m.t) * m.stride)


cdef void defer(Model *m, Py_ssize_t n_steps, bint learn, real *carry) noexcept nogil:
    """What this step's error says of the weights is added to what waits; `n_steps`: the most that a group
    lags behind, `carry`: of `carry_back`."""
    cdef Py_ssize_t P = m.n_places, r = m.rank, s = slot(m, m.t), n, i, a, group
    cdef real *local = <real *>m.local + s * P
    cdef real *onto
    cdef real *carried
    place_eps(m, <real *>m.eps_placed + s * P)
    memcpy(<real *>m.eps_owed + s * m.stride, <real *>m.eps + s * m.stride, m.stride * sizeof(real))
    if m.trace == TRACE_EXACT:
        memset(<real *>m.onto_h + s * m.n_drive, 0, m.n_drive * sizeof(real))
    if not learn:
        memset(local, 0, P * sizeof(real))
        return
    m.owed_until, m.unwritten = m.t + m.n_groups, True
    if m.trace != TRACE_EXACT:
        for i in range(P):
            (<real *>m.own)[i] += local[i] * (<real *>m.eps_placed)[s * P + i]
        return
    for group in range(m.n_groups):
        carried = <real *>m.carried + group * r
        n = m.t - m.since[group]
        for a in range(r):
            carried[a] += carry[n * r + a]
    for n in range(1, n_steps + 1):
        onto = <real *>m.onto_h + slot(m, m.t - n) * m.n_drive
        for i in range(m.n_drive):
            onto[i] += (<const real *>m.back_drive)[n * m.n_drive + i]


cdef inline void prepare(const vec *kind, vec *out, const Writing *it, Py_ssize_t v, Py_ssize_t size, Py_ssize_t rank, bint owed, Classes of) noexcept nogil:
    """What traced terms count for at some places, (n_traced, 1 + rank, size): in the weights, and in the traces."""
    cdef Py_ssize_t apart = it.n_classes * sizeof(vec) // (F32_LANES if vec is f32v else F64_LANES), n, a, k
    cdef const vec *h
    cdef const void *drive
    cdef vec d
    for n in range(it.n_traced):
        h = <const vec *>it.h[n] + v
        if owed and it.onto[n] == NULL:
            memcpy(out, <const vec *>it.local[n] + v, size * sizeof(vec))
        elif owed:
            if of == ONE_TYPE:
                d = spread(kind, it.onto[n], it.type)
            for k in range(size):
                if of != ONE_TYPE:
                    d = counts_for(kind, it.onto[n], it.type, v + k, it.of_type, of)
                out[k] = d * h[k] if it.local[n] == NULL else madd((<const vec *>it.local[n])[v + k], d, h[k])
        for a in range(rank):
            out += size
            drive = <const char *>it.drives[n] + a * apart
            if of == ONE_TYPE:
                d = spread(kind, drive, it.type)
            for k in range(size):
                if of != ONE_TYPE:
                    d = counts_for(kind, drive, it.type, v + k, it.of_type, of)
                out[k] = d * h[k]
        out += size


cdef inline void write_some(vec *row, const Writing *it, const vec *coef, const vec **rest, const vec *eps, Py_ssize_t v, Py_ssize_t size,
                            Py_ssize_t wide, Py_ssize_t rank, bint owed) noexcept nogil:
    """So many vectors of TOGETHER sources: each is read and written once, however many terms there are."""
    cdef Py_ssize_t V = it.width // (F32_LANES if vec is f32v else F64_LANES), apart = (1 + rank) * V, n, i, k, at = 0
    cdef vec w[2 * TOGETHER]
    cdef vec R0[2 * TOGETHER]
    cdef vec R1[2 * TOGETHER]
    cdef vec a, b, c, e
    for i in range(TOGETHER):
        for k in range(1 + rank if it.far else 0):
            prefetch(row + (TOGETHER + i) * apart + k * V)
        for k in range(wide):
            if owed:
                w[2 * i + k] = row[i * apart + k]
            if rank:
                a = row[i * apart + V + k]
                R0[2 * i + k] = spread(row, it.K, 0) * a
                if owed:
                    w[2 * i + k] = madd(w[2 * i + k], -spread(row, it.carry, 0), a)
            if rank == 2:
                b = row[i * apart + 2 * V + k]
                R0[2 * i + k] = madd(R0[2 * i + k], spread(row, it.K, 1), b)
                R1[2 * i + k] = madd(spread(row, it.K, 2) * a, spread(row, it.K, 3), b)
                if owed:
                    w[2 * i + k] = madd(w[2 * i + k], -spread(row, it.carry, 1), b)
    for n in range(it.n_traced if rank else 0):
        for k in range(wide):
            if owed:
                a = -coef[k]
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
    cdef vec *rows
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
                write_some(rows + at, it, coef + at - v, rest, eps, at - v, stop - v, wide, rank, owed)
                at += wide
            if wide == 2 and at < stop:
                write_some(rows + at, it, coef + at - v, rest, eps, at - v, stop - v, 1, rank, owed)
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


cdef void write_lines(Model *m, Py_ssize_t group, Py_ssize_t first, Py_ssize_t last, real *scratch, real *coef) noexcept nogil:
    """Bring the weights and the traces of a group of sources up to date, for some lines of places."""
    cdef Py_ssize_t P = m.n_places, Q = m.stride, n_steps = m.t - m.since[group], n, a, s, line = first, end
    cdef Classes of
    cdef Py_ssize_t rank = m.rank if m.trace == TRACE_EXACT else 0, q = m.bounds[group], q_end = m.bounds[group + 1]
    cdef bint owed = m.since[group] < m.owed_until
    cdef Writing it
    it.rows, it.coef, it.width, it.n_classes, it.n_traced, it.n_terms = m.by_source, scratch, P, m.n_drive, 0, 0
    it.far = m.n_sources * between_sources(m) * sizeof(real) > CACHED
    it.carry, it.K = <real *>m.carried + group * rank, <real *>m.power_K + n_steps * rank * rank
    for n in range(1, n_steps + 1 if rank else 1):
        s = slot(m, m.t - n)
        it.terms[n - 1], it.h[n - 1] = <real *>m.eps + s * Q, <real *>m.h_past + s * P
        it.drives[n - 1], it.onto[n - 1] = <real *>m.power_drive + n * rank * m.n_drive, <real *>m.onto_h + s * m.n_drive
        it.local[n - 1] = <real *>m.local + s * P if n < n_steps else NULL
        if m.frozen:
            it.local[n - 1], it.onto[n - 1] = coef + n * P, NULL
        it.n_traced = it.n_terms = n
    for n in range(1 if rank else n_steps):  # the rest counts for the weights alone
        s = slot(m, m.t - n)
        it.terms[it.n_terms], it.local[it.n_terms] = <real *>m.eps + s * Q, coef + n * P if m.frozen else <real *>m.local + s * P
        it.n_terms += 1
    it.of_type[0], it.of_type[1] = m.u, <real *>m.u + P
    n = it.n_terms
    while line < last:
        end, it.n_terms = min(end_of_part(m, line, &of, &it.type), last), n
        for a in range(m.rank if m.trace == TRACE_MEAN else 0):
            if of == TWO_TYPES or a == it.type:
                it.terms[it.n_terms], it.local[it.n_terms] = <real *>m.class_sums + a * Q, <real *>m.factor_of + a * P
                it.n_terms += 1
        if real is float:
            write_vectors(<const f32v *>NULL, &it, q, q_end, line * (LANES // F32_LANES), end * (LANES // F32_LANES), rank, owed, of)
        else:
            write_vectors(<const f64v *>NULL, &it, q, q_end, line * (LANES // F64_LANES), end * (LANES // F64_LANES), rank, owed, of)
        line = end


cdef void write_group(Model *m, Py_ssize_t group, real *coef) noexcept nogil:
    """Bring the weights and the traces of one group of sources up to date; `coef`: if they were frozen, what eps count for in the weights."""
    cdef Py_ssize_t P = m.n_places, Q = m.stride, rank = m.rank if m.trace == TRACE_EXACT else 0, n_steps = m.t - m.since[group]
    cdef Py_ssize_t first = m.bounds[group], last = m.bounds[group + 1], units = min(last, m.n_rec), n, p, a, at, apart = (1 + rank) * P
    cdef bint owed = m.since[group] < m.owed_until
    cdef real *kept = <real *>m.input
    cdef real *rows = <real *>m.by_source
    cdef real *placed
    if m.autapses:
        units = first
    if rank or owed:
        for p in range(first, units):
            kept[p] = rows[p * apart + m.place[p]]
        share_out(m, True, group, coef)
        for p in range(first, units):  # no synapse is there
            at = p * apart + m.place[p]
            rows[at] = kept[p]
            for a in range(1, 1 + rank):
                rows[at + a * P] = 0
    for n in range(1 if rank else 0, n_steps + 1):
        memset(<real *>m.eps_owed + slot(m, m.t - n) * Q + first, 0, (last - first) * sizeof(real))
    if m.trace == TRACE_EXACT:
        memset(<real *>m.carried + group * rank, 0, rank * sizeof(real))
        for n in range(1, n_steps + 1):
            placed = <real *>m.eps_placed + slot(m, m.t - n) * P
            for p in range(first, units):
                placed[m.place[p]] = 0
        placed = <real *>m.eps_placed + slot(m, m.t) * P
        for p in range(first, units):
            at = m.place[p]
            (<real *>m.front)[at] = placed[at] * (<real *>m.local)[slot(m, m.t) * P + at]
    else:
        for p in range(first, units):
            (<real *>m.own)[m.place[p]] = 0
    for a in range(m.n_class if m.trace == TRACE_MEAN else 0):
        memset(<real *>m.class_sums + a * Q + first, 0, (last - first) * sizeof(real))
    m.since[group] = m.t


cdef void chunk_terms(Model *m, Py_ssize_t n_steps, real *coef) noexcept nogil:
    """What eps of each step of a chunk count for in the weights, (n_steps + 1, P), as `gradient_terms` has it."""
    cdef Py_ssize_t P = m.n_places, n, a, i, first, last
    cdef const real *local
    cdef const real *h
    cdef const real *onto
    for n in range(n_steps + 1):
        local, h = <const real *>m.local + slot(m, m.t - n) * P, <const real *>m.h_past + slot(m, m.t - n) * P
        onto, first = <const real *>m.back_drive + n * m.n_drive, 0
        memset(coef, 0, P * sizeof(real))
        if n < n_steps and m.erred[slot(m, m.t - n)]:
            memcpy(coef, local, P * sizeof(real))
        for a in range((m.rank if m.type != NULL else 1) if n and m.trace == TRACE_EXACT else 0):
            last = m.type_ends[a]
            for i in range(first, last):
                coef[i] += (onto[i] if m.type == NULL else onto[a]) * h[i]
            first = last
        coef += P


cdef void write_chunk(Model *m, bint learn, real *coef) noexcept nogil:
    """The end of a chunk of steps during which the weights stood still: with `learn` their update, and the traces after it."""
    cdef Py_ssize_t n_steps = m.t - m.since[0]
    if m.follows and m.trace == TRACE_EXACT:
        filter_powers(m, n_steps, <real *>m.power_K)
    if learn:
        if m.trace == TRACE_EXACT:
            carry_back(m, n_steps, <real *>m.back)
            memcpy(m.carried, <real *>m.back + (SLOTS + n_steps) * m.rank, m.rank * sizeof(real))
        chunk_terms(m, n_steps, coef)
        m.owed_until, m.unwritten = m.t, True
    write_group(m, 0, coef)


# ---------------------------------------------------------------- threads over places

cdef void take_part(Model *m, bint write, Py_ssize_t group, int place, int n, const real *_) noexcept nogil:
    """One thread's part of a piece of work: the same places every time, which its caches may still hold."""
    cdef Py_ssize_t n_lines = m.n_places // LANES, first = n_lines * place // n, last = n_lines * (place + 1) // n
    if write:
        write_lines(m, group, first, last, <real *>m.counts + place * 3 * SLOTS * STRETCH_WRITTEN * LANES, <real *>m.coef)
    else:
        hear(m, first, last, <real *>m.placed)


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


cdef void take_stock(Model *m, real *_) noexcept nogil:
    """Before updates wait again: everything is up to date, and the sums are taken from W and R themselves."""
    cdef Py_ssize_t r = m.rank, P = m.n_places, s = slot(m, m.t), c, i
    cdef real *placed = <real *>m.eps_placed + s * P
    m.counted = True
    memset(m.eps_owed, 0, SLOTS * m.stride * sizeof(real))
    memset(m.eps_placed, 0, SLOTS * P * sizeof(real))
    memset(m.own, 0, P * sizeof(real))
    place_eps(m, placed)
    if m.trace == TRACE_EXACT:  # of now, the traces have not heard yet
        memcpy(<real *>m.eps_owed + s * m.stride, <real *>m.eps + s * m.stride, m.stride * sizeof(real))
        memset(m.onto_h, 0, SLOTS * m.n_drive * sizeof(real))
        for i in range(P):
            (<real *>m.front)[i] = placed[i] * (<real *>m.local)[s * P + i]
    if not m.follows:
        return
    sum_by_source(m, m.type_sums, 0, <const real *>m.by_source)
    if m.trace != TRACE_EXACT:
        return
    sum_step(m, <real *>m.old)
    for c in range(r):
        sum_by_source(m, m.trace_sums + c * r * r, 1 + c, <const real *>m.by_source)
