"""The specification: every rule in plain NumPy, float64, written to be read beside the equations.

The engine is tested against this file, never the other way round.  Nothing here is fast: the
online form keeps the full third-order tensor R of real-time recurrent learning (N^3 numbers), and
every rule is a choice of what to put in its place.  Rules of another make (truncated BPTT, UORO) are
in `reference_rules`.

Network (leaky rate neurons, Liu et al. 2022, eq. 1; ``k = exp(-dt / tau)``)::

    v_t = k v_{t-1} + (1-k) (W z_{t-1} + W_in x_t + b)        z_t = phi(v_t)        h_t = phi'(v_t)
    y_t = W_out z_t + b_out                                   v_0 = 0               z_0 = phi(0)

Traces that all rules share, for each presynaptic source s_t in {z_{t-1}, x_t, 1}::

    eps_t = k eps_{t-1} + (1-k) s_t                           presynaptic trace
    e_t[p, q] = h_t[p] eps_t[q]                               eligibility trace

The gradient is the local term plus a nonlocal one, carried by R[j, p, q] = the effect of the synapse
q -> p on v[j] along paths that pass through at least one other hop::

    dW[p, q] = sum_t m_t[p] eps_t[q] + sum_t sum_j m_t[j] R_t[j, p, q]        m_t = h_t L_t

where L_t = dE/dz_t is the learning signal and m_t = dE/dv_t the modulator, both taken directly only
(through y_t, not through later steps).  As an adjoint, backwards in time, the same sum reads ::

    dW[p, q] = sum_t (m_t[p] + f_t[p] back_t[p]) eps_t[q]

with the postsynaptic factor f_t of the nonlocal term, and back_t[p] = what the modulators of all later
steps, sent back through the modulatory matrix, say of z_t[p].

Shapes: weights as in `Network` (``w_rec`` (N, N) [post, pre], ``w_in`` (N, n_in), ``w_out``
(n_out, N), ``b_out`` (n_out,), optionally ``b_rec`` (N,)); inputs (B, T, n_in); all arrays over time
are (B, T, .).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import reference_rules as others
from .reference_rules import auto_mu, low_rank, modprop_taps, type_means

__all__ = ["auto_mu", "forward", "gradient", "loss_and_error", "low_rank", "modprop_taps", "type_means"]


def _sigmoid(v):
    e = np.exp(-np.abs(v))
    return np.where(v > 0, 1.0, e) / (1.0 + e)


def _dsigmoid(v):
    """sigmoid (1 - sigmoid), with all its digits where it is nearly zero."""
    e = np.exp(-np.abs(v))
    return e / (1.0 + e) ** 2


#: name -> (phi, phi').
ACTIVATIONS = {
    "relu": (lambda v: np.maximum(v, 0.0), lambda v: (v > 0).astype(float)),
    "softplus": (lambda v: np.logaddexp(0.0, v), _sigmoid),
    "tanh": (np.tanh, lambda v: 4.0 * _dsigmoid(2.0 * v)),
    "sigmoid": (_sigmoid, _dsigmoid),
    "identity": (lambda v: v + 0.0, np.ones_like),
}


class Trajectory(NamedTuple):
    """What `forward` leaves: all of shape (B, T, .)."""

    v: np.ndarray  # membrane (N)
    z: np.ndarray  # rate phi(v) (N)
    h: np.ndarray  # derivative phi'(v) (N)
    y: np.ndarray  # readout (n_out)
    sources: dict[str, np.ndarray]  # presynaptic s_t by weight: w_rec (N), w_in (n_in), b_rec (1)
    traces: dict[str, np.ndarray]  # eps_t of the same


def forward(weights, inputs, *, leak, activation):
    """Run the network from rest over ``inputs`` (B, T, n_in); return its `Trajectory`."""
    w_rec, w_in, w_out = (np.asarray(weights[k], float) for k in ("w_rec", "w_in", "w_out"))
    b_out, b_rec = np.asarray(weights["b_out"], float), weights.get("b_rec")
    phi, dphi = ACTIVATIONS[activation]
    inputs = np.asarray(inputs, float)
    n_trials, n_steps, _ = inputs.shape
    n_rec = len(w_rec)
    v = np.zeros((n_trials, n_rec))
    z = phi(v)
    vs, zs, zs_before = (np.empty((n_trials, n_steps, n_rec)) for _ in range(3))
    for t in range(n_steps):
        zs_before[:, t] = z
        current = z @ w_rec.T + inputs[:, t] @ w_in.T
        if b_rec is not None:
            current = current + b_rec
        v = leak * v + (1 - leak) * current
        z = phi(v)
        vs[:, t], zs[:, t] = v, z
    sources = {"w_rec": zs_before, "w_in": inputs}
    if b_rec is not None:
        sources["b_rec"] = np.ones((n_trials, n_steps, 1))
    return Trajectory(
        v=vs,
        z=zs,
        h=dphi(vs),
        y=zs @ w_out.T + b_out,
        sources=sources,
        traces={name: presynaptic_trace(s, leak) for name, s in sources.items()},
    )


def presynaptic_trace(source, leak):
    """eps_t = k eps_{t-1} + (1-k) s_t over axis 1 of ``source`` (B, T, Q)."""
    eps = np.zeros_like(source)
    before = np.zeros_like(source[:, 0])
    for t in range(source.shape[1]):
        before = leak * before + (1 - leak) * source[:, t]
        eps[:, t] = before
    return eps


def loss_and_error(loss, y, targets, mask=None):
    """The batch-mean loss and dE/dy (B, T, n_out).

    ``mse``: mean over the masked steps and the outputs of (y - y*)^2 / 2, targets (B, T, n_out).
    ``cross_entropy``: mean over the masked steps of the softmax cross entropy, targets (B, T) or, one
    class per trial, (B,).  The mean over steps is taken in each trial, then over the trials.
    Default mask: every step; the last one where the target is one class per trial.
    """
    n_trials, n_steps, n_out = y.shape
    targets = np.asarray(targets)
    if mask is None:
        mask = np.ones((n_trials, n_steps), bool)
        if loss == "cross_entropy" and targets.ndim == 1:
            mask[:, :-1] = False
    mask = np.broadcast_to(mask, (n_trials, n_steps)).astype(float)
    weight = (mask / mask.sum(axis=1, keepdims=True) / n_trials)[:, :, None]
    if loss == "mse":
        error = (y - targets) / n_out
        return np.sum(weight * error**2) * n_out / 2, weight * error
    one_hot = np.eye(n_out)[targets if targets.ndim == 2 else targets[:, None]]
    shifted = y - y.max(axis=2, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=2, keepdims=True))
    return -np.sum(weight * one_hot * log_p), weight * (np.exp(log_p) - one_hot)


def gradient(weights, inputs, targets, *, leak, activation, loss, mask=None, rule="bptt", mode="offline", wb=None,
             mu=1.0, factor="exact", feedback=None, hbar=None, taps=None, types=None, exact_steps=None, horizon=None,
             rng=None):  # fmt: skip
    """Gradient of the batch-mean loss as ``rule`` sees it.

    Parameters
    ----------
    rule : str
        ``bptt`` (online: RTRL), ``snap1``, ``modprop``, ``mdgl``, ``eprop`` (see `nonlocal_term`);
        ``tbptt`` (`tbptt_offline`), ``uoro``; ``none``, with ``exact_steps`` only.
    mode : str
        ``offline`` (adjoint, backwards in time) or ``online`` (forwards, with R); the same numbers.
        ``uoro`` is online only.  ``modprop`` with ``factor="mean"`` has a third form, ``eigenvectors``.
    wb : (N, N) modulatory matrix of ``modprop`` and ``mdgl``: `type_means`, ``U @ V`` (`low_rank`), or W itself.
    mu : what replaces h inside the recursion of ``modprop``
        A scalar or (N,), constant (`auto_mu`); or ``instant``, the mean of h_t over each of ``types`` (N,)
        at every step, in every trial.
    factor : postsynaptic factor f in the drive of R of ``modprop``
        ``exact`` (h_t[p]), ``mean`` (mu[p]) or ``running`` (``hbar`` (N,), a slow mean of h, frozen here).
    taps : of ``modprop``, in place of its recursion
        An (S, N, N) array F, any causal filter: R_t = sum_s F_s[j, p] f_{t-s}[p] eps_{t-s}[q], s = 1 .. S
        (expand F over types (S, C, C) by ``F[:, types][:, :, types]``); or S, ModProp's own first S taps.
    feedback : (N, n_out) matrix from dE/dy to the learning signal; None is symmetric (W_out^T).
    exact_steps : length b of the chunks inside which the gradient is exact, the rule's beyond (`exact_chunks`)
        ``modprop`` has traces of everything before the chunk, ``eprop`` an eligibility tail, ``none`` nothing.
    horizon : number of steps that an error reaches back in ``tbptt``, its own included.
    rng : numpy Generator of ``uoro``.

    Returns
    -------
    loss : float
    grads : dict with the keys of ``weights``; w_rec keeps its diagonal.
    """
    path = forward(weights, inputs, leak=leak, activation=activation)
    value, error = loss_and_error(loss, path.y, targets, mask)
    w_rec, w_out = np.asarray(weights["w_rec"], float), np.asarray(weights["w_out"], float)
    signal = error @ (w_out if feedback is None else np.asarray(feedback, float).T)  # L_t (B, T, N)
    m, h = signal * path.h, path.h
    s = np.concatenate(list(path.sources.values()), axis=2)
    eps = np.concatenate(list(path.traces.values()), axis=2)

    if rule == "tbptt":
        form = {"online": others.tbptt_online, "offline": others.tbptt_offline}[mode]
        grad = form(m, h, s, w_rec, leak, horizon)
    elif rule == "uoro":
        if mode != "online":
            raise ValueError("uoro: there is only an online form")
        grad = others.uoro(m, h, s, w_rec, leak, rng)
    elif mode == "eigenvectors":
        if (rule, factor) != ("modprop", "mean") or taps is not None or exact_steps is not None:
            raise ValueError("eigenvectors: a form of modprop with factor='mean' only")
        grad = others.modprop_by_eigenvectors(m, s, np.asarray(wb, float), mu, leak)
    else:
        form, grad = {"online": online, "offline": offline}[mode], 0.0
        if exact_steps is not None:
            d, m = exact_chunks(m, h, w_rec, leak, exact_steps)
            grad = (1 - leak) * np.einsum("btp,btq->pq", d, s)
        if rule != "none":
            grad = grad + form(m, eps, nonlocal_term(rule, h, leak, w_rec, wb, mu, factor, hbar, taps, types))

    widths = np.cumsum([x.shape[2] for x in path.sources.values()])
    grads = dict(zip(path.sources, np.split(grad, widths[:-1], axis=1), strict=True))
    if "b_rec" in grads:
        grads["b_rec"] = grads["b_rec"][:, 0]
    grads["w_out"] = np.einsum("bto,btn->on", error, path.z)
    grads["b_out"] = error.sum(axis=(0, 1))
    return value, grads


def online(m, eps, term):
    """dW = sum_t (m_t[p] eps_t[q] + sum_j m_t[j] R_t[j, p, q]), forwards in time: (N, Q)."""
    grad = np.einsum("btp,btq->pq", m, eps)
    for t, R in enumerate(term.forwards(eps)):
        grad += np.einsum("bj,bjpq->pq", m[:, t], R)
    return grad


def offline(m, eps, term):
    """dW = sum_t (m_t[p] + f_t[p] back_t[p]) eps_t[q], backwards in time, O(T N) memory: (N, Q)."""
    return np.einsum("btp,btq->pq", m + term.f * term.backwards(m), eps)


def adjoint(m, wb, g, leak):
    """lam_t = m_t + k lam_{t+1} + (1-k) g_t (Wb^T lam_{t+1}).  With W and h for Wb and g it is dE/dv_t (Werbos 1990)."""
    out, lam = np.empty_like(m), np.zeros_like(m[:, 0])
    for t in reversed(range(m.shape[1])):
        lam = m[:, t] + leak * lam + (1 - leak) * g[:, t] * (lam @ wb)
        out[:, t] = lam
    return out


class Recursion(NamedTuple):
    """R_t = A_t R_{t-1} + (1-k) Wb[j, p] f_{t-1}[p] eps_{t-1}[q],   A_t = k I + (1-k) Wb diag(g_{t-1}).

    Its adjoint is back_t = (1-k) Wb^T lam_{t+1}, with lam from `adjoint`.
    """

    leak: float
    wb: np.ndarray  # (N, N)
    g: np.ndarray  # (B, T, N)
    f: np.ndarray  # (B, T, N)

    def forwards(self, eps):
        """Yield R_t (B, N, N, Q) for t = 0 .. T-1."""
        k, wb = self.leak, self.wb
        n_trials, n_steps, n_rec = self.g.shape
        R = np.zeros((n_trials, n_rec, n_rec, eps.shape[2]))
        yield R
        for t in range(1, n_steps):
            A = k * np.eye(n_rec) + (1 - k) * wb * self.g[:, t - 1, None, :]
            drive = (1 - k) * np.einsum("jp,bp,bq->bjpq", wb, self.f[:, t - 1], eps[:, t - 1])
            R = np.einsum("bij,bjpq->bipq", A, R) + drive
            yield R

    def backwards(self, m):
        """back_t (B, T, N)."""
        later = np.zeros_like(m)
        later[:, :-1] = adjoint(m, self.wb, self.g, self.leak)[:, 1:]
        return (1 - self.leak) * later @ self.wb


class Taps(NamedTuple):
    """R_t = sum_s F_s[j, p] f_{t-s}[p] eps_{t-s}[q],  s = 1 .. S.  Its adjoint is back_t = sum_s F_s^T m_{t+s}."""

    F: np.ndarray  # (S, N, N)
    f: np.ndarray  # (B, T, N)

    def forwards(self, eps):
        """Yield R_t (B, N, N, Q) for t = 0 .. T-1."""
        n_trials, n_steps, n_rec = self.f.shape
        for t in range(n_steps):
            R = np.zeros((n_trials, n_rec, n_rec, eps.shape[2]))
            for s, F in enumerate(self.F[:t], start=1):
                R += np.einsum("jp,bp,bq->bjpq", F, self.f[:, t - s], eps[:, t - s])
            yield R

    def backwards(self, m):
        """back_t (B, T, N)."""
        back = np.zeros_like(m)
        for s, F in enumerate(self.F[: m.shape[1] - 1], start=1):
            back[:, :-s] += m[:, s:] @ F
        return back


def nonlocal_term(rule, h, leak, w_rec, wb, mu, factor, hbar, taps, types):
    """The R of a rule: `Recursion` (Wb, g, f) or `Taps` (F, f).

    =========  =================================================  ==========================================
    rule       R                                                  source
    =========  =================================================  ==========================================
    bptt       recursion, Wb = W, g = h, f = h                    RTRL, Williams & Zipser 1989
    snap1      recursion, Wb = the diagonal of W, g = h, f = h    SnAp-1, Menick et al. 2021
    modprop    recursion, Wb, g = mu, f = h, mu or hbar           Liu et al. 2022
               taps F_s, s = 1 .. S                               any filter, or (1-k) K^{s-1} Wb: `modprop_taps`
    mdgl       tap F_1 = (1-k) Wb, f = h                          Liu et al. 2021
    eprop      no tap                                             Bellec et al. 2020; Murray 2019 (RFLO)
    =========  =================================================  ==========================================

    SnAp-1 keeps, of the influence J_t[j, p, q], what an immediate one could be: j = p.  Its recursion
    J_t[p] = (k + (1-k) W[p, p] h_{t-1}[p]) J_{t-1}[p] + (1-k) s_t[q] is RTRL's for the diagonal of W, so that
    without autapses SnAp-1 is e-prop.
    """
    wb = None if wb is None else np.asarray(wb, float)
    if rule == "bptt":
        return Recursion(leak, w_rec, h, h)
    if rule == "snap1":
        return Recursion(leak, np.diag(np.diag(w_rec)), h, h)
    if rule == "mdgl":
        return Taps((1 - leak) * wb[None], h)
    if rule == "eprop":
        return Taps(np.empty((0, *w_rec.shape)), h)
    if rule != "modprop":
        raise ValueError(f"rule: unknown {rule!r}")
    if isinstance(taps, int | np.integer):
        taps = modprop_taps(wb, mu, leak, taps)
    if isinstance(mu, str):
        g = h @ (np.equal.outer(types, types) / np.bincount(types)[types])
    else:
        g = np.broadcast_to(np.asarray(mu, float), h.shape)
    f = {"exact": h, "mean": g, "running": hbar}[factor]
    f = np.broadcast_to(np.asarray(f, float), h.shape)
    return Recursion(leak, wb, g, f) if taps is None else Taps(np.asarray(taps, float), f)


def exact_chunks(m, h, w_rec, leak, n_exact):
    """Cut time into chunks of b steps, at 0, b, 2b, ..: exact credit inside each, and what it says of the past.

    With t0 the first step of a chunk, and for the errors of that chunk only, ::

        d_t      = m_t + k d_{t+1} + (1-k) h_t (W^T d_{t+1}),  d = 0 behind the chunk           dE_chunk / dv_t
        a_{t0-1} = k d_{t0} + (1-k) h_{t0-1} (W^T d_{t0}),  a = 0 at all other steps            dE_chunk / dv_{t0-1}
        dW       = sum_t ( (1-k) d_t[p] s_t[q]  +  a_t[p] eps_t[q]  +  sum_j a_t[j] R_t[j, p, q] )

    The last two terms are a rule's gradient, `online` or `offline`, with a in place of the modulators m: in the
    adjoint form the exact d becomes the rule's lam where the chunk begins.

    Returns
    -------
    d, a : (B, T, N)
    """
    d, a = np.empty_like(m), np.zeros_like(m)
    for t0 in range(0, m.shape[1], n_exact):
        chunk = slice(t0, t0 + n_exact)
        d[:, chunk] = adjoint(m[:, chunk], w_rec, h[:, chunk], leak)
        if t0 > 0:
            a[:, t0 - 1] = leak * d[:, t0] + (1 - leak) * h[:, t0 - 1] * (d[:, t0] @ w_rec)
    return d, a
