"""Every process with every kind of prediction and every bound: one table, its numbers by the library and by definition.

`nelbo` runs the library, by quadrature over pairs (x_0, x_t); `by_definition` says what must come out, with which it
shares no formula. `test_pairs` compares them; benchmarks/gaps.py prints them for docs/methods.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from by_definition import (
    Enumerated,
    Forward,
    by_symbol,
    cosine,
    fixed,
    hybrid,
    in_window,
    kernel,
    linear,
    products,
    thinning,
)

from ddjax import objectives, processes
from ddjax.fixtures import exact_nelbo
from ddjax.frozen import Frozen
from ddjax.predictions import Prediction
from ddjax.processes import chain, generators
from ddjax.schedules import Cosine, LogLinear, Polynomial
from ddjax.symbol_schedules import Spindle, SymbolPolynomial

# -- the pairs -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pair:
    """A process and its bound, what is predicted, and the corruption of each site by definition.

    make: number of symbols -> what `nelbo` is given. forward: (symbols, site) -> `Forward`.
    tight: the exact denoiser's bound is the entropy but for what an imperfect prior costs. times: a chain's grid.
    low: from where the exact denoiser is asked, about 1e-6 of the data lost; wide: from where the wrong one is.
    breaks: times at which the integrand has a corner. order: nodes of `exact_nelbo` on each of its pieces.
    """

    name: str
    kind: str
    make: Callable[[int], Any] = dataclasses.field(repr=False)
    forward: Callable[[int, int], Forward] = dataclasses.field(repr=False)
    bound: str = "NELBO"
    tight: bool = True
    times: tuple[float, ...] | None = None
    low: float = 1e-6
    wide: float = 0.15
    breaks: tuple[float, ...] = ()
    order: int = 16

    def __str__(self):
        return f"{self.name}-{self.kind}{'' if self.bound == 'NELBO' else '-' + self.bound}".replace(" ", "_")

    @property
    def base(self) -> str:
        """Which law over clean symbols the prediction is made from."""
        return "posterior" if self.kind in ("posterior", "velocity", "deaths") else "cavity"


def over(kinds, name, make, forward, **options):
    return [Pair(name, kind, make, forward, **options) for kind in kinds]


UNIFORM = lambda k: np.full(k, 1 / k)
MASK = lambda k: np.eye(k + 1)[-1]
# A lost symbol becomes 0, 1, or a noise symbol that no data have; never another.
LOPSIDED = lambda k: np.array([0.5, 0.2, *[0.0] * (k - 2), 0.3])
POWERS = np.array([0.7, 1.0, 2.0, 1.5, 2.5])
TILTS = np.array([0.25, 0.0, -0.25, 0.1, -0.1])
# One symbol up at rate 2 and down at rate 1, round the ends: no detailed balance.
RING = lambda k: 2 * np.roll(np.eye(k), 1, 1) + np.roll(np.eye(k), -1, 1) - 3 * np.eye(k)
STARTS, STOPS = (0.0, 0.1, 0.0), (0.5, 1.0, 0.9)
TOGETHER = (0.0, 0.0, 0.0)  # at a start the integrand may have a logarithm, which the quadrature wants at an end
IN_TURN = lambda i: (1 - (i + 1) / 2, 1 - i / 2)


def staggered(inner, starts=STARTS, stops=STOPS):
    """Of as many sites as the law has; two or three."""
    return lambda k, sites: processes.Staggered(inner(k), processes.Windows(start=starts[:sites], stop=stops[:sites]))


LAWS = ("posterior", "cavity")
LAWS_AND_RATIO, COUNTS = (*LAWS, "ratio"), (*LAWS, "deaths")
FIXED = (*LAWS_AND_RATIO, "velocity")

CONTINUOUS = [
    *over(FIXED, "Masked", lambda k: processes.Masked(k), lambda k, _: fixed(linear, MASK(k))),
    *over(
        FIXED,
        "Uniform, t^2",
        lambda k: processes.Uniform(k, Polynomial(2.0)),
        lambda k, _: fixed(lambda t: 1 - t**2, UNIFORM(k)),
        low=1e-3,
    ),
    *over(LAWS_AND_RATIO, "Hybrid", lambda k: processes.Hybrid(k), lambda k, _: hybrid(k, 0.1), low=1e-9, order=24),
    *over(
        LAWS_AND_RATIO,
        "StateMasked, powers",
        lambda k: processes.StateMasked(k, SymbolPolynomial(tuple(POWERS[:k]))),
        lambda k, _: by_symbol(lambda t: 1 - t ** POWERS[:k]),
        low=1e-9,
    ),
    *over(COUNTS, "Thinning", lambda k: processes.Thinning(k), lambda k, _: thinning(linear, k)),
    *over(
        LAWS,
        "Kernel, ring",
        lambda k: processes.Kernel(k, Frozen(RING(k)), Cosine()),
        lambda k, _: kernel(cosine, RING(k)),
        low=1e-7,
        order=24,
    ),
    *over(
        LAWS,
        "Staggered Masked",
        staggered(lambda k: processes.Masked(k)),
        lambda k, i: in_window(fixed(linear, MASK(k)), STARTS[i], STOPS[i]),
        low=0.0,
        wide=0.0,
        breaks=(0.1, 0.5, 0.9),
    ),
    *over(
        LAWS,
        "Masked, cosine",
        lambda k: processes.Masked(k, Cosine()),
        lambda k, _: fixed(cosine, MASK(k)),
    ),
    *over(
        ("cavity",),
        "Masked, sqrt t",
        lambda k: processes.Masked(k, Polynomial(0.5)),
        lambda k, _: fixed(lambda t: 1 - t**0.5, MASK(k)),
        low=1e-12,
    ),
    *over(
        ("cavity",),
        "Uniform, sqrt t",
        lambda k: processes.Uniform(k, Polynomial(0.5)),
        lambda k, _: fixed(lambda t: 1 - t**0.5, UNIFORM(k)),
        low=1e-12,
    ),
    *over(
        LAWS,
        "Masked, 1% left",
        lambda k: processes.Masked(k, LogLinear(1e-2)),
        lambda k, _: fixed(lambda t: 1 - 0.99 * t, MASK(k)),
    ),
    *over(
        LAWS,
        "Uniform, 1% left",
        lambda k: processes.Uniform(k, LogLinear(1e-2)),
        lambda k, _: fixed(lambda t: 1 - 0.99 * t, UNIFORM(k)),
    ),
    *over(
        LAWS,
        "StateMasked, 2% left",
        lambda k: processes.StateMasked(k, SymbolPolynomial(tuple(POWERS[:k]), eps=0.02)),
        lambda k, _: by_symbol(lambda t: 1 - 0.98 * t ** POWERS[:k]),
        low=1e-9,
    ),
    *over(
        COUNTS,
        "Thinning, 1% left",
        lambda k: processes.Thinning(k, LogLinear(1e-2)),
        lambda k, _: thinning(lambda t: 1 - 0.99 * t, k),
    ),
    *over(
        LAWS,
        "Kernel, ring, 1% left",
        lambda k: processes.Kernel(k, Frozen(RING(k)), LogLinear(1e-2)),
        lambda k, _: kernel(lambda t: 1 - 0.99 * t, RING(k)),
        low=1e-7,
        order=24,
    ),
    *over(LAWS, "Uniform, cosine", lambda k: processes.Uniform(k, Cosine()), lambda k, _: fixed(cosine, UNIFORM(k))),
    *over(
        FIXED,
        "Marginal",
        lambda k: processes.Marginal(k, probabilities=tuple(LOPSIDED(k))),
        lambda k, _: fixed(linear, LOPSIDED(k)),
    ),
    *over(
        LAWS,
        "StateMasked, spindle",
        lambda k: processes.StateMasked(k, Spindle(tuple(TILTS[:k]))),
        lambda k, _: by_symbol(lambda t: 1 - t - TILTS[:k] * np.sin(np.pi * t)),
    ),
    *over(
        LAWS,
        "Kernel, birth and death",
        lambda k: processes.Kernel(k, generators.birth_death(k)),
        lambda k, _: kernel(linear, np.asarray(generators.birth_death(k))),
        low=1e-7,
        order=24,
    ),
    *over(
        LAWS,
        "Kernel, Gaussian and mask",
        lambda k: processes.Kernel(k, generators.gaussian(k, 0.3, 0.4), Cosine(), absorb=0.4),
        lambda k, _: kernel(cosine, np.asarray(generators.gaussian(k, 0.3, 0.4)), 0.4),
        low=1e-7,
        order=24,
    ),
    *over(
        LAWS,
        "Thinning, cosine",
        lambda k: processes.Thinning(k, Cosine()),
        lambda k, _: thinning(cosine, k),
    ),
    *over(
        LAWS,
        "Staggered Uniform",
        staggered(lambda k: processes.Uniform(k), TOGETHER),
        lambda k, i: in_window(fixed(linear, UNIFORM(k)), 0.0, STOPS[i]),
        low=0.0,
        wide=0.0,
        breaks=(0.5, 0.9),
    ),
    *over(
        LAWS,
        "Staggered StateMasked",
        staggered(lambda k: processes.StateMasked(k, SymbolPolynomial((1.0, 2.0, 3.0, 1.0, 2.0)[:k])), TOGETHER),
        lambda k, i: in_window(by_symbol(lambda t: 1 - t ** np.array([1.0, 2.0, 3.0, 1.0, 2.0])[:k]), 0.0, STOPS[i]),
        low=0.0,
        wide=0.0,
        breaks=(0.5, 0.9),
    ),
    *over(
        ("posterior", "velocity"),
        "Masked",
        lambda k: objectives.FlowBound(processes.Masked(k)),
        lambda k, _: fixed(linear, MASK(k)),
        bound="FlowBound",
    ),
]

LOOSE = [
    Pair(
        "Uniform",
        "posterior",
        lambda k: objectives.FlowBound(processes.Uniform(k)),
        lambda k, _: fixed(linear, UNIFORM(k)),
        bound="FlowBound",
        tight=False,
    ),
    Pair(
        "Marginal",
        "velocity",
        lambda k: objectives.FlowBound(processes.Marginal(k, probabilities=tuple(LOPSIDED(k)))),
        lambda k, _: fixed(linear, LOPSIDED(k)),
        bound="FlowBound",
        tight=False,
    ),
]

# Coarse grids: the sites of a step move independently, so that even the exact denoiser pays. The KL of trajectories
# says how much. Only one site after another is exact.
COARSE = {"times": (1.0, 0.6, 0.0), "tight": False, "bound": "chain"}
# At t = 1, where nothing survives, all ratios are the noise's and a step has no cavity to be made from.
FROM_BELOW_ONE = {**COARSE, "times": (0.9, 0.5, 0.0)}
BAND = np.array([[0.7, 0.3, 0.0], [0.15, 0.7, 0.15], [0.0, 0.3, 0.7]])
CHAINS = [
    *over(LAWS, "Masked", lambda k: processes.Masked(k), lambda k, _: fixed(linear, MASK(k)), **COARSE),
    *over(
        FIXED,
        "Uniform, cosine",
        lambda k: processes.Uniform(k, Cosine()),
        lambda k, _: fixed(cosine, UNIFORM(k)),
        **FROM_BELOW_ONE,
    ),
    *over(LAWS, "Hybrid", lambda k: processes.Hybrid(k), lambda k, _: hybrid(k, 0.1), **COARSE),
    *over(
        LAWS_AND_RATIO,
        "StateMasked, powers",
        lambda k: processes.StateMasked(k, SymbolPolynomial(tuple(POWERS[:k]))),
        lambda k, _: by_symbol(lambda t: 1 - t ** POWERS[:k]),
        **FROM_BELOW_ONE,
    ),
    *over(LAWS, "Thinning", lambda k: processes.Thinning(k), lambda k, _: thinning(linear, k), **COARSE),
    *over(
        LAWS,
        "Kernel, ring",
        lambda k: processes.Kernel(k, Frozen(RING(k)), Cosine()),
        lambda k, _: kernel(cosine, RING(k)),
        **COARSE,
    ),
    *over(
        LAWS,
        "Chain of matrices",
        lambda k: processes.Chain(k, Frozen([BAND, BAND @ BAND])),
        lambda k, _: products([BAND, BAND @ BAND]),
        times=(1.0, 0.5, 0.0),
        tight=False,
        bound="chain",
    ),
    *over(
        LAWS,
        "Chain, absorbing (D3PM)",
        lambda k: chain.absorbing(k, 2),
        lambda k, _: fixed(linear, MASK(k)),
        times=(1.0, 0.5, 0.0),
        tight=False,
        bound="chain",
    ),
    *over(
        ("cavity",),
        "Masked",
        lambda k: processes.Masked(k),
        lambda k, _: fixed(linear, MASK(k)),
        times=(1.0, 0.0),
        tight=False,
        bound="chain of 1",
    ),
    *over(
        LAWS,
        "Staggered Uniform, in turn",
        staggered(lambda k: processes.Uniform(k), (0.5, 0.0), (1.0, 0.5)),
        lambda k, i: in_window(fixed(linear, UNIFORM(k)), *IN_TURN(i)),
        times=(1.0, 0.5, 0.0),
        bound="chain",
    ),
    *over(
        ("posterior",),
        "Staggered Masked, in turn",
        staggered(lambda k: processes.Masked(k), (0.5, 0.0), (1.0, 0.5)),
        lambda k, i: in_window(fixed(linear, MASK(k)), *IN_TURN(i)),
        times=(1.0, 0.5, 0.0),
        bound="chain",
    ),
]


def named(name, kind, among):
    return next(pair for pair in among if (pair.name, pair.kind) == (name, kind))


# -- the library's side ----------------------------------------------------------------------------------------


def process_of(pair, law):
    return pair.make(law.symbols, law.sites) if pair.name.startswith("Staggered") else pair.make(law.symbols)


def moved(law, states):
    """What the wrong denoiser adds to the exact one's logits, `(configurations, sites, symbols)`."""
    return np.random.default_rng(3).normal(size=(states**law.sites, law.sites, law.symbols))


