"""The command line: what it prints, and that everything wrong is one sentence and an exit code."""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import modprop_fast
from modprop_fast import Learner, cli, core
from modprop_fast.cli import main
from modprop_fast.compare import SETTINGS
from modprop_fast.train import Config, read_config, train

TINY = "--delay 10 --cue 5 --n-rec 12 --tau 10 --batch 4".split()
TRAIN = ["train", "delayed-xor", *TINY, "--iterations", "30", "--quiet"]
COMPARE = ["compare", "pattern", "--rules", "eprop", "--quiet"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, argv, code=2) -> str:
    """The one sentence on stderr with which `argv` is refused."""
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("modprop-fast: ") and captured.err.count("\n") == 1
    return captured.err.rstrip()


def test_train_ends_with_what_a_person_wants(capsys):
    assert main(TRAIN) == 0
    out, err = capsys.readouterr()
    folder, accuracy, learned, seconds = out.splitlines()
    path = Path("runs", "delayed-xor-modprop-seed0-delay-10-cue-5-n-rec-12-tau-10.0-batch-4")
    assert folder.split() == ["run", "folder", str(path)]
    assert accuracy.startswith("accuracy ") and "on 4 fresh trials" in accuracy
    assert learned == "learned     not learned within 30 iterations"
    assert seconds.startswith("time ") and err == ""
    assert (path / "learning.png").read_bytes().startswith(b"\x89PNG")


def test_every_value_has_an_option(capsys):
    values = {
        "delay": 11, "cue": 6, "rule": "eprop", "modulation": "cells", "factor": "mean", "refresh": 7, "mu": 0.5, "n_rec": 13,
        "tau": 11.0, "dt": 2.0, "batch": 5, "iterations": 3, "lr": 1e-3, "lr_decay": 0.5, "lr_every": 7, "l2": 0.0, "l1": 0.0,
        "seed": 1, "dtype": "float64",
    }  # fmt: skip
    assert values.keys() == {field.name for field in fields(Config)} - {"task"}
    options = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["train", "delayed-xor", *options, "--quiet"]) == 0
    (folder,) = Path("runs").iterdir()
    assert read_config(folder) == Config(**values) and len(folder.name) <= 100

    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and all(f"(default {getattr(Config(), name)})" in text for name in values)


def test_default_folders_are_apart():
    """The README's commands, one after the other; resumed, a run may have more iterations."""
    for words in ([], ["--modulation", "cells", "--factor", "mean"], ["--resume", "--iterations", "2"]):
        assert main(["train", "delayed-xor", "--iterations", "1", "--quiet", *words]) == 0
    names = {"delayed-xor-modprop-seed0", "delayed-xor-modprop-seed0-modulation-cells-factor-mean"}
    assert {path.name for path in Path("runs").iterdir()} == names
    default = SETTINGS["delayed-xor"]
    other = replace(default, options={"delay": 60}, tau=10.0)
    assert cli._unlike(default, default) == [] and cli._unlike(default, other) == ["tau-10.0", "delay-60"]


def test_progress_bar(capsys):
    assert main(TRAIN[:-1]) == 0
    bar = capsys.readouterr().err
    assert "30/30" in bar and "accuracy=" in bar and "loss=" in bar


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for part in (modprop_fast.__version__, core.compiler(), core.isa(), "threads"):
        assert part in out


def test_bench_needs_the_repository(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "modprop_fast" / "cli.py"))
    assert "bench: expected to run in a clone of the repository" in refused(capsys, ["bench"])
    monkeypatch.undo()
    assert (Path(cli.__file__).parents[1] / "bench" / "run_all.py").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "COMMAND"),
        (["teach"], "teach"),
        (["train"], "TASK"),
        (["train", "pattern"], "task: expected one of 'delayed-xor', got 'pattern'"),
        ([*TRAIN, "--speed", "3"], "--speed"),
        ([*TRAIN, "--lr", "fast"], "--lr"),
        ([*TRAIN, "--rule", "bp"], "rule: expected one of 'modprop', 'eprop', 'bptt', got 'bp'"),
        ([*TRAIN, "--mu", "nan"], "mu: expected"),
        ([*TRAIN, "--tau", "-1"], "tau: expected"),
        ([*TRAIN, "--lr", "0"], "lr: expected"),
        ([*TRAIN, "--refresh", "0"], "refresh: expected"),
        ([*TRAIN, "--iterations", "0"], "iterations: expected"),
        ([*TRAIN, "--threads", "0"], "threads: expected"),
        ([*TRAIN, "--resume"], "out: expected the folder of a run to resume"),
        ([*COMPARE, "--criterion", "0"], "criterion: expected a finite number in (0, inf), got 0"),
        ([*COMPARE, "--n-rec", "1"], "n_rec: expected an integer >= 2, got 1"),
        ([*COMPARE, "--lr-every", "0"], "lr_every: expected an integer >= 1, got 0"),
        ([*COMPARE, "--steps", "x"], "--steps"),
        ([*COMPARE, "--steps", "2"], "steps: expected an integer >= 11, got 2"),
        ([*COMPARE, "--seed", "2"], "--seed 2"),
        (["align", "pattern", "--passive", "eprop", "--see", "2"], "--see 2"),
    ],
)
def test_bad_input(argv, named, capsys, tmp_path):
    assert named in refused(capsys, argv)
    assert not list(tmp_path.iterdir())


