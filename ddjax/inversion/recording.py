"""`record` an example as the noise with which a sampler draws it, and `edit` it: draw again under something else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ddjax import random
from ddjax.grids import check_grid
from ddjax.inversion import categorical, ode
from ddjax.predictions import Prediction
from ddjax.processes.masked import Masked, Reveal
from ddjax.pytrees import as_pytree
from ddjax.sampling import sample
from ddjax.solvers.ancestral import Ancestral
from ddjax.solvers.base import Info, Solver, batched
from ddjax.types import Denoise, Sample, State, left_broadcast


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """A path of some examples, and the noise along it.

    states: from the first time to the last, where they are the examples.
    noise: of continuous states, shaped like them: standard normals, or, of a step without noise (into sigma = 0), what
        the state has beyond the step's mean. Of tokens `(..., states)`: one for each step, or a single one for
        `Masked`, where each site is drawn once. None for a deterministic solver: the first state says everything.
    solver: whose steps the noise is of.
    """

    times: Float[Array, " steps+1"]
    states: Array  # (batch, steps + 1, *sites)
    noise: Array | None  # (batch, steps or 1, ...)
    solver: Any = dataclasses.field(metadata={"static": True})


def record(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    x0: State,
    cond: Any = None,
    *,
    times: Array | Sequence[float],
    solver: Solver | None = None,
    independent: bool = False,
    iterations: int = 0,
    residual: str = "logit",
    floor: float = categorical.FLOOR,
    rows: Int[Array, " batch"] | None = None,
) -> Recording:
    """Invert x0: a noisy path from it, and what the model lacks at each step to draw that path under `cond`.

    x0: `(batch, *sites)`, clean. times: the grid, decreasing; its first time is where editing will begin (DICE's tau:
        the earlier, the less can change), its last what is reconstructed, x0 itself at 0.
    solver: one that says what its steps draw from: `Ancestral`, the default, or `DDIM` with eta > 0. Continuous states
        then have CycleDiffusion's latent code (Wu & De la Torre 2023, "Unifying Diffusion Models' Latent Space",
        algorithm 1), z = (x_s - mean) / std. Or one of single steps without noise (`DDIM`, `Heun`, `SingleStep`): the
        states are then those of its ODE (`inversion.ode`), and nothing is random.
    independent: draw each x_t from q(x_t | x_0) by itself, not as one path of the forward process: the "edit-friendly"
        noise space of Huberman-Spiegelglas et al. 2024, and DICE's algorithm 2. Its noise is larger and neighbours are
        negatively correlated, so that it holds the example faster. Not for `Masked`, whose masks never come back.
    iterations: of deterministic solvers: fixed-point iterations that make each step the inverse of the solver's, each
        as dear as the step; 0 is the naive inversion.
    residual, floor: of tokens. "logit" (DICE's) or "gumbel" (`inversion.categorical`); DICE's log one-hot of what was
        not drawn, VQ-Diffusion's unless given: the further below 0, the firmer the path holds.
    rows: row numbers that seed the examples, as in `ddjax.sample`.

    One evaluation a step. Memory: `(2 steps, *sites)` numbers an example; of tokens `(steps, *sites, states)`, for
    `Masked` `(*sites, symbols)`.
    Raises ValueError for a process or a solver whose steps are not made of such noise.
    """
    solver = Ancestral(process) if solver is None else solver
    deterministic = getattr(solver, "deterministic", False)
    if not (deterministic or hasattr(solver, "law")):
        raise ValueError(
            f"{type(solver).__name__} does not say what its steps draw from: inversion is for Ancestral and DDIM, and "
            "for Heun and SingleStep, whose single steps have no noise"
        )
    if not (deterministic or hasattr(process, "reverse")):
        raise ValueError(f"{type(process).__name__} has no reverse step of its own to invert")
    if residual not in categorical.RESIDUALS:
        raise ValueError(f"residual={residual!r} is unknown; it is 'logit' or 'gumbel'")
    if not floor < 0:
        raise ValueError(f"floor is the logarithm of a small probability, got {floor}")
    if independent and isinstance(process, Masked):
        raise ValueError("masks are drawn as one path: a site that shows its symbol is not masked again")
    if independent and deterministic:
        raise ValueError(f"{type(solver).__name__} draws nothing: its states are those of its ODE, not independent")
    if iterations < 0 or (iterations and not deterministic):
        raise ValueError(f"iterations={iterations}: a number of fixed-point iterations, for solvers without noise")
    x0 = jnp.asarray(x0)
    rows = jnp.arange(len(x0)) if rows is None else jnp.asarray(rows)
    if rows.shape != x0.shape[:1]:
        raise ValueError(f"rows has shape {rows.shape}; give one row number for each of the {len(x0)} examples")
    arguments = key, as_pytree(denoise), x0, cond, check_grid(times), rows, process, solver
    if deterministic:
        return _ascend(*arguments, iterations)
    return _record(*arguments, independent, residual, floor)


@functools.partial(jax.jit, static_argnames=("process", "solver", "iterations"))
def _ascend(key, denoise, x0, cond, times, rows, process, solver, iterations):
    keys = random.example_keys(key, rows)
    states = ode.ascend(keys, denoise, process, solver, x0, cond, times, iterations)
    return Recording(times, jnp.moveaxis(states, 0, 1), None, solver)


@functools.partial(jax.jit, static_argnames=("process", "solver", "independent", "residual", "floor"))
def _record(key, denoise, x0, cond, times, rows, process, solver, independent, residual, floor):
    start_keys, step_keys = random.split(random.example_keys(key, rows))
    first = process.marginal(x0, jnp.full(x0.shape[:1], times[0])).sample(start_keys)
    tokens, once = process.state == "categorical", isinstance(process, Masked)

    def target(keys, xt, t, s):
        """The next state of the path; at 0 the example, where it is a state."""
        if independent:
            law = process.marginal(x0, jnp.full(x0.shape[:1], s))
        else:
            law = process.bridge(x0, xt, s, t) if tokens else solver.law(Prediction(x0, "x0"), xt, s, t)
        xs = law.sample(keys)
        return jnp.where(s == 0, x0, xs) if xs.shape == x0.shape else xs

    def step(state, i):
        xt, kept = state
        t, s = times[i], times[i + 1]
        path_keys, noise_keys = random.split(random.fold_in(step_keys, i))
        xs = target(path_keys, xt, t, s)
        law = solver.law(denoise(xt, batched(t, xt), cond), xt, s, t)
        if not tokens:
            z = _normal(law, process).noise(xs)
            # What a replay will draw: no rounding is carried on, and a site that a step does not move stays.
            moved = law.drawn(z).astype(xs.dtype)
            return (moved, None), (jnp.where(s == 0, xs, moved) if xs.shape == x0.shape else moved, z)
        z = categorical.residual(noise_keys, categorical.log_law(law, process), xs, residual, floor)
        if once:
            kept = jnp.where(((xt == process.mask) & (xs != process.mask))[..., None], z.astype(kept.dtype), kept)
        return (xs, kept), (xs, None if once else z)

    kept = jnp.zeros((*x0.shape, process.num_symbols), times.dtype) if once else None
    (_, kept), (states, noise) = jax.lax.scan(step, (first, kept), jnp.arange(times.shape[0] - 1))
    states = jnp.moveaxis(jnp.concatenate([first[None], states]), 0, 1)
    return Recording(times, states, kept[:, None] if once else jnp.moveaxis(noise, 0, 1), solver)


def _normal(law: Any, process: Any) -> Any:
    """The law. Raises ValueError for one that is not made of normals."""
    if not hasattr(law, "noise"):
        raise ValueError(
            f"the reverse step of {type(process).__name__} is not made of normals: inversion is for Gaussian "
            "processes, or by a solver without noise (Heun)"
        )
    return law


@dataclasses.dataclass(frozen=True)
class Replay:
    """The solver that draws with recorded noise, as `edit` calls it.

    Its condition has entries "recording" and "noise" (the states and noise of a `Recording`), "weights" `(batch, steps,
    2)`, lambda_1 and lambda_2 of each example and step, and "cond", which is what the network is shown.

    solver: the recording's. injection: "linear", the sum of both noises, or "max", of tokens, the larger of the two.
    """

    solver: Any
    injection: str = "linear"

    def __post_init__(self):
        if self.injection not in categorical.INJECTIONS:
            raise ValueError(f"injection={self.injection!r} is unknown; it is 'linear' or 'max'")
        if self.injection == "max" and self.solver.process.state != "categorical":
            raise ValueError("injection='max' is for tokens: the larger of two normals is not a normal")

    def init(self, xt, cond=None):
        """How many steps were made."""
        if not isinstance(cond, dict) or not {"recording", "noise", "weights", "cond"} <= set(cond):
            raise ValueError("Replay finds its recording in the condition: call inversion.edit")
        return jnp.zeros(xt.shape[0], jnp.int32)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One draw with the recorded noise, and fresh noise where it has a weight."""
        at = jax.vmap(lambda a, i: a[jnp.minimum(i, a.shape[0] - 1)])  # a single residual serves all steps
        law = self.solver.law(denoise(xt, batched(t, xt), cond["cond"]), xt, s, t)
        noise, weights = at(cond["noise"], carry), at(cond["weights"], carry)
        recorded, fresh = (left_broadcast(weights[:, i], noise) for i in range(2))
        if self.solver.process.state == "gaussian":
            new = random.normal(keys, noise.shape[1:], noise.dtype)
            drawn = _normal(law, self.solver.process).drawn(recorded * noise, fresh * new)
        else:
            log_p = categorical.log_law(law, self.solver.process)
            drawn = categorical.redrawn(keys, log_p, noise, recorded, fresh, self.injection).astype(xt.dtype)
            if isinstance(law, Reveal):
                revealed = (xt == law.mask) & (at(cond["recording"], carry + 1) != law.mask)
                drawn = jnp.where(revealed, drawn, xt)
        return drawn, carry + 1, Info(jnp.ones(xt.shape[0], jnp.int32))


def edit(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    recording: Recording,
    cond: Any = None,
    *,
    lambda_1: float | Array = 1.0,
    lambda_2: float | Array = 0.0,
    injection: str = "linear",
    skip: int = 0,
    trajectory: bool = False,
    rows: Int[Array, " batch"] | None = None,
) -> Sample:
    """Sample again along a recording, under `cond`; by default with the recorded noise alone.

    denoise: the recording's, or another one: CycleDiffusion decodes with a model of another domain.
    lambda_1, lambda_2: the weights of the recorded and of fresh noise, numbers or `(steps,)`. New ones do not compile
        anew. Normals keep their variance where the squares sum to 1, DICE's residuals and Gumbel noise where the
        weights do. With DICE's residual a small lambda_1 is what lets an edit happen: its hold is lambda_1 times the
        floor. Where a step draws nothing, lambda_1 weighs what the recorded state has beyond its mean.
    injection: "linear", or, of tokens, "max" for the larger of lambda_1 z and lambda_2 g in the place of their sum.
    skip: begin this many steps later, from the recorded state there (T_skip of Huberman-Spiegelglas et al. 2024).

    A recording of a deterministic solver is sampled from its state by that solver; there are no weights.
    Raises ValueError for weights that do not fit.
    """
    batch, steps = recording.states.shape[0], recording.times.shape[0] - 1 - skip
    if not 0 <= skip <= skip + steps - 1:
        raise ValueError(f"skip={skip} leaves none of the {steps + skip} steps; it is 0 ... {steps + skip - 1}")
    weights = []
    for name, value in (("lambda_1", lambda_1), ("lambda_2", lambda_2)):
        if jnp.shape(value) not in ((), (steps,)):
            raise ValueError(f"{name} is a number, or one for each of the {steps} steps, got shape {jnp.shape(value)}")
        weights.append(jnp.broadcast_to(jnp.asarray(value, recording.times.dtype), (batch, steps)))
    states, noise, solver = recording.states[:, skip:], recording.noise, recording.solver
    if noise is None:
        if (jnp.shape(lambda_1), jnp.shape(lambda_2)) != ((), ()) or (lambda_1, lambda_2) != (1.0, 0.0):
            raise ValueError(f"{type(solver).__name__} draws nothing: there is no noise for lambda_1, lambda_2")
    else:
        noise = noise[:, skip:] if noise.shape[1] == steps + skip else noise
        solver = Replay(solver, injection)
        cond = {"recording": states, "noise": noise, "weights": jnp.stack(weights, -1), "cond": cond}
    return sample(
        key,
        denoise,
        process,
        shape=states[:, 0].shape,
        solver=solver,
        times=recording.times[skip:],
        cond=cond,
        init=states[:, 0],
        trajectory=trajectory,
        rows=rows,
    )


def round_trip_error(x0: State, again: State) -> Float[Array, " batch"]:
    """How far each example is from its reconstruction, `edit(...).x0` under the condition of its recording.

    Root mean square over sites; of tokens, the fraction of sites that differ.
    """
    x0, again = jnp.asarray(x0), jnp.asarray(again)
    sites = tuple(range(1, x0.ndim))
    if jnp.issubdtype(x0.dtype, jnp.integer):
        return jnp.mean(x0 != again, axis=sites)
    return jnp.sqrt(jnp.mean((x0 - again) ** 2, axis=sites))
