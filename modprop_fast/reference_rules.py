"""The specification, continued: the rules that are no filter of eligibility traces, and what rules are made of.

All functions see the trajectory as arrays over time (B, T, .): ``m`` (N), the modulator
m_t = h_t L_t = dE_t/dv_t taken directly; ``h`` (N), the derivative phi'(v_t); ``s`` (Q), the
presynaptic sources s_t = (z_{t-1}, x_t, 1) side by side; ``k`` is the leak.  They return the gradient
(N, Q).  By the network's equation, with J_t[j, p, q] = dv_t[j] / dw[p, q] the exact influence::

    J_t = A_t J_{t-1} + (1-k) (j = p) s_t[q],     A_t = k I + (1-k) W diag(h_{t-1}),     dw = sum_t m_t J_t
"""

from __future__ import annotations

import numpy as np


def type_means(w_rec, types, self_modulation=True):
    """Expand M[a, b], the mean of W[j, p] over j in type a, p in type b, to (N, N).

    The zero diagonal of W counts as the zeros it is (denominators n_a n_b).  Without
    ``self_modulation`` the result's own diagonal is zeroed, as in the authors' code.
    """
    types = np.asarray(types)
    wb = np.empty(np.shape(w_rec))
    for a in np.unique(types):
        for b in np.unique(types):
            block = np.ix_(types == a, types == b)
            wb[block] = np.mean(np.asarray(w_rec, float)[block])
    if not self_modulation:
        np.fill_diagonal(wb, 0.0)
    return wb


def low_rank(w_rec, rank):
    """(U (N, r), V (r, N)), U V being the best rank-r approximation of W as it is stored (its diagonal included).

    Truncated singular value decomposition (Eckart & Young 1936), U = X sqrt(S) and V = sqrt(S) Y^T.
    FloatingPointError if W is not finite: LAPACK would go on for ever.
    """
    w_rec = np.asarray(w_rec, float)
    if not np.isfinite(w_rec).all():
        raise FloatingPointError("low_rank: expected finite weights, got w_rec with NaN or Inf")
    x, size, y = np.linalg.svd(w_rec)
    root = np.sqrt(size[:rank])
    return x[:, :rank] * root, root[:, None] * y[:rank]


def modprop_taps(wb, mu, leak, n_taps):
    """F_s = (1-k) K^{s-1} Wb for s = 1 .. S, shape (S, N, N); K = k I + (1-k) Wb diag(mu): ModProp's first S taps."""
    K = leak * np.eye(len(wb)) + (1 - leak) * wb * mu
    taps = np.empty((n_taps, *wb.shape))
    F = (1 - leak) * wb
    for s in range(n_taps):
        taps[s] = F
        F = K @ F
    return taps


def auto_mu(h_mean, M, n, leak, horizon):
    """The mean derivative of each type, shrunk by a common factor until ModProp's memory ends within a horizon.

    mu = c h, with the largest c in [0, 1] for which the spectral radius of K = k I + (1-k) M diag(n mu)
    is at most r.  With the eigenvalues beta of M diag(n h), |k + (1-k) c beta| <= r is quadratic in c,
    convex, and true at c = 0, so that in closed form ::

        c = min(1, min over beta of (r^2 - k^2) / (1-k) / (k Re beta + sqrt((k Re beta)^2 + |beta|^2 (r^2 - k^2))))
        r = max(1 - 1/horizon, (1 + k) / 2)

    The second bound speaks where the leak alone remembers for longer than half the horizon,
    1 / (1-k) > horizon / 2.  No mu can shorten that, and e-prop has it too: it does not count, and the
    loops through other units may still double it.

    Parameters
    ----------
    h_mean, M, n : (C,), (C, C), (C,)
        Mean of h, means of W and number of units of each type.  For any other modulatory matrix Wb,
        every unit its own type: ``h_mean`` (N,), ``M = Wb``, ``n = 1``.
    horizon : float
        In steps.
    """
    if not np.isfinite(M).all():
        raise FloatingPointError("auto_mu: expected finite weights, got means of W with NaN or Inf")
    r = max(1 - 1 / horizon, (1 + leak) / 2)
    h_mean = np.asarray(h_mean, float)
    beta = np.linalg.eigvals(np.asarray(M, float) * (n * h_mean))
    beta = beta[beta != 0]
    slope, room = leak * beta.real, r**2 - leak**2
    most = room / (1 - leak) / (slope + np.sqrt(slope**2 + np.abs(beta) ** 2 * room))
    return min(1.0, most.min(initial=1.0)) * h_mean


