"""Latency of one learned step called from Python: batch 1, relu, two cell types, every weight updated at every step.

    python bench/bench_step.py [--sizes 64 256] [--dtypes float32] [--short]

For every size and dtype all competitors are measured in turn in one process, one thread each, after each row but `chunk`, which
updates less often, was checked to compute the same weights (within 1e-3 of their change). Rows: `modprop_fast` is Learner.step;
`run` and `chunk` are Learner.run per step, over whole chunks; the rest are the competitors of competitors.py and plain.c,
called once per step. At small N most of `plain C` is the call through ctypes: `plain C run` is the same loop without it. Columns:
microseconds over all calls (a tail only where there are calls enough to show it); then this row over Learner.step of the same
rule, over plain C (where it is `run` or `chunk`, over `plain C run`), and over numba (numba's `exact` for `mean` and `running`).
Ratios are medians over rounds of the ratio of the round's medians. `running` follows the activity at every 1000th step, which
a median does not show and p99.9 does.
"""

import sys
import time
from time import perf_counter_ns

import common

CHECKED = 60  # steps
OURS = "modprop_fast"


def same_weights(np, who, found, expected, start):
    """Fail unless `found` is `expected` to within 1e-3 of the change since `start`, and the rounding of w in every step."""
    for name, before in start.items():
        change = np.abs(expected[name] - before).max()
        away = np.abs(np.asarray(found[name]) - expected[name]).max()
        rounding = 2 * np.sqrt(CHECKED) * np.finfo(before.dtype).eps * np.abs(before).max()
        if not (change > 2 * rounding and away < 1e-3 * change + rounding):
            sys.exit(f"{who}: {name} is {away:.2g} away after {CHECKED} steps in which it changed by {change:.2g}")


def entries(mf, np, n, dtype, xs, targets):
    """(rule, who) -> (call of one step, 0) or (call of a stretch, of which so many steps are a whole), all checked."""
    import competitors

    def network():
        return competitors.network(mf, n, dtype=dtype)

    rules, start = competitors.rules(mf) | {"running": mf.ModProp(competitors.MU, factor="running")}, network().weights
    out, expected = {}, {}
    for name, rule in rules.items():
        learner = mf.Learner(network(), rule, optimizer=mf.SGD(competitors.LR), threads=1)
        for x, target in zip(xs[:CHECKED], targets):
            learner.step(x, target)
        expected[name] = {key: w.copy() for key, w in learner.network.weights.items()}
        out[name, OURS] = learner.step, 0
        for who, options in (("run", {}), ("chunk 16", {"chunk": 16}), ("chunk 32", {"chunk": 32})):
            learner = mf.Learner(network(), rule, optimizer=mf.SGD(competitors.LR), threads=1)
            learner.run(xs[:CHECKED], targets[:CHECKED], **options)
            if not options:
                same_weights(np, f"run {name}", learner.network.weights, expected[name], start)
            out[name, who] = (lambda x, t, run=learner.run, options=options: run(x, t, **options)), options.get("chunk", 1)
    for kind in competitors.STEPS:
        other = kind(network())
        for x, target in zip(xs[:CHECKED], targets):
            other.step(x, target)
        want = expected[kind.rule] if kind.rule in rules else kind.expected(network(), xs[:CHECKED], targets)
        same_weights(np, f"{kind.name} {kind.rule}", other.weights(), want, start)
        out[kind.rule, kind.name] = other.step, 0
        if hasattr(kind, "run"):
            other = kind(network())
            other.run(xs[:CHECKED], targets[:CHECKED], CHECKED)
            same_weights(np, f"{kind.name} run {kind.rule}", other.weights(), want, start)
            out[kind.rule, f"{kind.name} run"] = (lambda x, t, run=other.run: run(x, t, len(x))), 1
    return out


