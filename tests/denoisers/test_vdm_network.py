"""VDM's network and MD4's for images against theirs, written in Linen from their definitions with their names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ddjax.denoisers import UNet, functional_init

WIDTH, BLOCKS = 64, 2  # of two features in each group of a norm: alone, one would lose what the condition adds
zeros = nn.initializers.zeros


class Attention(nn.Module):
    """One head among all pixels."""

    @nn.compact
    def __call__(self, x):
        h = nn.GroupNorm()(x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (nn.Dense(x.shape[-1], name=name)(h) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bic,bjc->bij", q, k) / x.shape[-1] ** 0.5, axis=-1)
        return x + nn.Dense(x.shape[-1], name="proj_out")(weights @ v).reshape(x.shape)


class Block(nn.Module):
    """Norm, swish, convolution; the condition added; norm, swish, convolution."""

    features: int

    @nn.compact
    def __call__(self, x, c):
        h = nn.Conv(self.features, (3, 3), name="conv1")(nn.swish(nn.GroupNorm()(x)))
        h += nn.Dense(self.features, use_bias=False, name="cond_proj")(c)[:, None, None]
        h = nn.Conv(self.features, (3, 3), name="conv2")(nn.swish(nn.GroupNorm()(h)))
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, name="nin_shortcut")(x)
        return x + h


class Network(nn.Module):
    """VDM's score network; MD4's classifier of images where there are symbols."""

    symbols: int | None = None

    @nn.compact
    def __call__(self, z, t):
        half = WIDTH // 2
        angles = 1000 * t[:, None] * jnp.exp(-np.log(10000) / (half - 1) * jnp.arange(half))
        c = nn.swish(nn.Dense(4 * WIDTH, name="dense0")(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)))
        if self.symbols is None:
            c = nn.swish(nn.Dense(4 * WIDTH, name="dense1")(c))
            scaled = [z * 2.0**n * 2 * jnp.pi for n in (6, 7)]  # then interleaved: both of a channel side by side
            scaled = jnp.stack(scaled, axis=-1).reshape(*z.shape[:-1], -1)
            x, out = jnp.concatenate([z, jnp.sin(scaled), jnp.cos(scaled)], axis=-1), z.shape[-1]
        else:
            c = nn.Dense(WIDTH, name="dense1")(c)
            x = nn.Embed(self.symbols + 1, WIDTH, name="embed")(z)
            x, out = x.reshape(*z.shape[:-1], -1), z.shape[-1] * self.symbols
        hs = [nn.Conv(WIDTH, (3, 3), name="conv_in")(x)]
        for i in range(BLOCKS):
            hs.append(Block(WIDTH, name=f"down.block_{i}")(hs[-1], c))
        h = Block(WIDTH, name="mid.block_1")(hs[-1], c)
        h = Block(WIDTH, name="mid.block_2")(Attention(name="mid.attn_1")(h), c)
        for i in range(BLOCKS + 1):
            h = Block(WIDTH, name=f"up.block_{i}")(jnp.concatenate([h, hs.pop()], axis=-1), c)
        y = nn.Conv(out, (3, 3), name="conv_out")(nn.swish(nn.GroupNorm(name="norm_out")(h)))
        return y + z if self.symbols is None else y.reshape(*z.shape, self.symbols)


def ours(p, channels):
    """Their parameters under our names."""

    def block(p):
        names = {"norm_in": "GroupNorm_0", "conv_in": "conv1", "modulation": "cond_proj", "norm_out": "GroupNorm_1"}
        made = {name: p[other] for name, other in names.items()} | {"conv_out": p["conv2"]}
        if "nin_shortcut" in p:
            made["shortcut"] = {**p["nin_shortcut"], "kernel": p["nin_shortcut"]["kernel"][None, None]}
        return made

    mid = p["mid.attn_1"]
    attention = {
        "norm": mid["GroupNorm_0"],
        "qkv": {key: np.concatenate([mid[n][key] for n in "qkv"], axis=-1) for key in ("kernel", "bias")},
        "out": mid["proj_out"],
    }
    made = {
        "condition": {"time_in": p["dense0"], "time_out": p["dense1"]},
        "embed": p["conv_in"],
        "encoder": {str(i): block(p[f"down.block_{i}"]) for i in range(BLOCKS)},
        "middle": {"0": block(p["mid.block_1"]) | {"attention": attention}, "1": block(p["mid.block_2"])},
        "decoder": {str(i): block(p[f"up.block_{i}"]) for i in range(BLOCKS + 1)},
        "final": {"norm": p["norm_out"], "out": p["conv_out"]},
    }
    if "embed" in p:  # one table for all channels
        made["tokens"] = {"table": np.tile(p["embed"]["embedding"], (channels, 1))}
    return made


@pytest.mark.slow
@pytest.mark.parametrize("design", ["vdm", "md4"])
def test_it_is_the_published_network(design):
    rng, symbols = np.random.default_rng(0), 5 if design == "md4" else None
    state = {} if symbols is None else {"symbols_in": symbols + 1, "symbols_out": symbols, "embed_width": WIDTH}
    make = lambda rngs: UNet(
        shape=(6, 6, 2), design=design, width=WIDTH, multipliers=(1,), blocks=BLOCKS, **state, rngs=rngs
    )
    init, apply = functional_init(make)
    z = rng.normal(size=(3, 6, 6, 2)).astype(np.float32) if symbols is None else rng.integers(0, 6, (3, 6, 6, 2))
    t = np.float32([0.1, 0.5, 0.9])
    theirs = Network(symbols)
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), z, t)["params"]
    params = jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), shapes)
    expected = theirs.apply({"params": params}, z, t)
    converted = ours(params, 2)
    assert jax.tree.map(np.shape, converted) == jax.tree.map(np.shape, jax.eval_shape(init, jax.random.key(0)))
    out = jax.jit(apply)(converted, z, t)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
