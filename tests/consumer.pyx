"""A host written from core.pxd alone.  c_face.py builds it."""

import numpy as np

from modprop_fast.core cimport (
    MPF_OK, mpf_adopt, mpf_apply, mpf_array, mpf_destroy, mpf_get, mpf_last_error, mpf_learner, mpf_loss, mpf_reset,
    mpf_run_labels, mpf_step, mpf_step_label,
)  # fmt: skip


def learn(object learner, const float[:, :, ::1] x, const int[::1] labels, Py_ssize_t n_iterations, Py_ssize_t n_trials,
          bint by_step):
    """Losses of each iteration, and all arrays one after the other."""
    cdef Py_ssize_t i, k, t, n_steps = x.shape[1], row = x.shape[2] * sizeof(float)
    cdef double[::1] losses = np.zeros(n_iterations)
    cdef float[::1] out = np.empty(100000, np.float32)
    cdef int[::1] repeated = np.empty(n_steps, np.intc)
    cdef unsigned char[::1] mask = np.zeros(n_steps, np.uint8)
    cdef const char *name
    cdef size_t n_bytes, at = 0
    cdef double one = 0
    cdef mpf_learner *handle
    cdef int code = mpf_adopt(<void *>learner, &handle)
    mask[n_steps - 1] = 1
    with nogil:
        for i in range(n_iterations):
            for k in range(i * n_trials, (i + 1) * n_trials):
                code |= mpf_reset(handle)
                if by_step:
                    for t in range(n_steps - 1):
                        code |= mpf_step(handle, &x[k, t, 0], row, NULL, 0, 0, NULL, 0)
                    code |= mpf_step_label(handle, &x[k, n_steps - 1, 0], row, labels[k], 1, NULL, 0)
                else:
                    repeated[:] = labels[k]
                    code |= mpf_run_labels(handle, n_steps, &x[k, 0, 0], n_steps * row, &repeated[0], n_steps * sizeof(int),
                                           &mask[0], n_steps, 1, NULL, 0)
                code |= mpf_loss(handle, &one)
                losses[i] += one
            if not by_step:
                code |= mpf_apply(handle)
        i = 0
        while mpf_array(handle, i, &name, &n_bytes) == MPF_OK:
            code |= mpf_get(handle, name, &out[at], n_bytes)
            at += n_bytes // sizeof(float)
            i += 1
        code |= mpf_destroy(handle)
    if code != MPF_OK:
        raise RuntimeError(mpf_last_error())
    return np.asarray(losses), np.asarray(out)
