# Vectors, matrix-vector products, and what happens to a block of ROWS rows, described by a `Tile`:
#
#     combine     g[i] = sum_j coef[j, i] terms[j] + sum_a carry[a] R[a, i]        the gradient of four units
#
# and what happens to one of them, a `Renewal`:
#
#     renew       R[a] = sum_c K[a, c] R[c] + sum_j r_a[j] terms[j]
#
# `terms` are rows of presynaptic traces.  In `combine` the four units share them: each is loaded once for four.  The
# traces of a block are rows too, (ROWS, r, Q).
#
# A `vec` is one register of the instruction set, VEC_LANES numbers; a compiler without vector types gets registers of one
# lane.  Its lanes never meet but in `fold`, in a fixed order.

cdef extern from *:
    """
    #if (defined(__GNUC__) || defined(__clang__)) && !defined(MPF_PLAIN)  /* -DMPF_PLAIN: as other compilers see it */
      #if defined(__AVX512F__)
        #define MPF_BYTES 64
      #elif defined(__AVX__)
        #define MPF_BYTES 32
      #else
        #define MPF_BYTES 16
      #endif
      #define MPF_LANES (MPF_BYTES / (int)sizeof(mpf_real))
      #if MPF_BITS == 32
        typedef int mpf_int;
        #define MPF_OF(name) name##ps
        #define MPF_NEON(name) name##_f32
      #else
        typedef long long mpf_int;
        #define MPF_OF(name) name##pd
        #define MPF_NEON(name) name##_f64
      #endif
      typedef mpf_real mpf_vec __attribute__((vector_size(MPF_BYTES), aligned(sizeof(mpf_real)), may_alias));
      typedef mpf_int mpf_ints __attribute__((vector_size(MPF_BYTES)));
      typedef mpf_real mpf_16 __attribute__((vector_size(16), aligned(sizeof(mpf_real)), may_alias));
      typedef mpf_real mpf_four __attribute__((vector_size(4 * sizeof(mpf_real)), aligned(sizeof(mpf_real)), may_alias));
      static inline mpf_vec mpf_spread(mpf_real c) { return c - (mpf_vec){0}; }  /* c - 0 is c, sign and all: no arithmetic is left of it */
      /* s + a b and s - a b, rounded once where the instruction set can, see kernels.pyx */
      #if defined(__AVX512F__)
        #include <immintrin.h>
        static inline mpf_vec mpf_madd(mpf_vec s, mpf_vec a, mpf_vec b) { return MPF_OF(_mm512_fmadd_)(a, b, s); }
        static inline mpf_vec mpf_msub(mpf_vec s, mpf_vec a, mpf_vec b) { return MPF_OF(_mm512_fnmadd_)(a, b, s); }
      #elif defined(__FMA__)
        #include <immintrin.h>
        static inline mpf_vec mpf_madd(mpf_vec s, mpf_vec a, mpf_vec b) { return MPF_OF(_mm256_fmadd_)(a, b, s); }
        static inline mpf_vec mpf_msub(mpf_vec s, mpf_vec a, mpf_vec b) { return MPF_OF(_mm256_fnmadd_)(a, b, s); }
      #elif defined(__aarch64__)
        #include <arm_neon.h>
        static inline mpf_vec mpf_madd(mpf_vec s, mpf_vec a, mpf_vec b) { return MPF_NEON(vfmaq)(s, a, b); }
        static inline mpf_vec mpf_msub(mpf_vec s, mpf_vec a, mpf_vec b) { return MPF_NEON(vfmsq)(s, a, b); }
      #else
        static inline mpf_vec mpf_madd(mpf_vec s, mpf_vec a, mpf_vec b) { return s + a * b; }
        static inline mpf_vec mpf_msub(mpf_vec s, mpf_vec a, mpf_vec b) { return s - a * b; }
      #endif
      static inline mpf_vec mpf_keep_sign(mpf_vec w, mpf_vec s) { return (mpf_vec)((mpf_ints)w & ~(mpf_ints)(s * w < 0)); }
      /* lanes of -1 and 0 from as many bytes */
      static inline mpf_ints mpf_widen(const signed char *b) {
      #if defined(__AVX512F__) && MPF_BITS == 32
          return (mpf_ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)b));
      #elif defined(__AVX512F__)
          return (mpf_ints)_mm512_cvtepi8_epi64(_mm_loadl_epi64((const __m128i *)b));
      #elif defined(__AVX2__) && MPF_BITS == 32
          return (mpf_ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)b));
      #elif defined(__AVX2__)
          int four;
          memcpy(&four, b, sizeof four);
          return (mpf_ints)_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(four));
      #else
          mpf_ints of;
          for (int i = 0; i < MPF_LANES; i++) of[i] = b[i];
          return of;
      #endif
      }
      static inline mpf_vec mpf_where(mpf_vec g, const signed char *keep) { return (mpf_vec)((mpf_ints)g & mpf_widen(keep)); }
      static inline mpf_real mpf_fold(const mpf_real *s) {
          const mpf_16 *p = (const mpf_16 *)s, a = (p[0] + p[2]) + (p[1] + p[3]);
      #if MPF_BITS == 32
          return (a[0] + a[2]) + (a[1] + a[3]);
      #else
          return a[0] + a[1];
      #endif
      }
      static inline void mpf_times_four(mpf_real *out, const mpf_real *x, const mpf_real *c, int each) {
          mpf_four d = *c - (mpf_four){0};
          if (each) d = *(const mpf_four *)c;
          *(mpf_four *)out = d * *(const mpf_four *)x;
      }
      #if defined(__AVX512F__) && MPF_BITS == 32
        #define MPF_PACK  /* compressed in registers: such a store is slow on some */
        static inline int mpf_pack(int *where, float *what, int first, const float *x) {
            const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
            const __m512 v = _mm512_loadu_ps(x);
            const __mmask16 some = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
            _mm512_storeu_ps(what, _mm512_maskz_compress_ps(some, v));
            _mm512_storeu_si512(where, _mm512_maskz_compress_epi32(some, at));
            return __builtin_popcount(some);
        }
      #endif
      #define mpf_lowest(bits) __builtin_ctzll(bits)
      #define mpf_prefetch(p) __builtin_prefetch(p, 1)
    #else
      typedef mpf_real mpf_vec;
      #define MPF_LANES 1
      static int mpf_lowest(unsigned long long bits) { int n = 0; while (!(bits >> n & 1)) n++; return n; }
      #define mpf_prefetch(p) (void)(p)
      static mpf_real mpf_fold(const mpf_real *s) {
      #if MPF_BITS == 32
          return (((s[0] + s[8]) + (s[4] + s[12])) + ((s[2] + s[10]) + (s[6] + s[14]))) +
                 (((s[1] + s[9]) + (s[5] + s[13])) + ((s[3] + s[11]) + (s[7] + s[15])));
      #else
          return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
      #endif
      }
      static mpf_vec mpf_spread(mpf_real c) { return c; }
      static mpf_vec mpf_madd(mpf_vec s, mpf_vec a, mpf_vec b) { return s + a * b; }
      static mpf_vec mpf_msub(mpf_vec s, mpf_vec a, mpf_vec b) { return s - a * b; }
      static mpf_vec mpf_keep_sign(mpf_vec w, mpf_vec s) { return s * w < 0 ? 0 : w; }
      static mpf_vec mpf_where(mpf_vec g, const signed char *keep) { return *keep ? g : 0; }
      static void mpf_times_four(mpf_real *out, const mpf_real *x, const mpf_real *c, int each) {
          for (int i = 0; i < 4; i++) out[i] = c[each * i] * x[i];
      }
    #endif
    #ifndef MPF_PACK
    static inline int mpf_pack(int *where, mpf_real *what, int first, const mpf_real *x) {
        int n = 0;
        for (int i = 0; i < 16; i++) { where[n] = first + i; what[n] = x[i]; n += x[i] != 0; }
        return n;
    }
    #endif
    enum { MPF_LINE = 64 / sizeof(mpf_real), MPF_PER_LINE = 16 / MPF_LANES, MPF_IN_64_BYTES = 64 / sizeof(mpf_vec),
           MPF_MANY = sizeof(mpf_vec) == 64 };
    """
    ctypedef float vec "mpf_vec"
    # c in every lane; s + a b; s - a b
    vec spread "mpf_spread" (real c) noexcept nogil
    vec madd "mpf_madd" (vec s, vec a, vec b) noexcept nogil
    vec msub "mpf_msub" (vec s, vec a, vec b) noexcept nogil
    # 0 where a weight crossed zero against its sign (a NaN stays one, so that it is found in y); 0 where it may not change
    vec keep_sign "mpf_keep_sign" (vec w, vec s) noexcept nogil
    vec where "mpf_where" (vec g, const signed char *keep) noexcept nogil
    # sum of the LINE numbers of one line, by halves
    real fold "mpf_fold" (const real *s) noexcept nogil
    # out = c x for the four units of a block; `each` has its own c
    void times_four "mpf_times_four" (real *out, const real *x, const real *c, bint each) noexcept nogil
    # those of LANES numbers that are not 0, and where they are, from `first` on; how many
    int pack "mpf_pack" (int *where, real *what, int first, const real *x) noexcept nogil
    # place of the lowest bit that is set; soon to be written
    int lowest "mpf_lowest" (unsigned long long bits) noexcept nogil
    void prefetch "mpf_prefetch" (const void *p) noexcept nogil
    enum:
        VEC_LANES "MPF_LANES"
        LINE "MPF_LINE"                # numbers in 64 bytes
        PER_LINE "MPF_PER_LINE"        # vectors in LANES numbers
        IN_64_BYTES "MPF_IN_64_BYTES"  # vectors in as many bytes
        MANY "MPF_MANY"                # whether there are 32 registers, not 16, as there are of this size

