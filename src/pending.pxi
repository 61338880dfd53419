# Online updates that are felt at once and written later.
#
# What a step needs of the updates before it is their product with its input s_t = [z_{t-1} | x_t | 1], and for that
# no weight has to be written.  Of a source q whose weights and traces are those of step t0, with j the steps since,
#
#     W[:, q] now  =  W[:, q]  -  c R[:, q]  -  sum_j A_j eps_j[q]          A_j = L_j h_j + (lam_j d) h_j
#
# where c (r numbers for all sources of a group) and lam d (a number for each type) sum what carry_back gives for each
# error; of step t0 itself the local part L h is in W, while R, which has come to eps_{t0-1}, leaves the other to come.
# So a step reads W and R once, adds a few products of vectors, and writes nothing of that size; every step brings
# one group of sources up to date, in turn, by one update of rank `window`.
#
# It is the plain sum that makes this possible: a sign that a weight must obey at every step does not, nor does a mask.
# Of the `mean` factor by types all is of rank r, a row for each type: these rows are summed up and need not be written
# before the weights are asked for.  The type means of W follow from sums over types of R, h and eps, without a look at W.
#
# With one group (`at_once`: small networks, whose weights stay in the first caches, and weights with signs or a mask to keep) nothing else
# waits: every step writes all, and of the next takes the product with z on the way.
#
# In `run(chunk=)` weights stand still within a chunk: nothing that waits is felt before its end, when all is written.  A chunk
# of more steps than `window` is written every so many, but for the weights, which stand by themselves until its end.


# ---------------------------------------------------------------- what a step reads

cdef void dot_terms(Model *m, real *out, Py_ssize_t n_rows) noexcept nogil:
    """out[j] = terms[j] . s_t, over (Q,) rows; space for ROWS - 1 more."""
    cdef real **rows = m.terms
    cdef Py_ssize_t j = 0, last = n_rows - 1
    while j < n_rows:
        dot_rows(out + j, rows[j], rows[min(j + 1, last)], rows[min(j + 2, last)], rows[min(j + 3, last)],
                 m.pre, m.edge, m.stride)
        j += ROWS


cdef void dot_added(Model *m, real *out, Py_ssize_t n_ages) noexcept nogil:
    """out[n] = eps of n steps ago . s_t, over the sources that were written at that step."""
    cdef Py_ssize_t group, n, q
    cdef const real *s = m.pre
    cdef const real *eps
    cdef real a, b, c, d
    memset(out, 0, n_ages * sizeof(real))
    for group in range(m.n_groups):
        n = m.t - m.since[group]
        eps, a, b, c, d = m.eps_owed + slot(m.t - n) * m.stride, 0, 0, 0, 0
        q = m.bounds[group]
        while q < m.bounds[group + 1]:
            a, b, c, d = a + eps[q] * s[q], b + eps[q + 1] * s[q + 1], c + eps[q + 2] * s[q + 2], d + eps[q + 3] * s[q + 3]
            q += TOGETHER
        out[n] += (a + b) + (c + d)


cdef void feel(Model *m) noexcept nogil:
    """What the last steps' errors take from the products with s_t."""
    cdef Py_ssize_t P = m.n_places, n_ages = min(m.window if m.trace == TRACE_EXACT else m.window - 1, m.t + 1), n, s, a
    cdef real *dots = m.eps_dots
    cdef real *added = dots + SLOTS + ROWS
    cdef Waiting it
    for n in range(n_ages):  # a group lags less than `window`
        s = slot(m.t - n)
        m.terms[n] = m.eps_owed + s * m.stride
        it.local[n], it.h[n], it.eps[n] = m.local + s * P, m.h_past + s * P, m.eps_placed + s * P
        it.onto[n] = m.onto_h + s * m.n_drive
    dot_terms(m, dots, n_ages)
    if m.trace == TRACE_EXACT:
        dot_added(m, added, n_ages)
    it.n_ages, it.dots, it.added, it.front = n_ages, dots, added, m.front
    for a in range(m.rank):
        it.of_type[a] = m.u + a * P
    feel_parts(m, &it)


