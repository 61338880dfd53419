"""The delayed XOR task of Liu et al. (NeurIPS 2022): were two cues, a long delay apart, alike or not?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Task, Trials

__all__ = ["DelayedXOR"]


@dataclass(frozen=True)
class DelayedXOR(Task):
    """Tell whether both or neither of two cues were present (class 1), or only one of them (class 0).

    A trial is one cue window, the delay, and another cue window. Cue A rises on channel 0 in the first window, cue B on
    channel 1 in the last, each with probability 1/2. With u running from -2 to 2 over the window, a cue is the bump
    ``2 exp(-u^2 / 2) + 0.02``; everywhere else the input is 0.02. Gaussian noise of standard deviation 0.01 is added
    to both channels at every step. The answer is due at the last step.

    Parameters
    ----------
    delay : int
        Steps between the two windows, >= 0 (the paper's step is 1 ms).
    cue : int
        Steps of each cue window, >= 1. At 100 the bump is the released code's: standard deviation 25 steps.
    seed : int
        Of the trials held out.

    Notes
    -----
    Source: Liu, Smith, Mihalas, Shea-Brown and Sümbül, "Biologically-plausible backpropagation through arbitrary
    timespans via local neuromodulators", NeurIPS 2022, with the values of the released code.

    Examples
    --------
    >>> import numpy as np
    >>> trials = DelayedXOR(delay=20, cue=10).sample(np.random.default_rng(0), batch=4)
    >>> trials.inputs.shape, trials.targets.shape
    ((4, 40, 2), (4,))
    """

    delay: int = 700
    cue: int = 100

    n_in: ClassVar[int] = 2
    n_out: ClassVar[int] = 2
    loss: ClassVar[str] = "cross_entropy"
    chance: ClassVar[float] = 0.5

    baseline: ClassVar[float] = 0.02
    height: ClassVar[float] = 2.0
    noise: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        self._integers(delay=0, cue=1)

    @property
    def n_steps(self) -> int:
        """Steps of one trial."""
        return 2 * self.cue + self.delay

    def _draw(self, rng: np.random.Generator, batch: int) -> Trials:
        present = rng.integers(0, 2, size=(batch, 2))
        inputs = self._noise(rng, batch, self.noise)
        inputs += self.baseline
        bump = (self.height * np.exp(-0.5 * np.linspace(-2.0, 2.0, self.cue) ** 2)).astype(np.float32)
        inputs[present[:, 0] == 1, : self.cue, 0] += bump
        inputs[present[:, 1] == 1, self.n_steps - self.cue :, 1] += bump
        return Trials(inputs, (present[:, 0] == present[:, 1]).astype(np.int64))
