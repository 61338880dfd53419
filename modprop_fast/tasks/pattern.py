"""Pattern generation: a sum of sinusoids, to be made out of one frozen input."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Task, Trials

__all__ = ["Pattern"]


@dataclass(frozen=True)
class Pattern(Task):
    """Put out a sum of sinusoids while the input is always the same noise, with an error at every step.

    Sinusoid i = 1, 2, .. has i periods in the trial, an amplitude drawn from [0.5, 2] and a random phase. Their sum is
    scaled to variance 1 (its mean over the trial is 0). The input is standard Gaussian noise, drawn once.

    There is one trial, the same for every generator: a batch repeats it, so that a batch of 1 says all, and
    `validation` and `test` return it too. What counts is whether it can be learned.

    Parameters
    ----------
    steps : int
        Steps of the trial, more than twice the number of sinusoids.
    channels : int
        Input channels, >= 1.
    sinusoids : int
        Sinusoids in the sum, >= 1.
    seed : int
        Of the input, the amplitudes and the phases.

    Notes
    -----
    Source: the task, with a sum of a few sinusoids, is that of Bellec et al., "A solution to the learning dilemma for
    recurrent networks of spiking neurons", Nature Communications 2020, and of Liu et al., NeurIPS 2022. The
    numbers here are ours.

    Examples
    --------
    >>> import numpy as np
    >>> trials = Pattern(steps=100).sample(np.random.default_rng(0), batch=1)
    >>> trials.inputs.shape, trials.targets.shape
    ((1, 100, 20), (1, 100, 1))
    """

    steps: int = 500
    channels: int = 20
    sinusoids: int = 5

    n_out: ClassVar[int] = 1
    loss: ClassVar[str] = "mse"
    chance: ClassVar[float] = 0.5  # variance 1, and the loss is half the square

    def __post_init__(self) -> None:
        self._integers(channels=1, sinusoids=1)
        self._integers(steps=2 * self.sinusoids + 1)

    @property
    def n_in(self) -> int:
        """Input channels."""
        return self.channels

    @property
    def n_steps(self) -> int:
        """Steps of the trial."""
        return self.steps

    def _draw(self, rng: np.random.Generator, batch: int) -> Trials:
        frozen = self._generator("pattern")
        inputs = self._noise(frozen, 1, 1.0)
        amplitudes, phases = frozen.uniform(0.5, 2.0, self.sinusoids), frozen.uniform(0.0, 2 * np.pi, self.sinusoids)
        periods = np.outer(np.arange(self.steps) / self.steps, np.arange(1, self.sinusoids + 1))
        pattern = np.sin(2 * np.pi * periods + phases) @ amplitudes
        pattern = (pattern / pattern.std()).astype(np.float32)
        return Trials(np.repeat(inputs, batch, axis=0), np.tile(pattern[:, None], (batch, 1, 1)))
