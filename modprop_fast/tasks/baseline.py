"""How far one gets without a network: a linear readout of the inputs."""

import numpy as np
from numpy.random import Generator

from .. import checks
from .base import Task, Trials, optional

__all__ = ["linear_baseline"]


def linear_baseline(task: Task, rng: Generator, n: int = 1000) -> float:
    """Score of the best linear readout on the validation trials, in the unit of ``task.chance``.

    For cross_entropy: the accuracy of multinomial logistic regression (scikit-learn, L2 penalty 1) that sees all inputs
    of a trial at once, so that it needs no memory; where a trial has several classes, one regression for each step that counts.
    For mse: the loss of a linear readout, with a constant, of the inputs of the same step.

    Parameters
    ----------
    task : Task
    rng : numpy.random.Generator
        Source of the training trials.
    n : int
        Training trials that are drawn, >= 1; of a data set the whole training part is taken.

    Returns
    -------
    score : float

    Raises
    ------
    ModuleNotFoundError
        If scikit-learn, of the extra ``modprop_fast[tasks]``, is not installed.

    Examples
    --------
    >>> from modprop_fast.tasks import Pattern
    >>> 0.4 < linear_baseline(Pattern(), np.random.default_rng(0), n=1) < Pattern().chance
    True
    """
    train, held_out = task.sample(rng, task.n_train or checks.integer("n", n, least=1)), task.validation()
    if task.loss == "mse":
        design, targets = _steps(train)
        readout, *_ = np.linalg.lstsq(design, targets, rcond=None)
        design, targets = _steps(held_out)
        return float(np.mean((targets - design @ readout) ** 2) / 2)

    classifier = optional("sklearn.linear_model", "linear_baseline").LogisticRegression(max_iter=10_000)
    inputs, unseen = (trials.inputs.reshape(len(trials.inputs), -1) for trials in (train, held_out))
    pairs = zip(_classes(train), _classes(held_out), strict=True)
    return float(np.mean([classifier.fit(inputs, known).score(unseen, answers) for known, answers in pairs]))


def _steps(trials: Trials) -> tuple[np.ndarray, np.ndarray]:
    """Inputs with a constant, and targets, of all steps that count."""
    counts = slice(None) if trials.mask is None else trials.mask
    inputs, targets = (array[counts].reshape(-1, array.shape[-1]).astype(np.float64) for array in trials[:2])
    return np.column_stack([inputs, np.ones(len(inputs))]), targets


def _classes(trials: Trials) -> np.ndarray:
    """(answers per trial, B): the class of each trial, or those of the steps that count, as many in every trial."""
    targets, mask = trials.targets, trials.mask
    if targets.ndim == 1:
        return targets[None]
    return (targets if mask is None else targets[mask].reshape(len(targets), -1)).T
