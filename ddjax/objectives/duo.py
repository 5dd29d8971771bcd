"""The curriculum of the diffusion duality: the uniform bound, its tokens shown softly."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ddjax.duality import gaussian_log_snr, survival_log_odds
from ddjax.objectives.base import Objective, noised
from ddjax.processes import Uniform
from ddjax.relaxed import softmax_tokens, top_tokens
from ddjax.types import left_broadcast


def duo(
    process: Uniform,
    kind: str = "cavity",
    *,
    tau: float,
    log_snr: tuple[float, float] | None = None,
    top: int | None = None,
) -> Objective:
    """The bound of uniform corruption at x_t = argmax(w), for a network that sees softmax(w / tau).

    (Sahoo et al. 2025, "The Diffusion Duality", the curriculum; with `top`, Deschenaux et al. 2026, chapter II.)

    w = a e_x + s eps has the Gaussian log-SNR whose argmax survives as the schedule says, under any schedule, so the
    network's clock keeps its meaning when training goes on with `elbo`, which this is in the limit tau -> 0. At tau > 0
    the network is told more than x_t, and the loss is no bound. tau is fixed: a curriculum is a few phases, each of
    which is compiled once.

    Args:
        process: `Uniform`, whose schedule may be any (`Duality` makes the Gaussian one explicit).
        kind: what the network predicts; it must take soft tokens (`TextTransformer` and `DiT` do).
        tau: temperature, positive; the authors' code lowers it from 0.1 to 0.01, then goes on without.
        log_snr: window of the Gaussian log-SNR to integrate, (low, high); the authors' is (1.75, 3.5) for a vocabulary
            of fifty thousand. Default: `process.t_range`.
        top: show only so many of the largest probabilities, as `SoftTokens`, and never build `(batch, sites, symbols)`
            of noise (`relaxed.top_tokens`). Default: all of them.

    Raises:
        ValueError: for another process, fewer than two symbols, or options out of range.
    """
    if not isinstance(process, Uniform) or process.num_symbols < 2:
        raise ValueError(f"duo is for Uniform of two symbols or more, got {process!r}; use elbo")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}; its limit 0 is elbo")
    symbols = process.num_symbols
    if top is not None and not 1 <= top <= symbols:
        raise ValueError(f"top must lie in [1, num_symbols={symbols}], got {top}; leave it out to show all symbols")
    low_high = process.t_range if log_snr is None else _times(process, log_snr)
    options = {"num_symbols": symbols, "tau": tau}

    def draw(u, keys, x0):
        t, scale = process.time_at(u, low_high)
        snr = gaussian_log_snr(process.schedule.log_snr(t), symbols)
        if top is None:
            shown, xt = softmax_tokens(keys, x0, snr, **options)
        else:
            shown, xt = top_tokens(keys, x0, snr, **options, top=top)
        return shown, t, lambda prediction: left_broadcast(scale, x0) * process.path_kl(x0, prediction, xt, t)

    return noised(process, kind, draw)


def _times(process: Uniform, log_snr: tuple[float, float]) -> tuple[float, float]:
    """The process's times between two Gaussian log-SNRs."""
    low, high = log_snr
    if not low < high:
        raise ValueError(f"log_snr must be (low, high) with low < high, got {log_snr}")
    with jax.ensure_compile_time_eval():
        odds = survival_log_odds(jnp.asarray([high, low], float), process.num_symbols)
        first, last = (float(t) for t in jnp.clip(process.schedule.time(odds), 0.0, 1.0))
    if not first < last:
        raise ValueError(f"log_snr={log_snr} lies beyond the schedule {process.schedule!r}: it has no time there")
    return first, last
