# Online steps of a network of which few connections may exist: the cost is theirs, not that of N x N.
#
# Of each unit the engine keeps what may exist, packed: its recurrent synapses, by type of pre and then in order, its
# inputs and its bias, filled up to whole lines of 64 bytes by sources that do not exist.  `columns` says where in
# [z | x | 1] each comes from, `packed` is its weight, `packed_traces` its r traces, and all are passed over once a step:
#
#     R = K R + (1-k) V h_{t-1} eps_{t-1}        w -= L h eps + m R        W z of the step to come
#
# What is read of a source, [z | eps | term | sign], lies together in `table`: one line of memory serves a synapse.
# `settle` writes the packed weights into the network's own arrays, and `gather` takes them from there.

cdef extern from *:
    """
    /* Lines of the table, as many as numbers in 16 bytes, into columns, by shuffles of registers. */
    #if defined(__has_builtin)
      #if __has_builtin(__builtin_shufflevector)
        #define MPF_SHUFFLE __builtin_shufflevector
      #endif
    #endif
    static inline void mpf_columns(mpf_real *z, mpf_real *eps, mpf_real *term, mpf_real *sign, const mpf_real *table, const int *q) {
    #if !defined(MPF_SHUFFLE) || defined(MPF_PLAIN)
        for (int i = 0; i < (int)(16 / sizeof(mpf_real)); i++)
            z[i] = table[4 * q[i]], eps[i] = table[4 * q[i] + 1], term[i] = table[4 * q[i] + 2], sign[i] = table[4 * q[i] + 3];
    #elif MPF_BITS == 32
        mpf_16 a = *(mpf_16 *)(table + 4 * q[0]), b = *(mpf_16 *)(table + 4 * q[1]);
        mpf_16 c = *(mpf_16 *)(table + 4 * q[2]), d = *(mpf_16 *)(table + 4 * q[3]);
        mpf_16 ab = MPF_SHUFFLE(a, b, 0, 4, 1, 5), cd = MPF_SHUFFLE(c, d, 0, 4, 1, 5);
        *(mpf_16 *)z = MPF_SHUFFLE(ab, cd, 0, 1, 4, 5);
        *(mpf_16 *)eps = MPF_SHUFFLE(ab, cd, 2, 3, 6, 7);
        ab = MPF_SHUFFLE(a, b, 2, 6, 3, 7), cd = MPF_SHUFFLE(c, d, 2, 6, 3, 7);
        *(mpf_16 *)term = MPF_SHUFFLE(ab, cd, 0, 1, 4, 5);
        *(mpf_16 *)sign = MPF_SHUFFLE(ab, cd, 2, 3, 6, 7);
    #else
        const mpf_16 *a = (mpf_16 *)(table + 4 * q[0]), *b = (mpf_16 *)(table + 4 * q[1]);
        *(mpf_16 *)z = MPF_SHUFFLE(a[0], b[0], 0, 2);
        *(mpf_16 *)eps = MPF_SHUFFLE(a[0], b[0], 1, 3);
        *(mpf_16 *)term = MPF_SHUFFLE(a[1], b[1], 0, 2);
        *(mpf_16 *)sign = MPF_SHUFFLE(a[1], b[1], 1, 3);
    #endif
    }
    """
    void take_some "mpf_columns" (real *z, real *eps, real *term, real *sign, const real *table, const int *q) noexcept nogil


ctypedef struct Row:
    Py_ssize_t n           # numbers, whole lines
    real *w                # (n,)
    real *traces           # (r, n), `apart` numbers from one modulator to the next
    Py_ssize_t apart
    real *gathered         # (4, n), `width` numbers apart: z, eps, term, sign
    Py_ssize_t width
    real local             # L h
    real factor            # of the term
    const real *K          # (r, r), and (r,) the two below
    const real *kick       # (1-k) V h_{t-1}
    const real *carry      # m
    real *old              # scratch, if r > 2
    real *sums             # (r, 64 bytes), with `stops` (r,) and `pick`: see `add_types`; or NULL
    const int *stops
    const real *pick


cdef void fill_table(Model *m, Py_ssize_t c) noexcept nogil:
    """What a synapse onto a unit of type c reads of each source."""
    cdef real *table = m.table
    cdef Py_ssize_t q, n = m.n_rec, Q = m.stride
    cdef const real *pre = m.pre
    cdef const real *eps = m.eps + slot(m.t) * Q
    cdef const real *term = m.eps + slot(m.t + SLOTS - 1) * Q
    cdef const real *sign = m.sign
    if m.trace == TRACE_MEAN:
        term = m.class_rows + c * Q
        if m.self_traces != NULL:
            eps = m.class_eps + (slot(m.t) * m.rank + c) * Q
    for q in range(Q):
        table[4 * q], table[4 * q + 1], table[4 * q + 2] = pre[q] if q < n else 0, eps[q], term[q]
        table[4 * q + 3] = sign[q] if sign != NULL and q < n else 0


