# Vectors, matrix-vector products, and the two things that happen to a block of ROWS rows, described by a `Tile`:
#
#     combine     g[i] = sum_j coef[j, i] terms[j] + sum_a carry[a] R[a, i]        the gradient of four units
#     advance     R[a, i] = sum_c K[a, c] R[c, i] + sum_j coef[j, a, i] terms[j]   their traces
#
# `terms` are rows of presynaptic traces that the four units share: each is loaded once for four.  The traces of a
# block, (Q / LANES, r, ROWS, LANES) numbers, lie in the order in which they are read.
#
# A `vec` is one register of the instruction set, F32_LANES float32 or F64_LANES float64; a compiler without vector
# types gets registers of one lane.  Its lanes never meet but in `dot_rows`, where they are folded in a fixed order.

cdef extern from *:
    """
    #if defined(__GNUC__) || defined(__clang__)
      #if defined(__AVX512F__)
        #define MPF_BYTES 64
      #elif defined(__AVX__)
        #define MPF_BYTES 32
      #else
        #define MPF_BYTES 16
      #endif
      #define MPF_LANES(type) (MPF_BYTES / (int)sizeof(type))
      typedef float mpf_f32v __attribute__((vector_size(MPF_BYTES), aligned(4), may_alias));
      typedef double mpf_f64v __attribute__((vector_size(MPF_BYTES), aligned(8), may_alias));
      typedef int mpf_i32v __attribute__((vector_size(MPF_BYTES)));
      typedef long long mpf_i64v __attribute__((vector_size(MPF_BYTES)));
      #define MPF_SPREAD(vec, c) ((c) - (vec){0})  /* c - 0 is c, sign and all: no arithmetic is left of it */
      static inline mpf_f32v mpf_keep_f32(mpf_f32v w, mpf_f32v s) { return (mpf_f32v)((mpf_i32v)w & ~(mpf_i32v)(s * w < 0)); }
      static inline mpf_f64v mpf_keep_f64(mpf_f64v w, mpf_f64v s) { return (mpf_f64v)((mpf_i64v)w & ~(mpf_i64v)(s * w < 0)); }
      typedef float mpf_f32x4 __attribute__((vector_size(16), aligned(4), may_alias));
      typedef double mpf_f64x2 __attribute__((vector_size(16), aligned(8), may_alias));
      static inline float mpf_fold_f32(const float *s) {
          mpf_f32x4 a = (*(mpf_f32x4 *)s + *(mpf_f32x4 *)(s + 8)) + (*(mpf_f32x4 *)(s + 4) + *(mpf_f32x4 *)(s + 12));
          return (a[0] + a[2]) + (a[1] + a[3]);
      }
      static inline double mpf_fold_f64(const double *s) {
          mpf_f64x2 a = (*(mpf_f64x2 *)s + *(mpf_f64x2 *)(s + 4)) + (*(mpf_f64x2 *)(s + 2) + *(mpf_f64x2 *)(s + 6));
          return a[0] + a[1];
      }
      #define mpf_prefetch(address) __builtin_prefetch(address)
    #else
      #define mpf_prefetch(address)
      #define MPF_LANES(type) 1
      static float mpf_fold_f32(const float *s) {
          return (((s[0] + s[8]) + (s[4] + s[12])) + ((s[2] + s[10]) + (s[6] + s[14]))) +
                 (((s[1] + s[9]) + (s[5] + s[13])) + ((s[3] + s[11]) + (s[7] + s[15])));
      }
      static double mpf_fold_f64(const double *s) { return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])); }
      typedef float mpf_f32v;
      typedef double mpf_f64v;
      #define MPF_SPREAD(vec, c) (c)
      static float mpf_keep_f32(float w, float s) { return s * w < 0 ? 0 : w; }
      static double mpf_keep_f64(double w, double s) { return s * w < 0 ? 0 : w; }
    #endif
    #define mpf_spread_f32(c) MPF_SPREAD(mpf_f32v, c)
    #define mpf_spread_f64(c) MPF_SPREAD(mpf_f64v, c)
    enum { MPF_F32_LANES = MPF_LANES(float), MPF_F64_LANES = MPF_LANES(double) };
    """
    ctypedef float f32v "mpf_f32v"
    ctypedef double f64v "mpf_f64v"
    f32v spread_f32 "mpf_spread_f32" (float c) noexcept nogil
    f64v spread_f64 "mpf_spread_f64" (double c) noexcept nogil
    f32v keep_f32 "mpf_keep_f32" (f32v w, f32v s) noexcept nogil
    f64v keep_f64 "mpf_keep_f64" (f64v w, f64v s) noexcept nogil
    void prefetch "mpf_prefetch" (const void *address) noexcept nogil
    float fold_f32 "mpf_fold_f32" (const float *s) noexcept nogil  # sum of 16 lanes, by halves
    double fold_f64 "mpf_fold_f64" (const double *s) noexcept nogil  # of 8
    enum:
        F32_LANES "MPF_F32_LANES"
        F64_LANES "MPF_F64_LANES"

