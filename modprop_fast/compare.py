"""Rules side by side: from the same initial weights, on the same trials, with the same evaluations.

A comparison lives in one folder, in which every file is written whole or not at all:

    config.json        every value it was started with
    runs/RULE-lrX-seedK.json   one finished run: all its evaluations and what it cost
    evaluations.csv    every evaluation of every run
    summary.csv        one row per rule
    baseline.json      what a linear readout of the inputs reaches, where scikit-learn is there
    compare.png        score against iteration, median and interquartile range over seeds

Each seed gives initial weights, training trials and what is random in the rule their own streams, so
that rules of one seed start alike and see the same trials.  Evaluations take the task's validation trials; the test
trials are used once, by the final weights.
"""

import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import connection, get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from . import checks
from .files import write_csv, write_whole
from .interrupts import interrupt_blocked, interrupt_noted
from .learner import Learner
from .network import Network
from .optimizers import Adam, StepDecay
from .rules import parse_rule
from .tasks import TASKS, Task, linear_baseline

__all__ = ["SETTINGS", "Setting", "build", "compare", "run", "summarise"]

IN_A_ROW = 5  # evaluations one after the other that meet the criterion
_SPAWN = get_context("spawn")  # fresh interpreters: forked ones would share locks that a thread may hold
GRID_SEEDS = (1_000_001, 1_000_002)  # on which learning rates are chosen: no seeds of a comparison


@dataclass(frozen=True)
class Setting:
    """What is trained, whatever the rule.

    ``criterion`` is an accuracy to reach, or for mse a loss; it counts once met in five evaluations in a row.
    """

    task: str
    options: dict[str, Any] = field(default_factory=dict)  # of the task
    n_rec: int = 64
    tau: float = 10.0
    activation: str = "tanh"
    signed: bool = False  # E and I units, Dale's law and balanced weights, as in the delayed XOR of Liu et al. 2022
    batch: int = 32
    iterations: int = 600
    every: int = 20  # iterations between evaluations
    lr: float = 2e-3
    lr_every: int = 10**6  # updates between two decays of the learning rate by 0.8
    l2: float = 0.0
    l1: float = 0.0
    clip: float | None = None
    criterion: float = 0.95

    def make_task(self) -> Task:
        return TASKS[checks.choice("task", self.task, tuple(TASKS))](**self.options)

    @property
    def by_loss(self) -> bool:
        """Whether the score is a loss, of which less is better, and not an accuracy."""
        return self.make_task().loss == "mse"


SETTINGS = {
    "delayed-xor": Setting("delayed-xor", n_rec=120, tau=100.0, activation="relu", signed=True, iterations=1000, lr=5e-4,
                           lr_every=300, l2=5e-4, l1=0.01),
    "pattern": Setting("pattern", {"steps": 100}, batch=1, iterations=600, lr=5e-3, criterion=0.02),
    "cue-accumulation": Setting("cue-accumulation", iterations=400),
    "match-to-sample": Setting("match-to-sample", iterations=600),
    "copy": Setting("copy", {"length": 3, "delay": 5}, iterations=1000, criterion=0.9),
    "digits": Setting("digits", tau=2.0, iterations=400, lr=3e-3, criterion=0.9),
    "mnist1d": Setting("mnist1d", n_rec=100, tau=4.0, batch=64, iterations=1000, criterion=0.35),
    "japanese-vowels": Setting("japanese-vowels", tau=5.0, iterations=200, every=10, lr=3e-3, criterion=0.9),
}  # fmt: skip


def ei_types(n_rec: int) -> dict[str, int]:
    """Excitatory and inhibitory units of so many, as in the code released with Liu et al. 2022: 23 of 120 are inhibitory."""
    inhibitory = max(1, int(0.2 * n_rec) - 1)
    return {"E": n_rec - inhibitory, "I": inhibitory}


