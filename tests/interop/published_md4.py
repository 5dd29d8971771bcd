"""MD4's networks in Flax Linen, written from their definition with the names that its checkpoints have: tests only.

In evaluation, in float32: dropout, casts and initial values are not here.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

GATES = {"glu": nn.sigmoid, "swiglu": nn.swish, "geglu": nn.gelu}
bare = lambda x: nn.LayerNorm(epsilon=1e-5, use_bias=False, use_scale=False)(x)


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return scale * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


class Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        batch, length, width = x.shape
        layer = lambda name: nn.Dense(width, use_bias=False, name=name)
        q, k, v = (layer(n)(x).reshape(batch, length, self.heads, -1) for n in ("wq", "wk", "wv"))
        half = q.shape[-1] // 2
        turns = jnp.exp(1j * jnp.arange(length)[:, None] * 10000.0 ** (-jnp.arange(half) / half))[None, :, None]

        def turned(u):  # neighbouring features are a complex number
            z = (u[..., 0::2] + 1j * u[..., 1::2]) * turns
            return jnp.stack([z.real, z.imag], -1).reshape(u.shape)

        scores = jnp.einsum("bqhd,bkhd->bhqk", turned(q), turned(k)) / jnp.sqrt(2.0 * half)
        out = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        return layer("wo")(out.reshape(batch, length, width))


class FeedForward(nn.Module):
    hidden: int
    kind: str

    @nn.compact
    def __call__(self, x):
        layer = lambda width, name: nn.Dense(width, use_bias=False, name=name)
        y = GATES[self.kind](layer(self.hidden, "w1")(x)) * layer(self.hidden, "w3")(x)
        return layer(x.shape[-1], "w2")(y)


class TransformerBlock(nn.Module):
    heads: int
    hidden: int
    kind: str

    @nn.compact
    def __call__(self, x, c):
        attend, feed = Attention(self.heads, name="attention"), FeedForward(self.hidden, self.kind, name="feed_forward")
        if c is None:
            x = x + attend(RMSNorm()(x))
            return x + feed(RMSNorm()(x))
        told = nn.Dense(6 * x.shape[-1])(GATES[self.kind](c))[:, None]
        move_a, grow_a, gate_a, move_m, grow_m, gate_m = jnp.split(told, 6, -1)
        x = x + gate_a * attend(bare(x) * (1 + grow_a) + move_a)
        return x + gate_m * feed(bare(x) * (1 + grow_m) + move_m)


class Transformer(nn.Module):
    vocabulary: int
    width: int
    depth: int
    heads: int
    hidden: int
    kind: str

    @nn.compact
    def __call__(self, x, c):
        tokens = jnp.issubdtype(x.dtype, jnp.integer)
        x = nn.Embed(self.vocabulary + 1, self.width)(x) if tokens else nn.Dense(self.width)(x)
        for _ in range(self.depth):
            x = TransformerBlock(self.heads, self.hidden, self.kind)(x, c)
        if c is None:
            x = RMSNorm()(x)
        else:
            move, grow = jnp.split(nn.Dense(2 * self.width)(GATES[self.kind](c))[:, None], 2, -1)
            x = bare(x) * (1 + grow) + move
        return nn.Dense(self.vocabulary, use_bias=False)(x)


class CondEmbedding(nn.Module):
    features: int

    @nn.compact
    def __call__(self, steps, row):
        half = self.features // 2
        angles = steps[:, None] * jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - 1))
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)
        told = waves if row is None else jnp.concatenate([waves, row], 1)
        return nn.Dense(self.features)(nn.swish(nn.Dense(4 * self.features, name="dense0")(told)))


class SelfAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        z = nn.GroupNorm()(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + nn.MultiHeadDotProductAttention(num_heads=1, qkv_features=x.shape[-1])(z, z).reshape(x.shape)


class ResBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, c):
        h = nn.Conv(self.width, (3, 3))(nn.swish(nn.GroupNorm()(x)))
        h = h + nn.Dense(self.width, use_bias=False)(c)[:, None, None]
        h = nn.Conv(self.width, (3, 3))(nn.swish(nn.GroupNorm()(h)))
        return h + (x if x.shape[-1] == self.width else nn.Dense(self.width)(x))


class UNet(nn.Module):
    width: int
    depth: int
    out: int

    @nn.compact
    def __call__(self, x, c):
        h = nn.Conv(self.width, (3, 3))(x)
        kept = [h]
        for _ in range(self.depth):
            h = ResBlock(self.width)(h, c)
            kept.append(h)
        h = ResBlock(self.width)(h, c)
        h = SelfAttention()(h)
        h = ResBlock(self.width)(h, c)
        for skip in reversed(kept):
            h = ResBlock(self.width)(jnp.concatenate([h, skip], -1), c)
        return nn.Conv(self.out, (3, 3))(nn.swish(nn.GroupNorm()(h)))


class UNet5DWrapper(nn.Module):
    width: int
    depth: int
    vocabulary: int

    @nn.compact
    def __call__(self, x, c):
        *sides, channels, features = x.shape
        h = UNet(self.width, self.depth, channels * self.vocabulary)(x.reshape(*sides, channels * features), c)
        return h.reshape(*sides, channels, self.vocabulary)


class Classifier(nn.Module):
    vocabulary: int
    features: int
    depth: int
    heads: int
    hidden: int
    kind: str
    outside: bool

    @nn.compact
    def __call__(self, z, t, row):
        c = row if t is None else CondEmbedding(self.features)(1000.0 * t, row)
        if z.ndim == 4 or self.outside:
            z = nn.Embed(self.vocabulary + 1, self.features)(z)
        if z.ndim == 5:
            return UNet5DWrapper(self.features, self.depth, self.vocabulary)(z, c)
        width = self.features * self.heads
        return Transformer(self.vocabulary, width, self.depth, self.heads, self.hidden, self.kind)(z, c)


class MD4(nn.Module):
    """t None: without time. Tokens (batch, length) or (batch, height, width, channels), the mask the last."""

    vocabulary: int
    features: int
    depth: int
    heads: int = 1
    hidden: int = 0
    kind: str = "glu"
    outside: bool = False
    classes: int = 0

    def setup(self):
        if self.classes:
            self.cond_embeddings = nn.Embed(self.classes, self.features)
        about = (self.vocabulary, self.features, self.depth, self.heads, self.hidden, self.kind, self.outside)
        self.classifier = Classifier(*about)

    def __call__(self, z, t, labels=None):
        return self.classifier(z, t, self.cond_embeddings(labels) if self.classes else None)


def random_params(module, *inputs, scale=0.3):
    """Every parameter normal."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)  # not JAX's, which would compile a program for every shape
    return jax.tree.map(lambda v: (scale * rng.normal(size=v.shape)).astype(np.float32), shapes)
