"""What a learned step costs from C, from Cython and from Python, over the same steps by the engine's own loop.

    python bench/bench_faces.py [--sizes 16 64] [--short]

Every face steps its own copy of one learner (ModProp exact, float32, batch 1, every weight updated) through the same stream, in
turn, and must leave the same weights. Columns: microseconds a step, median over rounds; its ratio to, and difference from, the
loop (`Learner.run`), medians over rounds. C needs gcc; Cython needs Cython and an installation that it can cimport from, which
one in a clone (pip install -e) is not.
"""

import copy
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import common

N_IN = N_OUT = 2
HERE = Path(__file__).parent
SETUP = """
from setuptools import Extension, setup
from Cython.Build import cythonize
import modprop_fast
setup(name="faces", ext_modules=cythonize([Extension("faces", ["faces.pyx"], include_dirs=[modprop_fast.get_include()],
      extra_compile_args=["-O3"])]))
"""


def c_face(mf, folder):
    """adopt and loop, through the capsule."""
    library = common.compile_c("C", HERE / "faces.c", folder, "-I" + mf.get_include())
    if library is None:
        return None
    find = ctypes.pythonapi.PyCapsule_GetPointer
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    api = find(mf.core._c_api, b"modprop_fast.core._c_api")
    members = ctypes.cast(api, ctypes.POINTER(ctypes.c_void_p))
    adopt_function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))(members[5])

    def adopt(learner):
        handle = ctypes.c_void_p()
        if adopt_function(id(learner), ctypes.byref(handle)):
            raise ValueError("adopt")
        return handle.value

    library.loop.argtypes = [ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_size_t] * 5
    return adopt, lambda *arguments: library.loop(api, *arguments)


def cython_face(folder):
    folder = folder / "cython"
    folder.mkdir()
    (folder / "faces.pyx").write_text((HERE / "faces.pyx").read_text())
    command = [sys.executable, "-c", SETUP, "-q", "build_ext", "--inplace"]
    build = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if build.returncode:
        why = [line for line in build.stderr.splitlines() if ".pxd' not found" in line] or build.stderr.split("\n")[-2:-1]
        return common.skip("Cython", f"its build fails ({why[0]:.100})")
    spec = importlib.util.spec_from_file_location("faces", next(folder.glob("faces*.so")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adopt, module.loop


def main():
    arguments = common.options(
        __doc__, dict(sizes=[16, 64, 128], rounds=20),
        sizes=([16, 32, 64, 128, 256], "recurrent units", common.SIZES),
        rounds=(60, "in each of which every face has its turn", common.ROUNDS),
        steps=(2000, "of each face in each round", (1, 10**6)),
    )  # fmt: skip
    common.start(arguments)
    import competitors
    import numpy as np

    import modprop_fast as mf

    def stepped(name, loop, handle):
        if code := loop(handle, len(xs), xs.ctypes.data, N_IN, targets.ctypes.data, N_OUT):
            sys.exit(f"{name}: mpf_step returns {code}")

    with tempfile.TemporaryDirectory() as folder:
        faces = {"C": c_face(mf, Path(folder)), "Cython": cython_face(Path(folder))}
    xs, targets = (np.random.default_rng(0).normal(size=(arguments.steps, n)).astype("float32") for n in (N_IN, N_OUT))
    printed = common.Table(**{"N": "5d", "face": "<8", "us/step": "9.3f", "/loop": "7.3f", "-loop": "8.3f"})
    rows = []
    for n in arguments.sizes:
        first = mf.Learner(competitors.network(mf, n), mf.ModProp(0.25), optimizer=mf.SGD(1e-3), threads=1)
        learners = {name: copy.deepcopy(first) for name in ("loop", "Python", *faces)}
        entries = {"loop": lambda one=learners["loop"]: one.run(xs, targets)}
        entries["Python"] = lambda step=learners["Python"].step: [step(x, t) for x, t in zip(xs, targets, strict=True)]
        for name, face in faces.items():
            if face:
                entries[name] = partial(stepped, name, face[1], face[0](learners[name]))
        timed = {name: lambda call=call: [common.clock(call) / len(xs)] for name, call in entries.items()}
        times = common.interleave(timed, arguments.rounds)
        for name, rounds in times.items():
            if not np.array_equal(learners[name].network.w_rec, learners["loop"].network.w_rec):
                sys.exit(f"{name}: the weights are not those of the loop")
            extra = float(np.median([a[0] - b[0] for a, b in zip(rounds, times["loop"], strict=True)])) / 1e3
            figures = common.summary(rounds)
            row = {"n_rec": n, "face": name, "us": figures["median_us"], "extra_us": extra}
            row["quartiles_us"] = figures["round_quartiles_us"]
            row["over_loop"] = common.ratio(times, name, "loop")
            rows.append(row)
            printed.row(n, name, row["us"], row["over_loop"], extra)
    common.finish(arguments, rows)


if __name__ == "__main__":
    common.run(main)