cdef void take(real *out, Py_ssize_t width, const real *table, const int *columns, Py_ssize_t n) noexcept nogil:
    """out (4, width): of each source its z, eps, term, sign."""
    cdef Py_ssize_t j = 0
    while j < n:
        take_some(out + j, out + width + j, out + 2 * width + j, out + 3 * width + j, table, columns + j)
        j += LINE // 4


cdef inline void trace_body(const Row *row, Py_ssize_t r) noexcept nogil:
    """R = K R + kick term;  then term = carry R."""
    cdef Py_ssize_t apart = row.apart // VEC_LANES, n = row.n // VEC_LANES, a, c, q
    cdef vec *R = <vec *>row.traces
    cdef vec *old = <vec *>row.old
    cdef vec *term = <vec *>row.gathered + 2 * row.width // VEC_LANES
    cdef vec k00 = spread(row.K[0]), k01 = k00, k10 = k00, k11 = k00, d0 = spread(row.kick[0]), d1 = d0
    cdef vec c0 = spread(row.carry[0]), c1 = c0, x, y, s, t
    if r == 2:
        k01, k10, k11 = spread(row.K[1]), spread(row.K[2]), spread(row.K[3])
        d1, c1 = spread(row.kick[1]), spread(row.carry[1])
    for q in range(n if r <= 2 else 0):
        x = R[q]
        s = madd(k00 * x, d0, term[q])
        if r == 2:
            y = R[apart + q]
            s = madd(s, k01, y)
            t = madd(madd(k10 * x, k11, y), d1, term[q])
            R[apart + q] = t
        R[q] = s
        term[q] = madd(c0 * s, c1, t) if r == 2 else c0 * s
    for q in range(n if r > 2 else 0):  # each new one is made of all the old ones
        s = spread(0)
        for a in range(r):
            old[a] = R[a * apart + q]
        for a in range(r):
            t = spread(row.kick[a]) * term[q]
            for c in range(r):
                t = madd(t, spread(row.K[a * r + c]), old[c])
            s = madd(s, spread(row.carry[a]), t)
            R[a * apart + q] = t
        term[q] = s