def blocks(table, xs, targets, arguments):
    """Each entry's block of one round: as many calls as its share of the time allows; two calls warm it."""
    out = {}
    for key, (call, whole) in table.items():
        one = (lambda i, call=call: call(xs[i], targets[i])) if not whole else None
        began = time.perf_counter()
        for i in range(5):
            one(i) if one else call(xs[: 5], targets[: 5])
        each = (time.perf_counter() - began) / (25 if whole else 5)
        calls = int(min(max(arguments.seconds / each, 10 * arguments.rounds), arguments.calls) / arguments.rounds)
        calls = min(calls, len(xs))
        if whole:
            calls = max(calls // whole, 1) * whole

        def block(call=call, calls=calls, whole=whole):
            if whole:
                call(xs[:2], targets[:2])
                return [common.clock(call, xs[:calls], targets[:calls]) / calls]
            call(xs[0], targets[0])
            call(xs[1], targets[1])
            times = []
            for x, target in zip(xs[:calls], targets):
                begin = perf_counter_ns()
                call(x, target)
                times.append(perf_counter_ns() - begin)
            return times

        out[key] = block
    return out


def measure(mf, np, n, dtype, arguments, printed):
    per_round = max(arguments.calls // arguments.rounds, 10)
    rng = np.random.default_rng(0)
    xs, targets = (rng.normal(size=(max(per_round, CHECKED), size)).astype(dtype) for size in (2, 2))
    times, kept = {}, []  # kept: so that the next launch does not get the same memory again
    for _ in range(arguments.launches):
        table = entries(mf, np, n, dtype, xs, targets)
        kept.append(table if n <= 512 else None)
        part = common.interleave(blocks(table, xs, targets, arguments), max(1, arguments.rounds // arguments.launches))
        for key, rounds in part.items():
            times.setdefault(key, []).extend(rounds)
    rows = []
    for rule, who in sorted(table, key=lambda key: ("exact", "mean", "running", "e-prop", "TBPTT(1)").index(key[0])):
        row = {"n_rec": n, "dtype": dtype, "rule": rule, "who": who, **common.summary(times[rule, who])}
        stretch = table[rule, who][1]
        yardsticks = {"step": (rule, OURS), "plain": (rule, "plain C run" if stretch else "plain C")}
        yardsticks["numba"] = ("exact" if rule in ("mean", "running") else rule), "numba"
        row |= {f"over_{name}": common.ratio(times, (rule, who), other) for name, other in yardsticks.items()}
        if stretch:
            row["p99_us"] = row["p999_us"] = row["max_us"] = None
        rows.append(row)
        figures = ("median_us", "p99_us", "p999_us", "max_us", "over_step", "over_plain", "over_numba")
        printed.row(n, dtype, rule, who, *(row.get(name) for name in figures))
    ratios = {
        "mean / e-prop": common.ratio(times, ("mean", OURS), ("e-prop", OURS)),
        "running / e-prop": common.ratio(times, ("running", OURS), ("e-prop", OURS)),
        "exact / e-prop": common.ratio(times, ("exact", OURS), ("e-prop", OURS)),
        "numba exact / chunk 32 exact": common.ratio(times, ("exact", "numba"), ("exact", "chunk 32")),
        "exact / chunk 32 exact": common.ratio(times, ("exact", OURS), ("exact", "chunk 32")),
    }
    print("     ", ", ".join(f"{name} {value:.2f}" for name, value in ratios.items() if value), "\n", flush=True)
    return rows, {"n_rec": n, "dtype": dtype, **ratios}


def main():
    arguments = common.options(
        __doc__,
        dict(sizes=[32, 64, 128, 256, 512, 1024], dtypes=["float32"], calls=4000, seconds=0.5, rounds=20, launches=4),
        sizes=([32, 64, 128, 256, 512, 1024, 2048], "recurrent units", (5, 4096)),  # all competitors' matrices at once
        dtypes=(["float32", "float64"], "precisions", ("float32", "float64")),
        calls=(100_000, "most calls of one competitor", (1, 10**8)),
        seconds=(6.0, "most time of one competitor, unless that is under 10 calls a round", (0, 10**6)),
        rounds=(40, "in each of which every competitor has its turn", common.ROUNDS),
        launches=(5, "times that all are made anew: where arrays lie in memory changes their speed, by up to 2", common.ROUNDS),
    )  # fmt: skip
    common.start(arguments)
    import competitors
    import numpy as np

    import modprop_fast as mf

    competitors.load()
    ratios = {"/step": "7.2f", "/plain": "7.2f", "/numba": "7.2f"}
    times = {"median": "9.2f", "p99": "9.2f", "p99.9": "9.2f", "max": "9.0f"}
    printed = common.Table(**{"N": "5d", "dtype": "<8", "rule": "<9", "who": "<12"}, **times, **ratios)
    results = [measure(mf, np, n, dtype, arguments, printed) for dtype in arguments.dtypes for n in arguments.sizes]
    common.finish(arguments, [row for rows, _ in results for row in rows], ratios=[ratios for _, ratios in results])


if __name__ == "__main__":
    common.run(main)
