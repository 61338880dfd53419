# The C face: what modprop_fast.h says, on top of Engine.  Included by core.pyx; core.pxd exports the same functions.

from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdlib cimport calloc
from libc.string cimport memcpy, strcmp

cdef extern from *:
    """
    #include <stdarg.h>
    #include <stdio.h>
    #if defined(_MSC_VER)
    #define MPF_OF_THREAD __declspec(thread)
    #else
    #define MPF_OF_THREAD __thread
    #endif
    #define MPF_CONFIG_LEAST (offsetof(mpf_config, mpf_lr) + sizeof(double))  /* of version 1: never more */
    static MPF_OF_THREAD char mpf_sentence[400] = "no call of this thread has failed";
    /* Keep the sentence, return the code. */
    static int mpf_fail(int code, const char *format, ...) {
        va_list what;
        va_start(what, format);
        vsnprintf(mpf_sentence, sizeof mpf_sentence, format, what);
        va_end(what);
        return code;
    }
    """
    char *mpf_sentence
    size_t MPF_CONFIG_LEAST
    int mpf_fail(int code, const char *format, ...) noexcept nogil

cdef extern from "modprop_fast.h":
    ctypedef struct mpf_api:
        size_t mpf_size
        long mpf_version
        const char *(*mpf_last_error)() noexcept nogil
        int (*mpf_defaults)(mpf_config *, size_t) noexcept nogil
        int (*mpf_create)(const mpf_config *, mpf_learner **) noexcept nogil
        int (*mpf_adopt)(void *, mpf_learner **) noexcept nogil
        int (*mpf_destroy)(mpf_learner *) noexcept nogil
        int (*mpf_reset)(mpf_learner *) noexcept nogil
        int (*mpf_step)(mpf_learner *, const void *, size_t, const void *, size_t, int, void *, size_t) noexcept nogil
        int (*mpf_step_label)(mpf_learner *, const void *, size_t, int, int, void *, size_t) noexcept nogil
        int (*mpf_step_signal)(mpf_learner *, const void *, size_t, const void *, size_t, void *, size_t) noexcept nogil
        int (*mpf_run)(mpf_learner *, size_t, const void *, size_t, const void *, size_t, const unsigned char *, size_t, int,
                       void *, size_t) noexcept nogil
        int (*mpf_run_labels)(mpf_learner *, size_t, const void *, size_t, const int *, size_t, const unsigned char *, size_t,
                              int, void *, size_t) noexcept nogil
        int (*mpf_apply)(mpf_learner *) noexcept nogil
        int (*mpf_loss)(mpf_learner *, double *) noexcept nogil
        int (*mpf_array)(mpf_learner *, size_t, const char **, size_t *) noexcept nogil
        int (*mpf_get)(mpf_learner *, const char *, void *, size_t) noexcept nogil
        int (*mpf_set)(mpf_learner *, const char *, const void *, size_t) noexcept nogil
        int (*mpf_object)(mpf_learner *, void **) noexcept nogil

cdef extern from "Python.h":
    bint Py_IsInitialized() noexcept nogil

cdef enum:
    ALIVE = 0x4D504641

# An array as the C face shows it: rows without the padding between them.  Sizes in bytes.
cdef struct Named:
    const char *name
    char *at
    Py_ssize_t rows, width, stride
    bint writable

# Behind a `mpf_learner *`.  Never freed, so that a handle that outlives its learner is told so.
cdef struct Handle:
    int alive                 # ALIVE, or 0 once destroyed
    int busy                  # as Engine.busy, but it outlives the engine: held for ever once destroyed
    PyObject *learner
    PyObject *engine
    Model *m                  # of the engine
    const Kernels *kernels
    Py_ssize_t size           # bytes of a number
    Py_ssize_t applied        # updates by `apply`
    Py_ssize_t n_named        # arrays
    Py_ssize_t n_lagging      # the first of them may lag behind: weights and gradient
    Py_ssize_t eps            # which one is a ring
    bint plans_anew           # the rule follows W or h by a plan that is made in Python
    bint plain                # the optimizer is SGD(lr)
    Named named[14]           # as many as `_handle` can name


