"""Losses for each part of a product, added up: TabDDPM's and DiGress's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from ddjax.grids import chain_grid, range_of, step_at
from ddjax.objectives.base import Objective, Reduction, Uniforms, noised
from ddjax.predictions import GAUSSIAN_KINDS, Prediction
from ddjax.processes.product import Product
from ddjax.types import sites


def by_parts(
    process: Product,
    kind: str,
    losses: Mapping[str, str],
    weights: Mapping[str, float] | None = None,
    *,
    times: Float[Array, " steps+1"] | Sequence[float] | None = None,
    t_range: tuple[float, float] | None = None,
    uniforms: Uniforms | None = None,
) -> Objective:
    """Sum over parts of a weight times the mean loss of its sites, at one time per example, uniform on the clock.

    losses: of each part: "bound", its term of the bound, nats; "cross_entropy" of its clean symbols, nats; or a kind of
        `GAUSSIAN_KINDS`, whose squared error it is.
    weights: of each part, default 1.
    times: a decreasing grid in the place of the clock: "bound" is then that of the chain with these steps, and other
        losses are at the starts of the steps.
    t_range: of times, default `process.t_range`. uniforms: as in `base.noised`.

    Weights for sites (padding) count inside their part alone; microbatches of an accumulated gradient then add up as by
    the weights of all parts together, which is the batch's own mean where all examples have the same.
    `elbo` is the bound itself, the sum over all sites.
    Raises ValueError for losses and weights that are not of the parts.
    """
    _check(process)
    shares = dict.fromkeys(process.processes, 1.0) if weights is None else dict(weights)
    for what, given in (("losses", losses), ("weights", shares)):
        if set(given) != set(process.processes):
            raise ValueError(f"{what} are of the parts {', '.join(process.processes)}, got {', '.join(given)}")
    for name, loss in losses.items():
        allowed = GAUSSIAN_KINDS if process[name].state == "gaussian" else ("cross_entropy",)
        if loss not in ("bound", *allowed):
            raise ValueError(f"the loss of part {name!r} is one of bound, {', '.join(allowed)}, got {loss!r}")
    times = chain_grid(process, times, t_range)
    low, high = range_of(process, t_range) if times is None else (0.0, 1.0)

    def draw(u, keys, x0):
        (t, s) = (low + (high - low) * u, None) if times is None else step_at(times, u)
        steps = high - low if times is None else times.shape[0] - 1  # the integral is so many times the mean
        xt = process.marginal(x0, t).sample(keys)

        def errors(prediction):
            found = {}
            for name, loss in losses.items():
                part, said, x, y = process[name], process.part(prediction, name), x0[name], xt[name]
                if loss == "bound":
                    kl = part.path_kl(x, said, y, t) if s is None else part.step_kl(x, said, y, s, t)
                    found[name] = steps * kl
                elif loss == "cross_entropy":
                    found[name] = part.reconstruction(x, said, y, t)
                else:
                    target = part.convert(Prediction(x, "x0"), loss, y, t).value
                    found[name] = (target - part.convert(said, loss, y, t).value) ** 2
            return found

        return xt, t, errors

    return noised(process, kind, draw, uniforms=uniforms, reduction=partial(Shares.of, shares))


class Shares(NamedTuple):
    """As `Reduction`, but the mean over each part's sites, times its weight, added up."""

    shares: Mapping[str, float]
    whole: Reduction

    @classmethod
    def of(cls, shares: Mapping[str, float], weights: Any, x0: Any) -> Shares:
        """Raises ValueError as `Reduction.of`."""
        return cls(shares, Reduction.of(weights, x0))

    def shown(self, process: Product, xt: Any) -> Any:
        """As `Reduction.shown`."""
        return self.whole.shown(process, xt)

    def __call__(self, errors: Mapping[str, Array]) -> Float[Array, ""]:
        """The loss."""
        x0, examples, own = self.whole
        parts = {name: Reduction(x0[name], examples, None if own is None else own[name]) for name in self.shares}
        return sum(share * parts[name](errors[name]) for name, share in self.shares.items())

    def by_time(self, errors: Mapping[str, Array], t: Any) -> dict[str, Array]:
        """As `Reduction.by_time`, of errors whose mean over all sites is the loss (where sites have no weights)."""
        scale = {name: share * sites(self.whole.x0) / sites(self.whole.x0[name]) for name, share in self.shares.items()}
        return self.whole.by_time({name: scale[name] * error for name, error in errors.items()}, t)


def tabddpm(
    process: Product,
    kind: str,
    *,
    times: Float[Array, " steps+1"] | Sequence[float] | None = None,
    t_range: tuple[float, float] | None = None,
    uniforms: Uniforms | None = None,
) -> Objective:
    """The squared error of the noise, mean over numbers, plus the bound's nats, mean over columns of symbols.

    (Kotelnikov et al. 2023, "TabDDPM", section 3, equation 3.) Arguments as in `by_parts`; with `times=uniform(1000)`
    it is their chain's. Theirs adds the prior's KL, which no parameter changes.
    """
    _check(process)
    numbers = [name for name, part in process.parts if part.state == "gaussian"]
    losses = {name: "noise" if name in numbers else "bound" for name in process.processes}
    symbols = len(losses) - len(numbers)
    weights = {name: 1.0 / (len(numbers) if name in numbers else symbols) for name in losses}
    return by_parts(process, kind, losses, weights, times=times, t_range=t_range, uniforms=uniforms)


def digress(
    process: Product, kind: str = "posterior", *, edges: float = 5.0, uniforms: Uniforms | None = None
) -> Objective:
    """Cross-entropy of the nodes plus `edges` times that of the edges (Vignac et al. 2023, "DiGress", equation 2).

    Each is a mean over the nodes, or edges, that there are: those of weight 0 (of smaller graphs) count nothing.
    process: with the parts "nodes" and "edges", or of "edges" alone.
    """
    _check(process)
    losses = dict.fromkeys(process.processes, "cross_entropy")
    weights = {name: edges if name == "edges" and len(losses) > 1 else 1.0 for name in losses}
    return by_parts(process, kind, losses, weights, uniforms=uniforms)


def _check(process: Any) -> None:
    if not isinstance(process, Product):
        raise ValueError(f"this loss is of several parts, of a `Product`; {type(process).__name__} is one process")
