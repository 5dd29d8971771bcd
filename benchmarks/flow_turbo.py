"""FlowTurbo on a trained flow: a refiner trained for a few minutes, and errors against evaluations of the network.

    python benchmarks/flow_turbo.py WORKDIR [steps of training] [mixture]

Errors are root mean squared distances to Heun's solution in 64 steps, from the same noise and labels.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ddjax
from ddjax import denoisers, grids, objectives, random, solvers
from ddjax.experiment import load_data
from ddjax.fixtures import GaussianMixture
from ddjax.processes import Gaussian
from ddjax.schedules import CondOT
from ddjax.solvers import FlowTurbo, Heun
from ddjax.training import Ema, adamw, init_state, make_train_step

KEY = jax.random.key(0)


def table(denoise, process, shape, cond, sequences):
    """Print the error of each sampler, with its evaluations and those of the refiner."""
    rows = jnp.arange(shape[0])
    start = process.prior(shape, jnp.float32(1.0)).sample(random.example_keys(KEY, rows))
    settings = {"shape": shape, "cond": cond, "init": start}
    fine = ddjax.sample(KEY, denoise, process, solver=Heun(process), times=grids.uniform(64), **settings).x0
    named = [("Euler", solvers.euler(process), n) for n in (4, 8)]
    named += [("Heun", Heun(process), n) for n in (2, 4)]
    named += [("AB2", solvers.adams_bashforth(process), n) for n in (4, 8)]
    named += [(blocks, FlowTurbo(process, blocks), len(blocks)) for blocks in sequences]
    for name, solver, steps in named:
        out = ddjax.sample(KEY, denoise, process, solver=solver, times=grids.uniform(steps), **settings)
        error = float(jnp.sqrt(jnp.mean((out.x0 - fine) ** 2)))
        light = getattr(solver, "refinements", 0)
        print(f"| {name} | {steps} | {int(out.nfe[0])} | {light} | {error:.4f} |", flush=True)


def mixture():
    """The exact denoiser of a mixture of Gaussians, without a refiner."""
    process, law = Gaussian(CondOT()), GaussianMixture()
    blocks = ["P" * 4, "P" * 6, "P" * 8, "P" * 12, "HPPP", "HHPPPP"]
    table(law.denoise(process), process, (512, 2), None, blocks)


def trained(workdir, steps):
    """A trained run: a refiner of one layer, from its training data."""
    run = ddjax.load(workdir)
    data, process = load_data(run.config, "train"), run.process
    *sides, channels = run.experiment.state_shape
    init, apply = denoisers.functional_init(
        lambda rngs: denoisers.DiT(
            shape=(*sides, 2 * channels), out_channels=channels, num_classes=run.data.num_classes, width=96, depth=1,
            heads=4, patch=2, rngs=rngs,
        )
    )  # fmt: skip
    objective = objectives.velocity_refiner(process, run.denoise, longest=0.25)
    optimizer = adamw(steps=steps, learning_rate=1e-3, schedule="cosine", warmup=20)
    step = jax.jit(make_train_step(objective, apply, optimizer, ema=Ema(0.99)))
    state, rng, began = init_state(init, optimizer, jax.random.key(1)), np.random.default_rng(0), time.time()
    for i in range(steps):
        rows = rng.integers(0, len(data), 32)
        state, metrics = step(state, {"x0": data[rows]["x0"], "cond": data[rows]["cond"]})
        if i % 50 == 0 or i + 1 == steps:
            print(f"step {i}: loss {float(metrics['loss']):.4f}, of no change {float(metrics['unrefined']):.4f}")
    print(f"{steps} steps in {time.time() - began:.0f} s", flush=True)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(p)) for p in (state.ema, run.params)]
    print(f"refiner {sizes[0]} parameters, network {sizes[1]}")
    denoise = solvers.refined(run.denoise, apply, state.ema)
    cond = jnp.arange(32) % run.data.num_classes
    blocks = ["P" * 4, "HPRR", "P" * 8, "HPPPPRRR"]
    table(denoise, process, (32, *run.experiment.state_shape), cond, blocks)


if __name__ == "__main__":
    print("| sampler | steps | evaluations | refinements | error |\n|---|---|---|---|---|")
    if "mixture" in sys.argv:
        mixture()
    else:
        trained(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 300)
