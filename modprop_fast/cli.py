"""The command line: ``modprop-fast train``, ``compare``, ``align``, ``bench`` and ``info``.

Bad input is one sentence on stderr and exit code 2, a training that diverges exit code 1, Ctrl-C or SIGTERM exit code 130.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, checks, core
from .align import DECREASE, align
from .compare import SETTINGS, Setting, _slug, compare
from .learner import _available
from .rules import RULES
from .tasks import TASKS as ALL_TASKS
from .train import TASKS, Config, read_config, train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: that of this process) and return the exit code."""
    if argv is None:
        signal.signal(signal.SIGTERM, _terminated)
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


def _terminated(*_: object) -> None:
    """SIGTERM is Ctrl-C, even where that is ignored, as in the background of a script."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def _fail(error: BaseException, code: int) -> int:
    print("modprop-fast:", " ".join(str(error).split()) or "interrupted", file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    print("modprop-fast: warning:", message, file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # what is not given is not there, so that --resume can tell
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **options)

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


def _add_options(group: Any, kind: type, default: str = "") -> None:
    """An option for each field that says what it is."""
    for field in fields(kind):
        if field.metadata:
            parse, text = field.metadata["type"], field.metadata["help"] + default.format(field.default)
            metavar = {int: "N", float: "X"}.get(parse, "WORD")
            group.add_argument("--" + field.name.replace("_", "-"), type=parse, metavar=metavar, help=text)


def _given(arguments: argparse.Namespace, kind: type) -> dict[str, Any]:
    return {field.name: getattr(arguments, field.name) for field in fields(kind) if field.name in arguments}


def _folder(*words: object) -> Path:
    """Where a run goes that is not told where."""
    name = _slug("-".join(map(str, words)))
    return Path("runs", name if len(name) <= 100 else f"{name[:91]}-{zlib.crc32(name.encode()):08x}")


def _unlike(default: Any, config: Any, *but: str) -> list[str]:
    """What differs from the default, for the name of a folder."""
    usual, own = (vars(each) | vars(each).get("options", {}) for each in (default, config))
    return [f"{name}-{value}" for name, value in own.items() if name not in (*but, "options") and value != usual.get(name)]


# ------------------------------------------------------------ train


def _add_train(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        help="train a network on a task and keep the run",
        description="Train a network on a task. The defaults are the published setting; every 20 iterations the network "
        "is evaluated on a fresh batch.",
        epilog="Exit codes: 0 done, 1 the training diverged, 2 bad input, 130 Ctrl-C (a checkpoint is kept).",
    )
    command.set_defaults(run=_train)
    command.add_argument("task", metavar="TASK", help=f"what is to be learned: {', '.join(TASKS)}")

    _add_options(command.add_argument_group("setting"), Config, " (default {})")
    run = command.add_argument_group("run")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="default runs/TASK-RULE-seedSEED-WHAT-DIFFERS")
    run.add_argument("--resume", action="store_true", help="go on with the run in the folder, with its setting")
    run.add_argument(
        "--until-learned",
        action="store_true",
        help="stop once learned: at the fifth evaluation in a row with accuracy >= 0.95",
    )
    run.add_argument("--threads", type=int, metavar="N", help="threads, which no result depends on (default: all available)")
    run.add_argument("--quiet", action="store_true", help="no progress bar")


def _train(arguments: argparse.Namespace) -> int:
    given, setting = vars(arguments), _given(arguments, Config)
    config = Config(**setting)
    differs = _unlike(Config(), config, "task", "rule", "seed", "iterations")  # resumed, iterations may be others
    out = given.get("out", _folder(config.task, config.rule, f"seed{config.seed}", *differs))
    resume = "resume" in given
    if resume:
        config = replace(read_config(out), **setting)  # train refuses what differs from the checkpoint, by name
    until_learned, threads = "until_learned" in given, given.get("threads")
    try:
        result = train(config, out, resume=resume, until_learned=until_learned, threads=threads, progress="quiet" not in given)
    except KeyboardInterrupt as stop:
        if (out / "checkpoint.npz").exists():  # of then, or an earlier one if it was pressed twice
            said = str(stop) or f"interrupted, the last checkpoint is kept in {out}"
            stop.args = (f"{said}; to go on: {_command(config.task, out, until_learned, threads)}",)
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


def _add_setting(command: argparse.ArgumentParser) -> None:
    command.add_argument("task", metavar="TASK", help=f"what is to be learned: {', '.join(SETTINGS)}")
    setting = command.add_argument_group("setting", "defaults depend on the task, and are kept in config.json")
    _add_options(setting, Setting)
    command.add_argument("--out", type=Path, metavar="FOLDER", help="default runs/COMMAND-TASK-WHAT-DIFFERS from the defaults")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    options = command.add_argument_group("options of the task")
    for name, users in _task_options().items():
        parse = type(getattr(ALL_TASKS[users[0]], name))
        options.add_argument(f"--{name}", type=parse, metavar="N" if parse is int else "WORD", help=", ".join(users))


def _task_options() -> dict[str, list[str]]:
    """Every option that a task has, but its seed, with the tasks that have it."""
    names = dict.fromkeys(field.name for kind in ALL_TASKS.values() for field in fields(kind) if field.name != "seed")
    return {name: [task for task, kind in ALL_TASKS.items() if hasattr(kind, name)] for name in names}


def _setting(arguments: argparse.Namespace) -> Setting:
    default = SETTINGS[checks.choice("task", arguments.task, tuple(SETTINGS))]
    options = dict(default.options)
    for name, users in _task_options().items():
        if name in arguments:
            if arguments.task not in users:
                raise ValueError(f"{name}: expected with {' or '.join(users)} only, got it with {arguments.task}")
            options[name] = getattr(arguments, name)
    return replace(default, **_given(arguments, Setting), options=options)


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
    command.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    setting, given, grid = _setting(arguments), vars(arguments), list(dict.fromkeys(arguments.lr_grid))
    differs = [*_unlike(SETTINGS[setting.task], setting), *["lr-grid", *grid] * bool(grid)]
    out, progress = given.get("out", _folder("compare", setting.task, *differs)), "quiet" not in given
    rows = compare(setting, arguments.rules, arguments.seeds, out, lrs=grid, jobs=arguments.jobs, progress=progress)
    how = "loss <=" if setting.by_loss else "accuracy >="
    print(f"{setting.task}: iterations to {how} {setting.criterion:g} in five evaluations in a row; stays: share of the")
    print("evaluations from then on that meet it; score of the validation trials at the end, test once; one thread a run;")
    print("medians over seeds, of iterations the upper one; memory_mb: by how much a run raised its process's peak")
    print(f"diverged: runs that did, whose {'loss counts as inf' if setting.by_loss else 'accuracy counts as 0'}")
    chosen = "chosen for each rule on two other seeds" if len(grid) > 1 else "the same for all rules, none chosen"
    print(f"learning rates: {', '.join(map(str, grid or [setting.lr]))}, {chosen}")
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
    command.set_defaults(run=_align)


def _align(arguments: argparse.Namespace) -> int:
    setting, given, active, seed = _setting(arguments), vars(arguments), arguments.active, arguments.seed
    words = active, *arguments.passive, f"seed{seed}", "descent" if "descent" in given else ""
    out = given.get("out", _folder("align", setting.task, *_unlike(SETTINGS[setting.task], setting), *words))
    rows = align(setting, active, arguments.passive, seed, out, descent="descent" in given, progress="quiet" not in given)
    print(f"{setting.task}: medians over the way of {active}, seed {seed}, against BPTT")
    if "descent" in given:
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
        except KeyboardInterrupt:  # Ctrl-C has come to it, too, and it says so; SIGTERM has not
            try:
                return process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.terminate()
                raise


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
