"""A spiking population of Brian 2, read out by the engine at every time step: what was the stimulus 30 ms ago?"""

import time

import brian2 as b2
import numpy as np

import modprop_fast as mf

b2.prefs.codegen.target = "numpy"
b2.seed(1)
rng = np.random.default_rng(1)
N, DELAY, SECONDS, TEST = 80, 30, 60, 5  # cells, ms, s, s at either end in which nothing is learned

# Noise with a correlation time of 20 ms: 30 ms ago is mostly unknown now, so the network has to remember.
T, k = 1000 * SECONDS, np.exp(-1 / 20)
noise = rng.normal(size=T) * np.sqrt(1 - k * k)
stimulus = np.zeros((T, 1))
for i in range(1, T):
    stimulus[i] = k * stimulus[i - 1] + noise[i]

b2.defaultclock.dt = 1 * b2.ms
current = b2.TimedArray(stimulus[:, 0], dt=1 * b2.ms)
cells = b2.NeuronGroup(
    N,
    """dv/dt = (bias + gain * current(t) - v) / (10*ms) + 0.2 * xi / sqrt(10*ms) : 1
       dtrace/dt = -trace / (5*ms) : 1  # the filtered spike train
       gain : 1
       bias : 1""",
    threshold="v > 1",
    reset="v = 0; trace += 1",
    method="euler",
)
cells.gain, cells.bias = rng.choice([-1, 1], N), rng.uniform(0.5, 1.5, N)

net = mf.Network(N, 64, 1, types={"E": 0.8, "I": 0.2}, activation="tanh", tau=10.0, dt=1.0, gain=1.2, dtype="float64", rng=rng)
learner = mf.Learner(net, mf.ModProp(0.25), optimizer=mf.SGD(3e-4))
x = cells.variables["trace"].get_value()  # Brian's own array, in place: nothing is copied, nothing converted
losses = np.full(T, np.nan)


@b2.network_operation(dt=1 * b2.ms, when="end")
def readout(t):
    i = round(t / b2.ms)
    if i >= DELAY:
        learner.step(x, target=stimulus[i - DELAY], learn=1000 * TEST <= i < T - 1000 * TEST)
        losses[i] = learner.loss


host = b2.Network(cells)
host.store()
host.run(0.1 * b2.second)
began = time.perf_counter()
host.run(3 * b2.second)
alone = (time.perf_counter() - began) / 3000

host.restore()
host.add(readout)
began = time.perf_counter()
host.run(SECONDS * b2.second)
both = (time.perf_counter() - began) / T

before, after, guess = np.nanmean(losses[: 1000 * TEST]), np.mean(losses[-1000 * TEST :]), stimulus.var() / 2
print(f"{N} spiking cells, {net.n_rec} units: the stimulus of {DELAY} ms ago; guessing its mean costs {guess:.3f}")
print(f"error with learning off: before {before:.3f}, after {after:.3f}")
print(f"host step: {1e6 * alone:.1f} us, with the engine: {1e6 * both:.1f} us")
