"""The same learned step, and the same training iteration, as other people would write them, as well as their tools allow.

Online, batch 1: relu, two cell types whose means follow every update, mse, SGD on every weight, no autapses. Each class takes
a network's weights; `step(x, target)` learns and returns y; `weights()` gives them in the library's shapes. On trials:
cross entropy at the last step; `gradient(inputs, classes)`, and `iteration`, which follows it with Adam.
`STEPS` and `TRIALS` list the classes whose tools are installed.
"""

import ctypes
import tempfile
from types import SimpleNamespace

import numpy as np
from common import compile_c, have, huge_pages

MU = 0.25
LR = 1e-3
ADAM = {"lr": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8}


def network(mf, n, rng=None, **more):
    """What every benchmark of steps learns with: two inputs and outputs, relu, two types."""
    types = {"E": n - n // 5, "I": n // 5}
    return mf.Network(2, n, 2, types=types, gain=0.8, rng=np.random.default_rng(n) if rng is None else rng, **more)


def rules(mf):
    return {"exact": mf.ModProp(MU), "mean": mf.ModProp(MU, factor="mean"), "e-prop": mf.EProp()}


def pieces(net):
    """Weights in the order and the constants that the competitors use: membership U (2, N), type sizes, types."""
    onto = np.stack([net.types == 0, net.types == 1]).astype(net.dtype)
    return SimpleNamespace(
        n=net.n_rec, n_in=net.n_in, n_out=net.n_out, leak=net.leak, take=1 - net.leak, dtype=net.dtype, types=net.types,
        onto=onto, sizes=onto.sum(axis=1), w=np.concatenate([net.w_rec, net.w_in], axis=1), w_out=net.w_out.copy(),
        b_out=net.b_out.copy(),
    )  # fmt: skip


# ---------------------------------------------------------------- NumPy


class NumpyExact:
    """In place: nothing of size N x N is allocated in a step.  R is (2, N, N + n_in); W and W_in are one matrix."""

    name, rule = "NumPy", "exact"

    def __init__(self, net):
        p = self.p = pieces(net)
        n, m = p.n, p.n + p.n_in
        zeros = lambda *shape: np.zeros(shape, p.dtype)  # noqa: E731
        self.w, self.w_out, self.b_out = p.w, p.w_out, p.b_out
        self.pre, self.eps, self.eps_before = zeros(m), zeros(m), zeros(m)
        self.v, self.h, self.h_before, self.current, self.local = (zeros(n) for _ in range(5))
        self.R, self.R_next, self.row = zeros(2, n * m), zeros(2, n * m), zeros(n * m)
        self.outer, self.g_out = zeros(n, m), zeros(p.n_out, n)
        self.sums, self.scale = zeros(2, n), (1 / np.outer(p.sizes, p.sizes)).astype(p.dtype)
        self.lr, self.leak, self.take = (p.dtype.type(number) for number in (LR, p.leak, p.take))
        self.eye = np.eye(2, dtype=p.dtype)
        self.follow()

    def follow(self):
        p = self.p
        np.dot(p.onto, self.w[:, : p.n], out=self.sums)
        self.means = self.sums @ p.onto.T * self.scale
        self.K = self.leak * self.eye + (self.take * p.dtype.type(MU)) * self.means * p.sizes
        self.drive = self.take * self.means @ p.onto  # (2, N)

    def step(self, x, target):
        p, n = self.p, self.p.n
        self.pre[n:] = x
        np.dot(self.w, self.pre, out=self.current)
        self.h_before[:], self.eps_before[:] = self.h, self.eps
        for trace, source in ((self.eps, self.pre), (self.v, self.current)):
            trace *= self.leak
            source *= self.take
            trace += source
        np.greater(self.v, 0, out=self.h, casting="unsafe")
        np.maximum(self.v, 0, out=self.pre[:n])
        y = self.w_out @ self.pre[:n]
        y += self.b_out
        error = (y - target) / y.dtype.type(p.n_out)
        np.dot(error, self.w_out, out=self.local)
        self.local *= self.h
        modulator = p.onto @ self.local
        np.dot(self.K, self.R, out=self.R_next)
        self.R, self.R_next = self.R_next, self.R
        for a in (0, 1):
            np.multiply((self.drive[a] * self.h_before)[:, None], self.eps_before, out=self.outer)
            self.R[a] += self.outer.ravel()
        modulator *= self.lr
        np.dot(modulator, self.R, out=self.row)
        self.w -= self.row.reshape(self.w.shape)
        self.local *= self.lr
        np.multiply(self.local[:, None], self.eps, out=self.outer)
        self.w -= self.outer
        self.w.ravel()[: n * (n + p.n_in) : n + p.n_in + 1] = 0
        error *= self.lr
        np.multiply(error[:, None], self.pre[:n], out=self.g_out)
        self.w_out -= self.g_out
        self.b_out -= error
        self.follow()
        return y

    def weights(self):
        n = self.p.n
        return {"w_rec": self.w[:, :n], "w_in": self.w[:, n:], "w_out": self.w_out, "b_out": self.b_out}


# ---------------------------------------------------------------- numba


def numba_kernels():
    """(carve, exact, e-prop): where the arrays go, and the steps; or None.

    What was tried and kept (microseconds here at N = 64 / 256 / 1024 in bench_step's setting):
      - one loop over the rows of R and W instead of one loop each: 2.3 / 17 / 350 for the best of both;
      - the next step's W z in that loop too: no gain by itself (349 / 366 at 1024), but it leaves fewer streams to space out;
      - R as two (N, N) matrices. As (N, 2, N) LLVM hoists its overlap test out of the loop over rows, where rows interleave,
        and runs scalar code: 7.5 / 101 / 1750;
      - matrices 17 cache lines apart, so that they do not fall into the same cache sets: 1024: 380 -> 245;
      - sums over columns (stores) instead of rows (reductions): 5 % faster; two rows at a time: 15 % faster once the matrices
        leave the last cache, slower before: `pairs`;
      - one flat array as argument: every array argument costs 60 ns a call, N as a compile-time constant gains nothing.
    """
    modules = have("numba")
    if modules is None:
        return None
    njit = modules[0].njit(fastmath=True, error_model="numpy")
    V, Z, H, H_BEFORE, EPS, EPS_BEFORE, LOCAL, CURRENT, IS_E, SUM_E, SUM_I, SMALL = range(12)

    @njit
    def carve(s, n, n_in, n_out):
        """w, R0, R1 (N, N); the small vectors; w_in (n_in, N) and R_in (2 n_in, N) by columns; w_out (n_out, N); the rest."""
        stride, gap = (n + 15) // 16 * 16, 17 * 16
        big = n * stride + gap
        small = s[3 * big :].reshape((-1, stride))
        w_in, R_in, w_out = SMALL + n_in, SMALL + 3 * n_in, SMALL + 3 * n_in + n_out
        return (
            s[: n * n].reshape((n, n)), s[big : big + n * n].reshape((n, n)), s[2 * big : 2 * big + n * n].reshape((n, n)),
            small[:SMALL], small[SMALL:w_in], small[w_in:R_in], small[R_in:w_out], small[w_out:].ravel(),
        )  # fmt: skip

    @njit
    def forward(n, u, w_in, w_out, b_out, eps_in, x, target, y, error, k, take):
        """Activity, readout, error, L h; returns the sums of L h over all units and over type E."""
        n_in, n_out, zero = len(x), len(y), u.dtype.type(0)
        v, z, h, h_before, eps, eps_before, local, current, is_e = (
            u[V], u[Z], u[H], u[H_BEFORE], u[EPS], u[EPS_BEFORE], u[LOCAL], u[CURRENT], u[IS_E]
        )  # fmt: skip
        for i in range(n_in):
            eps_in[n_in + i] = eps_in[i]
            eps_in[i] = k * eps_in[i] + take * x[i]
        for q in range(n):
            total = current[q]
            for i in range(n_in):
                total += w_in[i, q] * x[i]
            to = k * v[q] + take * total
            h_before[q], eps_before[q] = h[q], eps[q]
            eps[q] = k * eps[q] + take * z[q]
            v[q] = to
            h[q] = 1 if to > 0 else 0
            z[q] = max(to, zero)
        for o in range(n_out):
            total = b_out[o]
            for q in range(n):
                total += w_out[o, q] * z[q]
            y[o] = total
            error[o] = (total - target[o]) / n_out
        every = of_e = zero
        for q in range(n):
            total = zero
            for o in range(n_out):
                total += error[o] * w_out[o, q]
            total *= h[q]
            local[q] = total
            every += total
            of_e += total * is_e[q]
        return every, of_e

    @njit
    def readout(n, w_out, b_out, error, z, lr):
        for o in range(len(error)):
            g = lr * error[o]
            for p in range(n):
                w_out[o, p] -= g * z[p]
            b_out[o] -= g

    @njit
    def rows(w, R0, R1, u, means, take, k00, k01, k10, k11, m0, m1, lr):
        """R, W, the sums of W and the next W z in one pass; (E, E) (E, I) (I, E) (I, I) sums into means."""
        n = len(w)
        z, h_before, eps, eps_before, local, is_e = u[Z], u[H_BEFORE], u[EPS], u[EPS_BEFORE], u[LOCAL], u[IS_E]
        sums = u[SUM_E : SUM_I + 1]
        sums[:] = 0
        for p in range(n):
            b = 0 if is_e[p] > 0 else 1
            f = take * h_before[p]
            d0, d1 = f * means[b], f * means[2 + b]
            own, own_sum, lp = w[p, p], sums[b, p], local[p]
            dot = w.dtype.type(0)
            for q in range(n):
                r0, r1 = R0[p, q], R1[p, q]
                t0 = d0 * eps_before[q] + k00 * r0 + k01 * r1
                t1 = d1 * eps_before[q] + k10 * r0 + k11 * r1
                to = w[p, q] - lr * (lp * eps[q] + m0 * t0 + m1 * t1)
                R0[p, q], R1[p, q], w[p, q] = t0, t1, to
                sums[b, q] += to
                dot += to * z[q]
            u[CURRENT, p] = dot + (own - w[p, p]) * z[p]
            w[p, p], sums[b, p] = own, own_sum + own
        for a in range(2):
            of_e = every = w.dtype.type(0)
            for q in range(n):
                of_e += sums[a, q] * is_e[q]
                every += sums[a, q]
            means[2 * a], means[2 * a + 1] = of_e, every - of_e

    @njit
    def pairs(w, R0, R1, u, means, take, k00, k01, k10, k11, m0, m1, lr):
        """`rows`, two at a time, sums over rows."""
        n = len(w)
        z, h_before, eps, eps_before, local, is_e = u[Z], u[H_BEFORE], u[EPS], u[EPS_BEFORE], u[LOCAL], u[IS_E]
        sums = np.zeros((2, 2), w.dtype)
        for p in range(0, n - 1, 2):
            P = p + 1
            b, B = 0 if is_e[p] > 0 else 1, 0 if is_e[P] > 0 else 1
            f, F = take * h_before[p], take * h_before[P]
            d0, d1, D0, D1 = f * means[b], f * means[2 + b], F * means[B], F * means[2 + B]
            own, lp, Own, Lp = w[p, p], local[p], w[P, P], local[P]
            dot = every = of_e = Dot = Every = Of_e = w.dtype.type(0)
            for q in range(n):
                r0, r1, S0, S1, e = R0[p, q], R1[p, q], R0[P, q], R1[P, q], eps_before[q]
                t0, T0 = d0 * e + k00 * r0 + k01 * r1, D0 * e + k00 * S0 + k01 * S1
                t1, T1 = d1 * e + k10 * r0 + k11 * r1, D1 * e + k10 * S0 + k11 * S1
                to = w[p, q] - lr * (lp * eps[q] + m0 * t0 + m1 * t1)
                To = w[P, q] - lr * (Lp * eps[q] + m0 * T0 + m1 * T1)
                R0[p, q], R1[p, q], w[p, q] = t0, t1, to
                R0[P, q], R1[P, q], w[P, q] = T0, T1, To
                dot += to * z[q]
                every += to
                of_e += to * is_e[q]
                Dot += To * z[q]
                Every += To
                Of_e += To * is_e[q]
            for i, c, own_i, dot_i, every_i, e_i in ((p, b, own, dot, every, of_e), (P, B, Own, Dot, Every, Of_e)):
                d = own_i - w[i, i]
                w[i, i], u[CURRENT, i] = own_i, dot_i + d * z[i]
                sums[c, 0] += e_i + d * is_e[i]
                sums[c, 1] += every_i - e_i + d * (1 - is_e[i])
        means[:4] = sums.ravel()

    @njit
    def exact(s, n, x, target, y):
        n_in, n_out = len(x), len(y)
        w, R0, R1, u, w_in, R_in, w_out, rest = carve(s, n, n_in, n_out)
        means, size, k, take, lr, mu = rest[:4], rest[4:6], rest[6], rest[7], rest[8], rest[9]
        b_out, error, eps_in = rest[16 : 16 + n_out], rest[32 : 32 + n_out], rest[48:]
        every, m0 = forward(n, u, w_in, w_out, b_out, eps_in, x, target, y, error, k, take)
        m1 = every - m0
        f = take * mu
        k00, k01 = k + f * means[0] * size[0], f * means[1] * size[1]
        k10, k11 = f * means[2] * size[0], k + f * means[3] * size[1]
        for i in range(n_in):
            for p in range(n):
                b = u[IS_E, p]
                f = take * u[H_BEFORE, p] * eps_in[n_in + i]
                r0, r1 = R_in[i, p], R_in[n_in + i, p]
                t0 = f * (means[1] + b * (means[0] - means[1])) + k00 * r0 + k01 * r1
                t1 = f * (means[3] + b * (means[2] - means[3])) + k10 * r0 + k11 * r1
                R_in[i, p], R_in[n_in + i, p] = t0, t1
                w_in[i, p] -= lr * (u[LOCAL, p] * eps_in[i] + m0 * t0 + m1 * t1)
        readout(n, w_out, b_out, error, u[Z], lr)
        if n % 2 == 0 and n * n * 3 * s.itemsize > 24 << 20:
            pairs(w, R0, R1, u, means, take, k00, k01, k10, k11, m0, m1, lr)
        else:
            rows(w, R0, R1, u, means, take, k00, k01, k10, k11, m0, m1, lr)
        for a in range(2):
            for b in range(2):
                means[2 * a + b] /= size[a] * size[b]

    @njit
    def eprop(s, n, x, target, y):
        """Rows of units at rest are read only."""
        n_in, n_out = len(x), len(y)
        w, _, _, u, w_in, _, w_out, rest = carve(s, n, n_in, n_out)
        k, take, lr, b_out, error, eps_in = rest[6], rest[7], rest[8], rest[16 : 16 + n_out], rest[32 : 32 + n_out], rest[48:]
        forward(n, u, w_in, w_out, b_out, eps_in, x, target, y, error, k, take)
        z, eps, local, current = u[Z], u[EPS], u[LOCAL], u[CURRENT]
        for i in range(n_in):
            for p in range(n):
                w_in[i, p] -= lr * local[p] * eps_in[i]
        readout(n, w_out, b_out, error, z, lr)
        for p in range(n):
            g, own = lr * local[p], w[p, p]
            dot = w.dtype.type(0)
            if g == 0:
                for q in range(n):
                    dot += w[p, q] * z[q]
            else:
                for q in range(n):
                    to = w[p, q] - g * eps[q]
                    w[p, q] = to
                    dot += to * z[q]
                dot += (own - w[p, p]) * z[p]
                w[p, p] = own
            current[p] = dot

    return carve, exact, eprop


class NumbaExact:
    """See `numba_kernels`; its memory is on huge pages."""

    name, rule = "numba", "exact"

    def __init__(self, net):
        p = self.p = pieces(net)
        carve, *steps = KERNELS
        self.kernel = steps[self.rule == "e-prop"]
        stride = -(-p.n // 16) * 16
        self.state = huge_pages(3 * (p.n * stride + 17 * 16) + stride * (12 + 3 * p.n_in + p.n_out + -(-64 // stride)), p.dtype)
        self.y = np.zeros(p.n_out, p.dtype)
        w, _, _, u, w_in, _, w_out, rest = carve(self.state, p.n, p.n_in, p.n_out)
        w_in, w_out = w_in[:, : p.n], w_out[:, : p.n]
        w[:], w_in[:], w_out[:], u[8, : p.n] = net.w_rec, net.w_in.T, net.w_out, p.types == 0
        rest[:4] = (p.onto @ net.w_rec @ p.onto.T / np.outer(p.sizes, p.sizes)).ravel()
        rest[4:10] = *p.sizes, p.leak, p.take, LR, MU
        rest[16 : 16 + p.n_out] = net.b_out
        self.views = {"w_rec": w, "w_in": w_in.T, "w_out": w_out, "b_out": rest[16 : 16 + p.n_out]}

    def step(self, x, target):
        self.kernel(self.state, self.p.n, x, target, self.y)
        return self.y

    def weights(self):
        return self.views


class NumbaEProp(NumbaExact):
    rule = "e-prop"


# ---------------------------------------------------------------- plain C


def _plain(factor_name, number):
    fields = "w w_in w_out b_out v z h h_before eps eps_before eps_in trace trace_in".split()
    fields += "current local rows sums drive K means".split()

    class Plain:
        """plain.c through ctypes."""

        name, rule, factor = "plain C", factor_name, number

        def __init__(self, net):
            n = net.n_rec
            c_real = np.ctypeslib.as_ctypes_type(net.dtype)
            names = [(f, ctypes.c_long) for f in ("n", "n_in", "n_out", "factor")]
            names += [(f, c_real) for f in ("leak", "lr", "mu")] + [(f, ctypes.c_void_p) for f in ("type", *fields)]
            struct = type("Struct", (ctypes.Structure,), {"_fields_": names})
            sizes = dict.fromkeys("v z h h_before eps eps_before current local".split(), n)
            sizes |= dict.fromkeys("rows sums drive".split(), 2 * n)
            sizes |= dict(K=4, means=4, eps_in=net.n_in, trace_in=2 * n * net.n_in)
            sizes |= dict(w_in=n * net.n_in, w_out=n * net.n_out, b_out=net.n_out, w=n * n + 17 * 16)
            sizes["trace"] = {0: 1, 1: 2 * n * n + 17 * 16, 2: 4 * n}[self.factor]
            block = huge_pages(sum(-(-size // 16) * 16 for size in sizes.values()), net.dtype)
            at, self.arrays = 0, {}
            for name, size in sizes.items():
                self.arrays[name] = block[at : at + size]
                at += -(-size // 16) * 16
            a = self.arrays
            self.views = {"w_rec": a["w"][: n * n].reshape(n, n), "w_in": a["w_in"].reshape(net.n_in, n).T}
            self.views |= {"w_out": a["w_out"].reshape(-1, n), "b_out": a["b_out"]}
            for name, w in net.weights.items():
                self.views[name][:] = w
            self.types = net.types.astype(np.intc)
            pointers = [self.types.ctypes.data, *(self.arrays[f].ctypes.data for f in fields)]
            self.struct = struct(n, net.n_in, net.n_out, self.factor, net.leak, LR, MU, *pointers)
            library = PLAIN[net.dtype.name]
            self.call, self.reference = library.plain_run, ctypes.byref(self.struct)
            self.call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
            library.plain_refresh(self.reference)
            self.x, self.target = np.zeros(net.n_in, net.dtype), np.zeros(net.n_out, net.dtype)
            self.addresses = self.x.ctypes.data, self.target.ctypes.data  # asked for once: numpy takes 500 ns for one

        def step(self, x, target):
            self.x[:], self.target[:] = x, target
            self.call(self.reference, *self.addresses, 1)

        def run(self, xs, targets, steps):
            self.call(self.reference, xs.ctypes.data, targets.ctypes.data, steps)

        def weights(self):
            return self.views

    return Plain


# ---------------------------------------------------------------- PyTorch


class TorchExact:
    """Eager, no autograd, in place; x and target come in as NumPy arrays, as to all others."""

    name, rule = "PyTorch", "exact"

    def __init__(self, net):
        p = self.p = pieces(net)
        n, m, t = p.n, p.n + p.n_in, torch.from_numpy
        zeros = lambda *shape: torch.zeros(shape, dtype=t(p.w).dtype)  # noqa: E731
        self.w, self.w_out, self.b_out, self.onto, self.sizes = t(p.w), t(p.w_out), t(p.b_out), t(p.onto), t(p.sizes)
        self.pre, self.eps, self.eps_before, self.v, self.h, self.h_before = (zeros(s) for s in (m, m, m, n, n, n))
        self.R, self.R_next, self.row = zeros(2, n * m), zeros(2, n * m), zeros(n * m)
        self.w_rec, self.z = self.w[:, :n], self.pre[:n]
        self.diagonal = self.w_rec.diagonal()
        self.scale, self.eye = 1 / torch.outer(self.sizes, self.sizes), torch.eye(2, dtype=self.w.dtype)
        self.follow()

    def follow(self):
        p = self.p
        means = (self.onto @ self.w_rec @ self.onto.T).mul_(self.scale)
        self.K = (means * self.sizes).mul_(p.take * MU).add_(self.eye, alpha=p.leak)
        self.drive = (means @ self.onto).mul_(p.take)

    def step(self, x, target):
        p = self.p
        with torch.inference_mode():
            self.pre[p.n :].copy_(torch.from_numpy(x))
            self.eps_before.copy_(self.eps)
            self.h_before.copy_(self.h)
            self.eps.mul_(p.leak).add_(self.pre, alpha=p.take)
            self.v.mul_(p.leak).add_(torch.mv(self.w, self.pre), alpha=p.take)
            torch.gt(self.v, 0, out=self.h)
            torch.clamp(self.v, min=0, out=self.z)
            y = torch.addmv(self.b_out, self.w_out, self.z)
            error = (y - torch.from_numpy(target)).div_(p.n_out)
            local = (error @ self.w_out).mul_(self.h)
            torch.mm(self.K, self.R, out=self.R_next)
            self.R, self.R_next = self.R_next, self.R
            self.R.view(2 * p.n, -1).addr_((self.drive * self.h_before).view(-1), self.eps_before)
            torch.mv(self.R.T, self.onto @ local, out=self.row)
            self.w.sub_(self.row.view(self.w.shape), alpha=LR).addr_(local, self.eps, alpha=-LR)
            self.diagonal.zero_()
            self.w_out.addr_(error, self.z, alpha=-LR)
            self.b_out.sub_(error, alpha=LR)
            self.follow()
        return y.numpy()

    def weights(self):
        n, (w, w_out, b_out) = self.p.n, (w.numpy() for w in (self.w, self.w_out, self.b_out))
        return {"w_rec": w[:, :n], "w_in": w[:, n:], "w_out": w_out, "b_out": b_out}


class TorchTBPTT:
    """The gradient of this step alone, by autograd: another rule, without any memory."""

    name, rule = "PyTorch", "TBPTT(1)"

    def __init__(self, net):
        self.p = pieces(net)
        self.parameters = [torch.from_numpy(w.copy()).requires_grad_() for w in (net.w_rec, net.w_in, net.w_out, net.b_out)]
        self.v = self.z = torch.zeros(net.n_rec, dtype=self.parameters[0].dtype)

    def step(self, x, target):
        p, (w_rec, w_in, w_out, b_out) = self.p, self.parameters
        v = p.leak * self.v + p.take * (w_rec @ self.z + w_in @ torch.from_numpy(x))
        z = torch.relu(v)
        y = torch.addmv(b_out, w_out, z)
        loss = (y - torch.from_numpy(target)).square().mean() / 2
        grads = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            for w, g in zip(self.parameters, grads):
                w.sub_(g, alpha=LR)
            w_rec.fill_diagonal_(0)
        self.v, self.z = v.detach(), z.detach()
        return y.detach().numpy()

    def weights(self):
        return dict(zip(("w_rec", "w_in", "w_out", "b_out"), (w.detach().numpy() for w in self.parameters)))

    @staticmethod
    def expected(net, xs, targets):
        """The same by hand."""
        w = {name: value.astype(float) for name, value in net.weights.items()}
        v = z = np.zeros(net.n_rec)
        for x, target in zip(xs, targets):
            before = z
            v = net.leak * v + (1 - net.leak) * (w["w_rec"] @ z + w["w_in"] @ x)
            z = np.maximum(v, 0)
            error = (w["w_out"] @ z + w["b_out"] - target) / net.n_out
            local = (1 - net.leak) * (error @ w["w_out"]) * (v > 0)
            w["w_rec"] -= LR * np.outer(local, before)
            w["w_in"] -= LR * np.outer(local, x)
            w["w_out"] -= LR * np.outer(error, z)
            w["b_out"] -= LR * error
            np.fill_diagonal(w["w_rec"], 0)
        return w


# ---------------------------------------------------------------- JAX


class JaxExact:
    """One jitted step with donated buffers; y is waited for."""

    name, rule = "JAX", "exact"

    def __init__(self, net):
        p = self.p = pieces(net)
        n, m = p.n, p.n + p.n_in
        onto, sizes = p.onto, p.sizes
        zeros = lambda *shape: jnp.zeros(shape, p.dtype)  # noqa: E731

        def means_of(w):
            return onto @ w[:, :n] @ onto.T / np.outer(sizes, sizes)

        def step(state, x, target):
            w, w_out, b_out, v, z, h, eps, R0, R1, means = state
            K = p.leak * np.eye(2, dtype=p.dtype) + p.take * MU * means * sizes
            drive = p.take * (means @ onto) * h
            pre = jnp.concatenate([z, x])
            R0, R1 = (K[a, 0] * R0 + K[a, 1] * R1 + jnp.outer(drive[a], eps) for a in (0, 1))
            eps = p.leak * eps + p.take * pre
            v = p.leak * v + p.take * (w @ pre)
            h, z = (v > 0).astype(p.dtype), jnp.maximum(v, 0)
            y = w_out @ z + b_out
            error = (y - target) / p.n_out
            local = (error @ w_out) * h
            modulator = onto @ local
            w = w - LR * (jnp.outer(local, eps) + modulator[0] * R0 + modulator[1] * R1)
            w = jnp.where(jnp.arange(n)[:, None] == jnp.arange(m), 0, w)
            return (w, w_out - LR * jnp.outer(error, z), b_out - LR * error, v, z, h, eps, R0, R1, means_of(w)), y

        vectors = (zeros(n), zeros(n), zeros(n), zeros(m))
        weights = tuple(jnp.array(w) for w in (p.w, p.w_out, p.b_out))
        self.state = (*weights, *vectors, zeros(n, m), zeros(n, m), jnp.array(means_of(p.w)))
        self.jitted = jax.jit(step, donate_argnums=0)

    def step(self, x, target):
        self.state, y = self.jitted(self.state, x, target)
        return np.asarray(y)

    def weights(self):
        n, (w, w_out, b_out) = self.p.n, (np.asarray(w) for w in self.state[:3])
        return {"w_rec": w[:, :n], "w_in": w[:, n:], "w_out": w_out, "b_out": b_out}


# ---------------------------------------------------------------- trials: gradient and Adam


class Trials:
    """B trials, cross entropy at the last step, in NumPy: forward pass, then the adjoint of the rule; O(T N) memory."""

    def __init__(self, net):
        self.p = pieces(net)
        self.w = {name: w.copy() for name, w in net.weights.items()}
        self.moments = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in net.weights.items()}
        self.updates, self.buffers = 0, None
        self.off_diagonal = ~np.eye(net.n_rec, dtype=bool)

    def forward(self, inputs, traces):
        """z at the end; `buffers` get h and the sources z_{t-1} (or eps_t, with traces) of every step, (T, B, .)."""
        p, (B, T, _) = self.p, inputs.shape
        if self.buffers is None or self.buffers[0].shape[:2] != (T, B):
            n, m = p.n, p.n + p.n_in
            self.buffers = [np.zeros((T, B, n), bool), np.zeros((T, B, m), p.dtype), np.zeros((T, B, n), p.dtype)]
        h, sources, _ = self.buffers
        w = np.concatenate([self.w["w_rec"], self.w["w_in"]], axis=1).T.copy()
        pre, v, current = np.zeros((B, len(w)), p.dtype), np.zeros((B, p.n), p.dtype), np.empty((B, p.n), p.dtype)
        scaled, eps = np.empty_like(pre), np.zeros_like(pre)
        for t in range(T):
            pre[:, p.n :] = inputs[:, t]
            if traces:
                np.multiply(pre, p.take, out=scaled)
                eps *= p.leak
                eps += scaled
            sources[t] = eps if traces else pre
            np.dot(pre, w, out=current)
            current *= p.take
            v *= p.leak
            v += current
            np.greater(v, 0, out=h[t])
            np.maximum(v, 0, out=pre[:, : p.n])
        return pre[:, : p.n]

    def error(self, z, classes):
        y = z @ self.w["w_out"].T + self.w["b_out"]
        y = np.exp(y - y.max(axis=1, keepdims=True))
        y /= y.sum(axis=1, keepdims=True)
        y[np.arange(len(y)), classes] -= 1
        return y / y.dtype.type(len(y))

    def gradient(self, inputs, classes):
        p, traces = self.p, self.rule != "BPTT"
        z = self.forward(inputs, traces)
        h, sources, rows = self.buffers
        error = self.error(z, classes)
        lam = np.zeros_like(z)
        L, back = error @ self.w["w_out"], np.zeros_like(z)
        w, onto = self.w["w_rec"], p.onto
        drive = p.take * (onto @ w @ onto.T / np.outer(p.sizes, p.sizes)).astype(p.dtype) @ onto  # (2, N)
        for t in range(len(h) - 1, -1, -1):
            if traces:  # rows = h (L + back), lam = h L + mu back + k lam
                np.dot(lam @ onto.T, drive, out=back)
                np.add(L, back, out=rows[t])
                rows[t] *= h[t]
                lam *= p.leak
                back *= p.dtype.type(MU)
                L *= h[t]
                lam += back
                lam += L
            else:  # lam = h (L + back) + k lam
                np.dot(lam, w, out=back)
                back *= p.take
                back += L
                back *= h[t]
                lam *= p.leak
                lam += back
                rows[t] = lam
            L[:] = 0
        g = np.dot(rows.reshape(-1, p.n).T, sources.reshape(-1, sources.shape[2]))
        if not traces:
            g *= p.take
        grads = {"w_rec": g[:, : p.n] * self.off_diagonal, "w_in": g[:, p.n :]}
        return grads | {"w_out": error.T @ z, "b_out": error.sum(axis=0)}

    def iteration(self, inputs, classes):
        grads = self.gradient(inputs, classes)
        self.updates += 1
        b1, b2 = ADAM["betas"]
        for name, w in self.w.items():
            m, s = self.moments[name]
            m += (1 - b1) * (grads[name] - m)
            s += (1 - b2) * (grads[name] ** 2 - s)
            w -= ADAM["lr"] * (m / (1 - b1**self.updates)) / (np.sqrt(s / (1 - b2**self.updates)) + ADAM["eps"])


class NumpyBPTT(Trials):
    name, rule = "NumPy", "BPTT"


class NumpyTrials(Trials):
    name, rule = "NumPy", "exact"


class TorchBPTT:
    name, rule = "PyTorch", "BPTT"

    def __init__(self, net):
        self.p = pieces(net)
        self.parameters = {name: torch.from_numpy(w.copy()).requires_grad_() for name, w in net.weights.items()}
        self.optimizer = torch.optim.Adam(self.parameters.values(), **ADAM)

    def backward(self, inputs, classes):
        p, w = self.p, self.parameters
        xs = torch.from_numpy(inputs).transpose(0, 1) @ (w["w_in"].T * p.take)
        w_rec = w["w_rec"].T * p.take
        v = z = torch.zeros(len(inputs), p.n, dtype=xs.dtype)
        for x in xs.unbind():
            v = torch.addmm(torch.add(x, v, alpha=p.leak), z, w_rec)
            z = torch.relu(v)
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(torch.addmm(w["b_out"], z, w["w_out"].T), torch.from_numpy(classes)).backward()
        w["w_rec"].grad.fill_diagonal_(0)

    def gradient(self, inputs, classes):
        self.backward(inputs, classes)
        return {name: w.grad.numpy() for name, w in self.parameters.items()}

    def iteration(self, inputs, classes):
        self.backward(inputs, classes)
        self.optimizer.step()


class JaxBPTT:
    """lax.scan in one jitted function with donated weights and moments."""

    name, rule = "JAX", "BPTT"

    def __init__(self, net):
        p = pieces(net)

        def loss(w, inputs, classes):
            xs = p.take * jnp.einsum("bti,ni->tbn", inputs, w["w_in"])
            w_rec = p.take * w["w_rec"].T

            def step(carry, x):
                v, z = carry
                v = p.leak * v + x + z @ w_rec
                return (v, jnp.maximum(v, 0)), None

            start = jnp.zeros((len(inputs), p.n), p.dtype)
            (_, z), _ = jax.lax.scan(step, (start, start), xs)
            log_p = jax.nn.log_softmax(z @ w["w_out"].T + w["b_out"])
            return -jnp.mean(jnp.take_along_axis(log_p, classes[:, None], axis=1))

        def gradient(w, inputs, classes):
            g = jax.grad(loss)(w, inputs, classes)
            return g | {"w_rec": g["w_rec"] * (1 - np.eye(p.n, dtype=p.dtype))}

        def iteration(w, m, s, count, inputs, classes):
            g = gradient(w, inputs, classes)
            b1, b2 = ADAM["betas"]
            m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, g)
            s = jax.tree.map(lambda s, g: b2 * s + (1 - b2) * g * g, s, g)
            scale = ADAM["lr"] / (1 - b1**count), 1 / (1 - b2**count)
            down = lambda w, m, s: (w - scale[0] * m / (jnp.sqrt(s * scale[1]) + ADAM["eps"])).astype(p.dtype)  # noqa: E731
            return jax.tree.map(down, w, m, s), m, s, count + 1

        self.jitted, self.jitted_gradient = jax.jit(iteration, donate_argnums=(0, 1, 2, 3)), jax.jit(gradient)
        zeros = lambda: {name: jnp.zeros_like(w) for name, w in net.weights.items()}  # noqa: E731
        self.state = ({name: jnp.array(w) for name, w in net.weights.items()}, zeros(), zeros(), jnp.ones((), p.dtype))

    def gradient(self, inputs, classes):
        return {name: np.asarray(g) for name, g in self.jitted_gradient(self.state[0], inputs, classes).items()}

    def iteration(self, inputs, classes):
        self.state = jax.block_until_ready(self.jitted(*self.state, inputs, classes))


class NumpyRTRL:
    """Exact online learning, batch 1: R (N, N, N + n_in) is multiplied by an N x N matrix at every step."""

    name, rule = "NumPy", "RTRL"

    def __init__(self, net):
        p = self.p = pieces(net)
        n, m = p.n, p.n + p.n_in
        self.w = p.w
        self.R, self.next = np.zeros((n, n * m), p.dtype), np.zeros((n, n * m), p.dtype)
        self.v, self.h, self.pre = np.zeros(n, p.dtype), np.zeros(n, p.dtype), np.zeros(m, p.dtype)

    def step(self, x, target):
        """R[j, p, q] = dv[j] / dW[p, q]."""
        p, n = self.p, self.p.n
        self.pre[n:] = x
        np.dot(p.take * self.w[:, :n] * self.h + p.leak * np.eye(n, dtype=p.dtype), self.R, out=self.next)
        self.R, self.next = self.next, self.R
        self.R.reshape(n, n, -1)[np.arange(n), np.arange(n)] += p.take * self.pre
        self.v *= p.leak
        self.v += p.take * (self.w @ self.pre)
        self.h = (self.v > 0).astype(p.dtype)
        self.pre[:n] = np.maximum(self.v, 0)
        y = p.w_out @ self.pre[:n] + p.b_out
        error = (y - target) / p.n_out
        g = np.dot((error @ p.w_out) * self.h, self.R).reshape(n, -1)
        g[np.arange(n), np.arange(n)] = 0
        self.w -= p.dtype.type(LR) * g
        p.w_out -= p.dtype.type(LR) * np.outer(error, self.pre[:n])
        p.b_out -= p.dtype.type(LR) * error
        return y


# ---------------------------------------------------------------- what is installed

STEPS = [NumpyExact]
TRIALS = [NumpyTrials, NumpyBPTT]


def load(steps=True, only=None):
    """Import the tools (or only one), compile plain.c, fill `STEPS` and `TRIALS`; what is missing is named on stdout."""
    global KERNELS, PLAIN, torch, jax, jnp
    import os

    if steps:
        KERNELS = numba_kernels()
        if KERNELS:
            STEPS.extend([NumbaExact, NumbaEProp])
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(os.path.dirname(__file__), "plain.c")
            names = {"float32": (), "float64": ("-Dreal=double",)}
            PLAIN = {name: compile_c("plain C", source, folder, *flags) for name, flags in names.items()}
        if all(PLAIN.values()):
            STEPS.extend(_plain(name, number) for number, name in enumerate(("e-prop", "exact", "mean")))
    modules = have("torch") if only in (None, "PyTorch") else None
    if modules:
        torch = modules[0]
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        STEPS.extend([TorchExact, TorchTBPTT])
        TRIALS.append(TorchBPTT)
    modules = have("jax", "jax.numpy") if only in (None, "JAX") else None
    if modules:
        jax, jnp = modules
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # a step is finished when it returns
        STEPS.append(JaxExact)
        TRIALS.append(JaxBPTT)
