"""A torch model whose recurrent layer learns by ModProp: forwards and backwards are calls into the engine."""

import time

import numpy as np
import torch

import modprop_fast as mf


class RunEngine(torch.autograd.Function):
    """zs = layer(xs), with the rule's gradient of w_rec and w_in (and b_rec) in place of autograd's."""

    @staticmethod
    def forward(ctx, xs, layer, *weights):
        if ctx.needs_input_grad[0]:
            raise ValueError("xs: expected an input without requires_grad; the rule credits weights, not inputs")
        xs = xs.numpy()
        zs = layer.learner.evaluate(xs, np.zeros((*xs.shape[:2], layer.network.n_out), xs.dtype)).outputs
        ctx.layer, ctx.xs, ctx.zs = layer, xs, zs
        return torch.from_numpy(zs.copy())

    @staticmethod
    def backward(ctx, dzs):
        # The learner's loss is the mean of (y - y*)^2 / 2 over trials, steps and outputs: these y* make its dE/dy ours.
        learner = ctx.layer.learner
        targets = ctx.zs - dzs.numel() * dzs.numpy()
        grads = learner.gradient(ctx.xs, targets, mode="offline")
        return None, None, *(torch.from_numpy(grads[name]) for name in ctx.layer.names)


class ModPropLayer(torch.nn.Module):
    """(B, T, n_in) -> (B, T, n_rec), activity of a leaky recurrent network.  The parameters share the engine's memory."""

    def __init__(self, n_in, n_rec, rule=mf.ModProp(0.5), **options):
        super().__init__()
        self.network = net = mf.Network(n_in, n_rec, n_rec, **options)
        net.w_out = np.eye(n_rec)  # the engine's readout passes z on; the head is torch's
        self.learner = mf.Learner(net, rule, update="apply", threads=1)
        self.names = [name for name in ("w_rec", "w_in", "b_rec") if name in net.weights]
        for name in self.names:
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(net.weights[name])))

    def forward(self, xs):
        return RunEngine.apply(xs, self, *(getattr(self, name) for name in self.names))


def plain(layer, xs):
    """The same layer in torch's own operations."""
    k, z, v, zs = layer.network.leak, torch.zeros(len(xs), layer.network.n_rec), 0, []
    keep = 1 - torch.eye(layer.network.n_rec)  # no autapses
    for x in xs.unbind(1):
        v = k * v + (1 - k) * (z @ (layer.w_rec * keep).T + x @ layer.w_in.T)
        z = torch.relu(v)
        zs.append(z)
    return torch.stack(zs, 1)


def trials(rng, n, steps=60, cue=8):
    """Delayed XOR: two cues of either sign, then a pause; were they the same?"""
    bits = rng.integers(0, 2, (n, 2))
    xs = rng.normal(0, 0.1, (n, steps, 1)).astype("float32")
    xs[:, :cue, 0] += 2 * bits[:, :1] - 1
    xs[:, 16 : 16 + cue, 0] += 2 * bits[:, 1:] - 1
    return torch.from_numpy(xs), torch.from_numpy(bits.sum(1) % 2)


def loss_of(layer, head, xs, labels, run=None):
    zs = layer(xs) if run is None else run(layer, xs)
    return torch.nn.functional.cross_entropy(head(zs[:, -1]), labels)


def build(rule):
    torch.manual_seed(0)
    options = {"types": {"E": 0.8, "I": 0.2}, "activation": "relu", "tau": 10.0, "gain": 1.5, "rng": np.random.default_rng(0)}
    return ModPropLayer(1, 64, rule, **options), torch.nn.Linear(64, 2)


torch.set_num_threads(1)  # small matrices; the engine has its own threads
rng = np.random.default_rng(1)
xs, labels = trials(rng, 32)

layer, head = build(mf.BPTT())
loss_of(layer, head, xs, labels).backward()
ours = {name: getattr(layer, name).grad.clone() for name in layer.names}
layer.zero_grad()
loss_of(layer, head, xs, labels, plain).backward()
far = max(float((ours[n] - getattr(layer, n).grad).norm() / getattr(layer, n).grad.norm()) for n in ours)
print(f"with BPTT in the layer its gradient is autograd's, to {far:.1e}")
assert far < 1e-3, far

layer, head = build(mf.ModProp(0.5))
test = trials(rng, 500)
optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=2e-3)


def score():
    with torch.no_grad():
        return float(loss_of(layer, head, *test)), float((head(layer(test[0])[:, -1]).argmax(1) == test[1]).float().mean())


def iterate(run=None):
    optimizer.zero_grad()
    loss_of(layer, head, *trials(rng, 32), run).backward()
    optimizer.step()


(before, chance), began = score(), time.perf_counter()
for _ in range(ITERATIONS := 300):
    iterate()
took = (time.perf_counter() - began) / ITERATIONS
after, accuracy = score()
print(f"delayed XOR, 64 units, {ITERATIONS} iterations of 32 trials: accuracy {chance:.2f} -> {accuracy:.2f}")
print(f"error on 500 new trials: before {before:.5f}, after {after:.5f}")
began = time.perf_counter()
for _ in range(20):
    iterate(plain)
alone = (time.perf_counter() - began) / 20
print("a step is one of 32 x 60, forwards and backwards; the host's is the same layer in torch's own operations")
print(f"host step: {1e6 * alone / (32 * 60):.1f} us, with the engine: {1e6 * took / (32 * 60):.1f} us")
