"""The C face beside the Python face: the same bits from C, C++ and Cython, and every misuse a code and a sentence."""

import ctypes
import re
import subprocess
import threading
from pathlib import Path

import c_face
import numpy as np
import pytest
from wheels import TREE, run

import modprop_fast as mf
from modprop_fast import core

GOLDEN = TREE / "tests" / "abi.txt"
BUSY, DESTROYED, KIND, DIVERGED = 3, 2, 8, 9


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return c_face.fetch(c_face.build("gcc", tmp_path_factory.mktemp("consumer")))


@pytest.mark.parametrize("compiler", ["gcc", "g++"])
def test_a_host_in_c_learns_to_the_same_bits(compiler, tmp_path):
    c_face.main(compiler, tmp_path)


@pytest.mark.parametrize("kind", ["gcc", "g++", "cython"])
def test_hosts_build_against_the_installed_wheel(kind, wheel_python, place, tmp_path):
    if kind == "cython":
        run(wheel_python, "-m", "pip", "install", "-q", "Cython>=3.1", "setuptools", cwd=place, cache=place / "cache")
    said = run(wheel_python, TREE / "tests" / "c_face.py", kind, tmp_path, cwd=tmp_path)
    assert f"{kind}: the same bits, built on {wheel_python.parents[1]}" in said


def small(update="step", n_rec=20, optimizer=mf.SGD(0.02), rule=mf.ModProp(0.25)):
    net = mf.Network(2, n_rec, 3, types={"E": 0.8, "I": 0.2}, activation="tanh", tau=2.0, rng=np.random.default_rng(5))
    return mf.Learner(net, rule, update=update, optimizer=optimizer)


def handle_of(library, learner):
    handle = ctypes.c_void_p()
    assert library.adopt(ctypes.c_void_p(id(learner)), ctypes.byref(handle)) == 0, library.sentence()
    return handle


def steps(library, handle, xs, targets):
    ys = np.empty_like(targets)
    code = library.steps(handle, ctypes.c_size_t(len(xs)), *map(c_face.address, (xs, targets, ys)))
    return code, ys


def stream(n_steps):
    rng = np.random.default_rng(6)
    return rng.normal(size=(n_steps, 2)).astype("float32"), rng.normal(size=(n_steps, 3)).astype("float32")


@pytest.mark.parametrize("update", ["step", "apply"])
def test_a_learner_goes_from_python_to_c_and_back(update, library):
    xs, targets = stream(90)
    alone, lent = small(update), small(update)
    parts = slice(0, 30), slice(30, 60), slice(60, 90)
    expected = []
    for part in parts:
        expected.append(alone.run(xs[part], targets[part]))
        if update == "apply":
            alone.apply()
    found = [lent.run(xs[parts[0]], targets[parts[0]])]
    if update == "apply":
        lent.apply()
    handle = handle_of(library, lent)
    code, ys = steps(library, handle, xs[parts[1]], targets[parts[1]])
    assert code == 0
    assert library.update(handle) == (0 if update == "apply" else KIND)
    assert library.destroy(handle) == 0
    found += [ys, lent.run(xs[parts[2]], targets[parts[2]])]
    if update == "apply":
        lent.apply()
    assert np.array_equal(found, expected) and np.ptp(found) > 0
    assert lent.iteration == alone.iteration == (3 if update == "apply" else 0)
    for name, w in alone.network.weights.items():
        assert np.array_equal(lent.network.weights[name], w), name


def test_what_is_written_into_the_weights_counts_at_the_next_step_in_c(library):
    xs, targets = stream(40)
    one, other = small(), small()
    handle = handle_of(library, other)
    held, w = one.network.w_rec, other.network.w_rec  # and written into, by Python between two calls from C
    for part in (slice(0, 20), slice(20, 40)):
        expected = one.run(xs[part], targets[part])
        code, ys = steps(library, handle, xs[part], targets[part])
        assert code == 0 and np.array_equal(ys, expected)
        held[3, 4] += 1
        w[3, 4] += 1
    library.destroy(handle)


def test_an_optimizer_or_a_rule_of_python_is_refused_where_it_is_needed(library):
    learner, trials = small("apply", optimizer=mf.Adam()), tuple(part[None] for part in stream(5))
    handle = handle_of(library, learner)
    assert library.update(handle) == KIND and b"Learner" in library.sentence()
    learner.fit_trials(*trials)
    library.destroy(handle)
    assert learner.iteration == 1  # it counts for the moments of the next update
    for what in (object(), small("apply", rule=mf.BPTT()), small("apply", rule=mf.RTRL())):
        empty = ctypes.c_void_p()
        assert library.adopt(ctypes.c_void_p(id(what)), ctypes.byref(empty)) == 6 and not empty.value
        assert library.sentence().startswith((b"adopt: object: expected a Learner, got", b"adopt: rule: BPTT needs", b"adopt: rule: expected one that the kernels have, got RTRL"))


