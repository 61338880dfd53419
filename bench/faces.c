/* A loop of single steps, for bench_faces.py. */
#include "modprop_fast.h"

int loop(const mpf_api *mpf, mpf_learner *learner, size_t n, const float *x, size_t n_in, const float *target, size_t n_out) {
    float y[64];
    size_t t;
    int code = MPF_OK;
    for (t = 0; t < n && code == MPF_OK; t++)
        code = mpf->mpf_step(learner, x + t * n_in, n_in * sizeof *x, target + t * n_out, n_out * sizeof *target, 1, y,
                             n_out * sizeof *y);
    return code;
}
