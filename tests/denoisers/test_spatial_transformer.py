"""Latent diffusion's transformer of pixels against NumPy in float64, and in its U-Net."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy_networks import gelu, normalised, softmax

from ddjax import taps
from ddjax.denoisers import UNet, UNetDesign
from ddjax.denoisers.layers import SpatialTransformer

RNG = np.random.default_rng(3)
X, SEQUENCE = RNG.normal(size=(2, 2, 3, 32)), RNG.normal(size=(2, 4, 6))
VALID = np.array([[1, 0, 1, 1], [0, 0, 1, 0]], bool)
U = {"shape": (4, 4, 2), "width": 16, "multipliers": (1, 2), "blocks": 1, "attend_at": (2,), "heads": 2}


def attended(q, k, v, heads, valid):
    """Of rows of sites to entries, head by head and example by example."""
    out = np.zeros_like(q)
    for b in range(len(q)):
        for h in range(heads):
            at = slice(h * q.shape[-1] // heads, (h + 1) * q.shape[-1] // heads)
            own = valid[b]
            scores = q[b, :, at] @ k[b, own][:, at].T / np.sqrt(q.shape[-1] / heads)
            out[b, :, at] = softmax(scores) @ v[b, own][:, at]
    return out


def by_definition(p, x, words, valid, heads):
    """Rombach et al. 2022 (ldm/modules/attention.py, SpatialTransformer)."""
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), p)
    linear = lambda q, v: v @ q["kernel"] + q.get("bias", 0.0)
    norm = lambda q, v: normalised(v, 1e-5) * q["scale"] + q["bias"]

    def parts(q, v, number):
        """Columns are (head, part, feature)."""
        y = linear(q, v).reshape(*v.shape[:2], heads, number, -1)
        return [y[:, :, :, i].reshape(*v.shape[:2], -1) for i in range(number)]

    batch, height, width, features = x.shape
    grouped = x.reshape(batch, height * width, 32, -1).transpose(0, 2, 1, 3)
    y = normalised(grouped.reshape(batch, 32, -1), 1e-6).reshape(grouped.shape).transpose(0, 2, 1, 3)
    h = linear(p["embed"], y.reshape(batch, -1, features) * p["norm"]["scale"] + p["norm"]["bias"])
    everyone = np.ones((batch, height * width), bool)
    for _, own in sorted(p["blocks"].items()):
        q, k, v = parts(own["attention"]["qkv"], norm(own["norm_a"], h), 3)
        h = h + linear(own["attention"]["out"], attended(q, k, v, heads, everyone))
        q = linear(own["cross"]["query"], norm(own["cross"]["norm"], h))
        k, v = parts(own["cross"]["key_value"], words, 2)
        h = h + linear(own["cross"]["out"], attended(q, k, v, heads, valid))
        y = norm(own["norm_m"], h)
        h = h + linear(own["mlp"]["down"], linear(own["mlp"]["up"], y) * gelu(linear(own["mlp"]["gate"], y)))
    return linear(p["out"], h).reshape(x.shape)


def test_it_is_the_definition(x64, noise):
    options = {"depth": 2, "context_width": 6, "dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    graphdef, state = nnx.split(SpatialTransformer(32, 4, **options))
    np.testing.assert_array_equal(state["out"]["kernel"][...], 0)  # a new one adds nothing
    params = noise(nnx.to_pure_dict(state))
    call = jax.jit(lambda params, *args: nnx.merge(graphdef, params)(args[0], context=args[1:]))
    found = call(params, X, SEQUENCE, VALID)
    np.testing.assert_allclose(found, by_definition(params, X, SEQUENCE, VALID, 4), atol=1e-6)  # norms in float32


def recorded(apply, *args):
    with taps.record() as seen:
        apply(*args)
    return seen


@pytest.mark.slow
def test_a_u_net_has_one_wherever_it_attends(build):
    make = lambda **more: lambda rngs: UNet(**U, **more, design=UNetDesign(groups=4), rngs=rngs)
    run, params = build(make(context_width=6, transformer_depth=2))
    where = [f"{part}/{i}" for part in ("encoder", "middle", "decoder") for i in params[part]
             if "attention" in params[part][i]]  # fmt: skip
    assert {len(params[at.split("/")[0]][at.split("/")[1]]["attention"]["blocks"]) for at in where} == {2}
    assert not any("cross" in block for part in ("encoder", "middle", "decoder") for block in params[part].values())
    xt, t = RNG.normal(size=(2, 4, 4, 2)).astype(np.float32), np.float32([0.2, 0.8])
    cond = {"sequence": SEQUENCE.astype(np.float32), "valid": VALID}
    seen = jax.eval_shape(lambda *args: recorded(run.args[0], *args), params, xt, t, cond)
    attends = {f"{at}/block/{j}{kind}" for at in where for j in (0, 1) for kind in ("", "/cross")}
    assert {at.removesuffix("/queries") for at in seen if at.endswith("/queries")} == attends
    # Of pixels alone, where there is no sequence.
    run, params = build(make(transformer_depth=1))
    assert "nothing" not in params
    assert np.isfinite(run(params, xt, t, None)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer_depth": -1}, "transformer_depth=-1"),
        ({"attend_at": (), "design": UNetDesign(groups=4, middle_attention=False)}, "transformer_depth=1: blocks that"),
        ({"heads": 3}, "heads=3 does not divide"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    options = {**U, "transformer_depth": 1, "design": UNetDesign(groups=4), **change}
    with pytest.raises(ValueError, match=message):
        UNet(**options, rngs=nnx.Rngs(0))