cdef inline void feel_sums_by(vec *current, const Model *m, const real *dots, Py_ssize_t r, bint autapses) noexcept nogil:
    """current -= factor dots, which without autapses are but over the other units."""
    cdef Py_ssize_t n = m.stride // VEC_LANES, q, a
    cdef const vec *z = <const vec *>m.pre
    cdef const vec *sums = <const vec *>m.class_sums
    cdef const vec *factor = <const vec *>m.factor_by_unit
    cdef vec dot[2]
    cdef vec s, x
    for a in range(r):
        dot[a] = -spread(dots[a])
    for q in range(filled_lines(m) * PER_LINE):
        s = current[q]
        for a in range(r):
            x = dot[a] if autapses else dot[a] + sums[a * n + q] * z[q]  # rounded as in the dot: 0 where nobody else was heard
            s = madd(s, factor[a * n + q], x)
        current[q] = s


cdef void feel_sums(Model *m) noexcept nogil:
    """What the summed rows of `mean` take from the products with s_t."""
    cdef real dots[2]
    matvec_at_hand(&dots[0], m.class_sums, m.pre, m.rank, m.stride)
    if m.rank == 2 and not m.autapses:
        feel_sums_by(<vec *>m.current, m, &dots[0], 2, False)
    else:
        feel_sums_by(<vec *>m.current, m, &dots[0], m.rank, m.autapses)


cdef void recurrent_input(Model *m) noexcept nogil:
    """current = ([W | W_in | b] with all that waits) s_t, for the step to come: m.t is still that of the last."""
    cdef Py_ssize_t p
    cdef bint waits = m.t < m.owed_until
    cdef real *current = m.current
    cdef const real *own = m.own
    cdef const real *z = m.pre
    if not m.turned:
        bring_in(m)
    list_by(m, m.pre, m.rank if waits and m.trace == TRACE_EXACT else 0, 0)
    share_out(m, False, 0)
    if waits:
        feel(m)
    by_place(m, current, m.placed, True)
    if waits and not m.autapses:
        if m.trace == TRACE_EXACT:
            by_place(m, m.input, own, True)
            own = m.input
        for p in range(m.n_rec):
            current[p] += own[p] * z[p]
    if m.summed and not m.frozen:
        feel_sums(m)
    m.driven = True


cdef void inputs_alone(Model *m) noexcept nogil:
    """input = [W_in | b] [x_t | 1]: the rest has been heard."""
    list_by(m, m.pre, 0, m.n_rec)
    share_out(m, False, 0)
    by_place(m, m.input, m.placed, True)
    if m.summed:
        feel_sums(m)


# ---------------------------------------------------------------- after a step

cdef void defer(Model *m, Py_ssize_t n_steps, bint learn) noexcept nogil:
    """What this step's error says of the weights is added to what waits; `n_steps`: the most that a group
    lags behind."""
    cdef Py_ssize_t P = m.n_places, r = m.rank, s = slot(m.t), n, i, a, group
    cdef real *local = m.local + s * P
    cdef const real *learned = m.input  # L h
    cdef const real *carry = m.back
    cdef real *onto
    cdef real *carried
    if not learn:
        memset(local, 0, P * sizeof(real))
    if m.trace == TRACE_EXACT and not constrained(m):  # for `follow_sums`, too
        by_place(m, m.eps_placed + s * P, m.eps + s * m.stride, False)
    if at_once(m):
        m.owed_until, m.unwritten = m.t, m.unwritten or learn
        return
    memcpy(m.eps_owed + s * m.stride, m.eps + s * m.stride, m.stride * sizeof(real))
    if m.trace == TRACE_EXACT:
        memset(m.onto_h + s * m.n_drive, 0, m.n_drive * sizeof(real))
    if not learn:
        return
    m.owed_until, m.unwritten = m.t + m.n_groups, True
    if m.trace != TRACE_EXACT:
        for i in range(m.n_rec):
            m.own[i] += learned[i] * m.eps[s * m.stride + i]
        return
    for group in range(m.n_groups):
        carried = m.carried + group * r
        n = m.t - m.since[group]
        for a in range(r):
            carried[a] += carry[n * r + a]
    for n in range(1, n_steps + 1):
        onto = m.onto_h + slot(m.t - n) * m.n_drive
        for i in range(m.n_drive):
            onto[i] += m.back_drive[n * m.n_drive + i]


