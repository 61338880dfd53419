# Updates of weights and traces by source, places as vectors: each is read and written once, however many steps wait.
#
# Of a source q, with M the steps since it was written, its weights and traces get  sum_n c_n eps_{t-n}[q],  n = 0 .. M, in
# two ways.  `write_together` takes the sum as it stands, for sources that share what terms count for.  `write_spared` puts
#
#     eps_{t-n} = k eps_{t-n-1} + (1-k) s_{t-n}
#
# into it, which makes it
#
#     sum_{n < M} C_n (1-k) s_{t-n}[q]  +  C_M eps_{t-M}[q]          C_n = c_n + k C_{n-1}
#
# where a source has no term of a step at which it was silent: in a relu network half of all.
#
# `write_and_hear` is for networks that the first caches hold, and for weights that have signs or a mask to keep: every step writes
# all, and while a row is at hand hears it for the next.  No term is kept, no product of terms is taken.


cdef enum:
    FEW_LINES = 16    # of places: in fewer it is quicker to add the rows of both types than to part them
    CACHED = 1 << 20  # bytes of weights and traces: more are called for before they are written,
    REMOTE = 4 << 20  # and of more, few sources are gone through at a time:
    FEW_SOURCES = 8   # as many as those that are called for meanwhile; memory keeps up with so many streams of three
    NEAR = 200 << 10  # bytes of weights alone: in `write_and_hear` more are called for
    SOON = 4          # so many sources before

# An update of some sources.
ctypedef struct Writing:
    const real *of_type[2]
    real *rows                 # (n_sources, 1 + rank, width)
    Py_ssize_t width           # P
    bint far, remote           # they are not in the caches of one core, or far too large for these: see CACHED
    const real *carry          # (rank,) what the traces count for; in `write_and_hear` the modulators of the step
    const real *K              # (rank, rank) what becomes of them
    Py_ssize_t n_terms, n_traced, n_classes, type
    const real *terms[SLOTS + 2]  # (Q,) rows: the first n_traced count for the traces, too
    const real *local[SLOTS + 2]  # (P,) what they count for
    const real *h[SLOTS]          # of those, (P,) rows; what counts for them
    const real *onto[SLOTS]       # in the weights, (D,)
    const real *drives[SLOTS]     # and in the traces, (rank, D)
    real *coef                 # scratch, see `prepare`
    bint spared                # as sums over s_t
    const real *sent[SLOTS]    # (Q,) (1-k) s_t of n steps ago
    const unsigned int *spoke  # (Q,) bit n: whether it is not 0
    real *tally                # of `write_and_hear`, see there
    real *missing              # (N,) what the weights of units from themselves were written too little
    real keep                  # k


cdef inline void prepare(vec *out, const Writing *it, Py_ssize_t v, Py_ssize_t size, Py_ssize_t rank, bint owed, bint spared,
                         Classes of) noexcept nogil:
    """What traced terms count for at some places, (n_traced, 1 + rank, size): c in the weights, and in the traces.

    With `spared` C, from that of now on, (n_traced + 1, 1 + rank, size).
    """
    cdef Py_ssize_t n, k
    cdef const vec *h
    cdef const vec *local
    cdef const real *drive
    cdef vec d = spread(0), e = d, f = d, keep = d, x
    if spared:
        keep = spread(it.keep)
        for k in range(size):
            out[k] = -(<const vec *>it.local[it.n_traced])[v + k] if owed else d
        for k in range(size, (1 + rank) * size):
            out[k] = d
        out += (1 + rank) * size
    for n in range(it.n_traced):
        h, local, drive = <const vec *>it.h[n] + v, <const vec *>it.local[n] + v, it.drives[n]
        if of == ONE_TYPE:
            d, e = spread(it.onto[n][it.type]), spread(drive[it.type])
            if rank == 2:
                f = spread(drive[it.n_classes + it.type])
        for k in range(size):
            x = h[k]
            if of != ONE_TYPE:
                e = counts_for(drive, it.type, v + k, <const real **>it.of_type, of)
                if owed:
                    d = counts_for(it.onto[n], it.type, v + k, <const real **>it.of_type, of)
                if rank == 2:
                    f = counts_for(drive + it.n_classes, it.type, v + k, <const real **>it.of_type, of)
            if owed:
                out[k] = madd(-local[k], -d, x)
            out[size + k] = e * x
            if rank == 2:
                out[2 * size + k] = f * x
        for k in range(0 if owed else size, (1 + rank) * size if spared else 0):
            out[k] = madd(out[k], keep, out[k - (1 + rank) * size])
        out += (1 + rank) * size


