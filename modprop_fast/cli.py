"""The command line: ``modprop-fast train``, ``compare``, ``align``, ``bench`` and ``info``.

Bad input is one sentence on stderr and exit code 2, a training that diverges exit code 1, Ctrl-C exit code 130.
"""

import argparse
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, checks, core
from .align import DECREASE, align
from .compare import SETTINGS, Setting, compare
from .learner import _available
from .rules import RULES
from .tasks import TASKS as ALL_TASKS
from .train import TASKS, Config, read_config, train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: that of this process) and return the exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            arguments = _parser().parse_args(argv)
            return arguments.run(arguments)
        except FloatingPointError as error:
            return _fail(error, 1)
        except (ValueError, OSError, ImportError, MemoryError) as error:
            return _fail(error, 2)
        except KeyboardInterrupt as stop:
            return _fail(stop, 130)


def _fail(error: BaseException, code: int) -> int:
    print("modprop-fast:", " ".join(str(error).split()) or "interrupted", file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    print("modprop-fast: warning:", message, file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> _Parser:
    parser = _Parser(prog="modprop-fast", description="Causal learning of recurrent networks, one step at a time.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    _add_compare(commands)
    _add_align(commands)
    _add_bench(commands)
    _add_info(commands)
    return parser


# ------------------------------------------------------------ train


def _add_train(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        help="train a network on a task and keep the run",
        description="Train a network on a task. The defaults are the published setting; every 20 iterations the network "
        "is evaluated on a fresh batch.",
        epilog="Exit codes: 0 done, 1 the training diverged, 2 bad input, 130 Ctrl-C (a checkpoint is kept).",
        argument_default=argparse.SUPPRESS,  # what is not given is not there, so that --resume can tell
        allow_abbrev=False,
    )
    command.set_defaults(run=_train)
    command.add_argument("task", metavar="TASK", help=f"what is to be learned: {', '.join(TASKS)}")

    setting = command.add_argument_group("setting")
    for field in fields(Config):
        if field.name == "task":
            continue
        setting.add_argument(
            "--" + field.name.replace("_", "-"),
            type=_whole_or_word if field.name == "refresh" else type(field.default),
            metavar={int: "N", float: "X"}.get(type(field.default), "WORD"),
            help=f"{field.metadata['help']} (default {field.default})",
        )

    run = command.add_argument_group("run")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="run folder (default runs/TASK-RULE-seedSEED)")
    run.add_argument("--resume", action="store_true", help="go on with the run in the folder, with its setting")
    run.add_argument(
        "--until-learned",
        action="store_true",
        help="stop once learned: at the fifth evaluation in a row with accuracy >= 0.95",
    )
    run.add_argument(
        "--threads", type=int, metavar="N", help="threads, which no result depends on (default: all available)"
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar")


def _whole_or_word(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _train(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    setting = {field.name: given[field.name] for field in fields(Config) if field.name in given}
    config = Config(**setting)
    out = given.get("out", Path("runs", f"{config.task}-{config.rule}-seed{config.seed}"))
    resume = "resume" in given
    if resume:
        config = replace(read_config(out), **setting)  # train refuses what differs from the checkpoint, by name
    until_learned, threads = "until_learned" in given, given.get("threads")
    try:
        result = train(
            config, out, resume=resume, until_learned=until_learned, threads=threads, progress="quiet" not in given
        )
    except KeyboardInterrupt as stop:
        if stop.args:  # else it was pressed twice, and no checkpoint was written
            stop.args = (f"{stop}; to go on: {_command(config.task, out, until_learned, threads)}",)
        raise

    learned = f"not learned within {result.iteration} iterations"
    if result.learned_at is not None:
        learned = f"at iteration {result.learned_at}, with five evaluations in a row from {result.learned_from}"
    print(f"run folder  {result.out}")
    print(f"accuracy    {result.accuracy:.3f} on {config.batch} fresh trials, loss {result.loss:.4f}")
    print(f"learned     {learned}")
    print(f"time        {result.seconds:.1f} s, {result.seconds / result.iteration:.3f} s per iteration")
    return 0


def _command(task: str, out: Path, until_learned: bool, threads: int | None) -> str:
    """The command that goes on with a run, called in the way this one was."""
    called_by_name = Path(sys.argv[0]).name.startswith("modprop-fast")
    words = [sys.argv[0]] if called_by_name else [sys.executable, "-m", "modprop_fast"]
    words += ["train", task, "--resume", "--out", str(out)]
    words += ["--until-learned"] * until_learned
    words += [] if threads is None else ["--threads", str(threads)]
    return shlex.join(words)


# ------------------------------------------------------------ compare and align


_RULE_HELP = f"a rule, or rule(option=value, ..): {', '.join(RULES)}; in quotes where it has brackets"


_SETTING_HELP = {
    "n_rec": "recurrent units",
    "tau": "membrane time constant, in steps",
    "activation": "relu, softplus, tanh, sigmoid or identity",
    "batch": "trials per update",
    "iterations": "updates of each run",
    "every": "iterations between evaluations on the validation trials",
    "lr": "learning rate of Adam",
    "lr_every": "updates after which the learning rate falls to 0.8 of itself",
    "l2": "L2 penalty on the weights",
    "l1": "L1 shrink of recurrent and output weights",
    "clip": "largest norm of a gradient",
    "criterion": "accuracy, or for mse loss, that counts as learned",
}


def _add_setting(command: argparse.ArgumentParser) -> None:
    command.add_argument("task", metavar="TASK", help=f"what is to be learned: {', '.join(SETTINGS)}")
    setting = command.add_argument_group("setting", "defaults depend on the task, and are kept in config.json")
    setting.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the task, such as delay=60")
    options = command.add_argument_group("options of the task", "the same as --option NAME=VALUE, for the tasks named")
    for name, users in _task_options().items():
        options.add_argument(
            f"--{name}", dest=f"task_{name}", type=_number_or_word, metavar="X", help=", ".join(users), default=None
        )
    for field in fields(Setting):
        if field.name in _SETTING_HELP:
            kind = field.type if field.type in (int, float, str) else float
            metavar = {int: "N", float: "X"}.get(kind, "WORD")
            name = "--" + field.name.replace("_", "-")
            setting.add_argument(name, type=kind, metavar=metavar, help=_SETTING_HELP[field.name])


def _task_options() -> dict[str, list[str]]:
    """Every option that a task has, but its seed, with the tasks that have it."""
    users: dict[str, list[str]] = {}
    for task, kind in ALL_TASKS.items():
        for field in fields(kind):
            if field.name != "seed":
                users.setdefault(field.name, []).append(task)
    return users


def _number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _setting(arguments: argparse.Namespace) -> Setting:
    default = SETTINGS[checks.choice("task", arguments.task, tuple(SETTINGS))]
    options = dict(default.options)
    for option in arguments.option:
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"option: expected NAME=VALUE, got {option!r}")
        options[name] = _number_or_word(value)
    for name, users in _task_options().items():
        value = getattr(arguments, f"task_{name}")
        if value is not None and arguments.task not in users:
            raise ValueError(f"{name}: expected with {' or '.join(users)} only, got it with {arguments.task}")
        if value is not None:
            options[name] = value
    given = {name: getattr(arguments, name) for name in _SETTING_HELP}
    try:
        setting = replace(default, options=options, **{name: value for name, value in given.items() if value is not None})
        setting.make_task()
    except TypeError as error:
        raise ValueError(f"option: {error}") from None
    for name in ("n_rec", "batch", "iterations", "every"):
        checks.integer(name, getattr(setting, name), least=1)
    return setting


def _add_compare(commands: Any) -> None:
    command = commands.add_parser(
        "compare",
        help="train several rules on a task, side by side over seeds",
        description="Train every rule from the same initial weights on the same trials, and compare. An existing folder "
        "of the same setting is gone on with: finished runs are not repeated.",
    )
    _add_setting(command)
    command.add_argument("--rules", nargs="+", required=True, metavar="RULE", help=_RULE_HELP)
    command.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 .. N-1 (default 5)")
    command.add_argument("--lr-grid", nargs="+", type=float, default=[], metavar="X",
                         help="learning rates of which each rule gets the best on two other seeds")  # fmt: skip
    command.add_argument("--jobs", type=int, default=_available(), metavar="N", help="processes (default: all processors)")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="default runs/compare-TASK")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    setting, out = _setting(arguments), arguments.out or Path("runs", f"compare-{arguments.task}")
    rows = compare(
        setting, arguments.rules, arguments.seeds, out, lrs=arguments.lr_grid, jobs=arguments.jobs, progress=not arguments.quiet
    )
    how = "loss <=" if setting.by_loss else "accuracy >="
    print(f"{setting.task}: iterations to {how} {setting.criterion:g} in five evaluations in a row; stays: share of the")
    print("evaluations from then on that meet it; score of the validation trials at the end, test once; one thread a run;")
    print("medians over seeds, of iterations the upper one; memory_mb: by how much a run raised its process's peak")
    grid = ", ".join(f"{lr:g}" for lr in arguments.lr_grid or [setting.lr])
    one = "the same for all rules, none chosen"
    print(f"learning rates: {grid}{', chosen for each rule on two other seeds' if len(arguments.lr_grid) > 1 else f', {one}'}")
    _table(rows)
    print(f"evaluations, table and figure are in {out}")
    return 0


def _add_align(commands: Any) -> None:
    command = commands.add_parser(
        "align",
        help="compare the gradients of rules with the exact one, along the way of one that learns",
        description="One rule learns, the others look on: cosine and norm of their gradients beside those of BPTT.",
    )
    _add_setting(command)
    command.add_argument("--active", default="bptt", metavar="RULE", help="the rule that learns (default bptt)")
    command.add_argument("--passive", nargs="+", required=True, metavar="RULE", help=_RULE_HELP)
    command.add_argument("--seed", type=int, default=0, metavar="N")
    command.add_argument("--descent", action="store_true", help="measure how often a small step lowers the loss")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="default runs/align-TASK")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_align)


def _align(arguments: argparse.Namespace) -> int:
    setting, out = _setting(arguments), arguments.out or Path("runs", f"align-{arguments.task}")
    rows = align(
        setting, arguments.active, arguments.passive, arguments.seed, out,
        descent=arguments.descent, progress=not arguments.quiet,
    )  # fmt: skip
    print(f"{setting.task}: medians over the way of {arguments.active}, seed {arguments.seed}, against BPTT")
    if arguments.descent:
        print("lowers: share of steps of w_rec and w_in that lower the loss of their own batch, each as long as the exact")
        print(f"gradient's that lowers it by {DECREASE:.0%} to first order; low, high: 95 % confidence interval (Wilson)")
    _table(rows)
    print(f"rows and figure are in {out}")
    return 0


def _table(rows: list[dict[str, Any]]) -> None:
    texts = [[f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    cells = [[*rows[0]], *texts]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]))


