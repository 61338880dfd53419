/* exp(x) and exp(x) - 1 for x <= 0, and log(1 + e) for 0 <= e <= 1, with neither a branch nor a call, so that compilers make
   vectors of loops over them.

   x = n ln 2 + r with |r| <= ln 2 / 2; p = exp(r) - 1 by its series; then exp(x) = 2^n (1 + p), exp(x) - 1 = (2^n - 1) + 2^n p.
   n is rounded to an integer by adding a number whose last digit counts ones, which leaves it in the low bits; ln 2 is taken
   off in two parts, the product of n with the first of them exact. Where exp(x) would be subnormal it is 0.
   log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3, by its series.
   To within 3 units in the last place, in the same bits on every instruction set (the build contracts no products and sums);
   a NaN stays. */

#ifndef MPF_EXPONENTIAL_H
#define MPF_EXPONENTIAL_H
#include <stdint.h>

#if MPF_BITS == 32
typedef uint32_t mpf_digits;
enum { MPF_BIAS = 127, MPF_SHIFT = 23 };
static const float mpf_least = -87.f, mpf_ones = 12582912.f, mpf_ln2 = 0.693359375f, mpf_rest = -2.12194440e-4f;
static inline float mpf_series(float r) {
    return r + r * r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f))))));
}
static inline float mpf_log1p(float e) {
    float s = e / (2 + e), q = s * s;
    return 2 * s * (1 + q * (1 / 3.f + q * (1 / 5.f + q * (1 / 7.f + q * (1 / 9.f + q * (1 / 11.f + q * (1 / 13.f + q * (1 / 15.f))))))));
}
#else
typedef uint64_t mpf_digits;
enum { MPF_BIAS = 1023, MPF_SHIFT = 52 };
static const double mpf_least = -708., mpf_ones = 6755399441055744., mpf_ln2 = 6.93147180369123816490e-01, mpf_rest = 1.90821492927058770002e-10;
static inline double mpf_series(double r) {
    return r + r * r * (1 / 2. + r * (1 / 6. + r * (1 / 24. + r * (1 / 120. + r * (1 / 720. + r * (1 / 5040. + r * (1 / 40320.
        + r * (1 / 362880. + r * (1 / 3628800. + r * (1 / 39916800. + r * (1 / 479001600. + r * (1 / 6227020800.))))))))))));
}
static inline double mpf_log1p(double e) {
    double s = e / (2 + e), q = s * s;
    return 2 * s * (1 + q * (1 / 3. + q * (1 / 5. + q * (1 / 7. + q * (1 / 9. + q * (1 / 11. + q * (1 / 13. + q * (1 / 15.
        + q * (1 / 17. + q * (1 / 19. + q * (1 / 21. + q * (1 / 23. + q * (1 / 25. + q * (1 / 27. + q * (1 / 29. + q * (1 / 31.
        + q * (1 / 33.)))))))))))))))));
}
#endif

static inline mpf_real mpf_exp(mpf_real x, mpf_real *less_one) {
    union { mpf_real number; mpf_digits digits; } t, power;
    mpf_real within = x < mpf_least ? mpf_least : x, n, p;
    t.number = within * (mpf_real)1.4426950408889634 + mpf_ones;
    n = t.number - mpf_ones;
    p = mpf_series((within - n * mpf_ln2) - n * mpf_rest);
    power.digits = (t.digits + MPF_BIAS) << MPF_SHIFT;
    power.number = x < mpf_least ? 0 : power.number;
    *less_one = (power.number - 1) + power.number * p;
    return power.number * (1 + p);
}
#endif
