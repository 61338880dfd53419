"""A learned step inside jax.jit and lax.scan: one XLA FFI call into the C face."""

import ctypes
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import modprop_fast as mf


def library():
    """step.cc, compiled against the headers of JAX, Python and modprop_fast."""
    here, compiler = Path(__file__).resolve().parent, (sysconfig.get_config_var("CXX") or "c++").split()
    if not shutil.which(compiler[0]):
        print(f"skipped: this machine lacks the compiler {compiler[0]}")
        sys.exit(77)
    (here / "build").mkdir(exist_ok=True)
    out = here / "build" / ("step" + sysconfig.get_config_var("EXT_SUFFIX"))
    folders = jax.ffi.include_dir(), sysconfig.get_path("include"), mf.get_include()
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-w", *(f"-I{folder}" for folder in folders)]
    subprocess.run([*compiler, *options, here / "step.cc", "-o", out], check=True)
    return ctypes.PyDLL(str(out))  # PyDLL: the GIL is kept, for `adopt`


def as_step(learner):
    """step(order, x, target, learn) -> (order, y, loss), to be jitted; `order` starts at 0 and goes from step to step."""
    lib = library()
    lib.adopt.argtypes, lib.adopt.restype = [ctypes.py_object], ctypes.c_int64
    jax.ffi.register_ffi_target("modprop_step", jax.ffi.pycapsule(lib.modprop_step), platform="cpu")
    n_out, scalar = learner.network.n_out, jax.ShapeDtypeStruct((), jnp.float32)
    shapes = jax.ShapeDtypeStruct((n_out,), jnp.float32), scalar, jax.ShapeDtypeStruct((), jnp.int32)
    call, handle = jax.ffi.ffi_call("modprop_step", shapes, has_side_effect=True), np.int64(lib.adopt(learner))

    def step(order, x, target, learn):
        y, loss, order = call(x, target, learn.astype(jnp.int32), order, handle=handle)
        return order, y, loss

    return step


def host_step(level, drive):
    """The host's own simulation, a leaky tank.  The network sees the level and is asked for the past drive."""
    level = 0.7 * level + drive
    return level, level


def coupled(carry, inputs):
    level, order = carry
    level, _ = host_step(level, inputs["drive"])
    order, _, loss = step(order, level[None], inputs["target"], inputs["learn"])
    return (level, order), loss


T, TEST, DELAY = 400_000, 20_000, 2
rng = np.random.default_rng(0)
net = mf.Network(1, 64, 1, types={"E": 0.8, "I": 0.2}, activation="tanh", tau=1.0, rng=rng)
step = as_step(mf.Learner(net, mf.ModProp(0.25), optimizer=mf.SGD(3e-3)))
drive = rng.uniform(-1, 1, T).astype("float32")
now = np.arange(T)
stream = {"drive": drive, "target": np.roll(drive, DELAY)[:, None], "learn": (now >= TEST) & (now < T - TEST)}
stream = jax.tree.map(jnp.asarray, stream)
empty = jnp.float32(0)


def timed(body, carry, stream):
    run = jax.jit(lambda carry, stream: jax.lax.scan(body, carry, stream)).lower(carry, stream).compile()
    began = time.perf_counter()
    _, out = jax.block_until_ready(run(carry, stream))
    return (time.perf_counter() - began) / T, np.asarray(out)


alone, _ = timed(host_step, empty, stream["drive"])
both, losses = timed(coupled, (empty, jnp.int32(0)), stream)
print(f"{T} steps of 64 units in one lax.scan: what flowed in {DELAY} steps ago; guessing zero costs {drive.var() / 2:.3f}")
print(f"error with learning off: before {losses[:TEST].mean():.4f}, after {losses[-TEST:].mean():.4f}")
print(f"host step: {1e6 * alone:.3f} us, with the engine: {1e6 * both:.3f} us")
