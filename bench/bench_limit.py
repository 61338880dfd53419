"""What this machine can do, and how much of it the engine uses.

    python bench/bench_limit.py [--sizes 256 1024] [--short]

First the rates: memory of one core by a small C program (gcc at run time) at half of each cache level and far beyond the last,
in bytes read plus bytes written; matrix-vector and matrix products and the rank-one update. Then, for one thread:
  - `run`: the bytes that one step must move (`traffic`) at the rates measured for them at that working-set size, in the
    same round, over the measured time of a step: the fraction of what the memory allows a program that writes at every step.
    The engine writes a part in turn and does not read what units at rest would send: where memory is slow it can pass 1;
  - `chunk 16`: W read once for every step, which has to wait for the one before, at the rate of its size, and the products of
    matrices that end a chunk (`products`) as BLAS makes them, sgemm of the same shapes in the same round, over the measured time;
  - fit_trials (8 trials side by side, windows of 32 steps): all products as BLAS makes them, over the measured time.
Fractions are medians over rounds.
"""

import ctypes
import tempfile
from functools import partial
from pathlib import Path

import bench_scaling
import common

CHUNK = 16
TRIALS, STEPS, WINDOW = 8, 256, 32  # of fit_trials; the steps that it takes at once


def traffic(rule, n, active):
    """(bytes only read, bytes read and written, working set) of one step with an error; float32, two types, all N x N terms.

    W is passed over once: that pass updates a row and multiplies it with z for the next step.
    exact   W and both R are read and written.
    mean    W is read and written: the nonlocal term reaches every row.
    e-prop  rows of W whose unit is active are read and written, the others read only.
    """
    matrix = 4 * n * n
    return {
        "exact": (0, 3 * matrix, 3 * matrix),
        "mean": (0, matrix, matrix),
        "e-prop": ((1 - active) * matrix, active * matrix, matrix),
    }[rule]


def products(rule, n, n_in, steps, trials=1):
    """(how many for one step of one trial, rows, inner, columns) of the products of matrices.

    The gradient of so many steps, for `exact` those that bring both R over them, and W z of trials side by side; BPTT has W^T too.
    """
    shapes = [((3 if rule == "exact" else 1) / steps, n, steps, n + n_in + 1)]
    if trials > 1:
        shapes.append(((2 if rule == "BPTT" else 1) / trials, trials, n, n))
    return shapes


def caches():
    """name -> bytes, half of each level of data cache; and memory."""
    found, units = {}, {"K": 1 << 10, "M": 1 << 20}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = int(size[:-1]) * units[size[-1]] // 2
    found = found or {"L1": 16 << 10, "L2": 256 << 10, "L3": 8 << 20}
    return found | {"memory": min(16 * max(found.values()), 512 << 20)}