cdef void write_lines(Model *m, Py_ssize_t group, Py_ssize_t first, Py_ssize_t last, real *scratch) noexcept nogil:
    """Bring the weights and the traces of a group of sources up to date, for some lines of places."""
    cdef real *coef = m.coef
    cdef Py_ssize_t P = m.n_places, Q = m.stride, n_steps = m.t - m.since[group], n_bytes, n, a, s, line = first, end
    cdef Classes of
    cdef Py_ssize_t rank = m.rank if m.trace == TRACE_EXACT else 0, q = m.bounds[group], q_end = m.bounds[group + 1]
    cdef bint owed = m.since[group] < m.owed_until
    cdef Writing it
    it.rows, it.coef, it.width, it.n_classes, it.n_traced, it.n_terms = m.by_source, scratch, P, m.n_drive, 0, 0
    n_bytes = m.n_sources * between_sources(m) * sizeof(real)
    it.far, it.remote = n_bytes > CACHED, n_bytes > REMOTE
    it.spared, it.spoke, it.keep = spares(m), m.spoke, <real>m.leak
    it.carry, it.K = m.carried + group * rank, m.power_K + n_steps * rank * rank
    for n in range(1, n_steps + 1 if rank else 1):
        s = slot(m.t - n)
        it.terms[n - 1], it.h[n - 1] = m.eps + s * Q, m.h_past + s * P
        it.drives[n - 1], it.onto[n - 1] = m.power_drive + n * rank * m.n_drive, m.onto_h + s * m.n_drive
        it.local[n - 1] = m.local + s * P if n < n_steps else m.zeros  # W has it
        if m.frozen:
            it.local[n - 1], it.onto[n - 1] = coef + n * P, m.zeros
        it.sent[n - 1] = m.sent + slot(m.t - n + 1) * Q
        it.n_traced = it.n_terms = n
    for n in range(1 if rank else n_steps):  # the rest counts for the weights alone
        s = slot(m.t - n)
        it.terms[it.n_terms], it.local[it.n_terms] = m.eps + s * Q, coef + n * P if m.frozen else m.local + s * P
        it.n_terms += 1
    for a in range(m.rank):
        it.of_type[a] = m.u + a * P
    n = it.n_terms
    while line < last:
        end, it.n_terms = min(end_of_part(m, line, &of, &it.type), last), n
        if not rank and (not m.sums_too or last - line <= FEW_LINES):
            end, of = last, TWO_TYPES  # no type apart
        for a in range(m.rank if m.sums_too else 0):
            if of == TWO_TYPES or a == it.type:
                it.terms[it.n_terms], it.local[it.n_terms] = m.class_sums + a * Q, m.factor_of + a * P
                it.n_terms += 1
        write(&it, q, q_end, line * PER_LINE, end * PER_LINE, rank, owed, of)
        line = end


cdef void place_drives(vec *out, const vec *h, const Model *m, const real **of_type) noexcept nogil:
    """h drive[a] of the units by place, for each modulator, (r, P)."""
    cdef Py_ssize_t V = m.n_places // VEC_LANES, a, v
    cdef Classes of = BY_PLACE if m.type == NULL else TWO_TYPES if m.rank == 2 else ONE_TYPE
    cdef const real *drive = m.power_drive + m.rank * m.n_drive  # of one step ago
    for a in range(m.rank):
        for v in range(V):
            out[v] = h[v] * counts_for(drive, 0, v, of_type, of)
        drive += m.n_drive
        out += V


