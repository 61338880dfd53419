"""The picture of a run. The only module that imports matplotlib, which belongs to the extra ``modprop_fast[train]``."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .compare import Setting
from .train import CRITERION, Config, Row

__all__ = ["alignment", "comparison", "learning"]

# The ten ModProp runs that the authors saved with their code (github.com/Helena-Yuhan-Liu/ModProp, bin/results; delayed
# XOR, lr 5e-4). Each run was averaged over the five evaluations around the iteration; low and high are over the runs.
# Columns: iteration, accuracy low / mean / high, loss low / high.
_PUBLISHED = np.array(
    [
        (40, 0.456, 0.504, 0.556, 0.670, 0.709),
        (140, 0.512, 0.721, 0.981, 0.296, 0.696),
        (240, 0.638, 0.891, 1.0, 0.161, 0.685),
        (340, 0.712, 0.957, 1.0, 0.040, 0.525),
        (440, 0.862, 0.972, 1.0, 0.0159, 0.450),
        (540, 0.731, 0.966, 1.0, 0.0103, 0.560),
        (640, 0.925, 0.988, 1.0, 0.0052, 0.366),
        (740, 0.994, 0.999, 1.0, 0.0050, 0.285),
        (940, 1.0, 1.0, 1.0, 0.0038, 0.275),
        (1140, 1.0, 1.0, 1.0, 0.0031, 0.111),
        (1440, 1.0, 1.0, 1.0, 0.0026, 0.083),
        (2940, 1.0, 1.0, 1.0, 0.0022, 0.068),
    ]
)
_PUBLISHED_LEARNED = (120, 240, 640)  # first of five consecutive evaluations >= 0.95: earliest, median, latest

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_INK, _SHADE, _GREY = "#0b5394", "#dcdcdc", "#666666"


def learning(file: BinaryIO, config: Config, rows: Sequence[Row], learned: int | None = None) -> None:
    """Draw loss and accuracy against iteration, as PNG.

    At the published setting the range of the authors' ten runs lies under the curves.

    Parameters
    ----------
    file : binary file
        Where the PNG goes.
    config : Config
        What was run.
    rows : sequence of Row
        The evaluations.
    learned : int, optional
        Iteration to mark as the first of the evaluations that met the criterion.
    """
    iteration = [row.iteration for row in rows]
    end = max([*iteration, 1])
    free = ("rule", "modulation", "factor", "refresh", "iterations", "seed", "dtype")  # all else makes the published setting
    published = replace(Config(), **{name: getattr(config, name) for name in free}) == config
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 4.6), dpi=200, layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        if published:
            end = max(end, _PUBLISHED_LEARNED[-1] + 60)
            _shade(top, bottom)
        line = {"color": _INK, "linewidth": 1.3, "marker": "o", "markersize": 2.2, "label": "this run"}
        top.plot(iteration, [row.loss for row in rows], **line)
        bottom.plot(iteration, [row.accuracy for row in rows], **line)
        for level, name in ((CRITERION, f"{CRITERION:g}"), (config.make_task().chance, "chance")):
            bottom.axhline(level, color=_GREY, linewidth=0.7, linestyle=":", zorder=0)
            bottom.text(1.01, level, name, color=_GREY, fontsize=8, va="center", transform=bottom.get_yaxis_transform())
        if learned is not None:
            for axes in (top, bottom):
                axes.axvline(learned, color=_INK, linewidth=0.8, linestyle="--")
            late = learned > 0.4 * end
            place = {"xy": (learned, 0.07 if late else 0.4), "xycoords": ("data", "axes fraction")}
            place |= {"xytext": (-4 if late else 4, 0), "textcoords": "offset points", "ha": "right" if late else "left"}
            bottom.annotate(f"five in a row ≥ {CRITERION:g}\nfrom {learned}", **place, fontsize=8, color=_INK)
        top.set(yscale="log", ylabel="loss")
        bottom.set(xlim=(0, end), ylim=(0.2, 1.03), xlabel="iteration (one batch each)", ylabel="accuracy")
        rule = f"modprop {config.modulation} {config.factor}" if config.rule == "modprop" else config.rule
        top.set_title(f"{config.task}, {rule}, seed {config.seed}", loc="left", fontsize=9)
        if published:
            bottom.legend(loc="lower right")
        figure.align_ylabels()
        figure.savefig(file, format="png")


def _shade(top: Axes, bottom: Axes) -> None:
    """Lay the range of the published runs under the curves."""
    iteration, low, mean, high, loss_low, loss_high = _PUBLISHED.T
    earliest, median, latest = _PUBLISHED_LEARNED
    for axes, least, most in ((top, loss_low, loss_high), (bottom, low, high)):
        axes.fill_between(iteration, least, most, color=_SHADE, linewidth=0, zorder=0, label="published: ten runs")
    bottom.plot(iteration, mean, color=_GREY, linewidth=1.0, label="published: their mean")
    top.plot([earliest, latest], [0.003, 0.003], color=_GREY, linewidth=1.0, marker="|", markersize=6)
    top.plot([median], [0.003], color=_GREY, marker="o", markersize=3.5, linestyle="none")
    text = f"published: five in a row from {earliest} to {latest}, median {median}"
    top.annotate(text, (earliest, 0.003), (0, 5), textcoords="offset points", color=_GREY, fontsize=8)


_COLOURS = ("#000000", "#0b5394", "#cc4125", "#38761d", "#8e5ea2", "#e69138", "#45818e", "#a64d79", "#7f6000", "#666666")


def comparison(file: BinaryIO, setting: Setting, results: Sequence[dict[str, Any]], baseline: float | None = None) -> None:
    """Draw score against iteration as PNG: for each rule the median over seeds, and the interquartile range.

    A run that diverged is worse than all from then on: lines end where half of the runs have diverged.

    Parameters
    ----------
    file : binary file
        Where the PNG goes.
    setting : Setting
    results : sequence of dict
        What `compare.run` returned.
    baseline : float, optional
        Score of a linear readout of the inputs, a line of its own.
    """
    task, error = setting.make_task(), setting.by_loss
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
        axes = figure.subplots()
        axes.set(xlim=(0, setting.iterations), xlabel="iteration (one batch each)", yscale="log" if error else "linear")
        iteration = [row[0] for row in max((each["evaluations"] for each in results), key=len)]
        for i, rule in enumerate(dict.fromkeys(each["rule"] for each in results)):
            runs = [each["evaluations"] for each in results if each["rule"] == rule]
            score = np.full((len(runs), len(iteration)), np.inf if error else -np.inf)
            for row, evaluations in zip(score, runs, strict=True):
                row[: len(evaluations)] = [each[2] for each in evaluations]
            low, high = np.percentile(score, [25, 75], axis=0, method="nearest")
            diverged = sum(each["diverged"] is not None for each in results if each["rule"] == rule)
            label = rule + f" ({diverged} of {len(runs)} diverged)" * bool(diverged)
            colour, line = _COLOURS[i % len(_COLOURS)], "-" if i < len(_COLOURS) else "--"
            axes.fill_between(iteration, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(iteration, np.median(score, axis=0), color=colour, linewidth=1.2, label=label, linestyle=line)
        levels = {"criterion": setting.criterion, "chance": task.chance}
        if baseline is not None:
            floor = min(axes.get_ylim()[0], setting.criterion) if error else 0.0  # no decades that nothing else is in
            levels[f"linear readout {baseline:.0e}" if baseline < floor else "linear readout"] = max(baseline, floor)
        _levels(axes, levels)
        seeds = len({each["seed"] for each in results})
        axes.set_ylabel("validation loss" if error else "validation accuracy")
        axes.set_title(f"{setting.task}: median and interquartile range of {seeds} seeds", loc="left", fontsize=9)
        _legend(figure, axes)
        figure.savefig(file, format="png")


def _levels(axes: Axes, levels: dict[str, float]) -> None:
    """Dotted lines; names whose lines would lie on one another share a text."""
    at: Any = np.log if axes.get_yscale() == "log" else float
    least, most = map(at, (min([axes.get_ylim()[0], *levels.values()]), max([axes.get_ylim()[1], *levels.values()])))
    texts: list[tuple[float, str]] = []
    for name, level in sorted(levels.items(), key=lambda each: each[1]):
        axes.axhline(level, color=_GREY, linewidth=0.7, linestyle=":", zorder=0)
        if texts and at(level) - at(texts[-1][0]) < 0.04 * (most - least):
            texts[-1] = texts[-1][0], f"{texts[-1][1]}, {name}"
        else:
            texts.append((level, name))
    for level, text in texts:
        axes.text(1.01, level, text, color=_GREY, fontsize=8, va="center", transform=axes.get_yaxis_transform())


def _legend(figure: Figure, axes: Axes) -> None:
    """The rules below all axes, in as many columns as fit; the figure grows by them."""
    labels = axes.get_legend_handles_labels()[1]
    columns = max(1, 100 // (8 + max(map(len, labels))))
    figure.set_figheight(figure.get_figheight() + 0.16 * math.ceil(len(labels) / columns))
    figure.legend(loc="outside lower left", ncols=columns)


def alignment(file: BinaryIO, setting: Setting, active: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draw cosine and norm ratio with the exact gradient of w_rec against iteration, as PNG.

    Parameters
    ----------
    file : binary file
        Where the PNG goes.
    setting : Setting
    active : str
        The rule that learned.
    rows : sequence of dict
        Those of align.csv.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.6), dpi=200, layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        for i, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
            mine = [row for row in rows if row["rule"] == rule]
            for axes, what in zip(panels, ("cosine_w_rec", "ratio_w_rec"), strict=True):
                axes.plot(
                    [row["iteration"] for row in mine], [row[what] for row in mine], color=_COLOURS[i % len(_COLOURS)],
                    linewidth=1.1, label=rule if axes is panels[0] else None,
                )  # fmt: skip
        panels[0].set(ylabel="cosine with BPTT, w_rec")
        panels[1].set(ylabel="norm / norm of BPTT, w_rec", xlabel="iteration (one batch each)", yscale="log")
        panels[0].set_title(f"{setting.task}: gradients along the way of {active}", loc="left", fontsize=9)
        _legend(figure, panels[0])
        figure.savefig(file, format="png")
