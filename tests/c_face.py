"""Consumers of the C face, built against whatever modprop_fast the running interpreter imports, beside the Python face.

    python c_face.py {gcc,g++,cython} FOLDER    builds one there, lets it learn and be refused; prints what agreed
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import modprop_fast as mf
from modprop_fast.tasks import DelayedXOR

HERE = Path(__file__).parent
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
COMPILERS = {"gcc": ["gcc", "-std=c89"], "g++": ["g++", "-std=c++17", "-x", "c++"]}
ITERATIONS, BATCH = 100, 8
N, TASK = 50, DelayedXOR(delay=60, cue=20)
SETTINGS = {"rule": "modprop(mu=0.25)", "lr": 0.01}


class Config(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("version", ctypes.c_long), ("n_in", ctypes.c_ssize_t), ("n_rec", ctypes.c_ssize_t),
        ("n_out", ctypes.c_ssize_t), ("dtype", ctypes.c_char_p), ("activation", ctypes.c_char_p), ("tau", ctypes.c_double),
        ("dt", ctypes.c_double), ("n_types", ctypes.c_ssize_t), ("type_counts", ctypes.c_void_p), ("dale", ctypes.c_void_p),
        ("mask", ctypes.c_void_p), ("autapses", ctypes.c_int), ("bias", ctypes.c_int), ("init", ctypes.c_char_p),
        ("gain", ctypes.c_double), ("seed", ctypes.c_size_t), ("rule", ctypes.c_char_p), ("loss", ctypes.c_char_p),
        ("update", ctypes.c_char_p), ("lr", ctypes.c_double),
    ]  # fmt: skip


def build(compiler, folder):
    """The consumer as a library; the compiler may not even remark upon the header."""
    library = Path(folder) / f"consumer_{compiler}.so"
    flags = [*STRICT, "-shared", "-fPIC", "-I", mf.get_include()]
    subprocess.run([*COMPILERS[compiler], *flags, HERE / "consumer.c", "-o", library], check=True)
    return library


def fetch(library):
    """Let the consumer fetch the capsule with the GIL; what is called afterwards is called without."""
    held = ctypes.PyDLL(str(library))
    held.fetch.restype = ctypes.c_void_p
    assert held.fetch()
    free = ctypes.CDLL(str(library))
    free.sentence.restype = ctypes.c_char_p
    return free


def address(array):
    return ctypes.c_void_p(array.ctypes.data)


def trials():
    drawn = TASK.sample(np.random.default_rng(1), ITERATIONS * BATCH)
    return np.ascontiguousarray(drawn.inputs, np.float32), drawn.targets.astype(np.intc)


def learner(update):
    """What `config` describes."""
    rng = np.random.default_rng(3)
    types = {"0": N - N // 5, "1": N // 5}
    mask = np.random.default_rng(4).random((N, N)) < 0.8
    net = mf.Network(2, N, 2, types=types, dale={"0": 1, "1": -1}, mask=mask, tau=20, bias=True, init="signed", rng=rng)
    rule = mf.parse_rule(SETTINGS["rule"])
    return mf.Learner(net, rule, loss="cross_entropy", optimizer=mf.SGD(SETTINGS["lr"]), update=update, rng=rng)


def python_face(update):
    """Losses and arrays by name, as Learner.step, run and apply make them."""
    one, (xs, labels), losses = learner(update), trials(), []
    last = np.arange(TASK.n_steps) == TASK.n_steps - 1
    for i in range(ITERATIONS):
        loss = 0.0
        for k in range(i * BATCH, (i + 1) * BATCH):
            one.reset()
            if update == "apply":
                one.run(xs[k], np.full(TASK.n_steps, labels[k]), last)
            else:
                for x in xs[k, :-1]:
                    one.step(x)
                one.step(xs[k, -1], int(labels[k]))
            loss += one.loss
        losses.append(loss)
        if update == "apply":
            one.apply()
    return losses, arrays(one)


def arrays(one):
    net, engine = one.network, one._engine
    out, sources = {name: w.copy() for name, w in net.weights.items()}, N + net.n_in + 1
    if one.update == "apply":
        out |= {"grad_rec": engine.arrays["grad"][:, :sources], "grad_w_out": engine.arrays["grad_w_out"]}
        out["grad_b_out"] = engine.arrays["grad_b_out"]
    a = engine.arrays
    now = TASK.n_steps % len(a["eps"])
    return out | {"v": a["v"], "z": a["pre"][:N], "h": a["h"], "y": a["y"], "eps": a["eps"][now, :sources]}


def consumer(library, update):
    """The same by the consumer: (losses, all arrays one after the other as the C face lists them)."""
    xs, labels = trials()
    counts, dale = np.array([N - N // 5, N // 5], np.intp), np.array([1, -1], np.intc)
    mask = (np.random.default_rng(4).random((N, N)) < 0.8).astype(np.uint8)
    config = Config(
        ctypes.sizeof(Config), 1, 2, N, 2, b"float32", b"relu", 20, 1, 2, address(counts), address(dale), address(mask), 0, 1,
        b"signed", 1, 3, SETTINGS["rule"].encode(), b"cross_entropy", update.encode(), SETTINGS["lr"],
    )  # fmt: skip
    out, losses = np.full(10 * N * N, np.nan, np.float32), np.zeros(ITERATIONS)
    code = library.learn(
        ctypes.byref(config), ctypes.c_size_t(ITERATIONS), ctypes.c_size_t(BATCH), ctypes.c_size_t(TASK.n_steps),
        address(xs), address(labels), address(out), address(losses),
    )  # fmt: skip
    assert code == 0, code
    return losses, out


def check_bits(losses, found, expected):
    """Every number of one face is that of the other, and something was learned."""
    want_losses, want = expected
    assert list(losses) == want_losses
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])
    at = 0
    for name, array in want.items():
        got = found[at : at + array.size].reshape(array.shape)
        assert np.array_equal(got, array), name
        at += array.size
    assert np.isfinite(found[:at]).all() and np.any(found[: N * N])


def refused(library):
    line, got = ctypes.c_int(), ctypes.c_int()
    assert not library.refused(ctypes.byref(line), ctypes.byref(got)), f"consumer.c:{line.value} gave {got.value}"


def cython(folder):
    """The consumer by cimport, as a module."""
    shutil.copy(HERE / "consumer.pyx", folder)
    script = (
        "from setuptools import Extension, setup\nfrom Cython.Build import cythonize\nimport modprop_fast\n"
        "ext = Extension('consumer', ['consumer.pyx'], include_dirs=[modprop_fast.get_include()])\n"
        "setup(name='consumer', ext_modules=cythonize([ext], language_level=3))\n"
    )
    subprocess.run([sys.executable, "-c", script, "-q", "build_ext", "--inplace"], cwd=folder, check=True)
    sys.path.insert(0, str(folder))
    import consumer

    return consumer


def main(kind, folder):
    if kind == "cython":
        module = cython(folder)
    else:
        library = fetch(build(kind, folder))
        refused(library)
    for update in ("step", "apply"):
        if kind == "cython":
            found = module.learn(learner(update), *trials(), ITERATIONS, BATCH, update == "step")
        else:
            found = consumer(library, update)
        check_bits(*found, python_face(update))
    print(f"{kind}: the same bits, built on {Path(mf.__file__).parent}")


if __name__ == "__main__":
    main(*sys.argv[1:])
