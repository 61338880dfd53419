"""Time of a learned step against the number of recurrent connections: all N x N passed over, or the connections alone.

    python bench/bench_sparse.py [--sizes 512 2048] [--densities 1 0.2 0.1 0.05 0.01] [--short]

Microseconds per step of Learner.run, medians of rounds in which all take their turn: `all` and `packed` are the two
paths of the engine on the same network with a mask, which it chooses between by itself (`chosen`); `ratio` is the first by the
second, round by round.  The exponents are slopes in log-log of the second against the number of connections, for each N and
over all points.
"""

import common


def main():
    arguments = common.options(
        __doc__, dict(sizes=[512], densities=[0.2, 0.05], rounds=5),
        sizes=([512, 2048], "recurrent units", common.SIZES),
        densities=([1.0, 0.2, 0.1, 0.05, 0.01], "of connections", (1e-6, 1)), rounds=(20, "for the times", common.ROUNDS),
    )  # fmt: skip
    common.start(arguments)
    import competitors
    import numpy as np

    import modprop_fast as mf
    from modprop_fast import core

    rules = competitors.rules(mf)
    rng = np.random.default_rng(0)
    xs, targets = (rng.normal(size=(4000, 2)).astype(np.float32) for _ in range(2))
    limits = core.SPARSE

    def made(n, density, rule, limit):
        """A round of one learner, whether it keeps connections alone, its network."""
        core.SPARSE = limit
        rng = np.random.default_rng(n)
        mask = rng.random((n, n)) < density
        net = competitors.network(mf, n, rng, mask=mask)
        learner = mf.Learner(net, rule, optimizer=mf.SGD(competitors.LR / n), threads=1)
        steps = int(min(max(4e6 / n / n, 16), len(xs)))
        learner.run(xs[:steps], targets[:steps])
        return lambda: [common.clock(learner.run, xs[:steps], targets[:steps]) / steps], learner._engine.sparse, net

    rows = []
    form = {"N": "6d", "rule": "<7", "density": "8.2f", "connections": "12d"}
    printed = common.Table(**form, all="10.1f", packed="10.1f", ratio="6.2f", chosen="<6")
    for rule_name, rule in rules.items():
        points = {}
        for n in arguments.sizes:
            entries, about = {}, {}
            for density in arguments.densities:
                entries["all", density] = made(n, density, rule, dict.fromkeys(limits, (0, 0)))[0]
                entries["packed", density], _, net = made(n, density, rule, dict.fromkeys(limits, (0, 2)))
                about[density] = made(n, density, rule, limits)[1], int(net.connections.sum())
            times = common.interleave(entries, arguments.rounds)
            for density, (sparse, count) in about.items():
                spread = {path: common.summary(times[path, density]) for path in ("all", "packed")}
                found = {path: figures["median_us"] for path, figures in spread.items()}
                found["ratio"] = common.ratio(times, ("all", density), ("packed", density))
                points[n, count] = found["packed"]
                row = {"N": n, "rule": rule_name, "density": density, "connections": count}
                row |= found | {"chosen": "packed" if sparse else "all"}
                printed.row(*row.values())
                rows.append(row | {f"{path}_quartiles": figures["round_quartiles_us"] for path, figures in spread.items()})
        of = {str(n): [p for p in points if p[0] == n and p[1]] for n in arguments.sizes} | {"all": [p for p in points if p[1]]}
        slopes = {n: common.exponent([p[1] for p in at], [points[p] for p in at]) for n, at in of.items()}
        rows.append({"rule": rule_name, "exponents": slopes})
        slopes = {n: "-" if slope is None else f"{slope:.2f}" for n, slope in slopes.items()}
        print(f"       {rule_name}: exponent", ", ".join(f"{slope} ({n} N)" for n, slope in slopes.items()))
    common.finish(arguments, rows)


if __name__ == "__main__":
    common.run(main)