# ------------------------------------------------------------ bench


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="measure this machine, the engine and what others would use, in two to three minutes",
        description="The short form of four benchmarks, in a clone of the repository: tables, their JSON and bench.png. "
        "Competitors that are not installed (numba, torch, jax; a C compiler) are named and skipped.",
    )
    command.add_argument("--out", type=Path, default=Path("bench-results"), metavar="FOLDER", help="default bench-results")
    command.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    folders = Path(__file__).resolve().parents[1], Path.cwd()
    script = next((f / "bench" / "run_all.py" for f in folders if (f / "bench" / "run_all.py").exists()), None)
    if script is None:
        raise ValueError(f"bench: expected to run in a clone of the repository, with its bench folder, got {Path.cwd()}")
    with subprocess.Popen([sys.executable, str(script), "--out", str(arguments.out)]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()  # which says so


# ------------------------------------------------------------ info


def _add_info(commands: Any) -> None:
    text = "print version, compiler, instruction set in use and threads"
    commands.add_parser("info", help=text, description=text).set_defaults(run=_info)


def _info(_: argparse.Namespace) -> int:
    isa = core.isa()  # refuses before a line is printed
    print(f"modprop-fast     {__version__}")
    print(f"compiler         {core.compiler()}")
    print(f"instruction set  {isa} (of {', '.join(core.available_isas())})")
    print(f"threads          {_available()}")
    return 0
