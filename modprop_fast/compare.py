"""Rules side by side: from the same initial weights, on the same trials, with the same evaluations.

A comparison lives in one folder, in which every file is written whole or not at all:

    config.json        every value it was started with
    runs/RULE-lrX-seedK.json   one finished run: all its evaluations and what it cost
    evaluations.csv    every evaluation of every run
    summary.csv        one row per rule
    baseline.json      what a linear readout of the inputs reaches, where scikit-learn is there
    compare.png        score against iteration, median and interquartile range over seeds

Each seed gives initial weights, training trials and what is random in the rule their own streams, so
that rules of one seed start alike and see the same trials.  Evaluations take the task's validation trials, the last of them
at the end; the test trials are used once, by the final weights.
"""

import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import connection, get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from . import checks
from .files import write_csv, write_whole
from .interrupts import interrupt_blocked, interrupt_noted
from .learner import Learner
from .network import ACTIVATIONS, Network
from .optimizers import Adam, StepDecay
from .rules import parse_rule
from .tasks import TASKS, Task, linear_baseline

__all__ = ["SETTINGS", "Setting", "build", "compare", "run", "summarise"]

IN_A_ROW = 5  # evaluations one after the other that meet the criterion
_SPAWN = get_context("spawn")  # fresh interpreters: forked ones would share locks that a thread may hold
GRID_SEEDS = (1_000_001, 1_000_002)  # on which learning rates are chosen: no seeds of a comparison


def option(default: Any, text: str, **more: Any) -> Any:
    """A field that the command line makes an option of; `more` is what `check_options` asks for."""
    return field(default=default, metadata={"help": text, "type": type(default), **more})


def check_options(config: Any) -> None:
    """Refuse by its name a field out of bounds: integers from `least` (0) on, numbers >= 0, or > 0, words among `choices`."""
    for each in fields(config):
        name, value, about = each.name, getattr(config, each.name), each.metadata
        if about.get("type") is int:
            value = checks.integer(name, value, least=about.get("least", 0))
        elif about.get("type") is float and (value is not None or each.default is not None):
            value = checks.number(name, value, low=0.0, above=about.get("above", False))
        elif "choices" in about:
            checks.choice(name, value, about["choices"])
        object.__setattr__(config, name, value)


@dataclass(frozen=True)
class Setting:
    """What is trained, whatever the rule.

    ``criterion`` is an accuracy to reach, or for mse a loss; it counts once met in five evaluations in a row.
    """

    task: str
    options: dict[str, Any] = field(default_factory=dict)  # of the task
    n_rec: int = option(64, "recurrent units", least=2)
    tau: float = option(10.0, "membrane time constant, in steps")
    activation: str = option("tanh", ", ".join(ACTIVATIONS), choices=ACTIVATIONS)
    signed: bool = False  # E and I units, Dale's law and balanced weights, as in the delayed XOR of Liu et al. 2022
    batch: int = option(32, "trials per update", least=1)
    iterations: int = option(600, "updates of each run", least=1)
    every: int = option(20, "iterations between evaluations, of which compare makes one more at the end", least=1)
    lr: float = option(2e-3, "learning rate of Adam", above=True)
    lr_every: int = option(10**6, "updates after which the learning rate falls to 0.8 of itself", least=1)
    l2: float = option(0.0, "L2 penalty on the weights")
    l1: float = option(0.0, "L1 shrink of recurrent and output weights")
    clip: float | None = option(None, "largest norm of a gradient", type=float, above=True)
    criterion: float = option(0.95, "accuracy, or for mse loss, that counts as learned", above=True)

    def __post_init__(self) -> None:
        known = [each.name for each in fields(TASKS[checks.choice("task", self.task, tuple(TASKS))])]
        for name in self.options:
            checks.choice("options", name, known)
        check_options(self)
        if not self.by_loss:
            checks.number("criterion", self.criterion, low=0.0, high=1.0)

    def make_task(self) -> Task:
        return TASKS[self.task](**self.options)

    @property
    def by_loss(self) -> bool:
        """Whether the score is a loss, of which less is better, and not an accuracy."""
        return TASKS[self.task].loss == "mse"


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
            if iteration % setting.every == 0 or iteration == setting.iterations:
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
    out: str | os.PathLike[str],
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
        If a rule is unknown, or the folder holds a comparison of another setting or a damaged file.
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
    out, lrs = Path(out), list(dict.fromkeys(checks.number("lr", lr, low=0, above=True) for lr in lrs))
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

    chosen = dict.fromkeys(rules, (lrs or [setting.lr])[0])
    total = len(rules) * (seeds + (len(lrs) * len(GRID_SEEDS) if len(lrs) > 1 else 0))
    often = 0.1 if sys.stderr.isatty() else 10.0
    with run_folder(out, config), tqdm(total=total, unit="run", disable=not progress, mininterval=often) as bar:
        if len(lrs) > 1:
            grid = [(rule, seed, lr) for rule in rules for seed in GRID_SEEDS for lr in lrs]
            found = list(_runs(setting, grid, out, jobs, bar))
            chosen = {rule: _best(setting, [r for r in found if r["rule"] == rule], lrs) for rule in rules}
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