def build(setting: Setting, rule: str, seed: int, lr: float) -> tuple[Task, Learner, np.random.Generator]:
    """The task, the learner and the stream of training trials of one run."""
    task = setting.make_task()
    init, training, own = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(3))
    network = Network(
        task.n_in, setting.n_rec, task.n_out, types=ei_types(setting.n_rec),
        activation=setting.activation, tau=setting.tau, dale={"E": 1, "I": -1} if setting.signed else None,
        bias=not setting.signed, init="signed" if setting.signed else "gaussian", rng=init,
    )  # fmt: skip
    optimizer = Adam(lr, l2=setting.l2, l1=setting.l1, clip=setting.clip, schedule=StepDecay(0.8, setting.lr_every))
    learner = Learner(network, parse_rule(rule), loss=task.loss, optimizer=optimizer, update="apply", threads=1, rng=own)
    return task, learner, training


def run(setting: Setting, rule: str, seed: int, lr: float) -> dict[str, Any]:
    """Train one rule on one seed; a run that diverges says where, and ends there."""
    before = _peak_memory()
    task, learner, training = build(setting, rule, seed, lr)
    validation, rows, diverged, seconds = task.validation(), [], None, 0.0
    try:
        for iteration in range(setting.iterations + 1):
            if iteration % setting.every == 0:
                loss, accuracy, _ = learner.evaluate(*validation)
                rows.append((iteration, loss, loss if accuracy is None else accuracy, round(seconds, 3)))
            if iteration < setting.iterations:
                trials = task.sample(training, setting.batch)
                began = perf_counter()
                learner.fit_trials(*trials)
                seconds += perf_counter() - began
        loss, accuracy, _ = learner.evaluate(*task.test())
        test = loss if accuracy is None else accuracy
    except FloatingPointError:
        diverged, test = iteration, math.nan
    return {
        "rule": rule, "seed": seed, "lr": lr, "evaluations": rows, "test": test, "diverged": diverged,
        "seconds": seconds, "memory": max(_peak_memory() - before, 0.0),
    }  # fmt: skip


