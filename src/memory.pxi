# What an engine owns, and where it lies.  Included by core.pyx.
#
# `_Memory` has every array that the kernels touch and the Model that points at them.  `_Arrangement` moves weights and
# traces between two steps: by unit, by source (pending.pxi), connections alone (sparse.pxi).


cdef void *address(array) except? NULL:
    """Where an array that the engine allocated, or has checked, begins."""
    return NULL if array is None or array.size == 0 else cnp.PyArray_DATA(array)  # not array.ctypes: Python code, where Ctrl-C may come


cdef real *_real(array) except? NULL:
    return <real *>address(array)


def aligned(shapes, dtype, page=64):
    """Zeroed arrays of `dtype`, each on a 64-byte boundary, carved from one allocation.

    Parameters
    ----------
    shapes : dict of name -> shape
    dtype : anything that names a dtype
    page : bytes, a multiple of 64; an array of as many, or more, begins at a multiple of them

    Returns
    -------
    dict of name -> C-contiguous array
    """
    dtype = np.dtype(dtype)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    begins, end = {}, 0
    for name, size in sizes.items():
        begins[name] = end + -end % (page if size >= page else 64)
        end = begins[name] + size
    block, at = _block(end, page)
    return {name: block[at + begins[name] :][: sizes[name]].view(dtype).reshape(shape) for name, shape in shapes.items()}


