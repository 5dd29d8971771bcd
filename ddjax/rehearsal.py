"""What does not go together in a config is an error before anything is trained."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from ddjax import companions, random
from ddjax.config import ConfigError
from ddjax.predictions import bind
from ddjax.solvers.base import first_carry

if TYPE_CHECKING:
    from ddjax.experiment import Experiment


def rehearse(experiment: Experiment) -> None:
    """Run the objective and a step of the sampler on shapes alone. Raises ConfigError where they do not go together."""
    c, process, kind, named = experiment.config, experiment.process, experiment.kind, experiment.named
    objective, solver = experiment.objective(), experiment.solver()
    outputs = experiment.output_shape

    def network(params, xt, t, cond=None, **_):
        if jnp.ndim(t) > 1 and not hasattr(process, "points"):
            raise ValueError(f"the network {c.denoiser.name!r} takes one time for each example, not one for each site")
        if isinstance(cond, dict) and not told & set(cond):
            raise ValueError(f"the batch's condition has entries {', '.join(cond)}, which are not for the network")
        return jnp.zeros((xt.shape[0], *outputs))

    told = {"z"} | ({"coherence"} if c.data.coherence else set())
    told |= set(experiment.data.conditions)
    told |= {"x1"} if getattr(experiment.coupling, "show", False) else set()
    params = {"process": process.parameters} if named.learns_process else {}
    params |= {} if named.parameters is None else {"objective": named.parameters()}

    def train(weights, key, x0, cond):
        for name, shape in companions.companions(experiment).items():
            cond = {name: jnp.ones((x0.shape[0], *shape)), "cond": cond}
        apply = experiment.apply if named.listens else network
        return objective(key, apply, {"network": weights, **params} if params else weights, x0, cond)

    def draw(key, xt, t, s):
        denoise, cond = bind(network, {}, process, kind), experiment.to_sample(key, jnp.arange(2), None, xt)
        return solver.step(random.example_keys(key, 2), first_carry(solver, xt, cond, denoise), xt, t, s, denoise, cond)

    batch, key = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), jax.random.key(0)
    weights = jax.eval_shape(experiment.init, key) if named.listens else {}
    cond = batch((2,), dtype=jnp.int32) if experiment.data.num_classes else None
    if experiment.data.conditions:
        kinds = {"valid": jnp.bool_}
        entries = experiment.data.conditions.items()
        cond = {**{n: batch((2, *s), dtype=kinds.get(n, jnp.float32)) for n, s in entries}, "cond": cond}
    parts = {
        f"config.objective.name={c.objective.name!r}": (
            train,
            weights,
            key,
            batch((2, *experiment.data.shape)),
            cond,
        ),
        f"config.sample.solver={c.sample.solver!r}": (
            draw,
            key,
            batch((2, *experiment.state_shape)),
            batch(()),
            batch(()),
        ),
    }
    for name, part in parts.items():
        try:
            jax.eval_shape(*part)
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise ConfigError(
                f"{name} does not go with config.process.name={c.process.name!r} and config.denoiser.kind={kind!r}: "
                f"{' '.join(str(error).split())}"
            ) from error
