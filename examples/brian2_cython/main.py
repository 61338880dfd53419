"""The engine inside Brian 2's own Cython code: a user function that cimports the step, with no Python on the way."""

import shutil
import sys
import sysconfig
import time
from pathlib import Path

import brian2 as b2
import numpy as np

import modprop_fast as mf

compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
if not shutil.which(compiler):
    print(f"skipped: this machine lacks the compiler {compiler}")
    sys.exit(77)
b2.prefs.codegen.target = "cython"
b2.prefs.codegen.cpp.include_dirs = [mf.get_include()]
b2.prefs.codegen.runtime.cython.cache_dir = str(Path(__file__).with_name("build"))
b2.seed(1)
rng = np.random.default_rng(1)
N, DELAY, SECONDS, TEST = 80, 30, 60, 5  # cells, ms, s, s at either end in which nothing is learned

# Noise with a correlation time of 20 ms: 30 ms ago is mostly unknown now, so the network has to remember.
T, k = 1000 * SECONDS, np.exp(-1 / 20)
noise = rng.normal(size=T) * np.sqrt(1 - k * k)
stimulus = np.zeros(T)
for n in range(1, T):
    stimulus[n] = k * stimulus[n - 1] + noise[n]

net = mf.Network(N, 64, 1, types={"E": 0.8, "I": 0.2}, activation="tanh", tau=10.0, dt=1.0, gain=1.2, dtype="float64", rng=rng)
learner = mf.Learner(net, mf.ModProp(0.25), optimizer=mf.SGD(3e-4))
losses = np.zeros(T)
shared = {  # C arrays of the function below, by name
    "_engine": np.array([id(learner), 0, 0]),  # the Learner, its handle, steps so far
    "_engine_x": np.zeros(N),
    "_engine_y": np.zeros(1),
    "_engine_loss": losses,
}


@b2.implementation(
    "cython",
    """
from modprop_fast.core cimport MPF_OK, mpf_adopt, mpf_last_error, mpf_learner, mpf_loss, mpf_step

cdef double engine_step(int i, double trace, double target, int learn) except? -1:
    # Brian calls it cell by cell; with the last one the network makes its step.
    cdef mpf_learner *handle = <mpf_learner *><size_t>_namespace_engine[1]
    _namespace_engine_x[i] = trace
    if i < NUMBER - 1:
        return 0
    if handle == NULL:
        if mpf_adopt(<void *><size_t>_namespace_engine[0], &handle) != MPF_OK:
            raise RuntimeError(mpf_last_error().decode())
        _namespace_engine[1] = <size_t>handle
    if (mpf_step(handle, _namespace_engine_x, NUMBER * sizeof(double), &target, sizeof(double), learn, _namespace_engine_y,
                 sizeof(double)) != MPF_OK
            or mpf_loss(handle, &_namespace_engine_loss[_namespace_engine[2]]) != MPF_OK):
        raise RuntimeError(mpf_last_error().decode())
    _namespace_engine[2] += 1
    return _namespace_engine_y[0]
""".replace("NUMBER", str(N)),
    namespace=shared,
)
@b2.check_units(i=1, trace=1, target=1, learn=1, result=1)
def engine_step(i, trace, target, learn):
    raise NotImplementedError


b2.defaultclock.dt = 1 * b2.ms
current = b2.TimedArray(stimulus, dt=1 * b2.ms)
late = b2.TimedArray(np.roll(stimulus, DELAY), dt=1 * b2.ms)
cells = b2.NeuronGroup(
    N,
    """dv/dt = (bias + gain * current(t) - v) / (10*ms) + 0.2 * xi / sqrt(10*ms) : 1
       dtrace/dt = -trace / (5*ms) : 1  # the filtered spike train
       gain : 1
       bias : 1
       y : 1  # readout of the engine, that of the last cell""",
    threshold="v > 1",
    reset="v = 0; trace += 1",
    method="euler",
)
cells.gain, cells.bias = rng.choice([-1, 1], N), rng.uniform(0.5, 1.5, N)
host = b2.Network(cells)
host.store()


def seconds_per_step(steps):
    host.run(0 * b2.ms)  # compiles
    began = time.perf_counter()
    host.run(steps * b2.ms)
    return (time.perf_counter() - began) / steps


alone = seconds_per_step(T // 2)
host.restore()
inside = f"t >= {TEST}*second and t < {SECONDS - TEST}*second"
readout = cells.run_regularly(f"y = engine_step(i, trace, late(t), int({inside}))", when="end")
host.add(readout)
both = seconds_per_step(T)
assert shared["_engine"][2] == T

before, after, guess = losses[DELAY : 1000 * TEST].mean(), losses[-1000 * TEST :].mean(), stimulus.var() / 2
print(f"{N} spiking cells, {net.n_rec} units: the stimulus of {DELAY} ms ago; guessing its mean costs {guess:.3f}")
print(f"error with learning off: before {before:.3f}, after {after:.3f}")
print(f"host step: {1e6 * alone:.1f} us, with the engine: {1e6 * both:.1f} us")
