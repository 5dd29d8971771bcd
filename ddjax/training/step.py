"""One training step: gradient (accumulated or not), optimizer update, moving average."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ddjax import auxiliary
from ddjax.pytrees import as_pytree
from ddjax.training.state import TrainState
from ddjax.types import Apply, Params, PyTree, Rows, batch_size, per_example

Batch = dict[str, Any]
Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

_BATCH_KEYS = {"x0", "cond", "weights"}


@dataclasses.dataclass(frozen=True)
class Ema:
    """The decay of the parameters' moving average after n earlier updates.

    decay: its final value, in [0, 1]; 0 makes the average equal to the parameters.
    warmup: start at `min(decay, (1 + n) / (10 + n))`, so that the random initial parameters are forgotten
        early.
    """

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self):
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"the EMA's decay must lie in [0, 1], got {self.decay}")

    def __call__(self, n: Int[Array, ""] | int) -> Float[Array, ""]:
        """The weight that the old average keeps; n = 0 at the first update."""
        n = jnp.asarray(n, jnp.result_type(float))
        decay = jnp.asarray(self.decay, n.dtype)
        return jnp.minimum(decay, (1 + n) / (10 + n)) if self.warmup else decay


def update_ema(ema: Params, params: Params, decay: Float[Array, ""] | float) -> Params:
    """`decay * ema + (1 - decay) * params`, leaf by leaf, in each leaf's dtype."""

    def update(old, new):
        d = jnp.asarray(decay, old.dtype)
        return d * old + (1 - d) * new

    return jax.tree.map(update, ema, params)


def split_batch(tree: PyTree, parts: int) -> PyTree:
    """Cut the leading axis B into `parts` microbatches: `(B, ...)` -> `(parts, B // parts, ...)`.

    Microbatch a holds rows a, a + parts, a + 2 parts, ... With the batch laid over devices in blocks, each
    device then keeps its own rows; the plain reshape to (parts, B // parts) would exchange them between all
    devices.
    """
    return jax.tree.map(lambda a: a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1), tree)