ctypedef fused vec:
    f32v
    f64v

ctypedef struct Tile:
    void *out[ROWS]        # rows that are written: of W, of the gradient
    void *traces           # of the block
    void *carry            # (r,) what they count for
    Py_ssize_t rank        # 0: no traces
    Py_ssize_t stride      # Q
    void **terms           # (n_terms,) rows
    void *coef             # (n_terms, P), or (n_terms, r, P) for `advance`, from the first unit of the block on
    Py_ssize_t n_terms, n_places
    void *K                # (r, r) for `advance`
    bint held              # whether there is anything yet for K to hold on to
    void *old              # (r, ROWS, LANES) scratch
    void *sign             # (n,) of `descend`, or NULL
    void *sums             # (n,) of `descend`: the new rows are added to it; or NULL
    void *tail             # (ROWS, Q) of `descend`: the gradient beyond its whole vectors


cdef enum:
    AHEAD = 2048  # bytes of traces: measured, 5 to 10 % where these are not in the second cache

cdef double ZERO = 0  # of either type, read from the front


cdef bint finite(const real *x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        if x[i] - x[i] != 0:  # Inf - Inf and NaN - NaN are NaN
            return False
    return True


cdef void axpy(real *out, real a, const real *x, Py_ssize_t n) noexcept nogil:
    """out += a x."""
    cdef Py_ssize_t i
    for i in range(n):
        out[i] += a * x[i]


cdef inline vec spread(const vec *_, const void *c, Py_ssize_t i) noexcept nogil:
    """Entry i of c in every lane; the first argument only names the type."""
    if vec is f32v:
        return spread_f32((<const float *>c)[i])
    else:
        return spread_f64((<const double *>c)[i])


cdef inline Py_ssize_t per_line(const vec *_) noexcept nogil:
    """Vectors in LANES entries."""
    return LANES // (F32_LANES if vec is f32v else F64_LANES)


cdef inline void dot_vectors(vec *s, const void *w0, const void *w1, const void *w2, const void *w3, const void *x,
                             Py_ssize_t n_lines) noexcept nogil:
    """s[i] (64 bytes each) += products w_i x, line by line.

    A dot product alone waits for its own additions: several chains of them hide the wait, and x is loaded
    once for four rows.
    """
    cdef Py_ssize_t of = LANES // F32_LANES, q, k
    cdef vec v
    for q in range(n_lines):
        for k in range(of):
            v = (<const vec *>x)[q * of + k]
            s[k] += (<const vec *>w0)[q * of + k] * v
            s[of + k] += (<const vec *>w1)[q * of + k] * v
            s[2 * of + k] += (<const vec *>w2)[q * of + k] * v
            s[3 * of + k] += (<const vec *>w3)[q * of + k] * v


cdef inline void dot_lines(vec *s, const void *w0, const void *w1, const void *w2, const void *w3, const void *x,
                           const void *edge, Py_ssize_t n) noexcept nogil:
    """`dot_vectors` over n >= 1 lines' worth of entries; the last line, `edge` of x, may overlap the one before."""
    cdef Py_ssize_t L = 16 if vec is f32v else 8
    cdef Py_ssize_t k, rest = (n - L) * (64 // L)
    for k in range(ROWS * (LANES // F32_LANES)):
        s[k] = spread(s, &ZERO, 0)
    dot_vectors(s, w0, w1, w2, w3, x, n // L)
    if n % L:
        dot_vectors(s, <char *>w0 + rest, <char *>w1 + rest, <char *>w2 + rest, <char *>w3 + rest, edge, 1)


cdef void dot_rows(real *out, const real *w0, const real *w1, const real *w2, const real *w3, const real *x,
                   const real *edge, Py_ssize_t n) noexcept nogil:
    """out[i] = w_i . x for four rows, the additions in the same order on every instruction set."""
    cdef Py_ssize_t L = 16 if real is float else 8
    cdef Py_ssize_t q
    cdef f32v s_f32[ROWS * LANES]
    cdef f64v s_f64[ROWS * LANES]
    cdef real r0 = 0, r1 = 0, r2 = 0, r3 = 0
    if n >= L:
        if real is float:
            dot_lines(&s_f32[0], w0, w1, w2, w3, x, edge, n)
            for q in range(ROWS):
                out[q] = fold_f32(<float *>&s_f32[0] + L * q)
        else:
            dot_lines(&s_f64[0], w0, w1, w2, w3, x, edge, n)
            for q in range(ROWS):
                out[q] = fold_f64(<double *>&s_f64[0] + L * q)
        return
    for q in range(n):
        r0 += w0[q] * x[q]
        r1 += w1[q] * x[q]
        r2 += w2[q] * x[q]
        r3 += w3[q] * x[q]
    out[0], out[1], out[2], out[3] = r0, r1, r2, r3


cdef void line_up(real *edge, const real *x, Py_ssize_t n) noexcept nogil:
    """The last line of x, with zeros for what is part of a whole line before it."""
    cdef Py_ssize_t L = 16 if real is float else 8
    cdef Py_ssize_t q
    for q in range(L):
        edge[q] = x[n - L + q] if q >= L - n % L else 0


cdef void matvec(real *out, const real *w, const real *x, Py_ssize_t n_rows, Py_ssize_t n) noexcept nogil:
    """out[p] = sum_q w[p, q] x[q], four rows at a time; short rows column by column."""
    cdef Py_ssize_t L = 16 if real is float else 8
    cdef Py_ssize_t p = 0, q
    cdef real last[ROWS]
    cdef real edge[16]
    if n < L:
        for p in range(n_rows):
            out[p] = w[p * n] * x[0]
        for q in range(1, n):
            for p in range(n_rows):
                out[p] += w[p * n + q] * x[q]
        return
    line_up(&edge[0], x, n)
    while p + ROWS <= n_rows:
        dot_rows(out + p, w + p * n, w + (p + 1) * n, w + (p + 2) * n, w + (p + 3) * n, x, &edge[0], n)
        p += ROWS
    if p < n_rows:  # the last rows are doubled up
        q = n_rows - 1
        dot_rows(&last[0], w + p * n, w + min(p + 1, q) * n, w + min(p + 2, q) * n, w + q * n, x, &edge[0], n)
        memcpy(out + p, &last[0], (n_rows - p) * sizeof(real))


cdef void matvec_t(real *out, const real *w, const real *x, Py_ssize_t n_rows, Py_ssize_t n) noexcept nogil:
    """out[q] = sum_p w[p, q] x[p]; rows with x[p] = 0 (a unit at rest, an output without error) are not read."""
    cdef Py_ssize_t p
    memset(out, 0, n * sizeof(real))
    for p in range(n_rows):
        if x[p] != 0:
            axpy(out, x[p], w + p * n, n)


cdef inline void times_lanes(vec *out, const void *w, const vec *z, Py_ssize_t p, Py_ssize_t n) noexcept nogil:
    """out[p + i, :] = sum_q w[p + i, q] z[q, :] for as many rows i as make eight chains of additions; LANES columns."""
    cdef Py_ssize_t of = per_line(z), rows = 8 // per_line(z), q, i, k
    cdef vec s[8]
    cdef vec v
    for i in range(8):
        s[i] = spread(z, &ZERO, 0)
    for q in range(n):
        for i in range(8 // per_line(z)):
            v = spread(z, w, (p + i) * n + q)
            for k in range(of):
                s[i * of + k] += v * z[q * of + k]
    for i in range(8):
        out[p * of + i] = s[i]


cdef void matmul_vectors(vec *out, const void *w, const vec *z, Py_ssize_t n) noexcept nogil:
    """out = w z; w (n, n), z and out (n, LANES).  The last rows are done twice where they do not fill a block."""
    cdef Py_ssize_t rows = 8 // per_line(z), p = 0, i, q, k
    cdef vec s
    while p + rows <= n:
        times_lanes(out, w, z, p, n)
        p += rows
    if p < n and n >= rows:
        times_lanes(out, w, z, n - rows, n)
    elif p < n:
        for i in range(n):
            for k in range(per_line(z)):
                s = spread(z, &ZERO, 0)
                for q in range(n):
                    s += spread(z, w, i * n + q) * z[q * per_line(z) + k]
                out[i * per_line(z) + k] = s


cdef void matmul(real *out, const real *w, const real *z, Py_ssize_t n) noexcept nogil:
    if real is float:
        matmul_vectors(<f32v *>out, w, <const f32v *>z, n)
    else:
        matmul_vectors(<f64v *>out, w, <const f64v *>z, n)


# ---------------------------------------------------------------- blocks of rows

cdef inline void combine(vec *g, const Tile *tile, Py_ssize_t rank, Py_ssize_t q, const vec *R) noexcept nogil:
    """Vector q of the gradient of four units; R is where the traces of its line begin, plus its place in the line."""
    cdef Py_ssize_t of = per_line(g), j, c = 0, a
    cdef vec x, g0 = spread(g, &ZERO, 0), g1 = g0, g2 = g0, g3 = g0
    for j in range(tile.n_terms):
        x = (<const vec *>tile.terms[j])[q]
        g0 += spread(g, tile.coef, c) * x
        g1 += spread(g, tile.coef, c + 1) * x
        g2 += spread(g, tile.coef, c + 2) * x
        g3 += spread(g, tile.coef, c + 3) * x
        c += tile.n_places
    for a in range(rank):
        x = spread(g, tile.carry, a)
        for j in range(ROWS):
            prefetch(<char *>(R + j * of) + AHEAD)
        g0 += x * R[0]
        g1 += x * R[of]
        g2 += x * R[2 * of]
        g3 += x * R[3 * of]
        R += ROWS * of
    g[0], g[1], g[2], g[3] = g0, g1, g2, g3


cdef inline vec keep_sign(vec w, const vec *sign, Py_ssize_t q) noexcept nogil:
    """0 where a weight crossed zero against its sign; a NaN stays a NaN, so that it is found in y."""
    if vec is f32v:
        return keep_f32(w, sign[q])
    else:
        return keep_f64(w, sign[q])


cdef inline void descend_body(const vec *kind, const Tile *given, Py_ssize_t rank, Py_ssize_t n) noexcept nogil:
    cdef Tile copy = given[0]  # that no store can touch
    cdef Tile *tile = &copy
    cdef Py_ssize_t lanes = F32_LANES if vec is f32v else F64_LANES
    cdef Py_ssize_t of = per_line(kind), whole = n // lanes, n_vectors = tile.stride // lanes, q = 0, k
    cdef vec g[ROWS]
    cdef vec w0, w1, w2, w3
    cdef vec *sums = <vec *>tile.sums
    cdef vec *tail = <vec *>tile.tail
    cdef const vec *R = <const vec *>tile.traces
    while q < n_vectors:
        for k in range(of):
            combine(g, tile, rank, q, R + k)
            if q < whole:
                w0 = (<vec *>tile.out[0])[q] - g[0]
                w1 = (<vec *>tile.out[1])[q] - g[1]
                w2 = (<vec *>tile.out[2])[q] - g[2]
                w3 = (<vec *>tile.out[3])[q] - g[3]
                if tile.sign != NULL:
                    w0 = keep_sign(w0, <const vec *>tile.sign, q)
                    w1 = keep_sign(w1, <const vec *>tile.sign, q)
                    w2 = keep_sign(w2, <const vec *>tile.sign, q)
                    w3 = keep_sign(w3, <const vec *>tile.sign, q)
                if sums != NULL:
                    sums[q] += (w0 + w1) + (w2 + w3)
                (<vec *>tile.out[0])[q] = w0
                (<vec *>tile.out[1])[q] = w1
                (<vec *>tile.out[2])[q] = w2
                (<vec *>tile.out[3])[q] = w3
            else:
                tail[q] = g[0]
                tail[n_vectors + q] = g[1]
                tail[2 * n_vectors + q] = g[2]
                tail[3 * n_vectors + q] = g[3]
            q += 1
        R += rank * ROWS * of


cdef void descend_vectors(const vec *kind, const Tile *tile, Py_ssize_t n) noexcept nogil:
    """out[i] -= g[i] over whole vectors below column n, with signs and column sums where given; tail[i] = g[i] beyond.

    Up to two modulators their number is a constant to the compiler.
    """
    if tile.rank == 0:
        descend_body(kind, tile, 0, n)
    elif tile.rank == 1:
        descend_body(kind, tile, 1, n)
    elif tile.rank == 2:
        descend_body(kind, tile, 2, n)
    else:
        descend_body(kind, tile, tile.rank, n)


cdef void add_vectors(const vec *kind, const Tile *given) noexcept nogil:
    """out[i] += g[i]."""
    cdef Tile copy = given[0]  # that no store can touch
    cdef Tile *tile = &copy
    cdef Py_ssize_t of = per_line(kind), n_vectors = tile.stride // LANES * of, q = 0, k
    cdef vec g[ROWS]
    cdef const vec *R = <const vec *>tile.traces
    while q < n_vectors:
        for k in range(of):
            combine(g, tile, tile.rank, q, R + k)
            (<vec *>tile.out[0])[q] += g[0]
            (<vec *>tile.out[1])[q] += g[1]
            (<vec *>tile.out[2])[q] += g[2]
            (<vec *>tile.out[3])[q] += g[3]
            q += 1
        R += tile.rank * ROWS * of


cdef inline void advance_pair(vec *R, const vec *was, const Tile *tile, Py_ssize_t a, Py_ssize_t q) noexcept nogil:
    """Modulators a and a + 1 of four units, one vector of each; `was` is what the traces were."""
    cdef Py_ssize_t of = per_line(R), r = tile.rank, c, j
    cdef vec x, k, s0 = spread(R, &ZERO, 0), s1 = s0, s2 = s0, s3 = s0, t0 = s0, t1 = s0, t2 = s0, t3 = s0
    for c in range(r if tile.held else 0):
        k = spread(R, tile.K, a * r + c)
        x = spread(R, tile.K, (a + 1) * r + c)
        s0 += k * was[0]
        s1 += k * was[of]
        s2 += k * was[2 * of]
        s3 += k * was[3 * of]
        t0 += x * was[0]
        t1 += x * was[of]
        t2 += x * was[2 * of]
        t3 += x * was[3 * of]
        was += ROWS * of
    for j in range(tile.n_terms):
        x = (<const vec *>tile.terms[j])[q]
        c = (j * r + a) * tile.n_places
        s0 += spread(R, tile.coef, c) * x
        s1 += spread(R, tile.coef, c + 1) * x
        s2 += spread(R, tile.coef, c + 2) * x
        s3 += spread(R, tile.coef, c + 3) * x
        c += tile.n_places
        t0 += spread(R, tile.coef, c) * x
        t1 += spread(R, tile.coef, c + 1) * x
        t2 += spread(R, tile.coef, c + 2) * x
        t3 += spread(R, tile.coef, c + 3) * x
    R += a * ROWS * of
    R[0], R[of], R[2 * of], R[3 * of] = s0, s1, s2, s3
    R += ROWS * of
    R[0], R[of], R[2 * of], R[3 * of] = t0, t1, t2, t3


cdef inline void advance_single(vec *R, const vec *was, const Tile *tile, Py_ssize_t a, Py_ssize_t q) noexcept nogil:
    """The modulator left over where the rank is odd."""
    cdef Py_ssize_t of = per_line(R), r = tile.rank, c, j
    cdef vec x, k, s0 = spread(R, &ZERO, 0), s1 = s0, s2 = s0, s3 = s0
    for c in range(r if tile.held else 0):
        k = spread(R, tile.K, a * r + c)
        s0 += k * was[0]
        s1 += k * was[of]
        s2 += k * was[2 * of]
        s3 += k * was[3 * of]
        was += ROWS * of
    for j in range(tile.n_terms):
        x = (<const vec *>tile.terms[j])[q]
        c = (j * r + a) * tile.n_places
        s0 += spread(R, tile.coef, c) * x
        s1 += spread(R, tile.coef, c + 1) * x
        s2 += spread(R, tile.coef, c + 2) * x
        s3 += spread(R, tile.coef, c + 3) * x
    R += a * ROWS * of
    R[0], R[of], R[2 * of], R[3 * of] = s0, s1, s2, s3


cdef void advance_vectors(const vec *kind, const Tile *given) noexcept nogil:
    """The traces of four units: what they were, if `held`, through K, and what the terms add.

    Two modulators at a time.  With more than two the old vectors are copied to `old` first, since every
    new one is made of all of them.
    """
    cdef Tile copy = given[0]  # that no store can touch
    cdef Tile *tile = &copy
    cdef Py_ssize_t of = per_line(kind), r = tile.rank, n_vectors = tile.stride // LANES * of, q = 0, a, i, k
    cdef vec *line = <vec *>tile.traces
    cdef vec *R
    cdef vec *old = <vec *>tile.old
    while q < n_vectors:
        for k in range(of):
            R = line + k
            if r <= 2:
                old = R
            elif tile.held:
                for i in range(r * ROWS):
                    old[i * of] = R[i * of]
            a = 0
            while a + 2 <= r:
                advance_pair(R, old, tile, a, q)
                a += 2
            if a < r:
                advance_single(R, old, tile, a, q)
            q += 1
        line += r * ROWS * of


cdef void descend(Tile *tile, Py_ssize_t n, const real *_) noexcept nogil:
    if real is float:
        descend_vectors(<const f32v *>NULL, tile, n)
    else:
        descend_vectors(<const f64v *>NULL, tile, n)


cdef void add(Tile *tile, const real *_) noexcept nogil:
    if real is float:
        add_vectors(<const f32v *>NULL, tile)
    else:
        add_vectors(<const f64v *>NULL, tile)


cdef void advance(Tile *tile, const real *_) noexcept nogil:
    if real is float:
        advance_vectors(<const f32v *>NULL, tile)
    else:
        advance_vectors(<const f64v *>NULL, tile)
