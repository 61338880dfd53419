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
import tempfile
from pathlib import Path
from time import perf_counter_ns

SIZES = 5, 8192  # every fifth unit is of type I; the matrices of one learner take 0.8 GB, and a script has a dozen
ROUNDS = 1, 10**6


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


def run(main):
    """Call the main function of a script: Ctrl-C is one line, and no line where the reader of its output has gone."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what it still holds has to go somewhere
        sys.exit(1)


def have(*modules):
    """The modules, or None, and why on stdout."""
    try:
        return [importlib.import_module(name) for name in modules]
    except Exception as error:  # an installed one may fail in its own ways
        absent = isinstance(error, ModuleNotFoundError) and error.name == modules[0]
        skip(modules[0], "not installed" if absent else f"fails to load ({' '.join(str(error).split())})")


def skip(what, why):
    """Say once that something is left out."""
    if what not in _skipped:
        _skipped.add(what)
        print(f"{what}: {why}, skipped")


_skipped = set()


def options(doc, short, **defaults):
    """Parse the command line: what all scripts have, and `defaults`, name -> (value, text, (least, most) or choices).

    `short` replaces their values.
    """
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--json", type=Path, metavar="FILE", help="also write settings, machine and figures here")
    out.add_argument("--short", action="store_true", help="the short form: fewer sizes and rounds, under a minute")
    out.set_defaults(threads=1)
    for name, (value, text, allowed) in defaults.items():
        many = {"nargs": "+", "type": type(value[0])} if isinstance(value, list) else {"type": type(value)}
        many |= {"choices": allowed} if many["type"] is str else {}
        out.add_argument(f"--{name}", default=value, help=f"{text} (default {value})", **many)
    if out.parse_args().short:
        out.set_defaults(**short)
    arguments = out.parse_args()
    for name, (value, _, allowed) in defaults.items():
        given = getattr(arguments, name)
        for number in given if isinstance(value, list) else [given]:
            if not isinstance(number, str) and not allowed[0] <= number <= allowed[1]:
                out.error(f"--{name}: expected {allowed[0]} to {allowed[1]}, got {number}")
    if "calls" in arguments and arguments.calls < arguments.rounds:
        out.error(f"--calls: expected at least one a round, {arguments.rounds}, got {arguments.calls}")
    path = arguments.json
    try:
        if path and path.exists() and not path.is_file():
            out.error(f"--json: not a file: {path}")
        if path:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        out.error(f"--json: {error.strerror}: {path}")
    return arguments


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
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }  # fmt: skip


def cores_in_fact(threads):
    """Processors' worth of time that as many busy processes get: a shared machine may give less than it shows."""
    spin = "import time; end = time.time() + 0.4\nwhile time.time() < end: pass\nprint(time.process_time())"
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "start_new_session": True}  # Ctrl-C is ours
    busy = [subprocess.Popen([sys.executable, "-S", "-c", spin], **how) for _ in range(threads)]
    return sum(float(process.communicate()[0]) for process in busy) / 0.4


def start(arguments):
    """Pin the threads and print the machine."""
    pin(arguments.threads)
    about = arguments.machine = machine(arguments.threads)
    if (found := cores_in_fact(arguments.threads)) < 0.9 * arguments.threads:
        print(f"warning: {arguments.threads} busy process(es) get {found:.1f} processors: another program runs beside this one")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread(s), {about['isa']}, {about['compiler']}")
    print(versions + (f"; load {about['load'][0]:.1f}" if about["load"] else ""), flush=True)


def finish(arguments, rows, **more):
    """Write the JSON file, if asked for."""
    from modprop_fast.files import write_whole

    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "machine")}
        out = json.dumps({"machine": arguments.machine, "settings": settings, "rows": rows, **more}, indent=1) + "\n"
        write_whole(arguments.json, lambda file: file.write(out.encode()))


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
    """Slope of log y against log x, by least squares; None unless there are two different x."""
    import numpy as np

    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(set(x)) > 1 else None


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


def compile_c(what, source, folder, *flags):
    """A C file as a library, or None where gcc is missing or fails: then `what` is skipped, which is said on stdout."""
    import ctypes

    library = Path(folder) / f"{Path(source).stem}{''.join(flags).replace('/', '')}.so"
    try:
        fast = ("-O3", "-march=native", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
        subprocess.run(["gcc", *fast, "-shared", "-fPIC", *flags, "-o", library, source], check=True)
        return ctypes.CDLL(str(library))
    except FileNotFoundError:
        skip(what, "no gcc")
    except (OSError, subprocess.CalledProcessError) as error:
        skip(what, f"gcc failed ({getattr(error, 'returncode', error)})")


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
