"""The one struct that the engine and its kernels share.

``memory.pxi`` allocates every array once, most of them in one block, and writes its address here; the kernels read
sizes and addresses from here and own nothing.  Arrays are of the network's dtype, `real`, C-contiguous.

    N = n_rec          units
    Q = stride         presynaptic sources of one unit, [z_{t-1} (N) | x_t (n_in) | 1], padded with zeros
                       to a multiple of LANES so that no loop over traces has a tail
    r = rank           modulators (cell types, or columns of U), and classes of the `mean` factor (cell types, or rows of V)
    D = n_drive        drives of the `exact` factor (cell types, or the P places of units)
    P = n_places       places of units: in their blocks, 4 n_blocks; or by source, one after the other, see pending.pxi
    b = window         steps that the traces may lag behind, see traces.pxi
    S = SLOTS          most that b can be, and one

Units are worked on in blocks of four of one cell type, so that what a block reads of the presynaptic
side is read once for four; a block that is not full is filled up with a dummy row.
"""

cdef extern from *:
    """
    /* What the kernels compute with, by how they are built; core.pyx, which serves both, sees but addresses. */
    #if !defined(MPF_BITS)
    typedef void mpf_real;
    #elif MPF_BITS == 32
    typedef float mpf_real;
    #else
    typedef double mpf_real;
    #endif
    """
    ctypedef float real "mpf_real"

cdef extern from "threads.h":
    int mpf_take(int *flag) noexcept nogil
    void mpf_release(int *flag) noexcept nogil
    int mpf_read(int *flag) noexcept nogil
    void mpf_add(int *count, int n) noexcept nogil
    void mpf_wait(int *count, int value, bint other) noexcept nogil

cdef enum:
    LANES = 16  # rows are padded to this many: 64 bytes of float32, 128 of float64
    ROWS = 4    # units of a block
    TEAM = 8    # threads over the rows of one network, at most
    SLOTS = 33  # of the rings: step t is in slot t mod SLOTS; `spoke` has a bit for each but one
    TRIALS = 16  # that go through W together, at most
    TOGETHER = 4  # sources that are read, or written, at once: those of a group
    SPARED_FROM = 16  # sources of a group from which on a sum that leaves out silent ones pays
    STRETCH_WRITTEN = 6  # lines of places that are written at once, so that what terms count for stays in the first cache
    STRETCH_SPARED = 32  # and in the second
    STOCK_EVERY = 1 << 16  # updates after which the sums over types are taken from W anew: rounding adds up

cdef enum Activation:
    RELU, SOFTPLUS, TANH, SIGMOID, IDENTITY

cdef enum Loss:
    MSE, CROSS_ENTROPY

cdef enum Trace:  # what is put in place of the nonlocal term
    TRACE_NONE, TRACE_EXACT, TRACE_MEAN, TRACE_TAPS

cdef enum Adjoint:  # the same choice, backwards in time
    ADJOINT_NONE, ADJOINT_EXACT, ADJOINT_MEAN, ADJOINT_RUNNING, ADJOINT_TAPS, ADJOINT_BPTT, ADJOINT_SNAP1

cdef enum ErrorSource:  # where dE/dy comes from at this step
    FROM_NOTHING, FROM_TARGET, FROM_LABEL, FROM_SIGNAL

cdef enum Status:
    OK, X_NOT_FINITE, TARGET_NOT_FINITE, LABEL_OUT_OF_RANGE, DIVERGED

# Threads that share the blocks of one engine: the thread that runs it, and those that wait for what it gives out.
ctypedef struct Team:
    int n                     # threads, the first of them included
    int ticket, arrived       # counters: pieces of work given out, threads that are done with the last
    int inside                # that have come, of those that were called
    bint go                   # False: there is no more
    bint write                # that piece: write a group, else the products with W and the traces
    Py_ssize_t group

