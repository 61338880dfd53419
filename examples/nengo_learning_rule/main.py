"""ModProp as the learning rule of a recurrent Nengo connection, beside Nengo's own PES for the readout.

An ensemble of rate neurons with unit gain and Lowpass(tau) synapses computes what the engine computes,
v = k v + (1-k) (W z + W_in x), z = relu(v).  So the rule steps the engine as the ensemble's twin, with the same input
and the same dE/dy, and moves the connection's weights to the engine's.
"""

import time

import nengo
import numpy as np
from nengo.builder import Builder, Operator, Signal
from nengo.builder.operator import Reset
from nengo.learning_rules import LearningRuleType

import modprop_fast as mf

SECONDS, TEST, DELAY, TAU, RATE = 60, 10, 0.1, 0.03, 100.0  # s; TEST at either end without learning; Hz at z = 1


class ModProp(LearningRuleType):
    """Of a connection neurons -> neurons; `connection.learning_rule` takes [x (n_in) | dE/dy (n_out)]."""

    modifies = "weights"

    def __init__(self, learner):
        super().__init__(learner.optimizer.lr, size_in=learner.network.n_in + learner.network.n_out)
        self.learner = learner


class SimModProp(Operator):
    def __init__(self, learner, error, weights, delta):
        super().__init__()
        self.learner, self.reads, self.updates = learner, [error, weights], [delta]
        self.sets, self.incs = [], []

    def make_step(self, signals, dt, rng):
        (given, weights), (delta,) = (map(signals.__getitem__, names) for names in (self.reads, self.updates))
        learner, network = self.learner, self.learner.network
        n_in = network.n_in

        def step():
            learner.step(given[:n_in], signal=given[n_in:])
            np.divide(network.w_rec, RATE, out=delta)
            np.subtract(delta, weights, out=delta)

        return step


@Builder.register(ModProp)
def build_modprop(model, rule_type, rule):
    error = model.sig[rule]["in"] = Signal(shape=rule.size_in, name="ModProp:error")
    model.add_op(Reset(error))
    weights, delta = model.sig[rule.connection]["weights"], model.sig[rule]["delta"]
    model.add_op(SimModProp(rule_type.learner, error, weights, delta))


def build(learns):
    rng = np.random.default_rng(0)
    net = mf.Network(1, 64, 1, types={"E": 0.8, "I": 0.2}, tau=TAU, dt=0.001, gain=1.2, dtype="float64", rng=rng)  # relu
    learner = mf.Learner(net, mf.ModProp(0.25, feedback="random"), optimizer=mf.SGD(3e-4), rng=rng)
    past = [0.0] * round(DELAY / 0.001)

    def target(t, x):
        past.append(x[0])
        return 4 * past.pop(0) * x[0]  # both are needed, and no linear readout of a linear memory has it

    def on(t, error):
        return error if TEST <= t < SECONDS - TEST else 0 * error

    with nengo.Network(seed=0) as model:
        x = nengo.Node(nengo.processes.WhiteSignal(SECONDS, high=3, rms=0.5, seed=1))
        aim, error, y = nengo.Node(target, size_in=1), nengo.Node(on, size_in=1), nengo.Node(size_in=1)
        cells = nengo.Ensemble(64, 1, neuron_type=nengo.RectifiedLinear(RATE), gain=np.ones(64), bias=np.zeros(64))
        nengo.Connection(x, aim, synapse=None)
        nengo.Connection(x, cells.neurons, transform=net.w_in, synapse=TAU)
        rule = ModProp(learner) if learns else None
        loop = nengo.Connection(cells.neurons, cells.neurons, transform=net.w_rec / RATE, synapse=TAU, learning_rule_type=rule)
        out = nengo.Connection(
            cells.neurons, y, transform=np.zeros((1, 64)), synapse=None, learning_rule_type=nengo.PES(2e-3, pre_synapse=None)
        )
        nengo.Connection(y, error, synapse=None)
        nengo.Connection(aim, error, transform=-1, synapse=None)
        nengo.Connection(error, out.learning_rule, synapse=None)
        if learns:
            nengo.Connection(x, loop.learning_rule[:1], synapse=None)
            nengo.Connection(error, loop.learning_rule[1:], synapse=None)
        model.y, model.target = nengo.Probe(y), nengo.Probe(aim)
    return model


def run(learns):
    """(loss of every step, variance of the target / 2, seconds per step)."""
    with nengo.Simulator(model := build(learns), progress_bar=False) as sim:
        sim.run_steps(1000)
        began = time.perf_counter()
        sim.run_steps(1000 * SECONDS - 1000)
        took = (time.perf_counter() - began) / (1000 * SECONDS - 1000)
        return ((sim.data[model.y] - sim.data[model.target])[:, 0] ** 2 / 2), sim.data[model.target].var() / 2, took


n = 1000 * TEST
fixed, guess, alone = run(learns=False)
error, _, both = run(learns=True)
print(f"64 rate neurons: x(t) x(t - {1000 * DELAY:g} ms); guessing the mean costs {guess:.4f}")
print(f"PES alone, on fixed recurrent weights, ends at {fixed[-n:].mean():.4f}")
print(f"error with learning off: before {error[:n].mean():.4f}, after {error[-n:].mean():.4f}")
print(f"host step: {1e6 * alone:.1f} us, with the engine: {1e6 * both:.1f} us")
