"""How likely a trained model finds states: `run.nelbo`, `run.ode` and `run.marginals`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ddjax import likelihood
from ddjax.batching import chunks
from ddjax.likelihood import FlowLikelihood
from ddjax.predictions import bind, check_bound
from ddjax.training.spread import Spread
from ddjax.types import Bound, Rows, State
from ddjax.types import batch_size as number_of

if TYPE_CHECKING:
    from ddjax.run import Run


def nelbo(
    run: Run,
    key: Key[Array, ""],
    x0: State,
    *,
    cond: Int[Array, " n"] | None = None,
    segments: Int[Array, "n length"] | None = None,
    size: Int[Array, " n"] | None = None,
    known: Bool[Array, batch * sites] | None = None,
    num_times: int | None = None,
    batch_size: int | None = None,
) -> Bound:
    """The bound on -log p(x0) of each example, nats: prior, diffusion and reconstruction (`likelihood.nelbo`).

    Of a network trained with the objective `grouped` that of as many steps as its sampler makes.

    x0: `(n, *shape)`. cond: labels `(n,)`, or None for the unconditional bound. segments: of packed documents, each
    of which is scored by itself (`data.packing`). known: sites that are given and cost nothing, such as padding.
    size: numbers of nodes, of graphs of several sizes; `known` are then the sites of nodes that there are not.
    `.bits_per_dim` of the result is in bits per site. `batch_size` does not change the result.
    """
    check_bound(run.process)
    number = run.config.eval.num_times if num_times is None else num_times
    bound = run.experiment.named.bound

    def score(x0: State, given: Any, rows: Rows) -> Bound:
        cond, segments, size, known = given
        cond = cond if segments is None else {"segments": segments, "cond": cond}
        cond = cond if size is None else {"size": size, "cond": cond}
        if bound is not None:
            steps = {"steps": run.config.sample.steps, "num_draws": number, "known": known, "rows": rows}
            return bound(key, run.denoise, run.process, x0, cond, **steps)
        return likelihood.nelbo(
            key,
            run.denoise,
            run.process,
            x0,
            run.experiment.shown(x0, cond),
            num_times=number,
            t_range=run.experiment.t_range,
            reconstruction=run.experiment.reconstruction(),
            known=known,
            rows=rows,
        )

    return _scored(run, score, x0, (cond, segments, size, known), batch_size)


def ode(
    run: Run,
    key: Key[Array, ""],
    x0: State,
    *,
    cond: Int[Array, " n"] | None = None,
    num_steps: int | None = None,
    num_probes: int | None = None,
    batch_size: int | None = None,
) -> FlowLikelihood:
    """The log-likelihood of each example under the probability-flow ODE, nats (`likelihood.ode`).

    Data with levels are dequantised by uniform noise of a bin's width, and the result bounds the log-probability of
    the levels; otherwise it is a density, or a bound on one where the process has a latent or auxiliary variables
    (`.bound`). The divergence is estimated with `num_probes` (Hutchinson's).

    x0, cond, batch_size: as in `nelbo`. num_steps: of the integrator.
    Raises ValueError for processes without such an ODE, and for levels that are not evenly spaced.
    """
    if run.process.state != "gaussian":
        raise ValueError(
            f"the process {run.config.process.name!r} corrupts tokens, which have no density and no flow of "
            "densities; use the bound (nelbo, --likelihood bound)"
        )
    noise = None
    if (levels := run.data.levels) is not None:
        widths = np.diff(np.asarray(levels, np.float64))
        if not np.allclose(widths, widths.mean(), rtol=1e-3):
            raise ValueError(f"uniform noise is for evenly spaced levels, got {np.asarray(levels)}; use the bound")
        noise = likelihood.UniformNoise(float(widths.mean()), *getattr(run.process, "support", ()))

    def score(x0: State, cond: Any, rows: Rows) -> FlowLikelihood:
        return likelihood.ode(
            key,
            run.denoise,
            run.process,
            x0,
            cond,
            divergence="hutchinson",
            num_probes=run.config.eval.probes if num_probes is None else num_probes,
            num_steps=run.config.eval.steps if num_steps is None else num_steps,
            dequantise=noise,
            rows=rows,
        )

    return _scored(run, score, x0, cond, batch_size)


def marginals(
    run: Run,
    x0: State,
    shown: Bool[Array, batch * sites],
    *,
    cond: Int[Array, " n"] | None = None,
    batch_size: int | None = None,
) -> Float[Array, " n"]:
    """Log p(x_S), nats, S the sites shown of each example, in one pass of the network (`likelihood.marginals`).

    x0, shown: `(n, *shape)`; what x0 has at other sites is not looked at. cond, batch_size: as in `nelbo`.
    Raises ValueError for a network that was not trained with `objective.name=marginals`.
    """
    if (name := run.config.objective.name) != "marginals":
        raise ValueError(f"log p of any subset of sites is learned by config.objective.name='marginals', not {name!r}")
    whole = run.experiment.apply.apply  # with the output that sampling cuts off (`Experiment.trained`)
    denoise = bind(whole, run.params, run.process, run.experiment.kind)
    x0, shown, parts = run.checked(x0), run.checked(shown), []
    for rows in chunks(len(x0), run.config.eval.batch_size if batch_size is None else batch_size):
        labels = None if cond is None else jnp.asarray(np.asarray(cond)[rows])
        states = jnp.asarray(x0[rows]), jnp.asarray(shown[rows])
        parts.append(likelihood.marginals(denoise, run.process, *states, run.experiment.shown(states[0], labels)))
    return jnp.concatenate(parts)[: len(x0)]


def _scored(
    run: Run, score: Callable[[State, Any, Rows], NamedTuple], x0: State, cond: Any, batch_size: int | None
) -> Any:
    """What `score(x0, cond, rows)` says of all examples: chunk by chunk, its arrays joined."""
    x0, parts, spread = run.checked(x0), [], Spread(run.mesh)
    batch_size = run.config.eval.batch_size if batch_size is None else batch_size
    count = number_of(x0)
    for rows in chunks(count, batch_size, spread.ways):
        own, labels = jax.tree.map(lambda v, rows=rows: np.asarray(v)[rows], (x0, cond))
        own, labels, index = spread.rows((own, labels, rows))
        found = score(own, labels, Rows(index, len(rows)))
        parts.append(spread.whole({n: v for n, v in found._asdict().items() if isinstance(v, jax.Array)}))
    return found._replace(**{n: jnp.concatenate([part[n] for part in parts])[:count] for n in parts[0]})