ctypedef struct Model:
    Team *team                # or NULL: alone
    Py_ssize_t n_in, n_rec, n_out, stride, rank, n_drive, n_blocks
    Py_ssize_t n_sources      # that there are among the Q
    Py_ssize_t n_places
    Py_ssize_t window, t      # steps since rest
    Py_ssize_t n_groups       # of blocks, or of sources, that are brought up to date in turn: `window` online, else 1
    Activation activation
    Loss loss
    Trace trace
    bint online               # update the weights at every step with an error (SGD), else add up a gradient
    bint follows              # the filter changes in time: the type means follow the weights within a stream, or mu is instant
    bint instant              # mu is the mean of h over each type, at every step
    bint ahead                # `current` holds W z of the step to come
    bint driven               # and what W_in x and b add to it
    bint may_defer            # online, not more than two modulators: weights may lie by source and, without signs and mask, updates wait, see pending.pxi
    bint deferred             # they do
    bint turned               # then `by_source` holds what the weights are, or the network's arrays do
    bint frozen               # and felt only at the end of a chunk of steps, when all are written
    bint stands               # within such a chunk: `still` holds the weights, see pending.pxi
    bint counted              # the sums over types are those of W and of the traces; or `packed` is what the network holds
    bint sparse               # online with few connections: see sparse.pxi
    bint unwritten            # `packed`, or `by_source`, has learned what the network's arrays do not show yet
    bint shared               # somebody holds these, or did at the last step: write at every step
    Py_ssize_t owed_until     # step after which every group has been brought up to date with the last error
    bint summed               # `class_sums` holds something
    bint sums_too             # and what is written now gets it
    bint summed_awake         # `awake_sums` is of the steps at hand
    bint lazy                 # `traces` are what differs from those of units always awake, or at rest: see lazy.pxi
    bint autapses
    bint unstable             # set by a refresh that left rho(K) >= 1
    Py_ssize_t refresh_every  # updates between refreshes of the type means; 0: never
    Py_ssize_t updates        # updates so far
    double leak               # k = exp(-dt / tau)
    double lr                 # step of the online update
    double scale              # factor on loss and dE/dy
    double loss_sum           # scaled losses added since the caller last cleared it

    # the network's own arrays
    real *w_rec               # (N, N) [post, pre]
    real *w_in                # (N, n_in)
    real *b_rec               # (N,) or NULL
    real *w_out               # (n_out, N)
    real *b_out               # (n_out,)
    real *feedback            # (N, n_out) or NULL: symmetric
    real *sign                # (N,) +1, -1 or 0 (free): Dale's law of each presynaptic unit
    signed char *keep         # (N, N) -1 where a synapse may exist, else 0; or NULL
    real *keep_by_source      # (sources, P) 1 where a weight may change, as it lies there, else 0; or NULL

    # blocks of units
    int *unit                 # (n_blocks, ROWS) units of each block, -1 where there is none
    int *place                # (N,) of each unit: where in `unit` it is, or type by type
    int *runs                 # (n_runs, 3) neighbours that are neighbours there: the first one, its place, how many
    Py_ssize_t n_runs
    int *block_type           # (n_blocks,) cell type, 0 where there are none
    Py_ssize_t *since         # (n_groups,) step up to which the blocks i mod n_groups have their traces (and gradient), or sources their weights
    real *dummy               # (Q,) weights of the missing units
    real *zeros               # (max(P, Q),)
    real **w_rows             # (P,) where the rows of W begin, and of `keep` (or NULL), by place
    const signed char **keep_rows

    # modulation
    int *type                 # (N,) or NULL: low rank
    int *drive_class          # (N,) which drive a unit has: its type, or its place
    double *type_size         # (r,) n[b]
    double *type_share        # (r,) 1 / n[b]
    double *type_mu           # (r,) mu per type
    double *means             # (r, r) M[a, b]
    double *power             # (3, r, r) scratch
    Py_ssize_t exact_steps    # length of the chunks inside which the gradient is exact (`close_chunk`); 0: none
    Py_ssize_t n_taps         # of TRACE_TAPS: the filter ends there, and what it reads are the rings
    bint fixed_taps           # they are the user's, not powers of K
    bint one_tap              # MDGL: the filter forgets at once, K = 0
    real *factor_of           # (r, P) the factor of units of each type, 0 for others; where weights lie by source
    real *factor_by_unit      # (r, Q) the same, and 0 for sources that are not units
    real *factor_sums         # (r,) over the units of each type
    bint running              # it is h_mean
    bint self_modulation      # False: the type-mean matrix expanded to (N, N) has its diagonal zeroed
    real *column_sums         # (r, Q) sum of W[p, :] over the units p of each type
    real *u                   # (r, P) U^T; one-hot membership for types
    real *membership          # (r, Q) the same by source, for types
    real *K                   # (r, r) filter of the traces
    real *drive               # (D, r) (1-k) V[a, p]
    real *class_drive         # (r, r) drive of each class of the `mean` factor
    real *readout             # (r, P) what each class row of the `mean` factor counts for: of types 1 (class_drive holds mu), or hbar, where they lie by unit; mu[p] V[c, p]
    real *self_drive          # (2, r) kept part and drive of the self term l, see `mean_traces`

    # state
    real *pre                 # (Q,) [z | x | 1 | 0 ..]
    real *v                   # (N,)
    real *h                   # (N,)
    bint keeps_h              # whether the next two are kept: `exact`, taps and exact_steps read them
    real *h_past              # (S, P) ring of h, by place
    unsigned long long *awake # (P,) whether h != 0: of now in the lowest bit, of n steps ago in bit n
    real *eps                 # (S, Q) ring
    real *traces              # `exact`: (P, r, Q) by place; `mean`: (r, r, Q)
    real *self_traces         # (r, Q) l, or NULL
    real *class_eps           # (S, r, Q) ring of eps + l, or NULL
    real *h_sum               # (N,) h summed over steps since the caller last cleared it, or NULL
    Py_ssize_t h_count        # how many steps
    double *h_mean            # (N,) the running mean of h: the learner's array
    long long *h_batches      # of how many stretches of a stream, or batches
    real *sources             # (S, Q) ring of [z_{t-1} | x_t | 1] with exact_steps, else NULL
    real *local               # (S, P) ring of L h, by place
    real *modulator           # (S, r) ring of m
    unsigned char *erred      # (S,) whether the step had an error to learn from
    real *past_K              # (S, r, r) ring of K, and of the drive, where the filter changes in time
    real *past_drive          # (S, D, r)

    # updates that are felt and not yet written
    Py_ssize_t *bounds        # (n_groups + 1,) the first source of each group, a multiple of TOGETHER, and past the last
    real *by_source           # (n_sources and up to 3, 1 + r or 1, P) of each source: weights, traces of `exact`, by place; or NULL
    real *self_weights        # (Q,) weights from units to themselves, which do not change without autapses
    real *sent                # (S, Q) ring of (1-k) s_t, see `spares`
    unsigned int *spoke       # (Q,) whether s_t != 0: of now in the lowest bit, of n steps ago in bit n; or NULL
    real *still               # (n_sources, P) weights of a chunk that has been written in part, or NULL
    real *eps_owed            # (S, Q) ring of eps, 0 for sources that have had it
    real *onto_h              # (S, D) ring: what each h counts for, in the sum over errors since
    real *carried             # (n_groups, r) what the traces count for
    real *eps_placed          # (S, P) ring of eps by place, 0 for those that have had it
    real *front               # (P,) L h eps of the step at which each source was written, by its own place
    real *own                 # (P,) diagonal of what waits: of `exact` by place, else by unit
    real *placed              # (P,) products with s_t
    real *eps_dots            # (2, S + ROWS) scratch: products of each eps with s_t
    int *heard                # (Q + LANES,) scratch: sources that are not silent,
    real *heard_count         # (1 + r, Q + LANES) what they and their traces count for
    Py_ssize_t n_heard, heard_rank
    real *counts              # (threads, 3 S, STRETCH_SPARED LANES or P) scratch of `prepare`
    int *type_ends            # (r,) places before which those of a type end, where there are types
    double *type_sums         # (r, r) [post, pre] sums of W over types
    double *trace_sums        # (r, r, r) [modulator, post, pre] of the traces of `exact`
    double *step_sums         # (7, r) see `sum_step`

    # few connections
    Py_ssize_t *starts        # (P + 1,) where the connections of the unit at each place begin
    Py_ssize_t *inputs_at     # (P,) where those from the inputs do
    int *columns              # (starts[P],) their sources, or Q
    int *type_stops           # (P, r) places in a row before which the synapses from units of each type end
    real *packed              # (starts[P],) weights
    real *packed_traces       # (r, starts[P])
    Py_ssize_t packed_width   # most connections of a block
    real *table               # (Q + 1, 4) of each source: z, eps, term, sign
    real *gathered            # scratch: (4, packed_width) the same for each connection of a block, and (LANES + r,)
    real *type_lanes          # (r, r, 64 bytes) scratch: sums of W over types

    # what one step computes on its way, and between steps scratch
    real *current             # (N,) recurrent input W z_{t-1}
    real *input               # (Q,) W_in x_t, and zeros
    real *y                   # (n_out,)
    real *error               # (n_out,) dE/dy
    real *signal              # (N,) L = dE/dz
    real *class_rows          # (r, Q) sum_a m[a] traces[c, a, :], where it is written at once
    real *class_sums          # (r, Q) else: its sum over the steps since the gradient, or the weights, were last complete
    real *power_K             # (S + 1, r, r) K_t .. K_{t-n+1}: what n steps make of a trace; the last: scratch
    real *power_drive         # (S, r, D) drive of n - 1 steps ago, as it stands now
    real *awake_sums          # (r types, r, Q) see `sum_awake`; NULL where h is not 0 or 1, or units have no types
    real *always              # (r types, r, Q) traces of a unit that has always been awake, as of `since`; NULL where `traces` are never lazy
    Py_ssize_t always_from    # step at which they began from zero
    Py_ssize_t *held_at       # (P,) step as of which each unit has its traces, -1: they are zero
    unsigned char *based      # (P,) 1: on top of `always`
    unsigned long long *turns # (P,) and (P,): scratch of `find_turning`
    int *turning
    real *back                # (S, r) and (S, D): modulators carried back in time, see `carry_back`
    real *back_drive
    real **terms              # (S + r + 1,) rows that a block reads
    real *coef                # (S + r + 1, P) what they count for
    real *old                 # scratch of tiles, see linear.pxi
    real *tail
    real *dots
    real *pick
    real *edge                # (LANES,) last line of z, see `line_up`

    # accumulated gradient
    real *grad                # (N, Q)
    real *grad_w_out          # (n_out, N)
    real *grad_b_out          # (n_out,)