@contextmanager
def run_folder(out: Path, config: str, *, exist_ok: bool = True) -> Iterator[None]:
    """Make the folder `out` with its config.json; what was made of these is taken away again if nothing else comes into it."""
    path = out / "config.json"
    new, first = not out.exists(), not path.exists()
    try:
        out.mkdir(parents=True, exist_ok=exist_ok)
    except (FileExistsError, NotADirectoryError):
        if out.is_dir():
            raise FileExistsError(f"out: expected a folder that does not exist (or resume), got {out}") from None
        raise ValueError(f"out: expected a folder, got {out} where there is a file") from None
    write_whole(path, lambda file: file.write(config.encode()))
    try:
        yield
    finally:
        if first and list(out.iterdir()) == [path]:
            path.unlink()
            with suppress(OSError):  # it is where the process is
                if new:
                    out.rmdir()


def _read(path: Path, *names: str) -> dict[str, Any]:
    """What a result file says of these names."""
    try:
        found = json.loads(path.read_text())
        return {name: found[name] for name in names}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"out: expected whole results, got {path} damaged (removed, it is made anew)") from None


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
    return _read(path, "score")["score"]


def _runs(setting: Setting, wanted: list[tuple[str, int, float]], out: Path, jobs: int, bar: Any) -> Iterator[dict[str, Any]]:
    """The wanted runs, those that are on disk first."""
    missing = []
    for rule, seed, lr in wanted:
        path = _path(out, rule, seed, lr)
        if path.exists():
            bar.update()
            found = _read(path, "seed", "lr", "evaluations", "test", "diverged", "seconds", "memory")
            yield found | {"rule": rule}  # which may have been spelt with other spaces
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
                    result, said = receive.recv()
                except EOFError:
                    result, said = (
                        ChildProcessError(
                            f"jobs: the system ended one of {jobs} processes, for want of memory perhaps; every finished run is "
                            f"kept in {out}, and the same command, with fewer jobs, goes on"
                        ),
                        [],
                    )
                process.join()
                if isinstance(result, Exception):  # said when the others that are ready have been kept
                    failed = result
                    continue
                (out / "runs").mkdir(parents=True, exist_ok=True)
                write_whole(_path(out, *each), lambda file, text=json.dumps(result): file.write(text.encode()))
                for category, text in said:
                    warnings.warn(f"{each[0]}: {text}", category, stacklevel=2)
                bar.update()
                yield result
            if failed is not None:
                raise failed
    except KeyboardInterrupt:
        kept = f"; every finished run is kept in {out}, and the same command goes on" if (out / "runs").exists() else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    finally:
        for process, _ in running.values():
            process.terminate()


def _apart(send: Any, setting: Setting, rule: str, seed: int, lr: float) -> None:
    """A run in a process of its own, so that its peak memory is its own; its warnings are the parent's to show."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            result: Any = run(setting, rule, seed, lr)
        except Exception as error:
            result = error
    send.send((result, [(each.category, str(each.message)) for each in caught]))


def _slug(rule: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", rule.lower()).strip("-")


def _path(out: Path, rule: str, seed: int, lr: float) -> Path:
    return out / "runs" / f"{_slug(rule)}-lr{str(lr).removesuffix('.0')}-seed{seed}.json"


def reached(setting: Setting, result: dict[str, Any]) -> tuple[float, float]:
    """(iteration of the first of five evaluations in a row that met the criterion, or inf; share that do from then on)."""
    rows = np.array(result["evaluations"]).reshape(-1, 4)
    apart = np.diff(rows[:, 0])
    if len(apart) and apart[-1] < apart[0]:
        rows = rows[:-1]  # the one at the end, too soon after the one before
    met = rows[:, 2] <= setting.criterion if setting.by_loss else rows[:, 2] >= setting.criterion
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
        scores = [sign * np.mean([row[2] for row in each["evaluations"]]) for each in own if each["diverged"] is None]
        return late, float(np.mean(scores)) if len(scores) == len(own) else math.inf

    return min(lrs, key=cost)


def summarise(setting: Setting, rule: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table: medians over seeds, in which a run that diverged has the worst score, with the interquartile
    range of the iterations (inf: never)."""
    first, stays = np.array([reached(setting, each) for each in results]).T
    worst = (math.inf if setting.by_loss else 0.0,) * 2
    scores = [(each["evaluations"][-1][2], each["test"]) if each["diverged"] is None else worst for each in results]
    score, test = np.median(scores, axis=0).round(4).tolist()
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
        "score": score,
        "test": test,
        "ms_per_iteration": round(1e3 * float(np.median(pace)), 2) if pace else math.nan,
        "memory_mb": round(float(np.median([each["memory"] for each in results])), 1),
        "diverged": sum(each["diverged"] is not None for each in results),
    }


def _peak_memory() -> float:
    """Largest resident size of this process so far, in MB; 0 where the system does not tell."""
    with suppress(OSError):  # ru_maxrss would hold the parent's, from before exec
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3
    return 0.0
