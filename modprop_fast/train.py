"""The main job: train a network on a task, watch it learn, and keep what was learned.

A run lives in one folder, in which every file is written whole or not at all:

    config.json      every value the run was started with
    metrics.csv      one row per evaluation
    weights.npz      the network, for Network.load
    checkpoint.npz   all that is needed to go on to the same bits as a run that was never stopped
    learning.png     loss and accuracy against iteration

An evaluation takes one fresh batch, before the update of its iteration; the one at the end, if out of step, takes that of the
next, and a run that goes on does not keep it. Initial weights, training trials, evaluation trials and random feedback each have
their own stream of random numbers, so that looking never changes the learning.
"""

import json
import logging
import math
import os
import sys
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from . import checks
from .compare import IN_A_ROW, check_options, ei_types, extras, option, run_folder
from .files import read_npz, write_npz, write_whole
from .interrupts import interrupt_noted
from .learner import Learner
from .network import Network
from .optimizers import Adam, StepDecay
from .rules import BPTT, EProp, ModProp, Rule
from .tasks import DelayedXOR

__all__ = ["Config", "TrainResult", "build", "read_config", "train"]

log = logging.getLogger(__name__)

TASKS = {"delayed-xor": DelayedXOR}  # of all tasks, those that the setting of Config is for
EVALUATE_EVERY = 20  # iterations, as in the released code
CRITERION = 0.95  # accuracy that counts as learned once reached


def whole_or_word(text: str) -> int | str:
    """What a text on the command line means where both are allowed."""
    return int(text) if text.lstrip("-").isdigit() else text


