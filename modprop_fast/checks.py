"""Bad input in one sentence: the argument, what was expected, what came."""

from __future__ import annotations

import math
import operator

import numpy as np


def describe(value) -> str:
    """What came, short enough for one sentence."""
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim:
        return f"{value.dtype} array of shape {value.shape}"
    return f"{value!r:.60}"


def integer(name, value, *, least) -> int:
    """``value`` as an int that is at least ``least``, and that C holds."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {describe(value)}") from None
    if not least <= number < 1 << 63:
        raise ValueError(f"{name}: expected an integer >= {least}{' of 64 bits' if number > least else ''}, got {number}")
    return number


def number(name, value, *, low=-math.inf, high=math.inf, above=False) -> float:
    """``value`` as a finite float in [low, high], or in (low, high] with ``above``."""
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        x = float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name}: expected a number, got {describe(value)}") from None
    if not math.isfinite(x) or x > high or x < low or (above and x == low):
        bounds = f"{'(' if above else '['}{low:g}, {high:g}{']' if math.isfinite(high) else ')'}"
        raise ValueError(f"{name}: expected a finite number in {bounds}, got {x:g}")
    return x


def choice(name, value, options):
    """``value`` if it is one of ``options``."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {describe(value)}")
    return value


def array(name, value, shape, dtype):
    """``value`` as a finite C-contiguous array of ``dtype``; None in ``shape`` stands for any length >= 1.

    Integers and floats of any width are converted; other kinds are refused.  Anything will do that NumPy can read: by the
    buffer protocol, by DLPack (arrays of PyTorch or JAX in the memory of the processor), or as a sequence.
    """
    given = read(name, value)
    if given.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected an array of {np.dtype(dtype)}, got {given.dtype} of shape {given.shape}")
    fits = given.ndim == len(shape) and all(n == want if want is not None else n >= 1 for n, want in zip(given.shape, shape))
    if not fits:
        wanted = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape ({wanted}{',' * (len(shape) == 1)}), got {given.shape}")
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(given, dtype)
    if out.size and not (math.isfinite(out.min()) and math.isfinite(out.max())):  # of a long trial without an array as long
        at = tuple(map(int, np.argwhere(~np.isfinite(out))[0]))
        raise ValueError(f"{name}: expected finite values in {np.dtype(dtype)}, got {given[at]} at index {at}")
    return out


def read(name, value) -> np.ndarray:
    """``value`` as NumPy sees it, of whatever shape and dtype."""
    try:
        if hasattr(value, "__dlpack__") and not isinstance(value, (np.ndarray, np.generic)):
            try:
                return np.from_dlpack(value)
            except (BufferError, RuntimeError, TypeError):
                pass  # on another device, or part of a graph: it may have its own way, or its own sentence
        return np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: expected an array, got a ragged sequence") from None
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name}: expected an array that NumPy can read, got {type(value).__name__} ({error})") from None


def generator(name, value) -> np.random.Generator:
    """``value`` if it is a Generator: every random number comes from one that was passed."""
    if not isinstance(value, np.random.Generator):
        raise TypeError(f"{name}: expected a numpy.random.Generator (numpy.random.default_rng(seed)), got {describe(value)}")
    return value
