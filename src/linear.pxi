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
# A `vec` is one register of the instruction set, F32_LANES float32 or F64_LANES float64; a compiler without vector
# types gets registers of one lane.  Its lanes never meet but in `dot_rows`, where they are folded in a fixed order.

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
      #define MPF_LANES(type) (MPF_BYTES / (int)sizeof(type))
      typedef float mpf_f32v __attribute__((vector_size(MPF_BYTES), aligned(4), may_alias));
      typedef double mpf_f64v __attribute__((vector_size(MPF_BYTES), aligned(8), may_alias));
      typedef int mpf_i32v __attribute__((vector_size(MPF_BYTES)));
      typedef long long mpf_i64v __attribute__((vector_size(MPF_BYTES)));
      #define MPF_SPREAD(vec, c) ((c) - (vec){0})  /* c - 0 is c, sign and all: no arithmetic is left of it */
      /* s + a b and s - a b, rounded once where the instruction set can, see kernels.pyx */
      #if defined(__AVX512F__)
        #include <immintrin.h>
        #define MPF_MADD(bits, s, a, b) _mm512_fmadd_##bits(a, b, s)
        #define MPF_MSUB(bits, s, a, b) _mm512_fnmadd_##bits(a, b, s)
      #elif defined(__FMA__)
        #include <immintrin.h>
        #define MPF_MADD(bits, s, a, b) _mm256_fmadd_##bits(a, b, s)
        #define MPF_MSUB(bits, s, a, b) _mm256_fnmadd_##bits(a, b, s)
      #elif defined(__aarch64__)
        #include <arm_neon.h>
        #define MPF_MADD(bits, s, a, b) vfmaq_##bits(s, a, b)
        #define MPF_MSUB(bits, s, a, b) vfmsq_##bits(s, a, b)
        #define vfmaq_ps vfmaq_f32
        #define vfmaq_pd vfmaq_f64
        #define vfmsq_ps vfmsq_f32
        #define vfmsq_pd vfmsq_f64
      #else
        #define MPF_MADD(bits, s, a, b) ((s) + (a) * (b))
        #define MPF_MSUB(bits, s, a, b) ((s) - (a) * (b))
      #endif
      static inline mpf_f32v mpf_madd_f32(mpf_f32v s, mpf_f32v a, mpf_f32v b) { return MPF_MADD(ps, s, a, b); }
      static inline mpf_f64v mpf_madd_f64(mpf_f64v s, mpf_f64v a, mpf_f64v b) { return MPF_MADD(pd, s, a, b); }
      static inline mpf_f32v mpf_msub_f32(mpf_f32v s, mpf_f32v a, mpf_f32v b) { return MPF_MSUB(ps, s, a, b); }
      static inline mpf_f64v mpf_msub_f64(mpf_f64v s, mpf_f64v a, mpf_f64v b) { return MPF_MSUB(pd, s, a, b); }
      static inline mpf_f32v mpf_keep_f32(mpf_f32v w, mpf_f32v s) { return (mpf_f32v)((mpf_i32v)w & ~(mpf_i32v)(s * w < 0)); }
      static inline mpf_f64v mpf_keep_f64(mpf_f64v w, mpf_f64v s) { return (mpf_f64v)((mpf_i64v)w & ~(mpf_i64v)(s * w < 0)); }
      /* lanes of -1 and 0 from as many bytes */
      #if defined(__AVX512F__)
        static inline mpf_i32v mpf_widen_32(const signed char *b) { return (mpf_i32v)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)b)); }
        static inline mpf_i64v mpf_widen_64(const signed char *b) { return (mpf_i64v)_mm512_cvtepi8_epi64(_mm_loadl_epi64((const __m128i *)b)); }
      #elif defined(__AVX2__)
        static inline mpf_i32v mpf_widen_32(const signed char *b) { return (mpf_i32v)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)b)); }
        static inline mpf_i64v mpf_widen_64(const signed char *b) {
            int four;
            memcpy(&four, b, sizeof four);
            return (mpf_i64v)_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(four));
        }
      #else
        static inline mpf_i32v mpf_widen_32(const signed char *b) { mpf_i32v of; for (int i = 0; i < MPF_LANES(float); i++) of[i] = b[i]; return of; }
        static inline mpf_i64v mpf_widen_64(const signed char *b) { mpf_i64v of; for (int i = 0; i < MPF_LANES(double); i++) of[i] = b[i]; return of; }
      #endif
      static inline mpf_f32v mpf_where_f32(mpf_f32v g, const signed char *keep) { return (mpf_f32v)((mpf_i32v)g & mpf_widen_32(keep)); }
      static inline mpf_f64v mpf_where_f64(mpf_f64v g, const signed char *keep) { return (mpf_f64v)((mpf_i64v)g & mpf_widen_64(keep)); }
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
      typedef double mpf_f64x4 __attribute__((vector_size(32), aligned(8), may_alias));
      #define MPF_FOUR(type) { mpf_##type##x4 h = *(mpf_##type##x4 *)x, d = *c - (mpf_##type##x4){0}; \
          if (each) d = *(mpf_##type##x4 *)c; *(mpf_##type##x4 *)out = d * h; }
      #if defined(__AVX512F__)
        #define MPF_PACK  /* compressed in registers: such a store is slow on some */
        static inline int mpf_pack_f32(int *where, float *what, int first, const float *x) {
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
      static int mpf_lowest(unsigned long long bits) { int n = 0; while (!(bits >> n & 1)) n++; return n; }
      #define mpf_prefetch(p) (void)(p)
      #define MPF_LANES(type) 1
      static float mpf_fold_f32(const float *s) {
          return (((s[0] + s[8]) + (s[4] + s[12])) + ((s[2] + s[10]) + (s[6] + s[14]))) +
                 (((s[1] + s[9]) + (s[5] + s[13])) + ((s[3] + s[11]) + (s[7] + s[15])));
      }
      static double mpf_fold_f64(const double *s) { return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])); }
      typedef float mpf_f32v;
      typedef double mpf_f64v;
      #define MPF_SPREAD(vec, c) (c)
      static float mpf_madd_f32(float s, float a, float b) { return s + a * b; }
      static double mpf_madd_f64(double s, double a, double b) { return s + a * b; }
      static float mpf_msub_f32(float s, float a, float b) { return s - a * b; }
      static double mpf_msub_f64(double s, double a, double b) { return s - a * b; }
      static float mpf_keep_f32(float w, float s) { return s * w < 0 ? 0 : w; }
      static double mpf_keep_f64(double w, double s) { return s * w < 0 ? 0 : w; }
      static float mpf_where_f32(float g, const signed char *keep) { return *keep ? g : 0; }
      static double mpf_where_f64(double g, const signed char *keep) { return *keep ? g : 0; }
      #define MPF_FOUR(type) { for (int i = 0; i < 4; i++) { mpf_##type##v h = x[i], d = c[each * i]; out[i] = d * h; } }
    #endif
    /* Those of 16 numbers that are not 0, and where they are, from `first` on; how many.  `where` and `what` have room for all. */
    #define MPF_PACK_EACH { int n = 0; for (int i = 0; i < 16; i++) { where[n] = first + i; what[n] = x[i]; n += x[i] != 0; } return n; }
    #ifndef MPF_PACK
    static inline int mpf_pack_f32(int *where, float *what, int first, const float *x) MPF_PACK_EACH
    #endif
    static inline int mpf_pack_f64(int *where, double *what, int first, const double *x) MPF_PACK_EACH
    /* Of a block's four units: c each its own, or one for all. */
    static inline void mpf_times_f32(float *out, const float *x, const float *c, int each) MPF_FOUR(f32)
    static inline void mpf_times_f64(double *out, const double *x, const double *c, int each) MPF_FOUR(f64)
    #define mpf_spread_f32(c) MPF_SPREAD(mpf_f32v, c)
    #define mpf_spread_f64(c) MPF_SPREAD(mpf_f64v, c)
    enum { MPF_F32_LANES = MPF_LANES(float), MPF_F64_LANES = MPF_LANES(double) };
    """
    ctypedef float f32v "mpf_f32v"
    ctypedef double f64v "mpf_f64v"
    f32v spread_f32 "mpf_spread_f32" (float c) noexcept nogil
    f64v spread_f64 "mpf_spread_f64" (double c) noexcept nogil
    f32v madd_f32 "mpf_madd_f32" (f32v s, f32v a, f32v b) noexcept nogil
    f64v madd_f64 "mpf_madd_f64" (f64v s, f64v a, f64v b) noexcept nogil
    f32v msub_f32 "mpf_msub_f32" (f32v s, f32v a, f32v b) noexcept nogil
    f64v msub_f64 "mpf_msub_f64" (f64v s, f64v a, f64v b) noexcept nogil
    f32v keep_f32 "mpf_keep_f32" (f32v w, f32v s) noexcept nogil
    f64v keep_f64 "mpf_keep_f64" (f64v w, f64v s) noexcept nogil
    f32v where_f32 "mpf_where_f32" (f32v g, const signed char *keep) noexcept nogil
    f64v where_f64 "mpf_where_f64" (f64v g, const signed char *keep) noexcept nogil
    int lowest "mpf_lowest" (unsigned long long bits) noexcept nogil  # place of the lowest bit that is set
    void prefetch "mpf_prefetch" (const void *p) noexcept nogil  # soon to be written
    int pack_f32 "mpf_pack_f32" (int *where, float *what, int first, const float *x) noexcept nogil
    int pack_f64 "mpf_pack_f64" (int *where, double *what, int first, const double *x) noexcept nogil
    void times_f32 "mpf_times_f32" (float *out, const float *x, const float *c, bint each) noexcept nogil
    void times_f64 "mpf_times_f64" (double *out, const double *x, const double *c, bint each) noexcept nogil
    float fold_f32 "mpf_fold_f32" (const float *s) noexcept nogil  # sum of 16 lanes, by halves
    double fold_f64 "mpf_fold_f64" (const double *s) noexcept nogil  # of 8
    enum:
        F32_LANES "MPF_F32_LANES"
        F64_LANES "MPF_F64_LANES"

ctypedef fused vec:
    f32v
    f64v

ctypedef struct Tile:
    void **out             # (ROWS,) rows that are written: of W, of the gradient
    void *traces           # of the block
    void *carry            # (r,) what they count for
    Py_ssize_t rank        # 0: no traces
    Py_ssize_t stride      # Q
    void **terms           # (n_terms,) rows
    void *coef             # (n_terms, P) from the first unit of the block on
    Py_ssize_t n_terms, n_places
    # of `descend`
    Py_ssize_t n           # columns of W
    int *own               # (ROWS,) units, -1 where there is none, if W has no diagonal; or NULL
    void *sign             # (n,) or NULL
    const signed char **keep  # (ROWS,) rows of the mask, see `Model.keep`, or NULL
    void *sums             # (n,) the new rows are added to it; or NULL
    void *z                # (n,) what the new rows are multiplied with
    void *dots             # (ROWS, 64 bytes) out: lanes of these products, over whole LANES of columns
    void *tail             # (ROWS, LANES + Q) out: LANES zeros, then the gradient of the columns that are left
    void *pick             # zeros, then ones: LANES of each


ctypedef struct Renewal:
    void *traces           # (r, Q)
    void *old              # what they were: the same, or of more than two modulators a copy
    Py_ssize_t stride      # Q
    Py_ssize_t rank
    void *K                # (2, r), of the modulators at hand
    void **rows            # of terms
    const int *used        # (n_terms,) which of them count
    Py_ssize_t n_terms
    void *r0               # (., ROWS) what each row counts for in the traces of one modulator, for this unit and those after it
    void *r1               # and of the next
    void *whole0           # (Q,) what all rows together make of either, for a unit that was awake throughout; or NULL
    void *whole1


cdef enum:
    AT_ONCE = 4   # vectors of a row: eight chains of additions

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


cdef inline int pack(int *where, real *what, int first, const real *x) noexcept nogil:
    """Those of LANES numbers that are not 0, and where they are, from `first` on; how many."""
    if real is float:
        return pack_f32(where, what, first, x)
    else:
        return pack_f64(where, what, first, x)


cdef inline void times_four(real *out, const real *x, const real *c, bint each) noexcept nogil:
    """out = c x for the four units of a block; `each` has its own c."""
    if real is float:
        times_f32(out, x, c, each)
    else:
        times_f64(out, x, c, each)


cdef inline vec spread(const vec *_, const void *c, Py_ssize_t i) noexcept nogil:
    """Entry i of c in every lane; the first argument only names the type."""
    if vec is f32v:
        return spread_f32((<const float *>c)[i])
    else:
        return spread_f64((<const double *>c)[i])


cdef inline vec madd(vec s, vec a, vec b) noexcept nogil:
    """s + a b."""
    if vec is f32v:
        return madd_f32(s, a, b)
    else:
        return madd_f64(s, a, b)


cdef inline vec msub(vec s, vec a, vec b) noexcept nogil:
    """s - a b."""
    if vec is f32v:
        return msub_f32(s, a, b)
    else:
        return msub_f64(s, a, b)


cdef inline Py_ssize_t per_line(const vec *_) noexcept nogil:
    """Vectors in LANES entries."""
    return LANES // (F32_LANES if vec is f32v else F64_LANES)


cdef inline Py_ssize_t in_64_bytes(const vec *_) noexcept nogil:
    """Vectors in as many bytes."""
    return 64 // <Py_ssize_t>sizeof(vec)


cdef inline bint many(const vec *_) noexcept nogil:
    """Whether there are 32 registers, not 16, as there are of this size."""
    return sizeof(vec) == 64


cdef inline void dot_vectors(vec *s, const void *w0, const void *w1, const void *w2, const void *w3, const void *x, Py_ssize_t n_lines,
                             Py_ssize_t rows) noexcept nogil:
    """s[i] (64 bytes each) += products w_i x of 2 or of all 4 rows, line by line.

    A dot product alone waits for its own additions: several chains of them hide the wait, and x is loaded
    once for four rows.
    """
    cdef Py_ssize_t of = in_64_bytes(s), q, k
    cdef vec v
    for q in range(n_lines):
        for k in range(of):
            v = (<const vec *>x)[q * of + k]
            s[k] = madd(s[k], (<const vec *>w0)[q * of + k], v)
            s[of + k] = madd(s[of + k], (<const vec *>w1)[q * of + k], v)
            if rows > 2:
                s[2 * of + k] = madd(s[2 * of + k], (<const vec *>w2)[q * of + k], v)
                s[3 * of + k] = madd(s[3 * of + k], (<const vec *>w3)[q * of + k], v)


cdef inline void dot_lines(vec *s, const void *w0, const void *w1, const void *w2, const void *w3, const void *x,
                           const void *edge, Py_ssize_t n, Py_ssize_t first, Py_ssize_t rows) noexcept nogil:
    """`dot_vectors` from line `first` to entry n, a line's worth at least; the last line, `edge` of x, may overlap the one before."""
    cdef Py_ssize_t L = 16 if vec is f32v else 8
    cdef Py_ssize_t k, rest = (n - L) * (64 // L), begin = first * 64
    if first == 0:
        for k in range(rows * in_64_bytes(s)):
            s[k] = spread(s, &ZERO, 0)
    dot_vectors(s, <char *>w0 + begin, <char *>w1 + begin, <char *>w2 + begin, <char *>w3 + begin, <char *>x + begin, n // L - first, rows)
    if n % L:
        dot_vectors(s, <char *>w0 + rest, <char *>w1 + rest, <char *>w2 + rest, <char *>w3 + rest, edge, 1, rows)


cdef inline real fold(const real *s) noexcept nogil:
    """Sum of the lanes of one line."""
    if real is float:
        return fold_f32(s)
    else:
        return fold_f64(s)


cdef inline void dot_some(real *out, const real *w0, const real *w1, const real *w2, const real *w3, const real *x,
                          const real *edge, Py_ssize_t n, Py_ssize_t rows) noexcept nogil:
    """out[i] = w_i . x for two or four rows, the additions in the same order on every instruction set."""
    cdef Py_ssize_t L = 16 if real is float else 8
    cdef Py_ssize_t q
    cdef f32v s_f32[ROWS * LANES]
    cdef f64v s_f64[ROWS * LANES]
    cdef real r0 = 0, r1 = 0, r2 = 0, r3 = 0
    if n >= L:
        if real is float:
            dot_lines(&s_f32[0], w0, w1, w2, w3, x, edge, n, 0, rows)
            for q in range(rows):
                out[q] = fold(<real *>&s_f32[0] + L * q)
        else:
            dot_lines(&s_f64[0], w0, w1, w2, w3, x, edge, n, 0, rows)
            for q in range(rows):
                out[q] = fold(<real *>&s_f64[0] + L * q)
        return
    for q in range(n):
        r0 += w0[q] * x[q]
        r1 += w1[q] * x[q]
        if rows > 2:
            r2 += w2[q] * x[q]
            r3 += w3[q] * x[q]
    out[0], out[1] = r0, r1
    if rows > 2:
        out[2], out[3] = r2, r3


cdef void dot_rows(real *out, const real *w0, const real *w1, const real *w2, const real *w3, const real *x,
                   const real *edge, Py_ssize_t n) noexcept nogil:
    """`dot_some` of four."""
    dot_some(out, w0, w1, w2, w3, x, edge, n, ROWS)


cdef void dot_two(real *out, const real *w0, const real *w1, const real *x, const real *edge, Py_ssize_t n) noexcept nogil:
    """`dot_some` of two."""
    dot_some(out, w0, w1, w1, w1, x, edge, n, 2)


cdef void line_up(real *edge, const real *x, Py_ssize_t n) noexcept nogil:
    """The last line of x, with zeros for what is part of a whole line before it."""
    cdef Py_ssize_t L = 16 if real is float else 8
    cdef Py_ssize_t q
    for q in range(L):
        edge[q] = x[n - L + q] if q >= L - n % L else 0


cdef void matvec(real *out, const real *w, const real *x, Py_ssize_t n_rows, Py_ssize_t n) noexcept nogil:
    """out[p] = sum_q w[p, q] x[q], four rows at a time, or two; short rows column by column."""
    cdef Py_ssize_t L = 16 if real is float else 8
    cdef Py_ssize_t p = 0, q
    cdef real last[2]
    cdef real edge[16]
    if n < L:
        for p in range(n_rows):
            out[p] = w[p * n] * x[0]
        for q in range(1, n):
            for p in range(n_rows):
                out[p] += w[p * n + q] * x[q]
        return
    if n % L:
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


cdef void matvec_t(real *out, const real *w, const real *x, Py_ssize_t n_rows, Py_ssize_t n) noexcept nogil:
    """out[q] = sum_p w[p, q] x[p]; rows with x[p] = 0 (a unit at rest, an output without error) are not read."""
    cdef Py_ssize_t p
    memset(out, 0, n * sizeof(real))
    for p in range(n_rows):
        if x[p] != 0:
            axpy(out, x[p], w + p * n, n)


cdef inline void times_line(const vec *kind, void **out, void **x, const vec *w, Py_ssize_t n, Py_ssize_t n_vectors) noexcept nogil:
    """LANES columns of out[i] = x[i] w, for as many rows i as make eight chains of additions."""
    cdef Py_ssize_t of = per_line(kind), rows = max(8 // of, 1), q, i, k
    cdef vec s[LANES]
    cdef vec v[LANES]
    for i in range(rows * of):
        s[i] = spread(kind, &ZERO, 0)
    for q in range(n):
        for k in range(of):
            v[k] = w[k]
        for i in range(rows):
            for k in range(of):
                s[i * of + k] = madd(s[i * of + k], spread(kind, x[i], q), v[k])
        w += n_vectors
    for i in range(rows):
        for k in range(of):
            (<vec *>out[i])[k] = s[i * of + k]


cdef void matmul_vectors(const vec *kind, void **out, void **x, Py_ssize_t n_rows, const vec *w, Py_ssize_t n, Py_ssize_t n_lines) noexcept nogil:
    cdef Py_ssize_t of = per_line(kind), rows = max(8 // of, 1), row = 0, line, i
    cdef void *some_out[8]
    cdef void *some_x[8]
    while row < n_rows:
        for line in range(n_lines):
            for i in range(rows):  # the last row again where they do not fill a block
                some_out[i] = <vec *>out[min(row + i, n_rows - 1)] + line * of
                some_x[i] = x[min(row + i, n_rows - 1)]
            times_line(kind, some_out, some_x, w + line * of, n, n_lines * of)
        row += rows


cdef void matmul(void **out, void **x, Py_ssize_t n_rows, const real *w, Py_ssize_t n, Py_ssize_t n_lines) noexcept nogil:
    """out[i] = x[i] w for rows of n numbers; w and each out are of n_lines lines, of LANES each."""
    if real is float:
        matmul_vectors(<const f32v *>NULL, out, x, n_rows, <const f32v *>w, n, n_lines)
    else:
        matmul_vectors(<const f64v *>NULL, out, x, n_rows, <const f64v *>w, n, n_lines)


# ---------------------------------------------------------------- blocks of rows

cdef inline void combine(vec *g, void **terms, const void *coef, Py_ssize_t n_terms, Py_ssize_t n_places, const void *carry, Py_ssize_t rank,
                         const vec *R, Py_ssize_t n_vectors, Py_ssize_t q, Py_ssize_t count) noexcept nogil:
    """Vectors q .. q + count of the gradient of four units, whose rows are of so many: (count, ROWS)."""
    cdef Py_ssize_t unit = rank * n_vectors, j, c = 0, a, i, k
    cdef vec s[4 * ROWS]
    cdef vec x[4]
    cdef vec b
    for i in range(count * ROWS):
        s[i] = spread(g, &ZERO, 0)
    for j in range(n_terms):
        for k in range(count):
            x[k] = (<const vec *>terms[j])[q + k]
        for i in range(ROWS):
            b = spread(g, coef, c + i)
            for k in range(count):
                s[k * ROWS + i] = madd(s[k * ROWS + i], b, x[k])
        c += n_places
    for a in range(rank):
        b = spread(g, carry, a)
        for i in range(ROWS):
            for k in range(count):
                s[k * ROWS + i] = madd(s[k * ROWS + i], b, R[i * unit + q + k])
        R += n_vectors
    for i in range(count * ROWS):
        g[i] = s[i]


cdef inline vec keep_sign(vec w, const vec *sign) noexcept nogil:
    """0 where a weight crossed zero against its sign; a NaN stays a NaN, so that it is found in y."""
    if vec is f32v:
        return keep_f32(w, sign[0])
    else:
        return keep_f64(w, sign[0])


cdef inline vec where(vec g, const signed char *keep) noexcept nogil:
    """0 where a weight may not change."""
    if vec is f32v:
        return where_f32(g, keep)
    else:
        return where_f64(g, keep)


cdef inline void descend_one(vec *s, const Tile *it, const vec *few, Py_ssize_t n_vectors, Py_ssize_t q, Py_ssize_t rank, Py_ssize_t n_few) noexcept nogil:
    """Vector q of `descend`; `s`: where its products go, of a row and of the next so many chains apart; `few`: the coefficients
    of one or two terms, if there are no more and nothing is said of single weights."""
    cdef Py_ssize_t chains = in_64_bytes(s), i
    cdef const vec *sign
    cdef vec g[ROWS]
    cdef vec x, a, b, c, d
    if n_few:
        x = (<const vec *>it.terms[0])[q]
        g[0], g[1], g[2], g[3] = few[0] * x, few[1] * x, few[2] * x, few[3] * x
        if n_few == 2:
            x = (<const vec *>it.terms[1])[q]
            g[0], g[1], g[2], g[3] = madd(g[0], few[4], x), madd(g[1], few[5], x), madd(g[2], few[6], x), madd(g[3], few[7], x)
    else:
        combine(g, it.terms, it.coef, it.n_terms, it.n_places, it.carry, rank, <const vec *>it.traces, n_vectors, q, 1)
    if not n_few and it.keep != NULL:
        for i in range(ROWS):
            g[i] = where(g[i], it.keep[i] + q * (LANES // per_line(s)))
    a, b = (<vec *>it.out[0])[q] - g[0], (<vec *>it.out[1])[q] - g[1]
    c, d = (<vec *>it.out[2])[q] - g[2], (<vec *>it.out[3])[q] - g[3]
    if not n_few and it.sign != NULL:
        sign = <const vec *>it.sign + q
        a, b, c, d = keep_sign(a, sign), keep_sign(b, sign), keep_sign(c, sign), keep_sign(d, sign)
    if it.sums != NULL:
        (<vec *>it.sums)[q] += (a + b) + (c + d)
    (<vec *>it.out[0])[q], (<vec *>it.out[1])[q], (<vec *>it.out[2])[q], (<vec *>it.out[3])[q] = a, b, c, d
    x = (<const vec *>it.z)[q]
    s[0] = madd(s[0], a, x)
    s[chains] = madd(s[chains], b, x)
    s[2 * chains] = madd(s[2 * chains], c, x)
    s[3 * chains] = madd(s[3 * chains], d, x)


cdef inline void descend_body(const vec *kind, const Tile *given, Py_ssize_t rank, Py_ssize_t n_few) noexcept nogil:
    """What `descend` does, for a rank and, of one or two, a number of terms that the compiler knows."""
    cdef Tile copy = given[0]  # that no store can touch
    cdef const Tile *it = &copy
    cdef Py_ssize_t lanes = F32_LANES if vec is f32v else F64_LANES
    cdef Py_ssize_t of = per_line(kind), chains = in_64_bytes(kind), n_lines = it.n // LANES, n_vectors = it.stride // lanes
    cdef Py_ssize_t line, k, i, q = 0
    cdef vec *dots = <vec *>it.dots
    cdef vec *tail = <vec *>it.tail + of
    cdef void *terms[2]
    cdef void *out[ROWS]
    cdef vec few[2 * ROWS]
    cdef vec g[ROWS]
    cdef vec s[ROWS * LANES]
    for i in range(ROWS):
        out[i] = it.out[i]
    copy.out = out
    for i in range(ROWS * chains):
        s[i] = spread(kind, &ZERO, 0)
    if n_few:
        for k in range(n_few):
            terms[k] = it.terms[k]
            for i in range(ROWS):
                few[k * ROWS + i] = spread(kind, it.coef, k * it.n_places + i)
        copy.terms = terms
    for line in range(n_lines):  # written out: what lies in an array may then lie in registers
        descend_one(&s[0], it, few, n_vectors, q, rank, n_few)
        if of > 1:
            descend_one(&s[1 % chains], it, few, n_vectors, q + 1, rank, n_few)
        if of > 2:
            descend_one(&s[2 % chains], it, few, n_vectors, q + 2, rank, n_few)
            descend_one(&s[3 % chains], it, few, n_vectors, q + 3, rank, n_few)
        for k in range(4, of):
            descend_one(&s[k % chains], it, few, n_vectors, q + k, rank, n_few)
        q += of
    dots[0], dots[1], dots[2], dots[3] = s[0], s[1], s[2], s[3]
    if chains > 1:
        dots[4], dots[5], dots[6], dots[7] = s[4], s[5], s[6], s[7]
    for i in range(8, ROWS * chains):
        dots[i] = s[i]
    for q in range(q, n_vectors):
        combine(g, it.terms, it.coef, it.n_terms, it.n_places, it.carry, rank, <const vec *>it.traces, n_vectors, q, 1)
        for i in range(ROWS):
            tail[i * (n_vectors + of)] = g[i]
        tail += 1


cdef void descend_vectors(const vec *kind, const Tile *tile) noexcept nogil:
    cdef bint plain = tile.keep == NULL and tile.sign == NULL
    if tile.rank == 0 and tile.n_terms == 1 and plain:
        descend_body(kind, tile, 0, 1)
    elif tile.rank == 0 and tile.n_terms == 2 and plain:
        descend_body(kind, tile, 0, 2)
    elif tile.rank == 0:
        descend_body(kind, tile, 0, 0)
    elif tile.rank == 1:
        descend_body(kind, tile, 1, 0)
    elif tile.rank == 2:
        descend_body(kind, tile, 2, 0)
    else:
        descend_body(kind, tile, tile.rank, 0)


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
            kept[i] = (<real *>tile.out[i])[own[i]]
    if real is float:
        descend_vectors(<const f32v *>NULL, tile)
    else:
        descend_vectors(<const f64v *>NULL, tile)
    fix[0], fix[1], fix[2], fix[3] = 0, 0, 0, 0
    for i in range(ROWS if own != NULL else 0):
        if 0 <= own[i] < done:
            w = <real *>tile.out[i] + own[i]
            fix[i] = (kept[i] - w[0]) * (<const real *>tile.z)[own[i]]
            if tile.sums != NULL:
                (<real *>tile.sums)[own[i]] += kept[i] - w[0]
            w[0] = kept[i]


cdef void descend_edge(const vec *kind, const Tile *tile, Py_ssize_t rest) noexcept nogil:
    """The last `rest` columns of W by the gradient in `tail`, as its last LANES: the others by zero."""
    cdef Py_ssize_t size = sizeof(vec) // (F32_LANES if vec is f32v else F64_LANES), i, k
    cdef Py_ssize_t of = per_line(kind), width = (LANES + tile.stride) * size, last = (tile.n - LANES) * size
    cdef vec w, sum
    for k in range(of):
        sum = spread(kind, &ZERO, 0)
        for i in range(ROWS):
            w = (<vec *>(<char *>tile.tail + i * width + rest * size))[k]
            if tile.keep != NULL:
                w = where(w, tile.keep[i] + tile.n - LANES + k * (LANES // of))
            w = (<vec *>(<char *>tile.out[i] + last))[k] - w
            if tile.sign != NULL:
                w = keep_sign(w, <const vec *>(<char *>tile.sign + last) + k)
            (<vec *>(<char *>tile.out[i] + last))[k] = w
            sum += w
        if tile.sums != NULL:
            (<vec *>(<char *>tile.sums + last))[k] += sum * (<const vec *>(<char *>tile.pick + rest * size))[k]


cdef void descend_last(const Tile *tile, Py_ssize_t rest, const real *_) noexcept nogil:
    if real is float:
        descend_edge(<const f32v *>NULL, tile, rest)
    else:
        descend_edge(<const f64v *>NULL, tile, rest)


cdef inline void finish_dots(real *out, const Tile *tile, const real *fix, const real *edge) noexcept nogil:
    """out[i] = out-row i . z, of which `dots` may hold the lanes up to the last whole LANES."""
    cdef const real *w0 = <real *>tile.out[0]
    cdef const real *w1 = <real *>tile.out[1]
    cdef const real *w2 = <real *>tile.out[2]
    cdef const real *w3 = <real *>tile.out[3]
    cdef Py_ssize_t L = 16 if real is float else 8, first = tile.n // LANES * LANES // L, i
    if first == 0:
        dot_rows(out, w0, w1, w2, w3, <real *>tile.z, edge, tile.n)
        return
    if real is float:
        dot_lines(<f32v *>tile.dots, w0, w1, w2, w3, tile.z, edge, tile.n, first, ROWS)
    else:
        dot_lines(<f64v *>tile.dots, w0, w1, w2, w3, tile.z, edge, tile.n, first, ROWS)
    for i in range(ROWS):
        out[i] = fold(<real *>tile.dots + L * i) + fix[i]


cdef inline void add_some(vec *g, const Tile *it, Py_ssize_t n_vectors, Py_ssize_t q, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t i, k
    combine(g, it.terms, it.coef, it.n_terms, it.n_places, it.carry, it.rank, <const vec *>it.traces, n_vectors, q, count)
    for i in range(ROWS):
        for k in range(count):
            (<vec *>it.out[i])[q + k] += g[k * ROWS + i]


cdef void add_vectors(const vec *kind, const Tile *given) noexcept nogil:
    cdef Tile copy = given[0]  # that no store can touch
    cdef Py_ssize_t n_vectors = copy.stride // LANES * per_line(kind), q = 0
    cdef vec g[4 * ROWS]
    while many(kind) and q + 4 <= n_vectors:  # sixteen chains of additions
        add_some(&g[0], &copy, n_vectors, q, 4)
        q += 4
    while q + 2 <= n_vectors:
        add_some(&g[0], &copy, n_vectors, q, 2)
        q += 2
    if q < n_vectors:
        add_some(&g[0], &copy, n_vectors, q, 1)


cdef void add(const Tile *tile, const real *_) noexcept nogil:
    """out[i] += g[i]."""
    if real is float:
        add_vectors(<const f32v *>NULL, tile)
    else:
        add_vectors(<const f64v *>NULL, tile)


cdef inline void renew_some(const vec *kind, vec *R0, vec *R1, const Renewal *it, Py_ssize_t q, Py_ssize_t count, Py_ssize_t n_mod, Py_ssize_t r,
                            bint whole) noexcept nogil:
    """Vectors q .. q + count of `renew`: each is read and written once, however many terms there are."""
    cdef Py_ssize_t n_vectors = it.stride // (F32_LANES if vec is f32v else F64_LANES), j, n, i, c
    cdef const vec *row
    cdef const vec *old = <const vec *>it.old
    cdef vec s[AT_ONCE]
    cdef vec t[AT_ONCE]
    cdef vec x, c0, c1, zero = spread(kind, &ZERO, 0)
    for i in range(count):
        s[i] = t[i] = zero
        if whole:
            s[i], t[i] = (<const vec *>it.whole0)[q + i], (<const vec *>it.whole1)[q + i]
        for c in range(r):
            x = old[c * n_vectors + q + i]
            s[i] = madd(s[i], spread(kind, it.K, c), x)
            if n_mod == 2:
                t[i] = madd(t[i], spread(kind, it.K, r + c), x)
    for j in range(0 if whole else it.n_terms):
        n = it.used[j]
        row, c0 = <const vec *>it.rows[n] + q, spread(kind, it.r0, n * ROWS)
        if n_mod == 2:
            c1 = spread(kind, it.r1, n * ROWS)
        for i in range(count):
            x = row[i]
            s[i] = madd(s[i], c0, x)
            if n_mod == 2:
                t[i] = madd(t[i], c1, x)
    for i in range(count):
        R0[q + i] = s[i]
        if n_mod == 2:
            R1[q + i] = t[i]


cdef inline void renew_by(const vec *kind, const Renewal *given, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t a, Py_ssize_t n_mod, Py_ssize_t r,
                          bint whole) noexcept nogil:
    cdef Renewal copy = given[0]  # that no store can touch
    cdef const Renewal *it = &copy
    cdef Py_ssize_t of = per_line(kind), n_vectors = it.stride // LANES * of, q = begin * of, last = end * of
    cdef vec *R0 = <vec *>it.traces + a * n_vectors
    cdef vec *R1 = R0 + n_vectors
    while q + AT_ONCE <= last:
        renew_some(kind, R0, R1, it, q, AT_ONCE, n_mod, r, whole)
        q += AT_ONCE
    while q < last:
        renew_some(kind, R0, R1, it, q, 1, n_mod, r, whole)
        q += 1


cdef inline void renew_vectors(const vec *kind, const Renewal *it, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t a) noexcept nogil:
    if it.whole0 != NULL:
        renew_by(kind, it, begin, end, a, 2, it.rank, True)
    elif it.rank == 2:
        renew_by(kind, it, begin, end, a, 2, 2, False)
    elif it.rank - a > 1:
        renew_by(kind, it, begin, end, a, 2, it.rank, False)
    else:
        renew_by(kind, it, begin, end, a, 1, it.rank, False)


cdef inline void renew(const Renewal *it, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t a, const real *_) noexcept nogil:
    """From line to line, of one unit: modulators a and, if there is one, a + 1."""
    if real is float:
        renew_vectors(<const f32v *>NULL, it, begin, end, a)
    else:
        renew_vectors(<const f64v *>NULL, it, begin, end, a)
