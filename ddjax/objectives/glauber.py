"""GGM's objective: learn a step of Glauber dynamics by telling noise from signal (Varma et al. 2024).

A step from s to t replaces one site by a ~ Pi, a law over symbols and "no change" (phi). For every symbol a

    P(a is noise | other sites, x_t^i = a) = Pi(a) / (Pi(a) + Pi(phi) p_s(a)),     p_s(a) = P(x_s^i = a | other sites)

so who can classify a token knows p_s, the law from which the reverse step draws the site. Here the network states the
cavity, and p_s(a) = sum_k cavity(k) q_s(a | k) is a law whatever it says.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ddjax import random
from ddjax.categorical import log_or_floor
from ddjax.grids import step_at
from ddjax.objectives.base import Objective, noised
from ddjax.predictions import Prediction, check_kind
from ddjax.processes import Mixture, Staggered, Sweeps
from ddjax.processes.categorical import check_prediction
from ddjax.types import left_broadcast, sites


def glauber(process: Staggered, kind: str = "cavity") -> Objective:
    """The mean over the steps of binary cross-entropies "was this token just drawn as noise?", nats; not a bound.

    One step is drawn per example, and what is asked is asked of the site that moves, for all tokens that it may show,
    each as often as it does given x_0: the expectation of the paper's loss over its token and its label. The
    network sees all other sites; the one in question shows a draw of the prior at its own time, which says nothing. So
    the only optimum is the exact cavity.

    process: `Staggered(a mixture process, Sweeps(...))`. Every step must keep a symbol with some probability and draw
        every symbol as noise with some: `Uniform` with a schedule that ends above 0, such as `LogLinear(0.1)`.
    kind: what the network predicts.
    Raises ValueError for another process, or where a step leaves nothing to learn.
    """
    _check(process)
    check_kind(kind, process.kinds, process)
    inner, clock = process.process, process.clock

    def draw(u, keys, x0):
        t, s = step_at(clock.times, u)
        own_t, own_s = clock.local(t, x0), clock.local(s, x0)
        moves = own_s < own_t
        which = jnp.argmax(moves.reshape(len(x0), -1), axis=-1)
        other_keys, hiding_keys = random.split(keys)
        hiding = inner.prior(x0.shape, own_t).sample(hiding_keys)
        xt = jnp.where(moves, hiding, process.marginal(x0, s).sample(other_keys))

        def moved(v):
            """The moving site's entry, `(batch, 1, ...)`: nothing more is computed for the others."""
            v = v.reshape(len(x0), sites(x0), *v.shape[x0.ndim :])
            return jnp.take_along_axis(v, left_broadcast(which, v), axis=1)

        def errors(prediction):
            check_prediction(prediction, "cavity", xt, process)
            before, after, shown, clean = moved(own_s), moved(own_t), moved(xt), moved(x0)
            law = inner.heat_bath(Prediction(moved(prediction.value), prediction.kind), shown, before, after)
            token = jnp.broadcast_to(jnp.arange(inner.num_states), (*clean.shape, inner.num_states))
            noise, kept = inner.kernel_noise_of(token, before, after), inner.survival(before, after)[..., None]
            signal = kept * jnp.exp(inner.marginal(clean[..., None], before).log_prob(token))
            log_odds = log_or_floor(noise) - log_or_floor(kept) - law.logits
            error = (noise * jax.nn.softplus(-log_odds) + signal * jax.nn.softplus(log_odds)).sum(-1)
            return jnp.where(moves, sites(x0) * left_broadcast(error[:, 0], x0), 0.0)

        return xt, t, errors

    return noised(process, kind, draw)


def _check(process: Staggered) -> None:
    if not (
        isinstance(process, Staggered) and isinstance(process.clock, Sweeps) and isinstance(process.process, Mixture)
    ):
        raise ValueError(f"glauber needs Staggered(a mixture process, Sweeps(...)), got {process!r}")
    inner = process.process
    with jax.ensure_compile_time_eval():
        levels = jnp.linspace(0.0, 1.0, process.clock.rounds + 1)
        kept = np.asarray(inner.survival(levels[:-1], levels[1:]))
        symbols = jnp.broadcast_to(jnp.arange(inner.num_symbols), (process.clock.rounds, inner.num_symbols))
        noise = np.asarray(inner.kernel_noise_of(symbols, levels[:-1], levels[1:]))
    if not (kept.min() > 0 and noise.min() > 0):
        raise ValueError(
            "glauber tells noise from signal: each sweep must keep symbols, and draw every symbol as noise, with some "
            f"probability; {inner!r} keeps {kept.min():.3g} and draws {noise.min():.3g} at the least; use one such as "
            "Uniform with a schedule that ends above 0, LogLinear(0.1)"
        )
