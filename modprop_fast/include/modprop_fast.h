/* modprop_fast from C and C++: networks that learn while they run, without Python on the way.

   One struct of function pointers, behind a capsule of the module modprop_fast.core. The program that embeds Python, or the
   extension module, fetches it once, with the GIL:

       const mpf_api *mpf = (const mpf_api *)PyCapsule_Import(MPF_CAPSULE, 0);
       if (mpf == NULL || !MPF_FITS(mpf)) ...

       mpf_config config;
       mpf_learner *learner;
       mpf->mpf_defaults(&config, sizeof config);
       config.mpf_n_in = 2; config.mpf_n_rec = 100; config.mpf_n_out = 1; config.mpf_rule = "modprop(mu=0.25)";
       if (mpf->mpf_create(&config, &learner) != MPF_OK) puts(mpf->mpf_last_error());
       while (...)
           if (mpf->mpf_step(learner, x, sizeof x, target, sizeof target, 1, y, sizeof y) != MPF_OK) ...
       mpf->mpf_destroy(learner);

   There is nothing to link. modprop_fast.get_include() is the folder of this file. It needs no other header but stddef.h,
   reads as C89 and C++, and every name in it begins with mpf_ or MPF_, so that no macro of the host can change it.

   Results. Every function returns MPF_OK or another code below, and then mpf_last_error() is one sentence about it. A
   call that is refused has changed nothing, unless its comment says more.

   Numbers. x, targets, signals, y and arrays are of the learner's dtype, float or double, C-contiguous. Lengths are in
   bytes, as sizeof gives them, so that float where double is meant is refused too. The caller owns all that it passes;
   nothing is kept after the call.

   Threads. A learner serves one thread at a time, any thread; a second one gets MPF_BUSY and does not wait. Different
   learners run at the same time, if they do not share a network. mpf_defaults, mpf_create, mpf_adopt and mpf_destroy
   may be called with or without the GIL and take it for themselves (a thread that has the GIL must not wait for one that is
   in these). All others do not touch Python: call them without the GIL. But the first step after something was done to the
   weights in Python, which set them where the mask allows none, took hold of an array of them or let go of it, takes the GIL
   and waits for whoever has it: let go of such arrays before a loop that must not wait. While one of these runs, no other
   thread may use the Learner, or read or write its network's arrays, from Python.

   Lifetime. A learner lives until mpf_destroy, and holds on to its Python objects until then. Its handle may be passed
   on afterwards: every call returns MPF_DESTROYED (which costs less than a kilobyte for each learner, until the process
   ends). Destroy before Py_Finalize; after it no call is allowed but mpf_destroy and mpf_last_error.

   Stability. Members are added at the end of the structs; none is changed or removed. The library may be newer than the
   header that a program was built with; where it is older, MPF_FITS and mpf_create say so. */

#ifndef MODPROP_FAST_H
#define MODPROP_FAST_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MPF_CAPSULE "modprop_fast.core._c_api"
#define MPF_VERSION 1
#define MPF_FITS(mpf_a) ((mpf_a)->mpf_version == MPF_VERSION && (mpf_a)->mpf_size >= sizeof(mpf_api))

#define MPF_OK 0
#define MPF_NULL 1        /* a null handle or pointer */
#define MPF_DESTROYED 2   /* the learner was destroyed, or the handle is not one */
#define MPF_BUSY 3        /* the learner is in use by another thread */
#define MPF_STRUCT 4      /* a struct of another version or size */
#define MPF_LENGTH 5      /* an array of the wrong length */
#define MPF_VALUE 6       /* a value that is not finite, out of its range, or not a setting */
#define MPF_NAME 7        /* no array of that name or number, or one that cannot be set */
#define MPF_KIND 8        /* this learner cannot do that: another loss, update, rule or optimizer */
#define MPF_DIVERGED 9    /* the readout, the accumulated gradient or a weight after the update would not be finite; no weight has changed */
#define MPF_PYTHON 10     /* any other exception, or no interpreter */

typedef struct mpf_learner mpf_learner; /* opaque */

