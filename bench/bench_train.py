"""Seconds of one training iteration and its peak memory: delayed XOR at the published setting, two threads.

    python bench/bench_train.py [--steps 900] [--short]

B = 32 trials of T steps, N = 120, tau = 100, relu, cross entropy at the last step; an iteration is the gradient and an
Adam step on the same batch. Every competitor first shows that its gradient is that of the engine (within 1e-3 of the largest),
in a process that ends then. Each lives in a process of its own, which, whenever it is its turn, makes two iterations of which
the second is timed; PyTorch takes one thread where that is faster for it. `MB` is the growth of the resident set from
before the first iteration to its peak, what a tool loads or compiles for it included. Ratios are medians over rounds.
"""

import json
import subprocess
import sys
import time

import common

N, BATCH, TAU, CUE = 120, 32, 100.0, 100
OURS = {"exact": {}, "mean": {"factor": "mean"}, "e-prop": None, "BPTT": None}
OTHERS = [("NumPy", "exact"), ("NumPy", "BPTT"), ("PyTorch", "BPTT"), ("JAX", "BPTT")]


def problem(mf, np, steps):
    """The network (published recipe, signs free) and one batch."""
    from modprop_fast.tasks import DelayedXOR

    types = {"E": N - 23, "I": 23}
    rng = np.random.default_rng(0)
    signed = mf.Network(2, N, 2, types=types, tau=TAU, dale={"E": 1, "I": -1}, init="signed", rng=rng)
    net = mf.Network(2, N, 2, types=types, tau=TAU, init="zeros")
    for name, w in net.weights.items():
        w[...] = signed.weights[name]
    return net, *DelayedXOR(delay=steps - 2 * CUE, cue=CUE).sample(rng, BATCH)[:2]


def learner(mf, net, rule, threads):
    import competitors

    rules = {"e-prop": mf.EProp(), "BPTT": mf.BPTT()}
    rule = rules.get(rule) or mf.ModProp(competitors.MU, **OURS[rule])
    optimizer = mf.Adam(competitors.ADAM["lr"])
    return mf.Learner(net, rule, loss="cross_entropy", optimizer=optimizer, update="apply", threads=threads)


def worker(who, rule, steps, threads, check):
    """Check the gradient of a competitor, or else: one iteration per line of stdin."""
    import competitors
    import numpy as np

    import modprop_fast as mf

    net, inputs, classes = problem(mf, np, steps)
    if who == "modprop_fast":
        ours = learner(mf, net, rule, threads)
        iteration = lambda: ours.fit_trials(inputs, classes)  # noqa: E731
    else:
        competitors.load(steps=False, only=who)
        kind = [kind for kind in competitors.TRIALS if (kind.name, kind.rule) == (who, rule)]
        if not kind:
            return print("null", flush=True)
        other = kind[0](net)
        if check:
            short = inputs[:, -300:].copy()
            found = other.gradient(short, classes)
            for name, g in learner(mf, net, rule, threads).gradient(short, classes, mode="offline").items():
                away, largest = np.abs(found[name] - g).max(), np.abs(g).max()
                if not away < 1e-3 * largest:
                    sys.exit(f"{who} {rule}: the gradient of {name} is {away:.2g} away, its largest is {largest:.2g}")
            return
        iteration = lambda: other.iteration(inputs, classes)  # noqa: E731
    common.forget_peak()
    before = common.resident()[0]
    print(json.dumps("ready"), flush=True)
    for turn, _ in enumerate(sys.stdin):
        if turn == 0 and who == "PyTorch":  # small products on two threads may lose to one: it keeps what is faster for it
            trials = []
            for count in range(1, threads + 1):
                competitors.torch.set_num_threads(count)
                trials.append((min(common.clock(iteration) for _ in range(2)), count))
            competitors.torch.set_num_threads(min(trials)[1])
        iteration()  # training is one after the other: what others pushed out of the caches is back
        print(json.dumps([common.clock(iteration) / 1e9, common.resident()[1] - before]), flush=True)


