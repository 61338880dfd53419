"""Benchmark tasks, by the name the command line knows them by.

A task is a frozen dataclass that holds its parameters and says ``n_in``, ``n_out``, ``n_steps`` (sizes), ``loss`` (the
loss it is scored by) and ``chance`` (the score of guessing). ``sample(rng, batch)`` draws `Trials` to train on;
``validation(n)`` and ``test(n)`` give trials that stand still: see `Task`. ``linear_baseline(task, rng)`` says how far a
linear readout gets. The data sets are in the packages of the extra ``modprop_fast[tasks]``, imported when a task is made.
"""

from .base import Task, Trials
from .baseline import linear_baseline
from .copy import Copy
from .cue_accumulation import CueAccumulation
from .delayed_xor import DelayedXOR
from .digits import Digits
from .japanese_vowels import JapaneseVowels
from .match_to_sample import MatchToSample
from .mnist1d import MNIST1D
from .pattern import Pattern

__all__ = [
    "MNIST1D",
    "TASKS",
    "Copy",
    "CueAccumulation",
    "DelayedXOR",
    "Digits",
    "JapaneseVowels",
    "MatchToSample",
    "Pattern",
    "Task",
    "Trials",
    "linear_baseline",
]

TASKS: dict[str, type[Task]] = {
    "delayed-xor": DelayedXOR,
    "pattern": Pattern,
    "cue-accumulation": CueAccumulation,
    "match-to-sample": MatchToSample,
    "copy": Copy,
    "digits": Digits,
    "mnist1d": MNIST1D,
    "japanese-vowels": JapaneseVowels,
}
