"""The published U-Nets in torch, written from their definitions, with the names that their weights have.

Forward passes only, in evaluation: dropout and initial values are not here.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class ADM(nn.Module):
    """openai/guided-diffusion's UNetModel (improved-diffusion's where `updown` is False)."""

    def __init__(
        self, *, channels, out, width, multipliers, blocks, attend_at, heads=1, head_width=None, classes=None,
        scale_shift=True, updown=True, new_order=False, groups=32,
    ):  # fmt: skip
        super().__init__()
        self.width, cond = width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.label_emb = nn.Embedding(classes, cond) if classes else None
        res = lambda a, b, **how: ADMResBlock(a, b, cond, scale_shift, groups, **how)
        attend = lambda c: ADMAttention(c, heads if head_width is None else c // head_width, new_order, groups)
        down = lambda c: res(c, c, down=True) if updown else ADMDown(c)
        up = lambda c: res(c, c, up=True) if updown else ADMUp(c)
        c = int(multipliers[0] * width)
        kept, factor = [c], 1
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, c, 3, padding=1)])])
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                layers = [res(c, int(multiplier * width))]
                c = int(multiplier * width)
                layers += [attend(c)] if factor in attend_at else []
                self.input_blocks.append(nn.ModuleList(layers))
                kept.append(c)
            if level < len(multipliers) - 1:
                self.input_blocks.append(nn.ModuleList([down(c)]))
                kept.append(c)
                factor *= 2
        self.middle_block = nn.ModuleList([res(c, c), attend(c), res(c, c)])
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(blocks + 1):
                layers = [res(c + kept.pop(), int(multiplier * width))]
                c = int(multiplier * width)
                layers += [attend(c)] if factor in attend_at else []
                if level and i == blocks:
                    layers.append(up(c))
                    factor //= 2
                self.output_blocks.append(nn.ModuleList(layers))
        first = int(multipliers[0] * width)
        self.out = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), nn.Conv2d(first, out, 3, padding=1))

    def forward(self, x, steps, labels=None):
        half = self.width // 2
        angles = steps[:, None].float() * torch.exp(-np.log(10000.0) * torch.arange(half) / half)
        c = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.label_emb is not None:
            c = c + self.label_emb(labels)
        kept = []
        for layers in self.input_blocks:
            for layer in layers:
                x = layer(x, c) if isinstance(layer, ADMResBlock) else layer(x)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, c) if isinstance(layer, ADMResBlock) else layer(x)
        for layers in self.output_blocks:
            x = torch.cat([x, kept.pop()], dim=1)
            for layer in layers:
                x = layer(x, c) if isinstance(layer, ADMResBlock) else layer(x)
        return self.out(x)


class ADMResBlock(nn.Module):
    def __init__(self, a, b, cond, scale_shift, groups, up=False, down=False):
        super().__init__()
        self.scale_shift, self.up, self.down = scale_shift, up, down
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, a), nn.SiLU(), nn.Conv2d(a, b, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(cond, (1 + scale_shift) * b))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, b), nn.SiLU(), nn.Identity(), nn.Conv2d(b, b, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if a == b else nn.Conv2d(a, b, 1)

    def forward(self, x, c):
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.up:
            h, x = (F.interpolate(v, scale_factor=2, mode="nearest") for v in (h, x))
        if self.down:
            h, x = (F.avg_pool2d(v, 2) for v in (h, x))
        h, m = conv(h), self.emb_layers(c)[:, :, None, None]
        norm, act, _, conv = self.out_layers
        if self.scale_shift:
            scale, shift = m.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + m)
        return self.skip_connection(x) + conv(act(h))


class ADMClassifier(nn.Module):
    """openai/guided-diffusion's EncoderUNetModel with pool="attention": ADM without its way up."""

    def __init__(self, *, side, classes, **sizes):
        super().__init__()
        whole = ADM(out=3, **sizes)
        self.width, self.time_embed = whole.width, whole.time_embed
        self.input_blocks, self.middle_block = whole.input_blocks, whole.middle_block
        c = whole.middle_block[0].out_layers[3].weight.shape[0]
        pool = AttentionPool2d(side >> (len(sizes["multipliers"]) - 1), c, sizes["head_width"], classes)
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), pool)

    def forward(self, x, steps):
        half = self.width // 2
        angles = torch.outer(steps, 10000.0 ** (-torch.arange(half) / half))
        c = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        for block in (*self.input_blocks, self.middle_block):
            for layer in block:
                x = layer(x, c) if isinstance(layer, ADMResBlock) else layer(x)
        return self.out(x)


