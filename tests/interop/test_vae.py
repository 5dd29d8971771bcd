"""Diffusers' AutoencoderKL: the same latents, images and losses from the same tensors, all of them random."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="install ddjax[parity] to compare with torch")
diffusers = pytest.importorskip("diffusers", reason="install ddjax[parity] to compare with diffusers")

from safetensors import safe_open  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from ddjax import autoencoders, interop, random  # noqa: E402
from ddjax.autoencoders import perceptual  # noqa: E402
from ddjax.denoisers import functional_init  # noqa: E402

pytestmark = pytest.mark.slow

SIDE = 32
SIZES = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 2, "layers_per_block": 1, "norm_num_groups": 4,
    "block_out_channels": (8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "sample_size": SIDE, "scaling_factor": 0.31,
}  # fmt: skip


def randomised(module, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            std = 0.3 if p.ndim < 2 else scale * p[0].numel() ** -0.5
            p.copy_(std * torch.randn(p.shape, generator=generator) + (p.ndim < 2 and name.endswith("weight")))
    return module


def close(ours, wanted, rtol=2e-5):
    wanted = np.asarray(wanted.detach() if hasattr(wanted, "detach") else wanted)
    np.testing.assert_allclose(np.asarray(ours), wanted, rtol=0, atol=rtol * np.abs(wanted).max())


def last(y):
    return y.permute(0, 2, 3, 1)


def images(count=2):
    x = np.random.default_rng(0).uniform(-1, 1, size=(count, SIDE, SIDE, 3)).astype(np.float32)
    return x, torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("plain", [False, True])
def test_the_same_latents_and_images_and_tensors(tmp_path, plain):
    more = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False} if plain else {}
    module = randomised(diffusers.AutoencoderKL(**SIZES, **more)).eval()
    module.save_pretrained(tmp_path)
    model = interop.load(tmp_path)
    assert (model.family, model.settings["scale"], model.report.whole) == ("diffusers_vae", 0.31, True)
    autoencoder, params = model.autoencoder
    assert autoencoder.latent_shape == (SIDE // 4, SIDE // 4, 2)
    x, theirs = images()
    with torch.no_grad():
        law = module.encode(theirs).latent_dist
        z = law.mean + 0.3
        wanted = module.decode(z).sample
    posterior = autoencoder.posterior(params, x)
    close(posterior.mean, last(law.mean))
    close(posterior.log_variance, last(law.logvar))
    close(posterior.kl(), law.kl())
    close(autoencoder.decode(params, jnp.asarray(last(z).numpy())), last(wanted))
    close(model.apply(params, x, None), autoencoder.decode(params, posterior.mean))

    model.export(tmp_path / "again.safetensors")
    with safe_open(tmp_path / "again.safetensors", framework="numpy") as again:
        state = module.state_dict()
        assert set(again.keys()) == set(state)
        for name, value in state.items():
            np.testing.assert_array_equal(again.get_tensor(name), value.numpy(), err_msg=name)
    model.save(tmp_path / "ours.safetensors")
    back = interop.load(tmp_path / "ours.safetensors")
    assert back.autoencoder[0] == autoencoder
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    autoencoders.save(tmp_path / "kl.safetensors", autoencoder, params)
    again, same = autoencoders.load(tmp_path / "kl.safetensors")
    assert again == autoencoder
    jax.tree.map(np.testing.assert_array_equal, same, params)
    with pytest.raises(ValueError, match="no denoiser to sample from"):
        model.sample(jax.random.key(0), 1)


def test_what_is_none_of_ours_is_refused(tmp_path):
    module = diffusers.AutoencoderKL(**SIZES)
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "shift_factor": 0.1}))
    with pytest.raises(ValueError, match=r"shift_factor=0\.1"):
        interop.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_num_groups": 3}))
    with pytest.raises(ValueError, match="do not divide"):
        interop.load(tmp_path)
    del config["sample_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="size="):
        interop.load(tmp_path)


# -- the losses, by their published definitions --------------------------------------------------------------------


class LPIPS(nn.Module):
    """With the names of taming-transformers' state dict, of any widths."""

    def __init__(self, widths=(4, 5, 6, 7, 8)):
        super().__init__()
        self.net, before = nn.Module(), 3
        for i, (part, width) in enumerate(zip(perceptual.PARTS, widths, strict=True)):
            layers = nn.Module()
            for n in part:
                layers.add_module(str(n), nn.Conv2d(before, width, 3, padding=1))
                before = width
            self.net.add_module(f"slice{i + 1}", layers)
            lin = nn.Module()
            lin.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{i}", lin)

    def features(self, x):
        h, found = (
            (x - torch.tensor(perceptual.SHIFT)[:, None, None]) / torch.tensor(perceptual.SCALE)[:, None, None],
            [],
        )
        for i in range(5):
            h = F.max_pool2d(h, 2) if i else h
            for layer in getattr(self.net, f"slice{i + 1}").children():
                h = F.relu(layer(h))
            found.append(h / (h.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, x, y):
        pairs = zip(self.features(x), self.features(y), range(5), strict=True)
        return sum(
            F.conv2d((a - b) ** 2, getattr(self, f"lin{i}").model[1].weight).mean((2, 3), keepdim=True)
            for a, b, i in pairs
        )


def discriminator(width, layers):
    """PatchGAN in training, as pix2pix has it."""
    widths = [min(2**n, 8) * width for n in range(layers + 1)]
    made = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for n in range(1, layers + 1):
        stride = 2 if n < layers else 1
        made += [nn.Conv2d(widths[n - 1], widths[n], 4, stride, 1, bias=False), nn.BatchNorm2d(widths[n])]
        made += [nn.LeakyReLU(0.2)]
    return nn.Sequential(*made, nn.Conv2d(widths[-1], 1, 4, 1, 1))


def judges(module):
    """Its parameters as ours."""
    convs = [m for m in module if isinstance(m, nn.Conv2d)]
    norms = [m for m in module if isinstance(m, nn.BatchNorm2d)]
    kernel = lambda m: jnp.asarray(m.weight.detach().numpy().transpose(2, 3, 1, 0))
    bias = lambda m: {} if m.bias is None else {"bias": jnp.asarray(m.bias.detach().numpy())}
    return {
        "convs": {i: {"kernel": kernel(m), **bias(m)} for i, m in enumerate(convs)},
        "norms": {i: {"scale": jnp.asarray(m.weight.detach().numpy()), **bias(m)} for i, m in enumerate(norms)},
    }


def shaped_as(tree, like):
    """A tree with the names of another, which may be texts where its own are numbers."""
    if not isinstance(like, dict):
        return tree
    return {key: shaped_as(tree[key if key in tree else int(key)], value) for key, value in like.items()}


def test_lpips():
    module = randomised(LPIPS(), 2.0)
    weights = {name: value.numpy() for name, value in module.state_dict().items()}
    distance = perceptual.of(weights)
    (x, a), (y, b) = images(), (v[::-1] if isinstance(v, np.ndarray) else v.flip(0) for v in images())
    close(distance(x, np.ascontiguousarray(y)), module(a, b).flatten())
    np.testing.assert_array_equal(distance(x, x), 0)
    assert np.isfinite(jax.jit(jax.grad(lambda v: distance(v, y).sum()))(jnp.zeros_like(x))).all()
    grey = distance(x[..., :1], y[..., :1])
    close(grey, module(a[:, :1].expand_as(a), b[:, :1].expand_as(b)).flatten())
    with pytest.raises(ValueError, match=r"missing net\.slice3\.12\.bias"):
        perceptual.of({k: v for k, v in weights.items() if k != "net.slice3.12.bias"})
    with pytest.raises(ValueError, match=r"lin2\.model\.1\.weight has"):
        perceptual.of(weights | {"lin2.model.1.weight": np.zeros((1, 3, 1, 1), np.float32)})
    with pytest.raises(ValueError, match="too small"):
        distance(x[:, :8], x[:, :8])


@pytest.mark.parametrize("adversarial", [0.0, 0.7])
def test_the_loss_and_its_gradients(tmp_path, adversarial):
    module = randomised(diffusers.AutoencoderKL(**SIZES))
    module.save_pretrained(tmp_path)
    autoencoder, own = interop.load(tmp_path).autoencoder
    lpips, judge = randomised(LPIPS(), 2.0), randomised(discriminator(6, 2))
    objective = autoencoders.KLObjective(
        autoencoder, perceptual.of({k: v.numpy() for k, v in lpips.state_dict().items()}), perceptual=0.4, kl=0.01,
        adversarial=adversarial, width=6, layers=2,
    )  # fmt: skip
    key = jax.random.key(3)
    params = objective.init(key)
    params |= {"autoencoder": jax.tree.map(jnp.asarray, own), "log_variance": jnp.float32(0.3)}
    params |= {"discriminator": shaped_as(judges(judge), params["discriminator"])}
    x, theirs = images(3)
    call = jax.jit(jax.value_and_grad(lambda p: objective(key, None, p, x), has_aux=True))
    (loss, metrics), gradients = call(params)

    posterior = autoencoder.posterior(own, x)
    z = posterior.sample(random.example_keys(key, jnp.arange(3)))
    noise = np.asarray((z - posterior.mean) / jnp.exp(0.5 * posterior.log_variance))
    s = torch.tensor(0.3, requires_grad=True)
    law = module.encode(theirs).latent_dist
    y = module.decode(law.mean + law.std * torch.from_numpy(noise).permute(0, 3, 1, 2)).sample
    error = (theirs - y).abs() + 0.4 * lpips(theirs, y)
    negative = (error / s.exp() + s).sum() / 3
    wanted = negative + 0.01 * law.kl().sum() / 3
    weight = torch.tensor(0.0)
    if adversarial:
        g = -judge(y).mean()
        kernel = module.decoder.conv_out.weight
        lengths = [torch.autograd.grad(v, kernel, retain_graph=True)[0].norm() for v in (negative, g)]
        weight = adversarial * (lengths[0] / (lengths[1] + 1e-4)).clamp(0.0, 1e4).detach()
        close(metrics["adversarial_weight"], weight, 2e-4)
        wanted = wanted + weight * g
    of_both = [s, *module.parameters()]
    names = ["s", *(name for name, _ in module.named_parameters())]
    found = dict(zip(names, torch.autograd.grad(wanted, of_both, retain_graph=True), strict=True))
    d = torch.tensor(0.0)
    if adversarial:
        d = 0.5 * (F.relu(1 - judge(theirs)).mean() + F.relu(1 + judge(y.detach())).mean())
        first = torch.autograd.grad(d, judge[0].weight)[0]
        close(gradients["discriminator"]["convs"]["0" if "0" in gradients["discriminator"]["convs"] else 0]["kernel"],
              first.permute(2, 3, 1, 0), 1e-3)  # fmt: skip
    else:
        assert all((v == 0).all() for v in jax.tree.leaves(gradients["discriminator"]))
    close(loss, wanted + d, 1e-4)
    close(gradients["log_variance"], found["s"], 1e-4)
    theirs = interop.mapping.save(interop.load(tmp_path).model.entries, gradients["autoencoder"])
    largest = max(float(found[name].abs().max()) for name in theirs)
    for name, value in theirs.items():
        scale = max(float(found[name].abs().max()), 1e-4 * largest)  # a bias of keys has no part: only rounding is left
        np.testing.assert_allclose(value, found[name].numpy(), rtol=0, atol=1e-3 * scale, err_msg=name)


def test_patchgan_at_other_depths():
    for layers in (1, 3):
        judge = randomised(discriminator(4, layers))
        init, apply = functional_init(
            lambda rngs, layers=layers: autoencoders.discriminator.PatchGAN(3, width=4, layers=layers, rngs=rngs)
        )
        x, theirs = images(3)
        out = apply(shaped_as(judges(judge), init(jax.random.key(0))), x, None)
        close(out, last(judge(theirs)))