cdef inline void prepare_for(vec *out, const Writing *it, Py_ssize_t v, Py_ssize_t size, Py_ssize_t rank, bint owed, bint spared,
                             Classes of) noexcept nogil:
    if of == ONE_TYPE:
        prepare(out, it, v, size, rank, owed, spared, ONE_TYPE)
    elif of == TWO_TYPES:
        prepare(out, it, v, size, rank, owed, spared, TWO_TYPES)
    else:
        prepare(out, it, v, size, rank, owed, spared, BY_PLACE)


cdef inline void write_some(vec *row, const Writing *it, const vec *carry, const vec *K, const vec *coef, const vec **rest, const real *eps, Py_ssize_t v,
                            Py_ssize_t size, Py_ssize_t wide, Py_ssize_t rank, bint owed) noexcept nogil:
    """So many vectors of TOGETHER sources, one where there are traces: each is read and written once, however many terms there are."""
    cdef Py_ssize_t V = it.width // VEC_LANES, apart = (1 + rank) * V, n, i, k, at = 0
    cdef vec w[4 * TOGETHER]
    cdef vec R0[TOGETHER]
    cdef vec R1[TOGETHER]
    cdef vec a, b, c, e
    for i in range(TOGETHER):
        if it.far and (<size_t>row & 63) < sizeof(vec):
            for k in range(1 + rank):
                prefetch(row + (TOGETHER + i) * apart + k * V)
            if wide == 4:
                prefetch(row + (TOGETHER + i) * apart + 2)
        for k in range(wide):
            if owed:
                w[wide * i + k] = row[i * apart + k]
            if rank:
                a = row[i * apart + V + k]
                R0[i] = K[0] * a
                if owed:
                    w[wide * i + k] = madd(w[wide * i + k], carry[0], a)
            if rank == 2:
                b = row[i * apart + 2 * V + k]
                R0[i] = madd(R0[i], K[1], b)
                R1[i] = madd(K[2] * a, K[3], b)
                if owed:
                    w[wide * i + k] = madd(w[wide * i + k], carry[1], b)
    for n in range(it.n_traced if rank else 0):
        for k in range(wide):
            if owed:
                a = coef[k]
            b = coef[size + k]
            if rank == 2:
                c = coef[2 * size + k]
            for i in range(TOGETHER):
                e = spread(eps[at + i])
                if owed:
                    w[wide * i + k] = madd(w[wide * i + k], a, e)
                R0[i] = madd(R0[i], b, e)
                if rank == 2:
                    R1[i] = madd(R1[i], c, e)
        coef += (1 + rank) * size
        at += TOGETHER
    for n in range(it.n_traced if rank else 0, it.n_terms if owed else 0):
        for k in range(wide):
            a = rest[n][v + k]
            for i in range(TOGETHER):
                w[wide * i + k] = msub(w[wide * i + k], a, spread(eps[at + i]))
        at += TOGETHER
    for i in range(TOGETHER):
        for k in range(wide):
            if owed:
                row[i * apart + k] = w[wide * i + k]
            if rank:
                row[i * apart + V + k] = R0[i]
            if rank == 2:
                row[i * apart + 2 * V + k] = R1[i]


cdef inline void write_together(const Writing *it, Py_ssize_t first, Py_ssize_t last, Py_ssize_t v, Py_ssize_t end, Py_ssize_t rank,
                                bint owed, Classes of) noexcept nogil:
    """By stretches of places: what terms count for there stays in the first cache."""
    cdef Py_ssize_t V = it.width // VEC_LANES, stop, at, q, n
    cdef vec *coef = <vec *>it.coef
    cdef real eps[(SLOTS + 2) * TOGETHER]
    cdef const vec *rest[SLOTS + 2]
    cdef vec carry[2]
    cdef vec K[4]
    cdef vec *rows
    for n in range(rank):
        carry[n] = -spread(it.carry[n])
    for n in range(rank * rank):
        K[n] = spread(it.K[n])
    while v < end:
        stop, q = min(v + (STRETCH_WRITTEN if rank else 8) * PER_LINE, end), first
        if rank:
            prepare_for(coef, it, v, stop - v, rank, owed, False, of)
        for n in range(it.n_traced if rank else 0, it.n_terms):
            rest[n] = <const vec *>it.local[n] + v
            if it.far and not rank:  # whole rows apart, they would be in each other's way in the first cache
                memcpy(coef + n * (stop - v), rest[n], (stop - v) * sizeof(vec))
                rest[n] = coef + n * (stop - v)
        while q < last:
            rows, at = <vec *>it.rows + q * (1 + rank) * V, v
            for n in range(it.n_terms):
                memcpy(eps + n * TOGETHER, it.terms[n] + q, TOGETHER * sizeof(real))
            while rank == 0 and MANY and at + 4 <= stop:  # sixteen chains of additions
                write_some(rows + at, it, carry, K, coef, rest, eps, at - v, stop - v, 4, 0, True)
                at += 4
            while rank == 0 and at + 2 <= stop:
                write_some(rows + at, it, carry, K, coef, rest, eps, at - v, stop - v, 2, 0, True)
                at += 2
            while at < stop:  # four, twelve with two traces
                write_some(rows + at, it, carry, K, coef + at - v, rest, eps, at - v, stop - v, 1, rank, owed)
                at += 1
            q += TOGETHER
        v = stop