# ---------------------------------------------------------------- coming in and going out

cdef int enter(Handle *h, const char *call) noexcept nogil:
    """Take a handle for this thread, or a code."""
    if h == NULL:
        return mpf_fail(MPF_NULL, "%s: expected a learner, got a null handle", call)
    if mpf_read(&h.alive) != ALIVE:
        return mpf_fail(MPF_DESTROYED, "%s: expected a learner, got one that was destroyed", call)
    if not mpf_take(&h.busy):
        if not mpf_take(&(<Engine>h.engine).busy):
            mpf_wait(&(<Engine>h.engine).brief, 0, False)
            return MPF_OK
        mpf_release(&h.busy)
    return mpf_fail(MPF_BUSY, "%s: this learner is in use by another thread; give each thread its own", call)


cdef int leave(Handle *h, int code) noexcept nogil:
    mpf_release(&(<Engine>h.engine).busy)
    mpf_release(&h.busy)
    return code


cdef int check(const char *call, const char *name, const void *at, size_t got, size_t n, size_t width) noexcept nogil:
    """Whether an array of n >= 1 rows of so many bytes is there and has its length."""
    if at == NULL:
        return mpf_fail(MPF_NULL, "%s: expected %s, got a null pointer", call, name)
    if got // n != width or got % n:
        return mpf_fail(MPF_LENGTH, "%s: expected %s of %zu times %zu bytes, got %zu", call, name, n, width, got)
    return MPF_OK


cdef int raised(const char *call, error) noexcept:
    """The code and sentence of an exception."""
    cdef bint of_argument = isinstance(error, (TypeError, ValueError))
    cdef bytes text
    try:
        text = (f"{error}" if of_argument else f"{type(error).__name__}: {error}").encode("utf-8", "replace")
    except BaseException:
        return mpf_fail(MPF_PYTHON, "%s: an exception without a sentence", call)
    return mpf_fail(MPF_VALUE if of_argument else MPF_PYTHON, "%s: %s", call, <const char *>text)


cdef const char *mpf_last_error() noexcept nogil:
    return mpf_sentence


# ---------------------------------------------------------------- making and giving up

cdef int mpf_defaults(mpf_config *into, size_t n_bytes) noexcept nogil:
    cdef mpf_config c
    if into == NULL:
        return mpf_fail(MPF_NULL, "defaults: expected a config, got a null pointer")
    if n_bytes < MPF_CONFIG_LEAST or n_bytes > sizeof(mpf_config):
        return mpf_fail(MPF_STRUCT, "defaults: expected a config of %zu to %zu bytes, got %zu", MPF_CONFIG_LEAST,
                        sizeof(mpf_config), n_bytes)
    memset(&c, 0, sizeof(c))
    c.mpf_size, c.mpf_version, c.mpf_n_types = n_bytes, MPF_VERSION, 1
    c.mpf_dtype, c.mpf_activation, c.mpf_init, c.mpf_gain = "float32", "relu", "gaussian", 1
    c.mpf_tau, c.mpf_dt = 10, 1
    c.mpf_rule, c.mpf_loss, c.mpf_update, c.mpf_lr = "modprop", "mse", "step", 1e-3
    memcpy(into, &c, n_bytes)
    return MPF_OK