ctypedef struct Tile:
    real **out             # (ROWS,) rows that are written: of W, of the gradient
    real *traces           # of the block
    real *carry            # (r,) what they count for
    Py_ssize_t rank        # 0: no traces
    Py_ssize_t stride      # Q
    real **terms           # (n_terms,) rows
    real *coef             # (n_terms, P) from the first unit of the block on
    Py_ssize_t n_terms, n_places
    # of `descend`
    Py_ssize_t n           # columns of W
    int *own               # (ROWS,) units, -1 where there is none, if W has no diagonal; or NULL
    real *sign             # (n,) or NULL
    const signed char **keep  # (ROWS,) rows of the mask, see `Model.keep`, or NULL
    real *sums             # (n,) the new rows are added to it; or NULL
    real *z                # (n,) what the new rows are multiplied with
    real *dots             # (ROWS, 64 bytes) out: lanes of these products, over whole LANES of columns
    real *tail             # (ROWS, LANES + Q) out: LANES zeros, then the gradient of the columns that are left
    real *pick             # zeros, then ones: LANES of each


ctypedef struct Renewal:
    real *traces           # (r, Q)
    real *old              # what they were: the same, or of more than two modulators a copy
    Py_ssize_t stride      # Q
    Py_ssize_t rank
    real *K                # (2, r), of the modulators at hand
    real **rows            # of terms
    const int *used        # (n_terms,) which of them count
    Py_ssize_t n_terms
    real *r0               # (., ROWS) what each row counts for in the traces of one modulator, for this unit and those after it
    real *r1               # and of the next
    real *whole0           # (Q,) what all rows together make of either, for a unit that was awake throughout; or NULL
    real *whole1