def tbptt_online(m, h, s, w, k, horizon):
    """Truncated BPTT, forwards: the exact influence kept apart by the age of its source.

    The error of step t reaches the weights as they were used at steps t, t-1, .., t - horizon + 1 (Williams & Peng
    1990, one error per backward pass), so that horizon = 1 has no memory at all, not even the leak's, and horizon >= T is BPTT.
    J_t^0 = (1-k) (j = p) s_t[q],   J_t^n = A_t J_{t-1}^{n-1},   dw = sum_t m_t sum_{n < horizon} J_t^n.
    """
    n_steps, n_rec = m.shape[1:]
    identity, ages, grad = np.eye(n_rec), [], 0.0
    for t in range(n_steps):
        A = k * identity + (1 - k) * w * h[:, t - 1, None, :]
        aged = [np.einsum("bij,bjpq->bipq", A, J) for J in ages[: horizon - 1]]
        ages = [(1 - k) * np.einsum("jp,bq->bjpq", identity, s[:, t]), *aged]
        grad = grad + np.einsum("bj,bjpq->pq", m[:, t], sum(ages))
    return grad


def tbptt_offline(m, h, s, w, k, horizon):
    """Truncated BPTT, backwards: the adjoints of all errors, of step t at index t - age, pulled back one step at a time.

    d = m_t at age 0,   d <- k d + (1-k) h_{t-age-1} (W^T d),   dw = (1-k) sum_{age < horizon} sum_t d s_{t-age}^T.
    """
    n_steps = m.shape[1]
    d, grad = m, 0.0
    for age in range(min(horizon, n_steps)):
        grad = grad + (1 - k) * np.einsum("btp,btq->pq", d, s[:, : n_steps - age])
        d = k * d[:, 1:] + (1 - k) * h[:, : n_steps - age - 1] * (d[:, 1:] @ w)
    return grad


def uoro(m, h, s, w, k, rng):
    """Unbiased online recurrent optimization (Tallec & Ollivier 2018): J_t estimated by one outer product, a_t b_t[p, q].

    With fresh random signs nu (N,) at every step and trial, ::

        a_t = rho0 A_t a_{t-1} + rho1 nu          b_t = b_{t-1} / rho0 + (1-k) nu[p] s_t[q] / rho1

    whose expectation is J_t, since E[nu] = 0 and E[nu nu^T] = I.  rho0 and rho1 give both factors of each
    product the same norm over all units and weights, which makes the variance least.
    """
    n_trials, n_steps, n_rec = m.shape
    signs = 1.0 - 2.0 * rng.integers(0, 2, size=m.shape)
    a, b, grad = np.zeros((n_trials, n_rec)), np.zeros((n_trials, n_rec, s.shape[2])), 0.0
    for t in range(n_steps):
        nu = signs[:, t]
        old, old_b = _balanced(k * a + (1 - k) * (h[:, t - 1] * a) @ w.T, b)
        new, new_b = _balanced(nu, (1 - k) * np.einsum("bp,bq->bpq", nu, s[:, t]))
        a, b = old + new, old_b + new_b
        grad = grad + np.einsum("bj,bj,bpq->pq", m[:, t], a, b)
    return grad


def _balanced(a, b):
    """The same outer products a b (B, ...) with factors of equal norm; both are zero where the product is."""
    size_a, size_b = (np.sqrt(np.sum(x**2, axis=tuple(range(1, x.ndim)))) for x in (a, b))
    some = (size_a > 0) & (size_b > 0)
    rho = np.sqrt(np.where(some, size_b, 1) / np.where(some, size_a, 1))
    return a * (some * rho)[:, None], b * (some / rho)[:, None, None]


def modprop_by_eigenvectors(m, s, wb, mu, k):
    """ModProp with factor ``mean`` for any modulatory matrix, online with N Q complex numbers of state.

    K = k I + (1-k) Wb diag(mu) = X diag(l) X^{-1} is constant while the weights are, and J_t = sum_s K^{t-s} (1-k) s_s::

        Zeta_t[i, q] = l[i] Zeta_{t-1}[i, q] + (1-k) s_t[q]        A[i, q] += (X^T m_t)[i] Zeta_t[i, q]
        dw = Re(X^{-T} A)

    Exact to the conditioning of X.  There is no X where K is defective, as it is for W without loops.
    """
    eigenvalues, X = np.linalg.eig(k * np.eye(len(wb)) + (1 - k) * wb * mu)
    n_trials, n_steps, n_rec = m.shape
    zeta = np.zeros((n_trials, n_rec, s.shape[2]), complex)
    A = np.zeros(zeta.shape[1:], complex)
    for t in range(n_steps):
        zeta = eigenvalues[:, None] * zeta + (1 - k) * s[:, t, None, :]
        A += np.einsum("bi,biq->iq", m[:, t] @ X, zeta)
    return np.linalg.solve(X.T, A).real