def compare(
    setting: Setting,
    rules: Sequence[str],
    seeds: int,
    out: Path,
    *,
    lrs: Sequence[float] = (),
    jobs: int = 1,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train every rule on seeds 0 .. seeds-1 and keep everything in the folder `out`.

    Parameters
    ----------
    setting : Setting
    rules : sequence of str
        As for `parse_rule`.
    seeds : int
    out : path
        A new folder, or one of the same setting, whose finished runs are not repeated.
    lrs : sequence of float
        Learning rates from which each rule gets the one that does best on two other seeds; by default all rules
        have the setting's.
    jobs : int
        Processes at a time, each with one thread.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    list of dict, the rows of summary.csv

    Raises
    ------
    ValueError
        If a rule is unknown, or the folder holds a comparison of another setting.
    MemoryError
        If a rule needs more memory than it may take.
    ModuleNotFoundError
        If matplotlib or tqdm, the extra ``modprop_fast[train]``, is missing.
    ChildProcessError
        If the system ended a process, for want of memory perhaps; every finished run is kept.
    KeyboardInterrupt
        After Ctrl-C; every finished run is kept.
    """
    tqdm, plot = extras("compare")
    checks.integer("seeds", seeds, least=1)
    checks.integer("jobs", jobs, least=1)
    lrs = [checks.number("lr", lr, low=0, above=True) for lr in lrs]
    rules = list({_slug(rule): rule for rule in rules}.values())
    if not rules:
        raise ValueError("rules: expected at least one, got none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runs will warn
        for rule in rules:
            build(setting, rule, 0, setting.lr)  # what cannot be built is refused before anything runs
    config = json.dumps(asdict(setting) | {"lrs": lrs}, indent=2) + "\n"
    path = out / "config.json"
    if path.exists() and path.read_text() != config:
        raise ValueError(f"out: expected a new folder or one of this setting, got {out} of another")
    (out / "runs").mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(config.encode()))

    chosen = {rule: setting.lr for rule in rules}
    total = len(rules) * (seeds + (len(lrs) * len(GRID_SEEDS) if len(lrs) > 1 else 0))
    bar = tqdm(total=total, unit="run", disable=not progress, mininterval=0.1 if sys.stderr.isatty() else 10.0)
    with bar:
        if len(lrs) > 1:
            grid = [(rule, seed, lr) for rule in rules for seed in GRID_SEEDS for lr in lrs]
            found = list(_runs(setting, grid, out, jobs, bar))
            chosen = {rule: _best(setting, [r for r in found if r["rule"] == rule], lrs) for rule in rules}
        elif lrs:
            chosen = {rule: lrs[0] for rule in rules}
        wanted = [(rule, seed, chosen[rule]) for seed in range(seeds) for rule in rules]
        finished = list(_runs(setting, wanted, out, jobs, bar))
    finished.sort(key=lambda each: (rules.index(each["rule"]), each["seed"]))
    rows = [
        dict(zip(("iteration", "loss", "score", "seconds"), row, strict=True), rule=each["rule"], seed=each["seed"])
        for each in finished
        for row in each["evaluations"]
    ]
    summary = [summarise(setting, rule, [each for each in finished if each["rule"] == rule]) for rule in rules]
    write_csv(out / "evaluations.csv", ["rule", "seed", "iteration", "loss", "score", "seconds"], rows)
    write_csv(out / "summary.csv", list(summary[0]), summary)
    baseline = _baseline(setting, out / "baseline.json")
    write_whole(out / "compare.png", lambda file: plot.comparison(file, setting, finished, baseline))
    return summary


def extras(user: str) -> tuple[Any, Any]:
    """tqdm's class and our module plot, or one sentence about what is missing."""
    try:
        from tqdm import tqdm

        from . import plot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{user} needs {error.name}: pip install 'modprop_fast[train]'") from error
    return tqdm, plot


def _baseline(setting: Setting, path: Path) -> float | None:
    """Score of a linear readout of the inputs, computed once; None without scikit-learn."""
    if not path.exists():
        try:
            score = linear_baseline(setting.make_task(), np.random.default_rng(0))
        except ModuleNotFoundError:
            return None
        write_whole(path, lambda file: file.write(json.dumps({"score": score}).encode()))
    return float(json.loads(path.read_text())["score"])


def _runs(setting: Setting, wanted: list[tuple[str, int, float]], out: Path, jobs: int, bar: Any) -> Iterator[dict[str, Any]]:
    """The wanted runs, those that are on disk first."""
    missing = []
    for rule, seed, lr in wanted:
        path = _path(out, rule, seed, lr)
        if path.exists():
            bar.update()
            yield json.loads(path.read_text()) | {"rule": rule}  # which may have been spelt with other spaces
        else:
            missing.append((rule, seed, lr))
    if not missing:
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of the processes to come: they share the processors already
    os.environ.setdefault("MKL_NUM_THREADS", "1")
    running: dict[Any, tuple[Any, tuple[str, int, float]]] = {}  # the end of a pipe that a process writes its result into
    try:
        while missing or running:
            while missing and len(running) < jobs:
                each = missing.pop(0)
                receive, send = _SPAWN.Pipe(duplex=False)
                process = _SPAWN.Process(target=_apart, args=(send, setting, *each), daemon=True)
                with interrupt_noted() as interrupted:  # a process that lost its parent while it starts would complain
                    with interrupt_blocked():
                        process.start()
                    send.close()
                    running[receive] = process, each
                if interrupted():
                    signal.raise_signal(signal.SIGINT)
            failed = None
            for receive in connection.wait(list(running)):
                process, each = running.pop(receive)
                try:
                    result = receive.recv()
                except EOFError:
                    result = ChildProcessError(
                        f"jobs: the system ended one of {jobs} processes, for want of memory perhaps; every finished run is "
                        f"kept in {out}, and the same command, with fewer jobs, goes on"
                    )
                process.join()
                if isinstance(result, Exception):  # said when the others that are ready have been kept
                    failed = result
                    continue
                write_whole(_path(out, *each), lambda file, text=json.dumps(result): file.write(text.encode()))
                bar.update()
                yield result
            if failed is not None:
                raise failed
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; every finished run is kept in {out}, and the same command goes on") from None
    finally:
        for process, _ in running.values():
            process.terminate()


def _apart(send: Any, setting: Setting, rule: str, seed: int, lr: float) -> None:
    """A run in a process of its own, so that its peak memory is its own."""
    try:
        send.send(run(setting, rule, seed, lr))
    except Exception as error:
        send.send(error)


def _slug(rule: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", rule.lower()).strip("-")


def _path(out: Path, rule: str, seed: int, lr: float) -> Path:
    return out / "runs" / f"{_slug(rule)}-lr{lr:g}-seed{seed}.json"


def _better(setting: Setting, score: np.ndarray) -> np.ndarray:
    """Whether scores meet the criterion."""
    return score <= setting.criterion if setting.by_loss else score >= setting.criterion


def reached(setting: Setting, result: dict[str, Any]) -> tuple[float, float]:
    """(iteration of the first of five evaluations in a row that met the criterion, or inf; share that do from then on)."""
    rows = np.array(result["evaluations"]).reshape(-1, 4)
    met = _better(setting, rows[:, 2])
    for i in range(len(met) - IN_A_ROW + 1):
        if met[i : i + IN_A_ROW].all():
            return float(rows[i, 0]), 0.0 if result["diverged"] is not None else float(met[i:].mean())
    return math.inf, math.nan


def _best(setting: Setting, found: list[dict[str, Any]], lrs: Sequence[float]) -> float:
    """The learning rate whose runs met the criterion soonest, those that never did last; then by mean score."""
    sign = 1 if setting.by_loss else -1

    def cost(lr: float) -> tuple[float, float]:
        own = [each for each in found if each["lr"] == lr]
        late = sum(min(reached(setting, each)[0], 10.0 * setting.iterations) for each in own)
        scores = [
            math.inf if each["diverged"] is not None else sign * np.mean([row[2] for row in each["evaluations"]])
            for each in own
        ]
        return late, float(np.mean(scores))

    return min(lrs, key=cost)


def summarise(setting: Setting, rule: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table: medians over seeds, with the interquartile range of the iterations (inf: never)."""
    first, stays = np.array([reached(setting, each) for each in results]).T
    last = [each["evaluations"][-1][2] for each in results if each["evaluations"] and each["diverged"] is None]
    updates = [setting.iterations if each["diverged"] is None else each["diverged"] for each in results]
    pace = [each["seconds"] / n for each, n in zip(results, updates, strict=True) if n]
    low, median, high = np.percentile(first, [25, 50, 75], method="higher")
    return {
        "rule": rule,
        "lr": results[0]["lr"],
        "reached": f"{int(np.isfinite(first).sum())}/{len(first)}",
        "iterations": median,
        "q25": low,
        "q75": high,
        "stays": round(float(np.nanmean(stays)), 3) if np.isfinite(stays).any() else math.nan,
        "score": round(float(np.median(last)), 4) if last else math.nan,
        "test": round(float(np.nanmedian([each["test"] for each in results])), 4) if last else math.nan,
        "ms_per_iteration": round(1e3 * float(np.median(pace)), 2) if pace else math.nan,
        "memory_mb": round(float(np.median([each["memory"] for each in results])), 1),
        "diverged": sum(each["diverged"] is not None for each in results),
    }


def _peak_memory() -> float:
    """Largest resident size of this process so far, in MB; 0 where the system does not tell."""
    with suppress(OSError):  # ru_maxrss would hold the parent's, from before exec
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3
    return 0.0