# One trial, or a stream of steps, in the caller's arrays.
ctypedef struct Trials:
    Py_ssize_t n_steps
    Py_ssize_t begin, end     # of these, the steps that `run` makes
    const real *x             # (T, n_in)
    const real *target        # (T, n_out), or NULL
    const long long *label    # of step t at t label_step, which is 0 where one is that of all steps; or NULL
    Py_ssize_t label_step
    const unsigned char *mask # (T,), or NULL: every step has its error
    bint learn
    Py_ssize_t chunk          # steps between updates of an engine that is not online; 0: none
    real *y                   # (T, n_out), or NULL
    Py_ssize_t steps_done     # out: where a failed run stopped
    Py_ssize_t failed         # out, in the first of several trials: which one it was


# What the adjoint needs of every step of a trial.
ctypedef struct Record:
    real *pre                 # (T, Q)
    real *eps                 # (T, Q), or NULL where the gradient is onto s
    real *h                   # (T, N)
    real *signal              # (T, N)
    real *rows                # (T, N) out: the left factor of the gradient; it may be `signal`
    real *exact_rows          # (T, N) out: that of the exact part, with exact_steps
    real *d                   # (N,) scratch


# What it computes.
ctypedef struct Backwards:
    Adjoint kind
    bint cells                # the modulatory matrix is W itself
    Py_ssize_t exact_steps    # 0: none
    Py_ssize_t horizon        # of truncated BPTT; 0: none
    real *mu                  # (N,)
    const real *hbar          # (N,)


