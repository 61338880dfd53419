/* What memory gives: the loops of bench_limit.py, over arrays of n floats, `passes` times. */
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
#define AT(p) (*(vec *)(p))

void triad(float *a, const float *b, const float *c, long n, long passes) {
    for (long k = 0; k < passes; k++)
        for (long q = 0; q + 16 <= n; q += 16) AT(a + q) = AT(b + q) + 1e-3f * AT(c + q);
}

float read_only(const float *a, long n, long passes) {
    vec s[8] = {{0}};
    float total = 0;
    for (long k = 0; k < passes; k++) {
        long q = 0;
        for (; q + 128 <= n; q += 128) {
            s[0] += AT(a + q), s[1] += AT(a + q + 16), s[2] += AT(a + q + 32), s[3] += AT(a + q + 48);
            s[4] += AT(a + q + 64), s[5] += AT(a + q + 80), s[6] += AT(a + q + 96), s[7] += AT(a + q + 112);
        }
        for (; q + 16 <= n; q += 16) s[0] += AT(a + q);
    }
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 16; j++) total += s[i][j];
    return total;
}

void read_modify_write(float *a, long n, long passes) {
    for (long k = 0; k < passes; k++)
        for (long q = 0; q + 16 <= n; q += 16) AT(a + q) = 0.999f * AT(a + q) + 1e-3f;
}

/* w -= u x^T, (n, n) */
void rank_one(float *w, const float *u, const float *x, long n, long passes) {
    for (long k = 0; k < passes; k++)
        for (long p = 0; p < n; p++)
            for (long q = 0; q < n; q++) w[p * n + q] -= u[p] * x[q];
}
