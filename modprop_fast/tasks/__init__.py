"""Benchmark tasks, by the name the command line knows them by.

A task is a frozen dataclass that holds its parameters and says ``n_in``, ``n_out``, ``n_steps`` (sizes), ``loss`` (the
loss it is scored by) and ``chance`` (the accuracy of guessing); ``sample(rng, batch)`` draws fresh trials.
"""

from .delayed_xor import DelayedXOR

__all__ = ["TASKS", "DelayedXOR"]

TASKS = {"delayed-xor": DelayedXOR}
