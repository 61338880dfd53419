# cython: language_level=3
# A loop of single steps, for bench_faces.py.
from modprop_fast.core cimport mpf_adopt, mpf_destroy, mpf_learner, mpf_step


def adopt(learner) -> int:
    cdef mpf_learner *handle
    if mpf_adopt(<void *>learner, &handle):
        raise ValueError
    return <size_t>handle


def loop(size_t handle, size_t n, size_t x, size_t n_in, size_t target, size_t n_out) -> int:
    cdef float y[64]
    cdef size_t t, size = sizeof(float)
    cdef int code = 0
    with nogil:
        for t in range(n):
            code |= mpf_step(<mpf_learner *>handle, <const float *>x + t * n_in, n_in * size, <const float *>target + t * n_out,
                             n_out * size, 1, y, n_out * size)
    return code
