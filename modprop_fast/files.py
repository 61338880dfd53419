"""Files that are whole at all times: written aside, flushed to disk, renamed."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np


def write_whole(path: str | os.PathLike[str], fill: Callable[[BinaryIO], object]) -> None:
    """Write ``path`` through a temporary file beside it; a failure leaves what was there."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_npz(file: str | os.PathLike[str] | BinaryIO, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to a path, whole or not at all, or to a binary file object."""
    if isinstance(file, (str, os.PathLike)):
        write_whole(file, lambda f: np.savez(f, **arrays))
    else:
        np.savez(file, **arrays)


def read_npz(file: str | os.PathLike[str] | BinaryIO) -> dict[str, np.ndarray]:
    """All arrays of a path or a binary file object; ValueError if it is not a whole ``.npz`` file."""
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return read_npz(opened)
    try:
        with np.load(file, allow_pickle=False) as data:
            return dict(data)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"expected a whole .npz file, got one cut short or damaged ({error})") from None
