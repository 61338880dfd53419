"""What all tasks share: the face of a task, and the one way in which a data set becomes trials."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.random import Generator

from .. import checks

__all__ = ["DataSet", "Task", "Trials"]

HELD_OUT = 256  # trials of a validation or test set that is generated, unless told


class Trials(NamedTuple):
    """B trials of T steps, in the order that the Learner takes them: ``learner.fit_trials(*trials)``."""

    inputs: np.ndarray  # (B, T, n_in) float32
    targets: np.ndarray  # (B, T, n_out) float32: mse; int64 (B, T), or (B,) for one class per trial: cross_entropy
    mask: np.ndarray | None = None  # (B, T) bool, the steps that count; None: the last where targets are (B,), else all


@dataclass(frozen=True)
class Task(ABC):
    """A task: a frozen dataclass of its parameters that draws trials.

    The trials of `sample` are for training. Those of `validation` and `test` stand still: they depend on the task's
    parameters alone, never on the generator that is passed to `sample`.

    Parameters
    ----------
    seed : int
        Of all that stands still: what is held out, and whatever else is drawn once. By keyword only.

    Raises
    ------
    TypeError, ValueError
        If a parameter of any task is of another type, or not in its range.

    Attributes
    ----------
    n_in, n_out, n_steps : int
        Inputs, outputs and steps of a trial.
    loss : {"mse", "cross_entropy"}
        What a Learner scores the task by.
    chance : float
        The score of who does not look at the inputs: for cross_entropy the accuracy of guessing a class, for mse the
        loss of the best constant.
    n_train : int or None
        Trials of the training part; None where every sample is drawn afresh.
    """

    seed: int = field(default=0, kw_only=True)

    n_train: ClassVar[int | None] = None

    n_in: ClassVar[Any]
    n_out: ClassVar[Any]
    n_steps: ClassVar[Any]
    loss: ClassVar[str]
    chance: ClassVar[Any]

    def sample(self, rng: Generator, batch: int) -> Trials:
        """Draw trials to train on.

        Parameters
        ----------
        rng : numpy.random.Generator
            Where everything random in them comes from.
        batch : int
            Number of trials B, >= 1; of a data set, at most `n_train`: they are drawn without replacement.

        Returns
        -------
        Trials
            inputs (B, n_steps, n_in), targets and mask.
        """
        return self._draw(checks.generator("rng", rng), checks.integer("batch", batch, least=1))

    def validation(self, n: int | None = None) -> Trials:
        """Fixed trials to choose by, none of which `sample` draws from: n of them.

        By default the whole validation part of a data set, else 256; of a data set, n takes the first n.
        """
        return self._part("validation", n)

    def test(self, n: int | None = None) -> Trials:
        """Fixed trials to report on, once. As `validation`, but other trials."""
        return self._part("test", n)

    @abstractmethod
    def _draw(self, rng: Generator, batch: int) -> Trials: ...

    def _part(self, part: str, n: int | None) -> Trials:
        return self._draw(self._generator(part), HELD_OUT if n is None else checks.integer("n", n, least=1))

    def _generator(self, use: str) -> Generator:
        """The generator for one use of the seed: a stream that no other use and no plain or spawned seed shares."""
        return np.random.default_rng([self.seed, *use.encode()])

    def _noise(self, rng: Generator, batch: int, deviation: float) -> np.ndarray:
        """(batch, n_steps, n_in) float32 Gaussian noise, on which cues are laid."""
        noise = rng.standard_normal((batch, self.n_steps, self.n_in), dtype=np.float32)
        noise *= deviation
        return noise

    def _integers(self, **least: int) -> None:
        """Make integers of the seed and of the named fields; refuse those below their least value."""
        for name, value in {**least, "seed": 0}.items():
            object.__setattr__(self, name, checks.integer(name, getattr(self, name), least=value))


class DataSet(Task):
    """A task whose trials are those of a data set, from an optional package.

    Training, validation and test part are split once, by the task's `seed`, class by class, so that each has its share
    of every class; an official test part stays the test part. Inputs are standardised with the mean and the standard
    deviation of each channel over the training part.

    Raises
    ------
    ModuleNotFoundError
        When the task is made, if its package, of the extra ``modprop_fast[tasks]``, is not installed.
    """

    package: ClassVar[str]  # the module to import
    loss: ClassVar[str] = "cross_entropy"

    def __post_init__(self) -> None:
        self._integers()
        self._module()

    @property
    def chance(self) -> float:
        """Accuracy of guessing each class as often as any other."""
        return 1 / self.n_out

    @property
    def n_train(self) -> int:  # type: ignore[override]
        """Trials of the training part."""
        return len(self._parts["train"].inputs)

    @abstractmethod
    def _load(self) -> tuple[np.ndarray, np.ndarray, int | None]:
        """Read inputs (n, T, channels), nan after the end of a trial; classes (n,); where an official test part begins."""

    def _module(self) -> ModuleType:
        return optional(self.package, type(self).__name__)

    @cached_property
    def _parts(self) -> dict[str, Trials]:
        inputs, labels, official = self._load()
        shares = (0.7, 0.15, 0.15) if official is None else (0.8, 0.2)
        indices = _split(labels[:official], shares, self._generator("split"))
        if official is not None:
            indices.append(np.arange(official, len(labels)))
        train = inputs[indices[0]]
        inputs = (inputs - np.nanmean(train, axis=(0, 1))) / np.nanstd(train, axis=(0, 1))

        mask, there = None, ~np.isnan(inputs).any(axis=2)
        if not there.all():
            mask = np.arange(there.shape[1]) == there.sum(axis=1, keepdims=True) - 1
            mask.flags.writeable = False
        inputs = np.nan_to_num(inputs).astype(np.float32).reshape(len(inputs), self.n_steps, self.n_in)
        whole = Trials(inputs, labels.astype(np.int64), mask)
        parts = {name: _take(whole, index) for name, index in zip(("train", "validation", "test"), indices, strict=True)}
        for array in (array for part in parts.values() for array in part if array is not None):
            array.flags.writeable = False  # slices of them are handed out
        return parts

    def _draw(self, rng: Generator, batch: int) -> Trials:
        if batch > self.n_train:
            raise ValueError(f"batch: expected at most the {self.n_train} trials of the training part, got {batch}")
        return _take(self._parts["train"], rng.choice(self.n_train, batch, replace=False))

    def _part(self, part: str, n: int | None) -> Trials:
        trials = self._parts[part]
        if n is not None and checks.integer("n", n, least=1) > len(trials.inputs):
            raise ValueError(f"n: expected at most the {len(trials.inputs)} trials of the {part} part, got {n}")
        return _take(trials, slice(n))


def optional(module: str, user: str) -> ModuleType:
    """Import a module of the extra ``modprop_fast[tasks]``, or say in one sentence who needs what."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0].replace("sklearn", "scikit-learn")
        raise ModuleNotFoundError(f"{user} needs {package}: pip install 'modprop_fast[tasks]' ({error})") from error


def _take(trials: Trials, index: Any) -> Trials:
    return Trials._make(None if array is None else array[index] for array in trials)


def _split(labels: np.ndarray, shares: Sequence[float], rng: Generator) -> list[np.ndarray]:
    """Indices of disjoint parts in random order, each with its share of every class."""
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(own)).astype(int)
        for part, indices in zip(parts, np.split(own, cuts), strict=True):
            part.append(indices)
    return [rng.permutation(np.concatenate(part)) for part in parts]