def _block(size, page):
    """(zeroed bytes, offset of a multiple of `page`); large ones on huge pages where the system has them.

    The matrices of 512 units and more are passed over at every step: with small pages the time of a step depends on
    where they happen to lie.
    """
    huge = 1 << 21
    if size >= huge and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory = mmap.mmap(-1, size + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets none
        except OSError:
            raise MemoryError(f"want of memory: {size} bytes") from None
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # this kernel has none
        block = np.frombuffer(memory, np.uint8)
        return block, -block.ctypes.data % huge
    block = np.zeros(size + page, np.uint8)
    return block, -block.ctypes.data % page


cdef bind(dict arrays, table):
    """Keep arrays by name, and tell a Model where they begin.

    table : (name, array, where the pointer to it lies, 0 for none) of each; an empty array is NULL.
    """
    cdef void *begin
    for name, array, pointer in table:
        arrays[name], begin = array, address(array)
        if pointer:
            memcpy(<void *><size_t>pointer, &begin, sizeof(begin))


cdef runs_of(place):
    """(runs, 3) neighbours that are neighbours by place too: the first one, its place, how many."""
    starts = np.flatnonzero(np.diff(place, prepend=-2) != 1)
    return np.stack([starts, place[starts], np.diff(starts, append=len(place))], axis=1).astype(np.intc)


cdef class _Memory:
    """The arrays of one network bound to one rule, and the numbers that describe them."""

    cdef Model m
    cdef const Kernels *kernels
    cdef object network, plan, feedback, sign, h_mean
    cdef readonly dict arrays  # state, scratch and gradient by name
    cdef dict constants  # of other dtypes

    def __init__(self, network, plan, loss, feedback, bint online, double lr, bint sparse):
        cdef Model *m = &self.m
        self.network, self.plan, self.feedback = network, plan, feedback
        self.arrays, self.constants = {}, {}
        self._describe(loss, online, lr)
        m.sparse = sparse and online and self._few()
        m.may_defer = online and not m.sparse and self._may_defer()
        m.exact_steps = plan.exact_steps if plan.exact_steps < SLOTS and not plan.offline_because else 0
        if plan.taps is not None:
            m.n_taps, m.fixed_taps = len(plan.taps), plan.taps.ndim > 1
        self._lay_out()
        if m.sparse:
            self._lay_out_connections()
        self._allocate()
        self._bind_weights()
        self._bind_places()

    cdef _describe(self, loss, bint online, double lr):
        """The numbers of the Model that network and plan give."""
        cdef Model *m = &self.m
        network, plan = self.network, self.plan
        m.n_in, m.n_rec, m.n_out = network.n_in, network.n_rec, network.n_out
        m.n_sources = m.n_rec + m.n_in + ("b_rec" in network.weights)
        m.rank, m.stride = plan.rank, self._whole_lines(m.n_sources)
        m.activation = {"relu": RELU, "softplus": SOFTPLUS, "tanh": TANH, "sigmoid": SIGMOID, "identity": IDENTITY}[network.activation]
        m.loss = {"mse": MSE, "cross_entropy": CROSS_ENTROPY}[loss]
        m.trace = {"none": TRACE_NONE, "exact": TRACE_EXACT, "mean": TRACE_MEAN, "taps": TRACE_TAPS}[plan.trace]
        m.online, m.autapses = online, network.autapses
        m.self_modulation, m.refresh_every, m.instant = plan.self_modulation, plan.refresh_every, plan.instant
        m.one_tap, m.running = plan.one_tap, plan.running
        m.follows = plan.instant or (online and plan.types is not None and plan.refresh_every > 0 and plan.taps is None)
        m.leak, m.lr, m.scale = network.leak, lr, 1.0

    def _may_defer(self):
        """Whether weights may lie by source (pending.pxi), and whether that pays."""
        network, plan, size = self.network, self.plan, self._weights_in_bytes()
        if (network.sign is not None and size > SIGNED_AT_ONCE) or (network.mask is not None and size > MASKED_AT_ONCE):
            return False
        if plan.exact_steps or plan.offline_because:
            return False
        if plan.trace == "taps" or (plan.trace == "mean" and (plan.types is None or not plan.self_modulation)):
            return False
        return plan.rank <= 2

    cdef bint _constrained(self):
        return self.network.sign is not None or self.network.mask is not None

    def _few(self):
        """Whether the rule is one that `sparse.pxi` knows and the connections are few enough for it to pay."""
        network, plan = self.network, self.plan
        known = plan.trace in SPARSE and not plan.exact_steps and (plan.trace != "mean" or plan.types is not None)
        if not known or plan.offline_because or network.mask is None:
            return False
        units, density = SPARSE[plan.trace]
        return network.n_rec >= units and network.connections.mean() < density

    cdef Py_ssize_t _usual_window(self):
        """Steps that traces may lag behind in an engine that is online, without chunks."""
        if not self.m.may_defer:
            return WINDOW_ONLINE
        if self._weights_in_bytes() <= AT_ONCE << (self.m.activation != RELU):
            return 1
        return WINDOW_DEFERRED if self.m.n_rec < 256 else WINDOW

    cdef Py_ssize_t _weights_in_bytes(self):
        return self.m.n_sources * self._n_places_by_source() * self.network.dtype.itemsize

    cdef Py_ssize_t _whole_lines(self, Py_ssize_t n):
        return (n + LANES - 1) // LANES * LANES

    cdef Py_ssize_t _n_places_by_source(self):
        n = self._whole_lines(self.m.n_rec)
        return n + LANES * (n * self.network.dtype.itemsize % 2048 == 0)  # rows that are halves of a page apart are in each other's way in the first cache

    # ------------------------------------------------------------ what there is

    cdef _lay_out(self):
        """Units in blocks of one type, and arrays of other dtypes."""
        cdef Model *m = &self.m
        N, r, S = m.n_rec, m.rank, SLOTS
        types = np.zeros(N, np.intc) if self.plan.types is None else self.plan.types.astype(np.intc)
        units = [np.flatnonzero(types == a) for a in range(types.max() + 1)]
        low_rank = r and self.plan.types is None
        whole = LANES if low_rank and m.may_defer else ROWS
        full = [np.append(u, np.full((whole - len(u) % whole) % whole, -1)).reshape(-1, ROWS) for u in units]
        unit = np.concatenate(full).astype(np.intc)
        place = np.flatnonzero(unit.ravel() >= 0)[np.argsort(unit[unit >= 0])].astype(np.intc)
        place_by_source = np.argsort(np.argsort(types, kind="stable")).astype(np.intc)
        P = unit.size
        spares = m.may_defer and m.trace == TRACE_EXACT and m.activation == RELU
        m.n_blocks, m.n_places, m.n_drive = len(unit), P, P if low_rank else r
        m.keeps_h = m.trace in (TRACE_EXACT, TRACE_TAPS) or m.exact_steps > 0
        bind(self.constants, [
            ("unit", unit, <size_t>&m.unit),
            ("place", place, 0),  # these three as `_bind_places` says
            ("runs", runs_of(place), 0),
            ("type_ends", ROWS * np.cumsum(list(map(len, full)), dtype=np.intc), 0),
            ("place_by_source", place_by_source, 0),
            ("runs_by_source", runs_of(place_by_source), 0),
            ("type_ends_by_source", np.cumsum(np.bincount(types), dtype=np.intc), 0),
            ("block_type", np.repeat(np.arange(len(full), dtype=np.intc), list(map(len, full))), <size_t>&m.block_type),
            ("type", types, <size_t>&m.type if self.plan.types is not None else 0),
            ("drive_class", place if low_rank else types, <size_t>&m.drive_class),
            ("since", np.zeros(S, np.intp), <size_t>&m.since),
            ("erred", np.zeros(S, np.uint8), <size_t>&m.erred),
            ("terms", np.zeros(S + r + 1, np.uintp), <size_t>&m.terms),
            ("awake", np.zeros(max(P, self._n_places_by_source()), np.uint64), <size_t>&m.awake),
            ("heard", np.zeros((m.stride + LANES) * m.may_defer, np.intc), <size_t>&m.heard),
            ("spoke", np.zeros(m.stride * spares, np.uint32), <size_t>&m.spoke),
            ("keep", np.empty(0, np.int8) if m.sparse else self._keep(), <size_t>&m.keep),
            ("bounds", np.zeros(S + 1, np.intp), <size_t>&m.bounds),
            ("held_at", np.zeros(P, np.intp), <size_t>&m.held_at),
            ("based", np.zeros(P, np.uint8), <size_t>&m.based),
            ("turns", np.zeros(P, np.uint64), <size_t>&m.turns),
            ("turning", np.zeros(P, np.intc), <size_t>&m.turning),
        ])
        self._own(np.float64, self.constants, [
            ("size", (r,), <size_t>&m.type_size), ("share", (r,), <size_t>&m.type_share),
            ("mu", (r,), <size_t>&m.type_mu), ("means", (r, r), <size_t>&m.means),
            ("power", (3, r, r), <size_t>&m.power), ("type_sums", (r, r), <size_t>&m.type_sums),
            ("trace_sums", (r, r, r), <size_t>&m.trace_sums), ("step_sums", (7, r), <size_t>&m.step_sums),
        ])

    cdef _keep(self):
        """(n_rec, n_rec) int8: -1 where a synapse may exist, else 0; empty where it may everywhere."""
        return np.empty(0, np.int8) if self.network.mask is None else -self.network.mask.astype(np.int8)

    cdef _lay_out_connections(self):
        """Sources of each unit, as they are placed: units that may send to it by type, inputs, and Q up to whole lines."""
        cdef Model *m = &self.m
        c, connections, line = self.constants, self.network.connections, 64 // self.network.dtype.itemsize
        by_type = np.argsort(c["type"], kind="stable")
        rows, inputs_at, starts = [], [], [0]
        stops = np.zeros((c["unit"].size, m.rank), np.intc)
        for place, p in enumerate(c["unit"].ravel()):
            synapses = by_type[connections[p, by_type]] if p >= 0 else by_type[:0]
            row = np.append(synapses, np.arange(m.n_rec, m.n_sources)) if p >= 0 else synapses
            inputs_at.append(starts[-1] + len(synapses))
            starts.append(starts[-1] + -(-len(row) // line) * line)
            rows += [row, np.full(starts[-1] - starts[-2] - len(row), m.stride)]
            if self.plan.types is not None:
                stops[place] = np.searchsorted(c["type"][synapses], np.arange(m.rank), side="right")
        bind(c, [
            ("columns", np.concatenate(rows).astype(np.intc), <size_t>&m.columns), ("type_stops", stops, <size_t>&m.type_stops),
            ("starts", np.array(starts, np.intp), <size_t>&m.starts), ("inputs_at", np.array(inputs_at, np.intp), <size_t>&m.inputs_at),
        ])
        m.packed_width = np.diff(c["starts"][::ROWS]).max()

    cdef _own(self, dtype, dict arrays, table):
        """Allocate, in one block of memory.  table: (name, shape, where the pointer to it lies, 0 for none) of each.

        A load waits for a store before it where the last 12 bits of their addresses are equal.  Of online updates what is read
        and what is written in turn are rows equally far apart: where all begin with a page, these bits differ, and no longer by chance.
        """
        new = aligned({name: shape for name, shape, _ in table}, dtype, PAGE if self.m.online else 64)
        bind(arrays, [(name, new[name], pointer) for name, _, pointer in table])

    cdef bint _need(self, name, shape, size_t pointer):
        """Allocate what is not there yet; whether it was not."""
        if name in self.arrays and self.arrays[name].size:
            return False
        self._own(self.network.dtype, self.arrays, [(name, shape, pointer)])
        return True

    cdef _allocate(self):
        """Every array that a step touches.  model.pxd says what they are."""
        cdef Model *m = &self.m
        cdef bint exact = m.trace == TRACE_EXACT, mean = m.trace == TRACE_MEAN, types = m.type != NULL, waits = m.may_defer
        cdef bint whole = m.trace == TRACE_EXACT and not m.sparse and not waits, binary = exact and types and m.activation == RELU
        N, Q, r, D, S, n_out = m.n_rec, m.stride, m.rank, m.n_drive, SLOTS, m.n_out
        P, placed = m.n_places, max(m.n_places, self._n_places_by_source())
        past, own = S * (exact and m.follows), r * (mean and not m.self_modulation)
        lazy = r * (binary and not m.online and not m.follows and r < SLOTS)
        kept = 0 if m.online else N
        connections = len(self.constants["columns"]) if m.sparse else 0
        driven = S * (exact or m.n_taps > 0)
        threads = TEAM if self.shares_rows else 1
        self._own(self.network.dtype, self.arrays, [
            # state
            ("pre", (Q,), <size_t>&m.pre), ("v", (N,), <size_t>&m.v), ("h", (N,), <size_t>&m.h),
            ("h_past", (S, placed), <size_t>&m.h_past), ("eps", (S, Q), <size_t>&m.eps), ("local", (S, placed), <size_t>&m.local),
            ("modulator", (S, r), <size_t>&m.modulator), ("traces", (r, r, Q) if mean else (P * whole, r, Q), <size_t>&m.traces),
            ("self_traces", (own, Q), <size_t>&m.self_traces), ("class_eps", (S * (own > 0), r, Q), <size_t>&m.class_eps),
            ("past_K", (past, r, r), <size_t>&m.past_K), ("past_drive", (past, D, r), <size_t>&m.past_drive),
            ("h_sum", (N * self.plan.measures_h,), <size_t>&m.h_sum), ("sources", (S * (m.exact_steps > 0), Q), <size_t>&m.sources),
            # of a step
            ("current", (self._whole_lines(N),), <size_t>&m.current), ("input", (Q,), <size_t>&m.input), ("y", (n_out,), <size_t>&m.y),
            ("error", (n_out,), <size_t>&m.error), ("signal", (N,), <size_t>&m.signal),
            ("class_rows", (r * mean, Q), <size_t>&m.class_rows), ("class_sums", (r * mean, Q), <size_t>&m.class_sums),
            ("power_K", (S + 1, r, r), <size_t>&m.power_K), ("always", (lazy, r, Q), <size_t>&m.always),
            ("awake_sums", (r * (binary and 2 <= r < SLOTS), r, Q), <size_t>&m.awake_sums), ("power_drive", (driven, r, D), <size_t>&m.power_drive),
            ("back", (S, r), <size_t>&m.back), ("back_drive", (driven, D), <size_t>&m.back_drive),
            ("coef", (S + r + 1, placed), <size_t>&m.coef), ("old", (ROWS, max(r, 1), Q), <size_t>&m.old),
            ("tail", (ROWS, LANES + Q), <size_t>&m.tail), ("dots", (ROWS, LANES), <size_t>&m.dots), ("pick", (2 * LANES,), <size_t>&m.pick),
            ("dummy", (Q,), <size_t>&m.dummy), ("zeros", (max(placed, Q),), <size_t>&m.zeros), ("edge", (LANES,), <size_t>&m.edge),
            ("keep_by_source", (m.n_sources * (m.keep != NULL and waits), self._n_places_by_source()), <size_t>&m.keep_by_source),
            # updates that wait
            ("sent", (S * (m.spoke != NULL), Q), <size_t>&m.sent), ("eps_owed", (S * waits, Q), <size_t>&m.eps_owed),
            ("onto_h", (S * waits, D), <size_t>&m.onto_h), ("carried", (S * waits, r), <size_t>&m.carried),
            ("eps_placed", (S * waits, placed), <size_t>&m.eps_placed), ("front", (placed * waits,), <size_t>&m.front),
            ("heard_count", ((1 + r) * waits, Q + LANES), <size_t>&m.heard_count), ("own", (placed,), <size_t>&m.own),
            ("self_weights", (Q * waits,), <size_t>&m.self_weights),
            ("counts", (waits * threads, 3 * S, min(STRETCH_SPARED * LANES, placed)), <size_t>&m.counts), ("placed", (placed,), <size_t>&m.placed),
            ("eps_dots", (2, S + ROWS), <size_t>&m.eps_dots), ("still", (0, placed), <size_t>&m.still),
            # few connections
            ("packed", (connections,), <size_t>&m.packed), ("packed_traces", (r * exact, connections), <size_t>&m.packed_traces),
            ("table", (Q + 1, 4), <size_t>&m.table), ("gathered", (4 * m.packed_width + LANES + r,), <size_t>&m.gathered),
            ("type_lanes", (r, r, LANES * (connections > 0 and types)), <size_t>&m.type_lanes),
            # modulation
            ("u", (r, P), 0), ("u_by_source", (r, self._n_places_by_source()), 0),
            ("factor_of", (r, self._n_places_by_source()), <size_t>&m.factor_of), ("factor_by_unit", (r, Q), <size_t>&m.factor_by_unit),
            ("factor_sums", (r,), <size_t>&m.factor_sums), ("column_sums", (r, Q), <size_t>&m.column_sums),
            ("membership", (r, Q), <size_t>&m.membership), ("K", (r, r), <size_t>&m.K), ("drive", (D, r), <size_t>&m.drive),
            ("class_drive", (r, r), <size_t>&m.class_drive), ("readout", (r, P), <size_t>&m.readout), ("self_drive", (2, r), <size_t>&m.self_drive),
            # gradient
            ("grad", (kept, Q), <size_t>&m.grad), ("grad_w_out", (n_out, kept), <size_t>&m.grad_w_out), ("grad_b_out", (n_out,), <size_t>&m.grad_b_out),
        ])  # fmt: skip
        self.arrays["pick"][LANES:] = 1
        if m.keep != NULL and waits:
            self.arrays["keep_by_source"][:] = 1
            self.arrays["keep_by_source"][:N, self.constants["place_by_source"]] = self.network.mask.T

    @property
    def shares_rows(self) -> bool:
        """Whether `run` can use several threads."""
        return self.m.may_defer and self.m.n_rec >= TEAM_FROM

    # ------------------------------------------------------------ what it is of

    cdef _bind_weights(self):
        """The network's own arrays; rows of W and of the mask by place, zeros that stay so where there is no unit."""
        cdef Model *m = &self.m
        weights, unit = self.network.weights, self.constants["unit"].ravel()

        def rows(array):
            at = array.ctypes.data + unit.astype(np.intp) * array.strides[0]
            return np.where(unit >= 0, at, self.arrays["dummy"].ctypes.data).astype(np.uintp)

        m.w_rec, m.w_in, m.b_rec = _real(weights["w_rec"]), _real(weights["w_in"]), _real(weights.get("b_rec"))
        m.w_out, m.b_out = _real(weights["w_out"]), _real(weights["b_out"])
        self.sign = self.network.sign
        m.sign, m.feedback = _real(self.sign), _real(self.feedback)
        keep = self.constants["keep"]
        bind(self.constants, [
            ("w_rows", rows(weights["w_rec"]), <size_t>&m.w_rows),
            ("keep_rows", rows(keep) if len(keep) else np.empty(0, np.uintp), <size_t>&m.keep_rows),
        ])

    cdef _bind_places(self):
        """Where each unit has its place: in a block of ROWS of one type; or by source, one after the other, type by type."""
        cdef Model *m = &self.m
        c, a, by = self.constants, self.arrays, "_by_source" if m.deferred else ""
        m.n_places = self._n_places_by_source() if m.deferred else c["unit"].size
        m.place, m.runs, m.n_runs = <int *>address(c["place" + by]), <int *>address(c["runs" + by]), len(c["runs" + by])
        m.type_ends, m.u = <int *>address(c["type_ends" + by]), _real(a["u" + by])

    # ------------------------------------------------------------ modulation

    cdef _set_factor(self):
        """The factor of `mean` and of `running`, of types; where they lie now."""
        if self.m.type != NULL:
            self.kernels.set_factor(&self.m)

    def follow(self, plan):
        """Another plan of the same make, or another mean of h."""
        flushed(&self.m, self.kernels.write)  # what waits goes through the filter of before
        self.plan = plan
        if plan.types is None:
            self._set_modulation()
        else:  # the means of W are refreshed apart
            self.constants["mu"][:] = plan.mu
            self._set_factor()
            flushed(&self.m, self.kernels.derive)

    cdef _set_modulation(self):
        """Types: the constants of the mean matrix.  Low rank: the filter itself, which does not follow W."""
        cdef Model *m = &self.m
        plan, a, c = self.plan, self.arrays, self.constants
        self._set_factor()
        if plan.types is not None:
            c["size"][:] = np.bincount(plan.types, minlength=m.rank)
            c["share"][:] = 1 / c["size"]
            c["mu"][:] = plan.mu
            a["membership"][plan.types, np.arange(m.n_rec)] = 1
            a["u"][plan.types, c["place"]] = a["u_by_source"][plan.types, c["place_by_source"]] = 1
            if m.fixed_taps:
                a["power_drive"][1 : 1 + m.n_taps] = plan.taps
            flushed(m, self.kernels.refresh)
        elif m.rank:
            k, mu = m.leak, np.broadcast_to(plan.mu, m.n_rec)
            U, V = np.ascontiguousarray(plan.u), np.ascontiguousarray(plan.v)  # the same bits however they lie: a restored plan's are copies
            a["u"][:, c["place"]] = a["u_by_source"][:, c["place_by_source"]] = U.T
            a["K"][:] = 0 if plan.one_tap else k * np.eye(m.rank) + (1 - k) * (V * mu) @ U
            a["drive"][c["place"]] = (1 - k) * V.T
            a["class_drive"][:] = (1 - k) * np.eye(m.rank)
            a["readout"][:, c["place"]] = V * (self.h_mean if plan.running else mu)
            flushed(m, self.kernels.derive)

    def take_h(self):
        """(sum over steps of h (n_rec,), number of steps) since the last call."""
        total, count = self.arrays["h_sum"].astype(float), self.m.h_count
        self.arrays["h_sum"][:], self.m.h_count = 0, 0
        return total, count

    @property
    def means(self):
        """(r, r) type means of W as the filter uses them, a copy; None for other modulations."""
        return self.constants["means"].copy() if self.m.type != NULL else None

    @means.setter
    def means(self, values):
        if self.m.type != NULL:
            self.constants["means"][:] = values
            flushed(&self.m, self.kernels.derive)

    @property
    def updates(self) -> int:
        """Updates so far: of the weights at every step, or as counted by the learner."""
        return self.m.updates

    @updates.setter
    def updates(self, Py_ssize_t count):
        self.m.updates = count