cdef void write_and_hear(Model *m) noexcept nogil:
    """What this step says of weights and traces is written, and meanwhile current = W z for the next."""
    cdef Py_ssize_t P = m.n_places, r = m.rank, s = slot(m.t), before = slot(m.t - 1), units = 0 if m.autapses else m.n_rec, a, b, p
    cdef Py_ssize_t rank = r if m.trace == TRACE_EXACT else 0
    cdef real *drive = m.coef
    cdef real *z = m.input
    cdef real *missing = m.old
    cdef real *current = m.current
    cdef real *short
    cdef real total[2]
    cdef Writing it
    m.since[0] = m.t
    if not rank and not m.erred[s]:
        return
    memset(z, 0, m.stride * sizeof(real))
    memcpy(z, m.pre, m.n_rec * sizeof(real))
    if constrained(m):  # places without a unit, too
        memset(drive + r * P, 0, (r + 1) * P * sizeof(real))
    it.rows, it.width, it.n_terms, it.sent[0], it.tally, it.missing = m.by_source, P, m.erred[s], z, drive + r * P, missing
    it.far = m.n_sources * P * sizeof(real) > NEAR
    it.carry, it.K = m.modulator + s * r, m.power_K + r * r
    it.terms[0], it.local[0] = m.eps + s * m.stride, m.local + s * P
    for a in range(r if m.trace == TRACE_MEAN and constrained(m) else 0):
        it.terms[it.n_terms], it.local[it.n_terms] = m.class_rows + a * m.stride, m.factor_of + a * P
        it.n_terms += 1
    if rank:
        it.terms[it.n_terms] = m.eps + before * m.stride
    for a in range(rank):
        it.of_type[a], it.local[it.n_terms + a] = m.u + a * P, drive + a * P
    if rank:
        place_drives(<vec *>drive, <const vec *>(m.h_past + before * P), m, <const real **>it.of_type)
    write_and_hear_by_kind(<vec *>m.placed, &it, m, filled_lines(m) * PER_LINE, rank)
    by_place(m, current, m.placed, True)
    for p in range(units):
        current[p] += missing[p] * z[p]
    m.ahead = True
    if not constrained(m) or m.type == NULL or not m.erred[s]:
        return
    short = it.tally + r * P
    for b in range(r):
        matvec(total, m.u, it.tally + b * P, r, P)
        for a in range(r):
            m.type_sums[a * r + b] = total[a]
    if m.autapses:
        return
    by_place(m, short, missing, False)
    matvec(total, m.u, short, r, P)
    for a in range(r):
        m.type_sums[a * r + a] += total[a]


cdef void write_group(Model *m, Py_ssize_t group, bint whole) noexcept nogil:
    """Bring the weights and the traces of one group of sources up to date; `whole`: with `class_sums`."""
    cdef Py_ssize_t P = m.n_places, Q = m.stride, rank = m.rank if m.trace == TRACE_EXACT else 0, n_steps = m.t - m.since[group]
    cdef Py_ssize_t first = m.bounds[group], last = m.bounds[group + 1], units = min(last, m.n_rec), n, p, a, at, apart = (1 + rank) * P
    cdef bint owed = m.since[group] < m.owed_until
    cdef const real *kept = m.zeros if m.stands else m.self_weights
    cdef real *missing = m.input
    cdef real *rows = m.by_source
    cdef real *placed
    cdef real *owed_row
    if m.autapses:
        units = first
    whole = whole and m.summed
    m.sums_too = whole and (owed or not m.frozen)  # else of a chunk that came to no end
    if rank or owed or m.sums_too:
        share_out(m, True, group)
        for p in range(first, units):
            leave_own(rows + p * apart + m.place[p], missing + p, kept[p], P, rank)
    if m.trace == TRACE_EXACT:
        memset(m.carried + group * rank, 0, rank * sizeof(real))
    for a in range(m.rank if whole else 0):
        memset(m.class_sums + a * Q + first, 0, ((last if group + 1 < m.n_groups else Q) - first) * sizeof(real))
    m.since[group] = m.t
    if m.frozen:  # nothing else of it was felt
        return
    for n in range(1 if rank else 0, n_steps + 1):
        owed_row = m.eps_owed + slot(m.t - n) * Q
        p = first
        while p < last:
            memset(owed_row + p, 0, TOGETHER * sizeof(real))  # of a size that the compiler knows: no call
            p += TOGETHER
    if m.trace == TRACE_EXACT:
        for n in range(1, n_steps + 1):
            placed = m.eps_placed + slot(m.t - n) * P
            for p in range(first, units):
                placed[m.place[p]] = 0
        placed = m.eps_placed + slot(m.t) * P
        for p in range(first, units):
            at = m.place[p]
            m.front[at] = placed[at] * m.local[slot(m.t) * P + at]
    elif first < units:
        memset(m.own + first, 0, (units - first) * sizeof(real))


