"""Temperature, top-k, top-p and repetition: from a denoiser to a denoiser, for categorical states or parts of states.

**What is shaped is the cavity**, p(x_0^i | x_t without site i), whatever the network predicts: what the other sites say
about a site. What the site itself shows counts as it did, for that is the forward process, which nobody wants to
change. At a mask cavity and posterior are the same law, so under `Masked` all of this is what users of language models
expect. Under `Uniform` a tempered posterior would sharpen the evidence of x_t^i too: sites would freeze in the noise.

Each function gives back the denoiser itself where it is off, and else one that costs as many evaluations. With any of
them the samples are not those of a diffusion (docs/design.md, "Guidance").
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddjax.predictions import Prediction
from ddjax.predictions import evaluations as cost
from ddjax.processes import Masked, Product, staggered
from ddjax.pytrees import as_pytree
from ddjax.types import Denoise

LogLaw = Float[Array, "batch *sites symbols"]
Tokens = Int[Array, "batch *sites"]
_NEVER = -1e30  # the logarithm of 0, as in `ddjax.categorical.log_or_floor`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shaped:
    """A denoiser whose cavity went through `rule(log_p, xt)`. A planner that came with it is as it was."""

    base: Denoise
    rule: Callable[[LogLaw, Tokens], LogLaw]
    process: Any = dataclasses.field(metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """As many as the denoiser's."""
        return cost(self.base)

    @property
    def planner(self) -> Denoise:
        """The denoiser's; AttributeError where it has none."""
        return self.base.planner

    @property
    def both(self) -> Callable[..., tuple[Prediction, Prediction]]:
        """What the denoiser, shaped, and its planner predict, where one call gives both."""
        return functools.partial(_both, self, self.base.both)

    @property
    def calls(self) -> int:
        """That `both` makes."""
        return self.base.calls

    def __call__(self, xt, t, cond=None):
        """The shaped law, as log-probabilities."""
        return self.shape(self.base(xt, t, cond), xt, t)

    def shape(self, prediction: Prediction, xt: Tokens, t: Array) -> Prediction:
        """What a prediction becomes: a cavity; under `Masked` a posterior stays one, and the time is not asked for.

        Of a `Product` each part of symbols is shaped by itself, the others stay.
        """
        kind = _kind(self.process, prediction.kind)
        prediction = prediction if kind == prediction.kind else self.process.convert(prediction, kind, xt, t)
        if not isinstance(self.process, Product):
            return Prediction(self._law(prediction.value, xt), kind)
        value = {
            name: self._law(law, xt[name]) if _has_laws(self.process[name]) else law
            for name, law in prediction.value.items()
        }
        return Prediction(value, kind)

    def _law(self, logits: Array, xt: Tokens) -> LogLaw:
        shaped = self.rule(jax.nn.log_softmax(logits), xt)
        return jnp.maximum(jax.nn.log_softmax(shaped), _NEVER)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tempered:
    """p^(1 / temperature)."""

    temperature: Array

    def __call__(self, log_p, xt):
        """At 0 the limit: the likeliest symbols, all alike."""
        gap = log_p - log_p.max(-1, keepdims=True)
        warm = self.temperature > 0
        cold = jnp.where(gap == 0, 0.0, _NEVER)
        return jnp.where(warm, gap / jnp.where(warm, self.temperature, 1.0).astype(gap.dtype), cold)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """The k likeliest symbols; of equally likely ones the first."""

    k: int = dataclasses.field(metadata={"static": True})

    def __call__(self, log_p, xt):
        """`lax.top_k`, and its values put back where they were."""
        values, ids = jax.lax.top_k(log_p, min(self.k, log_p.shape[-1]))
        return jnp.put_along_axis(jnp.full_like(log_p, _NEVER), ids, values, axis=-1, inplace=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopP:
    """The smallest set of likeliest symbols that has mass p; of equally likely ones the first (Holtzman et al. 2020).

    Found by what is left out: the largest set of unlikely symbols whose mass is at most 1 - p.
    """

    p: Array

    def __call__(self, log_p, xt):
        """No sort: the least probability that stays is found by halving, bit by bit, a sum over symbols at a time."""
        p = jnp.exp(log_p)
        spare, position = (1.0 - self.p).astype(p.dtype), jnp.arange(p.shape[-1])
        integer, width = (jnp.int32, 30) if p.dtype == jnp.float32 else (jnp.int64, 62)  # enough for numbers below 2

        def left_out(bits):  # of positive floats they are in the order of the numbers
            least = jax.lax.bitcast_convert_type(bits, p.dtype)[..., None]
            return jnp.where(p < least, p, 0.0).sum(-1)

        bits = _last(lambda bits: left_out(bits) <= spare, jax.lax.bitcast_convert_type(p.max(-1), integer), width)
        least = jax.lax.bitcast_convert_type(bits, p.dtype)
        # Of those that are just as likely as the least one that stays, some may go.
        alike = p == least[..., None]
        count = alike.sum(-1)
        gone = jnp.floor((spare - left_out(bits)) / jnp.where(least > 0, least, 1.0)).astype(count.dtype)
        stay = jnp.maximum(count - jnp.where(least > 0, gone, 0), 1)

        def first(n):
            return alike & (position < n[..., None])

        end = _last(lambda n: first(n).sum(-1) <= stay, jnp.full_like(count, p.shape[-1]), p.shape[-1].bit_length())
        return jnp.where((p > least[..., None]) | first(end), log_p, _NEVER)


def _last(true: Callable[[Array], Array], high: Array, width: int) -> Array:
    """The largest n in [0, high], high < 2^width, for which `true(n)`; it holds at 0 and, once false, stays so."""

    def step(i, found):
        tried = found | jnp.left_shift(jnp.ones_like(high), (width - 1 - i).astype(high.dtype))
        return jnp.where((tried <= high) & true(jnp.minimum(tried, high)), tried, found)

    return jax.lax.fori_loop(0, width, step, jnp.zeros_like(high))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalised:
    """p(k) / penalty for every symbol k that another site shows."""

    penalty: Array

    def __call__(self, log_p, xt):
        """By how often the example shows each symbol, the site itself left out."""
        symbols = log_p.shape[-1]
        counts = jax.vmap(lambda x: jnp.bincount(x.ravel(), length=symbols + 1)[:symbols])(jnp.minimum(xt, symbols))
        counts = counts.reshape(len(xt), *[1] * (xt.ndim - 1), symbols)
        own = jnp.arange(symbols) == xt[..., None]
        return log_p - jnp.where(counts > own, jnp.log(self.penalty).astype(log_p.dtype), 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unlike:
    """Nothing that a neighbour shows."""

    def __call__(self, log_p, xt):
        """Where nothing else is possible the law stays as it is."""
        if xt.ndim != 2:
            raise ValueError(f"neighbours are those of sequences (batch, length), not of states of shape {xt.shape}")
        off = jnp.full_like(xt[:, :1], -1)
        symbols = jnp.arange(log_p.shape[-1])
        before, after = (jnp.concatenate(pair, axis=1) for pair in ((off, xt[:, :-1]), (xt[:, 1:], off)))
        other = jnp.where((symbols == before[..., None]) | (symbols == after[..., None]), _NEVER, log_p)
        return jnp.where(other.max(-1, keepdims=True) > 0.1 * _NEVER, other, log_p)


def with_temperature(denoise: Denoise, process: Any, value: float) -> Denoise:
    """Each cavity to the power 1 / value, normalised. 1 is off, 0 the likeliest symbol; below 1 is sharper."""
    _check(process, "temperature", value, value >= 0 if _known(value) else True, "0 or more")
    return denoise if _is(value, 1.0) else _shaped(denoise, process, Tempered(_leaf(value)))


def with_top_k(denoise: Denoise, process: Any, k: int) -> Denoise:
    """Only the k likeliest symbols of each cavity; as many as there are is off. A new k compiles anew."""
    _check(process, "top_k", k, isinstance(k, int) and k >= 1, "a whole number, 1 or more")
    symbols = max(one.num_symbols for one in _with_laws(process))
    return denoise if k >= symbols else _shaped(denoise, process, TopK(k))


def with_top_p(denoise: Denoise, process: Any, p: float) -> Denoise:
    """Only the smallest set of likeliest symbols of each cavity that has mass p or more. 1 is off."""
    _check(process, "top_p", p, 0 < p <= 1 if _known(p) else True, "in (0, 1]")
    return denoise if _is(p, 1.0) else _shaped(denoise, process, TopP(_leaf(p)))


def with_repetition_penalty(denoise: Denoise, process: Any, penalty: float) -> Denoise:
    """The probability of each symbol that another site of the example shows, divided by the penalty. 1 is off.

    (After Keskar et al. 2019, CTRL, who divide logits, which have no zero: docs/departures.md.) Where the noise shows
    symbols (`Uniform`), they count, and early in sampling they mean nothing.
    """
    _check(process, "repetition", penalty, penalty > 0 if _known(penalty) else True, "positive")
    return denoise if _is(penalty, 1.0) else _shaped(denoise, process, Penalised(_leaf(penalty)))


def without_repeats(denoise: Denoise, process: Any) -> Denoise:
    """No symbol that the site before or after shows. For sequences `(batch, length)`; raises ValueError for others.

    Neighbours that are written in one step do not see each other: only one site at a time is sure to have no repeats.
    """
    _check(process, "no_repeats", None, True, "")
    return _shaped(denoise, process, Unlike())


def shaped(
    denoise: Denoise,
    process: Any,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition: float = 1.0,
    no_repeats: bool = False,
) -> Denoise:
    """All of them, in this order: repetition, no repeats, temperature, top-k, top-p. By default the denoiser itself."""
    denoise = with_repetition_penalty(denoise, process, repetition) if repetition != 1.0 else denoise
    denoise = without_repeats(denoise, process) if no_repeats else denoise
    denoise = with_temperature(denoise, process, temperature) if temperature != 1.0 else denoise
    denoise = with_top_k(denoise, process, top_k) if top_k is not None else denoise
    return with_top_p(denoise, process, top_p) if top_p != 1.0 else denoise


def _masks(process: Any) -> bool:
    """Whether cavity and posterior are the same at every site that is still to be written."""
    return isinstance(staggered.common(process), Masked)


def _kind(process: Any, kind: str) -> str:
    """The kind of prediction that is shaped, in the place of this one: in a `Product` of each family of parts."""
    if not isinstance(process, Product):
        return "posterior" if kind == "posterior" and _masks(process) else "cavity"
    families = {tuple(one.kinds): process.kind_of(kind, name) for name, one in process.parts}
    for _, one in process.parts:
        if _has_laws(one) and not (families[tuple(one.kinds)] == "posterior" and _masks(one)):
            families[tuple(one.kinds)] = "cavity"
    return "+".join(families.values())


def _has_laws(process: Any) -> bool:
    """Whether it says laws over symbols, which can be shaped."""
    return process.state == "categorical" and "cavity" in process.kinds


def _with_laws(process: Any) -> list[Any]:
    """The process, or those parts of it, that say laws over symbols."""
    return list(filter(_has_laws, process.processes.values() if isinstance(process, Product) else [process]))


def _both(shaped: Shaped, both: Callable, xt: Tokens, t: Array, cond: Any = None) -> tuple[Prediction, Prediction]:
    what, where = both(xt, t, cond)
    return shaped.shape(what, xt, t), where


def _shaped(denoise: Denoise, process: Any, rule: Any) -> Denoise:
    if hasattr(denoise, "denoise") and hasattr(denoise, "planner"):  # two networks, of which one says what
        return dataclasses.replace(denoise, denoise=_shaped(denoise.denoise, process, rule))
    return Shaped(as_pytree(denoise), rule, process)


def _leaf(value: Any) -> Array:
    return jnp.asarray(value, jnp.result_type(float))


def _known(value: Any) -> bool:
    return isinstance(value, (int, float))


def _is(value: Any, off: float) -> bool:
    return _known(value) and value == off


def _check(process: Any, name: str, value: Any, good: bool, wanted: str) -> None:
    if not _with_laws(process):
        raise ValueError(f"{name} shapes laws over symbols, and {type(process).__name__} has none: leave it out")
    if not good or (_known(value) and not math.isfinite(value)):
        raise ValueError(f"{name} must be {wanted}, got {value}")