cdef int mpf_create(const mpf_config *what, mpf_learner **out) noexcept nogil:
    cdef mpf_config c
    if out == NULL or what == NULL:
        return mpf_fail(MPF_NULL, "create: expected a config and where to put the handle, got a null pointer")
    out[0] = NULL
    if what.mpf_version != MPF_VERSION:
        return mpf_fail(MPF_STRUCT, "create: expected a config of version %d, got %ld", <int>MPF_VERSION, what.mpf_version)
    mpf_defaults(&c, sizeof(c))
    if what.mpf_size < MPF_CONFIG_LEAST or what.mpf_size > sizeof(mpf_config):
        return mpf_fail(MPF_STRUCT, "create: expected a config of %zu to %zu bytes, got %zu", MPF_CONFIG_LEAST,
                        sizeof(mpf_config), what.mpf_size)
    memcpy(&c, what, what.mpf_size)
    if not Py_IsInitialized():
        return mpf_fail(MPF_PYTHON, "create: expected a running Python interpreter")
    with gil:
        try:
            learner = _learner(&c)
            if learner.rule.follows:
                raise ValueError("rule: one that is planned anew in Python; make a Learner there and adopt it")
            out[0] = <mpf_learner *>_handle(learner)
        except BaseException as error:
            return raised("create", error)
    return MPF_OK


cdef int mpf_adopt(void *object, mpf_learner **out) noexcept nogil:
    if out == NULL or object == NULL:
        return mpf_fail(MPF_NULL, "adopt: expected a Learner and where to put the handle, got a null pointer")
    out[0] = NULL
    if not Py_IsInitialized():
        return mpf_fail(MPF_PYTHON, "adopt: expected a running Python interpreter")
    with gil:
        try:
            out[0] = <mpf_learner *>_handle(<object>object)
        except BaseException as error:
            return raised("adopt", error)
    return MPF_OK


cdef str _text(const char *name, const char *value):
    if value == NULL:
        raise ValueError(f"{name.decode()}: expected a text, got a null pointer")
    return value.decode("utf-8", "replace")


cdef _learner(const mpf_config *c):
    """The Learner that a config describes."""
    from modprop_fast import SGD, Learner, Network, parse_rule

    cdef Py_ssize_t i, n = c.mpf_n_types
    types = dale = mask = None
    if not 1 <= n <= max(c.mpf_n_rec, 1):
        raise ValueError(f"n_types: expected 1 to n_rec = {c.mpf_n_rec}, got {n}")
    if c.mpf_type_counts != NULL:
        types = {f"{i}": c.mpf_type_counts[i] for i in range(n)}
    elif n > 1:
        raise ValueError("type_counts: expected the number of units of each type, got a null pointer")
    if c.mpf_dale != NULL:
        dale = {f"{i}" if types else "all": c.mpf_dale[i] for i in range(n)}
    if c.mpf_mask != NULL and c.mpf_n_rec > 0:
        mask = np.frombuffer((<const char *>c.mpf_mask)[: c.mpf_n_rec * c.mpf_n_rec], np.uint8).reshape(2 * [c.mpf_n_rec]) != 0
    rng = np.random.default_rng(c.mpf_seed)
    network = Network(
        c.mpf_n_in, c.mpf_n_rec, c.mpf_n_out, types=types, activation=_text("activation", c.mpf_activation), tau=c.mpf_tau,
        dt=c.mpf_dt, dale=dale, mask=mask, autapses=c.mpf_autapses, bias=c.mpf_bias, dtype=_text("dtype", c.mpf_dtype),
        init=_text("init", c.mpf_init), gain=c.mpf_gain, rng=rng,
    )  # fmt: skip
    return Learner(network, parse_rule(_text("rule", c.mpf_rule)), loss=_text("loss", c.mpf_loss), optimizer=SGD(c.mpf_lr),
                   update=_text("update", c.mpf_update), rng=rng)


