"""More networks by their published definitions: NumPy in float64, weights by the authors' names and in their layout."""

import math

import numpy as np
from numpy_networks import Weights, attention, cut, gelu, joined, normalised, sigmoid, silu, softmax, waves


def first(x):
    return x.transpose(0, 3, 1, 2)


def last(x):
    return x.transpose(0, 2, 3, 1)


def dimr(weights, x, t, labels, *, heads, vector=None, look=None):
    """Liu et al. 2024 (qihao067/DiMR, libs/core/blocks.py): x `(batch, C, H, W)`; the outputs of all stages.

    Their log_snr is 8 n / 1000 - 4 at step n, of which a quarter is what the norms are told.
    """
    w, times, told = Weights(weights), (8 * t - 4) / 4, vector

    def vector(name):
        part = w.below(f"{name}.")
        param0, param1 = (np.asarray(part[k], np.float64) for k in ("param0", "param1"))
        s = sigmoid(times[:, None] * (part["nodecay_weight"] + 1) + part["nodecay_bias"])
        return param1 + s * (param0 - param1)

    def along(v, x):
        return v.reshape(len(v), *(1,) * (x.ndim - 2), -1)

    def layer_norm(name, x):
        return normalised(x, 1e-5) * along(vector(f"{name}.weight"), x) + along(vector(f"{name}.bias"), x)

    def rms_norm(name, x):
        return along(vector(f"{name}.scale"), x) * x / (np.linalg.norm(x, axis=-1, keepdims=True) / x.shape[-1] ** 0.5)

    def block(name, x):
        own = w.below(f"{name}.")
        if f"{name}.block1.query_key_value.weight" in w:
            renamed = {"qkv": "query_key_value", "proj": "dense"}
            part = Weights(
                {k: own[f"block1.{v}"] for n, m in renamed.items() for p in ("weight", "bias")
                 for k, v in [(f"{n}.{p}", f"{m}.{p}")] if f"block1.{v}" in own}
            )  # fmt: skip
            x = x + attention(part, rms_norm(f"{name}.block1.norm", x), heads)
            x = x if look is None else look(own, x)
        else:
            x = x + last(own.conv("block1.1", first(x), groups=x.shape[-1]))
        y = rms_norm(f"{name}.block2.norm", x)
        return x + own.linear("block2.w2", gelu(own.linear("block2.w0", y)) * own.linear("block2.w1", y))

    outputs, lower = [], None
    for stage in range(len({k.split(".")[1] for k in w})):
        name = f"stages.{stage}"
        own = w.below(f"{name}.")
        kernel = np.asarray(own["input_layer.1.weight"], np.float64)
        patch, grid = kernel.shape[-1], [side // kernel.shape[-1] for side in x.shape[2:]]
        h = np.einsum("blcij,dcij->bld", cut(x, patch), kernel) + own["input_layer.1.bias"]
        h = (h + own["input_layer.3.position_embeddings.weight"]).reshape(len(x), *grid, -1)
        if lower is not None:
            y = own.linear("upsample.1.kernel", layer_norm(f"{name}.upsample.0", lower))
            ratio = grid[0] // lower.shape[1]
            y = y.reshape(*lower.shape[:3], ratio, ratio, -1).swapaxes(2, 3).reshape(h.shape)
            h = h + layer_norm(f"{name}.upsample.2", y)
        rowed = "class_embeds.weight" in own
        if rowed:
            token = np.asarray(own["class_embeds.weight"], np.float64)[labels]
            tokens = [token[:, None]] if told is None else [own.linear("vector", told)[:, None], token[:, None]]
            h = np.concatenate([*tokens, h.reshape(len(x), -1, h.shape[-1])], axis=1)
        shown, skips = [h], []
        number = len({k.split(".")[1] for k in own if k.startswith("blocks.")})
        for i in range(number):
            if i > number // 2:
                h = own.linear(f"skip_denses.{i - number // 2 - 1}", np.concatenate([h, skips.pop()], axis=-1))
            h = block(f"{name}.blocks.{i}", h)
            shown.append(h)
            if i < number // 2:
                skips.append(h)
        if rowed:
            shown = [s[:, len(tokens) :].reshape(len(x), *grid, -1) for s in shown]
        lower = np.concatenate(shown, axis=-1)
        outputs.append(own.conv("output_layer.2", first(layer_norm(f"{name}.output_layer.0", shown[-1]))))
    return outputs


def relative_bias(table, rows, columns):
    """Of every pair of places by their difference: `(heads, places, places)`, from a row for each difference."""
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    difference = places[:, None] - places[None] + (rows - 1, columns - 1)
    return np.asarray(table, np.float64)[difference[..., 0] * (2 * columns - 1) + difference[..., 1]].transpose(2, 0, 1)


def time_attention(w, x, c, heads, rows, columns):
    """Hatamizadeh et al. 2023, equations 3 to 6, as in their code (NVlabs/DiffiT, DiffiTAttention)."""
    batch, sites, width = x.shape
    qkv = w.linear("qkv", x) + w.linear("qkv_temb", c)[:, None]
    q, k, v = qkv.reshape(batch, sites, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(width // heads)
    y = softmax(scores + relative_bias(w["relative_position_bias_table"], rows, columns)) @ v
    return w.linear("proj", y.transpose(0, 2, 1, 3).reshape(batch, sites, width))


def tanh_gelu(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def time_block(w, x, c, heads, rows, columns, look=None):
    """Equations 7 and 8."""
    x = x + time_attention(w.below("attn."), normalised(x, 1e-6), c, heads, rows, columns)
    x = x if look is None else look(w, x)
    return x + w.linear("mlp.fc2", tanh_gelu(w.linear("mlp.fc1", normalised(x, 1e-6))))


def diffit(weights, x, steps, labels, *, patch, heads):
    """The latent network (NVlabs/DiffiT, diffit/diffit.py): x `(batch, C, H, W)`, steps in [0, 1000]."""
    w = Weights(weights)
    kernel, grid = np.asarray(w["x_embedder.proj.weight"], np.float64), [side // patch for side in x.shape[2:]]
    h = np.einsum("blcij,dcij->bld", cut(x, patch), kernel) + w["x_embedder.proj.bias"] + w["pos_embed"]
    c = w.linear("t_embedder.mlp.2", silu(w.linear("t_embedder.mlp.0", waves(steps, 256))))
    c = c + np.asarray(w["y_embedder.embedding_table.weight"], np.float64)[labels]
    for i in range(len({k.split(".")[1] for k in w if k.startswith("blocks.")})):
        h = time_block(w.below(f"blocks.{i}."), h, c, heads, *grid)
    return joined(w.linear("final_layer.linear", silu(normalised(h, 1e-6))), grid, patch)


def in_windows(x, side):
    """`(batch, C, H, W)` as `(batch, windows, sites, C)`, row by row."""
    batch, channels = x.shape[:2]
    return cut(x, side).reshape(batch, -1, channels, side * side).swapaxes(-1, -2)


def diffit_block(w, x, c, heads, side, look=None):
    """Equations 7 to 10 of Hatamizadeh et al. 2023, in windows: x `(batch, C, H, W)`."""
    h = w.conv("conv", silu(w.group_norm("norm", x)))
    out = np.zeros_like(h)
    for i, window in enumerate(in_windows(h, side).swapaxes(0, 1)):
        row, column = divmod(i, h.shape[3] // side)
        y = time_block(w, window, c, heads, side, side, look).swapaxes(1, 2).reshape(*h.shape[:2], side, side)
        out[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = y
    return (w.conv("shortcut", x) if "shortcut.weight" in w else x) + out


def diffit_image(weights, x, steps, labels, *, levels, blocks, heads, window, look=None):
    """Their network in image space, section 3.3: a U-Net of `diffit_block`s, joined once at each resolution."""
    w = Weights(weights)
    c = w.linear("t_embedder.mlp.2", silu(w.linear("t_embedder.mlp.0", waves(steps, 256))))
    c = c + np.asarray(w["y_embedder.embedding_table.weight"], np.float64)[labels]
    h, kept = w.conv("tokenizer", x), []

    def stage(name, h):
        for j in range(blocks):
            h = diffit_block(w.below(f"{name}.{j}."), h, c, heads, min(window, h.shape[2]), look)
        return h

    for i in range(levels):
        h = stage(f"down.{i}", h if i == 0 else w.conv(f"downsample.{i}", h)[:, :, ::2, ::2])
        kept.append(h)
    for i in reversed(range(levels)):
        if i < levels - 1:
            h = w.conv(f"upsample.{i}", np.repeat(np.repeat(h, 2, axis=2), 2, axis=3))
            h = np.concatenate([h, kept[i]], axis=1)
        else:
            kept.pop()
        h = stage(f"up.{i}", h)
    return w.conv("head.1", silu(w.group_norm("head.0", h)))


def recurrence(u, step, decay, read, direct):
    """S4D as a recurrence, one site after the other (zero-order hold, B = 1, conjugate pairs): u `(batch, L, D)`."""
    rate = np.exp(step[:, None] * decay)
    h, y = np.zeros((len(u), *decay.shape), complex), np.zeros_like(u)
    for n in range(u.shape[1]):
        h = rate * h + (rate - 1) / decay * u[:, n, :, None]
        y[:, n] = 2 * (read * h).sum(-1).real + direct * u[:, n]
    return y


def diffussm(weights, x, steps, labels, *, ratio, look=None):
    """Yan et al. 2024, section 3.2: x `(batch, C, H, W)`, pixels in a row, `ratio` to a site, one matrix for each k."""
    w = Weights(weights)
    batch, channels, height, width = x.shape
    rows = last(x).reshape(batch, height * width // ratio, ratio * channels)
    h = w.linear("x_embedder", rows) + w["pos_embed"]
    c = w.linear("t_embedder.mlp.2", silu(w.linear("t_embedder.mlp.0", waves(steps, 256))))
    c = silu(c + np.asarray(w["y_embedder.embedding_table.weight"], np.float64)[labels])

    def ssm(w, u):
        decay = -np.exp(np.asarray(w["log_A_real"], np.float64)) + 1j * w["A_imag"]
        return recurrence(u, np.exp(np.asarray(w["log_dt"], np.float64)), decay, w["C"], np.asarray(w["D"], np.float64))

    for i in range(len({k.split(".")[1] for k in w if k.startswith("blocks.")})):
        own = w.below(f"blocks.{i}.")
        shift, scale = np.split(own.linear("adaLN_modulation.1", c)[:, None], 2, axis=-1)
        site = normalised(h, 1e-6) * (1 + scale) + shift
        up = np.stack([own.linear(f"up.{k}", gelu(own.linear("W0", site))) for k in range(ratio)], axis=2)
        u = gelu(up).reshape(batch, height * width, -1)
        y = np.concatenate([ssm(own.below("ssm."), u), ssm(own.below("ssm_b."), u[:, ::-1])[:, ::-1]], axis=-1)
        y = [own.linear(f"down.{k}", y[:, k::ratio]) for k in range(ratio)]
        inner = gelu(np.concatenate(y, axis=-1))
        h = h + own.linear("W3", gelu(own.linear("W2", inner)) * gelu(own.linear("W1", site)))
        h = h if look is None else look(own, h)
    own = w.below("final_layer.")
    shift, scale = np.split(own.linear("adaLN_modulation.1", c)[:, None], 2, axis=-1)
    y = own.linear("linear", normalised(h, 1e-6) * (1 + scale) + shift)
    return first(y.reshape(batch, height, width, -1))


def fused_block(w, x, c):
    """A fused inverted bottleneck, with squeeze and excitation, under adaLN-zero: x `(batch, C, H, W)`."""
    shift, scale, gate = (v[:, :, None, None] for v in np.split(w.linear("adaLN_modulation.1", c), 3, axis=1))
    y = first(normalised(last(x), 1e-6)) * (1 + scale) + shift
    y = gelu(w.conv("conv_exp", y))
    mean = y.mean((2, 3))
    y = y * sigmoid(w.linear("se.conv_expand", silu(w.linear("se.conv_reduce", mean))))[:, :, None, None]
    return x + gate * w.conv("conv_pwl", y)
