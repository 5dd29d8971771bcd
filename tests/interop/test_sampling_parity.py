"""One call samples as the authors' samplers do: three steps against loops in torch, written from their definitions.

From the same first states and normals. Of tokens, whose draws cannot be the same, the law of a step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_torch import close, drawn

torch = pytest.importorskip("torch", reason="install ddjax[parity] to compare with torch")

import published_transformers as theirs  # noqa: E402
import published_unets as unets  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from ddjax import interop, solvers  # noqa: E402

pytestmark = pytest.mark.slow

SIDE, CLASSES, B = 8, 5, 2
LABELS = np.int32([1, 4])
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
DDPM = torch.cumprod(1 - BETAS, 0)
STABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def randomised(module, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.state_dict().items():
            if p.is_floating_point() and "resample_filter" not in name and "inv_freq" not in name:
                std = 0.3 if p.ndim < 2 else scale * p[0].numel() ** -0.5
                p.copy_(std * torch.randn(p.shape, generator=generator))
    return module.eval()


def loaded(module, path, *family, prefix="", **settings):
    tensors = {prefix + k: v.clone().contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, path / "m.safetensors")
    return interop.load(path / "m.safetensors", *family, **settings)


def labels():
    return torch.from_numpy(LABELS).long()


def null():
    return torch.full((B,), CLASSES)


@torch.no_grad()
def ancestral(model, x, normals, steps, channels, cumulative=DDPM, gradient=None):
    """DDPM on a few of its steps with learned variances (Nichol & Dhariwal 2021, eq. 15), as the authors respace it.

    gradient: (x, step), of a classifier: the mean moves by the variance times it, but for the last step.
    """
    for i, step in enumerate(steps):
        before = cumulative[steps[i + 1]] if i + 1 < len(steps) else torch.tensor(1.0, dtype=torch.float64)
        now = cumulative[step]
        beta = 1 - now / before
        out = model(x, torch.full((len(x),), step))
        noise, v = out[:, :channels], out[:, channels:]
        x0 = x / now.sqrt() - (1 / now - 1).sqrt() * noise
        mean = beta * before.sqrt() / (1 - now) * x0 + (1 - before) * (1 - beta).sqrt() / (1 - now) * x
        if i + 1 == len(steps):
            return mean.float()
        share = (v + 1) / 2
        variance = (share * beta.log() + (1 - share) * (beta * (1 - before) / (1 - now)).log()).exp()
        if gradient is not None:
            mean = mean + variance * gradient(x, torch.full((len(x),), step))
        x = (mean + variance.sqrt() * normals[i]).float()


def guided(model, scale, channels):
    """Of the first channels."""

    def both(x, t):
        with_, without = model(x, t, labels()), model(x, t, null())
        mixed = without + scale * (with_ - without)
        return torch.cat([mixed[:, :channels], with_[:, channels:]], 1)

    return both


def given(model, normals):
    return solvers.Ancestral(model.process, solvers.noise.Given(normals))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit(tmp_path, scale):
    module = randomised(theirs.DiT(SIDE, 2, 4, 16, 2, 2, CLASSES))
    model = loaded(module, tmp_path, "dit", heads=2)
    x, x_theirs = drawn(B, SIDE, SIDE, 4)
    z, z_theirs = drawn(2, B, SIDE, SIDE, 4, seed=1)
    out = model.sample(
        jax.random.key(0), B, LABELS, guidance=None if scale == 4.0 else scale, steps=3, init=x, solver=given(model, z)
    )
    close(out.x0, ancestral(guided(module, scale, 3), x_theirs, z_theirs, [999, 500, 0], 4), 1e-3)


def test_sit(tmp_path):
    module = randomised(theirs.DiT(SIDE, 2, 3, 16, 2, 2, CLASSES))
    model = loaded(module, tmp_path, "sit", heads=2)
    x, y = drawn(B, SIDE, SIDE, 3)
    out = model.sample(jax.random.key(0), B, LABELS, steps=3, init=x).x0
    velocity = lambda y, t: guided(module, 4.0, 3)(y, torch.full((B,), t))[:, :3]
    with torch.no_grad():
        for i in range(3):  # from noise, 0, to data, 1: Heun's method, its last step Euler's (Karras et al. 2022)
            first = velocity(y, i / 3)
            after = velocity(y + first / 3, (i + 1) / 3) if i < 2 else first
            y = y + (first + after) / 6
    close(out, y)


def scheduled(scheduler, model, y, **more):
    """Diffusers' own steps, DDIM to the data: 1000 // 3 of the chain's at once."""
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for step in (999, 666, 333, 0):
            noise = model(y, torch.full((B,), step), **more).sample[:, : y.shape[1]]
            y = scheduler.step(noise, step, y).prev_sample
    return y


def ddim():
    diffusers = pytest.importorskip("diffusers", reason="install ddjax[parity] to compare with diffusers")
    return diffusers, diffusers.DDIMScheduler(clip_sample=False)


def test_diffusers_dit(tmp_path):
    diffusers, scheduler = ddim()
    module = randomised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=SIDE,
            patch_size=2, num_embeds_ada_norm=CLASSES,
        )
    )  # fmt: skip
    first = module.transformer_blocks[0].norm1.emb.state_dict()
    for block in module.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    module.save_pretrained(tmp_path)
    model = interop.load(tmp_path)
    x, y = drawn(B, SIDE, SIDE, 4)
    out = model.sample(
        jax.random.key(0), B, LABELS, guidance=1.0, steps=4, init=x, solver=solvers.DDIM(model.process)
    ).x0
    close(out, scheduled(scheduler, module, y, class_labels=labels()))


def test_diffusers_unet(tmp_path):
    diffusers, scheduler = ddim()
    module = randomised(
        diffusers.UNet2DModel(
            sample_size=SIDE, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip
    module.save_pretrained(tmp_path)
    model = interop.load(tmp_path)
    x, y = drawn(B, SIDE, SIDE, 3)
    out = model.sample(jax.random.key(0), B, steps=4, init=x, solver=solvers.DDIM(model.process)).x0
    close(out, scheduled(scheduler, module, y))


def test_uvit_of_latents(tmp_path):
    module = randomised(theirs.UViT(SIDE, 2, 4, 16, 3, 2, CLASSES + 1, False))
    model = loaded(module, tmp_path, "uvit", heads=2)
    x, y = drawn(B, SIDE, SIDE, 4)
    out = model.sample(jax.random.key(0), B, LABELS, steps=3, init=x, solver=solvers.DDIM(model.process)).x0
    with torch.no_grad():
        for i, n in enumerate((999, 666, 333, 0)):  # the last to the data; their steps are numbered from 1
            with_, without = (module(y, torch.full((B,), n + 1), which) for which in (labels(), null()))
            noise = with_ + 0.4 * (with_ - without)
            x0 = (y - (1 - STABLE[n]).sqrt() * noise) / STABLE[n].sqrt()
            after = STABLE[n - 333] if i < 3 else torch.tensor(1.0, dtype=torch.float64)
            y = (after.sqrt() * x0 + (1 - after).sqrt() * noise).float()
    close(out, y)


def adm(path):
    sizes = {"channels": 3, "width": 32, "multipliers": (1, 2), "blocks": 1, "attend_at": (2,), "head_width": 32}
    path.mkdir()
    module = randomised(unets.ADM(out=6, classes=CLASSES, **sizes))
    return sizes, module, loaded(module, path, "adm", size=SIDE, head_width=32)


def test_adm_guided_by_its_classifier(tmp_path):
    sizes, module, model = adm(tmp_path / "model")
    classifier = randomised(unets.ADMClassifier(side=SIDE, classes=CLASSES, **sizes), 2.0)
    judge = loaded(classifier, tmp_path, size=SIDE, head_width=32)
    assert (judge.family, judge.report.whole) == ("adm_classifier", True)
    x, y = drawn(B, SIDE, SIDE, 3)
    z, z_theirs = drawn(2, B, SIDE, SIDE, 3, seed=1)
    t = np.float32([0.3, 0.9])
    wanted = F.log_softmax(classifier(y, torch.from_numpy(999 * t)), -1)[range(B), labels()]
    np.testing.assert_allclose(judge.log_prob(x, t, jnp.asarray(LABELS)), wanted.detach(), rtol=2e-5)

    @torch.enable_grad()
    def gradient(x, steps):
        x = x.detach().requires_grad_()
        chosen = F.log_softmax(classifier(x, steps), -1)[range(B), labels()]
        return 3.0 * torch.autograd.grad(chosen.sum(), x)[0]

    steps, own = [999, 500, 0], lambda x, t: module(x, t, labels())
    plain = model.sample(jax.random.key(0), B, LABELS, steps=3, init=x, solver=given(model, z)).x0
    close(plain, ancestral(own, y, z_theirs, steps, 3), 1e-3)
    from ddjax.guidance import GuidedMean

    about = {"steps": 3, "init": x, "classifier": judge, "guidance": 3.0}
    solver = GuidedMean(model.process, solvers.noise.Given(z))
    led = model.sample(jax.random.key(0), B, LABELS, solver=solver, **about).x0
    # Their last step moves the mean too, by no more than its variance, 1e-4, times the gradient; ours is x_0.
    wanted = ancestral(own, y, z_theirs, steps, 3, gradient=gradient)
    assert np.abs(np.asarray(led) - np.asarray(plain)).max() > 1e-2
    moved = ancestral_with_last(own, y, z_theirs, steps, gradient)
    close(led, moved, 1e-3)
    assert torch.isfinite(wanted).all()
    assert jnp.isfinite(model.sample(jax.random.key(0), B, LABELS, **about).x0).all()  # its own solver and noise

    # With DDIM: the noise is moved by sigma times the gradient (their algorithm 2).
    led = model.sample(jax.random.key(0), B, LABELS, solver=solvers.DDIM(model.process), **about).x0
    with torch.no_grad():
        for i, n in enumerate(steps):
            now = DDPM[n]
            noise = own(y, torch.full((B,), n))[:, :3] - (1 - now).sqrt() * gradient(y, torch.full((B,), n))
            x0 = (y - (1 - now).sqrt() * noise) / now.sqrt()
            after = DDPM[steps[i + 1]] if i < 2 else torch.tensor(1.0, dtype=torch.float64)
            y = (after.sqrt() * x0 + (1 - after).sqrt() * noise).float()
    close(led, y, 1e-3)
    with pytest.raises(ValueError, match="is no classifier"):
        model.log_prob  # noqa: B018
    with pytest.raises(ValueError, match="no denoiser to sample from"):
        judge.sample(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="there are none"):
        model.sample(jax.random.key(0), 1, classifier=judge)


def ancestral_with_last(model, y, normals, steps, gradient):
    """As `ancestral`; the last step is to x_0 of the score with the gradient added."""
    now = DDPM[0]
    kept = []

    def spy(x, t):
        kept.append(x)
        return model(x, t)

    x0 = ancestral(spy, y, normals, steps, 3, gradient=gradient)
    return (x0 + (1 - now) / now.sqrt() * gradient(kept[-1], torch.zeros(B))).float()


EDM = {
    "edm_song": lambda: unets.SongUNet(
        side=16, channels=3, out=3, width=32, multipliers=(1, 2), blocks=1, attend_at=(8,), classes=CLASSES
    ),
    "edm_adm": lambda: unets.DhariwalUNet(
        side=16, channels=3, out=3, width=32, multipliers=(1, 2), blocks=1, attend_at=(8,), head_width=32,
        classes=CLASSES,
    ),
    "edm2": lambda: unets.EDM2UNet(
        side=16, channels=3, classes=CLASSES, width=32, multipliers=(1, 2), blocks=1, attend_at=(8,), head_width=32
    ),
}  # fmt: skip


def edm_denoiser(module, classes=CLASSES):
    one_hot = F.one_hot(labels(), CLASSES).float() if classes else None

    def denoise(x, sigma):  # Karras et al. 2022, table 1
        skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25) ** 0.5
        inside = (x / (sigma**2 + 0.25) ** 0.5).float()
        return skip * x + out * module(inside, (sigma.log() / 4).float().expand(B), one_hot)

    return denoise


@torch.no_grad()
def edm_heun(denoise, y, steps=3, rho=7.0):
    """Karras et al. 2022, algorithm 1."""
    ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    sigmas = (80.0 ** (1 / rho) + ramp * (0.002 ** (1 / rho) - 80.0 ** (1 / rho))) ** rho
    sigmas, y = torch.cat([sigmas, torch.zeros(1)]), y.double() * 80.0
    for i in range(steps):
        now, after = sigmas[i], sigmas[i + 1]
        d = (y - denoise(y, now)) / now
        x = y + (after - now) * d
        if i < steps - 1:
            x = y + (after - now) * (d + (x - denoise(x, after)) / after) / 2
        y = x
    return y


@pytest.mark.parametrize("family", EDM)
def test_edm(tmp_path, family):
    module = randomised(EDM[family](), 1.0)
    model = loaded(module, tmp_path, family, **({} if family == "edm_song" else {"head_width": 32}))
    x, y = drawn(B, 16, 16, 3)
    out = model.sample(jax.random.key(0), B, LABELS, steps=3, init=80.0 * x).x0
    close(out, edm_heun(edm_denoiser(module), y), 1e-3)


@pytest.mark.parametrize("classes", [CLASSES, 0])
def test_edm2_guided_by_a_weaker_network(tmp_path, classes):
    module = randomised(EDM["edm2"]())
    weaker = randomised(
        unets.EDM2UNet(
            side=16, channels=3, classes=classes, width=16, multipliers=(1, 2), blocks=1, attend_at=(), head_width=16
        )
    )
    (tmp_path / "weaker").mkdir()
    model = loaded(module, tmp_path, "edm2", head_width=32)
    other = loaded(weaker, tmp_path / "weaker", "edm2", head_width=16)
    x, y = drawn(B, 16, 16, 3)
    out = model.sample(jax.random.key(0), B, LABELS, steps=3, init=80.0 * x, weaker=other, guidance=1.7).x0
    strong, weak = edm_denoiser(module), edm_denoiser(weaker, classes)
    close(out, edm_heun(lambda x, s: torch.lerp(weak(x, s), strong(x, s), 1.7), y), 1e-3)
    with pytest.raises(ValueError, match="needs its scale"):
        model.sample(jax.random.key(0), B, LABELS, weaker=other)
    with pytest.raises(ValueError, match="not both"):
        model.sample(jax.random.key(0), B, LABELS, weaker=other, classifier=other)


# -- tokens: the law of a step -------------------------------------------------------------------------------------

K, LENGTH = 7, 5
FROM, TO = 0.7, 0.4


def law(model, x, cond=None):
    """p(x_s | x_t) of the model's own sampler, `(batch, length, states)`."""
    prediction = model.denoise(jnp.asarray(x), jnp.full(B, FROM), cond)
    step = model.model.solver(model.process).law(prediction, jnp.asarray(x), TO, FROM)
    states = range(model.process.num_states)
    return np.stack([np.exp(step.log_prob(jnp.full(x.shape, v, jnp.int32))) for v in states], -1)