class Memory:
    """The loops of limit.c; each call is about a millisecond and returns bytes per nanosecond, GB/s."""

    def __init__(self, library, size):
        import numpy as np

        self.library, self.block = library, common.huge_pages(size // 4 + 4096, np.float32)
        self.block[:] = 1e-3

    def _rate(self, call, moved, *args):
        passes = ctypes.c_long(max(1, int(3e7 / moved)))
        return moved * passes.value / common.clock(call, *args, passes)

    def _at(self, offset=0):
        return ctypes.c_void_p(self.block.ctypes.data + offset)

    def triad(self, size):
        part = int(size) // 3 // 64 * 64
        arrays = self._at(), self._at(part + 17 * 64), self._at(2 * part + 34 * 64)
        return self._rate(self.library.triad, 3 * part, *arrays, ctypes.c_long(part // 4))

    def read(self, size):
        return self._rate(self.library.read_only, size, self._at(), ctypes.c_long(int(size) // 4))

    def change(self, size):
        return self._rate(self.library.read_modify_write, 2 * size, self._at(), ctypes.c_long(int(size) // 4))

    def rank_one(self, n):
        x, u = self._at(4 * n * n + 64), self._at(4 * n * n + 4 * n + 128)
        return self._rate(self.library.rank_one, 8 * n * n, self._at(), u, x, ctypes.c_long(n))


def medians(rounds, **calls):
    """Medians and quartiles of interleaved rates."""
    import numpy as np

    times = common.interleave({name: (lambda call=call: [call()]) for name, call in calls.items()}, rounds)
    quartiles = {f"{name}_quartiles": np.quantile(values, (0.25, 0.75)).tolist() for name, values in times.items()}
    return {name: float(np.median(values)) for name, values in times.items()}, quartiles


def gemm(rows, inner, columns):
    """Nanoseconds of one product of matrices."""
    import numpy as np

    a, b, c = (np.ones(shape, np.float32) for shape in ((rows, inner), (inner, columns), (rows, columns)))
    calls = range(int(max(1, 2e6 / (rows * inner * columns))))
    np.dot(a, b, out=c)
    return common.clock(lambda: [np.dot(a, b, out=c) for _ in calls]) / len(calls)


def gemv(n):
    import numpy as np

    w, x, y = (np.ones(shape, np.float32) for shape in ((n, n), n, n))
    np.dot(w, x, out=y)
    return 80 * n * n / common.clock(lambda: [np.dot(w, x, out=y) for _ in range(20)])


def machine_rates(memory, sizes, rounds):
    rows = []
    if memory:
        printed = common.Table(level="<8", KB="9.0f", triad="9.1f", read="9.1f", change="9.1f", _="<28")
        for level, size in caches().items():
            calls = {name: partial(getattr(memory, name), size) for name in ("triad", "read", "change")}
            rates, spread = medians(rounds, **calls)
            rows.append({"level": level, "bytes": size, **{f"{name}_gb_s": rate for name, rate in rates.items()}, **spread})
            printed.row(level, size / 1024, *rates.values(), "GB/s, read + written")
    printed = common.Table(N="5d", sgemv="9.1f", rank_one="9.1f", sgemm="9.1f", _="<40")
    for n in sizes:
        calls = {"sgemv": partial(gemv, n)}
        calls |= {"rank_one": partial(memory.rank_one, n)} if memory else {}
        calls |= {"sgemm": lambda n=n: n**3 / gemm(n, n, n)} if n <= 2048 else {}
        rates, spread = medians(max(3, rounds // 3), **calls)
        rows.append({"n": n, **rates, **spread})
        printed.row(n, *(rates.get(name) for name in ("sgemv", "rank_one", "sgemm")), "GB/s, GB/s, 1e9 multiply-adds/s")
    return rows


def blas(shapes):
    """Nanoseconds that one step of one trial takes of them."""
    return sum(count * gemm(*shape) for count, *shape in shapes)


def fractions(memory, arguments):
    """The engine's time per step beside what the machine alone would take, in the same rounds."""
    import numpy as np

    import modprop_fast as mf
    from modprop_fast import reference

    printed = common.Table(what="<11", rule="<7", N="5d", us="10.2f", limit="10.2f", fraction="9.2f", of="<14")
    rng = np.random.default_rng(0)
    xs, targets = (rng.normal(size=(4096, 2)).astype(np.float32) for _ in range(2))
    trials = [a[: TRIALS * STEPS].reshape(TRIALS, STEPS, 2) for a in (xs, targets)]
    rows = []

    def report(what, rule, n, of, call, steps, limit):
        """limit(): nanoseconds that the machine alone would take for one step."""
        call()
        entries = {"engine": lambda: [common.clock(call) / steps], "limit": lambda: [limit()]}
        times = common.interleave(entries, arguments.rounds)
        row = {"what": what, "rule": rule, "n": n, "of": of}
        for name, key in ("engine", ""), ("limit", "limit_"):
            figures = common.summary(times[name])
            row |= {f"{key}us": figures["median_us"], f"{key}quartiles_us": figures["round_quartiles_us"]}
        row["fraction"] = common.ratio(times, "limit", "engine")
        rows.append(row)
        printed.row(what, rule, n, row["us"], row["limit_us"], row["fraction"], of)

    def stream(rule, n):
        steps = int(min(max(4e7 / n / n, 4 * CHUNK), len(xs))) // CHUNK * CHUNK  # the limit's arrays have left the caches cold
        learner = bench_scaling.make(mf, rule, n)
        path = reference.forward(learner.network.weights, xs[None, :32], leak=learner.network.leak, activation="relu")
        read, change, held = traffic(rule, n, float((path.h > 0).mean()))
        run = partial(learner.run, xs[:steps], targets[:steps])
        if memory:
            report("run", rule, n, "memory", run, steps, lambda: read / memory.read(held) + 2 * change / memory.change(held))
            matrix, shapes, chunked = 4 * n * n, products(rule, n, 2, CHUNK), partial(run, chunk=CHUNK)
            report(f"chunk {CHUNK}", rule, n, "memory, sgemm", chunked, steps, lambda: matrix / memory.read(matrix) + blas(shapes))

    def batch(rule, n):
        fit = bench_scaling.make(mf, rule, n).fit_trials
        shapes = products(rule, n, 2, WINDOW, TRIALS)
        report("fit_trials", rule, n, "sgemm", partial(fit, *trials), TRIALS * STEPS, lambda: blas(shapes))

    for n in arguments.sizes:
        for rule in ("e-prop", "mean", "exact"):
            stream(rule, n)
        for rule in ("e-prop", "mean", "exact", "BPTT") if n <= 512 else ():
            batch(rule, n)
    if memory:
        print("limits: all is written at every step, in chunks all of W is read; the engine writes in turn and skips units at rest")
    return rows


def main():
    arguments = common.options(
        __doc__, dict(sizes=[64, 128, 256, 512, 1024], rounds=9), rounds=(25, "for every figure", common.ROUNDS),
        sizes=([64, 128, 256, 512, 1024, 2048], "recurrent units", common.SIZES),
    )  # fmt: skip
    common.start(arguments)
    with tempfile.TemporaryDirectory() as folder:
        library = common.compile_c("rates of memory, run and chunk", Path(__file__).with_name("limit.c"), folder)
    memory = None
    if library:
        library.read_only.restype = ctypes.c_float
        memory = Memory(library, max(*caches().values(), 12 * max(arguments.sizes) ** 2 + (1 << 20)))
    rates = machine_rates(memory, arguments.sizes, arguments.rounds)
    common.finish(arguments, fractions(memory, arguments), rates=rates)


if __name__ == "__main__":
    common.run(main)
