"""Delayed match to sample: is the second stimulus the one that was shown before the delay?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Task, Trials

__all__ = ["MatchToSample"]


@dataclass(frozen=True)
class MatchToSample(Task):
    """Tell whether two stimuli, a delay apart, are the same (class 1) or not (class 0).

    A trial is the sample, the delay and the test stimulus. A stimulus is a pulse of height 1 on its own channel. The test
    is the sample with probability 1/2, else any of the others alike. Gaussian noise of standard deviation 0.01
    is added to all channels. The answer is due at the last step, while the test stimulus is still there.

    Parameters
    ----------
    stimuli : int
        Number of stimuli, and of channels, >= 2.
    delay : int
        Steps between the two, >= 0.
    cue : int
        Steps of each, >= 1.
    seed : int
        Of the trials held out.

    Notes
    -----
    Source: the task of Miller, Erickson and Desimone, "Neural mechanisms of visual working memory in prefrontal cortex of
    the macaque", Journal of Neuroscience 1996, with one test stimulus. The numbers here are ours.

    Examples
    --------
    >>> import numpy as np
    >>> trials = MatchToSample().sample(np.random.default_rng(0), batch=4)
    >>> trials.inputs.shape, trials.targets.shape
    ((4, 60, 4), (4,))
    """

    stimuli: int = 4
    delay: int = 40
    cue: int = 10

    n_out: ClassVar[int] = 2
    loss: ClassVar[str] = "cross_entropy"
    chance: ClassVar[float] = 0.5

    noise: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        self._integers(stimuli=2, delay=0, cue=1)

    @property
    def n_in(self) -> int:
        """Channels, one per stimulus."""
        return self.stimuli

    @property
    def n_steps(self) -> int:
        """Steps of one trial."""
        return 2 * self.cue + self.delay

    def _draw(self, rng: np.random.Generator, batch: int) -> Trials:
        first, match = rng.integers(0, self.stimuli, batch), rng.integers(0, 2, batch)
        other = (first + rng.integers(1, self.stimuli, batch)) % self.stimuli
        inputs = self._noise(rng, batch, self.noise)
        inputs[np.arange(batch), : self.cue, first] += 1.0
        inputs[np.arange(batch), -self.cue :, np.where(match, first, other)] += 1.0
        return Trials(inputs, match)
