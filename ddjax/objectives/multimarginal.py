"""Objectives for interpolants between K marginals (Albergo et al. 2023, "Multimarginal generative modeling")."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ddjax import random
from ddjax.objectives.base import Objective, noised
from ddjax.objectives.interpolant import Coupling
from ddjax.processes import Barycentric
from ddjax.types import Rows


def together() -> Coupling:
    """Marginals 1 ... K - 1 are `cond["ends"]`, `(batch, *sites, K - 1)`; marginal 0 is x0. The network sees
    `cond["cond"]` alone.

    Which rows go together is the data's: independent draws of each, or sets that belong together.
    """

    def coupling(keys, x0, cond):
        if not isinstance(cond, dict) or "ends" not in cond:
            raise ValueError('the coupling `together` finds the other marginals in cond={"ends": ..., "cond": ...}')
        if cond["ends"].shape[:-1] != x0.shape:
            raise ValueError(f'cond["ends"] must be {(*x0.shape, "marginals - 1")}, got {cond["ends"].shape}')
        return cond["ends"], cond.get("cond")

    return coupling


def multimarginal(process: Barycentric, coupling: Coupling | None = None, *, concentration: float = 1.0) -> Objective:
    """Squared errors of all K ends, added up, at points drawn from the whole simplex (theorem 1: least at the g_k).

    coupling: (keys, x0, cond) -> (the other marginals, what the network sees); default `together()`.
    concentration: of the Dirichlet law of the points; 1 is uniform, less prefers faces and vertices. The paths that are
        used afterwards must lie where points were drawn: edges have no mass, but any neighbourhood of them has.
    """
    if not concentration > 0:
        raise ValueError(f"concentration must be positive, got {concentration}")

    def points(u, keys, x0):
        law = jnp.full(process.path.marginals, concentration, x0.dtype)
        return jax.vmap(lambda key: jax.random.dirichlet(key, law, dtype=x0.dtype))(keys)

    def errors(ends, prediction, xt, t):
        return ((ends - prediction.value) ** 2).sum(-1)

    return _between(process, coupling, points, errors)


def path_cost(process: Barycentric, coupling: Coupling | None = None) -> Objective:
    """The kinetic cost of the process's path, E of the integral of |velocity|^2, per site, to be lowered by the path.

    (Over the paths, at what the network has learned; Benamou & Brenier's least is over all flows.)
    params is `{"network": ..., "process": process.parameters}`, and the network gets no gradient.
    Raises ValueError where the path has no parameters.
    """
    if not hasattr(process.path, "parameters"):
        raise ValueError(f"path_cost needs a path with parameters (ddjax.simplex.Sines), got {process.path!r}")

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        learned = process.with_parameters(params["process"])

        def energy(ends, prediction, xt, t):
            return learned.convert(prediction, "velocity", xt, t).value ** 2

        along = _between(learned, coupling, lambda u, keys, x0: u.astype(x0.dtype), energy)
        return along(key, apply, jax.lax.stop_gradient(params["network"]), x0, cond, weights, rows, False)

    return objective


def _between(process, coupling, where, cost) -> Objective:
    """Mix the ends at the points (or times) that `where` draws, ask the network, and take `cost` at each site."""
    coupling = together() if coupling is None else coupling

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows = Rows.all(x0.shape[0]) if rows is None else rows
        key, coupling_key = jax.random.split(key)
        others, shown = coupling(random.example_keys(coupling_key, rows.index), x0, cond)
        if others.shape[-1] != process.path.marginals - 1:
            raise ValueError(f"the process has {process.path.marginals} marginals: {others.shape[-1]} + 1 were given")

        def draw(u, keys, x0):
            ends = jnp.concatenate([x0[..., None], others], axis=-1)
            t = where(u, keys, x0)
            xt = process.mix(ends, t)
            return xt, t, lambda prediction: cost(ends, prediction, xt, t)

        return noised(process, "ends", draw)(key, apply, params, x0, shown, weights, rows, train)

    return objective


__all__ = ["multimarginal", "path_cost", "together"]
