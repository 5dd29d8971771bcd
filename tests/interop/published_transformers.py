"""Published transformers in torch, written from their definitions with their parameters' names: for tests only."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def sinusoid(t, features, last=0):
    half = features // 2
    angles = t[:, None].double() * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - last))
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def attend(qkv, heads, turned=None):
    """qkv: (batch, sites, 3 width), (part, head, feature). turned: what is done to queries and keys."""
    b, n, w = qkv.shape
    q, k, v = qkv.view(b, n, 3, heads, w // (3 * heads)).permute(2, 0, 3, 1, 4)
    if turned is not None:
        q, k = turned(q), turned(k)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (scores @ v).transpose(1, 2).reshape(b, n, w // 3)


def rotate(x, base=10000.0):
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Conv(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TwoLayers(nn.Module):
    def __init__(self, width, hidden, approximate):
        super().__init__()
        self.fc1, self.fc2, self.approximate = nn.Linear(width, hidden), nn.Linear(hidden, width), approximate

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class SelfAttention(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)

    def forward(self, x):
        return self.proj(attend(self.qkv(x), self.heads))


# -- DiT (and SiT) -------------------------------------------------------------------------------------------------


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(sinusoid(t, 256))


class LabelEmbedder(nn.Module):
    """classes and the null label."""

    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class DiTBlock(nn.Module):
    def __init__(self, width, heads, ratio):
        super().__init__()
        self.attn = SelfAttention(width, heads, True)
        self.mlp = TwoLayers(width, int(ratio * width), "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        norm = lambda v: F.layer_norm(v, v.shape[-1:], eps=1e-6)
        sa, ca, ga, sm, cm, gm = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + ga * self.attn(norm(x) * (1 + ca) + sa)
        return x + gm * self.mlp(norm(x) * (1 + cm) + sm)


class DiTFinal(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class DiT(nn.Module):
    """Images (batch, channels, size, size), t the number of the step, y labels."""

    def __init__(self, size, patch, channels, width, depth, heads, classes, learn_sigma=True, ratio=4.0):
        super().__init__()
        self.out, self.patch = channels * (1 + learn_sigma), patch
        self.x_embedder, self.t_embedder = Conv(channels, width, patch), TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads, ratio) for _ in range(depth))
        self.final_layer = DiTFinal(width, patch**2 * self.out)

    def forward(self, x, t, y):
        rows, columns = (side // self.patch for side in x.shape[2:])
        h, c = self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        y = self.final_layer(h, c).view(len(x), rows, columns, self.patch, self.patch, self.out)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out, *x.shape[2:])


# -- DDiT: SEDD, MDLM, UDLM, DUO; RADD -----------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self, width, shift=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if shift else None

    def forward(self, x):
        x = F.layer_norm(x, x.shape[-1:]) * self.weight
        return x if self.bias is None else x + self.bias


class Rotary(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000.0 ** (torch.arange(0, head, 2).float() / head))


class VocabEmbed(nn.Module):
    def __init__(self, vocabulary, width):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(vocabulary, width))

    def forward(self, x):
        return self.embedding[x]


class DDiTBlock(nn.Module):
    def __init__(self, width, heads, cond):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Scaled(width, not cond), Scaled(width, not cond)
        self.attn_qkv, self.attn_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(cond, 6 * width) if cond else None

    def forward(self, x, c):
        told = (0, 0, 1, 0, 0, 1) if c is None else self.adaLN_modulation(c)[:, None].chunk(6, -1)
        sa, ca, ga, sm, cm, gm = told
        x = x + ga * self.attn_out(attend(self.attn_qkv(self.norm1(x) * (1 + ca) + sa), self.heads, rotate))
        return x + gm * self.mlp(self.norm2(x) * (1 + cm) + sm)


class DDiTFinal(nn.Module):
    def __init__(self, width, vocabulary, cond):
        super().__init__()
        self.norm_final, self.linear = Scaled(width, not cond), nn.Linear(width, vocabulary)
        self.adaLN_modulation = nn.Linear(cond, 2 * width) if cond else None

    def forward(self, x, c):
        shift, scale = (0, 0) if c is None else self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DDiT(nn.Module):
    """Tokens (batch, length), sigma the total noise of each. cond = 0: RADD, told no noise. classes: UDLM's."""

    def __init__(self, vocabulary, width, depth, heads, cond, classes=0):
        super().__init__()
        self.cond_map = LabelEmbedder(classes, cond) if classes else None
        self.vocab_embed, self.rotary_emb = VocabEmbed(vocabulary, width), Rotary(width // heads)
        self.sigma_map = TimestepEmbedder(cond) if cond else None
        self.blocks = nn.ModuleList(DDiTBlock(width, heads, cond) for _ in range(depth))
        self.output_layer = DDiTFinal(width, vocabulary, cond)

    def forward(self, x, sigma=None, labels=None):
        h, c = self.vocab_embed(x), None if self.sigma_map is None else F.silu(self.sigma_map(sigma))
        c = c if labels is None else c + F.silu(self.cond_map(labels))
        for block in self.blocks:
            h = block(h, c)
        return self.output_layer(h, c)


def sedd_scores(out, x, sigma):
    """What SEDD makes of the network's output under masks, `scale_by_sigma`: log scores, 0 at the shown state."""
    out = out - torch.expm1(sigma).log()[:, None, None] - math.log(out.shape[-1] - 1)
    return out.scatter(-1, x[..., None], 0.0)


# -- LLaDA ---------------------------------------------------------------------------------------------------------


class RMS(nn.Module):
    def __init__(self, width, epsilon=1e-5):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt()


class LLaDABlock(nn.Module):
    def __init__(self, width, heads, hidden, theta, groups):
        super().__init__()
        self.heads, self.theta, self.each = heads, theta, heads // groups
        self.attn_norm, self.ff_norm = RMS(width), RMS(width)
        layer = lambda a, b: nn.Linear(a, b, bias=False)
        self.q_proj = layer(width, width)
        self.k_proj, self.v_proj = (layer(width, width // self.each) for _ in range(2))
        self.attn_out = layer(width, width)
        self.ff_proj, self.up_proj, self.ff_out = layer(width, hidden), layer(width, hidden), layer(hidden, width)

    def forward(self, x):
        y = self.attn_norm(x)
        head = y.shape[-1] // self.heads
        shared = lambda v: v.unflatten(-1, (-1, head)).repeat_interleave(self.each, dim=-2).flatten(-2)
        qkv = torch.cat([self.q_proj(y), shared(self.k_proj(y)), shared(self.v_proj(y))], -1)
        x = x + self.attn_out(attend(qkv, self.heads, lambda v: rotate(v, self.theta)))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))


class LLaDA(nn.Module):
    def __init__(self, vocabulary, width, depth, heads, hidden, theta, groups=None):
        super().__init__()
        blocks = nn.ModuleList(LLaDABlock(width, heads, hidden, theta, groups or heads) for _ in range(depth))
        parts = {"wte": nn.Embedding(vocabulary, width), "blocks": blocks, "ln_f": RMS(width)}
        parts["ff_out"] = nn.Linear(width, vocabulary, bias=False)
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})

    def forward(self, x):
        parts = self.model["transformer"]
        h = parts["wte"](x)
        for block in parts["blocks"]:
            h = block(h)
        return parts["ff_out"](parts["ln_f"](h))


