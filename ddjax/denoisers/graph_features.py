"""What attention among nodes cannot find out about a graph: its cycles, its components, its spectrum."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

NODE_FEATURES, GLOBAL_FEATURES = 4, 10
EIGENVALUES = 5


def graph_features(
    adjacency: Float[Array, "batch nodes nodes"],
) -> tuple[Float[Array, "batch nodes 4"], Float[Array, "batch 10"]]:
    """Structural and spectral features of nodes and of whole graphs (Vignac et al. 2023, DiGress, appendix B).

    adjacency: symmetric, zeros on the diagonal; 1 for an edge (what is between counts in part).

    Returns:
        nodes: the numbers of cycles of 3, 4 and 5 edges through the node, a tenth of each and at most 1; and 1 outside
            the largest connected component (any of those that are largest), else 0.
        whole: the numbers of cycles of 3, 4, 5 and 6 edges, a tenth of each and at most 1; the number of components;
            and the least five positive eigenvalues of the Laplacian over the number of nodes (2 where there are fewer).

    All go with permutations of the nodes. (Theirs also have two eigenvectors, whose signs are arbitrary.)
    """
    a = adjacency
    nodes = a.shape[-1]
    through, counts = cycles(a)
    reached = jnp.eye(nodes) + (a > 0)
    for _ in range((nodes - 1).bit_length()):  # paths of twice as many edges
        reached = jnp.minimum(reached @ reached, 1.0)
    size = (reached > 0).sum(axis=-1)  # of each node's component
    outside = (size < size.max(axis=-1, keepdims=True)).astype(a.dtype)
    # A component of s nodes has 1/s from each of them; rounded, since that is a sum of reals.
    components = jnp.round((1.0 / size).sum(axis=-1)).astype(jnp.int32)
    values = jnp.linalg.eigvalsh(jnp.eye(nodes) * a.sum(axis=-1)[:, :, None] - a) / nodes
    values = jnp.concatenate([values, jnp.full((len(values), EIGENVALUES), 2.0, values.dtype)], axis=-1)
    positive = jnp.take_along_axis(values, components[:, None] + jnp.arange(EIGENVALUES), axis=-1)
    through, counts = (jnp.minimum(number / 10, 1.0) for number in (through, counts))
    return (
        jnp.concatenate([through, outside[..., None]], axis=-1),
        jnp.concatenate([counts, components[:, None].astype(a.dtype), positive], axis=-1),
    )


def cycles(a: Float[Array, "batch nodes nodes"]) -> tuple[Float[Array, "batch nodes 3"], Float[Array, "batch 4"]]:
    """The numbers of simple cycles of 3, 4 and 5 edges through each node, and of 3, 4, 5 and 6 edges in all.

    From powers of the adjacency matrix (Harary & Manvel 1971; DiGress, appendix B.1, whose numbers of 5 edges count
    triangles with an edge beside, too).
    """
    a2 = a @ a
    a3, a4, d = a2 @ a, a2 @ a2, a.sum(axis=-1)
    d2, d3, d4, d5, d6 = (jnp.diagonal(m, axis1=-2, axis2=-1) for m in (a2, a3, a4, a4 @ a, a3 @ a3))

    def neighbours(v: Array, weights: Array = a) -> Array:  # their sum
        return (weights * v[:, None]).sum(axis=-1)

    three = d3 / 2
    four = (d4 - d * (d - 1) - neighbours(d)) / 2
    # Closed walks of 5 steps but for those around a triangle, with one step there and back.
    five = (d5 - d3 * (2 * d - 5) - neighbours(d3) - 2 * neighbours(d, a * a2)) / 2
    six = (
        (d6 - 3 * d3**2 - 6 * d2 * d4 + 6 * d4 - 4 * d3 + 4 * d2**3 - 12 * d2**2 + 4 * d2).sum(axis=-1)
        + (9 * a * a2**2 + 3 * a3).sum(axis=(-2, -1))
    ) / 12
    through = jnp.stack([three, four, five], axis=-1)
    shares = jnp.array([3.0, 4.0, 5.0], a.dtype)  # a cycle goes through so many nodes
    return through, jnp.concatenate([through.sum(axis=1) / shares, six[:, None]], axis=-1)
