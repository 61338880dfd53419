"""How far each rule's gradient is from the exact one, along the way of one rule that learns."""

import copy
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import checks
from .compare import Setting, build, extras, run_folder
from .files import write_csv, write_whole
from .learner import Learner
from .rules import BPTT, parse_rule

__all__ = ["align"]

WEIGHTS = ("w_rec", "w_in")
DECREASE = 0.01  # of the loss, to first order, by a probe along the exact gradient: all probes of a look are as long


def align(
    setting: Setting,
    active: str,
    passive: Sequence[str],
    seed: int,
    out: str | os.PathLike[str],
    *,
    descent: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Let the rule `active` learn, and compare all rules' gradients with BPTT's on its weights and batches.

    At every evaluation, for w_rec and for w_in: the cosine of each rule's gradient with the exact one, and the ratio of
    their norms.  With `descent` also whether a small step against each rule's gradient of w_rec and w_in lowers the loss
    on the same batch.  All rules' steps have the length at which the exact gradient's would lower it by 1 %, to first
    order: one that is relative to the weights overshoots where a learned loss is nearly flat.  The weights are put back
    to the bit.

    Parameters
    ----------
    setting : Setting
    active, passive : str, sequence of str
        As for `parse_rule`; the active rule is looked at too.
    seed : int
        The active rule's row is of the learner itself, with its feedback, type means and mean of h; the others' are of
        learners that follow its weights, with feedback drawn by seed and name.
    out : path
        Folder for config.json, align.csv, align.png and, with `descent`, descent.csv.
    descent, progress : bool

    Returns
    -------
    list of dict
        For each rule its median cosines, and with `descent` how often a step lowered the loss, with the 95 % confidence
        interval (Wilson 1927).

    Raises
    ------
    ValueError
        If a rule is unknown, or the folder holds something else.
    FloatingPointError
        If the active rule diverges; what was measured before is kept.
    KeyboardInterrupt
        After Ctrl-C; what was measured before is kept.
    """
    tqdm, plot = extras("align")
    checks.integer("seed", seed, least=0)
    out = Path(out)
    names = list(dict.fromkeys([active, *passive]))
    task, learner, training = build(setting, active, seed, setting.lr)
    network = learner.network
    exact = Learner(network, BPTT(), loss=task.loss, update="apply", threads=1)
    own = {
        name: np.random.default_rng([seed, *name.encode()]) for name in names if name != active
    }  # whatever else is looked at
    lookers = {
        name: Learner(network, parse_rule(name), loss=task.loss, update="apply", threads=1, rng=rng)
        for name, rng in own.items()
    }
    config = {"setting": vars(setting), "active": active, "passive": list(passive), "seed": seed, "descent": descent}
    text = json.dumps(config, indent=2) + "\n"
    path = out / "config.json"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"out: expected a new folder or one of this setting, got {out} of another")
    rows: list[dict[str, Any]] = []
    with run_folder(out, text):
        try:
            _look(setting, task, learner, active, training, exact, lookers, rows, descent, tqdm, progress)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{active} diverged at iteration {learner.iteration}: {error}{_kept(rows, out)}"
            ) from error
        except KeyboardInterrupt:
            at = f"{learner.iteration}{_kept(rows, out)}"
            raise KeyboardInterrupt(f"interrupted at iteration {at}; the same command starts anew") from None
        finally:
            if rows:
                write_csv(out / "align.csv", list(rows[0]), rows)
                write_whole(out / "align.png", lambda file: plot.alignment(file, setting, active, rows))
                summary = _summarise(rows, names, descent)
                if descent:
                    write_csv(out / "descent.csv", list(summary[0]), summary)
    return summary


def _kept(rows: list[dict[str, Any]], out: Path) -> str:
    return f"; what was measured before is kept in {out}" if rows else ""


def _look(
    setting: Setting, task: Any, learner: Learner, active: str, training: np.random.Generator, exact: Learner,
    lookers: dict[str, Learner], rows: list[dict[str, Any]], descent: bool, tqdm: Any, progress: bool,
) -> None:  # fmt: skip
    """Train, and at every evaluation add one row per rule, all rules' or none."""
    for iteration in tqdm(range(setting.iterations + 1), unit="it", disable=not progress):
        trials = task.sample(training, setting.batch)
        look = iteration % setting.every == 0
        grads_of = {active: copy.deepcopy(learner).gradient(*trials, mode="offline")} if look else {}  # what it will learn from
        for name, looker in lookers.items():
            if look or looker._plan.measures_h:
                _, grads_of[name], seen = looker._batch_gradient(*trials, offline=True)
                looker._measure(seen)  # as fit_trials does
        if look:
            true = exact.gradient(*trials, mode="offline")
            loss, found = exact.evaluate(*trials).loss, []
            for name, grads in grads_of.items():
                row = {"rule": name, "iteration": iteration, "loss": loss}
                for weight in WEIGHTS:
                    row[f"cosine_{weight}"], row[f"ratio_{weight}"] = _compare(grads[weight], true[weight])
                if descent:
                    row["lowers"] = _lowers(exact, grads, true, trials, loss)
                found.append(row)
            rows.extend(found)
        if iteration < setting.iterations:
            learner.fit_trials(*trials)
            for looker in lookers.values():
                looker.iteration = learner.iteration
                if looker._plan.refresh_every > 1:
                    looker._follow_update()


def _summarise(rows: list[dict[str, Any]], names: Sequence[str], descent: bool) -> list[dict[str, Any]]:
    summary = []
    for name in names:
        mine = [row for row in rows if row["rule"] == name]
        found: dict[str, Any] = {"rule": name}
        for weight in WEIGHTS:
            for what in ("cosine", "ratio"):
                values = [row[f"{what}_{weight}"] for row in mine if not math.isnan(row[f"{what}_{weight}"])]
                found[f"{what}_{weight}"] = round(float(np.median(values)), 3) if values else math.nan
        if descent:
            probes = [row["lowers"] for row in mine if row["lowers"] is not None]
            found["lowers"] = round(float(np.mean(probes)), 3) if probes else math.nan
            found["low"], found["high"] = _wilson(sum(probes), len(probes))
            found["probes"] = len(probes)
        summary.append(found)
    return summary


def _compare(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Cosine of two gradients and |a| / |b|; nan where one is zero or not finite."""
    a, b = a.astype(float).ravel(), b.astype(float).ravel()
    size_a, size_b = np.linalg.norm(a), np.linalg.norm(b)
    if not (0 < size_a < math.inf and 0 < size_b < math.inf):
        return math.nan, math.nan
    return float(a @ b / (size_a * size_b)), float(size_a / size_b)


def _lowers(
    learner: Learner, grads: dict[str, np.ndarray], true: dict[str, np.ndarray], trials: Any, loss: float
) -> bool | None:
    """Whether a small step against the gradient of w_rec and w_in lowers the loss; None where it or the true one is zero."""
    weights = {name: learner.network.weights[name] for name in WEIGHTS}
    before = {name: w.copy() for name, w in weights.items()}
    size, true_size = (
        math.sqrt(sum(float(np.sum(np.square(g[name], dtype=float))) for name in WEIGHTS)) for g in (grads, true)
    )
    if size == 0 or true_size == 0:
        return None
    if not math.isfinite(size):
        return False
    length = DECREASE * loss / true_size
    try:
        for name, w in weights.items():
            w -= (length / size) * grads[name]
        return bool(learner.evaluate(*trials).loss < loss)
    except FloatingPointError:
        return False
    finally:
        for name, w in weights.items():
            w[...] = before[name]
        learner.weights_changed()


def _wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927)."""
    if n == 0:
        return math.nan, math.nan
    middle, half = hits / n + z**2 / (2 * n), z * math.sqrt(hits / n * (1 - hits / n) / n + z**2 / (4 * n**2))
    return round(max(middle - half, 0.0) / (1 + z**2 / n), 3), round((middle + half) / (1 + z**2 / n), 3)
