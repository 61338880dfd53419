"""How time per step and memory grow with N and with T, with fitted exponents.

    python bench/bench_scaling.py [--sizes 256 512 1024] [--short]

Time is per step, of one thread unless said, medians of rounds in which all sizes take their turn; exponents are slopes in
log-log over the sizes from 256 on (RTRL: from 64 on; memory: from 512 on). `run` and `chunk` are Learner.run, which by default
shares out large networks among the threads that there are; BPTT is fit_trials with one trial of 256 steps; RTRL is NumPy, small N.
Memory is resident memory, measured in a process of its own: against N all that a network and its learner hold after some steps
(`matrices`: in units of N x N numbers); against T what one call adds to its peak.
"""

import gc
import itertools
import json
import os
import subprocess
import sys

import common

STEPS = 256  # of a BPTT trial
WAYS = {"run": ({}, 1), "chunk 16": ({"chunk": 16}, 1), "chunk 32": ({"chunk": 32}, 1), "chunk 32, 2 threads": ({"chunk": 32}, 2)}
FIT_FROM = 256


def make(mf, rule, n, threads=1):
    import competitors

    kind = mf.BPTT() if rule == "BPTT" else competitors.rules(mf)[rule]
    how = {"optimizer": mf.SGD(competitors.LR / n), "update": "apply" if rule == "BPTT" else None, "threads": threads}
    return mf.Learner(competitors.network(mf, n), kind, **how)


def worker(what, rule, n, steps):
    """Print MB: `state`, what network and learner hold; `run` or `fit_trials`, what a call over T steps adds to the peak."""
    import numpy as np

    import modprop_fast as mf

    rng = np.random.default_rng(0)
    xs, targets = (rng.normal(size=(1, steps, 2)).astype(np.float32) for _ in range(2))
    if rule != "BPTT":
        make(mf, rule, 200).run(xs[0, :20], targets[0, :20])  # what is loaded and kept once
    gc.collect()
    before = common.resident()[0]
    learner = make(mf, rule, n)
    if what == "state":
        learner.run(xs[0], targets[0])
        gc.collect()
        return print(json.dumps(common.resident()[0] - before))
    calls = {"run": lambda t: learner.run(xs[0, :t], targets[0, :t])}
    calls["fit_trials"] = lambda t: learner.fit_trials(xs[:, :t], targets[:, :t])
    calls[what](50)
    common.forget_peak()
    before = common.resident()[0]
    calls[what](steps)
    print(json.dumps(common.resident()[1] - before))


def memory(what, rule, n, steps):
    command = [sys.executable, __file__, "--worker", what, rule, str(n), str(steps)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, start_new_session=True)  # Ctrl-C is for this one alone
    if process.returncode:
        sys.exit(f"memory of {what} {rule}: failed")
    return json.loads(process.stdout)


def timed(mf, np, arguments):
    """(what, rule) -> {N: summary of microseconds per step}."""
    import competitors

    rng = np.random.default_rng(0)
    xs, targets = (rng.normal(size=(20_000, 2)).astype(np.float32) for _ in range(2))
    blocks, counts = {}, {}
    for n in arguments.sizes:
        steps = int(min(max(4e6 / n / n, 32), len(xs))) // 32 * 32
        for (what, (how, threads)), rule in itertools.product(WAYS.items(), ("exact", "mean", "e-prop")):
            if threads <= os.cpu_count():
                learner = make(mf, rule, n, threads)
                blocks[what, rule, n] = lambda run=learner.run, steps=steps, how=how: run(xs[:steps], targets[:steps], **how)
                counts[what, rule, n] = steps
        if n <= 1024:
            fit = make(mf, "BPTT", n).fit_trials
            blocks["fit_trials", "BPTT", n] = lambda fit=fit: fit(xs[None, :STEPS], targets[None, :STEPS])
            counts["fit_trials", "BPTT", n] = STEPS
    for n in arguments.rtrl:
        step = competitors.NumpyRTRL(make(mf, "exact", n).network).step
        blocks["NumPy", "RTRL", n] = lambda step=step: [step(x, y) for x, y in zip(xs[:8], targets)]
        counts["NumPy", "RTRL", n] = 8
    for block in blocks.values():
        block()
    entries = {key: lambda block=block, steps=counts[key]: [common.clock(block) / steps] for key, block in blocks.items()}
    table = {}
    for (what, rule, n), rounds in common.interleave(entries, arguments.rounds).items():
        table.setdefault((what, rule), {})[n] = common.summary(rounds)
    return table


def fitted(points, least):
    """Exponent over the points from `least` on, or over all where these are too few."""
    kept = {x: y for x, y in points.items() if x >= least and y > 0}
    kept = kept if len(kept) > 1 else {x: y for x, y in points.items() if y > 0}
    return common.exponent(list(kept), list(kept.values()))


def main():
    if "--worker" in sys.argv:
        what, rule, n, steps = sys.argv[sys.argv.index("--worker") + 1 :]
        return worker(what, rule, int(n), int(steps))
    arguments = common.options(
        __doc__, dict(sizes=[64, 128, 256, 512, 1024], rtrl=[32, 64, 128], steps=[900, 3600], rounds=10),
        sizes=([64, 128, 256, 512, 1024, 2048, 4096], "recurrent units", common.SIZES),
        rtrl=([32, 64, 96, 128, 192], "recurrent units of RTRL", (5, 512)),
        steps=([900, 3600, 14400], "T", (1, 10**6)), rounds=(20, "for the times", common.ROUNDS),
    )  # fmt: skip
    common.start(arguments)
    import numpy as np

    import modprop_fast as mf

    rows = []
    printed = common.Table(what="<20", rule="<7", of="<10", exponent="9.2f", figures="<60")

    def show(what, rule, of, points, least=FIT_FROM, flat=False, **more):
        row = {"what": what, "rule": rule, "of": of, "exponent": None if flat else fitted(points, least), "points": points}
        rows.append(row | more)
        printed.row(what, rule, of, row["exponent"], "  ".join(f"{x}: {y:.3g}" for x, y in points.items()))

    print("microseconds per step against N")
    for (what, rule), found in timed(mf, np, arguments).items():
        points, spread = ({n: figures[name] for n, figures in found.items()} for name in ("median_us", "round_quartiles_us"))
        show(what, rule, "time / N", points, 64 if rule == "RTRL" else FIT_FROM, round_quartiles_us=spread)
    print("MB of state against N, and the same in N x N numbers of 4 bytes")
    for rule in ("exact", "mean", "e-prop"):
        points = {n: memory("state", rule, n, 32) for n in arguments.sizes if n >= 512}
        show("state", rule, "MB / N", points)
        show("state", rule, "matrices", {n: mb * 2**20 / (4 * n * n) for n, mb in points.items()}, flat=True)
    print("MB that one call adds to its peak, against T; N = 120")
    for what, rule in ("run", "exact"), ("fit_trials", "exact"), ("fit_trials", "mean"), ("fit_trials", "BPTT"):
        points = {steps: memory(what, rule, 120, steps) for steps in arguments.steps}
        flat = max(points.values()) - min(points.values()) < 0.5  # MB: the grain of the measurement
        show(what, rule, "MB / T", points, 0, flat)
        rows[-1]["exponent"] = rows[-1]["exponent"] if not flat else 0.0
    common.finish(arguments, rows)


if __name__ == "__main__":
    common.run(main)