cdef inline void weight_body(vec *s, const Row *row, bint learn, bint term, bint sign) noexcept nogil:
    """w -= local eps + factor term, with signs;  s (64 bytes) = lanes of w . z."""
    cdef Py_ssize_t of = IN_64_BYTES, width = row.width // VEC_LANES, line, k, q = 0
    cdef vec *W = <vec *>row.w
    cdef const vec *source = <const vec *>row.gathered
    cdef vec local = spread(row.local), factor = spread(row.factor), w, g
    cdef vec sum[LANES]
    for k in range(of):
        sum[k] = spread(0)
    for line in range(row.n // LINE):
        for k in range(of):
            w = W[q]
            if learn:
                g = local * source[width + q]
                if term:
                    g = madd(g, factor, source[2 * width + q])
                w -= g
                if sign:
                    w = keep_sign(w, source[3 * width + q])
                W[q] = w
            sum[k] = madd(sum[k], w, source[q])
            q += 1
    for k in range(of):
        s[k] = sum[k]


cdef inline void add_types(vec *sums, const Row *row, Py_ssize_t r) noexcept nogil:
    """sums[b] += lanes of the weights of type b of pre, which stop at stops[b]; lines that two types share count by parts."""
    cdef Py_ssize_t of = IN_64_BYTES, b, line, k, at, stop, first = 0
    cdef const vec *w = <const vec *>row.w
    cdef const real *ones = row.pick + LANES  # zeros before it, ones from it on
    cdef vec v
    for b in range(r):
        stop = row.stops[b]
        for line in range(first // LINE, (stop + LINE - 1) // LINE):
            for k in range(of):
                v, at = w[line * of + k], line * LINE
                if at < first:
                    v *= (<const vec *>(ones - (first - at)))[k]
                if at + LINE > stop:
                    v -= v * (<const vec *>(ones - (stop - at)))[k]
                sums[b * of + k] += v
        first = stop


cdef inline void row_by(vec *s, const Row *row, Py_ssize_t r, Py_ssize_t n_types, bint learn, bint term, bint sign) noexcept nogil:
    if r == 1:
        trace_body(row, 1)
    elif r == 2:
        trace_body(row, 2)
    elif r:
        trace_body(row, r)
    if not learn:
        weight_body(s, row, False, False, False)
    elif sign:
        weight_body(s, row, True, term, True)
    elif term:
        weight_body(s, row, True, True, False)
    else:
        weight_body(s, row, True, False, False)
    if row.sums != NULL:
        add_types(<vec *>row.sums, row, n_types)


cdef void pass_over(Model *m, bint advance, bint learn, real *sums) noexcept nogil:
    """All connections once: their traces with `advance`, their weights with `learn`, and W z of the step to come.

    `sums` (r, r, 64 bytes) [post, pre]: of the weights by type; or NULL.  What four units read is gathered before they
    are worked on: what has just been stored in small parts cannot be loaded as a whole yet.
    """
    cdef Py_ssize_t P = m.n_places, n_mod = m.rank if m.trace == TRACE_EXACT and advance else 0
    cdef Py_ssize_t block, i, a, c
    cdef Py_ssize_t *at = m.starts
    cdef real *lanes = m.gathered + 4 * m.packed_width
    cdef real *kick = lanes + LINE
    cdef const real *h_before = m.h_past + slot(m.t + SLOTS - 1) * P
    cdef const real *drive
    cdef Row row
    row.K, row.kick, row.carry, row.factor, row.old = m.K, kick, m.modulator + slot(m.t) * m.rank, 1, m.old
    row.apart, row.width, row.pick, row.sums = m.starts[P], m.packed_width, m.pick, NULL
    for block in range(m.n_blocks):
        c = m.block_type[block]
        if block == 0 or m.trace == TRACE_MEAN and c != m.block_type[block - 1]:
            fill_table(m, c)
        take(m.gathered, row.width, m.table, m.columns + at[0], at[ROWS] - at[0])
        row.gathered = m.gathered
        if sums != NULL:
            row.sums = sums + c * m.rank * LINE
        for i in range(block * ROWS, block * ROWS + ROWS):
            if m.unit[i] >= 0:
                row.n, row.w, row.traces = at[1] - at[0], m.packed + at[0], m.packed_traces + at[0]
                row.local, row.stops = m.local[slot(m.t) * P + i], m.type_stops + i * m.rank
                if m.trace == TRACE_MEAN:
                    row.factor = m.readout[i]
                drive = m.drive + m.drive_class[m.unit[i]] * m.rank
                for a in range(n_mod):
                    kick[a] = h_before[i] * drive[a]
                row_by(<vec *>lanes, &row, n_mod, m.rank, learn, m.trace != TRACE_NONE, m.sign != NULL)
                m.current[m.unit[i]] = fold(lanes)
                row.gathered += row.n
            at += 1
    m.ahead = True


cdef void packed_step(Model *m, bint learn, bint refresh) noexcept nogil:
    """The traces, and with `learn` the weights, of this step."""
    cdef real *sums = m.type_lanes
    cdef Py_ssize_t a
    if learn or m.trace == TRACE_EXACT:
        if refresh:
            memset(sums, 0, m.rank * m.rank * LINE * sizeof(real))
        pass_over(m, True, learn, sums if refresh else NULL)
    m.since[0] = m.t
    m.unwritten = m.unwritten or learn
    if refresh:
        for a in range(m.rank * m.rank):
            m.type_sums[a] = fold(sums + a * LINE)
        derive_filter(m, True)
    if m.shared and m.unwritten:
        scatter(m)


cdef void packed_input(Model *m) noexcept nogil:
    """input = W_in x + b."""
    cdef const real *x = m.pre + m.n_rec
    cdef Py_ssize_t n_inputs = m.n_in + (m.b_rec != NULL), i, q
    cdef const real *w
    cdef real total
    for i in range(m.n_places):
        if m.unit[i] >= 0:
            w, total = m.packed + m.inputs_at[i], 0
            for q in range(n_inputs):
                total += w[q] * x[q]
            m.input[m.unit[i]] = total


# ---------------------------------------------------------------- to and from the network's arrays

cdef inline real *home(Model *m, Py_ssize_t p, Py_ssize_t q) noexcept nogil:
    """Where the weight of unit p from source q is in the network; NULL: such a source does not exist."""
    if q < m.n_rec:
        return m.w_rec + p * m.n_rec + q
    if q < m.n_rec + m.n_in:
        return m.w_in + p * m.n_in + q - m.n_rec
    return m.b_rec + p if q < m.stride else NULL


cdef void scatter(Model *m) noexcept nogil:
    """What has been learned, into the network's own arrays."""
    cdef const real *packed = m.packed
    cdef Py_ssize_t i, j
    cdef real *w
    for i in range(m.n_places):
        for j in range(m.starts[i], m.starts[i + 1]):
            w = home(m, m.unit[i], m.columns[j])
            if w != NULL:
                w[0] = packed[j]
    m.unwritten = False


cdef bint gather(Model *m) noexcept nogil:
    """The network's weights as somebody left them.  False: there are some where no synapse may be, which are not packed."""
    cdef real *packed = m.packed
    cdef Py_ssize_t i, j, left = 0
    cdef const real *w
    if m.unwritten:
        scatter(m)
    w = m.w_rec
    for j in range(m.n_rec * m.n_rec):
        left += w[j] != 0
    for i in range(m.n_places):
        for j in range(m.starts[i], m.starts[i + 1]):
            w = home(m, m.unit[i], m.columns[j])
            packed[j] = w[0] if w != NULL else 0
            left -= m.columns[j] < m.n_rec and packed[j] != 0
    m.counted, m.ahead = True, False
    return left == 0
