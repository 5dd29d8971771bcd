"""Objectives as they are called, with quadrature in the place of their draws."""

import jax
import jax.numpy as jnp
import numpy as np

from ddjax import random

HIGH, LOW = 5.0, -5.0  # the window of log-SNR over which expectations are taken


def mixture_nodes(law, order=10):
    """Points and weights for expectations over a GaussianMixture in one dimension."""
    log_w, means, covariances = (np.asarray(v) for v in law.parameters())
    z, w = np.polynomial.hermite_e.hermegauss(order)
    x = means[:, 0, None] + np.sqrt(covariances[:, 0, 0, None]) * z
    weights = np.exp(log_w)[:, None] * w / w.sum()
    return x.ravel(), (weights / weights.sum()).ravel()


class Rows:
    """A batch of every (log-SNR, x0, noise) node, and the weight of each row."""

    def __init__(self, law, log_snrs, weights, order=10, noise_order=24):
        x, wx = mixture_nodes(law, order)
        z, wz = np.polynomial.hermite_e.hermegauss(noise_order)
        grid = np.meshgrid(log_snrs, x, z, indexing="ij")
        self.log_snr, self.x0, self.noise = (jnp.asarray(v.ravel()) for v in grid)
        self.x0, self.noise = self.x0[:, None], self.noise[:, None]
        self.inner = jnp.asarray(np.einsum("i,j,k->ijk", np.ones_like(weights), wx, wz / wz.sum()).ravel())
        self.outer = jnp.asarray(np.repeat(weights, len(x) * len(z)))

    @classmethod
    def window(cls, law, nodes=32, **orders):
        """Gauss-Legendre nodes over the window of log-SNR."""
        g, w = np.polynomial.legendre.leggauss(nodes)
        half = 0.5 * (HIGH - LOW)
        return cls(law, LOW + half * (g + 1.0), half * w, **orders)

    def loss(self, monkeypatch, objective, apply, params, u, p, cond=None, x0=None, blocks=None):
        """The integral over u of what the objective costs, u = the distribution function at the rows' log-SNRs.

        p: the density of log-SNR that belongs to u. blocks: so many copies of the rows, and the loss of each.
        """
        copies = lambda v: jnp.concatenate([v] * (blocks or 1))
        monkeypatch.setattr(random, "stratified", lambda key, rows, dtype=None: copies(u))
        monkeypatch.setattr(random, "normal", lambda keys, shape, dtype=None: copies(self.noise))
        weights = self.inner * self.outer * p
        x0 = copies(self.x0 if x0 is None else x0)

        def of(weights):
            key = jax.random.key(0)
            return objective(key, apply, params, x0, cond, weights, train=False)[0]

        if blocks is None:
            return of(weights) * weights.sum()
        return jax.vmap(of)(jnp.kron(jnp.eye(blocks), weights)) * weights.sum()