# The kernels of one instruction set and one dtype.
ctypedef struct Kernels:
    Status (*step)(Model *m, const real *x, const real *target, long long label, ErrorSource source, bint learn) noexcept nogil
    Status (*run)(Model *m, Trials *trial) noexcept nogil
    Status (*run_together)(Model **models, Trials *trials, Record *recs, Py_ssize_t n, real *w, Py_ssize_t width) noexcept nogil
    void (*adjoint)(Model **models, Record *recs, Backwards *how, Py_ssize_t n, Py_ssize_t n_steps, real *w, Py_ssize_t width) noexcept nogil
    void (*assist)(Model *m, int place) noexcept nogil
    void (*reset)(Model *m) noexcept nogil
    void (*settle)(Model *m) noexcept nogil  # and show it in the network's arrays
    void (*write)(Model *m) noexcept nogil   # settle alone
    bint (*descend)(Model *m) noexcept nogil # False: a weight would not be finite; none has changed
    void (*refresh)(Model *m) noexcept nogil
    void (*derive)(Model *m) noexcept nogil
    void (*set_factor)(Model *m) noexcept nogil
    void (*follow_h)(Model *m) noexcept nogil
    bint (*gather)(Model *m) noexcept nogil
    bint (*finite)(const real *values, Py_ssize_t n) noexcept nogil