def test_existing_folder(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    assert "out: expected a folder that does not exist" in refused(capsys, [*TRAIN, "--out", "run"])
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "file").touch()
    for out in ("file", os.path.join("file", "x")):
        assert f"out: expected a folder, got {out} where there is a file" in refused(capsys, [*COMPARE, "--out", out])


def test_resume_takes_the_setting_from_the_folder(capsys):
    assert main([*TRAIN, "--out", "run", "--seed", "3"]) == 0
    capsys.readouterr()
    resume = ["train", "delayed-xor", "--out", "run", "--resume", "--quiet"]
    assert refused(capsys, [*resume, "--tau", "20"]).startswith("modprop-fast: tau: expected 10.0 as in ")
    assert refused(capsys, [*resume, "--seed", "0"]).startswith("modprop-fast: seed: expected 3 as in ")
    assert refused(capsys, [*resume, "--iterations", "20"]) == "modprop-fast: iterations: expected an integer >= 30, got 20"
    assert read_config(Path("run")).iterations == 30
    assert main([*resume, "--iterations", "40", "--threads", "1", "--until-learned", "--seed", "3"]) == 0
    assert "40 iterations" in capsys.readouterr().out
    train(Config(**{**vars(read_config(Path("run")))}), "once", progress=False)
    assert same_weights("run", "once")


def same_weights(a, b) -> bool:
    with np.load(Path(a, "weights.npz")) as one, np.load(Path(b, "weights.npz")) as other:
        return np.any(one["w_rec"]) and all(np.array_equal(one[name], other[name]) for name in one.files)


@pytest.mark.parametrize("missing", ["tqdm", "matplotlib"])
def test_missing_extra(missing, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "modprop_fast.plot", raising=False)
    monkeypatch.delattr(modprop_fast, "plot", raising=False)
    assert "modprop_fast[train]" in refused(capsys, TRAIN)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:rho")
def test_divergence_has_its_own_exit_code(capsys):
    message = refused(capsys, [*TRAIN, "--lr", "1e30", "--out", "run"], code=1)
    assert "diverged at iteration" in message and "checkpoint is kept in run" in message


@pytest.mark.filterwarnings("default")
def test_warning_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(Learner, "_filter", lambda self: (np.full((1, 1), 1.5), 0.0))
    assert main(TRAIN) == 0
    err = capsys.readouterr().err
    assert err.startswith("modprop-fast: warning: rho(K) = 1.5") and err.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(tmp_path):
    """A real SIGINT to a real process; then the very command it printed, to the bits of a run never stopped."""
    config = Config(delay=10, cue=5, n_rec=12, tau=10.0, batch=4, iterations=400)
    train(config, "once", progress=False)
    environment = {**os.environ, "PYTHONPATH": str(Path(modprop_fast.__file__).parents[1])}
    words = [sys.executable, "-m", "modprop_fast", "train", "delayed-xor", *TINY, "--iterations", "400", "--quiet"]
    process = subprocess.Popen(
        [*words, "--out", "a run", "--until-learned", "--threads", "1"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not Path("a run", "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and err.count("\n") == 1, err
    with np.load("a run/checkpoint.npz") as file:
        assert f"interrupted at iteration {file['learner.iteration']}, checkpoint written to a run" in err
        assert file["learner.iteration"] < 400

    command = shlex.split(err.partition("to go on: ")[2])
    assert command[-6:] == ["--resume", "--out", "a run", "--until-learned", "--threads", "1"]
    finished = subprocess.run([*command, "--quiet"], env=environment, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "") and "not learned within 400 iterations" in finished.stdout
    assert same_weights("a run", "once")
