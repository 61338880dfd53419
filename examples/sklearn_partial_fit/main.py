"""A scikit-learn regressor for sequences: rows are time steps, partial_fit goes on where the last call ended."""

import time

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model import Ridge, SGDRegressor
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

import modprop_fast as mf


class ModPropRegressor(RegressorMixin, BaseEstimator):
    """`fit` goes `epochs` times over one sequence, from rest; `predict` runs a sequence from rest and changes nothing."""

    def __init__(self, n_rec=64, mu=0.25, tau=2.0, lr=3e-3, epochs=20, random_state=None):
        self.n_rec, self.mu, self.tau, self.lr, self.epochs, self.random_state = n_rec, mu, tau, lr, epochs, random_state

    def fit(self, X, y):
        X, y = self._start(X, y)
        for _ in range(self.epochs):
            self.learner_.reset()
            self.learner_.run(X, y)
        return self

    def partial_fit(self, X, y):
        if hasattr(self, "learner_"):
            X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, reset=False)
            y = np.asarray(y, np.float64)[:, None]
        else:
            X, y = self._start(X, y)
        self.learner_.run(X, y)
        return self

    def predict(self, X):
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return self.learner_.evaluate(X[None], np.zeros((1, len(X), 1))).outputs[0, :, 0]

    def _start(self, X, y):
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        rng = np.random.default_rng(check_random_state(self.random_state).randint(2**31))
        net = mf.Network(X.shape[1], self.n_rec, 1, tau=self.tau, activation="tanh", dtype="float64", rng=rng)
        self.learner_ = mf.Learner(net, mf.ModProp(self.mu), optimizer=mf.SGD(self.lr))
        return X, np.asarray(y, np.float64)[:, None]


def narma(rng, n):
    """NARMA-10 (Atiya & Parlos 2000): the next value of a series that depends on ten past inputs and values."""
    u, y = rng.uniform(0, 0.5, n), np.zeros(n + 1)
    for t in range(9, n):
        y[t + 1] = 0.3 * y[t] + 0.05 * y[t] * y[t - 9 : t + 1].sum() + 1.5 * u[t - 9] * u[t] + 0.1
    return 4 * u[:, None] - 1, 10 * (y[1:] - 0.4)  # both of order 1


expected = {
    name: "rows are time steps: what is predicted for one depends on those before"
    for name in ("check_methods_sample_order_invariance", "check_methods_subset_invariance")
}
results = check_estimator(ModPropRegressor(), expected_failed_checks=expected, on_fail="raise", on_skip=None)
counts = {status: sum(r["status"] == status for r in results) for status in ("passed", "xfail", "skipped")}
print("scikit-learn's checks: " + ", ".join(f"{n} {status}" for status, n in counts.items()))

rng = np.random.default_rng(0)
(X, y), (X_test, y_test) = narma(rng, 60_000), narma(rng, 5_000)
chunks = [slice(i, i + 500) for i in range(0, len(X), 500)]
model = ModPropRegressor(random_state=0).partial_fit(X[:1], y[:1])
before = np.mean((model.predict(X_test) - y_test) ** 2)
for chunk in chunks:
    model.partial_fit(X[chunk], y[chunk])
after = np.mean((model.predict(X_test) - y_test) ** 2)
ridge = np.mean((Ridge().fit(X, y).predict(X_test) - y_test) ** 2)
print(f"NARMA-10 of variance {y_test.var():.3f}, {len(chunks)} calls of partial_fit; Ridge, which has no memory: {ridge:.3f}")
print(f"error (mean squared, on a new sequence): before {before:.3f}, after {after:.3f}")


def seconds(model, n=1000):
    """Of partial_fit on one row."""
    began = time.perf_counter()
    for i in range(n):
        model.partial_fit(X[i : i + 1], y[i : i + 1])
    return (time.perf_counter() - began) / n


print("a step is partial_fit of one row; the host's is SGDRegressor's (both check their input)")
print(f"host step: {1e6 * seconds(SGDRegressor()):.1f} us, with the engine: {1e6 * seconds(model):.1f} us")
