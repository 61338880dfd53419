"""What a user gets: the sdist built from the tree, the wheel built from that sdist, each installed where the tree is not."""

import platform
import subprocess
import sys
import tarfile
import zipfile

from wheels import TREE, install, run

EXTENSIONS = {"core", "_kernels_baseline_f32", "_kernels_baseline_f64"}
if platform.machine() in ("x86_64", "AMD64") and sys.platform != "win32":
    EXTENSIONS |= {f"_kernels_v{level}_f{bits}" for level in (3, 4) for bits in (32, 64)}

SMOKE = """
import sys
from pathlib import Path

import numpy as np
import modprop_fast as mf
from modprop_fast import core

assert Path(mf.__file__).is_relative_to(sys.prefix), mf.__file__
assert Path(core.__file__).is_relative_to(sys.prefix), core.__file__

rng = np.random.default_rng(0)
net = mf.Network(1, 40, 1, types={"E": 0.8, "I": 0.2}, activation="tanh", tau=1.0, rng=rng)
learner = mf.Learner(net, mf.ModProp(0.25), optimizer=mf.SGD(0.02))
x = rng.normal(size=(600, 1)).astype("float32")
losses = []
for t in range(1, 600):
    learner.step(x[t], target=x[t - 1])  # recall what came one step before
    losses.append(learner.loss)
first, last = np.mean(losses[:100]), np.mean(losses[-100:])
assert 0 < last < first / 3, (first, last)
"""

TYPED = """
from typing_extensions import assert_type

from modprop_fast import StepDecay, core

assert_type(StepDecay(0.5, 2)(3), float)
assert_type(core.available_isas(), tuple[str, ...])
core.isa().no_such_attribute
"""


def tree(*patterns):
    """Files of the tree as an archive names them."""
    return {path.relative_to(TREE).as_posix() for pattern in patterns for path in TREE.glob(pattern)}


def test_sdist_holds_the_sources_and_nothing_that_was_generated(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = tree("src/*.pyx", "src/*.pxd")
    assert {"src/core.pyx", "src/kernels.pyx", "src/model.pxd"} <= sources
    assert sources | tree("modprop_fast/**/*.py", "modprop_fast/*.pyi", "tests/*.py", "tests/data/*") <= names
    assert {"modprop_fast/py.typed", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert {"bench/plain.c", "bench/bench_step.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc"))]
    assert not [name for name in names if name.startswith("src/") and name.endswith(".c")]


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"modprop_fast"}
    built = {name.split("/")[1].split(".")[0] for name in names if name.endswith((".so", ".pyd"))}
    assert built == EXTENSIONS
    written = tree("modprop_fast/**/*.py")
    assert {"modprop_fast/__init__.py", "modprop_fast/tasks/delayed_xor.py"} <= written
    assert written | {f"modprop_fast/{name}" for name in ("py.typed", "core.pyi", "core.pxd")} <= names
    assert {f"modprop_fast/include/{name}" for name in ("modprop_fast.h", "modprop_fast/core.pxd", "modprop_fast/__init__.pxd")} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".pyx", ".c"))]


def test_wheel_learns_outside_the_tree(wheel_python, tmp_path):
    run(wheel_python, "-I", "-W", "error", "-c", SMOKE, cwd=tmp_path)
    # The command line itself needs neither matplotlib nor tqdm, which are not there.
    assert "instruction set" in run(wheel_python.parent / "modprop-fast", "info", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_sdist_learns_outside_the_tree(place, sdist, wheel, tmp_path):
    python = install(place, "from-sdist", f"modprop_fast @ {sdist.as_uri()}")
    run(python, "-I", "-W", "error", "-c", SMOKE, cwd=tmp_path)


def test_types_agree_with_the_compiled_module(wheel_python, place, tmp_path):
    run(wheel_python, "-m", "pip", "install", "-q", "mypy", cwd=place, cache=place / "cache")
    found = run(wheel_python, "-I", "-m", "mypy.stubtest", "modprop_fast.core", cwd=tmp_path)
    assert "no issues found in 1 module" in found

    (tmp_path / "typed.py").write_text(TYPED)
    checked = subprocess.run(
        [wheel_python, "-I", "-m", "mypy", "--strict", "typed.py"], cwd=tmp_path, capture_output=True, text=True
    )
    # The one error is the one put there: py.typed is found, and the names have their types.
    assert '"str" has no attribute "no_such_attribute"' in checked.stdout, checked.stdout + checked.stderr
    assert "Found 1 error" in checked.stdout, checked.stdout
