/* One learned step of ModProp in plain C, relu, two cell types: what a careful programmer writes by hand:
 * every matrix is passed over once, and that pass leaves W z for the next step.
 *
 * A yardstick of bench_step.py: the same arithmetic as the engine, SGD at every step, the type means
 * followed at every update. factor: 0 e-prop, 1 exact, 2 mean. Shapes as in the library; all arrays zeroed.
 * Compiled with -march=native, and with -Dreal=double for float64.
 */
#include "vector.h"
#include <string.h>

#ifndef real
#define real float
#endif
#define R 2
#define LANES (BYTES / (long)sizeof(real))
#define GAP (17 * 64 / (long)sizeof(real)) /* keeps large arrays out of each other's cache sets */
#define AT(p) (*(vec *)(p))
typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

typedef struct {
    long n, n_in, n_out, factor;
    real leak, lr, mu;
    const int *type;                              /* (n,) 0 or 1 */
    real *w, *w_in, *w_out, *b_out;               /* (n, n) (n_in, n): by columns (n_out, n) (n_out) */
    real *v, *z, *h, *h_before;                   /* (n,) */
    real *eps, *eps_before, *eps_in;              /* (n,) (n,) (n_in,) */
    real *trace, *trace_in;                       /* exact: R times (n, n), GAP apart; mean: (R, R, n)   (n_in, R, n) */
    real *current, *local, *rows, *sums, *drive;  /* (n,) (n,) (R, n) (R, n) (R, n); current: W z, for the next step */
    real *K, *means;                              /* (R, R) */
} Plain;

static real sum(vec s) {
    real total = 0;
    for (int j = 0; j < LANES; j++) total += s[j];
    return total;
}

/* Four accumulators: with one, every addition waits for the one before. */
static real dot(const real *a, const real *b, long n) {
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    real total = 0;
    long q = 0;
    for (; q + 4 * LANES <= n; q += 4 * LANES) {
        s0 += AT(a + q) * AT(b + q);
        s1 += AT(a + q + LANES) * AT(b + q + LANES);
        s2 += AT(a + q + 2 * LANES) * AT(b + q + 2 * LANES);
        s3 += AT(a + q + 3 * LANES) * AT(b + q + 3 * LANES);
    }
    for (; q + LANES <= n; q += LANES) s0 += AT(a + q) * AT(b + q);
    for (; q < n; q++) total += a[q] * b[q];
    return total + sum((s0 + s1) + (s2 + s3));
}

static void follow(Plain *s) {
    real count[R] = {0};
    for (long p = 0; p < s->n; p++) count[s->type[p]] += 1;
    memset(s->means, 0, R * R * sizeof(real));
    for (int a = 0; a < R; a++)
        for (long q = 0; q < s->n; q++) s->means[a * R + s->type[q]] += s->sums[a * s->n + q];
    for (int a = 0; a < R; a++)
        for (int b = 0; b < R; b++) {
            s->means[a * R + b] /= count[a] * count[b];
            s->K[a * R + b] = (a == b ? s->leak : 0) + (1 - s->leak) * s->means[a * R + b] * count[b] * s->mu;
        }
}

void plain_refresh(Plain *s) {
    memset(s->sums, 0, R * s->n * sizeof(real));
    for (long p = 0; p < s->n; p++)
        for (long q = 0; q < s->n; q++) s->sums[s->type[p] * s->n + q] += s->w[p * s->n + q];
    follow(s);
}

/* T0, T1 = K (T0, T1) + d eps;  out = m0 T0 + m1 T1 */
static void filter(real *restrict t0, real *restrict t1, real *restrict out, const real *restrict eps, const real *K,
                   const real *d, const real *m, long n) {
    const real k00 = K[0], k01 = K[1], k10 = K[2], k11 = K[3], d0 = d[0], d1 = d[1], m0 = m[0], m1 = m[1];
    for (long q = 0; q < n; q++) {
        const real a = d0 * eps[q] + k00 * t0[q] + k01 * t1[q], b = d1 * eps[q] + k10 * t0[q] + k11 * t1[q];
        t0[q] = a;
        t1[q] = b;
        out[q] = m0 * a + m1 * b;
    }
}

/* One pass over a row: w -= lr (local eps + rest), sums += w; returns w . z, of which the next step is made.
 * Inlined, so that e-prop, for which rest and sums are NULL, pays for neither. */
static inline __attribute__((always_inline)) real descend(real *w, real *sums, const real *eps, const real *rest,
                                                         const real *z, real local, real lr, long n) {
    vec s = {0};
    real total = 0;
    long q = 0;
    for (; q + LANES <= n; q += LANES) {
        vec to = local * AT(eps + q);
        if (rest) to += AT(rest + q);
        to = AT(w + q) - lr * to;
        AT(w + q) = to;
        if (sums) AT(sums + q) += to;
        s += to * AT(z + q);
    }
    for (; q < n; q++) {
        w[q] -= lr * (local * eps[q] + (rest ? rest[q] : 0));
        if (sums) sums[q] += w[q];
        total += w[q] * z[q];
    }
    return total + sum(s);
}

/* `filter` and `descend` in one pass. */
#define BODY(type, at)                                                                 \
    const type r0 = at(t0 + q), r1 = at(t1 + q), e = at(eps_before + q);               \
    const type a = d0 * e + k00 * r0 + k01 * r1, b = d1 * e + k10 * r0 + k11 * r1;     \
    const type to = at(w + q) - lr * (local * at(eps + q) + m0 * a + m1 * b);          \
    at(t0 + q) = a, at(t1 + q) = b, at(w + q) = to, at(sums + q) += to;
