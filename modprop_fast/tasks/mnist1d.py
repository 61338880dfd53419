"""MNIST-1D: ten one-dimensional shapes, moved, scaled, sheared and in noise."""

import random
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import ClassVar

import numpy as np

from .base import DataSet

__all__ = ["MNIST1D"]


@dataclass(frozen=True)
class MNIST1D(DataSet):
    """Name the shape in a signal of 40 steps on one channel; the answer is due at the last step.

    The data set is the published one: what the generator of the package makes with its default arguments and its own
    seed (nothing is downloaded). Its 1000 test signals are the test part; of the other 4000, 80 % class by class are for
    training and 20 % for validation.

    Parameters
    ----------
    seed : int
        Of the split into training and validation; it does not change the data set.

    Notes
    -----
    Source: Greydanus and Kobak, "Scaling down deep learning with MNIST-1D", ICML 2024; package mnist1d.
    """

    package: ClassVar[str] = "mnist1d.data"
    n_in: ClassVar[int] = 1
    n_out: ClassVar[int] = 10
    n_steps: ClassVar[int] = 40

    def _load(self) -> tuple[np.ndarray, np.ndarray, int]:
        return _generate(self._module())


@cache  # it takes a second
def _generate(module: ModuleType) -> tuple[np.ndarray, np.ndarray, int]:
    """All signals (5000, 40, 1) and classes (5000,), and where the test part begins."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  the package seeds both, for everyone
    try:
        data = module.make_dataset()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    inputs, labels = (np.concatenate([data[name], data[f"{name}_test"]]) for name in "xy")
    return inputs[:, :, None], labels, len(data["x"])
