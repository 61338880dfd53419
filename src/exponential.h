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

static inline float mpf_series_f32(float r) {
    return r + r * r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f))))));
}

static inline double mpf_series_f64(double r) {
    return r + r * r * (1 / 2. + r * (1 / 6. + r * (1 / 24. + r * (1 / 120. + r * (1 / 720. + r * (1 / 5040. + r * (1 / 40320.
        + r * (1 / 362880. + r * (1 / 3628800. + r * (1 / 39916800. + r * (1 / 479001600. + r * (1 / 6227020800.))))))))))));
}

static inline float mpf_log1p_f32(float e) {
    float s = e / (2 + e), q = s * s;
    return 2 * s * (1 + q * (1 / 3.f + q * (1 / 5.f + q * (1 / 7.f + q * (1 / 9.f + q * (1 / 11.f + q * (1 / 13.f + q * (1 / 15.f))))))));
}

static inline double mpf_log1p_f64(double e) {
    double s = e / (2 + e), q = s * s;
    return 2 * s * (1 + q * (1 / 3. + q * (1 / 5. + q * (1 / 7. + q * (1 / 9. + q * (1 / 11. + q * (1 / 13. + q * (1 / 15.
        + q * (1 / 17. + q * (1 / 19. + q * (1 / 21. + q * (1 / 23. + q * (1 / 25. + q * (1 / 27. + q * (1 / 29. + q * (1 / 31.
        + q * (1 / 33.)))))))))))))))));
}

#define MPF_EXPONENTIAL(suffix, real, bits, least, ones, ln2, rest, bias, shift)                     \
    static inline real mpf_exp_##suffix(real x, real *less_one) {                                    \
        union { real number; bits digits; } t, power;                                                \
        real within = x < least ? least : x, n, p;                                                   \
        t.number = within * (real)1.4426950408889634 + ones;                                         \
        n = t.number - ones;                                                                         \
        p = mpf_series_##suffix((within - n * ln2) - n * rest);                                      \
        power.digits = (t.digits + bias) << shift;                                                   \
        power.number = x < least ? 0 : power.number;                                                 \
        *less_one = (power.number - 1) + power.number * p;                                           \
        return power.number * (1 + p);                                                               \
    }

MPF_EXPONENTIAL(f32, float, uint32_t, -87.f, 12582912.f, 0.693359375f, -2.12194440e-4f, 127, 23)
MPF_EXPONENTIAL(f64, double, uint64_t, -708., 6755399441055744., 6.93147180369123816490e-01, 1.90821492927058770002e-10, 1023, 52)
#endif
