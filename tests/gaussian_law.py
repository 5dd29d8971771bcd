"""Gaussian data under any linear Gaussian process, by linear algebra in NumPy: the exact denoiser, what the bound must
be, and what the process says it is. States are flat, `(batch, entries)`, u_t = A x_0 + N(0, V)."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddjax.predictions import Prediction
from ddjax.types import per_example

Moments = Callable[[float], tuple[np.ndarray, np.ndarray]]  # t -> A (states, dims), V (states, states)


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianLaw:
    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def random(cls, dims, seed=0):
        rng = np.random.default_rng(seed)
        factor = np.diag(rng.uniform(0.5, 1.5, dims)) + 0.4 * rng.normal(size=(dims, dims))
        return cls(0.5 * rng.normal(size=dims), factor @ factor.T)

    @property
    def entropy(self):
        return 0.5 * np.linalg.slogdet(2 * np.pi * np.e * self.covariance)[1]

    def posterior(self, a, v):
        """E[x_0 | u] = gain u + offset, and its covariance."""
        gain = np.linalg.solve(a @ self.covariance @ a.T + v, a @ self.covariance).T
        return gain, self.mean - gain @ a @ self.mean, self.covariance - gain @ a @ self.covariance

    def denoise(self, moments: Moments, times, shift=0.0):
        """The exact denoiser, right at these times only (so that it can be NumPy's), as `x0`."""
        rows = [self.posterior(*moments(float(t))) for t in times]
        times, gains, offsets = (jnp.asarray(np.stack(v)) for v in (times, *list(zip(*rows, strict=True))[:2]))

        def denoise(u, t, cond=None):
            i = jnp.argmin(jnp.abs(times - jnp.ravel(t)[:, None]), axis=-1)
            return Prediction(jnp.einsum("bij,bj->bi", gains[i], u) + offsets[i] + shift, "x0")

        return denoise

    def bound(self, moments: Moments, low, high, prior_covariance):
        """The bound's three terms with the exact denoiser and the likeliest x_0 as decoder."""

        def kl(mean, c, c1):
            log_det = np.linalg.slogdet(c1)[1] - np.linalg.slogdet(c)[1]
            return 0.5 * (np.trace(np.linalg.solve(c1, c)) - len(c) + log_det + mean @ np.linalg.solve(c1, mean))

        def information(t):
            a, v = moments(t)
            return a.T @ np.linalg.solve(v, a)

        eye = np.eye(len(self.mean))
        a, v = moments(high)
        # KL(N(A x0, V) || prior) in the mean over x0.
        spread = np.trace(np.linalg.solve(prior_covariance, a @ self.covariance @ a.T))
        prior = kl(a @ self.mean, v, prior_covariance) + 0.5 * spread
        bits = [0.5 * np.linalg.slogdet(eye + self.covariance @ information(t))[1] for t in (low, high)]
        decoder = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * np.linalg.inv(information(low)))[1]
        return np.array([prior, bits[0] - bits[1], decoder])


def points(dims):
    """Points of equal weight that have the moments of a standard normal to the third order: exact for quadratics."""
    return np.sqrt(dims) * np.concatenate([np.eye(dims), -np.eye(dims)])


def expected_bound(process, law, moments, noisy, entries, t_range, order=40, shift=0.0):
    """The mean of `likelihood.nelbo`'s three terms over the law, with no Monte Carlo: each is a quadratic.

    noisy: (distribution, standard normals) -> states. entries: of a state.
    """
    dims = len(law.mean)
    nodes, weights = np.polynomial.legendre.leggauss(order)
    pieces = np.linspace(0, 1, 5)
    at = np.concatenate([0.5 * (b - a) * nodes + 0.5 * (a + b) for a, b in itertools.pairwise(pieces)])
    weights = np.tile(weights / 8, 4)
    t, slope = process.time_at(jnp.asarray(at), t_range)
    denoise = law.denoise(moments, np.append(np.asarray(t), t_range[0]), shift)
    z = points(dims + entries)
    x0 = jnp.asarray(law.mean + z[:, :dims] @ np.linalg.cholesky(law.covariance).T)
    z = jnp.asarray(z[:, dims:])
    low, high = (jnp.full(len(x0), end) for end in t_range)

    @jax.jit
    def path(t):
        t = jnp.full(len(x0), t)
        xt = noisy(process.marginal(x0, t), z)
        return per_example(process.path_kl(x0, denoise(xt, t), xt, t)).mean()

    xt = noisy(process.marginal(x0, low), z)
    last = per_example(process.reconstruction(x0, denoise(xt, low), xt, low)).mean()
    diffusion = weights @ (np.asarray(jax.lax.map(path, t)) * np.asarray(slope))
    return np.array([per_example(process.prior_kl(x0, high)).mean(), diffusion, last])


def affine(step, entries):
    """Matrix and offset of an affine map of states."""
    at_zero, *columns = np.asarray(step(jnp.asarray(np.concatenate([np.zeros((1, entries)), np.eye(entries)]))))
    return np.stack(columns, axis=1) - at_zero[:, None], at_zero