def tokens():
    x = np.random.default_rng(0).integers(K, size=(B, LENGTH)).astype(np.int32)
    x[:, 0] = K - 1
    return x, torch.from_numpy(x).long()


def loglinear(t):
    return -np.log1p(-(1 - 1e-3) * t)


def same(found, wanted):
    np.testing.assert_allclose(found, wanted.detach().double().numpy(), atol=2e-5)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("family", ["mdlm", "radd"])
def test_masked_texts(tmp_path, family):
    """MDLM, eq. 6; RADD's conditional law, eq. 3.2: a mask opens with (alpha_s - alpha_t) / (1 - alpha_t)."""
    module = randomised(theirs.DDiT(K, 16, 2, 2, 8 if family == "mdlm" else 0))
    model = loaded(module, tmp_path, family, length=LENGTH, **({"heads": 2} if family == "mdlm" else {}))
    x, y = tokens()
    logits = module(y, torch.zeros(B)) if family == "mdlm" else module(y)
    clean = torch.softmax(logits[..., :-1], -1)
    opens = (np.exp(-loglinear(TO)) - np.exp(-loglinear(FROM))) / (1 - np.exp(-loglinear(FROM)))
    wanted = torch.cat([opens * clean, torch.full((B, LENGTH, 1), 1 - opens)], -1)
    shown = F.one_hot(y, K).float()
    same(law(model, x), torch.where((y == K - 1)[..., None], wanted, shown))


