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


class CondGroupNorm(nn.Module):
    @nn.compact
    def __call__(self, x, c):
        grow, move = jnp.split(nn.Dense(2 * x.shape[-1])(c)[:, None, None], 2, -1)
        return nn.GroupNorm(use_bias=False, use_scale=False)(x) * (1 + grow) + move


class ToldResBlock(nn.Module):
    """The `ResBlock` of uvit.py."""

    width: int
    change: str = ""

    @nn.compact
    def __call__(self, x, c):
        h = nn.swish(CondGroupNorm()(x, c))
        if self.change == "down":
            h, x = (nn.avg_pool(z, (2, 2), (2, 2)) for z in (h, x))
        if self.change == "up":
            h, x = (jnp.repeat(jnp.repeat(z, 2, 1), 2, 2) for z in (h, x))
        h = nn.Conv(self.width, (3, 3))(h)
        h = nn.Conv(self.width, (3, 3))(nn.swish(CondGroupNorm()(h, c)))
        return h + (x if x.shape[-1] == self.width else nn.Dense(self.width)(x))


class PatchEmbed(nn.Module):
    width: int

    def setup(self):
        self.proj = nn.Conv(self.width, (2, 2), strides=2, padding="VALID")

    def __call__(self, x):
        return self.proj(x).reshape(x.shape[0], -1, self.width)


class DiTAttention(nn.Module):
    width: int
    heads: int

    def setup(self):
        self.wq, self.wk, self.wv = (nn.Dense(self.width) for _ in range(3))
        self.wo = nn.Dense(self.width, use_bias=False)

    def __call__(self, x):
        q, k, v = (layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.wq, self.wk, self.wv))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1]))
        return self.wo(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class DiTMlp(nn.Module):
    width: int

    def setup(self):
        self.fc1, self.fc2 = nn.Dense(4 * self.width), nn.Dense(self.width)

    def __call__(self, x):
        return self.fc2(nn.gelu(self.fc1(x)))


class DiTBlock(nn.Module):
    width: int
    heads: int

    def setup(self):
        self.attn, self.mlp = DiTAttention(self.width, self.heads), DiTMlp(self.width)

    @nn.compact
    def __call__(self, x, c):
        told = nn.Sequential([nn.swish, nn.Dense(6 * self.width)])(c)[:, None]
        move_a, grow_a, gate_a, move_m, grow_m, gate_m = jnp.split(told, 6, -1)
        plain = lambda x: nn.LayerNorm(use_bias=False, use_scale=False)(x)
        x = x + gate_a * self.attn(plain(x) * (1 + grow_a) + move_a)
        return x + gate_m * self.mlp(plain(x) * (1 + grow_m) + move_m)


class DiTFinal(nn.Module):
    width: int
    out: int

    def setup(self):
        self.linear = nn.Dense(4 * self.out)

    @nn.compact
    def __call__(self, x, c):
        move, grow = jnp.split(nn.Sequential([nn.swish, nn.Dense(2 * self.width)])(c)[:, None], 2, -1)
        return self.linear(nn.LayerNorm(use_bias=False, use_scale=False)(x) * (1 + grow) + move)


class DiT(nn.Module):
    side: int
    features: int
    width: int
    depth: int
    heads: int

    def setup(self):
        self.x_embedder = PatchEmbed(self.width)
        self.pos_embed = self.param("pos_embed", nn.initializers.ones, ((self.side // 2) ** 2, self.width))
        self.blocks = [DiTBlock(self.width, self.heads) for _ in range(self.depth)]
        self.final_layer = DiTFinal(self.width, self.features)

    def __call__(self, x, c):
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        h = self.final_layer(h, c).reshape(-1, self.side // 2, self.side // 2, 2, 2, self.features)
        return h.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


class UViT(nn.Module):
    """The `UNet` of uvit.py."""

    width: int
    depth: int
    multipliers: tuple
    transformer: tuple  # width, depth, heads
    out: int

    @nn.compact
    def __call__(self, x, c):
        made = iter(range(1000))
        block = lambda width, change="": ToldResBlock(width, change, name=f"ResBlock_{next(made)}")
        h = nn.Conv(self.width, (3, 3))(x)
        kept, last = [h], len(self.multipliers) - 1
        for level, multiplier in enumerate(self.multipliers):
            for _ in range(self.depth):
                h = block(self.width * multiplier)(h, c)
                kept.append(h)
            if level < last:
                h = block(h.shape[-1], "down")(h, c)
                kept.append(h)
        h = DiT(h.shape[1], h.shape[-1], *self.transformer)(h, c)
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for _ in range(self.depth + 1):
                h = block(self.width * multiplier)(jnp.concatenate([h, kept.pop()], -1), c)
            if level:
                h = block(h.shape[-1], "up")(h, c)
        return nn.Conv(self.out, (3, 3))(nn.swish(CondGroupNorm()(h, c)))


class UNet5DWrapper(nn.Module):
    width: int
    depth: int
    vocabulary: int
    multipliers: tuple = (1,)
    transformer: tuple = ()

    @nn.compact
    def __call__(self, x, c):
        *sides, channels, features = x.shape
        out = channels * self.vocabulary
        if self.transformer:
            net = UViT(self.width, self.depth, self.multipliers, self.transformer, out, name="UNet_0")
        else:
            net = UNet(self.width, self.depth, out)
        return net(x.reshape(*sides, channels * features), c).reshape(*sides, channels, self.vocabulary)


class Classifier(nn.Module):
    vocabulary: int
    features: int
    depth: int
    heads: int
    hidden: int
    kind: str
    outside: bool
    multipliers: tuple
    transformer: tuple

    @nn.compact
    def __call__(self, z, t, row):
        c = row if t is None else CondEmbedding(self.features)(1000.0 * t, row)
        if z.ndim == 4 or self.outside:
            z = nn.Embed(self.vocabulary + 1, self.features)(z)
        if z.ndim == 5:
            about = (self.features, self.depth, self.vocabulary, self.multipliers, self.transformer)
            return UNet5DWrapper(*about)(z, c)
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
    multipliers: tuple = (1,)
    transformer: tuple = ()  # width, depth, heads, of images

    def setup(self):
        if self.classes:
            self.cond_embeddings = nn.Embed(self.classes, self.features)
        about = (self.vocabulary, self.features, self.depth, self.heads, self.hidden, self.kind, self.outside)
        self.classifier = Classifier(*about, self.multipliers, self.transformer)

    def __call__(self, z, t, labels=None):
        return self.classifier(z, t, self.cond_embeddings(labels) if self.classes else None)


def random_params(module, *inputs, scale=0.3):
    """Every parameter normal."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)  # not JAX's, which would compile a program for every shape
    return jax.tree.map(lambda v: (scale * rng.normal(size=v.shape)).astype(np.float32), shapes)