# -- U-ViT ---------------------------------------------------------------------------------------------------------


class UViTBlock(nn.Module):
    def __init__(self, width, heads, skip):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = SelfAttention(width, heads, False), TwoLayers(width, 4 * width, "none")
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x, skip=None):
        x = x if skip is None else self.skip_linear(torch.cat([x, skip], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """classes counts the null label, 0: none. t is the number of the step."""

    def __init__(self, size, patch, channels, width, depth, heads, classes, conv):
        super().__init__()
        self.patch, self.width = patch, width
        self.patch_embed = Conv(channels, width, patch)
        self.label_emb = nn.Embedding(classes, width) if classes else None
        self.extras = 2 if classes else 1
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + (size // patch) ** 2, width))
        self.in_blocks = nn.ModuleList(UViTBlock(width, heads, False) for _ in range(depth // 2))
        self.mid_block = UViTBlock(width, heads, False)
        self.out_blocks = nn.ModuleList(UViTBlock(width, heads, True) for _ in range(depth // 2))
        self.norm, self.decoder_pred = nn.LayerNorm(width), nn.Linear(width, patch**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x, t, y=None):
        (b, channels, height, wide), p = x.shape, self.patch
        tokens = [sinusoid(t, self.width)[:, None], self.patch_embed(x)]
        tokens = tokens if y is None else [self.label_emb(y)[:, None], *tokens]
        h, skips = torch.cat(tokens, 1) + self.pos_embed, []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        h = self.decoder_pred(self.norm(h))[:, self.extras :]
        h = h.view(b, height // p, wide // p, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return self.final_layer(h.reshape(b, channels, height, wide))
