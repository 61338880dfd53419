"""The rules that the kernels do not have, in NumPy and float64: what each keeps of the influence of weights on membranes.

From the sources s_t = [z_{t-1} | x_t | 1] (Q,) and the derivatives h_t (N,) of each step an `Influence` follows what the
weights w = [W | W_in | b] (N, Q) have done, and turns the errors m_t = h_t L_t (N,) into a gradient.  With k the leak and
J_t[j, p, q] = dv_t[j] / dw[p, q], exactly ::

    J_t = A_t J_{t-1} + (1-k) (j = p) s_t[q],     A_t = k I + (1-k) W diag(h_{t-1}),     dw = sum_t m_t J_t

`stepwise` runs them.
"""

from __future__ import annotations

import numpy as np

MOST_CONDITION = 1e8  # of eigenvectors: eight digits of the gradient are left


class Influence:
    """What a rule keeps of J; its arrays are its whole state."""

    unstable = False  # rho(K) >= 1

    def __init__(self, n, q, plan, leak, rng):
        self.leak, self.rng, self.mu = leak, rng, plan.mu_of_units(n)
        self.shape, self.grad = (n, q), np.zeros((n, q))
        self.rest()

    def rest(self):
        """The start of a trial; what is owed to `grad` stays."""

    def follow(self, w):
        """Before a step: W as it stands."""

    def advance(self, w, h, s):
        """J_t from J_{t-1}: W (N, N), h_{t-1} (N,), s_t (Q,)."""

    def learn(self, m):
        """grad += m_t J_t, at once or with the next `settle`."""

    def settle(self):
        """grad is complete."""


class RTRL(Influence):
    """J itself: N^2 Q numbers, and N^3 Q operations a step."""

    def rest(self):
        self.J = np.zeros((self.shape[0], *self.shape))

    def advance(self, w, h, s):
        k, each = self.leak, np.arange(len(w))
        A = k * np.eye(len(w)) + (1 - k) * w * h
        self.J = (A @ self.J.reshape(len(w), -1)).reshape(self.J.shape)
        self.J[each, each] += (1 - k) * s

    def learn(self, m):
        self.grad += np.tensordot(m, self.J, 1)


class UORO(Influence):
    """J by one outer product a b, with random signs nu: a = rho0 A a + rho1 nu,  b = b / rho0 + (1-k) nu s^T / rho1."""

    def rest(self):
        self.a, self.b = np.zeros(self.shape[0]), np.zeros(self.shape)

    def advance(self, w, h, s):
        k = self.leak
        nu = 1.0 - 2.0 * self.rng.integers(0, 2, size=len(w))
        old_a, old_b = self._balanced(k * self.a + (1 - k) * w @ (h * self.a), self.b)
        new_a, new_b = self._balanced(nu, (1 - k) * np.outer(nu, s))
        self.a, self.b = old_a + new_a, old_b + new_b

    @staticmethod
    def _balanced(a, b):
        """rho a and b / rho of equal norm; both zero where the product is."""
        sizes = np.linalg.norm(a), np.linalg.norm(b)
        if 0 in sizes:
            return 0 * a, 0 * b
        rho = np.sqrt(sizes[1] / sizes[0])
        return rho * a, b / rho

    def learn(self, m):
        self.grad += (m @ self.a) * self.b


class SnAp1(Influence):
    """J of a synapse's own unit, j = p, alone."""

    def rest(self):
        self.J = np.zeros(self.shape)

    def advance(self, w, h, s):
        k = self.leak
        self.J = (k + (1 - k) * np.diag(w) * h)[:, None] * self.J + (1 - k) * s

    def learn(self, m):
        self.grad += m[:, None] * self.J


class OneHop(Influence):
    """MDGL of cells: J_t = (j = p) eps_t[q] + (1-k) W[j, p] h_{t-1}[p] eps_{t-1}[q],  eps_t = k eps_{t-1} + (1-k) s_t."""

    def rest(self):
        n, q = self.shape
        self.eps, self.before, self.w, self.h = np.zeros(q), np.zeros(q), np.zeros((n, n)), np.zeros(n)

    def advance(self, w, h, s):
        self.w, self.h, self.before = w.copy(), h, self.eps
        self.eps = self.leak * self.eps + (1 - self.leak) * s

    def learn(self, m):
        self.grad += np.outer(m, self.eps) + np.outer((1 - self.leak) * self.h * (m @ self.w), self.before)


class Cells(Influence):
    """ModProp with factor="mean" of cells: A_t = K = k I + (1-k) W diag(mu) = X diag(l) X^{-1}, and in that basis N Q numbers

        Zeta_t[i, q] = l[i] Zeta_{t-1}[i, q] + (1-k) s_t[q]        J_t[j, p, q] = sum_i X[j, i] Zeta_t[i, q] X^{-1}[i, p].

    While W stands still this is exact.  When it has changed K is decomposed anew, N^3 operations.  J is not diagonal in the new
    basis Y: Zeta becomes the diagonal of Y^{-1} J Y for each q, and the rest, of the order of the change, is forgotten.
    """

    def __init__(self, n, q, *args):
        self.w, self.X, self.values = np.full((n, n), np.nan), np.eye(n, dtype=complex), np.zeros(n, complex)
        self.owed = np.zeros((n, q), complex)
        super().__init__(n, q, *args)

    @property
    def unstable(self):
        return np.abs(self.values).max() >= 1

    def rest(self):
        self.zeta = np.zeros(self.shape, complex)

    def follow(self, w):
        if np.array_equal(w, self.w) or not np.isfinite(w).all():  # then the step will say so
            return
        values, X = np.linalg.eig(self.leak * np.eye(len(w)) + (1 - self.leak) * w * self.mu)
        condition = np.linalg.cond(X)
        if not condition <= MOST_CONDITION:
            raise ValueError(
                f"modulation: expected eigenvectors of K with a condition number <= {MOST_CONDITION:g}, got {condition:.3g}; "
                "use 'types' or LowRank(r) to stream with these weights, or 'cells' with fit_trials and gradient(mode='offline')"
            )
        self.settle()
        self.zeta = (np.linalg.solve(X, self.X) * np.linalg.solve(self.X, X).T) @ self.zeta
        self.w, self.X, self.values = w.copy(), X, values

    def advance(self, w, h, s):
        self.zeta = self.values[:, None] * self.zeta + (1 - self.leak) * s

    def learn(self, m):
        self.owed += (m @ self.X)[:, None] * self.zeta

    def settle(self):
        if self.owed.any():
            self.grad += np.linalg.solve(self.X.T, self.owed).real
            self.owed[...] = 0


INFLUENCES = {"rtrl": RTRL, "uoro": UORO, "snap1": SnAp1, "mdgl": OneHop, "cells": Cells}