class AttentionPool2d(nn.Module):
    def __init__(self, side, c, head_width, out):
        super().__init__()
        self.heads = c // head_width
        self.positional_embedding = nn.Parameter(torch.empty(c, side**2 + 1))
        self.qkv_proj, self.c_proj = nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, out, 1)

    def forward(self, x):
        flat = x.flatten(2)
        flat = torch.cat([flat.mean(-1, keepdim=True), flat], -1) + self.positional_embedding
        n, c, _ = flat.shape
        q, k, v = self.qkv_proj(flat).reshape(n, 3, self.heads, c // self.heads, -1).unbind(1)
        weights = torch.softmax(torch.einsum("nhci,nhcj->nhij", q, k) / (c // self.heads) ** 0.5, dim=-1)
        return self.c_proj(torch.einsum("nhij,nhcj->nhci", weights, v).reshape(flat.shape))[..., 0]


class ADMAttention(nn.Module):
    def __init__(self, c, heads, new_order, groups):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm, self.qkv, self.proj_out = nn.GroupNorm(groups, c), nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)

    def forward(self, x):
        n, c, *_ = x.shape
        flat = x.reshape(n, c, -1)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            q, k, v = qkv.reshape(n, 3, self.heads, c // self.heads, -1).unbind(1)
        else:
            q, k, v = qkv.reshape(n, self.heads, 3, c // self.heads, -1).unbind(2)
        weights = torch.softmax(torch.einsum("nhci,nhcj->nhij", q, k) / (c // self.heads) ** 0.5, dim=-1)
        a = torch.einsum("nhij,nhcj->nhci", weights, v).reshape(n, c, -1)
        return (flat + self.proj_out(a)).reshape(x.shape)


class ADMDown(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class ADMUp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class EDMConv(nn.Module):
    """A convolution that may resample first; `kernel` 0 only resamples."""

    def __init__(self, a, b, kernel, up=False, down=False, taps=(1, 1), fused=False):
        super().__init__()
        self.up, self.down, self.fused, self.out_channels = up, down, fused, b
        self.weight = nn.Parameter(torch.empty(b, a, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(b)) if kernel else None
        taps = torch.tensor(taps, dtype=torch.float32)
        if up or down:
            self.register_buffer("resample_filter", (torch.outer(taps, taps) / taps.sum() ** 2)[None, None])

    def forward(self, x):
        c = x.shape[1]
        if self.fused:  # down, behind the convolution
            margin = (self.resample_filter.shape[-1] - 1) // 2
            x = F.conv2d(x, self.weight, padding=1 + margin)
            filters = self.resample_filter.repeat(x.shape[1], 1, 1, 1)
            return F.conv2d(x, filters, groups=x.shape[1], stride=2) + self.bias[:, None, None]
        if self.up or self.down:
            margin = (self.resample_filter.shape[-1] - 1) // 2
            filters = self.resample_filter.repeat(c, 1, 1, 1)
            if self.up:
                x = F.conv_transpose2d(x, 4 * filters, groups=c, stride=2, padding=margin)
            else:
                x = F.conv2d(x, filters, groups=c, stride=2, padding=margin)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class EDMNorm(nn.GroupNorm):
    def __init__(self, c, eps):
        super().__init__(min(32, c // 4), c, eps=eps)


class EDMBlock(nn.Module):
    def __init__(
        self, a, b, cond, *, up=False, down=False, heads=0, gain=1.0, eps=1e-5, taps=(1, 1), project=False,
        adaptive=True,
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels = a, b
        self.heads, self.gain, self.adaptive = heads, gain, adaptive
        how = {"up": up, "down": down, "taps": taps}
        self.norm0, self.conv0 = EDMNorm(a, eps), EDMConv(a, b, 3, **how)
        self.affine = nn.Linear(cond, (1 + adaptive) * b)
        self.norm1, self.conv1 = EDMNorm(b, eps), EDMConv(b, b, 3)
        self.skip = EDMConv(a, b, 1 if project or a != b else 0, **how) if a != b or up or down else None
        if heads:
            self.norm2, self.qkv, self.proj = EDMNorm(b, eps), EDMConv(b, 3 * b, 1), EDMConv(b, b, 1)

    def forward(self, x, c):
        h, m = self.conv0(F.silu(self.norm0(x))), self.affine(c)[:, :, None, None]
        if self.adaptive:
            scale, shift = m.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + m)
        x = (self.conv1(F.silu(h)) + (x if self.skip is None else self.skip(x))) * self.gain
        if self.heads:
            n, width, *_ = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(n, self.heads, width // self.heads, 3, -1).unbind(3)
            weights = torch.softmax(torch.einsum("nhci,nhcj->nhij", q, k) / q.shape[2] ** 0.5, dim=-1)
            a = torch.einsum("nhij,nhcj->nhci", weights, v).reshape(x.shape)
            x = (self.proj(a) + x) * self.gain
        return x


class _EDM(nn.Module):
    def _mapped(self, width, cond, features):
        self.map_layer0, self.map_layer1 = nn.Linear(features, cond), nn.Linear(cond, cond)

    def _waves(self, steps, count, endpoint):
        freqs = 10000.0 ** -(torch.arange(count // 2) / (count // 2 - endpoint))
        angles = torch.outer(steps, freqs)
        return angles.cos(), angles.sin()


class SongUNet(_EDM):
    """NVlabs/edm's SongUNet: DDPM++ (positional, standard) and NCSN++ (fourier, residual)."""

    def __init__(self, *, side, channels, out, width, multipliers, blocks, attend_at, classes=0, augment=0, ncsn=False):
        super().__init__()
        self.ncsn, cond, taps = ncsn, 4 * width, (1, 3, 3, 1) if ncsn else (1, 1)
        self.features = (1 + ncsn) * width
        how = {"gain": 0.5**0.5, "eps": 1e-6, "taps": taps, "project": True, "adaptive": False}
        block = lambda a, b, attend=False, **more: EDMBlock(a, b, cond, heads=int(attend), **how, **more)
        self.map_noise = nn.Module()
        if ncsn:
            self.map_noise.register_buffer("freqs", torch.empty(self.features // 2))
        self.map_label = nn.Linear(classes, self.features) if classes else None
        self.map_augment = nn.Linear(augment, self.features, bias=False) if augment else None
        self._mapped(width, cond, self.features)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, shown = channels, channels
        for level, multiplier in enumerate(multipliers):
            here = f"{side >> level}x{side >> level}"
            if level == 0:
                self.enc[f"{here}_conv"] = EDMConv(c, width, 3)
                c = width
            else:
                self.enc[f"{here}_down"] = block(c, c, down=True)
                if ncsn:
                    self.enc[f"{here}_aux_residual"] = EDMConv(shown, c, 3, down=True, taps=taps, fused=True)
                    shown = c
            for i in range(blocks):
                attend = side >> level in attend_at
                self.enc[f"{here}_block{i}"] = block(c, multiplier * width, attend)
                c = multiplier * width
        kept = [layer.out_channels for name, layer in self.enc.items() if "aux" not in name]
        for level, multiplier in reversed(list(enumerate(multipliers))):
            here = f"{side >> level}x{side >> level}"
            if level == len(multipliers) - 1:
                self.dec[f"{here}_in0"], self.dec[f"{here}_in1"] = block(c, c, True), block(c, c)
            else:
                self.dec[f"{here}_up"] = block(c, c, up=True)
            for i in range(blocks + 1):
                attend = i == blocks and side >> level in attend_at
                self.dec[f"{here}_block{i}"] = block(c + kept.pop(), multiplier * width, attend)
                c = multiplier * width
        self.dec[f"{here}_aux_norm"], self.dec[f"{here}_aux_conv"] = EDMNorm(c, 1e-6), EDMConv(c, out, 3)

    def forward(self, x, steps, labels=None, augment=None):
        if self.ncsn:
            angles = torch.outer(steps, 2 * np.pi * self.map_noise.freqs)
            h = torch.cat([angles.sin(), angles.cos()], dim=1)
        else:
            h = torch.cat(self._waves(steps, self.features, True)[::-1], dim=1)
        if self.map_label is not None:
            h = h + self.map_label(labels * labels.shape[1] ** 0.5)
        if self.map_augment is not None and augment is not None:
            h = h + self.map_augment(augment)
        c = F.silu(self.map_layer1(F.silu(self.map_layer0(h))))
        kept, shown = [], x
        for name, layer in self.enc.items():
            if "aux_residual" in name:
                x = kept[-1] = shown = (x + layer(shown)) / 2**0.5
            else:
                x = layer(x, c) if isinstance(layer, EDMBlock) else layer(x)
                kept.append(x)
        for name, layer in self.dec.items():
            if "aux" in name:
                x = layer(x) if "norm" in name else layer(F.silu(x))
                continue
            if "block" in name:
                x = torch.cat([x, kept.pop()], dim=1)
            x = layer(x, c)
        return x


class DhariwalUNet(_EDM):
    """NVlabs/edm's DhariwalUNet: ADM again, under other names."""

    def __init__(
        self, *, side, channels, out, width, multipliers, blocks, attend_at, head_width=64, classes=0, augment=0
    ):
        super().__init__()
        self.width, cond = width, 4 * width
        block = lambda a, b, attend=False, **how: EDMBlock(a, b, cond, heads=b // head_width if attend else 0, **how)
        self.map_augment = nn.Linear(augment, width, bias=False) if augment else None
        self._mapped(width, cond, width)
        self.map_label = nn.Linear(classes, cond, bias=False) if classes else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c = channels
        for level, multiplier in enumerate(multipliers):
            here, attend = f"{side >> level}x{side >> level}", side >> level in attend_at
            if level == 0:
                self.enc[f"{here}_conv"] = EDMConv(c, multiplier * width, 3)
                c = multiplier * width
            else:
                self.enc[f"{here}_down"] = block(c, c, down=True)
            for i in range(blocks):
                self.enc[f"{here}_block{i}"] = block(c, multiplier * width, attend)
                c = multiplier * width
        kept = [layer.out_channels for layer in self.enc.values()]
        for level, multiplier in reversed(list(enumerate(multipliers))):
            here, attend = f"{side >> level}x{side >> level}", side >> level in attend_at
            if level == len(multipliers) - 1:
                self.dec[f"{here}_in0"], self.dec[f"{here}_in1"] = block(c, c, True), block(c, c)
            else:
                self.dec[f"{here}_up"] = block(c, c, up=True)
            for i in range(blocks + 1):
                self.dec[f"{here}_block{i}"] = block(c + kept.pop(), multiplier * width, attend)
                c = multiplier * width
        self.out_norm, self.out_conv = EDMNorm(c, 1e-5), EDMConv(c, out, 3)

    def forward(self, x, steps, labels=None, augment=None):
        h = torch.cat(self._waves(steps, self.width, False), dim=1)
        if self.map_augment is not None and augment is not None:
            h = h + self.map_augment(augment)
        c = self.map_layer1(F.silu(self.map_layer0(h)))
        c = F.silu(c + self.map_label(labels) if self.map_label is not None else c)
        kept = []
        for layer in self.enc.values():
            x = layer(x, c) if isinstance(layer, EDMBlock) else layer(x)
            kept.append(x)
        for name, layer in self.dec.items():
            x = torch.cat([x, kept.pop()], dim=1) if "block" in name else x
            x = layer(x, c)
        return self.out_conv(F.silu(self.out_norm(x)))


def unit(x, dims):
    """x over its root mean square along dims."""
    return x / (1e-4 + x.square().mean(dims, keepdim=True).sqrt())


class MPConv(nn.Module):
    def __init__(self, a, b, *kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(b, a, *kernel))

    def forward(self, x, gain=1):
        w = unit(self.weight, list(range(1, self.weight.ndim))) * gain / self.weight[0].numel() ** 0.5
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


def mp_silu(x):
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    return torch.lerp(a, b, t) / (t**2 + (1 - t) ** 2) ** 0.5


class EDM2Block(nn.Module):
    def __init__(self, a, b, cond, *, flavor, mode="keep", heads=0):
        super().__init__()
        self.out_channels, self.flavor, self.mode, self.heads = b, flavor, mode, heads
        self.emb_gain = nn.Parameter(torch.empty([]))
        self.conv_res0 = MPConv(b if flavor == "enc" else a, b, 3, 3)
        self.emb_linear, self.conv_res1 = MPConv(cond, b), MPConv(b, b, 3, 3)
        self.conv_skip = MPConv(a, b, 1, 1) if a != b else None
        self.attn_qkv, self.attn_proj = (MPConv(b, 3 * b, 1, 1), MPConv(b, b, 1, 1)) if heads else (None, None)

    def forward(self, x, c):
        if self.mode != "keep":
            x = F.avg_pool2d(x, 2) if self.mode == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
        if self.flavor == "enc":
            x = unit(x if self.conv_skip is None else self.conv_skip(x), 1)
        y = self.conv_res0(mp_silu(x)) * (self.emb_linear(c, self.emb_gain) + 1)[:, :, None, None]
        y = self.conv_res1(mp_silu(y))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, 0.3)
        if self.heads:
            qkv = self.attn_qkv(x).reshape(x.shape[0], self.heads, -1, 3, x.shape[2] * x.shape[3])
            q, k, v = unit(qkv, 2).unbind(3)
            weights = torch.softmax(torch.einsum("nhci,nhcj->nhij", q, k) / q.shape[2] ** 0.5, dim=-1)
            y = torch.einsum("nhij,nhcj->nhci", weights, v).reshape(x.shape)
            x = mp_sum(x, self.attn_proj(y), 0.3)
        return x.clip(-256, 256)


class EDM2UNet(nn.Module):
    """NVlabs/edm2's UNet."""

    def __init__(self, *, side, channels, classes, width, multipliers, blocks, attend_at, head_width=64):
        super().__init__()
        sizes = [width * m for m in multipliers]
        cond = max(sizes)
        block = lambda a, b, flavor, attend=False, **how: EDM2Block(
            a, b, cond, flavor=flavor, heads=b // head_width if attend else 0, **how
        )
        self.out_gain = nn.Parameter(torch.empty([]))
        self.emb_fourier = nn.Module()
        for name in ("freqs", "phases"):
            self.emb_fourier.register_buffer(name, torch.empty(sizes[0]))
        self.emb_noise = MPConv(sizes[0], cond)
        self.emb_label = MPConv(classes, cond) if classes else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, kept = channels + 1, []
        for level, size in enumerate(sizes):
            here, attend = f"{side >> level}x{side >> level}", side >> level in attend_at
            if level == 0:
                self.enc[f"{here}_conv"] = MPConv(c, size, 3, 3)
                c = size
            else:
                self.enc[f"{here}_down"] = block(c, c, "enc", mode="down")
            kept.append(c)
            for i in range(blocks):
                self.enc[f"{here}_block{i}"] = block(c, size, "enc", attend)
                c = size
                kept.append(c)
        for level, size in reversed(list(enumerate(sizes))):
            here, attend = f"{side >> level}x{side >> level}", side >> level in attend_at
            if level == len(sizes) - 1:
                self.dec[f"{here}_in0"], self.dec[f"{here}_in1"] = block(c, c, "dec", True), block(c, c, "dec")
            else:
                self.dec[f"{here}_up"] = block(c, c, "dec", mode="up")
            for i in range(blocks + 1):
                self.dec[f"{here}_block{i}"] = block(c + kept.pop(), size, "dec", attend)
                c = size
        self.out_conv = MPConv(c, channels, 3, 3)

    def forward(self, x, steps, labels=None):
        angles = torch.outer(steps, self.emb_fourier.freqs) + self.emb_fourier.phases
        c = self.emb_noise(2**0.5 * angles.cos())
        if self.emb_label is not None:
            c = mp_sum(c, self.emb_label(labels * labels.shape[1] ** 0.5), 0.5)
        c = mp_silu(c)
        x, kept = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
        for layer in self.enc.values():
            x = layer(x, c) if isinstance(layer, EDM2Block) else layer(x)
            kept.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                skip = kept.pop()
                whole = ((x.shape[1] + skip.shape[1]) / 0.5) ** 0.5 / 2
                x = torch.cat([x * whole / x.shape[1] ** 0.5, skip * whole / skip.shape[1] ** 0.5], dim=1)
            x = layer(x, c)
        return self.out_conv(x, self.out_gain)


class EDM2Precond(nn.Module):
    """NVlabs/edm2's Precond of images of standard deviation 1/2: what they are without noise, and the uncertainty."""

    def __init__(self, unet, waves):
        super().__init__()
        self.unet, self.logvar_fourier, self.logvar_linear = unet, nn.Module(), MPConv(waves, 1)
        for name in ("freqs", "phases"):
            self.logvar_fourier.register_buffer(name, torch.empty(waves))

    def forward(self, x, sigma, labels):
        whole, steps = (sigma**2 + 0.25).sqrt(), sigma.flatten().log() / 4
        denoised = 0.25 * x / whole**2 + 0.5 * sigma / whole * self.unet(x / whole, steps, labels)
        angles = torch.outer(steps, self.logvar_fourier.freqs) + self.logvar_fourier.phases
        return denoised, self.logvar_linear(2**0.5 * angles.cos()).reshape(-1, 1, 1, 1)
