"""Diffusion evolution: a population and its fitness as a denoiser, so that any sampler is an optimiser.

(Zhang et al. 2024, "Diffusion models are evolutionary algorithms".) Fit individuals are the data of a diffusion,
q(x_0) ∝ exp(log density of the fitness), of which the population x_1 ... x_n holds the only draws there are:

    x0_hat(x_i) = sum_j w_ij x_j,   w_ij ∝ exp(log_density(x_j)) N(x_i; alpha x_j, sigma^2)

is the posterior mean under the density times the population's own law. `DDIM` makes the next generation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ddjax import grids
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.processes.gaussian import gaussian_of
from ddjax.sampling import sample
from ddjax.solvers import DDIM
from ddjax.solvers.base import Solver
from ddjax.types import State, Time, left_broadcast

Fitness = Callable[[State], Float[Array, " population"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evolution:
    """The denoiser of a population, the batch: a prediction of x0 for each individual.

    THE BATCH IS THE POPULATION. Every individual's prediction is an average over all others of the batch: the one place
    in this library where a sample depends on its neighbours, because that is the method. Batch sizes, `rows` and the
    order of a batch are part of an experiment's definition here; a batch of one predicts itself.

    process: Gaussian, or an interpolant from Gaussian noise. log_density: of a population `(n, *sites)`, the logarithm
        of the density that their fitness stands for, `(n,)`; -inf where nothing is fit. Compared by identity when
        compiled.
    projection: `(latent, dims)`, or None: distances between individuals are those of their latents, projection @ x
        (their latent-space diffusion evolution): in many dimensions all others are far away, and in few
        random ones the neighbours are still neighbours. Individuals themselves stay in the whole space.
    """

    process: Any = dataclasses.field(metadata={"static": True})
    log_density: Fitness = dataclasses.field(metadata={"static": True})
    projection: Float[Array, "latent dims"] | None = None

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """The weighted averages. n^2 distances, some rows at a time."""
        flat = xt.reshape(len(xt), -1)
        latent = flat if self.projection is None else flat @ self.projection.T.astype(xt.dtype)
        t = left_broadcast(jnp.asarray(t), latent)
        schedule = (gaussian_of(self.process) or self.process).schedule
        alpha, sigma = (jnp.broadcast_to(f(t), (len(xt), 1)) for f in (schedule.alpha, schedule.sigma))
        fit = self.log_density(xt)

        def one(row):
            z, alpha, sigma = row
            distance = jnp.sum((z - alpha * latent) ** 2, axis=1)
            safe = jnp.where(sigma == 0, 1.0, sigma)
            # Without noise, only itself is near.
            log_kernel = jnp.where(sigma == 0, jnp.where(distance == 0, 0.0, -jnp.inf), -0.5 * distance / safe**2)
            log_w = fit + log_kernel
            # Where nobody is fit or near, the fitness says nothing.
            log_w = jnp.where(jnp.isneginf(log_w.max()), log_kernel, log_w)
            return jax.nn.softmax(log_w) @ flat

        x0 = jax.lax.map(one, (latent, alpha, sigma), batch_size=min(len(xt), 64))
        return Prediction(x0.reshape(xt.shape), "x0")


def random_projection(key: Key[Array, ""], dims: int, latent: int) -> Float[Array, "latent dims"]:
    """Rows of length 1 in any direction: latents of white noise are white along each (theirs)."""
    rows = jax.random.normal(key, (latent, dims))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


class Evolved(NamedTuple):
    """The last generation."""

    population: State  # (population, *sites)
    fitness: Float[Array, " population"]
    best: Float[Array, "*sites"]
    best_fitness: Float[Array, ""]


def evolve(
    key: Key[Array, ""],
    fitness: Fitness,
    shape: Sequence[int],
    *,
    temperature: float = 1.0,
    steps: int = 100,
    eta: float = 1.0,
    latent: int | None = None,
    scale: float = 1.0,
    process: Any = None,
    solver: Solver | None = None,
    init: State | None = None,
) -> Evolved:
    """Maximise a fitness without its gradient, and find its several optima.

    fitness: of candidates `(population, *sites)`, `(population,)`, the higher the better. shape: of the population.
    temperature: the density of candidates is exp(fitness / temperature); the lower, the fewer survive.
    steps: generations, each of which asks for the fitness of the whole population once. eta: of DDIM, the share of
        mutations: 1 is the most.
    latent: dimensions of a random projection, for many sites. scale: candidates are `scale` times states, whose first
        generation is white noise. init: the first generation, candidates, in its place.
    process: default `Gaussian(VPCosine())`. solver: in the place of DDIM.
    Raises ValueError for numbers out of range.
    """
    if not (temperature > 0 and scale > 0):
        raise ValueError(f"temperature and scale must be positive, got {(temperature, scale)}")
    process = Gaussian() if process is None else process
    dims = 1
    for n in shape[1:]:
        dims *= n
    if latent is not None and not 1 <= latent <= dims:
        raise ValueError(f"latent must be 1 to {dims}, the numbers of a candidate, got {latent}")
    own, noise = jax.random.split(key)
    projection = None if latent is None else random_projection(own, dims, latent)
    out = sample(
        noise,
        Evolution(process, lambda x: fitness(scale * x) / temperature, projection),
        process,
        shape=shape,
        solver=DDIM(process, eta) if solver is None else solver,
        times=grids.uniform(steps),
        init=None if init is None else jnp.asarray(init) / scale,
    )
    population = scale * out.x0
    values = fitness(population)
    at = jnp.argmax(values)
    return Evolved(population, values, population[at], values[at])
