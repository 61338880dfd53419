"""Evidence accumulation: after a row of cues on two lanes and a delay, which lane had more of them?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Task, Trials

__all__ = ["CueAccumulation"]


@dataclass(frozen=True)
class CueAccumulation(Task):
    """Tell on which lane more cues came, left (class 0) or right (class 1), when the recall cue is there.

    A trial is a row of cues, each a pulse of height 1 and followed by a gap; the delay; the recall cue. The favoured lane of
    a trial is drawn with probability 1/2, and each cue comes on it with probability 0.7, else on the other. The
    answer is the majority of the cues that came. Channels: left, right, recall; with Gaussian noise of standard
    deviation 0.01. The error is taken at every step of the recall cue.

    Parameters
    ----------
    cues : int
        Number of cues, >= 1 and odd, so that one lane has more.
    cue, gap : int
        Steps of each cue, >= 1, and of the gap after it, >= 0.
    delay : int
        Steps from the last gap to the recall cue, >= 0.
    recall : int
        Steps of the recall cue, >= 1.
    seed : int
        Of the trials held out.

    Notes
    -----
    Source: Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
    Communications 2020: seven cues of 100 ms, 50 ms apart, and a delay. The defaults are these times in steps of
    10 ms, with a delay of 1 s; there, populations of spiking inputs stand for the channels.

    Examples
    --------
    >>> import numpy as np
    >>> trials = CueAccumulation().sample(np.random.default_rng(0), batch=4)
    >>> trials.inputs.shape, trials.targets.shape, trials.mask.sum(axis=1).tolist()
    ((4, 220, 3), (4,), [15, 15, 15, 15])
    """

    cues: int = 7
    cue: int = 10
    gap: int = 5
    delay: int = 100
    recall: int = 15

    n_in: ClassVar[int] = 3
    n_out: ClassVar[int] = 2
    loss: ClassVar[str] = "cross_entropy"
    chance: ClassVar[float] = 0.5

    favour: ClassVar[float] = 0.7
    noise: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        self._integers(cues=1, cue=1, gap=0, delay=0, recall=1)
        if self.cues % 2 == 0:
            raise ValueError(f"cues: expected an odd number, so that one lane has more, got {self.cues}")

    @property
    def n_steps(self) -> int:
        """Steps of one trial."""
        return self.cues * (self.cue + self.gap) + self.delay + self.recall

    def _draw(self, rng: np.random.Generator, batch: int) -> Trials:
        favoured = rng.integers(0, 2, size=(batch, 1))
        lanes = np.where(rng.random((batch, self.cues)) < self.favour, favoured, 1 - favoured)
        inputs = self._noise(rng, batch, self.noise)
        for i in range(self.cues):
            start = i * (self.cue + self.gap)
            inputs[np.arange(batch), start : start + self.cue, lanes[:, i]] += 1.0
        inputs[:, -self.recall :, 2] += 1.0
        mask = np.zeros((batch, self.n_steps), bool)
        mask[:, -self.recall :] = True
        return Trials(inputs, (2 * lanes.sum(axis=1) > self.cues).astype(np.int64), mask)
