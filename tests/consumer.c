/* A host written from modprop_fast.h alone, in C89 that is C++ too.  c_face.py compiles it and says what comes out. */
#include <string.h>

#include "modprop_fast.h"

#ifdef __cplusplus
extern "C" {
#endif

void *PyCapsule_Import(const char *name, int no_block);
const mpf_api *fetch(void);
int learn(const mpf_config *config, size_t n_iterations, size_t n_trials, size_t n_steps, const float *x, const int *labels,
          float *arrays, double *loss);
int refused(int *line, int *got);
int adopt(void *object, mpf_learner **out);
int steps(mpf_learner *learner, size_t n_steps, const float *x, const float *targets, float *y);
int update(mpf_learner *learner);
int destroy(mpf_learner *learner);
const char *sentence(void);

static const mpf_api *mpf;

/* The capsule; called with the GIL. */
const mpf_api *fetch(void) {
    mpf = (const mpf_api *)PyCapsule_Import(MPF_CAPSULE, 0);
    return mpf != NULL && MPF_FITS(mpf) ? mpf : NULL;
}

static int all_arrays(mpf_learner *learner, float *arrays) {
    const char *name;
    size_t i, bytes, at = 0;
    int code;
    for (i = 0; mpf->mpf_array(learner, i, &name, &bytes) == MPF_OK; i++) {
        if ((code = mpf->mpf_get(learner, name, arrays + at, bytes)) != MPF_OK) return code;
        at += bytes / sizeof(float);
    }
    return MPF_OK;
}

/* Trials of one class each, known at the last step: by mpf_run_labels and one mpf_apply for each iteration, or, with
   update "step", by mpf_step_label.  Leaves the sum of the losses of each iteration, and all arrays one after the other. */
int learn(const mpf_config *config, size_t n_iterations, size_t n_trials, size_t n_steps, const float *x, const int *labels,
          float *arrays, double *loss) {
    unsigned char mask[4096] = {0};
    mpf_learner *learner;
    size_t i, k, t;
    double one;
    const size_t n_in = (size_t)config->mpf_n_in;
    const int by_step = strcmp(config->mpf_update, "step") == 0;
    int code = mpf->mpf_create(config, &learner);
    mask[n_steps - 1] = 1;
    for (i = 0; code == MPF_OK && i < n_iterations; i++) {
        loss[i] = 0;
        for (k = i * n_trials; code == MPF_OK && k < (i + 1) * n_trials; k++) {
            code = mpf->mpf_reset(learner);
            if (!by_step && code == MPF_OK) {
                int repeated[4096];
                for (t = 0; t < n_steps; t++) repeated[t] = labels[k];
                code = mpf->mpf_run_labels(learner, n_steps, x + k * n_steps * n_in, n_steps * n_in * sizeof(float), repeated,
                                           n_steps * sizeof(int), mask, n_steps, 1, NULL, 0);
            }
            for (t = 0; by_step && code == MPF_OK && t < n_steps; t++) {
                const float *now = x + (k * n_steps + t) * n_in;
                if (t < n_steps - 1) code = mpf->mpf_step(learner, now, n_in * sizeof(float), NULL, 0, 0, NULL, 0);
                else code = mpf->mpf_step_label(learner, now, n_in * sizeof(float), labels[k], 1, NULL, 0);
            }
            mpf->mpf_loss(learner, &one);
            loss[i] += one;
        }
        if (!by_step && code == MPF_OK) code = mpf->mpf_apply(learner);
    }
    if (code == MPF_OK) code = all_arrays(learner, arrays);
    mpf->mpf_destroy(learner);
    return code;
}

/* Single calls, for a network of 2 inputs and 3 outputs. */
int adopt(void *object, mpf_learner **out) { return mpf->mpf_adopt(object, out); }
int steps(mpf_learner *learner, size_t n_steps, const float *x, const float *targets, float *y) {
    const size_t width = n_steps * sizeof(float);
    return mpf->mpf_run(learner, n_steps, x, 2 * width, targets, 3 * width, NULL, 0, 1, y, 3 * width);
}
int update(mpf_learner *learner) { return mpf->mpf_apply(learner); }
int destroy(mpf_learner *learner) { return mpf->mpf_destroy(learner); }
const char *sentence(void) { return mpf->mpf_last_error(); }

/* What must be refused, each with its code and a word of its sentence: 0, or the line that was not and what it returned. */
#define REFUSED(code, word, call)                                              \
    *line = __LINE__;                                                          \
    *got = (call);                                                             \
    if (*got != (code) || !strstr(mpf->mpf_last_error(), word)) return 1
#define DONE(call)                                                             \
    *line = __LINE__;                                                          \
    *got = (call);                                                             \
    if (*got != MPF_OK) return 1

int refused(int *line, int *got) {
    mpf_config config;
    mpf_learner *one = NULL, *two;
    float x[2] = {0.5f, -0.5f}, y[3], bad[3] = {0, 0, 0}, w[25];
    const float target[3] = {1, 0, 1};
    const char *name;
    size_t bytes;
    double loss;
    int labels[4] = {0, 1, 2, 0};
    void *object;
    mpf_api older = *mpf;
    bad[1] = (float)(1e300 * 1e300);

    older.mpf_size -= sizeof(void *);
    *line = __LINE__;
    if (!MPF_FITS(mpf) || MPF_FITS(&older)) return 1;
    REFUSED(MPF_NULL, "null", mpf->mpf_defaults(NULL, sizeof config));
    REFUSED(MPF_STRUCT, "bytes, got 8", mpf->mpf_defaults(&config, 8));
    DONE(mpf->mpf_defaults(&config, sizeof config));
    REFUSED(MPF_VALUE, "n_in: expected an integer >= 1, got 0", mpf->mpf_create(&config, &one));
    config.mpf_n_in = 2, config.mpf_n_rec = 5, config.mpf_n_out = 3;
    REFUSED(MPF_NULL, "null", mpf->mpf_create(&config, NULL));
    REFUSED(MPF_NULL, "null", mpf->mpf_create(NULL, &one));
    config.mpf_version = MPF_VERSION + 1;
    REFUSED(MPF_STRUCT, "version 1, got 2", mpf->mpf_create(&config, &one));
    config.mpf_version = MPF_VERSION, config.mpf_size = sizeof config + 8;
    REFUSED(MPF_STRUCT, "create: expected a config of", mpf->mpf_create(&config, &one));
    config.mpf_size = 16;
    REFUSED(MPF_STRUCT, "got 16", mpf->mpf_create(&config, &one));
    config.mpf_size = sizeof config, config.mpf_rule = "nonsense";
    REFUSED(MPF_VALUE, "rule: expected one of", mpf->mpf_create(&config, &one));
    config.mpf_rule = "bptt";
    REFUSED(MPF_VALUE, "BPTT needs the whole trial", mpf->mpf_create(&config, &one));
    config.mpf_rule = "modprop(mu=auto)";
    REFUSED(MPF_VALUE, "adopt", mpf->mpf_create(&config, &one));
    config.mpf_rule = NULL;
    REFUSED(MPF_VALUE, "rule: expected a text, got a null pointer", mpf->mpf_create(&config, &one));
    config.mpf_rule = "modprop", config.mpf_n_types = 2;
    REFUSED(MPF_VALUE, "type_counts", mpf->mpf_create(&config, &one));
    config.mpf_n_types = 6;
    REFUSED(MPF_VALUE, "n_types: expected 1 to n_rec = 5, got 6", mpf->mpf_create(&config, &one));
    config.mpf_n_types = 1;
    if (one != NULL) return 1;
    REFUSED(MPF_NULL, "null", mpf->mpf_adopt(NULL, &one));

    REFUSED(MPF_NULL, "step: expected a learner", mpf->mpf_step(NULL, x, sizeof x, NULL, 0, 1, y, sizeof y));
    REFUSED(MPF_NULL, "null", mpf->mpf_reset(NULL));
    REFUSED(MPF_NULL, "null", mpf->mpf_destroy(NULL));

    DONE(mpf->mpf_create(&config, &one));
    REFUSED(MPF_LENGTH, "x of 1 times 8 bytes, got 16", mpf->mpf_step(one, x, 2 * sizeof x, NULL, 0, 1, y, sizeof y));
    REFUSED(MPF_LENGTH, "target", mpf->mpf_step(one, x, sizeof x, target, 8, 1, y, sizeof y));
    REFUSED(MPF_LENGTH, "y of", mpf->mpf_step(one, x, sizeof x, target, sizeof target, 1, y, sizeof y - 1));
    REFUSED(MPF_NULL, "x", mpf->mpf_step(one, NULL, sizeof x, target, sizeof target, 1, y, sizeof y));
    REFUSED(MPF_NULL, "signal", mpf->mpf_step_signal(one, x, sizeof x, NULL, 0, y, sizeof y));
    REFUSED(MPF_VALUE, "x, got another number at index 1", mpf->mpf_step(one, bad, sizeof x, NULL, 0, 1, y, sizeof y));
    REFUSED(MPF_VALUE, "target, got another", mpf->mpf_step(one, x, sizeof x, bad, sizeof bad, 1, y, sizeof y));
    REFUSED(MPF_VALUE, "signal, got another", mpf->mpf_step_signal(one, x, sizeof x, bad, sizeof bad, y, sizeof y));
    REFUSED(MPF_KIND, "a target", mpf->mpf_step_label(one, x, sizeof x, 1, 1, y, sizeof y));
    REFUSED(MPF_LENGTH, "at least one step", mpf->mpf_run(one, 0, x, 0, NULL, 0, NULL, 0, 1, NULL, 0));
    REFUSED(MPF_LENGTH, "x of 2 times", mpf->mpf_run(one, 2, x, sizeof x, NULL, 0, NULL, 0, 1, NULL, 0));
    REFUSED(MPF_LENGTH, "x of", mpf->mpf_run(one, ((size_t)-1) / 8 + 2, x, sizeof x, NULL, 0, NULL, 0, 1, NULL, 0));
    REFUSED(MPF_LENGTH, "mask", mpf->mpf_run(one, 1, x, sizeof x, target, sizeof target, (unsigned char *)x, 2, 1, NULL, 0));
    REFUSED(MPF_KIND, "apply: expected update 'apply', got 'step'", mpf->mpf_apply(one));
    REFUSED(MPF_NULL, "loss", mpf->mpf_loss(one, NULL));
    REFUSED(MPF_NAME, "0..8, got 9", mpf->mpf_array(one, 9, &name, &bytes));
    REFUSED(MPF_NULL, "null", mpf->mpf_array(one, 0, NULL, &bytes));
    REFUSED(MPF_NAME, "got 'w_ree'", mpf->mpf_get(one, "w_ree", w, sizeof w));
    REFUSED(MPF_NAME, "b_rec", mpf->mpf_get(one, "b_rec", w, sizeof w));
    REFUSED(MPF_NULL, "name", mpf->mpf_get(one, NULL, w, sizeof w));
    REFUSED(MPF_LENGTH, "w_rec", mpf->mpf_get(one, "w_rec", w, sizeof w - 4));
    REFUSED(MPF_NULL, "w_rec", mpf->mpf_set(one, "w_rec", NULL, sizeof w));
    REFUSED(MPF_NAME, "got 'h'", mpf->mpf_set(one, "h", w, 5 * sizeof(float)));
    REFUSED(MPF_VALUE, "b_out, got another number at index 1", mpf->mpf_set(one, "b_out", bad, sizeof bad));
    DONE(mpf->mpf_get(one, "v", w, 5 * sizeof(float)));
    if (w[0] != 0 || w[4] != 0) return 1; /* nothing has run */
    DONE(mpf->mpf_step(one, x, sizeof x, target, sizeof target, 1, y, sizeof y));
    DONE(mpf->mpf_loss(one, &loss));
    if (!(loss > 0)) return 1;
    DONE(mpf->mpf_get(one, "w_rec", w, sizeof w));
    w[1] = 2;
    DONE(mpf->mpf_set(one, "w_rec", w, sizeof w));
    memset(w, 0, sizeof w);
    DONE(mpf->mpf_get(one, "w_rec", w, sizeof w));
    if (w[1] != 2) return 1;
    w[0] = w[1] = w[2] = 3e38f;
    DONE(mpf->mpf_set(one, "b_out", w, 3 * sizeof(float)));
    w[3] = w[4] = w[5] = w[6] = w[7] = w[8] = w[9] = w[10] = w[11] = w[12] = w[13] = w[14] = 3e38f;
    DONE(mpf->mpf_set(one, "w_out", w, 15 * sizeof(float)));
    DONE(mpf->mpf_set(one, "w_in", w, 10 * sizeof(float)));
    x[0] = x[1] = 1;
    REFUSED(MPF_DIVERGED, "of step 0", mpf->mpf_run(one, 1, x, sizeof x, NULL, 0, NULL, 0, 1, NULL, 0));
    DONE(mpf->mpf_object(one, &object));
    DONE(mpf->mpf_adopt(object, &two));
    DONE(mpf->mpf_destroy(one));
    REFUSED(MPF_DESTROYED, "destroyed", mpf->mpf_step(one, x, sizeof x, NULL, 0, 1, y, sizeof y));
    REFUSED(MPF_DESTROYED, "destroyed", mpf->mpf_get(one, "w_rec", w, sizeof w));
    REFUSED(MPF_DESTROYED, "destroyed", mpf->mpf_destroy(one));
    DONE(mpf->mpf_reset(two));
    DONE(mpf->mpf_destroy(two));

    config.mpf_rule = "rflo";
    DONE(mpf->mpf_create(&config, &one));
    DONE(mpf->mpf_get(one, "feedback", w, 15 * sizeof(float)));
    if (w[0] == 0 || w[14] == 0) return 1;
    w[0] = 7;
    DONE(mpf->mpf_set(one, "feedback", w, 15 * sizeof(float)));
    DONE(mpf->mpf_set(one, "z", w, 5 * sizeof(float)));
    DONE(mpf->mpf_step(one, x, sizeof x, NULL, 0, 0, y, sizeof y));
    DONE(mpf->mpf_destroy(one));

    config.mpf_rule = "modprop", config.mpf_loss = "cross_entropy", config.mpf_update = "apply";
    DONE(mpf->mpf_create(&config, &one));
    REFUSED(MPF_KIND, "a label", mpf->mpf_step(one, x, sizeof x, target, sizeof target, 1, y, sizeof y));
    REFUSED(MPF_VALUE, "class in 0..2, got 3", mpf->mpf_step_label(one, x, sizeof x, 3, 1, y, sizeof y));
    labels[0] = -1;
    REFUSED(MPF_VALUE, "got -1 at step 0", mpf->mpf_run_labels(one, 1, x, sizeof x, labels, sizeof(int), NULL, 0, 1, NULL, 0));
    REFUSED(MPF_LENGTH, "labels", mpf->mpf_run_labels(one, 1, x, sizeof x, labels, sizeof labels, NULL, 0, 1, y, sizeof y));
    y[0] = y[1] = y[2] = 1e25f; /* what has added up is finite, what lags behind is not */
    for (bytes = 0; bytes < 15; bytes++) w[bytes] = 1e25f;
    DONE(mpf->mpf_set(one, "w_out", w, 15 * sizeof(float)));
    DONE(mpf->mpf_step_signal(one, x, sizeof x, y, sizeof y, NULL, 0));
    REFUSED(MPF_DIVERGED, "gradient", mpf->mpf_apply(one));
    DONE(mpf->mpf_destroy(one));
    return 0;
}

#ifdef __cplusplus
}
#endif