cdef Handle *_handle(learner) except NULL:
    """A handle on a Learner."""
    from modprop_fast import SGD, Learner

    if not isinstance(learner, Learner):
        raise TypeError(f"object: expected a Learner, got {describe(learner)}")
    if not isinstance(learner._engine, Engine):
        raise ValueError(f"rule: expected one that the kernels have, got {learner.rule!r:.60}, which runs in Python")
    cdef Engine engine = learner._engine
    cdef Model *m = &engine.m
    cdef Py_ssize_t N = m.n_rec, Q = m.stride, sources = N + m.n_in + (m.b_rec != NULL)
    engine.must_stream("rule")
    cdef Handle *h = <Handle *>calloc(1, sizeof(Handle))
    if h == NULL:
        raise MemoryError("no memory for a handle")
    h.size = engine.network.dtype.itemsize
    h.m, h.kernels, h.plans_anew = m, engine.kernels, learner.rule.follows
    h.plain = learner.optimizer == SGD(learner.optimizer.lr)
    _name(h, "w_rec", m.w_rec, 1, N * N, 0, True)
    _name(h, "w_in", m.w_in, 1, N * m.n_in, 0, True)
    _name(h, "w_out", m.w_out, 1, m.n_out * N, 0, True)
    _name(h, "b_out", m.b_out, 1, m.n_out, 0, True)
    _name(h, "b_rec", m.b_rec, 1, N, 0, True)
    _name(h, "feedback", m.feedback, 1, N * m.n_out, 0, True)
    if not m.online:
        _name(h, "grad_rec", m.grad, N, sources, Q, True)
        _name(h, "grad_w_out", m.grad_w_out, 1, m.n_out * N, 0, True)
        _name(h, "grad_b_out", m.grad_b_out, 1, m.n_out, 0, True)
        m.updates = learner.iteration
    h.n_lagging = h.n_named
    _name(h, "v", m.v, 1, N, 0, True)
    _name(h, "z", m.pre, 1, N, 0, True)
    _name(h, "h", m.h, 1, N, 0, False)
    _name(h, "y", m.y, 1, m.n_out, 0, False)
    h.eps = h.n_named
    _name(h, "eps", m.eps, 1, sources, 0, False)
    h.learner, h.engine = <PyObject *>learner, <PyObject *>engine
    Py_INCREF(learner)
    Py_INCREF(engine)
    h.alive = ALIVE
    return h


cdef void _name(Handle *h, const char *name, void *at, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t stride,
                bint writable) noexcept:
    if at != NULL:
        h.named[h.n_named] = Named(name, <char *>at, rows, width * h.size, stride * h.size, writable)
        h.n_named += 1


cdef int mpf_destroy(mpf_learner *handle) noexcept nogil:
    cdef Handle *h = <Handle *>handle
    cdef int code = enter(h, "destroy")
    if code != MPF_OK:
        return code
    mpf_release(&h.alive)
    if not Py_IsInitialized():
        return MPF_OK
    with gil:
        engine, learner = <Engine>h.engine, <object>h.learner
        if not (<Engine>engine).m.online:
            learner.iteration += h.applied
        mpf_release(&(<Engine>engine).busy)
        Py_DECREF(engine)
        Py_DECREF(learner)
    return MPF_OK


cdef int mpf_object(mpf_learner *handle, void **out) noexcept nogil:
    cdef Handle *h = <Handle *>handle
    cdef int code = enter(h, "object")
    if code != MPF_OK:
        return code
    if out == NULL:
        return leave(h, mpf_fail(MPF_NULL, "object: expected where to put it, got a null pointer"))
    out[0] = h.learner
    return leave(h, MPF_OK)


# ---------------------------------------------------------------- steps

cdef int notice(Handle *h, const char *call) noexcept nogil:
    """What became of the weights since the last step."""
    cdef int code
    if (<Engine>h.engine)._notice_writes(True):  # no other learner has them: the header says so
        return MPF_OK
    with gil:
        code = raised(call, (<Engine>h.engine).failed)
        (<Engine>h.engine).failed = None
    return code


cdef int mpf_reset(mpf_learner *handle) noexcept nogil:
    cdef Handle *h = <Handle *>handle
    cdef int code = enter(h, "reset")
    if code != MPF_OK:
        return code
    if h.plans_anew:
        return leave(h, mpf_fail(MPF_KIND, "reset: this rule is planned anew in Python; call reset of the Learner"))
    if h.m.refresh_every == 1 and h.m.type != NULL:
        code = notice(h, "reset")
        if code != MPF_OK:
            return leave(h, code)
        flushed(h.m, h.kernels.refresh)
    flushed(h.m, h.kernels.reset)
    return leave(h, MPF_OK)


