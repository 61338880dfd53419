"""What the scripts of this folder share: pinned threads, the machine's description, interleaved timing, tables, JSON."""

import argparse
import importlib
import importlib.metadata
import json
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path
from time import perf_counter_ns


def pin(threads):
    """Give every library the same number of threads.

    OpenBLAS, OpenMP and XLA read their settings once, when they are loaded: the script starts itself again where these differ.
    """
    eigen = "true" if threads > 1 else "false"
    wanted = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(threads))
    wanted |= {"XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={eigen}", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}

    forced = "OPENBLAS_CORETYPE" in os.environ  # would give the others' BLAS the kernels of another processor
    if forced or any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.pop("OPENBLAS_CORETYPE", None)
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def have(*modules):
    """The modules, or None: the first that is missing is named once on stdout."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ImportError as error:
        name = error.name or modules[0]
        if name not in _missing:
            _missing.add(name)
            print(f"{name}: not installed, skipped")


_missing = set()


def options(doc, short, **defaults):
    """Parse the command line: what all scripts have, and `defaults`, name -> (value, text), which `short` replaces."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--json", type=Path, metavar="FILE", help="also write settings, machine and figures here")
    out.add_argument("--short", action="store_true", help="the short form: fewer sizes and rounds, under a minute")
    threads = defaults.pop("threads", 1)
    out.add_argument("--threads", type=int, default=threads, help="for every competitor (default %(default)s)")
    for name, (value, text) in defaults.items():
        many = {"nargs": "+", "type": type(value[0])} if isinstance(value, list) else {"type": type(value)}
        out.add_argument(f"--{name}", default=value, help=f"{text} (default {value})", **many)
    if out.parse_args().short:
        out.set_defaults(**short)
    return out.parse_args()


def machine(threads):
    """Processor, compiler, versions."""
    from modprop_fast import core

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((s.split(":")[1].strip() for s in info.read_text().splitlines() if s.startswith("model name")), model)
    versions = {}
    for name in ("modprop_fast", "numpy", "numba", "torch", "jax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": model, "cores": os.cpu_count(), "threads": threads, "isa": core.isa(), "compiler": core.compiler(),
        "python": platform.python_version(), "system": platform.platform(), "versions": versions,
    }  # fmt: skip


def cores_in_fact(threads):
    """Processors' worth of time that as many busy processes get: a shared machine may give less than it shows."""
    spin = "import time; end = time.time() + 0.4\nwhile time.time() < end: pass\nprint(time.process_time())"
    busy = [subprocess.Popen([sys.executable, "-S", "-c", spin], stdout=subprocess.PIPE, text=True) for _ in range(threads)]
    return sum(float(process.communicate()[0]) for process in busy) / 0.4


def start(arguments):
    """Pin the threads and print the machine."""
    pin(arguments.threads)
    about = machine(arguments.threads)
    if arguments.threads > 1 and (found := cores_in_fact(arguments.threads)) < 0.9 * arguments.threads:
        print(f"warning: {arguments.threads} busy processes get {found:.1f} processors: another program runs beside this one")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread(s), {about['isa']}, {about['compiler']}")
    print(versions)


def finish(arguments, rows, **more):
    """Write the JSON file, if asked for."""
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        out = {"machine": machine(arguments.threads), "settings": settings, "rows": rows, **more}
        arguments.json.write_text(json.dumps(out, indent=1) + "\n")


class Table:
    """Prints rows as they come, under one heading; None is a dash."""

    def __init__(self, **columns):
        self.columns = columns  # name -> format such as "10.2f", "5d" or "<12"
        print(" ".join(f"{name:{self._width(spec)}}" for name, spec in columns.items()))

    def row(self, *values):
        cells = [f"{'-':{self._width(s)}}" if v is None else f"{v:{s}}" for v, s in zip(values, self.columns.values())]
        print(" ".join(cells), flush=True)

    @staticmethod
    def _width(spec):
        return spec if spec[0] == "<" else f">{spec.split('.')[0].rstrip('d')}"


def interleave(entries, rounds):
    """Call the entries in turn, round after round.

    entries : name -> function without arguments that returns the times (ns) of its calls of one round.
    Returns name -> list over rounds of these lists.
    """
    times = {name: [] for name in entries}
    for _ in range(rounds):
        for name, block in entries.items():
            times[name].append(block())
    return times


def clock(call, *args):
    """Nanoseconds of one call."""
    begin = perf_counter_ns()
    call(*args)
    return perf_counter_ns() - begin


def summary(rounds):
    """Microseconds: median, tail as far as the number of calls shows it, and the quartiles of the rounds' medians."""
    import numpy as np

    calls = np.concatenate(rounds) / 1e3
    medians = np.median(np.asarray([np.median(r) for r in rounds]).reshape(len(rounds), -1), axis=1) / 1e3
    out = {"calls": len(calls), "median_us": float(np.median(calls)), "max_us": float(calls.max())}
    out["p99_us"] = float(np.quantile(calls, 0.99)) if len(calls) >= 1000 else None
    out["p999_us"] = float(np.quantile(calls, 0.999)) if len(calls) >= 10000 else None
    out["round_quartiles_us"] = [float(q) for q in np.quantile(medians, (0.25, 0.75))]
    return out


def ratio(times, one, other):
    """Median over rounds of one / other, each round by its own medians; None where one of the two is missing."""
    import numpy as np

    if one not in times or other not in times:
        return None
    return float(np.median([np.median(a) / np.median(b) for a, b in zip(times[one], times[other])]))


def exponent(x, y):
    """Slope of log y against log x, by least squares."""
    import numpy as np

    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def huge_pages(n, dtype):
    """(n,) zeros on 2 MiB pages where the system has them: a block of memory whose speed does not vary by launch."""
    import numpy as np

    page = 1 << 21
    size = n * np.dtype(dtype).itemsize
    block = mmap.mmap(-1, -(-size // page) * page + page)  # the last page too must lie within the block to be a huge one
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    block = np.frombuffer(block, np.uint8)
    at = -block.ctypes.data % page
    return block[at : at + size].view(dtype)


def compile_c(source, folder, *flags):
    """A C file as a library, or None where there is no gcc, which is said on stdout."""
    import ctypes

    library = Path(folder) / f"{Path(source).stem}{''.join(flags).replace('/', '')}.so"
    try:
        fast = ("-O3", "-march=native", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
        subprocess.run(["gcc", *fast, "-shared", "-fPIC", *flags, "-o", library, source], check=True)
    except FileNotFoundError:
        if "gcc" not in _missing:
            _missing.add("gcc")
            print("plain C: no gcc, skipped")
        return None
    return ctypes.CDLL(str(library))


def resident():
    """(now, peak) resident memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return tuple(int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1024)
    return peak, peak


def forget_peak():
    """Let the peak of `resident` start from now, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
