# Between two steps: where weights and traces lie.  Included by core.pyx.


cdef class _Arrangement(_Memory):
    """Weights and traces by unit, by source where updates may wait (pending.pxi), or connections alone (sparse.pxi)."""

    cdef _defer(self, bint on):
        """From now on updates may wait, or not: weights and traces lie by source, or by unit."""
        cdef Model *m = &self.m
        if on == m.deferred:
            return
        flushed(m, self.kernels.settle)
        self._make_room(on)
        c, a, n = self.constants, self.arrays, m.n_sources
        place = c["place_by_source" if on else "place"]
        if m.trace == TRACE_EXACT and on and m.t == 0:
            a["by_source"][:, 1:] = 0  # by unit, those at rest are not cleared
        elif m.trace == TRACE_EXACT and len(a["traces"]) and on:
            a["by_source"][:n, 1:, place] = a["traces"][c["place"], :, :n].transpose(2, 1, 0)
        elif m.trace == TRACE_EXACT and not on:
            a["traces"][place, :, :n] = a["by_source"][:n, 1:, c["place_by_source"]].transpose(2, 1, 0)
        m.deferred, m.counted, m.ahead, m.turned = on, False, False, False  # all that memory may be wanting for is done
        self._bind_places()
        self._set_factor()
        for name in ("h_past", "local"):
            a[name][...] = 0
        a["h_past"].ravel()[m.t % SLOTS * m.n_places + place] = a["h"]
        c["awake"][c["place"]] = a["h"] != 0

    cdef _make_room(self, bint deferred):
        """Allocate where weights and traces are to lie."""
        cdef Model *m = &self.m
        cdef bint exact = m.trace == TRACE_EXACT
        if deferred:
            self._need("by_source", (m.n_sources + LANES, 1 + m.rank * exact, self._n_places_by_source()), <size_t>&m.by_source)
        elif exact:
            self._need("traces", (m.n_blocks * ROWS, m.rank, m.stride), <size_t>&m.traces)

    cdef _traces_of_connections(self):
        """(those among all traces [place, modulator, source], the same [modulator, connection])."""
        c, Q = self.constants, self.m.stride
        real = np.flatnonzero(c["columns"] < Q)
        place, q = np.repeat(np.arange(c["unit"].size), np.diff(c["starts"]))[real], c["columns"][real]
        return (place, slice(None), q), real

    cdef _unpack(self):
        """From the connections that exist to all of N x N: for whole trials, for chunks."""
        cdef Model *m = &self.m
        flushed(m, self.kernels.settle)
        if m.trace == TRACE_EXACT:
            self._make_room(False)
            at, of = self._traces_of_connections()
            self.arrays["traces"][at] = self.arrays["packed_traces"][:, of].T
        if m.keep == NULL:
            bind(self.constants, [("keep", self._keep(), <size_t>&m.keep)])
            self._bind_weights()
        m.sparse = False
        self._set_window(WINDOW_ONLINE)

    cdef _pack(self):
        """And back."""
        cdef Model *m = &self.m
        if m.trace == TRACE_EXACT:
            at, of = self._traces_of_connections()
            self.arrays["packed_traces"][:, of] = self.arrays["traces"][at].T if m.t else 0  # by unit, those at rest are not cleared
        m.sparse, m.counted = True, False
        self._set_window(1)

    cdef _by_chunks(self, bint on, Py_ssize_t window):
        """Between two steps, from learning at once to one update after every so many, or back.

        Where updates may wait, its end writes them; else the gradient is added up.
        """
        cdef Model *m = &self.m
        cdef bint waits = m.may_defer and not (on and self._constrained())
        flushed(m, self.kernels.write)
        self._defer(waits)
        m.online, m.frozen, m.counted = not on, on and waits, False
        m.follows = m.instant or (not on and m.type != NULL and m.refresh_every > 0 and not m.n_taps)
        if on:
            self._need("grad_w_out", (m.n_out, m.n_rec), <size_t>&m.grad_w_out)
        if on and not waits:
            self._need("grad", (m.n_rec, m.stride), <size_t>&m.grad)
        elif on and window > MAX_WINDOW:
            self._need("still", (m.n_sources, self._n_places_by_source()), <size_t>&m.still)
        self._set_window(min(window, MAX_WINDOW))
        m.owed_until = m.t
        flushed(m, self.kernels.derive)

    cdef _set_window(self, Py_ssize_t window):
        flushed(&self.m, self.kernels.write)
        self.m.owed_until, self.m.counted = self.m.t, False
        if self.m.may_defer and self.m.online and self._constrained():
            window = 1
        self.m.window = 1 if self.m.n_taps else self.m.exact_steps or window
        self.m.n_groups = self.m.window if self.m.online and not self.m.sparse else 1
        self.constants["since"][:] = self.m.t
        n_groups, n_blocks = self.m.n_groups, (self.m.n_sources + TOGETHER - 1) // TOGETHER  # groups as even as blocks of TOGETHER can be
        self.constants["bounds"][: n_groups + 1] = TOGETHER * (n_blocks * np.arange(n_groups + 1) // n_groups)

    @property
    def sparse(self) -> bool:
        """Whether it keeps the connections that may exist alone, see sparse.pxi."""
        return self.m.sparse

    @property
    def unwritten(self) -> bool:
        """Whether the network's arrays do not show yet what has been learned."""
        return self.m.unwritten

    @property
    def window(self) -> int:
        """Steps that traces may lag behind, 1 to MAX_WINDOW: a matter of speed."""
        return self.m.window

    @window.setter
    def window(self, Py_ssize_t window):
        self._set_window(window)