cdef Py_ssize_t first_bad(Handle *h, const void *values, Py_ssize_t n) noexcept nogil:
    """Index of the first number that is not finite; n if all are."""
    cdef Py_ssize_t i
    for i in range(n):
        if not h.kernels.finite(<const real *>(<const char *>values + i * h.size), 1):
            return i
    return n


cdef int go(Handle *h, const char *call, size_t n_steps, const void *x, size_t x_bytes, ErrorSource source, const void *aim,
            size_t aim_bytes, const unsigned char *mask, size_t mask_bytes, bint learn, void *y, size_t y_bytes) noexcept nogil:
    """So many steps: what the five calls have in common.  `aim`: targets, signals or labels."""
    cdef int status = OK, code = enter(h, call)
    cdef unsigned long long fp
    cdef long long label = 0
    cdef size_t t, n_in, n_out
    cdef Model *m
    cdef const real *of_step
    cdef ErrorSource due
    cdef double before
    if code != MPF_OK:
        return code
    m = h.m
    n_in, n_out = m.n_in * h.size, m.n_out * h.size
    if n_steps == 0:
        return leave(h, mpf_fail(MPF_LENGTH, "%s: expected at least one step, got none", call))
    if aim == NULL and source != FROM_SIGNAL:
        source = FROM_NOTHING
    code = check(call, "x", x, x_bytes, n_steps, n_in)
    if code == MPF_OK and source != FROM_NOTHING:
        if source == FROM_LABEL:
            code = check(call, "labels", aim, aim_bytes, n_steps, sizeof(int))
        else:
            code = check(call, "signal" if source == FROM_SIGNAL else "target", aim, aim_bytes, n_steps, n_out)
        if source != FROM_SIGNAL and (source == FROM_LABEL) != (m.loss == CROSS_ENTROPY):
            code = mpf_fail(MPF_KIND, "%s: expected %s with this learner's loss", call,
                            <const char *>"a target" if m.loss == MSE else <const char *>"a label")
    if code == MPF_OK and mask != NULL:
        code = check(call, "mask", mask, mask_bytes, n_steps, 1)
    if code == MPF_OK and y != NULL:
        code = check(call, "y", y, y_bytes, n_steps, n_out)
    if code != MPF_OK:
        return leave(h, code)
    code = notice(h, call)
    if code != MPF_OK:
        return leave(h, code)
    before, m.loss_sum = m.loss_sum, 0
    fp = mpf_flush()
    for t in range(n_steps):
        due = FROM_NOTHING if mask != NULL and not mask[t] else source
        of_step = NULL
        if due == FROM_LABEL:
            label = (<const int *>aim)[t]
        elif due != FROM_NOTHING:
            of_step = <const real *>(<const char *>aim + t * n_out)
        status = h.kernels.step(m, <const real *>(<const char *>x + t * n_in), of_step, label, due, learn)
        if status != OK:
            break
        if y != NULL:
            memcpy(<char *>y + t * n_out, m.y, n_out)
    mpf_unflush(fp)
    (<Engine>h.engine)._tell_writes()
    if status != OK and t == 0:
        m.loss_sum = before
    if status == X_NOT_FINITE:
        code = mpf_fail(MPF_VALUE, "%s: expected finite x, got another number at index %zd of step %zu", call,
                        first_bad(h, <const char *>x + t * n_in, m.n_in), t)
    elif status == TARGET_NOT_FINITE:
        code = mpf_fail(MPF_VALUE, "%s: expected a finite %s, got another number at index %zd of step %zu", call,
                        <const char *>"signal" if source == FROM_SIGNAL else <const char *>"target",
                        first_bad(h, <const char *>aim + t * n_out, m.n_out), t)
    elif status == LABEL_OUT_OF_RANGE:
        code = mpf_fail(MPF_VALUE, "%s: expected a class in 0..%zd, got %lld at step %zu", call, m.n_out - 1, label, t)
    elif status != OK:
        code = mpf_fail(MPF_DIVERGED, "%s: expected a finite readout, got another number at index %zd of step %zu", call,
                        first_bad(h, m.y, m.n_out), t)
    return leave(h, code)