@pytest.mark.parametrize(("family", "classes"), [("udlm", CLASSES), ("duo", 0)])
def test_uniform_texts(tmp_path, family, classes):
    """UDLM, eq. 13 (Schiff et al. 2024), which DUO samples with."""
    module = randomised(theirs.DDiT(K, 16, 2, 2, 8, classes))
    model = loaded(module, tmp_path, family, length=LENGTH, heads=2)
    x, y = tokens()
    sigma = torch.full((B,), loglinear(FROM)).float()
    clean = torch.softmax(module(y, sigma, labels() if classes else None), -1).double()
    a_t, a_s = np.exp(-loglinear(FROM)), np.exp(-loglinear(TO))
    a, shown = a_t / a_s, F.one_hot(y, K).double()
    top = K * a_t * shown * clean + (a - a_t) * shown + (a_s - a_t) * clean + (1 - a) * (1 - a_s) / K
    wanted = top / (K * a_t * (shown * clean).sum(-1, keepdim=True) + 1 - a_t)
    same(law(model, x, jnp.asarray(LABELS) if classes else None), wanted)


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_sedd(tmp_path, graph):
    """Its analytic step (Lou et al. 2024, theorem 4.2): exp(-dQ) s times the transition, by matrix exponentials."""
    module = randomised(theirs.DDiT(K, 16, 2, 2, 8), 0.3)
    absorbs = graph == "absorb"
    settings = {"graph": graph, "heads": 2, "length": LENGTH, "scale_by_sigma": absorbs}
    model = loaded(module, tmp_path, "sedd", **settings)
    x, y = tokens()
    sigma, d = loglinear(FROM), loglinear(FROM) - loglinear(TO)
    out = module(y, torch.full((B,), sigma).float())
    told = torch.full((B,), sigma).float()
    log_scores = theirs.sedd_scores(out, y, told) if absorbs else out.scatter(-1, y[..., None], 0.0)
    scores = log_scores.exp().double()
    # Columns are where a symbol comes from.
    ends = torch.zeros(K, K) if absorbs else torch.full((K, K), 1 / K)
    ends = (ends + torch.eye(K)[K - 1][:, None]) if absorbs else ends
    rate = ends.double() - torch.eye(K, dtype=torch.float64)
    back, there = torch.matrix_exp(-d * rate), torch.matrix_exp(d * rate)
    staggered = torch.einsum("ab,nlb->nla", back, scores)
    probabilities = staggered * there[y]  # to what is shown, from each
    wanted = probabilities.clamp(min=0)
    same(law(model, x), wanted / wanted.sum(-1, keepdim=True))
