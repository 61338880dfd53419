"""Files that are whole at all times: written aside, flushed to disk, renamed."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

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


def write_csv(path: Path, names: list[str], rows: list[dict[str, Any]]) -> None:
    """Write rows, dicts by column, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


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
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"expected a whole .npz file, got one cut short or damaged ({error})") from None
