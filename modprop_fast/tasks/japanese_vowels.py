"""JapaneseVowels: who of nine speakers said it? Utterances of 7 to 29 steps."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import DataSet

__all__ = ["JapaneseVowels"]


@dataclass(frozen=True)
class JapaneseVowels(DataSet):
    """Name the speaker of an utterance, which has 12 channels and a length of its own, from 7 to 29 steps.

    The answer is due at the last step of each utterance: that step alone is True in its row of the mask. The steps
    after it are 0. Nothing that comes after the last error can change a causal network's output or gradient there, so
    each utterance is learned as if it were not padded; zeros before it would move a network that has biases.

    The official 370 test utterances are the test part (24 to 88 of each speaker); of the official 270 training utterances,
    30 of each speaker, 24 of each are for training and 6 for validation. Each channel is standardised by the training
    part, over the true steps.

    Parameters
    ----------
    seed : int
        Of the split into training and validation.

    Notes
    -----
    Source: Kudo, Toyama and Shimbo, "Multidimensional curve classification using passing-through regions", Pattern
    Recognition Letters 20, 1999: twelve coefficients of linear prediction per step; the files are inside the package aeon.
    """

    package: ClassVar[str] = "aeon.datasets"
    n_in: ClassVar[int] = 12
    n_out: ClassVar[int] = 9
    n_steps: ClassVar[int] = 29

    def _load(self) -> tuple[np.ndarray, np.ndarray, int]:
        load = self._module().load_japanese_vowels
        (train, speakers), (test, others) = load(split="TRAIN"), load(split="TEST")
        inputs = np.full((len(train) + len(test), self.n_steps, self.n_in), np.nan)
        for padded, utterance in zip(inputs, [*train, *test], strict=True):
            padded[: utterance.shape[1]] = utterance.T
        return inputs, np.concatenate([speakers, others]).astype(np.int64) - 1, len(train)