cdef int mpf_step(mpf_learner *handle, const void *x, size_t x_bytes, const void *target, size_t target_bytes, int learn,
                  void *y, size_t y_bytes) noexcept nogil:
    return go(<Handle *>handle, "step", 1, x, x_bytes, FROM_TARGET, target, target_bytes, NULL, 0, learn != 0, y, y_bytes)


cdef int mpf_step_label(mpf_learner *handle, const void *x, size_t x_bytes, int label, int learn, void *y,
                        size_t y_bytes) noexcept nogil:
    return go(<Handle *>handle, "step_label", 1, x, x_bytes, FROM_LABEL, &label, sizeof(int), NULL, 0, learn != 0, y, y_bytes)


cdef int mpf_step_signal(mpf_learner *handle, const void *x, size_t x_bytes, const void *signal, size_t signal_bytes,
                         void *y, size_t y_bytes) noexcept nogil:
    return go(<Handle *>handle, "step_signal", 1, x, x_bytes, FROM_SIGNAL, signal, signal_bytes, NULL, 0, True, y, y_bytes)


cdef int mpf_run(mpf_learner *handle, size_t n_steps, const void *x, size_t x_bytes, const void *target,
                 size_t target_bytes, const unsigned char *mask, size_t mask_bytes, int learn, void *y,
                 size_t y_bytes) noexcept nogil:
    return go(<Handle *>handle, "run", n_steps, x, x_bytes, FROM_TARGET, target, target_bytes, mask, mask_bytes, learn != 0, y,
              y_bytes)


cdef int mpf_run_labels(mpf_learner *handle, size_t n_steps, const void *x, size_t x_bytes, const int *labels,
                        size_t labels_bytes, const unsigned char *mask, size_t mask_bytes, int learn, void *y,
                        size_t y_bytes) noexcept nogil:
    return go(<Handle *>handle, "run_labels", n_steps, x, x_bytes, FROM_LABEL, labels, labels_bytes, mask, mask_bytes,
              learn != 0, y, y_bytes)


cdef int mpf_apply(mpf_learner *handle) noexcept nogil:
    cdef Handle *h = <Handle *>handle
    cdef int code = enter(h, "apply")
    cdef Model *m
    cdef unsigned long long fp
    if code != MPF_OK:
        return code
    m = h.m
    if m.online:
        return leave(h, mpf_fail(MPF_KIND, "apply: expected update 'apply', got 'step', where no gradient adds up"))
    if h.plans_anew or not h.plain:
        return leave(h, mpf_fail(MPF_KIND, "apply: this optimizer or rule needs Python; call apply of the Learner"))
    fp = mpf_flush()
    h.kernels.settle(m)
    if (h.kernels.finite(m.grad, m.n_rec * m.stride) and h.kernels.finite(m.grad_w_out, m.n_out * m.n_rec)
            and h.kernels.finite(m.grad_b_out, m.n_out)):
        if h.kernels.descend(m):
            h.applied += 1
            (<Engine>h.engine)._tell_writes()
        else:
            code = mpf_fail(MPF_DIVERGED, "apply: expected finite weights after the update, got others; none has changed")
    else:
        code = mpf_fail(MPF_DIVERGED, "apply: expected a finite gradient, got another number; it was dropped")
        memset(m.grad, 0, m.n_rec * m.stride * h.size)
        memset(m.grad_w_out, 0, m.n_out * m.n_rec * h.size)
        memset(m.grad_b_out, 0, m.n_out * h.size)
    mpf_unflush(fp)
    return leave(h, code)


cdef int mpf_loss(mpf_learner *handle, double *out) noexcept nogil:
    cdef Handle *h = <Handle *>handle
    cdef int code = enter(h, "loss")
    if code != MPF_OK:
        return code
    if out == NULL:
        return leave(h, mpf_fail(MPF_NULL, "loss: expected where to put it, got a null pointer"))
    out[0] = h.m.loss_sum
    return leave(h, MPF_OK)


