"""Steps made at once (`ddjax.sample_parallel`) against one after the other: rounds, evaluations and error.

python benchmarks/parallel.py            # a mixture in 8 dimensions, exact denoiser
python benchmarks/parallel.py RUN        # a trained run of continuous states, without labels
"""

import sys

import jax
import jax.numpy as jnp

import ddjax
from ddjax import grids, solvers
from ddjax.fixtures import GaussianMixture
from ddjax.processes import Gaussian
from ddjax.schedules import CondOT, VPCosine

KEY = jax.random.key(0)


def rows(what, denoise, process, solver, shape, steps, window, tolerances):
    settings = {"shape": shape, "solver": solver, "times": grids.uniform(steps)}
    plain = ddjax.sample(KEY, denoise, process, **settings)
    size = jnp.sqrt(jnp.mean(plain.x0**2))
    for tolerance in tolerances:
        found = ddjax.sample_parallel(KEY, denoise, process, **settings, window=window, tolerance=tolerance)
        error = float(jnp.sqrt(jnp.mean((found.x0 - plain.x0) ** 2)) / size)
        rounds, more = float(found.rounds.mean()), float(found.nfe.mean() / plain.nfe.mean())
        print(f"| {what} | {steps} | {window} | {tolerance} | {rounds:.1f} | {more:.2f} x | {error:.1e} |", flush=True)


def mixture():
    law = GaussianMixture(dims=8, components=4, scale=0.3)
    for schedule in (VPCosine(), CondOT()):
        process = Gaussian(schedule)
        for name, solver in (("ddim", solvers.DDIM(process)), ("ancestral", solvers.Ancestral(process))):
            case = f"mixture {type(schedule).__name__} {name}", law.denoise(process), process, solver, (16, 8)
            for steps, window, tolerances in ((50, 50, (0.1,)), (250, 100, (1.0, 0.1, 0.01)), (1000, 100, (0.1,))):
                rows(*case, steps, window, tolerances)


def trained(workdir):
    run = ddjax.load(workdir)
    shape = (2, *run.experiment.state_shape)
    for name, make in (("ddim", solvers.DDIM), ("ancestral", solvers.Ancestral), ("heun", solvers.Heun)):
        for steps, window, tolerances in ((50, 25, (0.3, 0.1, 0.03)), (250, 50, (0.1,))):
            rows(name, run.denoise, run.process, make(run.process), shape, steps, window, tolerances)


if __name__ == "__main__":
    print("| what | steps | window | tolerance | rounds | NFE | error |\n|---|---|---|---|---|---|---|")
    trained(sys.argv[1]) if len(sys.argv) > 1 else mixture()