#define ONE(p) (*(p))
static real filter_and_descend(real *w, real *sums, real *t0, real *t1, const real *eps, const real *eps_before, const real *z,
                               const real *K, const real *d, const real *m, real local, real lr, long n) {
    const real k00 = K[0], k01 = K[1], k10 = K[2], k11 = K[3], d0 = d[0], d1 = d[1], m0 = m[0], m1 = m[1];
    vec s = {0};
    real total = 0;
    long q = 0;
    for (; q + LANES <= n; q += LANES) {
        BODY(vec, AT)
        s += to * AT(z + q);
    }
    for (; q < n; q++) {
        BODY(real, ONE)
        total += to * z[q];
    }
    return total + sum(s);
}

/* W_in by columns: a row of two weights is all overhead. */
static void learn_input(Plain *s, real eps, real eps_before, real *restrict w, real *restrict t0, real *restrict t1, const real *m) {
    const real *restrict drive = s->drive, *restrict local = s->local;
    const real k00 = s->K[0], k01 = s->K[1], k10 = s->K[2], k11 = s->K[3], m0 = m[0], m1 = m[1], lr = s->lr;
    const long n = s->n;
    for (long p = 0; p < n; p++) {
        const real a = drive[p] * eps_before + k00 * t0[p] + k01 * t1[p], b = drive[n + p] * eps_before + k10 * t0[p] + k11 * t1[p];
        t0[p] = a;
        t1[p] = b;
        w[p] -= lr * (local[p] * eps + m0 * a + m1 * b);
    }
}

static void step(Plain *s, const real *x, const real *target) {
    const long n = s->n, n_in = s->n_in, n_out = s->n_out;
    const real k = s->leak, take = 1 - s->leak;
    real error[16], modulator[R] = {0};
    memcpy(s->h_before, s->h, n * sizeof(real));
    memcpy(s->eps_before, s->eps, n * sizeof(real));
    for (long q = 0; q < n; q++) s->eps[q] = k * s->eps[q] + take * s->z[q];
    for (long i = 0; i < n_in; i++)
        for (long p = 0; p < n; p++) s->current[p] += s->w_in[i * n + p] * x[i];
    for (long p = 0; p < n; p++) {
        s->v[p] = k * s->v[p] + take * s->current[p];
        s->h[p] = s->v[p] > 0;
        s->z[p] = s->v[p] > 0 ? s->v[p] : 0;
    }
    for (long o = 0; o < n_out; o++) error[o] = (dot(s->w_out + o * n, s->z, n) + s->b_out[o] - target[o]) / n_out;
    memset(s->local, 0, n * sizeof(real));
    for (long o = 0; o < n_out; o++)
        for (long p = 0; p < n; p++) s->local[p] += error[o] * s->w_out[o * n + p] * s->h[p];
    for (long p = 0; p < n; p++) modulator[s->type[p]] += s->local[p];
    for (int a = 0; a < R; a++)
        for (long p = 0; p < n; p++)
            s->drive[a * n + p] = take * s->means[a * R + s->type[p]] * (s->factor == 1 ? s->h_before[p] : s->mu);
    memset(s->sums, 0, R * n * sizeof(real));
    if (s->factor == 2)
        for (int c = 0; c < R; c++) {
            const real d[R] = {take * s->means[c] * s->mu, take * s->means[R + c] * s->mu};
            filter(s->trace + c * R * n, s->trace + (c * R + 1) * n, s->rows + c * n, s->eps_before, s->K, d, modulator, n);
        }
    for (long p = 0; p < n; p++) {
        const int b = s->type[p];
        real *w = s->w + p * n, *sums = s->sums + b * n, *t0 = s->trace + p * n, *t1 = t0 + n * n + GAP;
        const real own = w[p], own_sum = sums[p], local = s->local[p], d[R] = {s->drive[p], s->drive[n + p]};
        real current;
        if (s->factor == 0 && local == 0) {
            s->current[p] = dot(w, s->z, n);
            continue;
        }
        if (s->factor == 0)
            current = descend(w, NULL, s->eps, NULL, s->z, local, s->lr, n);
        else if (s->factor == 1)
            current = filter_and_descend(w, sums, t0, t1, s->eps, s->eps_before, s->z, s->K, d, modulator, local, s->lr, n);
        else
            current = descend(w, sums, s->eps, s->rows + b * n, s->z, local, s->lr, n);
        s->current[p] = current + (own - w[p]) * s->z[p];
        w[p] = own;
        sums[p] = own_sum + own;
    }
    for (long i = 0; i < n_in; i++) {
        real *t0 = s->trace_in + i * R * n;
        const real eps = s->eps_in[i];
        s->eps_in[i] = k * eps + take * x[i];
        learn_input(s, s->eps_in[i], eps, s->w_in + i * n, t0, t0 + n, s->factor ? modulator : (const real[R]){0});
    }
    for (long o = 0; o < n_out; o++) {
        for (long p = 0; p < n; p++) s->w_out[o * n + p] -= s->lr * error[o] * s->z[p];
        s->b_out[o] -= s->lr * error[o];
    }
    if (s->factor) follow(s);
}

void plain_run(Plain *s, const real *x, const real *target, long steps) {
    for (long t = 0; t < steps; t++) step(s, x + t * s->n_in, target + t * s->n_out);
}