def start(flag, key, steps, arguments, **pipes):
    """A worker, which ends with its stdin; Ctrl-C is for this process alone."""
    command = [sys.executable, __file__, flag, *key, str(steps), str(arguments.threads)]
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def measure(steps, arguments, printed, processes):
    """All competitors at one T; fills `processes`."""
    names = [("modprop_fast", rule) for rule in OURS] + OTHERS
    for key in OTHERS:
        processes[key] = start("--check", key, steps, arguments, stdout=subprocess.DEVNULL)
    for key in OTHERS:
        if processes[key].wait():
            sys.exit(f"{' '.join(key)}: failed")
    for key in names:
        processes[key] = start("--worker", key, steps, arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for key in names:
        answer = processes[key].stdout.readline()
        while answer.rstrip() not in ('"ready"', "null", ""):
            print(answer, end="")  # what is not installed
            answer = processes[key].stdout.readline()
        if not answer:
            sys.exit(f"{' '.join(key)}: failed")
        if answer.startswith("null"):
            processes.pop(key).wait()
    growth = {}

    def turn(key):
        process = processes[key]
        time.sleep(0.05)  # the threads of the one before spin for a while
        try:
            process.stdin.write("\n")
            process.stdin.flush()
            seconds, growth[key] = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            sys.exit(f"{' '.join(key)}: failed")
        return [seconds * 1e9]

    for key in processes:  # warm: allocations, compilation
        turn(key)
    began, times = time.perf_counter(), {key: [] for key in processes}
    while len(times["modprop_fast", "exact"]) < arguments.rounds and (
        time.perf_counter() - began < arguments.seconds or len(times["modprop_fast", "exact"]) < 3
    ):
        for key, rounds in common.interleave({key: lambda key=key: turn(key) for key in processes}, 1).items():
            times[key] += rounds
    rows = []
    for who, rule in names:
        row = {"steps": steps, "who": who, "rule": rule}
        if (who, rule) in times:
            figures = common.summary(times[who, rule])
            row |= {"ms": figures["median_us"] / 1e3, "peak_mb": growth[who, rule]}
            row["quartiles_ms"] = [q / 1e3 for q in figures["round_quartiles_us"]]
            row |= {f"over_{name}": common.ratio(times, (who, rule), ("modprop_fast", name)) for name in OURS}
            row["over_jax"] = common.ratio(times, (who, rule), ("JAX", "BPTT"))
        rows.append(row)
        printed.row(steps, who, rule, *(row.get(name) for name in ("ms", "peak_mb", "over_exact", "over_mean", "over_jax")))
    return rows


def main():
    if sys.argv[1:2] in (["--check"], ["--worker"]):
        flag, who, rule, steps, threads = sys.argv[1:]
        common.pin(int(threads))
        return worker(who, rule, int(steps), int(threads), flag == "--check")
    arguments = common.options(
        __doc__, dict(steps=[900], seconds=15.0, rounds=20), threads=(2, "of every competitor", (1, 64)),
        steps=([900, 3600, 14400], f"T, of which the cues are {2 * CUE}", (2 * CUE, 100_000)),
        rounds=(30, "of one iteration each", common.ROUNDS),
        seconds=(120.0, "most time for one T, unless that is under 3 rounds", (0, 10**6)),
    )  # fmt: skip
    common.start(arguments)
    printed = common.Table(
        T="6d", who="<13", rule="<7", ms="9.2f", MB="9.1f", **{"/ exact": "8.2f", "/ mean": "8.2f", "/ JAX": "8.2f"}
    )  # fmt: skip
    rows = []
    for steps in arguments.steps:
        processes = {}
        try:
            rows += measure(steps, arguments, printed, processes)
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
    common.finish(arguments, rows)


if __name__ == "__main__":
    common.run(main)