def test_an_update_in_c_that_would_not_be_finite_changes_no_weight(library):
    learner, (xs, targets) = small("apply", optimizer=mf.SGD(3e38)), stream(20)
    before = {name: w.copy() for name, w in learner.network.weights.items()}
    handle = handle_of(library, learner)
    assert steps(library, handle, xs, 1000 * targets)[0] == 0
    assert library.update(handle) == DIVERGED and b"expected finite weights" in library.sentence()
    library.destroy(handle)
    assert learner.iteration == 0
    for name, w in learner.network.weights.items():
        assert np.array_equal(before[name], w), name


def test_a_second_thread_is_told_so(library):
    xs, targets = stream(20000)
    learner = small(n_rec=300)
    handle = handle_of(library, learner)
    codes = []

    def long():
        while not codes or codes[-1] == BUSY:  # the other thread may come first
            codes.append(steps(library, handle, xs, targets)[0])

    thread = threading.Thread(target=long)
    thread.start()
    seen = 0
    while thread.is_alive() and seen != BUSY:
        seen = steps(library, handle, xs[:1], targets[:1])[0]
    assert seen == BUSY and b"in use by another thread" in library.sentence()
    assert library.destroy(handle) == BUSY
    with pytest.raises(RuntimeError, match="already running in another thread"):
        learner.step(xs[0])
    thread.join()
    assert codes[-1] == 0
    learner.step(xs[0])
    assert library.destroy(handle) == 0
    assert steps(library, handle, xs[:1], targets[:1])[0] == DESTROYED


def test_learners_of_two_threads_do_not_disturb_each_other(library):
    found = {}

    def one(update):
        found[update] = c_face.consumer(library, update)

    threads = [threading.Thread(target=one, args=(update,)) for update in ("step", "apply")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for update in ("step", "apply"):
        c_face.check_bits(*found[update], c_face.python_face(update))


def layout(folder):
    """Lines of the golden file as this build has them: codes, members with their offsets, signatures of the capsules."""
    header = Path(mf.get_include(), "modprop_fast.h").read_text()
    text = " ".join(re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL).split())
    out = {"codes": re.findall(r"^#define (MPF_\w+ [\w\".]+)", header, flags=re.MULTILINE)}
    for struct in ("mpf_config", "mpf_api"):
        body = re.search(rf"typedef struct {struct} {{(.*?)}} {struct};", text)[1]
        members = [member.strip() for member in body.split(";") if member.strip()]
        names = [re.search(r"\(\*(mpf_\w+)\)|(mpf_\w+)$", member) for member in members]
        names = [name[1] or name[2] for name in names]
        source = '#include <stdio.h>\n#include "modprop_fast.h"\nint main(void) { static const size_t at[] = {'
        source += ", ".join(f"offsetof({struct}, {name})" for name in names)
        source += "}; size_t i; for (i = 0; i < sizeof at / sizeof *at; i++) printf(\"%zu\\n\", at[i]); return 0; }"
        (folder / "at.c").write_text(source)
        subprocess.run(["gcc", "-I", mf.get_include(), folder / "at.c", "-o", folder / "at"], check=True)
        offsets = subprocess.run([folder / "at"], check=True, capture_output=True, text=True).stdout.split()
        out[struct] = [f"{at} {member}" for at, member in zip(offsets, members, strict=True)]
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    out["core"] = sorted(f"{name}: {get_name(capsule).decode()}" for name, capsule in core.__pyx_capi__.items())
    return out


@pytest.mark.skipif(ctypes.sizeof(ctypes.c_long) != 8, reason="the golden file has the offsets of LP64")
def test_the_binary_interface_only_grows(tmp_path):
    now, golden, kind = layout(tmp_path), {}, None
    for line in GOLDEN.read_text().splitlines():
        if line.startswith("["):
            golden[kind := line.strip("[]")] = []
        elif line and not line.startswith("#"):
            golden[kind].append(line)
    assert golden.keys() == now.keys() and all(golden.values())
    for kind, lines in golden.items():
        if kind.startswith("mpf_"):  # the order counts, and what is new comes last
            assert now[kind][: len(lines)] == lines
        else:
            assert set(lines) <= set(now[kind]), set(lines) - set(now[kind])