cdef inline void write_one(vec *row, const Writing *it, const vec *carry, const vec *K, const vec *coef, Py_ssize_t q, Py_ssize_t wide,
                           Py_ssize_t rank, bint owed) noexcept nogil:
    """So many vectors of one source, by sums over s_t."""
    cdef Py_ssize_t V = it.width // VEC_LANES, apart = (1 + rank) * wide, M = it.n_traced, n, k
    cdef unsigned int spoke = it.spoke[q] & <unsigned int>0xFFFFFFFF >> (32 - M)
    cdef vec w[4]
    cdef vec R0[4]
    cdef vec R1[4]
    cdef vec a, b, e = spread(it.terms[M - 1][q])
    cdef const vec *c = coef + M * apart
    for k in range(wide):
        for n in range(1 + rank if it.far and k % IN_64_BYTES == 0 else 0):
            prefetch(row + (FEW_SOURCES * (1 + rank) + n) * V + k)
        a = row[V + k]
        R0[k] = madd(K[0] * a, c[wide + k], e)
        if owed:
            w[k] = madd(madd(row[k], carry[0], a), c[k], e)
        if rank == 2:
            b = row[2 * V + k]
            R0[k] = madd(R0[k], K[1], b)
            R1[k] = madd(madd(K[2] * a, K[3], b), c[2 * wide + k], e)
            if owed:
                w[k] = madd(w[k], carry[1], b)
    while spoke:
        n = lowest(spoke)
        spoke &= spoke - 1
        c, e = coef + n * apart, spread(it.sent[n][q])
        for k in range(wide):
            if owed:
                w[k] = madd(w[k], c[k], e)
            R0[k] = madd(R0[k], c[wide + k], e)
            if rank == 2:
                R1[k] = madd(R1[k], c[2 * wide + k], e)
    for k in range(wide):
        if owed:
            row[k] = w[k]
        row[V + k] = R0[k]
        if rank == 2:
            row[2 * V + k] = R1[k]