/* What to make. mpf_defaults fills it in; n_in, n_rec and n_out have no default. Strings and arrays are copied. */
typedef struct mpf_config {
    size_t mpf_size;                  /* sizeof(mpf_config) */
    long mpf_version;                 /* MPF_VERSION */
    ptrdiff_t mpf_n_in;               /* inputs, recurrent units, outputs */
    ptrdiff_t mpf_n_rec;
    ptrdiff_t mpf_n_out;
    const char *mpf_dtype;            /* "float32" (default) or "float64" */
    const char *mpf_activation;       /* "relu" (default), "softplus", "tanh", "sigmoid", "identity" */
    double mpf_tau;                   /* membrane time constant and time step, one unit (10, 1); tau 0: no leak */
    double mpf_dt;
    ptrdiff_t mpf_n_types;            /* cell types (1), laid out one after the other */
    const ptrdiff_t *mpf_type_counts; /* (n_types,) units of each, or NULL with one type */
    const int *mpf_dale;              /* (n_types,) sign of what each type sends: 1, -1 or 0 (free); or NULL: free */
    const unsigned char *mpf_mask;    /* (n_rec, n_rec) [post, pre] 1 where a synapse may exist; or NULL: everywhere */
    int mpf_autapses;                 /* whether a unit may send to itself (0) */
    int mpf_bias;                     /* whether recurrent units have a bias (0) */
    const char *mpf_init;             /* "gaussian" (default), "signed", "zeros" */
    double mpf_gain;                  /* of the initial recurrent weights (1) */
    size_t mpf_seed;                  /* of all that is random: numpy.random.default_rng(seed) (0) */
    const char *mpf_rule;             /* as modprop_fast.parse_rule reads it: "modprop" (default), "eprop", ... */
    const char *mpf_loss;             /* "mse" (default) or "cross_entropy" */
    const char *mpf_update;           /* "step" (default): within every step; "apply": by mpf_apply */
    double mpf_lr;                    /* learning rate of plain gradient descent (1e-3) */
} mpf_config;

