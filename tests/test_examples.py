"""The recipes in examples/, each in a virtual environment of its own, and what they learned.

They download packages and take minutes, so they run on request: MODPROP_FAST_EXAMPLES=1 pytest tests/test_examples.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUN = EXAMPLES / "run.py"
SKIPPED = 77

# How many times smaller the error is at the end, at least: about half of what was seen, for other machines and versions.
LEARNS = {
    "brian2_cython": 3,
    "brian2_network_operation": 3,
    "c_host": 100,
    "cpp_host": 100,
    "gymnasium_control": 100,
    "jax_ffi": 50,
    "nengo_learning_rule": 2,
    "nengo_node": 20,
    "neuron_callback": 4,
    "pytorch_function": 10,
    "river_stream": 1.8,
    "sklearn_partial_fit": 2.5,
}
# Below what needs no memory: the error of the best constant, or of the host's own model without one.
NEEDS_MEMORY = {
    "brian2_cython": "costs", "brian2_network_operation": "costs", "c_host": "costs", "cpp_host": "costs", "jax_ffi": "costs",
    "nengo_learning_rule": "ends at", "nengo_node": "costs", "neuron_callback": "costs", "river_stream": "LinearRegression:",
    "sklearn_partial_fit": "memory:",
}  # fmt: skip
NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"


def test_every_recipe_is_here_with_its_readme_and_a_test():
    done = subprocess.run([sys.executable, RUN, "--list"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(LEARNS)
    for name in LEARNS:
        assert {"README.md", "requirements.txt", "main.py"} <= {path.name for path in (EXAMPLES / name).iterdir()}, name
        assert f"examples/run.py {name}\n" in (EXAMPLES / name / "README.md").read_text(), name


@pytest.fixture(scope="session")
def envs(tmp_path_factory):
    """Kept from session to session where a folder is named; the wheel is built once in any case."""
    return os.environ.get("MODPROP_FAST_EXAMPLES_ENVS") or tmp_path_factory.mktemp("envs")


@pytest.mark.skipif(
    os.environ.get("MODPROP_FAST_EXAMPLES") != "1", reason="recipes download packages: set MODPROP_FAST_EXAMPLES=1 to run them"
)
@pytest.mark.parametrize("name", sorted(LEARNS))
def test_recipe_learns(name, envs):
    command = [sys.executable, RUN, name, "--envs", str(envs)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=3000)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    first, last = map(float, re.search(rf"^error.*: before {NUMBER}, after {NUMBER}$", done.stdout, re.M).groups())
    assert 0 < last < first / LEARNS[name], done.stdout
    if name in NEEDS_MEMORY:
        without = float(re.search(rf"{NEEDS_MEMORY[name]} {NUMBER}", done.stdout)[1])
        assert last < 0.9 * without, done.stdout

    times = re.search(rf"^host step: {NUMBER} us, with the engine: {NUMBER} us$", done.stdout, re.M)
    assert float(times[2]) > 0, done.stdout