cdef inline void write_tile(vec *row, const Writing *it, const vec *carry, const vec *K, const vec *coef, Py_ssize_t first, Py_ssize_t last,
                            Py_ssize_t wide, Py_ssize_t rank, bint owed) noexcept nogil:
    """So many vectors of some sources."""
    cdef Py_ssize_t q
    for q in range(first, last):
        write_one(row + q * (1 + rank) * (it.width // VEC_LANES), it, carry, K, coef, q, wide, rank, owed)


cdef inline void write_spared(const Writing *it, Py_ssize_t first, Py_ssize_t last, Py_ssize_t v, Py_ssize_t end, Py_ssize_t rank,
                              bint owed, Classes of) noexcept nogil:
    """The same, by sums over s_t.

    What terms count for at a tile of places stays in the first cache while sources are gone through: all of them; or if they are remote a few,
    and then the next tile of these, so that memory is read in stretches.  (Tile by tile of all sources it takes 1.4 times as long at 2048 units.)
    """
    cdef Py_ssize_t apart = (it.n_traced + 1) * (1 + rank), wide
    cdef Py_ssize_t tile = 2 * IN_64_BYTES if it.remote else 4, stretch = STRETCH_SPARED * IN_64_BYTES if it.remote else 4
    cdef Py_ssize_t some = FEW_SOURCES if it.remote else last - first, stop, until, at, q, n
    cdef vec *coef = <vec *>it.coef
    cdef vec *row = <vec *>it.rows
    cdef const vec *c
    cdef vec carry[2]
    cdef vec K[4]
    for n in range(rank):
        carry[n] = -spread(it.carry[n])
    for n in range(rank * rank):
        K[n] = spread(it.K[n])
    while v < end:
        stop = min(v + stretch, end)
        at = v
        while at < stop:
            wide = min(tile_of(at, stop), tile)
            prepare_for(coef + (at - v) * apart, it, at, wide, rank, owed, True, of)
            at += wide
        q = first
        while q < last:
            until, at = min(q + some, last), v
            while at < stop:
                wide, c = min(tile_of(at, stop), tile), coef + (at - v) * apart
                if wide == 4:
                    write_tile(row + at, it, carry, K, c, q, until, 4, rank, owed)
                elif PER_LINE < 4 and wide == 2:
                    write_tile(row + at, it, carry, K, c, q, until, 2, rank, owed)
                elif PER_LINE == 1:
                    write_tile(row + at, it, carry, K, c, q, until, 1, rank, owed)
                at += wide
            q = until
        v = stop


cdef inline void write_by(const Writing *it, Py_ssize_t first, Py_ssize_t last, Py_ssize_t v, Py_ssize_t end, Py_ssize_t rank,
                          bint owed, Classes of) noexcept nogil:
    if rank and it.spared:
        write_spared(it, first, last, v, end, rank, owed, of)
    else:
        write_together(it, first, last, v, end, rank, owed, of)


cdef void write(const Writing *it, Py_ssize_t first, Py_ssize_t last, Py_ssize_t v, Py_ssize_t end, Py_ssize_t rank,
                        bint owed, Classes of) noexcept nogil:
    if rank == 0:
        write_by(it, first, last, v, end, 0, True, of)
    elif rank == 1 and owed:
        write_by(it, first, last, v, end, 1, True, of)
    elif rank == 1:
        write_by(it, first, last, v, end, 1, False, of)
    elif owed:
        write_by(it, first, last, v, end, 2, True, of)
    else:
        write_by(it, first, last, v, end, 2, False, of)


# ---------------------------------------------------------------- one step, and what the next hears

cdef inline void leave_own(real *row, real *missing, real kept, Py_ssize_t P, Py_ssize_t rank) noexcept nogil:
    """No synapse is there: the weight as it was, no traces; `missing`: what it was written too little."""
    cdef Py_ssize_t a
    missing[0] = kept - row[0]
    row[0] = kept
    for a in range(1, 1 + rank):
        row[a * P] = 0


cdef inline void write_and_hear_some(vec *out, vec *row, const Writing *it, const Model *m, Py_ssize_t v, Py_ssize_t wide, Py_ssize_t n_terms,
                                     Py_ssize_t rank, bint signed, bint masked, Py_ssize_t n_types) noexcept nogil:
    """So many vectors of all sources:  R = K R + drive eps,  W -= sum_n local_n terms_n + m R,  out = W z  with z as `sent`.

    The drives are behind the `local`, and eps behind the `terms`; none of these: W stays as it is.
    `signed`: no weight crosses zero; `masked`: some do not change.  tally[b] = sums of W over the sources of type b, (n_types, P).
    """
    cdef Py_ssize_t P = it.width, V = P // VEC_LANES, n_own = 0 if m.autapses else m.n_rec, own, q, n, k
    cdef const real *z = it.sent[0]  # by names of their own: no store can touch these
    cdef const int *place = m.place
    cdef real *missing = it.missing
    cdef const real *kept = m.self_weights
    cdef const real *eps_row = it.terms[n_terms] if rank else NULL
    cdef const real *terms[3]
    cdef bint far = it.far
    cdef vec part[4 * 3]
    cdef vec term[3]
    cdef vec sum[4]
    cdef vec tally[2 * 4]
    cdef vec K[4]
    cdef vec modulator[2]
    cdef vec w, a, b, c, s, eps, sign
    cdef const vec *keep = NULL
    for n in range(n_terms):
        terms[n] = it.terms[n]
    for n in range(n_terms + rank):
        for k in range(wide):
            w = (<const vec *>it.local[n])[v + k]
            part[n * wide + k] = -w if n < n_terms else w
    for k in range(rank * rank):
        K[k] = spread(it.K[k])
    for k in range(rank if n_terms else 0):
        modulator[k] = -spread(it.carry[k])
    for k in range(wide):
        sum[k] = spread(0)
    for k in range(n_types * wide):
        tally[k] = spread(0)
    row += v
    if masked:
        keep = <const vec *>m.keep_by_source + v
    for q in range(m.n_sources):
        s = spread(z[q])
        if signed:
            sign = spread(m.sign[q]) if m.sign != NULL and q < m.n_rec else spread(0)
        for n in range(n_terms):
            term[n] = spread(terms[n][q])
        if rank:
            eps = spread(eps_row[q])
        if far:
            for k in range(wide):
                if k % IN_64_BYTES == 0:
                    for n in range(1 + rank):
                        prefetch(row + (SOON * (1 + rank) + n) * V + k)
        for k in range(wide):
            w = spread(0) if masked else row[k]
            for n in range(n_terms):
                w = madd(w, part[n * wide + k], term[n])
            if rank == 1:
                a = madd(K[0] * row[V + k], part[n_terms * wide + k], eps)
            if rank == 2:
                b, c = row[V + k], row[2 * V + k]
                a = madd(madd(K[0] * b, K[1], c), part[n_terms * wide + k], eps)
                b = madd(madd(K[2] * b, K[3], c), part[(n_terms + 1) * wide + k], eps)
                row[2 * V + k] = b
            if rank:
                row[V + k] = a
                if n_terms:
                    w = madd(w, modulator[0], a)
            if rank == 2 and n_terms:
                w = madd(w, modulator[1], b)
            if masked:
                w = madd(row[k], keep[k], w)
            if signed:
                w = keep_sign(w, sign)
            if n_terms and n_types:
                row[k] = w
            for n in range(n_types):
                tally[n * wide + k] = madd(tally[n * wide + k], w, spread(m.membership[n * m.stride + q]))
            sum[k] = madd(sum[k], w, s)
            if n_terms and not n_types:  # only now, where there are registers enough: the sum stays in its own
                row[k] = w
        own = place[q] - v * VEC_LANES if q < n_own else -1
        if 0 <= own < wide * VEC_LANES:
            leave_own(<real *>row + own, missing + q, kept[q], P, rank)
        row += (1 + rank) * V
        if masked:
            keep += V
    for k in range(wide):
        out[v + k] = sum[k]
        for n in range(n_types):
            (<vec *>it.tally)[n * V + v + k] = tally[n * wide + k]


cdef inline void write_and_hear_by(vec *out, const Writing *it, const Model *m, Py_ssize_t n_vectors, Py_ssize_t n_terms, Py_ssize_t rank,
                                   bint signed, bint masked, Py_ssize_t n_types) noexcept nogil:
    cdef vec *rows = <vec *>it.rows
    cdef Py_ssize_t v = 0, wide
    while v < n_vectors:
        wide = tile_of(v, n_vectors)
        if wide == 4:
            write_and_hear_some(out, rows, it, m, v, 4, n_terms, rank, signed, masked, n_types)
        elif PER_LINE < 4 and wide == 2:
            write_and_hear_some(out, rows, it, m, v, 2, n_terms, rank, signed, masked, n_types)
        elif PER_LINE == 1:
            write_and_hear_some(out, rows, it, m, v, 1, n_terms, rank, signed, masked, n_types)
        v += wide


cdef inline void write_and_hear_terms(vec *out, const Writing *it, const Model *m, Py_ssize_t n, Py_ssize_t rank, bint signed,
                                      bint masked) noexcept nogil:
    cdef bint types = signed and m.type != NULL
    if it.n_terms == 0 and rank == 2:
        write_and_hear_by(out, it, m, n, 0, 2, False, False, 0)
    elif it.n_terms == 0:
        write_and_hear_by(out, it, m, n, 0, 1, False, False, 0)
    elif rank == 2 and types:
        write_and_hear_by(out, it, m, n, 1, 2, signed, masked, 2)
    elif rank == 2:
        write_and_hear_by(out, it, m, n, 1, 2, signed, masked, 0)
    elif rank == 1 and types:
        write_and_hear_by(out, it, m, n, 1, 1, signed, masked, 1)
    elif rank == 1:
        write_and_hear_by(out, it, m, n, 1, 1, signed, masked, 0)
    elif signed and it.n_terms == 3:
        write_and_hear_by(out, it, m, n, 3, 0, signed, masked, 2)
    elif signed and it.n_terms == 2:
        write_and_hear_by(out, it, m, n, 2, 0, signed, masked, 1)
    else:
        write_and_hear_by(out, it, m, n, 1, 0, signed, masked, 0)


cdef void write_and_hear_by_kind(vec *out, const Writing *it, const Model *m, Py_ssize_t n_vectors, Py_ssize_t rank) noexcept nogil:
    if m.keep_by_source != NULL:
        write_and_hear_terms(out, it, m, n_vectors, rank, True, True)
    elif m.sign != NULL:
        write_and_hear_terms(out, it, m, n_vectors, rank, True, False)
    else:
        write_and_hear_terms(out, it, m, n_vectors, rank, False, False)
