"""NEURON's callback at every time step, with pointers gathered into one vector: what was injected 5 ms ago?"""

import time

import numpy as np
from neuron import h

import modprop_fast as mf

h.load_file("stdrun.hoc")
rng = np.random.default_rng(0)
N, DT, DELAY, SECONDS, TEST = 20, 0.05, 5.0, 12, 2  # cells, ms, ms, s, s at either end in which nothing is learned
T, n_test = round(1000 * SECONDS / DT), round(1000 * TEST / DT)

# Noise with a correlation time of 10 ms, injected into passive and active cells of different sizes and signs.
k, noise = np.exp(-DT / 10), rng.normal(size=T)
stimulus = np.zeros((T, 1))
for i in range(1, T):
    stimulus[i] = k * stimulus[i - 1] + np.sqrt(1 - k * k) * noise[i]

cells, clamps, keep = [], [], []
for i in range(N):
    cell = h.Section(name=f"cell{i}")
    cell.L = cell.diam = rng.uniform(15, 25)  # um
    cell.insert("hh" if i % 2 else "pas")
    clamp = h.IClamp(cell(0.5))
    clamp.delay, clamp.dur = 0, 1e9
    current = h.Vector((0.06 if i % 2 else 0.03) + rng.choice([-0.04, 0.04]) * stimulus[:, 0])  # nA
    current.play(clamp._ref_amp, DT)
    cells.append(cell), clamps.append(clamp), keep.append(current)

pointers, voltages = h.PtrVector(N), h.Vector(N)
for i, cell in enumerate(cells):
    pointers.pset(i, cell(0.5)._ref_v)
v = voltages.as_numpy()  # the same memory, float64

net = mf.Network(N, 50, 1, types={"E": 0.8, "I": 0.2}, activation="tanh", tau=5.0, dt=DT, dtype="float64", rng=rng)
learner = mf.Learner(net, mf.ModProp(0.25), optimizer=mf.SGD(3e-4))
losses, late = np.zeros(T), round(DELAY / DT)
x = np.empty(N)


def step():
    i = round(h.t / DT)
    if late <= i < T:
        pointers.gather(voltages)
        np.add(v, 65, out=x)  # mV above rest
        np.divide(x, 50, out=x)
        learner.step(x, target=stimulus[i - late], learn=n_test <= i < T - n_test)
        losses[i] = learner.loss


def simulate(ms):
    """Microseconds per time step."""
    h.dt, h.steps_per_ms = DT, 1 / DT
    h.finitialize(-65)
    began = time.perf_counter()
    h.continuerun(ms)
    return 1e6 * (time.perf_counter() - began) / (ms / DT)


alone = simulate(1000)
h.CVode().extra_scatter_gather(0, step)
both = simulate(1000 * SECONDS)
print(f"{N} cells, {net.n_rec} units: the current of {DELAY:g} ms ago; guessing its mean costs {stimulus.var() / 2:.3f}")
print(f"error with learning off: before {losses[late:n_test].mean():.3f}, after {losses[-n_test:].mean():.3f}")
print(f"host step: {alone:.1f} us, with the engine: {both:.1f} us")
