"""Randomness, one key per example.

Every draw for a batch takes keys of shape `(batch,)`, made by folding the *global* row index into one key.
So an example's noise depends neither on the batch size, nor on the devices, nor on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ddjax.types import Keys, Rows


def example_keys(key: Key[Array, ""], rows: Int[Array, " batch"] | int) -> Keys:
    """One key per example: `fold_in(key, row)`. `rows` are global row indices, or a batch size."""
    rows = jnp.arange(rows) if isinstance(rows, int) else rows
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def fold_in(keys: Keys, data: int | Array) -> Keys:
    """Fold a number into each example's key (a step index, a stream): one for all, or `(batch,)`."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None if jnp.ndim(data) == 0 else 0))(keys, data)


def split(keys: Keys, num: int = 2) -> tuple[Keys, ...]:
    """Split each example's key into `num` streams."""
    parts = jax.vmap(lambda k: jax.random.split(k, num))(keys)
    return tuple(parts[:, i] for i in range(num))


def normal(keys: Keys, shape: Sequence[int], dtype=jnp.float32) -> Float[Array, batch * shape]:
    """Standard normals; `shape` is that of one example."""
    return jax.vmap(lambda k: jax.random.normal(k, tuple(shape), dtype))(keys)


def uniform(keys: Keys, shape: Sequence[int] = (), dtype=jnp.float32) -> Float[Array, batch * shape]:
    """Uniforms on [0, 1); `shape` is that of one example."""
    return jax.vmap(lambda k: jax.random.uniform(k, tuple(shape), dtype))(keys)


def stratum(keys: Keys, j: int | Array, num: int, dtype=jnp.float32) -> Float[Array, " batch"]:
    """Uniforms on the j-th of `num` equal parts of [0, 1), one key per example."""
    return (j + uniform(fold_in(keys, j), dtype=dtype)) / num


def stratified(key: Key[Array, ""], rows: Rows, dtype=jnp.float32) -> Float[Array, " batch"]:
    """Low-discrepancy uniforms on [0, 1): `((i + shift) mod total + u) / total` for row i, with one shared shift and u.

    Each is uniform on its own and a batch hits every one of `total` equal parts once (Kingma et al. 2021, "Variational
    Diffusion Models", appendix I.1). The rows of one global batch share `key`, wherever they are held.
    """
    shift_key, u_key = jax.random.split(key)
    # Without the shift, row i would be confined to part i: biased wherever the order of the rows means something.
    part = jnp.mod(rows.index + jax.random.randint(shift_key, (), 0, rows.total), rows.total)
    u = (part.astype(dtype) + jax.random.uniform(u_key, (), dtype)) / rows.total
    return jnp.minimum(u, 1.0 - jnp.finfo(dtype).epsneg)  # rounding must not reach 1


def antithetic(key: Key[Array, ""], rows: Rows, dtype=jnp.float32) -> Float[Array, " batch"]:
    """Uniforms on [0, 1) in pairs u, 1 - u, of rows 2 k and 2 k + 1 of the global batch; the pairs are independent.

    Each is uniform on its own; the mean over a pair of what is linear in u has no variance (Song et al. 2021, "DDIM";
    Hammersley & Morton 1956).
    """
    u = uniform(example_keys(key, rows.index // 2), dtype=dtype)
    u = jnp.where(rows.index % 2 == 1, 1.0 - u, u)
    return jnp.minimum(u, 1.0 - jnp.finfo(dtype).epsneg)  # of u = 0


def independent(key: Key[Array, ""], rows: Rows, dtype=jnp.float32) -> Float[Array, " batch"]:
    """Uniforms on [0, 1), one for each row of the global batch."""
    return uniform(example_keys(key, rows.index), dtype=dtype)


def latin(key: Key[Array, ""], rows: Rows, num: int, dtype=jnp.float32) -> Float[Array, "batch num"]:
    """`num` low-discrepancy uniforms for each row: `stratified` over all `num * total` of them.

    Those of one row are spread evenly over [0, 1), and so are those of one column, where the rows are many: a column
    moves on by one of `num` parts from row to row.
    """
    part = jnp.mod(rows.index[:, None] + jnp.arange(num), num)
    places = Rows((part * rows.total + rows.index[:, None]).ravel(), num * rows.total)
    return stratified(key, places, dtype).reshape(-1, num)
