"""A River regressor: learn_one moves the network by one step, predict_one looks ahead and changes nothing."""

import time
import zlib

import numpy as np
from river import base, checks, evaluate, linear_model, metrics, preprocessing

import modprop_fast as mf


class ModPropRegressor(base.Regressor):
    """Features may come and go: each has its input by a hash of its name.

    Parameters
    ----------
    n_in
        Inputs that the features are hashed to.
    n_rec
        Recurrent units.
    mu
        Of the rule.
    tau
        Time constant in samples.
    lr
        Learning rate.
    seed
        Of the initial weights.
    """

    def __init__(self, n_in: int = 16, n_rec: int = 64, mu: float = 0.25, tau: float = 1.0, lr: float = 3e-3, seed: int = 0):
        self.n_in, self.n_rec, self.mu, self.tau, self.lr, self.seed = n_in, n_rec, mu, tau, lr, seed
        rng = np.random.default_rng(seed)
        net = mf.Network(n_in, n_rec, 1, activation="tanh", tau=tau, dtype="float64", rng=rng)
        self._learner = mf.Learner(net, mf.ModProp(mu), optimizer=mf.SGD(lr))
        self._v = np.zeros(n_rec)  # the engine's state, to look ahead from

    def learn_one(self, x, y):
        inputs = self._inputs(x)
        self._v = self._ahead(inputs)
        self._learner.step(inputs, target=np.array([y], float))

    def predict_one(self, x):
        z, weights = np.tanh(self._ahead(self._inputs(x))), self._learner.network.weights
        return float((weights["w_out"] @ z + weights["b_out"])[0])

    def _inputs(self, x):
        inputs = np.zeros(self.n_in)
        for name in sorted(x, key=str):
            inputs[zlib.crc32(str(name).encode()) % self.n_in] += x[name]
        return inputs

    def _ahead(self, inputs):
        k, weights = self._learner.network.leak, self._learner.network.weights
        return k * self._v + (1 - k) * (weights["w_rec"] @ np.tanh(self._v) + weights["w_in"] @ inputs)


def reactor(n, seed=0):
    """What flows out is the product of two feeds that reach the reactor after three samples and after one."""
    feeds = np.random.default_rng(seed).uniform(0, 1, (n, 2))
    for i in range(3, n):
        yield {"acid": feeds[i, 0], "base": feeds[i, 1]}, 4 * feeds[i - 3, 0] * feeds[i - 1, 1]


names = []
for check in checks.yield_checks(ModPropRegressor()):
    check(ModPropRegressor())
    names.append(check.__name__)
print(f"River's checks: {len(names)} passed")

N = 40_000


def mean_error(model, samples):
    return evaluate.progressive_val_score(samples, model, metrics.MAE()).get()


samples = list(reactor(N))
model = preprocessing.StandardScaler() | ModPropRegressor()
linear = preprocessing.StandardScaler() | linear_model.LinearRegression()
first, flat = mean_error(model, samples[:500]), mean_error(linear, samples)
began = time.perf_counter()
mean_error(model, samples[500:-5000])
both = (time.perf_counter() - began) / (N - 5503)
last = mean_error(model, samples[-5000:])
spread = np.std([y for _, y in samples])
print(f"reactor with dead times, standard deviation of the outflow {spread:.3f}; River's LinearRegression: {flat:.3f}")
print("each sample is predicted before it is learned; mean absolute error of the first 500 and of the last 5000")
print(f"error: before {first:.3f}, after {last:.3f}")
began = time.perf_counter()
mean_error(linear, samples[:5000])
alone = (time.perf_counter() - began) / 5000
print("a step is predict_one and learn_one; the host's is that of LinearRegression")
print(f"host step: {1e6 * alone:.1f} us, with the engine: {1e6 * both:.1f} us")
