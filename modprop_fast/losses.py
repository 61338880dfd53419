"""Targets and masks, brought into the one form that the engine reads.

mse            E = mean over the masked steps and the outputs of (y - y*)^2 / 2
cross_entropy  E = mean over the masked steps of -log softmax(y)[class]

The mean over steps is taken within each trial, then over the trials.  A stream of steps has no last
step to average to: there the losses of the steps are added.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import checks

LOSSES = ("mse", "cross_entropy")


class Targets(NamedTuple):
    """Checked targets of B trials of T steps; trial ``i`` is ``targets.trial(i)``.

    What is the same at all steps, or in all trials, is broadcast, so that it takes no memory by T.
    """

    values: np.ndarray | None  # (B, T, n_out) of the network's dtype: mse
    labels: np.ndarray | None  # (B, T) int64: cross entropy
    mask: np.ndarray | None  # (B, T) uint8, None: every step

    def trial(self, i):
        """(values (T, n_out) | None, labels (T,) | None, mask (T,) | None) of one trial."""
        return tuple(None if part is None else part[i] for part in self)

    def weights(self, n_trials, n_steps) -> np.ndarray:
        """(B,) what the loss of one step counts for in the batch mean."""
        steps = np.full(n_trials, n_steps) if self.mask is None else self.mask.sum(axis=1)
        if not steps.all():
            at = int(np.argmin(steps))
            raise ValueError(f"mask: expected at least one step in every trial, got none in trial {at}")
        return 1.0 / (steps * n_trials)


def check_targets(loss, targets, mask, n_trials, n_steps, n_out, dtype) -> Targets:
    """Targets for ``n_trials`` trials, or one sentence about what is wrong with them.

    Parameters
    ----------
    targets : (B, T, n_out) array for mse; int (B, T), or (B,) for one class per trial, for cross_entropy
    mask : None or bool (T,) or (B, T)
        The steps that have an error; default every step, the last one where there is one class per trial.
    """
    values = labels = None
    if loss == "mse":
        values = checks.array("targets", targets, (n_trials, n_steps, n_out), dtype)
    else:
        given = checks.read("targets", targets)
        if given.dtype.kind not in "iu":
            raise TypeError(f"targets: expected integer classes, got {given.dtype} of shape {given.shape}")
        if given.shape not in ((n_trials,), (n_trials, n_steps)):
            raise ValueError(f"targets: expected classes of shape ({n_trials},) or ({n_trials}, {n_steps}), got {given.shape}")
        if given.size and not (0 <= given.min() and given.max() < n_out):
            worst = given.min() if given.min() < 0 else given.max()
            raise ValueError(f"targets: expected classes in 0..{n_out - 1}, got {worst}")
        if mask is None and given.ndim == 1:
            mask = np.zeros(n_steps, bool)
            mask[-1] = True
        labels = np.broadcast_to(np.ascontiguousarray(given.reshape(n_trials, -1), np.int64), (n_trials, n_steps))
    if mask is not None:
        given = checks.read("mask", mask)
        if given.dtype != bool:
            raise TypeError(f"mask: expected an array of bool, got {given.dtype}")
        if given.shape not in ((n_steps,), (n_trials, n_steps)):
            raise ValueError(f"mask: expected shape ({n_steps},) or ({n_trials}, {n_steps}), got {given.shape}")
        mask = np.broadcast_to(np.ascontiguousarray(given).view(np.uint8), (n_trials, n_steps))
    return Targets(values, labels, mask)
