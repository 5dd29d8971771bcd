"""No network call where nothing changed since the last one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, Bool

from ddjax.predictions import Prediction
from ddjax.solvers.base import Info, batched, first_carry
from ddjax.types import Denoise, State, Time


class Held(NamedTuple):
    """The last prediction, the state it was for, and what the solver itself carries."""

    prediction: Prediction
    xt: State
    known: Bool[Array, " batch"]  # false: nothing was predicted yet
    inner: Any


class Asked:
    """A denoiser that has been asked already at one state; whatever else it is asked, it computes."""

    def __init__(self, denoise: Denoise, xt: State, cond: Any, prediction: Prediction):
        self.denoise, self.xt, self.cond, self.prediction = denoise, xt, cond, prediction
        self.asked = False

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """The known prediction, where it is asked for."""
        if xt is self.xt and cond is self.cond:
            self.asked = True
            return self.prediction
        return self.denoise(xt, t, cond)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoise, name)


@dataclasses.dataclass(frozen=True)
class Cached:
    """`solver`, with predictions kept for examples whose state does not change, for networks that ignore the time.

    (Sahoo et al. 2024, MDLM, section 4; Ou et al. 2024, RADD, section 3.3.) Masked sampling in many steps seldom
    changes an example: of L sites in n equal steps each changes it with probability p = 1 - (1 - 1/n)^L, and
    1 + (n - 1) p evaluations are expected. Where some of a batch have changed, they are gathered and evaluated as a
    batch of the next power of two.

    The samples are those of `solver`, bit for bit where the network does not itself depend on the batch. What is saved
    is the evaluation at the state that a step begins with; others (a corrector's) are made as ever. Beside them
    `Info.nfe` counts a call for the examples that changed, and none for the others.
    Compiles the network once for every power of two up to the batch; the carry holds one prediction per example.

    Raises ValueError, when a sampler is compiled, for a prediction that depends on the time (this is read off the
    program, so that one that does not in truth, but computes with it, counts as such), and for a solver that never
    asks about the state a step begins with.
    """

    solver: Any

    @property
    def process(self) -> Any:
        """The solver's."""
        return self.solver.process

    def begin(self, xt: State, cond: Any, denoise: Denoise, known: Any = None) -> Held:
        """Nothing known yet."""
        t = jnp.ones(xt.shape[:1], jnp.result_type(float))
        if not ignores_time(denoise, xt, t, cond):
            raise ValueError(
                "Cached keeps predictions from one time to another, but this one depends on the time: use a network "
                "without it (time=False; kind 'posterior' or 'cavity' of a masked process), or the solver by itself"
            )
        shape = jax.eval_shape(denoise, xt, t, cond)
        prediction = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shape)
        return Held(prediction, xt, jnp.zeros(xt.shape[:1], bool), first_carry(self.solver, xt, cond, denoise, known))

    def init(self, xt, cond=None):
        """Not to be had without the denoiser."""
        raise ValueError("Cached holds predictions, whose shape the denoiser tells: call begin")

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's step."""
        changed = ~carry.known | (xt != carry.xt).reshape(xt.shape[0], -1).any(axis=1)
        prediction = _renewed(denoise, xt, batched(t, xt), cond, changed, carry.prediction)
        given = Asked(denoise, xt, cond, prediction)
        xs, inner, info = self.solver.step(keys, carry.inner, xt, t, s, given, cond)
        if not given.asked:
            raise ValueError(
                f"{type(self.solver).__name__} does not ask the network about the state a step begins with, so that "
                "Cached has nothing to save: use it by itself"
            )
        nfe = jnp.maximum(info.nfe - 1, 0) + changed.astype(jnp.int32)
        return xs, Held(prediction, xt, jnp.ones_like(carry.known), inner), Info(nfe)


def _renewed(
    denoise: Denoise, xt: State, t: Time, cond: Any, changed: Bool[Array, " batch"], old: Prediction
) -> Prediction:
    """The predictions, evaluated anew where the state has changed."""
    batch = xt.shape[0]
    sizes = [min(2**i, batch) for i in range((batch - 1).bit_length() + 1)]
    order = jnp.argsort(~changed, stable=True)  # those that changed first
    needed = jnp.searchsorted(jnp.asarray([0, *sizes]), changed.sum())

    def evaluate(size: int, xt: State, old: Prediction) -> Prediction:
        if size == batch:  # nothing to gather
            rows, new = slice(None), denoise(xt, t, cond)
        else:
            rows = order[:size]
            new = denoise(*jax.tree.map(lambda leaf: leaf[rows], (xt, t, cond)))

        def put(new: Array, old: Array) -> Array:
            kept = changed[rows].reshape(-1, *(1,) * (new.ndim - 1))
            return old.at[rows].set(jnp.where(kept, new, old[rows]))

        return jax.tree.map(put, new, old)

    def some(xt: State, old: Prediction) -> Prediction:
        for i, size in enumerate(sizes, 1):
            old = _once_if(needed == i, functools.partial(evaluate, size), xt, old)
        return old

    return _once_if(needed > 0, some, xt, old)


def _once_if(
    flag: Bool[Array, ""], move: Callable[[State, Prediction], Prediction], xt: State, old: Prediction
) -> Prediction:
    """`move(xt, old)` if the flag is set, or else `old`: a loop of one round or none.

    XLA on a CPU shares the work of a loop among its threads, but not that of a branch of `lax.cond`, which took 1.2
    times as long.
    """

    def once(i: Array, old: Prediction) -> Prediction:
        # What does not depend on the round would be computed before the loop, and so without being asked for.
        return move(jax.lax.optimization_barrier((xt, i))[0], old)

    return jax.lax.fori_loop(0, flag.astype(jnp.int32), once, old)


def ignores_time(denoise: Denoise, xt: State, t: Time, cond: Any = None) -> bool:
    """Whether the program of `denoise` makes no use of t."""
    program = jax.make_jaxpr(lambda t: denoise(xt, t, cond))(t).jaxpr
    _, used = dce_jaxpr(program, [True] * len(program.outvars))
    return not used[0]
