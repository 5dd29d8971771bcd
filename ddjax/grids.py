"""Grids: the n + 1 decreasing times at which a sampler stops, from noise to data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float

from ddjax import schedules

Grid = Float[Array, " steps+1"]


def _check(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a grid needs at least one step, got {steps}")


def _check_schedule(schedule: object, kind: type, name: str) -> None:
    if not isinstance(schedule, kind):
        raise ValueError(f"{name} is a grid of noise levels: it is for a {kind.__name__} schedule, got {schedule!r}")


def _as_array(times: Any) -> Array:
    """As it is where it is one: asking again takes longer than all of the checks."""
    if isinstance(times, jax.Array):
        return times
    return jnp.asarray(times, None if hasattr(times, "dtype") else float)


def check_grid(times: Grid | Sequence[float]) -> Grid:
    """The grid as an array. Raises ValueError unless it is at least two times in [0, 1] that decrease."""
    times = _as_array(times)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"times must be a grid of at least two decreasing times, got shape {times.shape}")
    if not isinstance(times, jax.core.Tracer):
        values = np.asarray(times)
        if not ((values[1:] < values[:-1]).all() and values[0] <= 1 and values[-1] >= 0):
            raise ValueError(f"times must decrease from at most 1 to at least 0 (1 is noise, 0 data), got {values}")
    return times


def check_grids(times: Any, batch: int) -> Array:
    """One grid for all as in `check_grid`, or one for each example, `(batch, steps + 1)`, whose times may stay equal.

    Raises ValueError for anything else.
    """
    if np.ndim(times) != 2:
        return check_grid(times)
    times = _as_array(times)
    if times.shape[0] != batch or times.shape[1] < 2:
        raise ValueError(
            f"times of shape {times.shape} are no grids for {batch} examples: give (steps + 1,) or ({batch}, steps + 1)"
        )
    if not isinstance(times, jax.core.Tracer):
        values = np.asarray(times)
        if not ((np.diff(values) <= 0).all() and (values[:, 0] <= 1).all() and (values[:, -1] >= 0).all()):
            raise ValueError(
                f"times must not increase, from at most 1 to at least 0 (1 is noise, 0 data), got {values}"
            )
    return times


def range_of(process: Any, t_range: tuple[float, float] | None) -> tuple[float, float]:
    """A range of times as two floats; None: `process.t_range`. Raises ValueError unless it is one, inside [0, 1]."""
    low, high = map(float, process.t_range if t_range is None else t_range)
    if not 0 <= low < high <= 1:
        raise ValueError(f"t_range must satisfy 0 <= low < high <= 1, got {(low, high)}")
    return low, high


def chain_grid(process: Any, times: Grid | Sequence[float] | None, t_range: tuple[float, float] | None) -> Grid | None:
    """The grid of a chain: `times`, else that of a process that lives on one; None means continuous time.

    Raises ValueError for a bad grid (see `check_grid`), or a grid and a range at once.
    """
    if times is None:
        return getattr(process, "times", None) if t_range is None else None
    if t_range is not None:
        raise ValueError("give times (a chain's grid) or t_range (continuous time), not both")
    return check_grid(times)


def step_at(times: Grid, u: Array) -> tuple[Array, Array]:
    """The step (t, s) at which u on [0, 1) falls when all steps are equally likely."""
    steps = times.shape[0] - 1
    i = jnp.minimum(jnp.floor(u * steps).astype(jnp.int32), steps - 1)
    return times[i], times[i + 1]


def uniform(steps: int, *, start: float = 1.0, end: float = 0.0) -> Grid:
    """Equal steps of the clock from `start` down to `end`."""
    _check(steps)
    return jnp.linspace(start, end, steps + 1)


def in_turn(times: Grid, parts: int) -> Grid:
    """The grid, which must run from 1 to 0, once in each of `parts` equal parts of the clock (`processes.in_blocks`).

    Raises ValueError where it does not: a step would then straddle two parts.
    """
    values = np.asarray(check_grid(times), np.float64)
    if parts < 1 or values[0] != 1 or values[-1] != 0:
        raise ValueError(f"needs at least one part and a grid from 1 to 0, got {parts} and {values[0]} to {values[-1]}")
    # The ends of the parts are computed as `in_blocks` does, and must come out as the same numbers.
    start = 1 - (np.arange(parts)[:, None] + 1) / parts
    stop = 1 - np.arange(parts)[:, None] / parts
    inside = np.where(values[:-1] == 1, stop, start + values[:-1] * (stop - start))
    return jnp.asarray(np.append(inside.ravel(), 0.0), times.dtype)


def cosine(steps: int) -> Grid:
    """t_i = cos(pi/2 i / steps): short first steps, while few sites are known (MD4, Shi et al. 2024, appendix)."""
    _check(steps)
    return jnp.sin(0.5 * math.pi * jnp.linspace(1.0, 0.0, steps + 1))


def log_linear(steps: int, *, end: float = 1e-3) -> Grid:
    """Equal steps of log t from 1 down to `end`, then data; with one step {1, 0}.

    Rates back to data go like 1 / t: each step but the last sees the same number of jumps at a site that has to jump
    yet, and reveals (linear schedule) the same share of the masks that are left. Raises ValueError unless 0 < end < 1.
    """
    _check(steps)
    if not 0 < end < 1:
        raise ValueError(f"log_linear's end is the last time before data, between 0 and 1, got {end}")
    # A grid of two steps goes by `end` itself.
    return jnp.append(jnp.asarray(np.geomspace(1.0, end, steps), float), 0.0)


def loss_aware(steps: int, times: Sequence[float], losses: Sequence[float]) -> Grid:
    """A grid from 1 to 0 with the same loss in each step, for a loss measured over time.

    times, losses: any number of times in [0, 1], increasing, and what the bound's integrand (nats per unit of time, of
        which `likelihood.nelbo` is the integral) or any other density is there: not negative, and not all 0. It is
        taken to be linear in between, and constant beyond the first and the last.
    Where the loss is what steps cost the output, equal shares cost least: steps are short where sites tell the most
    about each other. Raises ValueError for anything else.
    """
    _check(steps)
    t, loss = (np.asarray(v, np.float64) for v in (times, losses))
    if t.ndim != 1 or t.shape != loss.shape or not t.size or (np.diff(t) <= 0).any() or t[0] < 0 or t[-1] > 1:
        raise ValueError(f"times must increase within [0, 1] and have one loss each, got {times} and {losses}")
    if not (np.isfinite(loss).all() and (loss >= 0).all() and loss.any()):
        raise ValueError(f"losses must be finite, not negative and not all 0, got {losses}")
    knots = np.unique(np.concatenate([[0.0], t, [1.0]]))
    density = np.interp(knots, t, loss)
    width = np.diff(knots)
    total = np.append(0.0, np.cumsum(0.5 * (density[1:] + density[:-1]) * width))
    wanted = total[-1] * np.arange(steps - 1, 0, -1) / steps
    cell = np.searchsorted(total, wanted, side="right") - 1
    # The root of d u + (slope / 2) u^2 = rest, without a difference that cancels.
    rest, d, slope = wanted - total[cell], density[cell], np.diff(density)[cell] / width[cell]
    root = d + np.sqrt(np.maximum(d * d + 2.0 * slope * rest, 0.0))
    inside = knots[cell] + np.where(root > 0, 2.0 * rest / np.where(root > 0, root, 1.0), 0.0)
    return jnp.asarray(np.concatenate([[1.0], inside, [0.0]]), float)


def uniform_log_snr(schedule: schedules.Schedule, steps: int, *, start: float, end: float) -> Grid:
    """Equal steps of log-SNR from `start` (noise, low) up to `end` (data, high)."""
    _check(steps)
    _check_schedule(schedule, schedules.Schedule, "uniform_log_snr")
    return jnp.clip(schedule.time(jnp.linspace(start, end, steps + 1)), 0.0, 1.0)


def karras(
    schedule: schedules.Gaussian,
    steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Grid:
    """EDM's grid: equal steps of (sigma / alpha)**(1 / rho) from sigma_max to sigma_min, then data.

    (Karras et al. 2022, eq. 5.)

    The last step goes from sigma_min to t = 0. With one step the grid is {sigma_max, 0}.
    """
    _check(steps)
    _check_schedule(schedule, schedules.Gaussian, "karras")
    ramp = jnp.linspace(0.0, 1.0, steps) if steps > 1 else jnp.zeros((1,))
    sigma = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return _levels(schedule, sigma)


def _levels(schedule: schedules.Gaussian, sigma: Array, last: float | None = 0.0) -> Grid:
    """The times of noise levels sigma / alpha, and `last` after them."""
    times = jnp.clip(schedule.time(-2.0 * jnp.log(sigma)), 0.0, 1.0)
    return times if last is None else jnp.append(times, last)


def exponential(schedule: schedules.Gaussian, steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Grid:
    """Equal steps of log(sigma / alpha) from sigma_max to sigma_min, then data: `karras` in the limit of large rho."""
    _check(steps)
    _check_schedule(schedule, schedules.Gaussian, "exponential")
    ramp = jnp.linspace(0.0, 1.0, steps) if steps > 1 else jnp.zeros((1,))
    return _levels(schedule, sigma_max * (sigma_min / sigma_max) ** ramp)


def quadratic(steps: int, *, start: float = 1.0, end: float = 0.0) -> Grid:
    """Equal steps of sqrt(t): short last steps (Song et al. 2021, DDIM, appendix D.2)."""
    _check(steps)
    return jnp.linspace(math.sqrt(start), math.sqrt(end), steps + 1) ** 2


def of_table(
    steps: int,
    *,
    spacing: str = "trailing",
    entries: int = 1000,
    offset: int = 0,
    denoise: bool = False,
) -> Grid:
    """Times of a model trained on `entries` discrete ones (`schedules.Table`), as diffusers picks them.

    spacing (Lin et al. 2024, table 2): "leading", multiples of entries // (steps + 1), moved by `offset`; "trailing",
    down from the last in steps of entries / steps; "linspace", evenly with both ends. Entry i is at t = i / (entries
    - 1), and the grid ends at entry 0, t = 0.
    denoise: the last step is from an entry to the data, t = 0 of `schedules.ToData`: entry 0 ("leading", entry
        `offset`) is then one of the `steps` entries, at `ToData.least`. "trailing" is the same with and without.
    Diffusers' multistep solvers have denoise=False, the others True. Raises ValueError where two of the entries would
    be the same.
    """
    _check(steps)
    among = steps if denoise or spacing == "trailing" else steps + 1  # entries with both ends
    asked = spaced_entries(among, spacing=spacing, entries=entries, offset=offset)[:steps]
    picked = asked if denoise else np.append(asked, 0)
    if picked[0] > entries - 1 or not (np.diff(picked) < 0).all():
        raise ValueError(
            f"{steps} steps of {entries} entries, {spacing}, offset {offset}: each entry from {entries - 1} to 0 can "
            f"be used once, got {picked.astype(int)}"
        )
    times = np.maximum(asked / (entries - 1), schedules.ToData.least)
    return jnp.asarray(np.append(times, 0.0), float)


def spaced_entries(count: int, *, spacing: str, entries: int, offset: int = 0) -> np.ndarray:
    """`count` of the numbers from `entries` - 1 down to 0, as `of_table` spaces them."""
    if spacing == "leading":
        return np.arange(count - 1, -1, -1) * (entries // count) + offset
    if spacing == "trailing":
        return np.round(np.arange(entries, 0, -entries / count))[:count] - 1
    if spacing == "linspace":
        return np.round(np.linspace(0, entries - 1, count))[::-1]
    raise ValueError(f"spacing must be 'leading', 'trailing' or 'linspace', got {spacing!r}")


def beta(steps: int, *, a: float = 0.6, b: float = 0.6, start: float = 1.0, end: float = 0.0) -> Grid:
    """Equally spaced quantiles of a Beta(a, b): short steps at both ends for a, b < 1.

    (Lee et al. 2024, "Beta Sampling is All You Need".)
    """
    _check(steps)
    if not (a > 0 and b > 0):
        raise ValueError(f"a Beta distribution needs positive a and b, got {(a, b)}")
    quantiles = scipy.special.betaincinv(a, b, np.linspace(1.0, 0.0, steps + 1))
    return jnp.asarray(end + (start - end) * quantiles, float)


def through(schedule: schedules.Gaussian, steps: int, *, sigmas: Sequence[float]) -> Grid:
    """The noise levels sigma / alpha of a given list (align-your-steps, Sabour et al. 2024), at any number of steps.

    sigmas: decreasing, positive but for a last 0, which stays the last. Other numbers of steps than the list has:
    linear in log(sigma / alpha) between its entries, as its authors do.
    """
    _check(steps)
    _check_schedule(schedule, schedules.Gaussian, "through")
    given = np.asarray(sigmas, np.float64)
    to_data = given.size > 0 and given[-1] == 0
    given = given[:-1] if to_data else given
    if given.ndim != 1 or len(given) < 1 + (not to_data) or not ((np.diff(given) < 0).all() and given[-1] > 0):
        raise ValueError(f"sigmas must be at least two noise levels that decrease, got {sigmas}")
    count = steps if to_data else steps + 1
    where = np.linspace(0.0, 1.0, count) if count > 1 else np.zeros(1)
    levels = np.exp(np.interp(where, np.linspace(0.0, 1.0, len(given)), np.log(given)))
    return _levels(schedule, jnp.asarray(levels, float), 0.0 if to_data else None)


def shifted(times: Grid, shift: float) -> Grid:
    """Any grid, moved to where there is more noise: t -> shift t / (1 + (shift - 1) t).

    On `CondOT`'s clock it multiplies the noise level sigma / alpha by `shift` (Esser et al. 2024, eq. 23); it is for
    larger pictures. Applied once, to a schedule that is not itself shifted.
    """
    if not shift > 0:
        raise ValueError(f"shift must be positive (1 is none), got {shift}")
    times = check_grid(times)
    return shift * times / (1.0 + (shift - 1.0) * times)


def uniform_shifted(steps: int, *, shift: float = 3.0) -> Grid:
    """`shifted`, of `uniform`: the grid of Stable Diffusion 3."""
    return shifted(uniform(steps), shift)
