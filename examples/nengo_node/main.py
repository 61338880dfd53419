"""A Nengo Node that learns while the model runs: the signal of 200 ms ago, from spikes."""

import time

import nengo
import numpy as np

import modprop_fast as mf

DELAY, SECONDS, TEST = 0.2, 40, 5  # s; TEST at either end, in which nothing is learned
rng = np.random.default_rng(0)
net = mf.Network(1, 64, 1, types={"E": 0.8, "I": 0.2}, activation="tanh", tau=0.05, dt=0.001, dtype="float64", rng=rng)
learner = mf.Learner(net, mf.ModProp(0.25), optimizer=mf.SGD(3e-4))


def recall(t, x):
    """x holds what the ensemble represents now, and the target."""
    return learner.step(x[:1], target=x[1:], learn=TEST <= t < SECONDS - TEST)


def model(node):
    with nengo.Network(seed=0) as out:
        stimulus = nengo.Node(nengo.processes.WhiteSignal(SECONDS, high=2, rms=0.5, seed=1))
        cells = nengo.Ensemble(100, 1)  # spiking LIF neurons
        late = nengo.Node(lambda t, x, past=[0.0] * round(DELAY / 0.001): (past.append(float(x[0])), past.pop(0))[1], size_in=1)
        nengo.Connection(stimulus, cells)
        nengo.Connection(stimulus, late, synapse=None)
        if node:
            readout = nengo.Node(recall, size_in=2, size_out=1)
            nengo.Connection(cells, readout[0], synapse=0.02)
            nengo.Connection(late, readout[1], synapse=None)
            out.y, out.target = nengo.Probe(readout), nengo.Probe(late)
    return out


def seconds_per_step(simulator, steps):
    began = time.perf_counter()
    simulator.run_steps(steps)
    return (time.perf_counter() - began) / steps


with nengo.Simulator(model(node=False), progress_bar=False) as sim:
    sim.run_steps(100)
    alone = seconds_per_step(sim, 5000)
with nengo.Simulator(out := model(node=True), progress_bar=False) as sim:
    both = seconds_per_step(sim, 1000 * SECONDS)
    error = (sim.data[out.y] - sim.data[out.target])[:, 0] ** 2 / 2
    guess = sim.data[out.target].var() / 2
print(f"100 spiking neurons, {net.n_rec} units: the signal of {1000 * DELAY:g} ms ago; guessing its mean costs {guess:.3f}")
n = 1000 * TEST
print(f"error with learning off: before {error[:n].mean():.4f}, after {error[-n:].mean():.4f}")
print(f"host step: {1e6 * alone:.1f} us, with the engine: {1e6 * both:.1f} us")