cdef enum:
    CHAINED = 4  # vectors of a row: eight chains of additions


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


cdef inline void dot_vectors(vec *s, const real *w0, const real *w1, const real *w2, const real *w3, const real *x, Py_ssize_t n_lines,
                             Py_ssize_t rows) noexcept nogil:
    """s[i] (64 bytes each) += products w_i x of 2 or of all 4 rows, line by line.

    A dot product alone waits for its own additions: several chains of them hide the wait, and x is loaded
    once for four rows.
    """
    cdef Py_ssize_t of = IN_64_BYTES, q, k
    cdef vec v
    for q in range(n_lines):
        for k in range(of):
            v = (<const vec *>x)[q * of + k]
            s[k] = madd(s[k], (<const vec *>w0)[q * of + k], v)
            s[of + k] = madd(s[of + k], (<const vec *>w1)[q * of + k], v)
            if rows > 2:
                s[2 * of + k] = madd(s[2 * of + k], (<const vec *>w2)[q * of + k], v)
                s[3 * of + k] = madd(s[3 * of + k], (<const vec *>w3)[q * of + k], v)


cdef inline void dot_lines(vec *s, const real *w0, const real *w1, const real *w2, const real *w3, const real *x, const real *edge, Py_ssize_t n,
                           Py_ssize_t first, Py_ssize_t rows) noexcept nogil:
    """`dot_vectors` from line `first` to entry n, a line's worth at least; the last line, `edge` of x, may overlap the one before."""
    cdef Py_ssize_t k, rest = n - LINE, begin = first * LINE
    if first == 0:
        for k in range(rows * IN_64_BYTES):
            s[k] = spread(0)
    dot_vectors(s, w0 + begin, w1 + begin, w2 + begin, w3 + begin, x + begin, n // LINE - first, rows)
    if n % LINE:
        dot_vectors(s, w0 + rest, w1 + rest, w2 + rest, w3 + rest, edge, 1, rows)


cdef inline void dot_some(real *out, const real *w0, const real *w1, const real *w2, const real *w3, const real *x, const real *edge,
                          Py_ssize_t n, Py_ssize_t rows) noexcept nogil:
    """out[i] = w_i . x for two or four rows, the additions in the same order on every instruction set."""
    cdef Py_ssize_t i
    cdef vec s[ROWS * LANES]
    dot_lines(&s[0], w0, w1, w2, w3, x, edge, n, 0, rows)
    for i in range(rows):
        out[i] = fold(<real *>&s[0] + LINE * i)


cdef void dot_rows(real *out, const real *w0, const real *w1, const real *w2, const real *w3, const real *x,
                   const real *edge, Py_ssize_t n) noexcept nogil:
    """`dot_some` of four; short ones, too."""
    cdef Py_ssize_t q
    cdef real r0 = 0, r1 = 0, r2 = 0, r3 = 0
    if n >= LINE:
        dot_some(out, w0, w1, w2, w3, x, edge, n, ROWS)
        return
    for q in range(n):
        r0, r1, r2, r3 = r0 + w0[q] * x[q], r1 + w1[q] * x[q], r2 + w2[q] * x[q], r3 + w3[q] * x[q]
    out[0], out[1], out[2], out[3] = r0, r1, r2, r3


cdef void dot_two(real *out, const real *w0, const real *w1, const real *x, const real *edge, Py_ssize_t n) noexcept nogil:
    """`dot_some` of two."""
    dot_some(out, w0, w1, w1, w1, x, edge, n, 2)


cdef void line_up(real *edge, const real *x, Py_ssize_t n) noexcept nogil:
    """The last line of x, with zeros for what is part of a whole line before it."""
    cdef Py_ssize_t q
    for q in range(LINE):
        edge[q] = x[n - LINE + q] if q >= LINE - n % LINE else 0


cdef void matvec(real *out, const real *w, const real *x, Py_ssize_t n_rows, Py_ssize_t n) noexcept nogil:
    """out[p] = sum_q w[p, q] x[q], four rows at a time, or two; short rows column by column."""
    cdef Py_ssize_t p = 0, q
    cdef real last[2]
    cdef real edge[LANES]
    if n < LINE:
        for p in range(n_rows):
            out[p] = w[p * n] * x[0]
        for q in range(1, n):
            for p in range(n_rows):
                out[p] += w[p * n + q] * x[q]
        return
    if n % LINE:
        line_up(&edge[0], x, n)
    while p + ROWS <= n_rows:
        dot_rows(out + p, w + p * n, w + (p + 1) * n, w + (p + 2) * n, w + (p + 3) * n, x, &edge[0], n)
        p += ROWS
    while p + 2 <= n_rows:
        dot_two(out + p, w + p * n, w + (p + 1) * n, x, &edge[0], n)
        p += 2
    if p < n_rows:
        dot_two(&last[0], w + p * n, w + p * n, x, &edge[0], n)
        out[p] = last[0]


cdef inline void matvec_at_hand(real *out, const real *w, const real *x, Py_ssize_t n_rows, Py_ssize_t n) noexcept nogil:
    """`matvec`, without a call if there are two rows of whole lines: in small networks it shows."""
    if n_rows == 2 and n % LINE == 0:
        dot_some(out, w, w + n, w, w, x, x, n, 2)
    else:
        matvec(out, w, x, n_rows, n)


cdef void matvec_t(real *out, const real *w, const real *x, Py_ssize_t n_rows, Py_ssize_t n) noexcept nogil:
    """out[q] = sum_p w[p, q] x[p]; rows with x[p] = 0 (a unit at rest, an output without error) are not read."""
    cdef Py_ssize_t p
    memset(out, 0, n * sizeof(real))
    for p in range(n_rows):
        if x[p] != 0:
            axpy(out, x[p], w + p * n, n)


cdef inline void times_line(vec **out, real **x, const vec *w, Py_ssize_t n, Py_ssize_t n_vectors) noexcept nogil:
    """LANES columns of out[i] = x[i] w, for as many rows i as make eight chains of additions."""
    cdef Py_ssize_t of = PER_LINE, rows = max(8 // of, 1), q, i, k
    cdef vec s[LANES]
    cdef vec v[LANES]
    for i in range(rows * of):
        s[i] = spread(0)
    for q in range(n):
        for k in range(of):
            v[k] = w[k]
        for i in range(rows):
            for k in range(of):
                s[i * of + k] = madd(s[i * of + k], spread(x[i][q]), v[k])
        w += n_vectors
    for i in range(rows):
        for k in range(of):
            out[i][k] = s[i * of + k]


cdef void matmul(real **out, real **x, Py_ssize_t n_rows, const real *w, Py_ssize_t n, Py_ssize_t n_lines) noexcept nogil:
    """out[i] = x[i] w for rows of n numbers; w and each out are of n_lines lines, of LANES each."""
    cdef Py_ssize_t of = PER_LINE, rows = max(8 // of, 1), row = 0, line, i
    cdef vec *some_out[8]
    cdef real *some_x[8]
    while row < n_rows:
        for line in range(n_lines):
            for i in range(rows):  # the last row again where they do not fill a block
                some_out[i] = <vec *>out[min(row + i, n_rows - 1)] + line * of
                some_x[i] = x[min(row + i, n_rows - 1)]
            times_line(some_out, some_x, <const vec *>w + line * of, n, n_lines * of)
        row += rows


# ---------------------------------------------------------------- blocks of rows

cdef inline void combine(vec *g, const Tile *it, Py_ssize_t rank, Py_ssize_t q, Py_ssize_t count) noexcept nogil:
    """Vectors q .. q + count of the gradient of four units, whose rows are of so many: (count, ROWS)."""
    cdef Py_ssize_t n_vectors = it.stride // VEC_LANES, j, c = 0, a, i, k
    cdef const vec *R = <const vec *>it.traces + q
    cdef vec s[4 * ROWS]
    cdef vec x[4]
    cdef vec b
    for i in range(count * ROWS):
        s[i] = spread(0)
    for j in range(it.n_terms):
        for k in range(count):
            x[k] = (<const vec *>it.terms[j])[q + k]
        for i in range(ROWS):
            b = spread(it.coef[c + i])
            for k in range(count):
                s[k * ROWS + i] = madd(s[k * ROWS + i], b, x[k])
        c += it.n_places
    for a in range(rank):
        b = spread(it.carry[a])
        for i in range(ROWS):
            for k in range(count):
                s[k * ROWS + i] = madd(s[k * ROWS + i], b, R[i * rank * n_vectors + k])
        R += n_vectors
    for i in range(count * ROWS):
        g[i] = s[i]


cdef inline void descend_one(vec *s, const Tile *it, const vec *few, Py_ssize_t q, Py_ssize_t rank, Py_ssize_t n_few) noexcept nogil:
    """Vector q of `descend`; `s`: where its products go, of a row and of the next so many chains apart; `few`: the coefficients
    of one or two terms, if there are no more and nothing is said of single weights."""
    cdef Py_ssize_t chains = IN_64_BYTES, i
    cdef vec g[ROWS]
    cdef vec x, a, b, c, d, sign
    if n_few:
        x = (<const vec *>it.terms[0])[q]
        g[0], g[1], g[2], g[3] = few[0] * x, few[1] * x, few[2] * x, few[3] * x
        if n_few == 2:
            x = (<const vec *>it.terms[1])[q]
            g[0], g[1], g[2], g[3] = madd(g[0], few[4], x), madd(g[1], few[5], x), madd(g[2], few[6], x), madd(g[3], few[7], x)
    else:
        combine(g, it, rank, q, 1)
    if not n_few and it.keep != NULL:
        for i in range(ROWS):
            g[i] = where(g[i], it.keep[i] + q * VEC_LANES)
    a, b = (<vec *>it.out[0])[q] - g[0], (<vec *>it.out[1])[q] - g[1]
    c, d = (<vec *>it.out[2])[q] - g[2], (<vec *>it.out[3])[q] - g[3]
    if not n_few and it.sign != NULL:
        sign = (<const vec *>it.sign)[q]
        a, b, c, d = keep_sign(a, sign), keep_sign(b, sign), keep_sign(c, sign), keep_sign(d, sign)
    if it.sums != NULL:
        (<vec *>it.sums)[q] += (a + b) + (c + d)
    (<vec *>it.out[0])[q], (<vec *>it.out[1])[q], (<vec *>it.out[2])[q], (<vec *>it.out[3])[q] = a, b, c, d
    x = (<const vec *>it.z)[q]
    s[0] = madd(s[0], a, x)
    s[chains] = madd(s[chains], b, x)
    s[2 * chains] = madd(s[2 * chains], c, x)
    s[3 * chains] = madd(s[3 * chains], d, x)


cdef inline void descend_body(const Tile *given, Py_ssize_t rank, Py_ssize_t n_few) noexcept nogil:
    """What `descend` does, for a rank and, of one or two, a number of terms that the compiler knows."""
    cdef Tile copy = given[0]  # that no store can touch
    cdef const Tile *it = &copy
    cdef Py_ssize_t of = PER_LINE, chains = IN_64_BYTES, n_lines = it.n // LANES, n_vectors = it.stride // VEC_LANES
    cdef Py_ssize_t line, k, i, q = 0
    cdef vec *dots = <vec *>it.dots
    cdef vec *tail = <vec *>it.tail + of
    cdef real *terms[2]
    cdef real *out[ROWS]
    cdef vec few[2 * ROWS]
    cdef vec g[ROWS]
    cdef vec s[ROWS * LANES]
    for i in range(ROWS):
        out[i] = it.out[i]
    copy.out = out
    for i in range(ROWS * chains):
        s[i] = spread(0)
    if n_few:
        for k in range(n_few):
            terms[k] = it.terms[k]
            for i in range(ROWS):
                few[k * ROWS + i] = spread(it.coef[k * it.n_places + i])
        copy.terms = terms
    for line in range(n_lines):  # written out: what lies in an array may then lie in registers
        descend_one(&s[0], it, few, q, rank, n_few)
        if of > 1:
            descend_one(&s[1 % chains], it, few, q + 1, rank, n_few)
        if of > 2:
            descend_one(&s[2 % chains], it, few, q + 2, rank, n_few)
            descend_one(&s[3 % chains], it, few, q + 3, rank, n_few)
        for k in range(4, of):
            descend_one(&s[k % chains], it, few, q + k, rank, n_few)
        q += of
    dots[0], dots[1], dots[2], dots[3] = s[0], s[1], s[2], s[3]
    if chains > 1:
        dots[4], dots[5], dots[6], dots[7] = s[4], s[5], s[6], s[7]
    for i in range(8, ROWS * chains):
        dots[i] = s[i]
    for q in range(q, n_vectors):
        combine(g, it, rank, q, 1)
        for i in range(ROWS):
            tail[i * (n_vectors + of)] = g[i]
        tail += 1


cdef void descend_by(const Tile *tile) noexcept nogil:
    cdef bint plain = tile.keep == NULL and tile.sign == NULL
    if tile.rank == 0 and tile.n_terms == 1 and plain:
        descend_body(tile, 0, 1)
    elif tile.rank == 0 and tile.n_terms == 2 and plain:
        descend_body(tile, 0, 2)
    elif tile.rank == 0:
        descend_body(tile, 0, 0)
    elif tile.rank == 1:
        descend_body(tile, 1, 0)
    elif tile.rank == 2:
        descend_body(tile, 2, 0)
    else:
        descend_body(tile, tile.rank, 0)


cdef void descend(const Tile *tile, real *fix) noexcept nogil:
    """out[i] -= g[i] where keep[i], with signs, over whole LANES of columns; then their column sums and products with z.

    A diagonal that is not there is put back afterwards, and so is what it made of the sums; `fix`: what the products miss by it.
    """
    cdef Py_ssize_t done = tile.n // LANES * LANES, i
    cdef const int *own = tile.own
    cdef real kept[ROWS]
    cdef real *w
    for i in range(ROWS if own != NULL else 0):
        if 0 <= own[i] < done:
            kept[i] = tile.out[i][own[i]]
    descend_by(tile)
    fix[0], fix[1], fix[2], fix[3] = 0, 0, 0, 0
    for i in range(ROWS if own != NULL else 0):
        if 0 <= own[i] < done:
            w = tile.out[i] + own[i]
            fix[i] = (kept[i] - w[0]) * tile.z[own[i]]
            if tile.sums != NULL:
                tile.sums[own[i]] += kept[i] - w[0]
            w[0] = kept[i]


cdef void descend_last(const Tile *tile) noexcept nogil:
    """The last `rest` columns of W by the gradient in `tail`, as its last LANES: the others by zero."""
    cdef Py_ssize_t rest = tile.n % LANES, width = LANES + tile.stride, last = tile.n - LANES, i, k
    cdef vec w, sum
    for k in range(PER_LINE):
        sum = spread(0)
        for i in range(ROWS):
            w = (<vec *>(tile.tail + i * width + rest))[k]
            if tile.keep != NULL:
                w = where(w, tile.keep[i] + last + k * VEC_LANES)
            w = (<vec *>(tile.out[i] + last))[k] - w
            if tile.sign != NULL:
                w = keep_sign(w, (<const vec *>(tile.sign + last))[k])
            (<vec *>(tile.out[i] + last))[k] = w
            sum += w
        if tile.sums != NULL:
            (<vec *>(tile.sums + last))[k] += sum * (<const vec *>(tile.pick + rest))[k]


cdef inline void finish_dots(real *out, const Tile *tile, const real *fix, const real *edge) noexcept nogil:
    """out[i] = out-row i . z, of which `dots` may hold the lanes up to the last whole LANES."""
    cdef real **w = tile.out
    cdef Py_ssize_t first = tile.n // LANES * LANES // LINE, i
    if first == 0:
        dot_rows(out, w[0], w[1], w[2], w[3], tile.z, edge, tile.n)
        return
    dot_lines(<vec *>tile.dots, w[0], w[1], w[2], w[3], tile.z, edge, tile.n, first, ROWS)
    for i in range(ROWS):
        out[i] = fold(tile.dots + LINE * i) + fix[i]


cdef inline void add_some(const Tile *it, Py_ssize_t q, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t i, k
    cdef vec g[4 * ROWS]
    combine(g, it, it.rank, q, count)
    for i in range(ROWS):
        for k in range(count):
            (<vec *>it.out[i])[q + k] += g[k * ROWS + i]


cdef void add(const Tile *given) noexcept nogil:
    """out[i] += g[i]."""
    cdef Tile copy = given[0]  # that no store can touch
    cdef Py_ssize_t n_vectors = copy.stride // LANES * PER_LINE, q = 0
    while MANY and q + 4 <= n_vectors:  # sixteen chains of additions
        add_some(&copy, q, 4)
        q += 4
    while q + 2 <= n_vectors:
        add_some(&copy, q, 2)
        q += 2
    if q < n_vectors:
        add_some(&copy, q, 1)


cdef inline void renew_some(vec *R0, vec *R1, const Renewal *it, Py_ssize_t q, Py_ssize_t count, Py_ssize_t n_mod, Py_ssize_t r,
                            bint whole) noexcept nogil:
    """Vectors q .. q + count of `renew`: each is read and written once, however many terms there are."""
    cdef Py_ssize_t n_vectors = it.stride // VEC_LANES, j, n, i, c
    cdef const vec *row
    cdef const vec *old = <const vec *>it.old
    cdef vec s[CHAINED]
    cdef vec t[CHAINED]
    cdef vec x, c0, c1, zero = spread(0)
    for i in range(count):
        s[i] = t[i] = zero
        if whole:
            s[i], t[i] = (<const vec *>it.whole0)[q + i], (<const vec *>it.whole1)[q + i]
        for c in range(r):
            x = old[c * n_vectors + q + i]
            s[i] = madd(s[i], spread(it.K[c]), x)
            if n_mod == 2:
                t[i] = madd(t[i], spread(it.K[r + c]), x)
    for j in range(0 if whole else it.n_terms):
        n = it.used[j]
        row, c0 = <const vec *>it.rows[n] + q, spread(it.r0[n * ROWS])
        if n_mod == 2:
            c1 = spread(it.r1[n * ROWS])
        for i in range(count):
            x = row[i]
            s[i] = madd(s[i], c0, x)
            if n_mod == 2:
                t[i] = madd(t[i], c1, x)
    for i in range(count):
        R0[q + i] = s[i]
        if n_mod == 2:
            R1[q + i] = t[i]


cdef inline void renew_by(const Renewal *given, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t a, Py_ssize_t n_mod, Py_ssize_t r,
                          bint whole) noexcept nogil:
    cdef Renewal copy = given[0]  # that no store can touch
    cdef const Renewal *it = &copy
    cdef Py_ssize_t of = PER_LINE, n_vectors = it.stride // LANES * of, q = begin * of, last = end * of
    cdef vec *R0 = <vec *>it.traces + a * n_vectors
    cdef vec *R1 = R0 + n_vectors
    while q + CHAINED <= last:
        renew_some(R0, R1, it, q, CHAINED, n_mod, r, whole)
        q += CHAINED
    while q < last:
        renew_some(R0, R1, it, q, 1, n_mod, r, whole)
        q += 1


cdef inline void renew(const Renewal *it, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t a) noexcept nogil:
    """From line to line, of one unit: modulators a and, if there is one, a + 1."""
    if it.whole0 != NULL:
        renew_by(it, begin, end, a, 2, it.rank, True)
    elif it.rank == 2:
        renew_by(it, begin, end, a, 2, 2, False)
    elif it.rank - a > 1:
        renew_by(it, begin, end, a, 2, it.rank, False)
    else:
        renew_by(it, begin, end, a, 1, it.rank, False)
