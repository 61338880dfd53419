/* What memory gives: the loops of bench_limit.py, over arrays of n floats, `passes` times. */
#include "vector.h"
#define V (BYTES / 4)
typedef float vec __attribute__((vector_size(BYTES), aligned(4), may_alias));
#define AT(p) (*(vec *)(p))

/* gcc -O3 would make one pass of two: what is in memory may be another's between them. */
static inline int again(void) {
    __asm__ volatile("" ::: "memory");
    return 1;
}

void triad(float *a, const float *b, const float *c, long n, long passes) {
    for (long k = 0; k < passes && again(); k++)
        for (long q = 0; q + V <= n; q += V) AT(a + q) = AT(b + q) + 1e-3f * AT(c + q);
}

float read_only(const float *a, long n, long passes) {
    vec s[8] = {{0}};
    float total = 0;
    for (long k = 0; k < passes && again(); k++) {
        long q = 0;
        for (; q + 8 * V <= n; q += 8 * V) {
            s[0] += AT(a + q), s[1] += AT(a + q + V), s[2] += AT(a + q + 2 * V), s[3] += AT(a + q + 3 * V);
            s[4] += AT(a + q + 4 * V), s[5] += AT(a + q + 5 * V), s[6] += AT(a + q + 6 * V), s[7] += AT(a + q + 7 * V);
        }
        for (; q + V <= n; q += V) s[0] += AT(a + q);
    }
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < V; j++) total += s[i][j];
    return total;
}

void read_modify_write(float *a, long n, long passes) {
    for (long k = 0; k < passes && again(); k++)
        for (long q = 0; q + V <= n; q += V) AT(a + q) = 0.999f * AT(a + q) + 1e-3f;
}

/* w -= u x^T, (n, n) */
void rank_one(float *w, const float *u, const float *x, long n, long passes) {
    for (long k = 0; k < passes && again(); k++)
        for (long p = 0; p < n; p++)
            for (long q = 0; q < n; q++) w[p * n + q] -= u[p] * x[q];
}
