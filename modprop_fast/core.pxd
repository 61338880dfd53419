# The C face by cimport: the functions of modprop_fast.h, which says what each does, with the same codes, rules and names.
#
#     from modprop_fast.core cimport MPF_OK, mpf_adopt, mpf_learner, mpf_step
#
# There is nothing to link; modprop_fast.get_include() among the include_dirs of the extension finds the header.

cdef extern from "modprop_fast.h":
    enum:
        MPF_VERSION, MPF_OK, MPF_NULL, MPF_DESTROYED, MPF_BUSY, MPF_STRUCT, MPF_LENGTH, MPF_VALUE, MPF_NAME, MPF_KIND
        MPF_DIVERGED, MPF_PYTHON

    ctypedef struct mpf_learner:
        pass

    ctypedef struct mpf_config:
        size_t mpf_size
        long mpf_version
        ptrdiff_t mpf_n_in
        ptrdiff_t mpf_n_rec
        ptrdiff_t mpf_n_out
        const char *mpf_dtype
        const char *mpf_activation
        double mpf_tau
        double mpf_dt
        ptrdiff_t mpf_n_types
        const ptrdiff_t *mpf_type_counts
        const int *mpf_dale
        const unsigned char *mpf_mask
        int mpf_autapses
        int mpf_bias
        const char *mpf_init
        double mpf_gain
        size_t mpf_seed
        const char *mpf_rule
        const char *mpf_loss
        const char *mpf_update
        double mpf_lr

cdef const char *mpf_last_error() noexcept nogil
cdef int mpf_defaults(mpf_config *into, size_t n_bytes) noexcept nogil
cdef int mpf_create(const mpf_config *what, mpf_learner **out) noexcept nogil
cdef int mpf_adopt(void *object, mpf_learner **out) noexcept nogil
cdef int mpf_destroy(mpf_learner *handle) noexcept nogil
cdef int mpf_reset(mpf_learner *handle) noexcept nogil
cdef int mpf_step(mpf_learner *handle, const void *x, size_t x_bytes, const void *target, size_t target_bytes, int learn,
                  void *y, size_t y_bytes) noexcept nogil
cdef int mpf_step_label(mpf_learner *handle, const void *x, size_t x_bytes, int label, int learn, void *y,
                        size_t y_bytes) noexcept nogil
cdef int mpf_step_signal(mpf_learner *handle, const void *x, size_t x_bytes, const void *signal, size_t signal_bytes,
                         void *y, size_t y_bytes) noexcept nogil
cdef int mpf_run(mpf_learner *handle, size_t n_steps, const void *x, size_t x_bytes, const void *target,
                 size_t target_bytes, const unsigned char *mask, size_t mask_bytes, int learn, void *y,
                 size_t y_bytes) noexcept nogil
cdef int mpf_run_labels(mpf_learner *handle, size_t n_steps, const void *x, size_t x_bytes, const int *labels,
                        size_t labels_bytes, const unsigned char *mask, size_t mask_bytes, int learn, void *y,
                        size_t y_bytes) noexcept nogil
cdef int mpf_apply(mpf_learner *handle) noexcept nogil
cdef int mpf_loss(mpf_learner *handle, double *out) noexcept nogil
cdef int mpf_array(mpf_learner *handle, size_t number, const char **name, size_t *n_bytes) noexcept nogil
cdef int mpf_get(mpf_learner *handle, const char *name, void *out, size_t n_bytes) noexcept nogil
cdef int mpf_set(mpf_learner *handle, const char *name, const void *values, size_t n_bytes) noexcept nogil
cdef int mpf_object(mpf_learner *handle, void **out) noexcept nogil
