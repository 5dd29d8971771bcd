"""Networks by their published definitions: NumPy in float64, weights by the names and in the layout that they have in
their authors' PyTorch code (a linear layer's are `(out, in)`, a convolution's `(out, in, height, width)`)."""

import math

import numpy as np

erf = np.vectorize(math.erf)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def normalised(x, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def waves(steps, features):
    """Cosines, then sines, at geometric frequencies."""
    angles = steps[:, None] * 10000.0 ** (-np.arange(features // 2) / (features // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


class Weights(dict):
    """By name, as float64."""

    def below(self, prefix):
        return Weights({k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)})

    def linear(self, name, x):
        y = x @ np.asarray(self[f"{name}.weight"], np.float64).T
        return y + self[f"{name}.bias"] if f"{name}.bias" in self else y

    def norm(self, name, x, epsilon=1e-5):
        return normalised(x, epsilon) * self[f"{name}.weight"] + self[f"{name}.bias"]

    def group_norm(self, name, x, epsilon=1e-5):
        """Of `(batch, channels, height, width)`, in groups of at least 4 channels, 32 at most."""
        groups = min(32, x.shape[1] // 4)
        y = normalised(x.reshape(len(x), groups, -1), epsilon).reshape(x.shape)
        return y * self[f"{name}.weight"][:, None, None] + self[f"{name}.bias"][:, None, None]

    def conv(self, name, x, groups=1):
        """Of `(batch, channels, height, width)`, zeros around the image."""
        kernel, bias = np.asarray(self[f"{name}.weight"], np.float64), self.get(f"{name}.bias")
        out, each, size, _ = kernel.shape
        height, width = x.shape[2:]
        x = np.pad(x, [(0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2])
        y = np.zeros((len(x), out, height, width))
        for o in range(out):
            first = each * (o * groups // out)
            for i in range(size):
                for j in range(size):
                    seen = x[:, first : first + each, i : i + height, j : j + width]
                    y[:, o] += np.einsum("bchw,c->bhw", seen, kernel[o, :, i, j])
        return y if bias is None else y + np.asarray(bias)[:, None, None]


def attention(w, x, heads):
    """Of `qkv` and `proj`, the rows of qkv ordered (q/k/v, head, feature)."""
    batch, sites, width = x.shape
    q, k, v = w.linear("qkv", x).reshape(batch, sites, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    y = softmax(q @ k.swapaxes(-1, -2) / math.sqrt(width // heads)) @ v
    return w.linear("proj", y.transpose(0, 2, 1, 3).reshape(batch, sites, width))


def cross_attention(w, x, words, valid, heads):
    """Of sites to words (Chen et al. 2023, PixArt-alpha), of which an example may lack some."""
    head = x.shape[-1] // heads
    split = lambda y: y.reshape(len(y), -1, heads, head).transpose(0, 2, 1, 3)
    k, v = np.split(w.linear("kv_linear", words), 2, axis=-1)
    scores = split(w.linear("q_linear", normalised(x, 1e-6))) @ split(k).swapaxes(-1, -2) / math.sqrt(head)
    y = softmax(np.where(valid[:, None, None], scores, -np.inf)) @ split(v)
    return w.linear("proj", y.transpose(0, 2, 1, 3).reshape(x.shape))


def looking(words, valid, nothing, heads):
    """`look(w, x)` of blocks that attend to words behind their own sites; without a valid word to `nothing`."""
    words, valid = np.array(words, np.float64), np.array(valid)
    for i in np.flatnonzero(~valid.any(axis=1)):
        words[i, 0], valid[i, 0] = nothing, True
    return lambda w, x: x + cross_attention(w.below("cross_attn."), x, words, valid, heads)


def put_cross(weights, name, p, heads):
    """A `layers.CrossAttention`, whose columns of `key_value` are (head, key or value, feature), by PixArt's names."""
    kernel = p["key_value"]["kernel"]
    kernel = kernel.reshape(len(kernel), heads, 2, -1).swapaxes(1, 2).reshape(len(kernel), -1)
    for theirs, own in (("q_linear", p["query"]["kernel"]), ("kv_linear", kernel), ("proj", p["out"]["kernel"])):
        weights[f"{name}cross_attn.{theirs}.weight"] = own.T
    weights[f"{name}cross_attn.proj.bias"] = p["out"]["bias"]


def cut(x, p):
    """An image `(batch, C, H, W)` in patches, `(batch, patches, C, p, p)`, row by row."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // p, p, width // p, p)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels, p, p)


def joined(y, grid, p):
    """Patches of `(row, column, channel)` as an image `(batch, channels, H, W)`."""
    batch, rows, columns = len(y), *grid
    y = y.reshape(batch, rows, columns, p, p, -1).transpose(0, 5, 1, 3, 2, 4)
    return y.reshape(batch, -1, rows * p, columns * p)


def uvit(weights, x, steps, labels, *, patch, heads, context=None):
    """Bao et al. 2023 (baofff/U-ViT, libs/uvit.py and uvit_t2i.py): x `(batch, C, H, W)`, steps in [0, 1000].

    The blocks behind the middle one may be fewer than those before it, of whose connections they take the last.
    """
    w = Weights(weights)
    kernel = w["patch_embed.proj.weight"]
    width, grid = len(kernel), (x.shape[2] // patch, x.shape[3] // patch)
    h = np.einsum("blcij,dcij->bld", cut(x, patch), kernel) + w["patch_embed.proj.bias"]
    token = waves(steps, width)
    if "time_embed.0.weight" in w:
        token = w.linear("time_embed.2", silu(w.linear("time_embed.0", token)))
    patches = h.shape[1]
    if context is not None:
        h = np.concatenate([w.linear("context_embed", context), h], axis=1)
    h = np.concatenate([token[:, None], h], axis=1)
    if labels is not None:
        h = np.concatenate([w["label_emb.weight"][labels][:, None], h], axis=1)
    extras = h.shape[1] - patches
    h = h + w["pos_embed"]

    def block(name, h, skip=None):
        own = w.below(f"{name}.")
        h = h if skip is None else own.linear("skip_linear", np.concatenate([h, skip], axis=-1))
        h = h + attention(own.below("attn."), own.norm("norm1", h), heads)
        return h + own.linear("mlp.fc2", gelu(own.linear("mlp.fc1", own.norm("norm2", h))))

    before, behind = (len({k.split(".")[1] for k in w if k.startswith(f"{name}_blocks.")}) for name in ("in", "out"))
    skips = []
    for i in range(before):
        h = block(f"in_blocks.{i}", h)
        skips.append(h)
    h = block("mid_block", h)
    for i in range(behind):
        h = block(f"out_blocks.{i}", h, skips.pop())
    y = joined(w.linear("decoder_pred", w.norm("norm", h))[:, extras:], grid, patch)
    return w.conv("final_layer", y) if "final_layer.weight" in w else y


def unshuffle(x):
    """PyTorch's PixelUnshuffle(2)."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, 4 * channels, height // 2, width // 2)


def shuffle(x):
    """PyTorch's PixelShuffle(2)."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels // 4, 2, 2, height, width).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels // 4, 2 * height, 2 * width)


def dico(weights, x, steps, labels, depth):
    """Ai et al. 2025 (shallowdream204/DiCo, dico_models.py): x `(batch, C, H, W)`, steps in [0, 1000]."""
    w = Weights(weights)
    c = []
    for i in range(3):
        own = w.below(f"t_embedder_{i + 1}.")
        y = w[f"y_embedder.embedding_table_{i}.weight"][labels]
        c.append(silu(own.linear("mlp.2", silu(own.linear("mlp.0", waves(steps, 256)))) + y))

    def modulated(x, shift, scale):
        x = normalised(x.transpose(0, 2, 3, 1), 1e-6).transpose(0, 3, 1, 2)
        return x * (1 + scale) + shift

    def vectors(w, c, number):
        return [v[:, :, None, None] for v in np.split(w.linear("adaLN_modulation.1", c), number, axis=1)]

    def stage(name, x, c, blocks):
        for i in range(blocks):
            own = w.below(f"{name}.{i}.")
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors(own, c, 6)
            y = own.conv("conv1", modulated(x, shift_a, scale_a))
            y = gelu(own.conv("conv2", y, groups=y.shape[1]))
            y = y * sigmoid(own.conv("ca.1", y.mean((2, 3), keepdims=True)))
            x = x + gate_a * own.conv("conv3", y)
            y = own.conv("conv5", gelu(own.conv("conv4", modulated(x, shift_m, scale_m))))
            x = x + gate_m * y
        return x

    one = stage("encoder_level_1", w.conv("x_embedder.proj", x), c[0], depth[0])
    two = stage("encoder_level_2", unshuffle(w.conv("down1_2.body.0", one)), c[1], depth[1])
    h = stage("latent", unshuffle(w.conv("down2_3.body.0", two)), c[2], depth[2])
    h = np.concatenate([shuffle(w.conv("up3_2.body.0", h)), two], axis=1)
    h = stage("decoder_level_2", w.conv("reduce_chan_level2", h), c[1], depth[3])
    h = np.concatenate([shuffle(w.conv("up2_1.body.0", h)), one], axis=1)
    h = stage("decoder_level_1", w.conv("reduce_chan_level1", h), c[1], depth[4])
    own = w.below("final_layer.")
    return own.conv("out_proj", modulated(h, *vectors(own, c[1], 2)))


def mamba(w, x):
    """Gu & Dao 2023 in both directions (Zhu et al. 2024: bimamba_type "v2"), one site after the other."""
    rank, state = w["dt_proj.weight"].shape[1], w["A_log"].shape[1]
    x, z = np.split(w.linear("in_proj", x), 2, axis=-1)

    def one(x, z, b):
        kernel = w[f"conv1d{b}.weight"][:, 0]  # (features, size)
        padded = np.pad(x, [(0, 0), (kernel.shape[1] - 1, 0), (0, 0)])
        u = sum(padded[:, i : i + x.shape[1]] * kernel[:, i] for i in range(kernel.shape[1])) + w[f"conv1d{b}.bias"]
        u = silu(u)
        dt, write, read = np.split(w.linear(f"x_proj{b}", u), [rank, rank + state], axis=-1)
        dt = np.log1p(np.exp(w.linear(f"dt_proj{b}", dt)))
        decay = -np.exp(np.asarray(w["A_log" if not b else "A_b_log"], np.float64))
        h, y = np.zeros((len(x), *decay.shape)), np.zeros_like(u)
        for n in range(x.shape[1]):
            h = np.exp(dt[:, n, :, None] * decay) * h + (dt[:, n] * u[:, n])[..., None] * write[:, n, None]
            y[:, n] = (h * read[:, n, None]).sum(-1) + w[f"D{b}"] * u[:, n]
        return y * silu(z)

    return w.linear("out_proj", one(x, z, "") + one(x[:, ::-1], z[:, ::-1], "_b")[:, ::-1])


def dis(weights, x, steps, labels, *, patch, look=None):
    """Fei et al. 2024 (feizc/DiS, models_dis.py): x `(batch, C, H, W)`, steps in [0, 1000]."""
    w = Weights(weights)
    kernel = w["patch_embed.proj.weight"]
    width, grid = len(kernel), (x.shape[2] // patch, x.shape[3] // patch)
    h = np.einsum("blcij,dcij->bld", cut(x, patch), kernel) + w["patch_embed.proj.bias"]
    token = w.linear("time_embed.2", silu(w.linear("time_embed.0", waves(steps, width))))
    h, c = np.concatenate([token[:, None], h], axis=1), None
    if labels is not None:
        row = w["label_emb.embedding_table.weight"][labels]
        h, c = np.concatenate([row[:, None], h], axis=1), token + row
    extras, h = 1 + (labels is not None), h + w["pos_embed"]
    rms = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def block(name, h, residual, skip=None):
        own = w.below(f"{name}.")
        h = h if skip is None else own.linear("skip_linear", np.concatenate([h, skip], axis=-1))
        residual = h + residual
        made = mamba(own.below("mixer."), rms(residual, own["norm.weight"]))
        return made if look is None else look(own, residual + made) - residual, residual

    half, residual, skips = len({k.split(".")[1] for k in w if k.startswith("in_blocks.")}), 0.0, []
    for i in range(half):
        h, residual = block(f"in_blocks.{i}", h, residual)
        skips.append(h)
    h, residual = block("mid_block", h, residual)
    for i in range(half):
        h, residual = block(f"out_blocks.{i}", h, residual, skips.pop())
    h = normalised(rms(h + residual, w["norm_f.weight"]), 1e-6)
    if c is not None:
        shift, scale = np.split(w.linear("final_layer.adaLN_modulation.1", silu(c))[:, None], 2, axis=-1)
        h = h * (1 + scale) + shift
    return joined(w.linear("final_layer.linear", h)[:, extras:], grid, patch)