def denoiser(pair, law, wrong):
    """The exact denoiser where `wrong` is 0; elsewhere its logits are moved, differently at each state."""
    process = process_of(pair, law)
    exact, change = law.denoise(process, pair.base), wrong * jnp.asarray(moved(law, process.num_states))
    powers = process.num_states ** np.arange(law.sites - 1, -1, -1)

    def denoise(xt, t, cond=None):
        prediction = Prediction(exact(xt, t).value + change[xt @ powers], pair.base)
        return prediction if pair.kind == pair.base else process.convert(prediction, pair.kind, xt, t)

    return denoise


def nelbo(pair, law, wrong, low):
    """NELBO - H by the library, nats."""
    if pair.times is None:
        return float(_continuous(pair, law, wrong, low)) - law.entropy
    process, times = process_of(pair, law), jnp.asarray(pair.times)
    return float(exact_nelbo(law, denoiser(pair, law, wrong), process, times=times).total[0]) - law.entropy


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continuous(pair, law, wrong, low):
    # Compiled once for the exact and the wrong denoiser and for any low end.
    process, denoise = process_of(pair, law), denoiser(pair, law, wrong)
    return exact_nelbo(law, denoise, process, t_range=(low, 1.0), order=pair.order).total[0]


def by_definition(pair, law, wrong):
    """The same pair without the library."""
    forwards = [pair.forward(law.symbols, i) for i in range(law.sites)]
    change = wrong * moved(law, len(forwards[0].matrix(0.5)))
    return Enumerated(law, forwards, pair.base, change, poisson=pair.kind == "deaths")


def exact_gap(pair, law, wrong, low):
    """NELBO - H by definition, nats."""
    enumerated = by_definition(pair, law, wrong)
    return enumerated.gap(low, pair.breaks) if pair.times is None else enumerated.chain_gap(pair.times)
