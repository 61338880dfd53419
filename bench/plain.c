/* One learned step of ModProp in plain C, float32, relu, two cell types: what a careful programmer writes by hand.
 *
 * The yardstick of bench_step.py: the same arithmetic as the engine, SGD at every step, the type means
 * followed at every update. factor: 0 e-prop, 1 exact, 2 mean. Shapes as in the library; all arrays zeroed.
 */
#include <string.h>

#define R 2

typedef struct {
    long n, n_in, n_out, factor;
    float leak, lr, mu;
    const int *type;                              /* (n,) 0 or 1 */
    float *w, *w_in, *w_out, *b_out;              /* (n, n) (n, n_in) (n_out, n) (n_out) */
    float *v, *z, *h, *h_before;                  /* (n,) */
    float *eps, *eps_before;                      /* (n + n_in,) */
    float *trace;                                 /* exact: (n, R, n + n_in)   mean: (R, R, n + n_in) */
    float *local, *row, *rows, *sums;             /* (n,) (n + n_in) (R, n + n_in) (R, n) */
    float *K, *means;                             /* (R, R) */
} Plain;

static float dot(const float *restrict a, const float *restrict b, long n) {
    float s[16] = {0}, total = 0;
    long q = 0;
    for (; q + 16 <= n; q += 16)
        for (int j = 0; j < 16; j++) s[j] += a[q + j] * b[q + j];
    for (; q < n; q++) total += a[q] * b[q];
    for (int j = 0; j < 16; j++) total += s[j];
    return total;
}

static void follow(Plain *s) {
    float count[R] = {0};
    for (long p = 0; p < s->n; p++) count[s->type[p]] += 1;
    memset(s->means, 0, R * R * sizeof(float));
    for (int a = 0; a < R; a++)
        for (long q = 0; q < s->n; q++) s->means[a * R + s->type[q]] += s->sums[a * s->n + q];
    for (int a = 0; a < R; a++)
        for (int b = 0; b < R; b++) {
            s->means[a * R + b] /= count[a] * count[b];
            s->K[a * R + b] = (a == b ? s->leak : 0) + (1 - s->leak) * s->means[a * R + b] * count[b] * s->mu;
        }
}

void plain_refresh(Plain *s) {
    memset(s->sums, 0, R * s->n * sizeof(float));
    for (long p = 0; p < s->n; p++)
        for (long q = 0; q < s->n; q++) s->sums[s->type[p] * s->n + q] += s->w[p * s->n + q];
    follow(s);
}

/* T0, T1 = K (T0, T1) + d eps;  out = m0 T0 + m1 T1 */
static void filter(float *restrict t0, float *restrict t1, float *restrict out, const float *restrict eps, const float *K,
                   const float *d, const float *m, long n) {
    const float k00 = K[0], k01 = K[1], k10 = K[2], k11 = K[3], d0 = d[0], d1 = d[1], m0 = m[0], m1 = m[1];
    for (long q = 0; q < n; q++) {
        const float a = d0 * eps[q] + k00 * t0[q] + k01 * t1[q], b = d1 * eps[q] + k10 * t0[q] + k11 * t1[q];
        t0[q] = a;
        t1[q] = b;
        out[q] = m0 * a + m1 * b;
    }
}

static void descend(float *restrict w, float *restrict sums, const float *restrict eps, const float *restrict rest, float local,
                    float lr, long n) {
    for (long q = 0; q < n; q++) {
        w[q] -= lr * (local * eps[q] + rest[q]);
        sums[q] += w[q];
    }
}

static void step(Plain *s, const float *x, const float *target) {
    const long n = s->n, n_in = s->n_in, n_out = s->n_out, m = n + n_in;
    const float k = s->leak, take = 1 - s->leak;
    float error[16], modulator[R] = {0};
    memcpy(s->h_before, s->h, n * sizeof(float));
    memcpy(s->eps_before, s->eps, m * sizeof(float));
    for (long q = 0; q < n; q++) s->eps[q] = k * s->eps[q] + take * s->z[q];
    for (long q = 0; q < n_in; q++) s->eps[n + q] = k * s->eps[n + q] + take * x[q];
    for (long p = 0; p < n; p++) s->v[p] = k * s->v[p] + take * (dot(s->w + p * n, s->z, n) + dot(s->w_in + p * n_in, x, n_in));
    for (long p = 0; p < n; p++) {
        s->h[p] = s->v[p] > 0;
        s->z[p] = s->v[p] > 0 ? s->v[p] : 0;
    }
    for (long o = 0; o < n_out; o++) error[o] = (dot(s->w_out + o * n, s->z, n) + s->b_out[o] - target[o]) / n_out;
    memset(s->local, 0, n * sizeof(float));
    for (long o = 0; o < n_out; o++)
        for (long p = 0; p < n; p++) s->local[p] += error[o] * s->w_out[o * n + p] * s->h[p];
    for (long p = 0; p < n; p++) modulator[s->type[p]] += s->local[p];
    memset(s->sums, 0, R * n * sizeof(float));
    if (s->factor == 2)
        for (int c = 0; c < R; c++) {
            const float d[R] = {take * s->means[c] * s->mu, take * s->means[R + c] * s->mu};
            filter(s->trace + c * R * m, s->trace + (c * R + 1) * m, s->rows + c * m, s->eps_before, s->K, d, modulator, m);
        }
    for (long p = 0; p < n; p++) {
        const int b = s->type[p];
        const float *rest = s->rows + b * m;
        float own = s->w[p * n + p], *sums = s->sums + b * n;
        if (s->factor == 0 && s->local[p] == 0) continue;
        if (s->factor == 1) {
            const float f = take * s->h_before[p], d[R] = {f * s->means[b], f * s->means[R + b]};
            filter(s->trace + p * R * m, s->trace + (p * R + 1) * m, s->row, s->eps_before, s->K, d, modulator, m);
            rest = s->row;
        }
        const float own_sum = sums[p];
        descend(s->w + p * n, sums, s->eps, rest, s->local[p], s->lr, n);
        s->w[p * n + p] = own;
        sums[p] = own_sum + own;
        for (long q = 0; q < n_in; q++) s->w_in[p * n_in + q] -= s->lr * (s->local[p] * s->eps[n + q] + rest[n + q]);
    }
    for (long o = 0; o < n_out; o++) {
        for (long p = 0; p < n; p++) s->w_out[o * n + p] -= s->lr * error[o] * s->z[p];
        s->b_out[o] -= s->lr * error[o];
    }
    if (s->factor) follow(s);
}

void plain_run(Plain *s, const float *x, const float *target, long steps) {
    for (long t = 0; t < steps; t++) step(s, x + t * s->n_in, target + t * s->n_out);
}
