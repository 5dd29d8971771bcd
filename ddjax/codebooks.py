"""Samples that are written down in few bits: denoising diffusion codebook models (DDCM).

(Ohayon et al. 2025, "Compressed image generation with denoising diffusion codebook models".) The normals of a solver
are entries of codebooks that everyone can make (`solvers.Codebook`), so a sample *is* the numbers of the entries taken:

    generate    any entries: samples, and their codes
    encode      the entries whose normals lead towards given examples, or towards whatever a rule asks for
    decode      a code's sample

    solver = ddjax.solvers.DDIM(process, eta=1.0, noise=ddjax.solvers.Codebook(seed=0, size=256))
    drawn = ddjax.codebooks.encode(denoise, process, x0, solver=solver, times=ddjax.grids.uniform(100))
    drawn.codes, drawn.codes.bits(solver.noise)         # the code, and its bits an example
    ddjax.codebooks.decode(denoise, process, drawn.codes, shape=x0.shape, solver=solver, times=...)

A rule says what is chosen: the highest of `rule(z, about)` over the entries z. `towards` (the paper's: the largest
inner product with x0 - x0_hat) compresses; `towards_prediction` is compressed guidance; any function of the states that
entries lead to (`About.states`) is compressed conditional generation or restoration, such as `measured`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from ddjax import random
from ddjax.grids import check_grid
from ddjax.predictions import evaluations
from ddjax.pytrees import as_pytree
from ddjax.solvers import Codebook, Restart
from ddjax.solvers.base import Solver, batched, check_own_times, first_carry
from ddjax.solvers.cached import Asked
from ddjax.types import Denoise, PyTree, State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """What was taken: at each draw that chooses, entries, and the levels at which those after the first joined.

    indices: `(batch, draws, atoms)`, each below `Codebook.size`. weights: `(batch, draws, atoms - 1)`, below
    `Codebook.levels`. first: the number of the first draw that chooses: 0 is that of the first state, i that of step i,
    counted from 1. Draws that do not choose take entry 0.
    """

    indices: Int[Array, "batch draws atoms"]
    weights: Int[Array, "batch draws atoms-1"]
    first: int = dataclasses.field(default=1, metadata={"static": True})

    def bits(self, codebook: Codebook) -> float:
        """Of each example: (draws that choose) x (M log2 K + (M - 1) log2 levels)."""
        return self.indices.shape[1] * codebook.bits


class Coded(NamedTuple):
    """Samples and their codes."""

    x0: State
    codes: Codes
    nfe: Int[Array, " batch"]


class About(NamedTuple):
    """What a rule may look at when the entries of a step are scored."""

    x: State  # x_t
    x0: State  # predicted of it
    t: Array
    s: Array
    target: PyTree  # what `encode` was given
    cond: PyTree
    denoise: Denoise
    states: Callable[[Array], Array]  # entries (entries, 1 or batch, *sites) to the x_s that they lead to


Rule = Callable[[Array, About], Array]  # (entries, 1 or batch, *sites) to scores (entries, batch)


def towards(z: Array, about: About) -> Array:
    """The inner product with (target - x0_hat), the target being the clean example: compression."""
    return _inner(z, about.target - about.x0)


def towards_prediction(z: Array, about: About) -> Array:
    """The inner product with (x0_hat under the condition `target` - x0_hat): compressed classifier-free guidance.

    (Theirs, in their code, is the difference of the two predictions of noise: the same direction.) The target is that
    condition. One more evaluation a step, which `nfe` does not count.
    """
    prediction = about.denoise(about.x, batched(about.t, about.x), about.target)
    if prediction.kind != "x0":
        raise ValueError(f"towards_prediction compares predictions of x0, got {prediction.kind!r}: bind it as x0")
    return _inner(z, prediction.value - about.x0)


def measured(operator: Callable[[State, Array], Array]) -> Rule:
    """A rule for restoration: minus |target - operator(x_s, s)|^2 of the state x_s that an entry leads to.

    target: measurements `(batch, ...)`. operator: what is measured of states at a time, `(batch, ...)`.
    """

    def rule(z: Array, about: About) -> Array:
        seen = jax.lax.map(lambda x: operator(x, about.s), about.states(z))
        error = (seen - about.target) ** 2
        return -error.reshape(*error.shape[:2], -1).sum(-1)

    return rule


def _inner(z: Array, direction: Array) -> Array:
    sites = tuple(range(2, z.ndim))
    return (z * direction).sum(sites)


class _Handed:
    """A source that gives one vector, once."""

    def __init__(self, z: State):
        self.z, self.asked = z, 0

    def init(self, x):
        return ()

    def draw(self, state, keys, x, t, s):
        self.asked += 1
        return self.z.astype(x.dtype), state


# -- the three uses ----------------------------------------------------------------------------------------------


def generate(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    *,
    shape: Sequence[int],
    solver: Solver,
    times: Array,
    cond: PyTree = None,
    chosen: tuple[int, int] | None = None,
    rows: Int[Array, " batch"] | None = None,
) -> Coded:
    """Samples whose entries are any, and their codes.

    shape, times, cond, rows: as in `ddjax.sample`. solver: a stochastic one, whose `noise` is a `Codebook`.
    chosen: (first, stop), the draws that choose (see `Codes`); default: all but that of a last step to t = 0, which
        adds no noise or next to none. Others take entry 0.
    Over the codebook's seed the law is that of the solver with fresh normals. Raises ValueError for solvers that draw
    no normals, or more than once a step.
    """
    times, _ = _checked(solver, process, times)
    rows = jnp.arange(shape[0]) if rows is None else jnp.asarray(rows)
    chosen = _range(chosen, times, 0)
    arguments = (as_pytree(denoise), times, cond, random.example_keys(key, rows))
    return _run(*arguments, process=process, solver=solver, shape=tuple(shape), chosen=chosen, rule=None)


def encode(
    denoise: Denoise,
    process: Any,
    target: PyTree,
    *,
    solver: Solver,
    times: Array,
    cond: PyTree = None,
    rule: Rule = towards,
    shape: Sequence[int] | None = None,
    chosen: tuple[int, int] | None = None,
) -> Coded:
    """Codes of samples that a rule leads to, and the samples themselves: what `decode` gives, bit for bit.

    target: what the rule compares with; for `towards` clean examples `(batch, *sites)`.
    rule: (entries z `(entries, 1 or batch, *sites)`, `About`) -> scores `(entries, batch)`; the highest is taken. A
        function that compares by value: a new one compiles anew.
    shape: of the samples, where the target has another. chosen: as in `generate`, which also chooses the first state;
        here that is entry 0 of its codebook for all examples, and costs no bits.

    The same program but for the choice: bit for bit where XLA does not fuse multiply-adds differently in the two, and
    to the last bits of a float otherwise. `decode` is a continuous function of the state, so that such bits stay bits.
    """
    times, _ = _checked(solver, process, times)
    shape = tuple(jnp.shape(target) if shape is None else shape)
    chosen = _range(chosen, times, 1)
    if chosen[0] == 0:
        raise ValueError("encode chooses at steps, the first of which is draw 1; the first state is entry 0 for all")
    arguments = (as_pytree(denoise), times, cond, target)
    return _run(*arguments, process=process, solver=solver, shape=shape, chosen=chosen, rule=rule)


def decode(
    denoise: Denoise,
    process: Any,
    codes: Codes,
    *,
    shape: Sequence[int],
    solver: Solver,
    times: Array,
    cond: PyTree = None,
) -> State:
    """The samples of some codes, `shape`: with the same network, process, solver (and codebook), times and condition.

    Raises ValueError for codes that do not fit the codebook, the batch or the grid.
    """
    times, book = _checked(solver, process, times)
    batch, draws, atoms = codes.indices.shape
    if (batch, atoms) != (shape[0], book.atoms) or codes.weights.shape != (batch, draws, book.atoms - 1):
        raise ValueError(
            f"codes of shapes {codes.indices.shape} and {codes.weights.shape} do not fit {shape[0]} examples and a "
            f"codebook of {book.atoms} atoms"
        )
    chosen = _range((codes.first, codes.first + draws), times, 0)
    arguments = (as_pytree(denoise), times, cond, codes)
    return _run(*arguments, process=process, solver=solver, shape=tuple(shape), chosen=chosen, rule=None).x0


def _checked(solver: Any, process: Any, times: Array) -> tuple[Array, Codebook]:
    """The grid and the codebook."""
    name, book = type(solver).__name__, getattr(solver, "noise", None)
    if not isinstance(book, Codebook):
        raise ValueError(f"{name} takes its normals from {book!r}: give it noise=solvers.Codebook(seed, size)")
    if process.state != "gaussian":
        raise ValueError(f"codebooks are of normals: {type(process).__name__} has none")
    if isinstance(solver, Restart):
        raise ValueError("Restart draws normals more than once a step: codebooks give one vector a step")
    times = check_grid(times)
    check_own_times(solver, times)
    return times, book


def _range(chosen: tuple[int, int] | None, times: Array, first: int) -> tuple[int, int]:
    steps = times.shape[0] - 1
    if chosen is None:
        return first, max(steps + int(float(times[-1]) > 0), first)
    if not 0 <= chosen[0] <= chosen[1] <= steps + 1:
        raise ValueError(f"chosen={chosen}: draws go from 0, the first state, to {steps}, the last step")
    return int(chosen[0]), int(chosen[1])


@functools.partial(jax.jit, static_argnames=("process", "solver", "shape", "chosen", "rule"))
def _run(denoise, times, cond, given, *, process, solver, shape, chosen, rule) -> Coded:
    """The sampler's loop. given: codes to follow; keys of examples, which choose at random; or the rule's target."""
    book, batch, sites, steps = solver.noise, shape[0], shape[1:], times.shape[0] - 1
    first, stop = chosen
    # What a solver draws beside normals is no part of a code: one key for all.
    key = random.fold_in(jnp.broadcast_to(jax.random.key(book.seed), (batch,)), 2**31 - 1)
    prior = process.prior(shape, times[0])
    dtype = jax.eval_shape(lambda: prior.sample(key)).dtype
    still = jnp.zeros((batch, book.atoms), jnp.int32), jnp.zeros((batch, book.atoms - 1), jnp.int32)

    def take(draw, about):
        """The code of a draw that chooses."""
        if isinstance(given, Codes):
            return given.indices[:, draw - first], given.weights[:, draw - first]
        if rule is None:
            return still[0].at[:, 0].set(book.any(random.fold_in(given, draw)).astype(jnp.int32)), still[1]
        return book.best(draw, lambda z: rule(z, about), batch, sites, dtype)

    opening = take(0, None) if first == 0 < stop else still
    z = book.vector(0, *opening, sites, dtype)
    x = prior.drawn(fresh=z)
    carry = first_carry(dataclasses.replace(solver, noise=_Handed(z)), x, cond, denoise)

    def step(state, i):
        x, carry, nfe = state
        t, s = times[i], times[i + 1]
        prediction = denoise(x, batched(t, x), cond)
        asked = Asked(denoise, x, cond, prediction)

        def move(z):
            handed = _Handed(z)
            moved, after, info = dataclasses.replace(solver, noise=handed).step(key, carry, x, t, s, asked, cond)
            if handed.asked != 1:
                raise ValueError(
                    f"{type(solver).__name__} draws {handed.asked} normals a step where one is chosen: take one that "
                    "is stochastic (eta > 0) and draws once"
                )
            return moved.astype(x.dtype), after, info

        def states(z):
            return jax.lax.map(lambda z: move(jnp.broadcast_to(z, x.shape))[0], z)

        x0 = process.convert(prediction, "x0", x, t).value
        about = About(x, x0, t, s, given, cond, denoise, states)
        chooses = (i + 1 >= first) & (i + 1 < stop)
        code = jax.lax.cond(chooses, lambda: take(i + 1, about), lambda: still) if first < stop else still
        moved, carry, info = move(book.vector(i + 1, *code, sites, dtype))
        made = info.nfe + (0 if rule is None or asked.asked else 1)
        return (moved, carry, nfe + made * evaluations(denoise)), code

    (x0, _, nfe), taken = jax.lax.scan(step, (x, carry, jnp.zeros(batch, jnp.int32)), jnp.arange(steps))
    taken = (jnp.concatenate([a[None], b])[first:stop] for a, b in zip(opening, taken, strict=True))
    return Coded(x0, Codes(*(jnp.moveaxis(v, 0, 1) for v in taken), first), nfe)