cdef void write_chunk(Model *m, bint learn) noexcept nogil:
    """The end of a chunk of steps during which the weights stood still: with `learn` their update, and the traces after it."""
    cdef Py_ssize_t n_steps = m.t - m.since[0]
    if m.follows and m.trace == TRACE_EXACT:
        filter_powers(m, n_steps)
    if learn:
        if m.trace == TRACE_EXACT:
            carry_back(m, n_steps)
            memcpy(m.carried, m.back + n_steps * m.rank, m.rank * sizeof(real))
        gradient_terms(m, n_steps)
        m.owed_until, m.unwritten = m.t, True
    write_group(m, 0, True)
    m.summed = False


cdef void write_within_chunk(Model *m) noexcept nogil:
    """A chunk of more than `window` steps: what the last of these say of the weights is kept, and the traces follow."""
    cdef bint learn = any_error(m, m.window)
    if learn and not m.stands:
        stand_still(m)
    write_chunk(m, learn)


cdef void take_stock(Model *m) noexcept nogil:
    """Before updates wait again: everything is up to date, and the sums are taken from W and R themselves."""
    cdef Py_ssize_t r = m.rank, P = m.n_places, s = slot(m.t), c, i
    cdef real *placed = m.eps_placed + s * P
    m.counted = True
    memset(m.eps_owed, 0, SLOTS * m.stride * sizeof(real))
    memset(m.eps_placed, 0, SLOTS * P * sizeof(real))
    memset(m.own, 0, P * sizeof(real))
    if m.trace == TRACE_EXACT:  # of now, the traces have not heard yet
        by_place(m, placed, m.eps + s * m.stride, False)
        memcpy(m.eps_owed + s * m.stride, m.eps + s * m.stride, m.stride * sizeof(real))
        memset(m.onto_h, 0, SLOTS * m.n_drive * sizeof(real))
        for i in range(P):
            m.front[i] = placed[i] * m.local[s * P + i]
    if not m.follows:
        return
    sum_weights(m)
    if m.trace != TRACE_EXACT:
        return
    sum_step(m)
    for c in range(r):
        sum_trace(m, c)


# ---------------------------------------------------------------- threads over places

cdef void take_part(Model *m, bint write, Py_ssize_t group, int place, int n) noexcept nogil:
    """One thread's part of a piece of work: the same places every time, which its caches may still hold."""
    cdef Py_ssize_t n_lines = filled_lines(m), first = n_lines * place // n, last = n_lines * (place + 1) // n
    if write:
        write_lines(m, group, first, last, m.counts + place * 3 * SLOTS * min(STRETCH_SPARED * LANES, m.n_places))
    else:
        hear(m, first, last)


cdef void share_out(Model *m, bint write, Py_ssize_t group) noexcept nogil:
    """Do a piece of work, alone or with the team.  No number depends on how many share it: each is one thread's own."""
    cdef Team *team = m.team
    if team == NULL:
        take_part(m, write, group, 0, 1)
        return
    team.write, team.group, team.arrived = write, group, 0
    mpf_add(&team.ticket, 1)
    take_part(m, write, group, 0, team.n)
    mpf_wait(&team.arrived, team.n - 1, False)


cdef void assist_in(Model *m, int place) noexcept nogil:
    """Be a thread of the team until there is no more to do."""
    cdef Team *team = m.team
    cdef int ticket = 0
    while True:
        mpf_wait(&team.ticket, ticket, True)
        ticket += 1
        if not team.go:
            return
        take_part(m, team.write, team.group, place, team.n)
        mpf_add(&team.arrived, 1)
