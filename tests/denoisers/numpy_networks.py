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


def uvit(weights, x, steps, labels, *, patch, heads):
    """Bao et al. 2023 (baofff/U-ViT, libs/uvit.py): x `(batch, C, H, W)`, steps in [0, 1000]."""
    w = Weights(weights)
    kernel = w["patch_embed.proj.weight"]
    width, grid = len(kernel), (x.shape[2] // patch, x.shape[3] // patch)
    h = np.einsum("blcij,dcij->bld", cut(x, patch), kernel) + w["patch_embed.proj.bias"]
    token = waves(steps, width)
    if "time_embed.0.weight" in w:
        token = w.linear("time_embed.2", silu(w.linear("time_embed.0", token)))
    h = np.concatenate([token[:, None], h], axis=1)
    if labels is not None:
        h = np.concatenate([w["label_emb.weight"][labels][:, None], h], axis=1)
    extras = 1 + (labels is not None)
    h = h + w["pos_embed"]

    def block(name, h, skip=None):
        own = w.below(f"{name}.")
        h = h if skip is None else own.linear("skip_linear", np.concatenate([h, skip], axis=-1))
        h = h + attention(own.below("attn."), own.norm("norm1", h), heads)
        return h + own.linear("mlp.fc2", gelu(own.linear("mlp.fc1", own.norm("norm2", h))))

    half, skips = len({k.split(".")[1] for k in w if k.startswith("in_blocks.")}), []
    for i in range(half):
        h = block(f"in_blocks.{i}", h)
        skips.append(h)
    h = block("mid_block", h)
    for i in range(half):
        h = block(f"out_blocks.{i}", h, skips.pop())
    y = joined(w.linear("decoder_pred", w.norm("norm", h))[:, extras:], grid, patch)
    return w.conv("final_layer", y) if "final_layer.weight" in w else y
