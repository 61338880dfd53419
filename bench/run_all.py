"""The short form of the four benchmarks of speed, their figures in one folder, and one picture of them.

    python bench/run_all.py --out FOLDER

Two to three minutes on two cores. Leaves bench_step.json, bench_train.json, bench_scaling.json, bench_limit.json, what each
printed (.txt), and bench.png. Alone on the machine, `python bench/<script>.py` measures more sizes for longer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common

SCRIPTS = ("bench_step", "bench_train", "bench_scaling", "bench_limit")
COLOURS = {
    "modprop_fast": "#c03a2b", "numba": "#1f5fa8", "plain C": "#444444",
    "JAX": "#7b52a1", "PyTorch": "#d98a1f", "NumPy": "#3d8b50",
}  # fmt: skip


def short(out):
    """Run all scripts in their short form and draw the picture.

    Parameters
    ----------
    out : path of the folder to fill, made if need be

    Returns
    -------
    path of bench.png, or None where matplotlib is missing

    Raises
    ------
    RuntimeError
        If a script failed: a competitor that computes something else is a failure.
    OSError
        If the folder cannot be made or written to.
    """
    from modprop_fast.files import write_whole

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    for name in SCRIPTS:
        print(f"\n{name} --short", flush=True)
        command = [sys.executable, Path(__file__).with_name(f"{name}.py"), "--short", "--json", out / f"{name}.json"]
        lines = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    lines.append(line)
            except BaseException:  # Ctrl-C
                process.kill()
                raise
        if process.returncode:
            raise RuntimeError(f"{name}: failed with exit code {process.returncode}")
        write_whole(out / f"{name}.txt", lambda file, lines=lines: file.write("".join(lines).encode()))
    return draw(out)


def draw(out):
    """bench.png from bench_step.json and bench_train.json."""
    try:
        import matplotlib
    except ImportError:
        return print("matplotlib: not installed, no picture")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from modprop_fast.files import write_whole

    step, train = (json.loads((out / f"{name}.json").read_text()) for name in ("bench_step", "bench_train"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6.4), width_ratios=(1.35, 1), layout="constrained")
    _draw_steps(left, [row for row in step["rows"] if row.get("median_us") and row["dtype"] == "float32"])
    _draw_iterations(right, [row for row in train["rows"] if row.get("ms")])
    versions = ", ".join(f"{name} {version}" for name, version in step["machine"]["versions"].items() if version)
    figure.supxlabel(f"{step['machine']['cpu']}, {step['machine']['isa']}; {versions}", fontsize=7.5, color="0.4")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path = out / "bench.png"
    write_whole(path, lambda file: figure.savefig(file, dpi=130))
    return path


def _draw_steps(axes, rows):
    """Latency against N; a line ends in its name."""
    style = {"exact": "-", "mean": "--", "e-prop": ":", "TBPTT(1)": "-."}
    lines = {}
    for row in rows:
        if row["who"] in COLOURS and row["rule"] in style:
            lines.setdefault((row["who"], row["rule"]), []).append((row["n_rec"], row["median_us"]))
    ends = []
    for (who, rule), points in lines.items():
        ours = who == "modprop_fast"
        axes.loglog(*zip(*points), style[rule], color=COLOURS[who], lw=2.4 if ours else 1.3, zorder=3 if ours else 2)
        ends.append((points[-1][1], points[-1][0], f"{who}{' (ctypes)' * (who == 'plain C')}, {rule}", COLOURS[who], ours))
    last = 0.0
    for y, x, text, colour, ours in sorted(ends):  # labels keep a distance from each other
        at = max(y, last * 1.3)
        last = at
        axes.annotate(
            text, (x, y), xytext=(x * 1.12, at), va="center", fontsize=8.5, color=colour, weight="bold" if ours else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
    sizes = sorted({row["n_rec"] for row in rows})
    axes.set_xlim(sizes[0] * 0.9, sizes[-1] * 3.2)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.set_yticks([1, 10, 100, 1000, 10000], ["1 µs", "10 µs", "100 µs", "1 ms", "10 ms"])
    axes.set_ylim(min(row["median_us"] for row in rows) * 0.8, max(last, max(row["median_us"] for row in rows)) * 1.3)
    axes.set_xlabel("recurrent units N")
    axes.set_title("One learned step called from Python, one thread (median)", fontsize=10.5, loc="left")
    axes.grid(True, lw=0.4, color="0.88")


def _draw_iterations(axes, rows):
    """Bars at the smallest T."""
    steps = min(row["steps"] for row in rows)
    rows = sorted((row for row in rows if row["steps"] == steps), key=lambda row: -row["ms"])
    labels = [f"{row['who']}, {row['rule']}" for row in rows]
    bars = axes.barh(labels, [row["ms"] for row in rows], color=[COLOURS[row["who"]] for row in rows], height=0.62)
    axes.bar_label(bars, [f"{row['ms']:.1f} ms   +{row['peak_mb']:.0f} MB" for row in rows], padding=4, fontsize=8.5)
    axes.set_xlim(0, max(row["ms"] for row in rows) * 1.35)
    axes.set_xlabel("ms per iteration, and memory that it takes")
    axes.set_title(f"One training iteration, B 32, T {steps}, N 120, two threads", fontsize=10.5, loc="left")
    axes.tick_params(axis="y", length=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the figures (default %(default)s)")
    try:
        path = short(parser.parse_args().out)
    except (RuntimeError, OSError, ImportError) as error:
        parser.exit(2 if isinstance(error, OSError) else 1, f"bench: {error}\n")
    if path:
        print(f"\n{path}")


if __name__ == "__main__":
    common.run(main)
