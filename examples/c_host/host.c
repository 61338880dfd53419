/* A C program that steps the engine a million times without the GIL: recall what came in two steps before. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdio.h>
#include <time.h>

#include "modprop_fast.h"

#define STEPS 1000000
#define TEST 20000 /* steps at either end in which nothing is learned */
#define DELAY 2

static const mpf_api *mpf;

static int failed(int code)
{
    if (code != MPF_OK)
        fprintf(stderr, "%s\n", mpf->mpf_last_error());
    return code != MPF_OK;
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

/* The program's own work: noise in [-1, 1), and what it was DELAY steps before. */
static void host_step(float past[DELAY + 1])
{
    static unsigned long long state = 1;
    int i;
    for (i = DELAY; i > 0; i--)
        past[i] = past[i - 1];
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    past[0] = (float)(state >> 40) / (1 << 23) - 1;
}

/* Everything between Py_Initialize and Py_Finalize; the GIL is not held. */
static int simulate(void)
{
    const ptrdiff_t counts[2] = {51, 13};
    float past[DELAY + 1] = {0}, y, alone_sum = 0;
    double loss, before = 0, after = 0, alone, both, began;
    mpf_config config;
    mpf_learner *learner;
    long t;

    if (failed(mpf->mpf_defaults(&config, sizeof config)))
        return 1;
    config.mpf_n_in = 1, config.mpf_n_rec = 64, config.mpf_n_out = 1;
    config.mpf_n_types = 2, config.mpf_type_counts = counts;
    config.mpf_activation = "tanh", config.mpf_tau = 1, config.mpf_rule = "modprop(mu=0.25)", config.mpf_lr = 0.003;
    if (failed(mpf->mpf_create(&config, &learner)))
        return 1;

    began = seconds();
    for (t = 0; t < STEPS; t++) {
        host_step(past);
        alone_sum += past[DELAY];
    }
    alone = (seconds() - began) / STEPS;

    began = seconds();
    for (t = 0; t < STEPS; t++) {
        const int learn = t >= TEST && t < STEPS - TEST;
        host_step(past);
        if (failed(mpf->mpf_step(learner, past, sizeof y, past + DELAY, sizeof y, learn, &y, sizeof y)) ||
            failed(mpf->mpf_loss(learner, &loss)))
            return 1;
        if (t < TEST)
            before += loss / TEST;
        if (t >= STEPS - TEST)
            after += loss / TEST;
    }
    both = (seconds() - began) / STEPS;
    if (failed(mpf->mpf_destroy(learner)))
        return 1;
    printf("%d steps of 64 units without the GIL, mean input %.3f; guessing zero costs 0.167\n", STEPS, alone_sum / STEPS);
    printf("error with learning off: before %.5f, after %.5f\n", before, after);
    printf("host step: %.3f us, with the engine: %.3f us\n", 1e6 * alone, 1e6 * both);
    return 0;
}

/* host PYTHON: the interpreter of the environment in which modprop_fast is installed. */
int main(int argc, char **argv)
{
    PyConfig config;
    PyStatus status;
    PyThreadState *thread;
    int code;

    PyConfig_InitPythonConfig(&config);
    status = PyConfig_SetBytesString(&config, &config.program_name, argc > 1 ? argv[1] : "python3");
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);

    mpf = (const mpf_api *)PyCapsule_Import(MPF_CAPSULE, 0);
    if (mpf == NULL) {
        PyErr_Print();
        return 1;
    }
    if (!MPF_FITS(mpf)) {
        fprintf(stderr, "modprop_fast is older than the header of this program\n");
        return 1;
    }
    thread = PyEval_SaveThread();
    code = simulate();
    PyEval_RestoreThread(thread);
    return Py_FinalizeEx() < 0 ? 1 : code;
}
