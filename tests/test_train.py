"""Runs: what they leave behind, that they go on to the same bits, and that nothing is ever half written."""

import csv
import errno
import io
import os
import signal
from dataclasses import asdict, replace

import numpy as np
import pytest

import modprop_fast.train as module
from modprop_fast import Evaluation, Learner, Network, plot
from modprop_fast.interrupts import interrupt_noted
from modprop_fast.train import Config, Row, TrainResult, build, read_config, train

TINY = Config(delay=10, cue=5, n_rec=12, tau=10.0, batch=4, iterations=50)


DRAW = plot.learning


@pytest.fixture(autouse=True)
def quick_picture(monkeypatch):
    """Half a second per run, and not what is tested here."""
    monkeypatch.setattr(plot, "learning", lambda file, *_: file.write(b"picture"))


def run(config, out, **options) -> TrainResult:
    return train(config, out, progress=False, **options)


def contents(folder):
    """Every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state(folder):
    """All that a run has come to, wall time aside: checkpoint, weights and metrics."""
    with np.load(folder / "checkpoint.npz", allow_pickle=False) as file:
        checkpoint = dict(file)
    del checkpoint["seconds"]
    checkpoint["rows"] = checkpoint["rows"][:, :-1]
    weights = Network.load(folder / "weights.npz").weights
    with open(folder / "metrics.csv", newline="") as file:
        metrics = [row[:-1] for row in csv.reader(file)]
    return checkpoint | {f"saved.{name}": array for name, array in weights.items()}, metrics


def assert_same_state(a, b):
    (arrays, metrics), (other_arrays, other_metrics) = state(a), state(b)
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        assert array.dtype == other_arrays[name].dtype and np.array_equal(array, other_arrays[name]), name
    assert metrics == other_metrics and len(metrics) > 2
    assert np.abs(arrays["learner.optimizer.m.w_rec"]).max() > 0, "nothing was learned"


# ------------------------------------------------------------ configuration


def test_published_network():
    network, learner = build(Config(), np.random.default_rng(0), np.random.default_rng(1))
    assert dict(zip(network.type_names, np.bincount(network.types), strict=True)) == {"E": 97, "I": 23}
    assert (network.w_rec[:, network.types == 0] >= 0).all() and (network.w_rec[:, network.types == 1] <= 0).all()
    assert network.leak == pytest.approx(0.99004983374916805, rel=1e-15) and "b_rec" not in network.weights
    optimizer = learner.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (5e-4, (0.9, 0.999), 1e-8)
    assert (optimizer.l2, optimizer.l1, optimizer.clip) == (5e-4, 0.01, None)
    assert [round(optimizer.schedule(i), 12) for i in (0, 299, 300, 600)] == [1.0, 1.0, 0.8, 0.64]
    assert learner.rule.mu == 0.25 and learner.loss_name == "cross_entropy" and learner.update == "apply"


@pytest.mark.parametrize("n_rec", [2, 3, 12, 121])
def test_every_size_has_both_types(n_rec):
    network, _ = build(replace(TINY, n_rec=n_rec), np.random.default_rng(0), np.random.default_rng(1))
    assert np.bincount(network.types).tolist() == [n_rec - max(1, n_rec // 5 - 1), max(1, n_rec // 5 - 1)]


def test_config_round_trip():
    config = Config(rule="eprop", refresh=7, mu=0, seed=2**40, delay=np.int64(3), l2=1e-17)
    assert Config.from_json(config.to_json()) == config and config != Config()


@pytest.mark.parametrize(
    "bad",
    [
        {"task": "xor"},
        {"rule": "bp"},
        {"factor": "h"},
        {"modulation": "units"},
        {"dtype": "float16"},
        {"refresh": "always"},
        {"refresh": 0},
        {"mu": -0.1},
        {"mu": 1.1},
        {"mu": float("nan")},
        {"tau": -1.0},
        {"dt": 0.0},
        {"lr": 0.0},
        {"lr": float("inf")},
        {"lr_decay": -1.0},
        {"lr_every": 0},
        {"l1": -1.0},
        {"l2": "0.1"},
        {"delay": -1},
        {"cue": 0},
        {"n_rec": 1},
        {"batch": 0},
        {"iterations": 1.5},
        {"seed": -1},
    ],
)
def test_bad_config(bad):
    (name,) = bad
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*got .*") as raised:
        Config(**bad)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"speed": 3}', '{"lr": "fast"}', '{"lr": null}'])
def test_bad_config_file(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^(config|lr): "):
        read_config(tmp_path)


# ------------------------------------------------------------ a run


def test_run_folder(tmp_path):
    out = tmp_path / "a" / "b"
    result = run(TINY, out)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.csv", "weights.npz", "checkpoint.npz", "learning.png"
    }  # fmt: skip
    assert read_config(out) == TINY
    assert (out / "learning.png").read_bytes() == b"picture"
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["0", "20", "40", "50"]
    assert (result.iteration, result.loss, result.accuracy) == (
        50,
        float(rows[-1]["loss"]),
        float(rows[-1]["accuracy"]),
    )
    assert result.out == out and result.learned_at is None and result.learned_from is None
    arrays, _ = state(out)
    assert all(
        np.array_equal(arrays[f"saved.{name}"], arrays[f"weights.{name}"]) for name in ("w_rec", "w_in", "w_out")
    )


@pytest.mark.parametrize("config", [Config(), TINY, Config(rule="eprop")], ids=["published", "tiny", "eprop"])
def test_picture(config):
    file = io.BytesIO()
    DRAW(file, config, [Row(0, 0.7, 0.5, 0, 0.1), Row(20, 0.1, 1.0, 1, 1.0)], learned=20)
    assert file.getvalue().startswith(b"\x89PNG")


def test_looking_does_not_change_learning(tmp_path, monkeypatch):
    run(TINY, tmp_path / "often")
    monkeypatch.setattr(module, "EVALUATE_EVERY", 50)
    run(TINY, tmp_path / "seldom")
    often, seldom = (state(tmp_path / name)[0] for name in ("often", "seldom"))
    assert np.array_equal(often["weights.w_rec"], seldom["weights.w_rec"])
    assert len(often["rows"]) != len(seldom["rows"])


def test_learned_at_the_fifth_in_a_row(tmp_path, monkeypatch):
    accuracies = iter([1.0, 0.95, 0.9, 0.94, 0.95, 1.0, 1.0, 1.0, 0.96, 1.0, 0.5])
    monkeypatch.setattr(Learner, "evaluate", lambda *_: Evaluation(0.1, next(accuracies), np.empty(0)))
    result = run(replace(TINY, iterations=200), tmp_path / "all")
    assert (result.learned_at, result.learned_from, result.iteration, result.accuracy) == (160, 80, 200, 0.5)

    accuracies = iter([1.0, 0.95, 0.9, 0.94, 0.95, 1.0, 1.0, 1.0, 0.96])
    result = run(replace(TINY, iterations=200), tmp_path / "until", until_learned=True)
    assert (result.learned_at, result.iteration, result.accuracy) == (160, 160, 0.96)


def test_the_evaluation_at_the_end_is_not_one_of_five_in_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, "evaluate", lambda *_: Evaluation(0.1, 1.0, np.empty(0)))
    assert run(replace(TINY, iterations=79), tmp_path / "short").learned_at is None
    result = run(replace(TINY, iterations=81), tmp_path / "long")
    assert (result.learned_at, result.learned_from, result.iteration) == (80, 0, 81)


# ------------------------------------------------------------ going on


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"factor": "mean", "refresh": 7},
        {"refresh": "never"},
        {"rule": "eprop"},
        {"rule": "bptt"},
        {"modulation": "cells", "factor": "mean"},
        {"dtype": "float64"},
    ],
    ids=str,
)
def test_resumed_equals_uninterrupted(setting, tmp_path):
    config = replace(TINY, lr_every=25, **setting)
    run(config, tmp_path / "once")
    run(replace(config, iterations=33), tmp_path / "twice")
    result = run(config, tmp_path / "twice", resume=True, threads=1)
    assert result.iteration == 50 and read_config(tmp_path / "twice") == config
    assert_same_state(tmp_path / "once", tmp_path / "twice")


@pytest.mark.parametrize("at", [1, 20, 33])
def test_interrupted_between_updates(at, tmp_path, monkeypatch):
    """Ctrl-C while an update runs: it is finished, then kept."""
    run(TINY, tmp_path / "once")
    fit, calls, handler = Learner.fit_trials, iter(range(1, 100)), signal.getsignal(signal.SIGINT)

    def interrupted(*arguments):
        if next(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return fit(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"iteration {at}, checkpoint"):
        patch.setattr(Learner, "fit_trials", interrupted)
        run(TINY, tmp_path / "twice")
    assert signal.getsignal(signal.SIGINT) is handler
    assert state(tmp_path / "twice")[0]["learner.iteration"] == at
    run(TINY, tmp_path / "twice", resume=True)
    assert_same_state(tmp_path / "once", tmp_path / "twice")


def test_what_is_made_is_evaluated_and_not_taken_back(tmp_path):
    for iterations in (3, 5):
        result = run(replace(TINY, iterations=iterations), tmp_path / "run", resume=iterations == 5)
        rows = state(tmp_path / "run")[0]["rows"]
        assert rows[:, 0].tolist() == [0, iterations] and result.loss == rows[1, 1] != rows[0, 1]
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=r"^iterations: expected an integer >= 5, got 2$"):
        run(replace(TINY, iterations=2), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


def test_finished_run_is_left_alone(tmp_path):
    run(TINY, tmp_path / "run")
    before, _ = state(tmp_path / "run")
    assert run(TINY, tmp_path / "run", resume=True).iteration == 50
    assert all(np.array_equal(array, before[name]) for name, array in state(tmp_path / "run")[0].items())


OTHER = {
    "delay": 11, "cue": 6, "rule": "eprop", "modulation": "cells", "factor": "mean", "refresh": "never", "mu": 0.5, "n_rec": 13,
    "tau": 11.0, "dt": 2.0, "batch": 5, "lr": 1e-3, "lr_decay": 0.5, "lr_every": 7, "l2": 0.0, "l1": 0.0, "seed": 1,
    "dtype": "float64",
}  # fmt: skip


def test_other_configuration_is_refused(tmp_path):
    run(TINY, tmp_path / "run")
    before = contents(tmp_path / "run")
    assert OTHER.keys() == asdict(TINY).keys() - {"task", "iterations"}
    for name, value in OTHER.items():
        with pytest.raises(ValueError, match=f"^{name}: expected .* got {value!r}$"):
            run(replace(TINY, **{name: value}), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_damaged_checkpoint_is_refused(keep, tmp_path):
    run(TINY, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=r"whole checkpoint, got .* cut short or damaged$"):
        run(TINY, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("entry, value", [
    ("weights.w_in", None), ("weights.w_in", np.ones((1, 1))), ("weights.w_rec", np.full((12, 12), np.nan)),
    ("generators", np.array("{}")), ("rows", np.ones(3)), ("learner.iteration", None),
])  # fmt: skip
def test_a_checkpoint_with_another_entry_is_refused(entry, value, tmp_path):
    run(TINY, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.npz"
    with np.load(path) as file:
        state = dict(file)
    state.pop(entry)
    np.savez(path, **state if value is None else state | {entry: value})
    with pytest.raises(ValueError, match="resume: expected a whole checkpoint, got .* damaged"):
        run(TINY, tmp_path / "run", resume=True)
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ValueError, match="resume: expected a whole checkpoint, got .* cut short or damaged"):
        run(TINY, tmp_path / "run", resume=True)


def test_no_or_another_checkpoint_is_refused(tmp_path):
    run(TINY, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.npz"
    os.replace(tmp_path / "run" / "weights.npz", path)
    with pytest.raises(ValueError, match="expected a checkpoint, got another kind of file"):
        run(TINY, tmp_path / "run", resume=True)
    path.unlink()
    with pytest.raises(ValueError, match="expected a checkpoint, got none"):
        run(TINY, tmp_path / "run", resume=True)


def test_existing_folder_is_refused(tmp_path):
    run(TINY, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"^out: expected .* got "):
        run(TINY, tmp_path / "run")
    assert contents(tmp_path / "run") == before


# ------------------------------------------------------------ what goes wrong on the way


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_disk_full(call, tmp_path, monkeypatch):
    """The checkpoint before is left, whole, and leads to the same bits."""
    run(TINY, tmp_path / "once")
    original, saves = getattr(os, call), iter(range(100))

    def full(*arguments):
        if next(saves) >= 4:  # config.json and the three files of iteration 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, call, full)
        run(TINY, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "metrics.csv", "weights.npz", "checkpoint.npz"
    }  # fmt: skip
    assert state(tmp_path / "run")[0]["learner.iteration"] == 0
    run(TINY, tmp_path / "run", resume=True)
    assert_same_state(tmp_path / "once", tmp_path / "run")


@pytest.mark.parametrize("where", ["fit_trials", "evaluate"])
def test_divergence_keeps_the_last_good_checkpoint(where, tmp_path, monkeypatch):
    original, calls = getattr(Learner, where), iter(range(100))
    last = {"fit_trials": 33, "evaluate": 2}[where]

    def diverge(*arguments):
        if next(calls) == last:
            raise FloatingPointError("gradient: expected a finite norm, got inf")
        return original(*arguments)

    monkeypatch.setattr(Learner, where, diverge)
    iteration, kept = {"fit_trials": (33, 20), "evaluate": (40, 20)}[where]
    with pytest.raises(FloatingPointError, match=f"diverged at iteration {iteration}: .* norm, got inf; .* kept in "):
        run(TINY, tmp_path / "run")
    arrays, metrics = state(tmp_path / "run")
    assert arrays["learner.iteration"] == kept and metrics[-1][0] == str(kept)


def test_a_run_that_fails_at_once_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise FloatingPointError("overflow")

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match=r"diverged at iteration 0: overflow$"):
        patch.setattr(Learner, "evaluate", fail)
        run(TINY, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:rho")
def test_a_learning_rate_that_diverges(tmp_path):
    with pytest.raises(FloatingPointError, match=r"diverged at iteration .* expected "):
        run(replace(TINY, lr=1e30), tmp_path / "run")
    arrays, _ = state(tmp_path / "run")
    assert arrays["learner.iteration"] == 0 and all(np.isfinite(array).all() for name, array in arrays.items() if "w_" in name)


def test_ctrl_c_that_is_ignored_stays_ignored():
    """As in the background of a script, whose foreground it is meant for."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt_noted() as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert not interrupted() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
