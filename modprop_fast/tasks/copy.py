"""Copy memory: repeat a sequence of symbols after a delay, in its order."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Task, Trials

__all__ = ["Copy"]


@dataclass(frozen=True)
class Copy(Task):
    """Repeat a sequence of symbols, one a step, after a delay.

    A trial is the sequence, one symbol a step on its own channel; the delay, in which all is 0; and as many recall steps as
    there were symbols, with 1 on the last channel. At recall step i the class is symbol i; no other step
    has an error (their targets are 0). Every symbol is as likely as any other, and there is no noise.

    Parameters
    ----------
    symbols : int
        Number of different symbols, >= 2.
    length : int
        Symbols to remember, >= 1.
    delay : int
        Steps between the last symbol and the first recall step, >= 0.
    seed : int
        Of the trials held out. They are drawn as those of `sample` are, which can repeat them where there are few
        sequences: ``symbols ** length``.

    Notes
    -----
    Source: Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 1997, in the form of Arjovsky, Shah and
    Bengio, "Unitary evolution recurrent neural networks", ICML 2016 (8 symbols, length 10), with the recall cue at
    every recall step and no loss on the blanks. The defaults are smaller.

    Examples
    --------
    >>> import numpy as np
    >>> trials = Copy().sample(np.random.default_rng(0), batch=4)
    >>> trials.inputs.shape, trials.targets.shape, trials.mask.sum(axis=1).tolist()
    ((4, 20, 5), (4, 20), [5, 5, 5, 5])
    """

    symbols: int = 4
    length: int = 5
    delay: int = 10

    loss: ClassVar[str] = "cross_entropy"

    def __post_init__(self) -> None:
        self._integers(symbols=2, length=1, delay=0)

    @property
    def n_in(self) -> int:
        """Channels: one per symbol, and the recall cue."""
        return self.symbols + 1

    @property
    def n_out(self) -> int:
        """Classes, one per symbol."""
        return self.symbols

    @property
    def n_steps(self) -> int:
        """Steps of one trial."""
        return 2 * self.length + self.delay

    @property
    def chance(self) -> float:
        """Accuracy of guessing each symbol."""
        return 1 / self.symbols

    def _draw(self, rng: np.random.Generator, batch: int) -> Trials:
        sequence = rng.integers(0, self.symbols, size=(batch, self.length))
        inputs = np.zeros((batch, self.n_steps, self.n_in), np.float32)
        inputs[:, : self.length, : self.symbols] = np.eye(self.symbols)[sequence]
        inputs[:, -self.length :, -1] = 1.0
        targets = np.zeros((batch, self.n_steps), np.int64)
        targets[:, -self.length :] = sequence
        mask = np.zeros((batch, self.n_steps), bool)
        mask[:, -self.length :] = True
        return Trials(inputs, targets, mask)