# ---------------------------------------------------------------- arrays by name

cdef int mpf_array(mpf_learner *handle, size_t number, const char **name, size_t *n_bytes) noexcept nogil:
    cdef Handle *h = <Handle *>handle
    cdef int code = enter(h, "array")
    if code != MPF_OK:
        return code
    if name == NULL or n_bytes == NULL:
        code = mpf_fail(MPF_NULL, "array: expected where to put name and length, got a null pointer")
    elif number >= <size_t>h.n_named:
        code = mpf_fail(MPF_NAME, "array: expected a number in 0..%zd, got %zu", h.n_named - 1, number)
    else:
        name[0], n_bytes[0] = h.named[number].name, h.named[number].rows * h.named[number].width
    return leave(h, code)


cdef int find(Handle *h, const char *call, const char *name, const void *at, size_t n_bytes, Named *out) noexcept nogil:
    """The array of that name, brought up to date."""
    cdef Py_ssize_t i
    if name == NULL:
        return mpf_fail(MPF_NULL, "%s: expected a name, got a null pointer", call)
    for i in range(h.n_named):
        if strcmp(name, h.named[i].name) == 0:
            break
    else:
        return mpf_fail(MPF_NAME, "%s: expected the name of an array of this learner, got '%.60s'", call, name)
    out[0] = h.named[i]
    if i == h.eps:
        out.at += h.m.t % SLOTS * h.m.stride * h.size
    if i < h.n_lagging:
        flushed(h.m, h.kernels.settle)
    return check(call, out.name, at, n_bytes, out.rows, out.width)


cdef int mpf_get(mpf_learner *handle, const char *name, void *out, size_t n_bytes) noexcept nogil:
    cdef Handle *h = <Handle *>handle
    cdef Named it
    cdef Py_ssize_t i
    cdef int code = enter(h, "get")
    if code != MPF_OK:
        return code
    code = find(h, "get", name, out, n_bytes, &it)
    if code == MPF_OK:
        for i in range(it.rows):
            memcpy(<char *>out + i * it.width, it.at + i * it.stride, it.width)
    return leave(h, code)


cdef int mpf_set(mpf_learner *handle, const char *name, const void *values, size_t n_bytes) noexcept nogil:
    cdef Handle *h = <Handle *>handle
    cdef Named it
    cdef Py_ssize_t i
    cdef int code = enter(h, "set")
    if code != MPF_OK:
        return code
    code = find(h, "set", name, values, n_bytes, &it)
    if code == MPF_OK and not it.writable:
        code = mpf_fail(MPF_NAME, "set: expected the name of an array that can be set, got '%s'", it.name)
    if code == MPF_OK and not h.kernels.finite(<const real *>values, n_bytes // h.size):
        code = mpf_fail(MPF_VALUE, "set: expected finite values for %s, got another number at index %zd", it.name,
                        first_bad(h, values, n_bytes // h.size))
    if code == MPF_OK:
        flushed(h.m, h.kernels.settle)  # the weights are about to be read anew, whatever is set
        for i in range(it.rows):
            memcpy(it.at + i * it.stride, <const char *>values + i * it.width, it.width)
        h.m.ahead = h.m.counted = h.m.turned = False
        (<Engine>h.engine)._tell_writes()
    return leave(h, code)


# ---------------------------------------------------------------- the capsule

cdef mpf_api _api = mpf_api(
    sizeof(mpf_api), MPF_VERSION, mpf_last_error, mpf_defaults, mpf_create, mpf_adopt, mpf_destroy, mpf_reset, mpf_step,
    mpf_step_label, mpf_step_signal, mpf_run, mpf_run_labels, mpf_apply, mpf_loss, mpf_array, mpf_get, mpf_set, mpf_object,
)  # fmt: skip
_c_api = PyCapsule_New(&_api, "modprop_fast.core._c_api", NULL)
