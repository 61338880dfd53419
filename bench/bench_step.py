"""Latency of one learned step (float32, two cell types, SGD at every step) beside a plain C loop.

    python bench/bench_step.py [--sizes 64 128 256] [--rounds 40]

Prints, for every size and rule, the median microseconds of `Learner.step` called from Python, of one step
of `Learner.run`, and of the plain C loop of plain.c (gcc -O3 -march=native), measured in turn in one process;
the ratio is the median over rounds of run / plain.  Fails if the two do not compute the same weights.
"""

import argparse
import ctypes
import json
import platform
import subprocess
import tempfile
from pathlib import Path
from time import perf_counter_ns

import numpy as np

import modprop_fast as mf
from modprop_fast import core

N_IN = N_OUT = 2
RULES = {"e-prop": (mf.EProp(), 0), "exact": (mf.ModProp(0.25), 1), "mean": (mf.ModProp(0.25, factor="mean"), 2)}
FIELDS = "w w_in w_out b_out v z h h_before eps eps_before trace local row rows sums K means".split()


class Plain(ctypes.Structure):
    """The struct of plain.c."""

    _fields_ = (
        [(name, ctypes.c_long) for name in ("n", "n_in", "n_out", "factor")]
        + [(name, ctypes.c_float) for name in ("leak", "lr", "mu")]
        + [(name, ctypes.c_void_p) for name in ("type", *FIELDS)]
    )


def compile_plain(folder):
    library = Path(folder) / "plain.so"
    source = Path(__file__).with_name("plain.c")
    subprocess.run(["gcc", "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


class PlainLoop:
    """plain.c on a copy of a network's weights."""

    def __init__(self, library, net, lr, factor):
        n, m = net.n_rec, net.n_rec + net.n_in
        shapes = dict(v=n, z=n, h=n, h_before=n, eps=m, eps_before=m, local=n, row=m, rows=2 * m, sums=2 * n, K=4, means=4)
        shapes["trace"] = {0: 1, 1: n * 2 * m, 2: 4 * m}[factor]
        self.arrays = {name: np.zeros(size, np.float32) for name, size in shapes.items()}
        self.arrays |= {"w": net.w_rec.copy(), "w_in": net.w_in.copy(), "w_out": net.w_out.copy(), "b_out": net.b_out.copy()}
        self.types = net.types.astype(np.intc)
        pointers = [self.types.ctypes.data, *(self.arrays[name].ctypes.data for name in FIELDS)]
        self.struct = Plain(n, net.n_in, net.n_out, factor, net.leak, lr, 0.25, *pointers)
        self.library = library
        library.plain_refresh(ctypes.byref(self.struct))

    def run(self, xs, targets):
        self.library.plain_run(
            ctypes.byref(self.struct), ctypes.c_void_p(xs.ctypes.data), ctypes.c_void_p(targets.ctypes.data), ctypes.c_long(len(xs))
        )


def network(n):
    rng = np.random.default_rng(n)
    return mf.Network(N_IN, n, N_OUT, types={"E": n - n // 5, "I": n // 5}, gain=0.8, rng=rng)


def measure(library, n, name, rounds, steps):
    """Median microseconds of step, run and plain, and the median ratio run / plain."""
    rule, factor = RULES[name]
    rng = np.random.default_rng(0)
    lr = 1e-4
    net = network(n)
    plain = PlainLoop(library, net, lr, factor)
    learner = mf.Learner(net, rule, optimizer=mf.SGD(lr))
    xs = rng.normal(size=(steps, N_IN)).astype(np.float32)
    targets = rng.normal(size=(steps, N_OUT)).astype(np.float32)
    start = net.w_rec.copy()
    learner.run(xs, targets)
    plain.run(xs, targets)
    change = np.abs(net.w_rec - start).max()
    assert np.abs(net.w_rec - plain.arrays["w"]).max() < 1e-3 * change, "the plain loop computes something else"

    times = {"step": [], "run": [], "plain": []}
    for _ in range(rounds):
        for x, target in zip(xs, targets):
            begin = perf_counter_ns()
            learner.step(x, target)
            times["step"].append(perf_counter_ns() - begin)
        begin = perf_counter_ns()
        learner.run(xs, targets)
        times["run"].append((perf_counter_ns() - begin) / steps)
        begin = perf_counter_ns()
        plain.run(xs, targets)
        times["plain"].append((perf_counter_ns() - begin) / steps)
    ratio = float(np.median(np.divide(times["run"], times["plain"])))
    return {f"{key}_us": float(np.median(t)) / 1e3 for key, t in times.items()} | {"ratio": ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=500, help="per round")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        library = compile_plain(folder)
        print(f"{platform.machine()}, {core.isa()}, {core.compiler()}, NumPy {np.__version__}; microseconds, medians of {args.rounds} rounds")
        print(f"{'N':>5} {'rule':>8} {'step':>8} {'run':>8} {'plain C':>8} {'run/plain':>10}")
        for n in args.sizes:
            for name in RULES:
                row = measure(library, n, name, args.rounds, args.steps)
                rows.append({"n_rec": n, "rule": name, **row})
                print(f"{n:5} {name:>8} {row['step_us']:8.2f} {row['run_us']:8.2f} {row['plain_us']:8.2f} {row['ratio']:10.2f}")
    if args.json:
        args.json.write_text(json.dumps({"isa": core.isa(), "compiler": core.compiler(), "numpy": np.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