typedef struct mpf_api {
    size_t mpf_size;  /* sizeof(mpf_api) when the library was built */
    long mpf_version; /* MPF_VERSION then */

    /* The sentence about the last call of this thread that did not return MPF_OK; never NULL. Overwritten by the next such. */
    const char *(*mpf_last_error)(void);

    /* Fill in a config; mpf_bytes = sizeof(mpf_config). */
    int (*mpf_defaults)(mpf_config *mpf_into, size_t mpf_bytes);

    /* Make a network and its learner at rest. On failure *mpf_out is NULL. Draws the weights as
       modprop_fast.Network(..., rng=numpy.random.default_rng(seed)) does. The warning that the filter of the rule
       does not decay is one of Python's, and is given here alone. */
    int (*mpf_create)(const mpf_config *mpf_what, mpf_learner **mpf_out);

    /* A handle on a modprop_fast.Learner (a PyObject *), which is kept alive, as it is, in mid-stream or not. This is how to
       have Adam, weights from elsewhere, or a rule with arrays: make it in Python. Steps from C are not in its `latency`,
       updates from C are in its `iteration` after mpf_destroy. A rule that follows the weights or the activity (mu "auto",
       factor "running", low rank) is planned anew by Python's calls alone. */
    int (*mpf_adopt)(void *mpf_object, mpf_learner **mpf_out);

    /* Give the learner up. MPF_BUSY while another thread is in it. */
    int (*mpf_destroy)(mpf_learner *mpf_handle);

    /* Start a trial: state and traces to zero, as Learner.reset. */
    int (*mpf_reset)(mpf_learner *mpf_handle);

    /* One time step: x (n_in), target (n_out) or NULL, y (n_out) or NULL. With a target the loss is measured, and learned
       from if mpf_learn is not 0. _label: a class 0 .. n_out - 1 for cross_entropy. _signal: dE/dy itself (n_out).
       MPF_VALUE: x, target or signal is not finite, or no such class. MPF_DIVERGED: the weights are as
       they were, the state is at rest. */
    int (*mpf_step)(mpf_learner *mpf_handle, const void *mpf_x, size_t mpf_x_bytes, const void *mpf_target,
                    size_t mpf_target_bytes, int mpf_learn, void *mpf_y, size_t mpf_y_bytes);
    int (*mpf_step_label)(mpf_learner *mpf_handle, const void *mpf_x, size_t mpf_x_bytes, int mpf_label, int mpf_learn,
                          void *mpf_y, size_t mpf_y_bytes);
    int (*mpf_step_signal)(mpf_learner *mpf_handle, const void *mpf_x, size_t mpf_x_bytes, const void *mpf_signal,
                           size_t mpf_signal_bytes, void *mpf_y, size_t mpf_y_bytes);

    /* So many steps, the same numbers: x (T, n_in), target (T, n_out) or label (T,) or NULL, y (T, n_out) or NULL, mask
       (T,): 1 where a step has its error, or NULL: everywhere. Lengths are checked first; a step that fails stops the run,
       the steps before it were made, and its number is in the sentence. */
    int (*mpf_run)(mpf_learner *mpf_handle, size_t mpf_n_steps, const void *mpf_x, size_t mpf_x_bytes,
                   const void *mpf_target, size_t mpf_target_bytes, const unsigned char *mpf_mask, size_t mpf_mask_bytes,
                   int mpf_learn, void *mpf_y, size_t mpf_y_bytes);
    int (*mpf_run_labels)(mpf_learner *mpf_handle, size_t mpf_n_steps, const void *mpf_x, size_t mpf_x_bytes,
                          const int *mpf_labels, size_t mpf_labels_bytes, const unsigned char *mpf_mask,
                          size_t mpf_mask_bytes, int mpf_learn, void *mpf_y, size_t mpf_y_bytes);

    /* With update "apply": one update of plain gradient descent by what has added up, which starts again from zero.
       MPF_KIND where the learner has another optimizer, or a rule planned anew in Python: call Learner.apply.
       MPF_DIVERGED where it is not finite: it is dropped; or where a weight would not be: it is kept. The weights stay. */
    int (*mpf_apply)(mpf_learner *mpf_handle);

    /* Loss of the last step, or its sum over the last run; 0 without a target. */
    int (*mpf_loss)(mpf_learner *mpf_handle, double *mpf_out);

    /* Arrays by name: weights w_rec (n_rec, n_rec) [post, pre], w_in (n_rec, n_in), w_out (n_out, n_rec), b_out (n_out,),
       b_rec (n_rec,) and feedback (n_rec, n_out) where the learner has them; state v, z (n_rec,); derivative h (n_rec,),
       readout y (n_out,) and eligibility trace eps (n_rec + n_in (+ 1 with bias),), to be read only; with update "apply" the
       accumulated gradient grad_rec (n_rec, n_rec + n_in (+ 1)) of [w_rec | w_in | b_rec], grad_w_out and grad_b_out.
       mpf_array lists them, number 0, 1, .. until MPF_NAME; mpf_get and mpf_set copy out and in, whole arrays.
       What is set must be finite (MPF_VALUE). Both bring weights and gradient up to date first, which may change the
       rounding of what follows. After mpf_set of w_rec, mpf_reset lets the type means of the rule follow. */
    int (*mpf_array)(mpf_learner *mpf_handle, size_t mpf_number, const char **mpf_name, size_t *mpf_bytes);
    int (*mpf_get)(mpf_learner *mpf_handle, const char *mpf_name, void *mpf_out, size_t mpf_bytes);
    int (*mpf_set)(mpf_learner *mpf_handle, const char *mpf_name, const void *mpf_values, size_t mpf_bytes);

    /* The learner's modprop_fast.Learner, a borrowed PyObject *: to save, evaluate or pickle it in Python. */
    int (*mpf_object)(mpf_learner *mpf_handle, void **mpf_out);
} mpf_api;

#ifdef __cplusplus
}
#endif

#endif
