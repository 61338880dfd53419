"""The command line: ``modprop-fast train TASK``, ``modprop-fast bench`` and ``modprop-fast info``.

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

from . import __version__, core
from .learner import _available
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


# ------------------------------------------------------------ bench


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="measure this machine, the engine and what others would use, in about two minutes",
        description="The short form of all benchmarks, in a clone of the repository: tables, their JSON and bench.png. "
        "Competitors that are not installed (numba, torch, jax; a C compiler) are named and skipped.",
    )
    command.add_argument("--out", type=Path, default=Path("bench-results"), metavar="FOLDER", help="default bench-results")
    command.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    script = Path(__file__).resolve().parents[1] / "bench" / "run_all.py"
    if not script.exists():
        raise ValueError(f"bench: expected to run from a clone of the repository, with its bench folder, got {script.parents[1]}")
    return subprocess.run([sys.executable, str(script), "--out", str(arguments.out)]).returncode


# ------------------------------------------------------------ info


def _add_info(commands: Any) -> None:
    text = "print version, compiler, instruction set in use and threads"
    commands.add_parser("info", help=text, description=text).set_defaults(run=_info)


def _info(_: argparse.Namespace) -> int:
    print(f"modprop-fast     {__version__}")
    print(f"compiler         {core.compiler()}")
    print(f"instruction set  {core.isa()} (of {', '.join(core.available_isas())})")
    print(f"threads          {_available()}")
    return 0
