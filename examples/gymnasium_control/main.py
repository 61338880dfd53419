"""Closed loop on Gymnasium's Pendulum: the network sees the angle and its own torque, and learns while it balances.

It needs the angular velocity too, for which it has to remember.  Nobody shows it a torque: its error is the state itself,
s = d(theta)/dt + 2 theta, which a torque of the opposite sign brings back, so dE/dy is s within [-1, 1].
"""

import time
from pathlib import Path

import gymnasium
import matplotlib.pyplot as plt
import numpy as np

import modprop_fast as mf

EPISODES, STEPS, TEST = 100, 200, 40
env = gymnasium.make("Pendulum-v1").unwrapped
rng = np.random.default_rng(0)
net = mf.Network(2, 64, 1, types={"E": 0.8, "I": 0.2}, activation="tanh", tau=2.0, dt=1.0, rng=rng)
net.w_out *= 0.1  # weak at first: the loop closes gently
learner = mf.Learner(net, mf.ModProp(0.25), optimizer=mf.SGD(0.01))


def episode(seed, policy):
    """(cost per step, seconds per step) from a random start near upright."""
    observation, _ = env.reset(seed=seed, options={"x_init": 0.15, "y_init": 0.15})
    learner.reset()
    torque, cost, began = np.zeros(1, "float32"), 0.0, time.perf_counter()
    for _ in range(STEPS):
        torque = policy(observation, torque)
        observation, reward, *_ = env.step(torque)
        cost -= reward / STEPS
    return cost, (time.perf_counter() - began) / STEPS


def control(observation, torque, learn=False):
    cosine, sine, velocity = observation
    x = np.array([5 * sine, torque[0]], "float32")
    error = np.array([velocity + 2 * np.arctan2(sine, cosine)], "float32").clip(-1, 1)
    fallen = cosine < 0.5  # beyond what the torque can bring back there is nothing to learn
    return (2 * learner.step(x, signal=error if learn and not fallen else None)).clip(-2, 2)


def learn(observation, torque):
    return control(observation, torque, learn=True)


def test():
    return np.mean([episode(10_000 + i, control)[0] for i in range(TEST)])


before = test()
costs, took = np.transpose([episode(i, learn) for i in range(EPISODES)])
after = test()
alone = np.mean([episode(i, lambda observation, torque: torque)[1] for i in range(20)])

figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot(-STEPS * costs, lw=0.8)
axes.set(xlabel="episode", ylabel="return", title="Pendulum, learning while it balances", yscale="symlog")
figure.savefig(picture := Path(__file__).with_name("returns.png"), dpi=150)
first, last = -STEPS * costs[0], -STEPS * costs[-20:].mean()
print(f"return of an episode: {first:.0f} in the first, {last:.1f} in the last twenty: {picture}")
print(f"error (cost per step) with learning off, {TEST} new starts: before {before:.5f}, after {after:.5f}")
print(f"host step: {1e6 * alone:.1f} us, with the engine: {1e6 * took.mean():.1f} us")
