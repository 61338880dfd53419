"""Comparing rules: alike from the start, resumable, and honest about what diverged."""

import csv
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import modprop_fast.compare as module
from modprop_fast import EProp, Learner, cli
from modprop_fast.align import _lowers, align
from modprop_fast.compare import SETTINGS, _best, build, compare, reached, run, summarise

TINY = replace(SETTINGS["delayed-xor"], options={"delay": 3, "cue": 2}, n_rec=10, tau=3.0, batch=4, iterations=20, every=4)
RULES = ["bptt", "eprop", "uoro", "modprop(mu=auto, factor=running)"]


def files(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}


def evaluations(out):
    with open(out / "evaluations.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_comparison_goes_on_where_it_was_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    compare(TINY, RULES, 2, whole, jobs=2, progress=False)
    compare(TINY, RULES[:2], 1, parts, progress=False)
    before = files(parts)
    assert len(before) == 2
    summary = compare(TINY, RULES, 2, parts, progress=False)
    after = files(parts)
    assert len(after) == 8 and all(after[name] == at for name, at in before.items())
    assert evaluations(parts) == evaluations(whole) and len(evaluations(parts)) == 8 * 6
    assert (parts / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert [row["rule"] for row in summary] == RULES
    with pytest.raises(ValueError, match="out: expected a new folder or one of this setting"):
        compare(replace(TINY, n_rec=11), RULES, 2, parts, progress=False)


def test_all_rules_start_alike_and_see_the_same_trials():
    drawn = []
    for rule in ("bptt", "rflo", "uoro"):  # two of them draw random numbers of their own
        task, learner, training = build(TINY, rule, 3, 1e-3)
        drawn.append([*learner.network.weights.values(), *task.sample(training, 4)[:2]])
    assert all(np.array_equal(a, b) for other in drawn[1:] for a, b in zip(drawn[0], other, strict=True))
    other = build(TINY, "bptt", 4, 1e-3)[1]
    assert not np.array_equal(other.network.w_rec, drawn[0][0])


def test_a_run_that_diverges_is_recorded_and_the_others_finish(tmp_path):
    wild = replace(TINY, lr=1e30, options={"delay": 3, "cue": 2})
    rows = compare(wild, ["bptt", "eprop"], 1, tmp_path / "wild", progress=False)
    assert [row["diverged"] for row in rows] == [1, 1] and rows[0]["reached"] == "0/1"
    assert rows[0]["score"] == rows[0]["test"] == 0 and (tmp_path / "wild" / "compare.png").exists()


@pytest.mark.filterwarnings("ignore:rho")
def test_a_divergence_ends_its_own_run_only(tmp_path, monkeypatch):
    """On seed 1 of one rule the weights are no longer finite from the third update on; all else learns on."""

    class Here:  # in this process, where the patch is
        Pipe = staticmethod(multiprocessing.Pipe)

        class Process:
            def __init__(self, *, target, args, daemon):
                self.start = lambda: target(*args)

            def join(self): ...

    def fit(self, *trials):
        if self.iteration == 3 and isinstance(self.rule, EProp) and self.odd:
            raise FloatingPointError("overflow")
        return honest(self, *trials)

    def odd(setting, rule, seed, lr):
        task, learner, training = build(setting, rule, seed, lr)
        learner.odd = seed == 1
        return task, learner, training

    honest = Learner.fit_trials
    monkeypatch.setattr(module, "_SPAWN", Here)
    monkeypatch.setattr(module, "build", odd)
    monkeypatch.setattr(Learner, "fit_trials", fit)
    bptt, eprop = compare(TINY, ["bptt", "eprop"], 2, tmp_path, progress=False)
    assert (bptt["diverged"], eprop["diverged"]) == (0, 1)
    kept = json.loads((tmp_path / "runs" / f"eprop-lr{TINY.lr:g}-seed0.json").read_text())
    assert eprop["ms_per_iteration"] < 1000 and eprop["score"] == pytest.approx(kept["evaluations"][-1][2] / 2, abs=1e-4)
    broken = json.loads((tmp_path / "runs" / f"eprop-lr{TINY.lr:g}-seed1.json").read_text())
    assert broken["diverged"] == 3 and len(broken["evaluations"]) == 1


def test_the_same_rule_in_other_spelling_is_the_same_rule(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"^modprop\(factor=mean, mu=0.5\): rho"):  # of the process of the run
        compare(TINY, ["modprop(factor=mean, mu=0.5)"], 1, str(tmp_path), progress=False)
    before = files(tmp_path)
    rows = compare(TINY, ["modprop(factor=mean,mu=0.5)", "modprop(factor=mean,mu=0.5)"], 1, tmp_path, progress=False)
    assert [row["rule"] for row in rows] == ["modprop(factor=mean,mu=0.5)"] and files(tmp_path) == before


def test_what_cannot_run_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(MemoryError, match="RTRL: expected at most"):
        compare(replace(TINY, n_rec=1000), ["eprop", "rtrl"], 1, tmp_path / "new", progress=False)
    with pytest.raises(ValueError, match="lr: expected"):
        compare(TINY, ["eprop"], 1, tmp_path / "new", lrs=[-1.0, 1.0], progress=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name, bad", [
    ("task", "xor"), ("options", {"depth": 3}), ("n_rec", 1), ("tau", -1.0), ("activation", "x"), ("batch", 0), ("every", 1.5),
    ("lr", 0.0), ("lr_every", 0), ("l2", math.inf), ("l1", "0"), ("clip", 0.0), ("criterion", math.nan), ("criterion", 1.1),
])  # fmt: skip
def test_bad_setting(name, bad):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*got "):
        replace(TINY, **{name: bad})


def test_a_comparison_that_fails_at_once_leaves_nothing_but_what_was_there(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(module, "_runs", fail)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    for out in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(MemoryError):
            compare(TINY, ["eprop"], 1, out, progress=False)
    assert not (tmp_path / "new").exists() and (tmp_path / "old" / "file").exists()


def test_a_damaged_file_is_named(tmp_path):
    path = module._path(tmp_path, "eprop", 0, TINY.lr)
    path.parent.mkdir()
    for text in ('{"rule": "epr', "[]", '{"rule": "eprop"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"out: expected whole results, got .*{path.name} damaged"):
            compare(TINY, ["eprop"], 1, tmp_path, progress=False)
    (tmp_path / "baseline.json").write_text("{")
    with pytest.raises(ValueError, match=r"got .*baseline.json damaged"):
        module._baseline(TINY, tmp_path / "baseline.json")


def test_every_learning_rate_has_its_file():
    names = [module._path(Path(), "eprop", 0, lr).name for lr in (0.01, 1.0, 0.0123456, 0.01234561)]
    assert names[:2] == ["eprop-lr0.01-seed0.json", "eprop-lr1-seed0.json"] and names[2] != names[3]


def test_a_task_scored_by_its_loss(tmp_path):
    setting = replace(SETTINGS["pattern"], options={"steps": 20}, n_rec=10, iterations=5, every=1000)
    (row,) = compare(setting, ["bptt"], 1, tmp_path, progress=False)
    first, last = evaluations(tmp_path)
    assert (first["iteration"], last["iteration"]) == ("0", "5") and last["loss"] == last["score"]
    assert 0 < float(last["score"]) < float(first["score"]) and row["score"] == round(float(last["score"]), 4) == row["test"]


def test_figure(monkeypatch):
    """Long names leave the axes wide, a readout that solves the task leaves the decades of the rest, and all seeds count."""
    from modprop_fast import plot

    drawn = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    names = [f"modprop(modulation=cells,factor=mean,mu=0.{i})" for i in range(5)]
    results = [fake([0.4, 0.1][: 1 + (seed == 0)], diverged=None if seed == 0 else 9) | {"rule": name, "seed": seed}
               for name in names for seed in range(3)]  # fmt: skip
    plot.comparison(None, SETTINGS["pattern"], results, 1e-28)
    (figure,), (axes,) = drawn, drawn[0].axes
    figure.draw_without_rendering()
    assert axes.get_position().width > 0.55 and axes.get_ylim()[0] > 1e-3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{name} (2 of 3 diverged)" for name in names]
    assert axes.lines[0].get_ydata().tolist() == [0.4, np.inf]


def test_the_linear_baseline_is_computed_once(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    score = module._baseline(TINY, tmp_path / "baseline.json")
    assert 0.3 < score < 0.8
    monkeypatch.setattr(module, "linear_baseline", None)
    assert module._baseline(TINY, tmp_path / "baseline.json") == score

    def missing(*_):
        raise ModuleNotFoundError

    monkeypatch.setattr(module, "linear_baseline", missing)
    assert module._baseline(TINY, tmp_path / "none.json") is None and not (tmp_path / "none.json").exists()


def fake(accuracies, lr=1.0, diverged=None):
    rows = [(10 * i, 0.5, a, 0.1) for i, a in enumerate(accuracies)]
    return {"rule": "x", "evaluations": rows, "diverged": diverged, "test": 0.5, "lr": lr, "seconds": 1.0, "memory": 1.0}


def test_what_counts_as_reached_and_as_staying():
    good, bad = 0.95, 0.94
    assert reached(TINY, fake([bad, good, good, good, good, good, bad, bad])) == (10.0, 5 / 7)
    assert reached(TINY, fake([good] * 4 + [bad] + [good] * 4))[0] == np.inf
    row = summarise(TINY, "x", [fake([good] * 5), fake([bad] * 5), fake([bad] * 5)])
    assert (row["reached"], row["iterations"], row["stays"]) == ("1/3", np.inf, 1.0)
    wild = [fake([good]), fake([good], diverged=1), fake([good], diverged=1)]
    assert summarise(TINY, "x", wild)["score"] == summarise(TINY, "x", wild)["test"] == 0
    assert summarise(SETTINGS["pattern"], "x", wild)["score"] == np.inf
    last = fake([good] * 5)
    last["evaluations"][-1] = (31, 0.5, good, 0.1)  # at the end, which comes too soon to be one of five
    assert reached(TINY, last)[0] == np.inf
    loss = replace(SETTINGS["pattern"], criterion=0.1)
    assert reached(loss, fake([0.3, 0.1, 0.1, 0.1, 0.05, 0.01])) == (10.0, 1.0)
    assert (
        _best(
            TINY, [fake([bad] * 9, 1.0), fake([bad] * 2 + [good] * 7, 2.0), fake([bad] * 4 + [good] * 5, 3.0)], [1.0, 2.0, 3.0]
        )
        == 2.0
    )


def test_learning_rates_are_chosen_on_other_seeds(tmp_path):
    rows = compare(TINY, ["bptt"], 1, tmp_path / "grid", lrs=[1e30, 1e-3, 1e-3], progress=False)
    assert rows[0]["lr"] == 1e-3 and rows[0]["diverged"] == 0
    assert len(files(tmp_path / "grid")) == 2 * 2 + 1


def test_alignment_of_a_rule_with_itself_is_one_and_probes_leave_no_trace(tmp_path):
    passive = ["bptt", "eprop", "modprop(exact_steps=99)"]
    rows = {row["rule"]: row for row in align(TINY, "modprop", passive, 0, tmp_path / "a", descent=True, progress=False)}
    assert rows["bptt"]["cosine_w_rec"] == pytest.approx(1) and rows["bptt"]["ratio_w_in"] == pytest.approx(1)
    assert rows["modprop(exact_steps=99)"]["cosine_w_rec"] == pytest.approx(1, abs=1e-3)
    assert rows["eprop"]["cosine_w_rec"] < 0.999
    assert rows["bptt"]["probes"] == 6 and 0 <= rows["bptt"]["low"] < rows["bptt"]["high"] <= 1
    assert (tmp_path / "a" / "align.png").read_bytes().startswith(b"\x89PNG")
    align(TINY, "modprop", passive, 0, tmp_path / "b", progress=False)
    with open(tmp_path / "a" / "align.csv") as a, open(tmp_path / "b" / "align.csv") as b:
        pairs = list(zip(csv.DictReader(a), csv.DictReader(b), strict=True))
    assert len(pairs) == 4 * 6 and all(one["loss"] == two["loss"] for one, two in pairs)


def test_a_probe_puts_the_weights_back_to_the_bit():
    task, learner, training = build(TINY, "bptt", 0, 1e-3)
    trials = task.sample(training, 8)
    before = {name: w.copy() for name, w in learner.network.weights.items()}
    grads = learner.gradient(*trials, mode="offline")
    loss = learner.evaluate(*trials).loss
    uphill = {name: -g for name, g in grads.items()}
    assert _lowers(learner, grads, grads, trials, loss) is True
    assert _lowers(learner, uphill, grads, trials, loss) is False
    assert _lowers(learner, {name: g * np.nan for name, g in grads.items()}, grads, trials, loss) is False
    assert _lowers(learner, {name: g * 0 for name, g in grads.items()}, grads, trials, loss) is None
    assert all(np.array_equal(before[name], w) for name, w in learner.network.weights.items())
    assert learner.evaluate(*trials).loss == loss


@pytest.mark.parametrize("stop", [FloatingPointError("overflow"), KeyboardInterrupt()])
def test_align_keeps_what_it_measured(stop, tmp_path, monkeypatch):
    def fit(self, *trials):
        if self.iteration == 9:
            raise stop
        return honest(self, *trials)

    honest = Learner.fit_trials
    monkeypatch.setattr(Learner, "fit_trials", fit)
    with pytest.raises(type(stop), match=r"at iteration 9.*what was measured before is kept"):
        align(TINY, "bptt", ["eprop"], 0, tmp_path, descent=True, progress=False)
    assert len((tmp_path / "align.csv").read_text().splitlines()) == 1 + 2 * 3 and (tmp_path / "descent.csv").exists()
    with pytest.raises(ValueError, match="out: expected a new folder"):
        align(TINY, "bptt", ["mdgl"], 0, tmp_path, descent=True, progress=False)
    with pytest.raises(ValueError, match="out: expected a new folder"):  # whose descent.csv would be another's
        align(TINY, "bptt", ["eprop"], 0, tmp_path, progress=False)


def test_ctrl_c_while_a_process_starts_waits_until_it_has_started(tmp_path, monkeypatch):
    def start(self):  # a thread that does not block the signal hears it: the main one is told, whatever it blocks
        thread = threading.Thread(target=lambda: (signal.pthread_sigmask(signal.SIG_SETMASK, ()), signal.raise_signal(signal.SIGINT)))
        thread.start()
        thread.join()
        honest(self)
        started.append(self)

    started, honest = [], module._SPAWN.Process.start
    monkeypatch.setattr(module._SPAWN.Process, "start", start)
    with pytest.raises(KeyboardInterrupt, match="interrupted$"):
        compare(TINY, RULES[:2], 1, tmp_path, progress=False)
    assert len(started) == 1
    started[0].join(20)
    assert started[0].exitcode == -signal.SIGTERM


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_keep_what_is_finished(how, tmp_path):
    out = tmp_path / "stopped"
    words = ["compare", "delayed-xor", "--rules", "eprop", "bptt", "--seeds", "40", "--n-rec", "10", "--iterations", "40"]
    words += ["--delay", "3", "--cue", "2", "--jobs", "1", "--out", str(out)]
    heard = signal.SIG_DFL if how == signal.SIGINT else signal.SIG_IGN  # as a shell's background job does
    process = subprocess.Popen(
        [sys.executable, "-m", "modprop_fast", *words], stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, heard),
    )  # fmt: skip
    until = time.monotonic() + 60
    while time.monotonic() < until and len(list((out / "runs").glob("*.json") if out.exists() else ())) < 2:
        time.sleep(0.05)
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"every finished run is kept" in said and b"Traceback" not in said
    kept = list((out / "runs").iterdir())
    assert len(kept) >= 2 and all(json.loads(path.read_text())["evaluations"] for path in kept)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the process in /proc")
def test_a_process_that_the_system_ends_is_said_and_the_others_stop(tmp_path):
    words = ["compare", "delayed-xor", "--rules", "eprop", "bptt", "--seeds", "40", "--n-rec", "10", "--iterations", "4000"]
    words += ["--delay", "3", "--cue", "2", "--jobs", "2", "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "modprop_fast", *words], stderr=subprocess.PIPE)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def runs():
        return [pid for pid in children.read_text().split() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    until = time.monotonic() + 60
    while time.monotonic() < until and len(runs()) < 2:
        time.sleep(0.05)
    first, second = runs()
    os.kill(int(first), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, 130) and b"the system ended one of 2 processes" in said and b"Traceback" not in said
    assert not Path(f"/proc/{second}").exists() or b"spawn_main" not in Path(f"/proc/{second}/cmdline").read_bytes()


def test_the_command_line(tmp_path, capsys):
    words = "delayed-xor --delay 3 --cue 2 --n-rec 10 --iterations 8 --every 2 --quiet".split()
    once = ["--seeds", "1", "--jobs", "1", "--lr-grid", "1e30", "1e-3", "--out", str(tmp_path / "c")]
    assert cli.main(["compare", *words, "--rules", "eprop", *once]) == 0
    assert "0/1" in capsys.readouterr().out and "eprop,0.001,0/1," in (tmp_path / "c" / "summary.csv").read_text()
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["options"] == {"delay": 3, "cue": 2} and config["lrs"] == [1e30, 1e-3]
    who = ["--active", "eprop", "--passive", "mdgl", "--descent", "--out", str(tmp_path / "d")]
    assert cli.main(["align", *words, *who]) == 0
    assert "lowers" in capsys.readouterr().out
    assert json.loads((tmp_path / "d" / "config.json").read_text())["active"] == "eprop"
    for bad, message in (
        (["compare", "juggling", "--rules", "bptt"], "task: expected one of 'delayed-xor', 'pattern'"),
        (["compare", *words, "--rules", "backprop"], "rule: expected one of 'bptt', 'tbptt'"),
        (["compare", *words, "--rules", "bptt", "--gap", "3"], "gap: expected with cue-accumulation only, got it with delayed"),
        (["compare", *words, "--rules", "bptt", "--batch", "0"], "batch: expected an integer >= 1, got 0"),
    ):
        assert cli.main(bad) == 2
        assert message in capsys.readouterr().err


def test_a_run_measures_itself():
    result = run(TINY, "eprop", 0, 1e-3)
    assert result["diverged"] is None and result["seconds"] > 0 and 0 <= result["test"] <= 1
    assert [row[0] for row in result["evaluations"]] == [0, 4, 8, 12, 16, 20]
