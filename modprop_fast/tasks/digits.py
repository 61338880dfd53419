"""Handwritten digits of 8 x 8 pixels, read row by row or pixel by pixel."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import checks
from .base import DataSet

__all__ = ["Digits"]


@dataclass(frozen=True)
class Digits(DataSet):
    """Name the digit in an image of 8 x 8 pixels that comes in pieces, from top left; the answer is due at the last step.

    1797 images, split class by class into 70 % training, 15 % validation and 15 % test. All pixels are standardised
    together, by the training part.

    Parameters
    ----------
    by : {"row", "pixel"}
        8 steps of 8 inputs, or 64 steps of 1 input.
    seed : int
        Of the split.

    Notes
    -----
    Source: ``sklearn.datasets.load_digits``, inside the scikit-learn package: the test set of Alpaydin and Kaynak,
    "Optical recognition of handwritten digits", UCI Machine Learning Repository 1998.
    """

    by: str = "row"

    package: ClassVar[str] = "sklearn.datasets"
    n_out: ClassVar[int] = 10

    def __post_init__(self) -> None:
        checks.choice("by", self.by, ("row", "pixel"))
        super().__post_init__()

    @property
    def n_in(self) -> int:
        """Pixels that come at once."""
        return 8 if self.by == "row" else 1

    @property
    def n_steps(self) -> int:
        """Steps of one image."""
        return 64 // self.n_in

    def _load(self) -> tuple[np.ndarray, np.ndarray, None]:
        images, labels = self._module().load_digits(return_X_y=True)
        return images[:, :, None], labels, None
