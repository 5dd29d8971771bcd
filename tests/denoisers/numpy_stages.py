"""Networks of stages by their published definitions: NumPy in float64, weights by their authors' names (where these
have published code) and in PyTorch's layout. An image is `(batch, channels, height, width)`."""

import numpy as np
from numpy_hierarchies import first, fused_block, last
from numpy_networks import Weights, attention, cross_attention, gelu, normalised, shuffle, silu, unshuffle, waves


def hard_swish(x):
    return x * np.clip(x + 3, 0, 6) / 6


def lite_mla(w, x, heads):
    """Cai et al. 2023 (mit-han-lab/efficientvit, nn/ops.py, LiteMLA without norms), pair by pair of pixels."""
    batch, _, height, width = x.shape
    qkv = w.conv("qkv.conv", x)
    scales = [qkv]
    for i in range(len({k.split(".")[1] for k in w if k.startswith("aggreg.")})):
        y = w.conv(f"aggreg.{i}.0", qkv, groups=qkv.shape[1])
        scales.append(w.conv(f"aggreg.{i}.1", y, groups=3 * heads))
    every = np.concatenate(scales, axis=1)
    dim = qkv.shape[1] // 3 // heads
    q, k, v = np.split(every.reshape(batch, -1, 3 * dim, height * width), 3, axis=2)
    pairs = np.maximum(k, 0).swapaxes(-1, -2) @ np.maximum(q, 0)  # (keys, queries)
    y = v @ (pairs / (pairs.sum(2, keepdims=True) + 1e-15))
    return w.conv("proj.conv", y.reshape(batch, -1, height, width))


def mbconv(w, x):
    """MBConv of the same file, without norms."""
    y = hard_swish(w.conv("inverted_conv.conv", x))
    return w.conv("point_conv.conv", hard_swish(w.conv("depth_conv.conv", y, groups=y.shape[1])))


def under(w, x, c, branches):
    """`x + gate branch(norm(x) (1 + scale) + shift)`, one branch after the other; plain where nothing modulates."""
    vectors = [0.0, 0.0, 1.0] * len(branches)
    if "adaLN_modulation.1.weight" in w:
        vectors = np.split(w.linear("adaLN_modulation.1", c), len(vectors), axis=1)
        vectors = [v[:, :, None, None] for v in vectors]
    for i, branch in enumerate(branches):
        shift, scale, gate = vectors[3 * i : 3 * i + 3]
        if branch is None:
            continue
        x = x + gate * branch(first(normalised(last(x), 1e-6)) * (1 + scale) + shift)
    return x


def efficient_block(w, x, c, heads):
    """EfficientViTBlock of the same file, its norms before the branches."""
    context, local = w.below("context_module.main."), w.below("local_module.main.")
    return under(w, x, c, [lambda x: lite_mla(context, x, heads), lambda x: mbconv(local, x)])


def rows(x):
    return last(x).reshape(len(x), -1, x.shape[1])


def transformer_block(w, x, c, heads, words, valid):
    """AsCAN's T: attention among pixels, to words, and an MLP; adaLN-zero tells the first and the last the time."""

    def image(y):
        return first(y.reshape(len(x), *x.shape[2:], -1))

    def mlp(y):
        return image(w.linear("mlp.fc2", gelu(w.linear("mlp.fc1", rows(y)))))

    x = under(w, x, c, [lambda y: image(attention(w.below("attn."), rows(y), heads)), None])
    x = x + image(cross_attention(w.below("cross_attn."), rows(x), words, valid, heads))
    return under(w, x, c, [None, mlp])


def levels_of(stages):
    """Of each stage: how many times the first width it has."""
    n = len(stages) // 2
    return [i if i <= n else max(2 * n - i, 1) for i in range(len(stages))]


def conditions(w, steps, labels):
    """One vector for each width."""
    for i in range(len({k.split(".")[1] for k in w if k.startswith("conditions.")})):
        own = w.below(f"conditions.{i}.")
        y = np.asarray(own["labels"], np.float64)[labels]
        yield silu(own.linear("mlp.2", silu(own.linear("mlp.0", waves(steps, 256)))) + y)


def hierarchy(weights, x, steps, labels, stages, *, head_width, words=None, valid=None):
    """DiCo's frame (Ai et al. 2025) with any number of stages, and for each block a letter."""
    w = Weights(weights)
    c = list(conditions(w, steps, labels))

    def stage(i, x):
        level = levels_of(stages)[i]
        for j, letter in enumerate(stages[i]):
            own, heads = w.below(f"stages.{i}.{j}."), x.shape[1] // head_width
            if letter == "f":
                x = fused_block(own, x, c[level])
            elif letter == "e":
                x = efficient_block(own, x, c[level], heads)
            else:
                x = transformer_block(own, x, c[level], heads, words, valid)
        return x

    n, kept, h = len(stages) // 2, [], w.conv("embed", x)
    for i in range(n):
        kept.append(stage(i, h))
        h = unshuffle(w.conv(f"down.{i}", kept[-1]))
    h = stage(n, h)
    for i in range(n):
        h = np.concatenate([shuffle(w.conv(f"up.{i}", h)), kept.pop()], axis=1)
        h = stage(n + 1 + i, w.conv(f"reduce.{i}", h))
    h = first(normalised(last(h), 1e-6))
    if "final.weight" in w:
        shift, scale = (v[:, :, None, None] for v in np.split(w.linear("final", c[1]), 2, axis=1))
        h = h * (1 + scale) + shift
    return w.conv("out", h)