def make_train_step(
    objective: Callable[..., tuple[Array, Metrics]],
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema: Ema | Callable[[Array], Array] = Ema(),
    spike: float = 0.0,
    skip_bad: bool = False,
) -> Step:
    """Build `step(state, batch) -> (state, metrics)`: pure, to be jitted by `compile_step` or by the caller.

    It is a pytree whose leaves are what the network or the objective holds (`lora.Beside`, `denoisers.taught`), so that
    a compiled program can take these as inputs: `compile_step` does; by hand, `jax.jit(lambda step, *rest: step(*rest),
    donate_argnums=1)(step, state, batch)`. Most hold nothing, and `jax.jit(step)` is all that is needed.

    objective: `objective(key, apply, params, x0, cond, weights, rows, train) -> (loss, metrics)`,
        docs/design.md; the loss is the weighted mean over the examples it is given.
    apply: the network, `apply(params, xt, t, cond, *, rng=None, train=False)`.
    optimizer: an optax chain. Gradient clipping belongs in it (`optimizers.adamw(clip=...)`).
    accumulate: number of microbatches, one after another; the memory of one, and the gradient of the whole
        batch to rounding, because noise is drawn by global row and microbatches count by their weights.
    ema: `Ema`, or a function from the number of earlier updates to the decay.
    spike: a step is bad where its loss or gradient is not finite, and where its loss lies so many standard deviations
        above the mean of the good ones before (`watch.Losses`); 0: no loss is too high.
    skip_bad: a bad step leaves parameters, average and optimizer as they were.

    The batch is a dict: "x0" `(batch, *sites)`, optionally "cond" (a pytree, leading axis batch) and
    "weights" `(batch,)` or `(batch, *sites)`. Metrics: what the objective reports and "loss", each averaged
    over the batch as the loss is, with what the network adds to it and reports (`ddjax.auxiliary`); "grad_norm",
    before any clipping; "finite", whether loss and norm are; "bad", how many steps were bad in a row, 0 for a good
    one. Unless `skip_bad`, a bad step is applied as any other: what to do about it is the caller's.

    Raises ValueError on a malformed batch or one that `accumulate` does not divide, when traced.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if spike < 0:
        raise ValueError(f"a spike is a positive number of standard deviations, or 0 for none; got {spike}")

    def gradient(held, params, key, part, rows):
        objective, apply = held

        def loss_of(params):
            with auxiliary.collect() as collector:
                loss, metrics = objective(
                    key,
                    apply,
                    params,
                    part["x0"],
                    cond=part.get("cond"),
                    weights=part.get("weights"),
                    rows=rows,
                    train=True,
                )
            # Averaged as the objective averages, so that microbatches add up to the batch.
            own = jax.tree.map(lambda value: _mean(value, part.get("weights")), collector.found())
            return loss + sum(own.losses.values()), {**metrics, **own.losses, **own.reports}

        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        metrics = {**metrics, "loss": loss}
        return grads, jax.tree.map(lambda m: jnp.asarray(m, _wide(jnp.result_type(m))), metrics)

    def accumulated_gradient(held, params, key, batch, size):
        parts = split_batch(batch, accumulate)
        index = split_batch(jnp.arange(size), accumulate)
        weights = parts.get("weights")
        if weights is None:
            shares = jnp.full((accumulate,), 1.0 / accumulate)
        else:
            # Each microbatch returns a mean over its own weights; the batch's mean weighs it by their sum.
            totals = per_example(jax.tree.map(lambda w: w.astype(jnp.result_type(float)), weights))
            shares = totals / totals.sum()

        def share_of(part, rows, share):
            grads, metrics = gradient(held, params, jax.random.clone(key), part, Rows(rows, size))

            def weigh(x):
                x = x.astype(_wide(x.dtype))
                # A microbatch of weight 0 has no say, though its own mean be 0 / 0. Where all weigh 0 the
                # share itself is nan, and stays.
                return jnp.where(share == 0, 0, share.astype(x.dtype) * x)

            return jax.tree.map(weigh, (grads, metrics))

        def body(total, inputs):
            return jax.tree.map(jnp.add, total, share_of(*inputs)), None

        inputs = (parts, index, shares)
        first = jax.tree.map(lambda a: a[0], inputs)
        shapes = jax.eval_shape(share_of, *first)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        (grads, metrics), _ = jax.lax.scan(body, zeros, inputs)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), metrics

    def step(held: PyTree, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = {name: value for name, value in batch.items() if value is not None}
        size = _check_batch(batch, accumulate)
        key = jax.random.fold_in(state.key, state.step)
        if accumulate == 1:
            grads, metrics = gradient(held, state.params, key, batch, Rows.all(size))
        else:
            grads, metrics = accumulated_gradient(held, state.params, key, batch, size)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A float, because int32 / int is float32 in JAX even where floats are float64.
        updates_made = state.step.astype(jnp.result_type(float))
        average = update_ema(state.ema, params, ema(updates_made))
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        bad = ~finite
        if spike > 0:
            bad |= state.losses.spike(metrics["loss"], spike)
        losses = state.losses.after(metrics["loss"], bad)
        updated = (params, average, opt_state)
        if skip_bad:
            before = (state.params, state.ema, state.opt_state)
            updated = jax.tree.map(lambda old, new: jnp.where(bad, old, new), before, updated)
        metrics = {**metrics, "grad_norm": norm, "finite": finite, "bad": losses.bad}
        return TrainState(state.step + 1, *updated, state.key, losses), metrics

    return jax.tree_util.Partial(step, (as_pytree(objective), as_pytree(apply)))


def _mean(value: Float[Array, " batch"], weights: Array | None) -> Float[Array, ""]:
    """Over examples, each with the weight of its sites."""
    if weights is None:
        return value.mean()
    weights = per_example(weights).astype(value.dtype)
    return (weights * value).sum() / weights.sum()


def _wide(dtype) -> Any:
    """Float32 at least: sums of bfloat16 gradients, and averages of integer counts."""
    return jnp.promote_types(dtype, jnp.float32)


def _check_batch(batch: Batch, accumulate: int) -> int:
    """The batch's size; ValueError if the batch is not what a step takes."""
    if "x0" not in batch:
        raise ValueError(f"the batch must have 'x0', it has {sorted(batch)}")
    if unknown := set(batch) - _BATCH_KEYS:
        raise ValueError(f"the batch has {sorted(unknown)}, a step takes {sorted(_BATCH_KEYS)}")
    size = batch_size(batch["x0"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.shape[:1] != (size,):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"batch{name} has shape {leaf.shape}, expected a leading axis of {size}")
    if size % accumulate:
        raise ValueError(f"a batch of {size} does not divide into accumulate={accumulate} microbatches")
    return size
