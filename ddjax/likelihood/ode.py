"""The likelihood of the probability-flow ODE (Song et al. 2021, section 4.3 and appendix D.2), in one compiled program.

Written in the angle between data and noise, the ODE is the same one for every Gaussian schedule, and regular at both
ends. With d = data_std, n^2 = alpha^2 d^2 + sigma^2 and tan(angle) = sigma / (alpha d),

    xi = x / n = cos(angle) x0 / d + sin(angle) noise,        d xi / d angle = -F(x, t),

where F is the prediction of kind `"edm"`. It is 0 for Gaussian data of width d, and the prior of xi is N(0, 1).
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.grids import check_grid, range_of
from ddjax.likelihood.bound import Reconstruction
from ddjax.likelihood.dequantise import Dequantise
from ddjax.likelihood.integrators import Integrator, rk4
from ddjax.processes import Gaussian
from ddjax.pytrees import as_pytree
from ddjax.types import Rows, State, per_example, sites, time_dtype

AT_ONCE = 16  # tangents pushed through the network together: bounds the memory of the exact divergence


class FlowLikelihood(NamedTuple):
    """log p(x0) of the probability-flow ODE, in nats per example: the sum of three terms.

    `prior` is the log-density of `latent`, the state at the high end of `t_range`, under the process's prior; `volume`
    the log-determinant of the map from the low end to `latent`; `data` ties x0 to the state at the low end.
    `volume_error` is the standard error of `volume` over Hutchinson's probes: 0 for the exact divergence, infinite for
    one probe; it knows nothing of the solver's own error, nor of the draw of a dequantisation or a decoder.
    """

    prior: Float[Array, " batch"]
    volume: Float[Array, " batch"]
    data: Float[Array, " batch"]
    volume_error: Float[Array, " batch"]
    latent: Float[Array, batch * sites]
    t_range: tuple[float, float]
    dims: int  # sites per example
    discrete: bool  # a lower bound on the log-probability of discrete data; otherwise a log-density

    @property
    def log_prob(self) -> Float[Array, " batch"]:
        """The sum of the terms, nats per example."""
        return self.prior + self.volume + self.data

    def bits_per_dim(self, delta: float | None = None) -> Float[Array, " batch"]:
        """Bits per site.

        delta: for a density, the width of the bins, in the units of x0, that the data are rounded to (2 / 255 for
            `linspace(-1, 1, 256)`): the density is taken as constant on a bin, so this is no bound. A result for
            discrete data (dequantised, or with a decoder) is one, and takes none.
        Raises ValueError where delta is missing, not positive, or not wanted.
        """
        if self.discrete:
            if delta is not None:
                raise ValueError(f"the data were dequantised: bits need no width of bins, got delta={delta}; leave it")
            delta = 1.0
        elif delta is None or not delta > 0:
            raise ValueError(
                f"bits of a density need the width of a bin in the units of x0, got delta={delta}; give a positive one"
            )
        return -self.log_prob / (self.dims * math.log(2.0)) - math.log2(delta)


def ode(
    key: Key[Array, ""],
    denoise: Any,
    process: Gaussian,
    x0: State,
    cond: Any = None,
    *,
    divergence: Literal["exact", "hutchinson"] = "exact",
    num_probes: int = 8,
    integrator: Integrator = rk4,
    num_steps: int = 64,
    t_range: tuple[float, float] | None = None,
    times: Float[Array, " steps+1"] | None = None,
    dequantise: Dequantise | None = None,
    reconstruction: Reconstruction | None = None,
    rows: Rows | None = None,
) -> FlowLikelihood:
    """Log-likelihood of each example under the probability-flow ODE of any Gaussian schedule and prediction kind.

    What it equals: the ODE runs over `t_range` alone. Let p_low be the law to which it carries the prior; for an exact
    denoiser that is the law of alpha_low x0 + sigma_low noise, but for what `process.prior` misses at the high end.
      - By default the answer is alpha_low^dims p_low(alpha_low x0): for an exact denoiser, the density at x0 of the
        data *with noise of width sigma_low / alpha_low added* (0.0015 for the default range). Nothing is drawn.
      - With `dequantise`, -log of it at x0 + noise bounds -log of the probability of the discrete x0 (Theis et al.
        2016; Ho et al. 2019): `UniformNoise(delta)`, or any `(keys, x0) -> (x, log_q)` (variational).
      - With `reconstruction`, a decoder of discrete levels (`binned`, `discretised`): x_low is drawn from q(x_low | x0)
        and log p_low(x_low) + log p(x0 | x_low) - log q(x_low | x0) bounds the log-probability of x0 from below. The
        truncation at the low end is then paid for.

    x0: `(batch, *sites)`. divergence: `"exact"` costs one forward derivative for each site at each evaluation,
    `"hutchinson"` one for each of `num_probes` random signs, which are kept for the whole solve (unbiased in `volume`).
    integrator: `rk4` or `heun` on a grid; `Adaptive(rtol, atol)` (diffrax) takes the ends of the grid.
    num_steps, t_range: steps equal in log-SNR over a range of times, default `process.t_range`. times: a decreasing
    grid in their place, which may begin at t = 0 where the schedule has no noise there.
    Raises ValueError for another process, integer states, an unknown divergence, no probe or step, a bad or
    doubly given range, or both `dequantise` and `reconstruction`.
    """
    if not isinstance(process, Gaussian):
        raise ValueError(f"ode is for processes.Gaussian, got {type(process).__name__}; use nelbo")
    if not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"x0 must be real numbers, got {x0.dtype}; scale the levels to the network's units first")
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f'divergence must be "exact" or "hutchinson", got {divergence!r}')
    if num_probes < 1 or num_steps < 1:
        raise ValueError(f"num_probes and num_steps must be at least 1, got {num_probes} and {num_steps}")
    if dequantise is not None and reconstruction is not None:
        raise ValueError("give dequantise (noise on the data) or reconstruction (a decoder at the low end), not both")
    if times is not None and t_range is not None:
        raise ValueError("give times (a grid) or t_range (steps equal in log-SNR), not both")
    x0 = x0.astype(time_dtype(x0))
    if times is None:
        low, high = range_of(process, t_range)
        times = process.time_at(jnp.linspace(0.0, 1.0, num_steps + 1, dtype=x0.dtype), (low, high))[0]
    else:
        times = check_grid(times)[::-1].astype(x0.dtype)
        low, high = float(times[0]), float(times[-1])
    rows = Rows.of(x0, rows)
    probes = num_probes if divergence == "hutchinson" else None
    terms = _terms(
        key, as_pytree(denoise), x0, cond, rows.index, times, process, probes, integrator, dequantise, reconstruction
    )
    discrete = dequantise is not None or reconstruction is not None
    return FlowLikelihood(*terms, t_range=(low, high), dims=sites(x0), discrete=discrete)


@functools.partial(jax.jit, static_argnames=("process", "num_probes", "integrator", "dequantise", "reconstruction"))
def _terms(key, denoise, x0, cond, rows, times, process, num_probes, integrator, dequantise, reconstruction):
    schedule, (batch, *shape) = process.schedule, x0.shape
    low = jnp.full((batch,), times[0])
    data_keys, probe_keys = random.split(random.example_keys(key, rows))
    if reconstruction is None:
        x, log_q = (x0, jnp.zeros_like(x0)) if dequantise is None else dequantise(data_keys, x0)
        alpha = schedule.alpha(times[0])
        x_low, data = alpha * x, jnp.log(alpha) - log_q
    else:
        marginal = process.marginal(x0, low)
        x_low = marginal.sample(data_keys)
        data = -marginal.log_prob(x_low) - reconstruction(process, x0, denoise(x_low, low, cond), x_low, low)

    probes = None
    if num_probes is not None:
        signs = jax.vmap(lambda k: jax.random.rademacher(k, (num_probes, *shape), x0.dtype))
        probes = signs(probe_keys)
    width = process.prior_std(times)
    angles = jnp.arctan2(schedule.sigma(times), schedule.alpha(times) * process.data_std)
    field = functools.partial(_field, denoise, process, times[0], times[-1])
    start = (x_low / width[0], jnp.zeros((batch, 1 if num_probes is None else num_probes), x0.dtype))
    xi, growth = integrator(field, start, angles, (cond, probes))

    latent = width[-1] * xi
    prior = process.prior(shape, times[-1]).log_prob(latent)
    volume = growth.mean(-1) + sites(x0) * jnp.log(width[-1] / width[0])
    if num_probes is None:
        error = jnp.zeros_like(volume)
    elif num_probes == 1:
        error = jnp.full_like(volume, jnp.inf)
    else:
        error = growth.std(-1, ddof=1) / math.sqrt(num_probes)
    return per_example(prior), volume, per_example(jnp.broadcast_to(data, x0.shape)), error, latent


def _field(denoise, process, low, high, state, angle, args):
    """d/d angle of (xi, log-determinant so far), whose leading axes are the batch."""
    (xi, _), (cond, probes) = state, args
    # Rounding may leave an angle a little above pi/2, whose tangent is negative.
    log_tan = jnp.log(jnp.sin(angle)) - jnp.log(jnp.maximum(jnp.cos(angle), 0.0))
    time = jnp.clip(process.schedule.time(-2.0 * (log_tan + math.log(process.data_std))), low, high)
    t, width = jnp.full(xi.shape[:1], time), process.prior_std(time)

    def flow(xi):
        x = width * xi
        return -process.convert(denoise(x, t, cond), "edm", x, t).value

    slope, push = jax.linearize(flow, xi)
    if probes is None:
        size = sites(xi)

        def one_site(i):
            tangent = jax.nn.one_hot(i, size, dtype=xi.dtype).reshape(xi.shape[1:])
            return push(jnp.broadcast_to(tangent, xi.shape)).reshape(-1, size)[:, i]

        growth = jax.lax.map(one_site, jnp.arange(size), batch_size=min(AT_ONCE, size)).sum(0)[:, None]
    else:
        along = jnp.moveaxis(probes, 1, 0)
        growth = jax.lax.map(lambda v: per_example(v * push(v)), along, batch_size=min(AT_ONCE, len(along))).T
    return slope, growth
