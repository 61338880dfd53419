"""The specification: every rule in plain NumPy, float64, written to be read beside the equations.

The engine is tested against this file, never the other way round.  Nothing here is fast: the
online form keeps the full third-order tensor R of real-time recurrent learning (N^3 numbers), and
every rule is a choice of what to put in its recursion.

Network (leaky rate neurons, Liu et al. 2022, eq. 1; ``k = exp(-dt / tau)``)::

    v_t = k v_{t-1} + (1-k) (W z_{t-1} + W_in x_t + b)        z_t = phi(v_t)        h_t = phi'(v_t)
    y_t = W_out z_t + b_out                                   v_0 = 0               z_0 = phi(0)

Traces that all rules share, for each presynaptic source s_t in {z_{t-1}, x_t, 1}::

    eps_t = k eps_{t-1} + (1-k) s_t                           presynaptic trace
    e_t[p, q] = h_t[p] eps_t[q]                               eligibility trace

The gradient is the local term plus a nonlocal one, carried by R[j, p, q] = the effect of the synapse
q -> p on v[j] along paths that pass through at least one other hop::

    dW[p, q] = sum_t L_t[p] e_t[p, q] + sum_t sum_j L_t[j] h_t[j] R_t[j, p, q]

Shapes: weights as in `Network` (``w_rec`` (N, N) [post, pre], ``w_in`` (N, n_in), ``w_out``
(n_out, N), ``b_out`` (n_out,), optionally ``b_rec`` (N,)); inputs (B, T, n_in); all arrays over time
are (B, T, .).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def _sigmoid(v):
    return 0.5 * (1.0 + np.tanh(0.5 * v))


#: name -> (phi, phi').
ACTIVATIONS = {
    "relu": (lambda v: np.maximum(v, 0.0), lambda v: (v > 0).astype(float)),
    "softplus": (lambda v: np.logaddexp(0.0, v), _sigmoid),
    "tanh": (np.tanh, lambda v: 1.0 - np.tanh(v) ** 2),
    "sigmoid": (_sigmoid, lambda v: _sigmoid(v) * (1.0 - _sigmoid(v))),
    "identity": (lambda v: v + 0.0, np.ones_like),
}


class Trajectory(NamedTuple):
    """What `forward` leaves: all of shape (B, T, .)."""

    v: np.ndarray  # membrane (N)
    z: np.ndarray  # rate phi(v) (N)
    h: np.ndarray  # derivative phi'(v) (N)
    h_before: np.ndarray  # h_{t-1} (N)
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
    hs = dphi(vs)
    h_rest = np.broadcast_to(dphi(np.zeros(n_rec)), (n_trials, 1, n_rec))
    sources = {"w_rec": zs_before, "w_in": inputs}
    if b_rec is not None:
        sources["b_rec"] = np.ones((n_trials, n_steps, 1))
    return Trajectory(
        v=vs,
        z=zs,
        h=hs,
        h_before=np.concatenate([h_rest, hs[:, :-1]], axis=1),
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


def gradient(weights, inputs, targets, *, leak, activation, loss, mask=None, rule="bptt", mode="offline", wb=None,
             mu=1.0, factor="exact", feedback=None):  # fmt: skip
    """Gradient of the batch-mean loss as ``rule`` sees it.

    Parameters
    ----------
    rule : ``bptt`` (online: RTRL), ``modprop``, ``mdgl`` or ``eprop``.
    mode : ``offline`` (adjoint, backwards in time) or ``online`` (forwards, with R); the same numbers.
    wb : (N, N) modulatory matrix of ``modprop`` and ``mdgl``: `type_means`, ``U @ V``, or W itself.
    mu : scalar or (N,), the constant that replaces h inside the recursion of ``modprop``.
    factor : postsynaptic factor in the drive of R, ``exact`` (h_{t-1}[p]) or ``mean`` (mu[p]).
    feedback : (N, n_out) matrix from dE/dy to the learning signal; None is symmetric (W_out^T).

    Returns
    -------
    loss : float
    grads : dict with the keys of ``weights``; w_rec keeps its diagonal.
    """
    path = forward(weights, inputs, leak=leak, activation=activation)
    value, error = loss_and_error(loss, path.y, targets, mask)
    w_rec, w_out = np.asarray(weights["w_rec"], float), np.asarray(weights["w_out"], float)
    signal = error @ (w_out if feedback is None else np.asarray(feedback, float).T)  # L_t (B, T, N)
    mu = np.broadcast_to(np.asarray(mu, float), len(w_rec))
    term = {"online": _online, "offline": _adjoint}[mode]
    grads = term(path, signal, leak, w_rec if rule == "bptt" else wb, rule, mu, factor)
    if "b_rec" in grads:
        grads["b_rec"] = grads["b_rec"][:, 0]
    grads["w_out"] = np.einsum("bto,btn->on", error, path.z)
    grads["b_out"] = error.sum(axis=(0, 1))
    return value, grads


def _online(path, signal, leak, wb, rule, mu, factor):
    """Forwards in time; R_t[j, p, q] = A_t R_{t-1} + (1-k) Wb[j, p] f_{t-1}[p] eps_{t-1}[q].

    ========  ==========================================  ===========
    rule      A_t                                         f_{t-1}[p]
    ========  ==========================================  ===========
    RTRL      k I + (1-k) W diag(h_{t-1}), Wb = W         h_{t-1}[p]
    ModProp   k I + (1-k) Wb diag(mu)                     h_{t-1}[p] (``exact``) or mu[p] (``mean``)
    MDGL      0                                           h_{t-1}[p]
    e-prop    (no R)
    ========  ==========================================  ===========
    """
    n_trials, n_steps, n_rec = signal.shape
    identity = np.eye(n_rec)
    grads = {}
    for name, eps in path.traces.items():
        grad = np.zeros((n_rec, eps.shape[2]))
        for i in range(n_trials):
            R = np.zeros((n_rec, n_rec, eps.shape[2]))
            eps_before = np.zeros(eps.shape[2])
            for t in range(n_steps):
                h, h_before, L = path.h[i, t], path.h_before[i, t], signal[i, t]
                if rule != "eprop":
                    A = {
                        "bptt": leak * identity + (1 - leak) * wb * h_before,
                        "modprop": leak * identity + (1 - leak) * wb * mu,
                        "mdgl": 0 * identity,
                    }[rule]
                    f = mu if rule == "modprop" and factor == "mean" else h_before
                    drive = (1 - leak) * np.einsum("jp,p,q->jpq", wb, f, eps_before)
                    R = np.einsum("ij,jpq->ipq", A, R) + drive
                grad += np.outer(L * h, eps[i, t]) + np.einsum("j,jpq->pq", L * h, R)
                eps_before = eps[i, t]
        grads[name] = grad
    return grads


def _adjoint(path, signal, leak, wb, rule, mu, factor):
    """Backwards in time, O(T N) memory.

    exact BPTT   d_t = h_t (L_t + (1-k) W^T d_{t+1}) + k d_{t+1}          dW = (1-k) sum_t d_t s_t^T
    ModProp      lam_t = h_t L_t + (1-k) mu Wb^T lam_{t+1} + k lam_{t+1}
      ``mean``                                                            dW = (1-k) sum_t lam_t s_t^T
      ``exact``  c_t = h_t (L_t + (1-k) Wb^T lam_{t+1})                   dW = sum_t c_t eps_t^T
    MDGL         c_t = h_t (L_t + (1-k) Wb^T (h_{t+1} L_{t+1}))           dW = sum_t c_t eps_t^T
    e-prop       c_t = h_t L_t                                            dW = sum_t c_t eps_t^T
    """
    n_trials, n_steps, n_rec = signal.shape
    onto_sources = rule == "bptt" or (rule == "modprop" and factor == "mean")
    rows = np.zeros((n_trials, n_steps, n_rec))
    lam = np.zeros((n_trials, n_rec))
    for t in reversed(range(n_steps)):
        h, L = path.h[:, t], signal[:, t]
        back = 0.0 if rule == "eprop" else (1 - leak) * lam @ wb
        if rule == "bptt":
            lam = h * (L + back) + leak * lam
        elif rule == "modprop":
            lam = h * L + mu * back + leak * lam
        else:
            lam = h * L
        rows[:, t] = (1 - leak) * lam if onto_sources else h * (L + back)
    pre = path.sources if onto_sources else path.traces
    return {name: np.einsum("btp,btq->pq", rows, s) for name, s in pre.items()}
