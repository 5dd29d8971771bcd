"""PFGM++: Poisson flow with D extra dimensions, the heavy-tailed family that ends in Gaussian diffusion.

    q(x_t | x_0) ∝ (|x_t - alpha x_0|^2 + r^2)^(-(N + D) / 2),    r = sigma sqrt(D),    N sites

(Xu et al. 2023, eq. 4 and section 5.) This is Student's t of D degrees of freedom and scale sigma in N dimensions, so
x_t = alpha x_0 + sigma z sqrt(D / chi^2_D): one radius for the whole state, all directions alike. As D grows it tends
to the Gaussian, with an error of order 1 / D.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array

from ddjax import random
from ddjax.processes.gaussian import Gaussian, X
from ddjax.types import Keys, Time, left_broadcast


@dataclasses.dataclass(frozen=True)
class Student:
    """The t-distribution of `freedom` degrees of freedom over all sites of an example together.

    mean: `(batch, *sites)`. scale: the standard deviation of the normal it tends to, `(batch, 1, ...)`.
    """

    mean: X
    scale: Array
    freedom: float

    def sample(self, keys: Keys) -> X:
        """One draw, one key per example."""
        dtype = self.mean.dtype
        normal_keys, radius_keys = random.split(keys)
        z = random.normal(normal_keys, self.mean.shape[1:], dtype)
        half = jnp.asarray(0.5 * self.freedom, dtype)
        log_chi2 = jax.vmap(lambda key: jax.random.loggamma(key, half, (), dtype))(radius_keys) - jnp.log(half)
        return self.mean + self.scale * left_broadcast(jnp.exp(-0.5 * log_chi2), z) * z

    def log_prob(self, x: X) -> X:
        """Log-density of each site given those before it, nats: the sum over sites is that of the whole."""
        squares = ((x - self.mean) / self.scale) ** 2
        shape = squares.shape
        squares = squares.reshape(shape[0], -1)
        before = jnp.cumsum(squares, axis=-1) - squares
        freedom = self.freedom + jnp.arange(squares.shape[1], dtype=squares.dtype)  # of the site's own t
        width = self.freedom + before  # its scale squared, times its freedom
        log_norm = _log_gamma_ratio(0.5 * freedom) - 0.5 * (math.log(math.pi) + jnp.log(width))
        log_p = log_norm - 0.5 * (freedom + 1.0) * jnp.log1p(squares / width)
        return log_p.reshape(shape) - jnp.log(self.scale)


def _log_gamma_ratio(a: Array) -> Array:
    """The log of Gamma(a + 1/2) / Gamma(a), by a series where the two would cancel."""
    q = 1.0 / a
    series = -q / 8.0 + q**3 / 192.0 - q**5 / 640.0 - 0.5 * jnp.log(q)
    return jnp.where(a > 20.0, series, gammaln(a + 0.5) - gammaln(a))


@dataclasses.dataclass(frozen=True)
class PFGM(Gaussian):
    """PFGM++'s kernel in the place of the normal one, aligned by r = sigma sqrt(D).

    schedule, data_std: as for `Gaussian`; the paper's is `schedules.EDM()`.
    D: the number of extra dimensions, any positive number. D = 1 is PFGM; the paper's best are 128 and 2048.

    Networks, predictions of x0, noise (here (x_t - alpha x_0) / sigma), velocity, v and EDM's F, objectives, grids and
    the ODE's solvers (`DDIM(eta=0)`, `Heun`) are those of `Gaussian`, unchanged: dx/dt is the mean of alpha' x_0 +
    sigma' noise given x_t under any kernel. There is no score among the kinds, for it is no function of the mean of
    x_0, and no SDE, reverse step or bound: these raise a ValueError.
    """

    D: float = 128.0

    has_bound = False
    kinds = tuple(kind for kind in Gaussian.kinds if kind != "score")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.D < math.inf:
            raise ValueError(f"D must be positive and finite (infinite: Gaussian), got {self.D}")

    def marginal(self, x0: X, t: Time) -> Student:
        """q(x_t | x_0)."""
        alpha, sigma, _ = self._coefficients(x0, t)
        return Student(alpha * x0, sigma, self.D)

    def prior(self, shape: Sequence[int], t: float = 1.0) -> Student:
        """The kernel around 0, as wide as `Gaussian`'s prior."""
        wide = self.prior_std(jnp.asarray(t, float))
        return Student(jnp.zeros(tuple(shape)), wide, self.D)

    def bridge(self, *_) -> NoReturn:
        """Not defined: the radius is one draw for all times, and the process is not Markov."""
        raise ValueError("PFGM++ is an ODE: it has no bridge, reverse step, SDE or bound; use DDIM(eta=0) or Heun")

    reverse = sde = prior_kl = path_kl = step_kl = reconstruction = bridge
