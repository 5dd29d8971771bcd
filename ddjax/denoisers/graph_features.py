"""What attention among nodes cannot find out about a graph: its cycles, its components, its spectrum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NODE_FEATURES, GLOBAL_FEATURES = 4, 10
EIGENVALUES, EIGENVECTORS = 5, 2


def graph_features(
    adjacency: Float[Array, "batch nodes nodes"], there: Bool[Array, "batch nodes"] | None = None
) -> tuple[Float[Array, "batch nodes 4"], Float[Array, "batch 10"]]:
    """Structural and spectral features of nodes and of whole graphs (Vignac et al. 2023, DiGress, appendix B).

    adjacency: symmetric, zeros on the diagonal; 1 for an edge (what is between counts in part).
    there: which nodes there are; features are those of the graph without the others, whose own are 0. None: all.

    Returns:
        nodes: the numbers of cycles of 3, 4 and 5 edges through the node, a tenth of each and at most 1; and 1 outside
            the largest connected component (any of those that are largest), else 0.
        whole: the numbers of cycles of 3, 4, 5 and 6 edges, a tenth of each and at most 1; the number of components;
            and the least five positive eigenvalues of the Laplacian over the number of nodes (2 where there are fewer).

    All go with permutations of the nodes. Eigenvectors are apart (`eigenvectors`).
    """
    a, there = _there(adjacency, there)
    nodes, number = a.shape[-1], there.sum(axis=-1)
    through, counts = cycles(a)
    reached = jnp.eye(nodes) + (a > 0)
    for _ in range((nodes - 1).bit_length()):  # paths of twice as many edges
        reached = jnp.minimum(reached @ reached, 1.0)
    size = jnp.where(there, (reached > 0).sum(axis=-1), 0)  # of each node's component
    outside = (there & (size < size.max(axis=-1, keepdims=True))).astype(a.dtype)
    # A component of s nodes has 1/s from each of them; rounded, since that is a sum of reals.
    components = jnp.round(jnp.where(there, 1.0 / jnp.maximum(size, 1), 0.0).sum(axis=-1)).astype(jnp.int32)
    values = jnp.linalg.eigvalsh(_laplacian(a, there))
    values = jnp.where(jnp.arange(nodes) < number[:, None], values / jnp.maximum(number, 1)[:, None], 2.0)
    values = jnp.concatenate([values, jnp.full((len(values), EIGENVALUES), 2.0, values.dtype)], axis=-1)
    positive = jnp.take_along_axis(values, components[:, None] + jnp.arange(EIGENVALUES), axis=-1)
    through, counts = (jnp.minimum(number / 10, 1.0) for number in (through, counts))
    return (
        jnp.concatenate([through, outside[..., None]], axis=-1),
        jnp.concatenate([counts, components[:, None].astype(a.dtype), positive], axis=-1),
    )


def eigenvectors(
    adjacency: Float[Array, "batch nodes nodes"], there: Bool[Array, "batch nodes"] | None = None
) -> Float[Array, "batch nodes 2"]:
    """Eigenvectors of the two least positive eigenvalues of the Laplacian, 0 where there are fewer (DiGress, B.1).

    Signs are such that the sum of cubes is positive: they go with permutations of the nodes, but for graphs that say
    nothing on it (vectors that are as much above 0 as below), and for eigenvalues that occur twice, whose vectors are
    arbitrary. (Theirs are as LAPACK gives them.) Constants to gradients, which equal eigenvalues do not have.
    """
    a, there = _there(jax.lax.stop_gradient(adjacency), there)
    values, vectors = jnp.linalg.eigh(_laplacian(a, there))
    first = (values < 1e-4).sum(axis=-1)  # as many as there are components
    vectors = jnp.concatenate([vectors, jnp.zeros((*vectors.shape[:2], EIGENVECTORS), vectors.dtype)], axis=-1)
    index = first[:, None] + jnp.arange(EIGENVECTORS)
    found = jnp.take_along_axis(vectors, index[:, None], axis=-1)
    found = jnp.where((index < there.sum(axis=-1)[:, None])[:, None] & there[..., None], found, 0.0)
    return jnp.where((found**3).sum(axis=1, keepdims=True) < 0, -found, found)


def _there(a: Array, there: Array | None) -> tuple[Array, Array]:
    """The edges among nodes that there are, and which these are."""
    there = jnp.ones(a.shape[:-1], bool) if there is None else there
    return jnp.where(there[:, :, None] & there[:, None], a, 0.0), there


def _laplacian(a: Array, there: Array) -> Array:
    """Degrees less edges; nodes that are not there have eigenvalues of their own beyond all others."""
    own = jnp.where(there, a.sum(axis=-1), 2.0 * a.shape[-1])
    return jnp.eye(a.shape[-1]) * own[:, :, None] - a


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
