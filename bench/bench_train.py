"""Seconds of one training iteration and its peak memory: delayed XOR at the published setting, two threads.

    python bench/bench_train.py [--steps 900] [--short]

B = 32 trials of T steps, N = 120, tau = 100, relu, cross entropy at the last step; an iteration is the gradient and an
Adam step on the same batch. Every competitor lives in a process of its own (peak resident memory), which first shows that
its gradient is that of the engine (within 1e-3 of the largest), and then, whenever it is its turn, makes two iterations of which
the second is timed; PyTorch takes one thread where that is faster for it. `MB` is the growth of the resident set from
before the first iteration to its peak. Ratios are medians over rounds. `chunk 16` is fit_trials(..., chunk=16), where the
engine has it.
"""

import json
import subprocess
import sys
import time

import common

N, BATCH, TAU, CUE = 120, 32, 100.0, 100
OURS = {"exact": {}, "mean": {"factor": "mean"}, "e-prop": None, "BPTT": None}
CHUNKED = "chunk 16"


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


def worker(who, rule, steps, threads):
    """Check the gradient, then one iteration per line of stdin."""
    import inspect

    import competitors
    import numpy as np

    import modprop_fast as mf

    net, inputs, classes = problem(mf, np, steps)
    ours = learner(mf, net, rule, threads)
    if who in ("modprop_fast", CHUNKED):
        options = {"chunk": 16} if who == CHUNKED else {}
        if not options.keys() <= inspect.signature(ours.fit_trials).parameters.keys():
            return print("null", flush=True)
        iteration = lambda: ours.fit_trials(inputs, classes, **options)  # noqa: E731
    else:
        competitors.load(steps=False, only=who)
        kind = [kind for kind in competitors.TRIALS if (kind.name, kind.rule) == (who, rule)]
        if not kind:
            return print("null", flush=True)
        other = kind[0](net)
        short = inputs[:, -300:].copy()
        expected, found = ours.gradient(short, classes, mode="offline"), other.gradient(short, classes)
        for name, g in expected.items():
            away, largest = np.abs(found[name] - g).max(), np.abs(g).max()
            if not away < 1e-3 * largest:
                sys.exit(f"{who} {rule}: the gradient of {name} is {away:.2g} away, its largest is {largest:.2g}")
        other = kind[0](net)
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


def measure(steps, arguments, printed):
    """All competitors at one T."""
    names = [("modprop_fast", rule) for rule in OURS] + [(CHUNKED, "exact"), (CHUNKED, "mean")]
    names += [("NumPy", "exact"), ("NumPy", "BPTT"), ("PyTorch", "BPTT"), ("JAX", "BPTT")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = {}
    for key in names:
        command = [sys.executable, __file__, "--worker", *key, str(steps), "--threads", str(arguments.threads)]
        processes[key] = subprocess.Popen(command, **pipes)
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
        process.stdin.write("\n")
        process.stdin.flush()
        seconds, growth[key] = json.loads(process.stdout.readline())
        return [seconds * 1e9]

    for key in processes:  # warm: allocations, compilation
        turn(key)
    began, times = time.perf_counter(), {key: [] for key in processes}
    while len(times["modprop_fast", "exact"]) < arguments.rounds and (
        time.perf_counter() - began < arguments.seconds or len(times["modprop_fast", "exact"]) < 3
    ):
        for key, rounds in common.interleave({key: lambda key=key: turn(key) for key in processes}, 1).items():
            times[key] += rounds
    for process in processes.values():
        process.stdin.close()
        process.wait()
    rows = []
    for who, rule in names:
        row = {"steps": steps, "who": who, "rule": rule}
        if (who, rule) in times:
            row |= {"ms": common.summary(times[who, rule])["median_us"] / 1e3, "peak_mb": growth[who, rule]}
            row["quartiles_ms"] = [q / 1e3 for q in common.summary(times[who, rule])["round_quartiles_us"]]
            row |= {f"over_{name}": common.ratio(times, (who, rule), ("modprop_fast", name)) for name in OURS}
            row["over_jax"] = common.ratio(times, (who, rule), ("JAX", "BPTT"))
        rows.append(row)
        printed.row(steps, who, rule, *(row.get(name) for name in ("ms", "peak_mb", "over_exact", "over_mean", "over_jax")))
    return rows


def main():
    if "--worker" in sys.argv:
        who, rule, steps, _, threads = sys.argv[sys.argv.index("--worker") + 1 :]
        common.pin(int(threads))
        return worker(who, rule, int(steps), int(threads))
    arguments = common.options(
        __doc__, dict(steps=[900], seconds=15.0, rounds=20), threads=2, steps=([900, 3600, 14400], "T"),
        rounds=(30, "of one iteration each"), seconds=(120.0, "most time for one T, unless that is under 3 rounds"),
    )  # fmt: skip
    common.start(arguments)
    printed = common.Table(
        T="6d", who="<13", rule="<7", ms="9.2f", MB="9.1f", **{"/ exact": "8.2f", "/ mean": "8.2f", "/ JAX": "8.2f"}
    )  # fmt: skip
    rows = [row for steps in arguments.steps for row in measure(steps, arguments, printed)]
    common.finish(arguments, rows)


if __name__ == "__main__":
    main()
