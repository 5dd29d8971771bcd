"""Constraints inside networks: laid out where a mesh is, nothing where none is, and an error where they cannot be."""

import jax
import jax.numpy as jnp
import pytest

from ddjax.placement import constrain
from ddjax.training.mesh import make_mesh


def placed(axes, shape, *names):
    with jax.set_mesh(make_mesh(axes)):
        spec = jax.jit(lambda: constrain(jnp.zeros(shape), *names))().sharding.spec
        return (*spec, *(None,) * (len(shape) - len(spec)))


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")
def test_axes_lie_where_their_carriers_are():
    axes = {"data": 2, "sequence": 2, "tensor": 2}
    assert placed(axes, (4, 6, 8), "batch", "sites", None) == ("data", "sequence", None)
    assert placed(axes, (4, 6, 8, 3), "batch", None, "heads", None) == ("data", None, "tensor", None)
    assert placed({"data": 2, "expert": 4}, (8, 4, 3), "batch", None, None)[0] == ("data", "expert")
    with pytest.raises(ValueError, match="the mesh axis sequence=2 does not divide 5 sites"):
        placed(axes, (4, 5, 8), "batch", "sites", None)
    assert placed(axes, (3, 6), "batch", "sites")[1] == "sequence"  # any batch may be sampled


def test_without_a_mesh_it_is_the_array():
    x = jnp.zeros((3, 5))
    assert constrain(x, "batch", "sites") is x
    assert "sharding" not in str(jax.make_jaxpr(lambda x: constrain(x, "batch", "sites"))(x))
