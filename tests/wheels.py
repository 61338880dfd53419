"""Fixtures: the sdist built from the tree, the wheel built from that sdist, and an interpreter that has the wheel alone.

One compilation serves both: `pip wheel` leaves the wheel in a private cache, where `pip install` of the same sdist finds it,
as long as it is asked for by name and address (were it not found, it would be compiled again).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[1]


def run(*command, cwd, cache=None):
    """Standard output of a command that must succeed, away from the tree and from what the environment says of Python."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MYPY"))}
    if cache is not None:
        env["PIP_CACHE_DIR"] = str(cache)
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """An empty folder, if pip can fetch at all; `pip` itself is what every index has."""
    folder = tmp_path_factory.mktemp("packaging")
    run(sys.executable, "-m", "pip", "--version", cwd=folder)  # a missing pip is no reason to skip
    options = ["-q", "--no-cache-dir", "--no-deps", "--retries", "1", "--timeout", "20", "-d", str(folder / "probe")]
    command = [sys.executable, "-m", "pip", "download", *options, "pip"]
    probe = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"pip cannot reach a package index: {(probe.stderr.strip() or 'no message').splitlines()[-1]}")
    return folder


@pytest.fixture(scope="session")
def sdist(place):
    """Built from a copy of the tree, in which there is certainly something that must stay out.

    The list of files in an egg-info left by an earlier build would put into the sdist what the metadata forgot.
    """
    copy = place / "tree"
    shutil.copytree(TREE, copy, ignore=shutil.ignore_patterns(".*", "venv", "build", "dist", "runs", "*.egg-info"))
    for litter in ("src/litter.c", "modprop_fast/litter.so", "bench/litter.so", "tests/litter.pyc"):
        (copy / litter).write_text("must not be shipped")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", place / "dist", copy, cwd=place)
    (path,) = (place / "dist").glob("*.tar.gz")
    return path


@pytest.fixture(scope="session")
def wheel(place, sdist):
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", "-q", "--no-deps", "-w", place / "dist", sdist, cwd=place, cache=place / "cache")
    (path,) = (place / "dist").glob("*.whl")
    return path


def install(place, name, *what):
    """The interpreter of a fresh virtual environment that holds `what` and what it requires, no more."""
    run(sys.executable, "-m", "venv", place / name, cwd=place)
    python = place / name / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(python, "-m", "pip", "install", "-q", *what, cwd=place, cache=place / "cache")
    return python


@pytest.fixture(scope="session")
def wheel_python(place, wheel):
    return install(place, "from-wheel", wheel)