@dataclass(frozen=True)
class Config:
    """What is trained, and how. The defaults are the published setting of the delayed XOR.

    Each field carries the one sentence that explains it, as ``field.metadata["help"]``; the command line makes its
    options of them. Times of the task are in steps, ``tau`` and ``dt`` in one unit (ms in the paper).

    Raises
    ------
    TypeError, ValueError
        If a value is of another type or out of range; the message names it, what was expected and what came.

    Examples
    --------
    >>> Config.from_json(Config(seed=3).to_json()) == Config(seed=3)
    True
    """

    task: str = "delayed-xor"
    delay: int = option(700, "steps between the two cues")
    cue: int = option(100, "steps of each cue", least=1)
    rule: str = option("modprop", "learning rule: modprop, eprop or bptt", choices=("modprop", "eprop", "bptt"))
    modulation: str = option(
        "types", "modprop: types (means of W over cell types) or cells (W itself, backwards through each trial)",
        choices=("types", "cells"),
    )  # fmt: skip
    factor: str = option("exact", "modprop: postsynaptic factor of the nonlocal term, exact, mean or running")
    refresh: str | int = option(
        "update", "modprop: type means follow the weights at every update, never, or every so many", type=whole_or_word
    )
    mu: float = option(0.25, "modprop: what stands for the activation's derivative in the filter, in [0, 1]")
    n_rec: int = option(120, "recurrent units, about a fifth of them inhibitory", least=2)
    tau: float = option(100.0, "membrane time constant, in ms")
    dt: float = option(1.0, "duration of a step, in ms", above=True)
    batch: int = option(32, "trials per update, and per evaluation", least=1)
    iterations: int = option(3000, "updates to make", least=1)
    lr: float = option(5e-4, "learning rate of Adam", above=True)
    lr_decay: float = option(0.8, "factor on the learning rate after every --lr-every updates", above=True)
    lr_every: int = option(300, "updates between two decays of the learning rate", least=1)
    l2: float = option(5e-4, "L2 penalty on the weights, part of the gradient")
    l1: float = option(0.01, "L1 shrink of recurrent and output weights, after each update")
    seed: int = option(0, "seed of all random numbers of the run")
    dtype: str = option("float32", "precision of weights and arithmetic: float32 or float64", choices=("float32", "float64"))

    def __post_init__(self) -> None:
        checks.choice("task", self.task, tuple(TASKS))
        check_options(self)
        self.make_rule()

    def make_task(self) -> DelayedXOR:
        """The task, with this configuration's durations."""
        return TASKS[self.task](delay=self.delay, cue=self.cue)

    def make_rule(self) -> Rule:
        """The learning rule, with this configuration's variant of it."""
        modprop = ModProp(mu=self.mu, modulation=self.modulation, factor=self.factor, refresh=self.refresh)
        return {"modprop": modprop, "eprop": EProp(), "bptt": BPTT()}[self.rule]

    def to_json(self) -> str:
        """The configuration as a JSON object."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """The configuration that `to_json` wrote; ValueError if the text is not one."""
        try:
            return cls(**json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"config: expected JSON, got {text[:40]!r}") from error
        except TypeError as error:  # an entry that Config does not have, or of another type
            raise ValueError(f"config: {error}") from error


class Row(NamedTuple):
    """One evaluation, a row of metrics.csv."""

    iteration: int  # updates made before it
    loss: float  # mean over the batch, in the unit of the task's loss
    accuracy: float  # fraction of the batch
    streak: int  # evaluations in a row, this one included, that reached CRITERION
    seconds: float  # wall time spent in training so far


@dataclass(frozen=True)
class TrainResult:
    """What came of a run: its folder, its state at the last evaluation, and when the task was learned.

    ``learned_at`` is the iteration at which the criterion was met: the fifth evaluation in a row with accuracy >= 0.95.
    ``learned_from`` is the first of those five, which is what the published numbers (120 to 640) count. Both are None
    if it was not met. ``iteration`` counts the updates made, ``seconds`` the wall time, earlier sessions included.
    """

    out: Path
    iteration: int
    loss: float
    accuracy: float
    learned_at: int | None
    learned_from: int | None
    seconds: float


def build(config: Config, init: Generator, feedback: Generator, threads: int | None = None) -> tuple[Network, Learner]:
    """The network and the learner of a configuration; initial weights and random feedback come from the generators."""
    task = config.make_task()
    network = Network(
        task.n_in, config.n_rec, task.n_out, types=ei_types(config.n_rec), activation="relu", tau=config.tau, dt=config.dt,
        dale={"E": 1, "I": -1}, bias=False, init="signed", dtype=config.dtype, rng=init,
    )  # fmt: skip
    schedule = StepDecay(config.lr_decay, config.lr_every)
    optimizer = Adam(lr=config.lr, l2=config.l2, l1=config.l1, schedule=schedule)
    options = {"loss": task.loss, "optimizer": optimizer, "update": "apply", "threads": threads, "rng": feedback}
    return network, Learner(network, config.make_rule(), **options)


def read_config(out: Path) -> Config:
    """The configuration of the run in folder `out`; ValueError if there is none."""
    path = Path(out) / "config.json"
    try:
        return Config.from_json(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"out: expected the folder of a run to resume, got {out} without config.json") from error


def _in_step(iteration: int) -> bool:
    return iteration % EVALUATE_EVERY == 0


class _Run:
    """All that evolves while a run is trained, with its way into a run folder and back."""

    def __init__(self, config: Config, threads: int | None) -> None:
        streams = np.random.SeedSequence(config.seed).spawn(4)
        init, self.training, self.evaluation, feedback = map(np.random.default_rng, streams)
        self.config, self.task = config, config.make_task()
        self.network, self.learner = build(config, init, feedback, threads)
        self.rows: list[Row] = []
        self.started = perf_counter()

    @property
    def iteration(self) -> int:
        return self.learner.iteration

    @property
    def seconds(self) -> float:
        return perf_counter() - self.started

    @property
    def learned_at(self) -> int | None:
        return next((row.iteration for row in self.rows if row.streak == IN_A_ROW), None)

    @property
    def learned_from(self) -> int | None:
        return None if self.learned_at is None else self.learned_at - (IN_A_ROW - 1) * EVALUATE_EVERY

    @property
    def due(self) -> bool:
        """Whether an evaluation is to be made before the next update, or at the end."""
        evaluated = self.rows and self.rows[-1].iteration == self.iteration
        return not evaluated and (_in_step(self.iteration) or self.iteration == self.config.iterations)

    def evaluate(self) -> None:
        in_step, streak = _in_step(self.iteration), self.rows[-1].streak if self.rows else 0
        trials = self.evaluation if in_step else deepcopy(self.evaluation)  # those to come are what they would have been
        result = self.learner.evaluate(*self.task.sample(trials, self.config.batch))
        loss, accuracy = float(result.loss), result.accuracy
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss: expected a finite number, got {loss}")
        if in_step:
            streak = streak + 1 if accuracy >= CRITERION else 0
        self.rows.append(Row(self.iteration, loss, accuracy, streak, round(self.seconds, 3)))
        log.info("iteration %d: loss %.4g, accuracy %.3f", self.iteration, loss, accuracy)

    def fit(self) -> None:
        self.learner.fit_trials(*self.task.sample(self.training, self.config.batch))

    def save(self, out: Path) -> None:
        """Write checkpoint.npz, metrics.csv and weights.npz, in this order."""
        generators = {"training": self.training.bit_generator.state, "evaluation": self.evaluation.bit_generator.state}
        state = {
            "config": np.array(self.config.to_json()),
            "generators": np.array(json.dumps(generators)),
            "seconds": np.array(self.seconds),
            "rows": np.array(self.rows, dtype=np.float64),
        }
        state.update({f"weights.{name}": array for name, array in self.network.weights.items()})
        state.update({f"learner.{name}": array for name, array in self.learner.state().items()})
        table = [",".join(Row._fields), *(",".join(map(repr, row)) for row in self.rows), ""]
        write_npz(out / "checkpoint.npz", state)
        write_whole(out / "metrics.csv", lambda file: file.write("\n".join(table).encode()))
        self.network.save(out / "weights.npz")

    def restore(self, path: Path) -> None:
        """Take over the state in a checkpoint of the same configuration; only ``iterations`` may differ."""
        state = _read_checkpoint(path)
        saved = asdict(Config.from_json(str(state["config"])))
        for name, value in asdict(self.config).items():
            if name != "iterations" and saved[name] != value:
                raise ValueError(f"{name}: expected {saved[name]!r} as in {path}, got {value!r}")
        try:
            for name in self.network.weights:
                setattr(self.network, name, state[f"weights.{name}"])
            self.learner.restore({key.removeprefix("learner."): state[key] for key in state if key.startswith("learner.")})
            generators = json.loads(str(state["generators"]))
            self.training.bit_generator.state = generators["training"]
            self.evaluation.bit_generator.state = generators["evaluation"]
            rows = [Row(int(row[0]), row[1], row[2], int(row[3]), row[4]) for row in state["rows"].tolist()]
            self.rows = [row for row in rows if _in_step(row.iteration)]
            self.started = perf_counter() - float(state["seconds"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"resume: expected a whole checkpoint, got {path} damaged ({error})") from error


def train(
    config: Config,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    until_learned: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train as `config` says and keep the run in the folder `out`.

    Parameters
    ----------
    config : Config
        What to train.
    out : path
        The run folder: a new one, or with `resume` the one to go on with.
    resume : bool
        Go on from the checkpoint in `out`, to the same bits as a run that was never stopped. Of `config`, only
        ``iterations`` may differ from the run's.
    until_learned : bool
        Stop once accuracy >= 0.95 was reached in five evaluations in a row, which are 20 iterations apart.
    threads : int, optional
        Threads over the trials of a batch, by default all that are available; the results do not depend on it.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    TrainResult

    Raises
    ------
    ValueError
        If `threads` is out of range, or the checkpoint is missing, of another configuration, or damaged.
    FileExistsError
        If `out` exists and `resume` is false.
    ModuleNotFoundError
        If matplotlib or tqdm, the extra ``modprop_fast[train]``, is missing.
    FloatingPointError
        If the loss or the gradient overflows; the last checkpoint, of an earlier iteration, is kept.
    KeyboardInterrupt
        After Ctrl-C, once the iteration under way is done and a checkpoint is written. A second Ctrl-C stops at once.
    """
    tqdm, plot = extras("train")
    out = Path(out)
    run = _Run(config, threads)
    if resume:
        run.restore(out / "checkpoint.npz")
        checks.integer("iterations", config.iterations, least=run.iteration)  # those made cannot be taken back

    def finished() -> bool:
        return run.iteration >= config.iterations or (until_learned and run.learned_at is not None)

    often = 0.1 if sys.stderr.isatty() else 10.0  # s: a log file wants fewer lines than a terminal
    shown = {"total": config.iterations, "initial": run.iteration, "unit": "it", "mininterval": often, "disable": not progress}
    with run_folder(out, config.to_json(), exist_ok=resume), tqdm(**shown) as bar, interrupt_noted() as interrupted:
        try:
            while True:
                if run.due:
                    run.evaluate()
                    run.save(out)
                    bar.set_postfix(loss=f"{run.rows[-1].loss:.4f}", accuracy=f"{run.rows[-1].accuracy:.3f}")
                if finished() or interrupted():
                    break
                run.fit()
                bar.update()
        except FloatingPointError as error:
            kept = f"; the last good checkpoint is kept in {out}" if run.rows else ""
            raise FloatingPointError(f"training diverged at iteration {run.iteration}: {error}{kept}") from error
        run.save(out)
        seconds = run.seconds
        write_whole(out / "learning.png", lambda file: plot.learning(file, config, run.rows, run.learned_from))

    if not finished():
        raise KeyboardInterrupt(f"interrupted at iteration {run.iteration}, checkpoint written to {out}")
    last = run.rows[-1]
    return TrainResult(out, run.iteration, last.loss, last.accuracy, run.learned_at, run.learned_from, seconds)


def _read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint; ValueError if it is missing, cut short or something else."""
    try:
        state = read_npz(path)
    except FileNotFoundError as error:
        raise ValueError(f"resume: expected a checkpoint, got none at {path}") from error
    except ValueError as error:
        raise ValueError(f"resume: expected a whole checkpoint, got {path} cut short or damaged") from error
    if not state.keys() >= {"config", "generators", "seconds", "rows"}:
        raise ValueError(f"resume: expected a checkpoint, got another kind of file at {path}")
    return state
