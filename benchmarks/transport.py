"""DPM-OT on a mixture: distance to the law with few evaluations, from white noise and from transported starts.

    python benchmarks/transport.py

The exact denoiser; the energy distance between 2000 samples and 2000 draws of the law, and its level between two sets
of draws; the mean over three sets of samples.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import ddjax
from ddjax import grids, random, transport
from ddjax.fixtures import GaussianMixture
from ddjax.processes import Gaussian
from ddjax.solvers import DDIM

LAW, PROCESS, MANY, START = GaussianMixture(dims=2, components=5, spread=2.0, scale=0.15), Gaussian(), 2000, 0.4


def energy(x: np.ndarray, y: np.ndarray) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, of two sets of points."""

    def mean(a, b):
        return np.mean([np.linalg.norm(b - row, axis=1).mean() for row in a])

    return 2 * mean(x, y) - (mean(x, x) + mean(y, y)) * len(x) / (len(x) - 1)


def main() -> None:
    """Print the table."""

    def draw(seed, n):
        return LAW.sample(random.example_keys(jax.random.key(seed), n))

    reference, denoise = np.asarray(draw(1, MANY)), LAW.denoise(PROCESS, "x0")
    targets = transport.latents(jax.random.key(3), PROCESS, draw(2, 1000), START)
    brenier = transport.fit(jax.random.key(4), targets, iterations=1000, batch=2000)
    share = transport.volumes(jax.random.key(5), brenier, 100_000)
    print(f"cells: total variation from 1 / n {0.5 * float(jnp.abs(share - 1 / 1000).sum()):.3f}")
    print(f"draws of the law: {np.mean([energy(np.asarray(draw(10 + i, MANY)), reference) for i in range(3)]):.4f}")
    for eta in (0.0, 1.0):
        for steps in (3, 5, 10):
            found = {}
            for name in ("noise", "transported"):
                distances = []
                for seed in range(3):
                    noise = random.normal(random.example_keys(jax.random.key(20 + seed), MANY), (2,))
                    init, start = (noise, 1.0) if name == "noise" else (brenier(noise), START)
                    out = ddjax.sample(
                        jax.random.key(30 + seed), denoise, PROCESS, shape=(MANY, 2), solver=DDIM(PROCESS, eta),
                        times=grids.uniform(steps, start=start), init=init,
                    )  # fmt: skip
                    distances.append(energy(np.asarray(out.x0), reference))
                found[name] = np.mean(distances)
            print(f"eta {eta:g}, {steps} evaluations: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))


if __name__ == "__main__":
    main()
