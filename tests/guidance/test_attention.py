"""Guidance by the attention of ddjax's own networks, against its definition, with attention computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

import ddjax
from ddjax import grids, guidance, solvers, taps
from ddjax.denoisers import EDM2, DiT, UNet, UNetDesign, functional_init
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.schedules import VPCosine

IMAGE = {"shape": (4, 4, 2), "width": 8}
LEVELS = {"multipliers": (1, 2), "blocks": 1, "attend_at": (2,)}
NETWORKS = {
    "unet": (lambda rngs: UNet(**IMAGE, **LEVELS, heads=2, design=UNetDesign(groups=4), rngs=rngs), ("middle/0",)),
    "edm2": (lambda rngs: EDM2(**IMAGE, **LEVELS, head_width=8, rngs=rngs), ("encoder/2", "middle/0")),
    "dit": (lambda rngs: DiT(**IMAGE, patch=2, depth=2, heads=2, rngs=rngs), ("block/1",)),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) if name != "dit" else name for name in NETWORKS]
XT = np.random.default_rng(1).normal(size=(2, 4, 4, 2)).astype(np.float32)
T = np.float32([0.2, 0.7])
PROCESS = Gaussian(VPCosine())


@functools.cache
def made(name):
    """A network of random weights, zero at no layer."""
    init, apply = functional_init(NETWORKS[name][0])
    rng, shapes = np.random.default_rng(7), jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
    return ddjax.bind(apply, params, PROCESS, "noise"), params


def projected(name, params, block, v):
    """What a block's attention adds where each site sees itself alone: its own values, through the last layer."""
    part, number = block.split("/")
    v = np.asarray(v, float).reshape(*v.shape[:2], -1)
    own = (params["stack"]["blocks"] if name == "dit" else params[part])[number]["attention"]["out"]
    if name != "edm2":
        return v @ own["kernel"] + own["bias"]
    kernel = np.asarray(own["kernel"], float)[0, 0]
    kernel = kernel / (1e-4 + np.sqrt((kernel**2).mean(0)))  # of unit magnitude for each output
    return v @ (kernel / np.sqrt(len(kernel)))


@pytest.mark.parametrize("name", SLOW)
def test_it_is_its_definition(name):
    denoise, params = made(name)
    blocks, scale = NETWORKS[name][1], 3.5
    strong = denoise(XT, T).value

    # Block after block: the values where those before are disturbed, and the branch that they make by themselves.
    branches = {}
    for block in blocks:
        with taps.override(branches), taps.record(f"{block}/values", f"{block}/attention") as seen:
            denoise(XT, T)
        branch = projected(name, params, block, seen[f"{block}/values"])
        branches[f"{block}/attention"] = branch.reshape(seen[f"{block}/attention"].shape).astype(np.float32)
    with taps.override(branches):
        weak = denoise(XT, T).value
    assert np.abs(strong - weak).max() > 1e-2 * np.abs(strong).max()

    guided = guidance.perturbed_attention(denoise, blocks, scale=scale)
    with taps.record("final") as heard:  # the network's own, though it ran first
        out = guided(XT, T)
    with taps.record("final") as own:
        denoise(XT, T)
    np.testing.assert_array_equal(heard["final"], own["final"])
    assert (out.kind, guided.evaluations) == ("noise", 2)
    # The paper's: the prediction and s times its distance from the disturbed one.
    expected = strong + (scale - 1) * (strong - weak)
    np.testing.assert_allclose(out.value, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", SLOW)
def test_self_attention_blurs_where_a_network_looks(name):
    """As tests/guidance/test_self_attention.py has it for any network, whose map is told there."""
    denoise, _ = made(name)
    block, scale = NETWORKS[name][1][-1], 1.75
    with taps.record(f"{block}/attention/weights") as seen:
        noise = denoise(XT, T).value
    got = np.asarray(seen[f"{block}/attention/weights"], float).mean(1).sum(1)
    assert got.shape == (2, 4)
    assert np.abs(got - 1).min() > 1e-3
    mask = np.kron((got > 1).reshape(2, 2, 2, 1), np.ones((1, 2, 2, 1)))
    alpha, sigma = (np.asarray(f(T))[:, None, None, None] for f in (PROCESS.schedule.alpha, PROCESS.schedule.sigma))
    x0 = (XT - sigma * noise) / alpha
    smooth = scipy.ndimage.gaussian_filter(x0, 1.0, axes=(1, 2), mode="mirror", radius=4)
    degraded = alpha * (mask * smooth + (1 - mask) * x0) + sigma * noise
    weak = denoise(degraded.astype(np.float32), T).value
    assert np.abs(noise - weak).max() > 1e-2 * np.abs(noise).max()
    expected = noise + (scale - 1) * (noise - weak)
    out = guidance.self_attention(denoise, block, PROCESS, scale=scale)(XT, T).value
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_it_guides_a_sampler():
    denoise, _ = made("unet")
    settings = {"shape": (2, 4, 4, 2), "solver": solvers.DDIM(PROCESS), "times": grids.uniform(3)}
    draw = lambda denoise: ddjax.sample(jax.random.key(3), denoise, PROCESS, **settings)
    plain, guided = draw(denoise), draw(guidance.perturbed_attention(denoise, ["middle/0"], scale=4.0))
    np.testing.assert_array_equal(guided.nfe, 2 * plain.nfe)
    assert np.isfinite(guided.x0).all()
    assert np.abs(guided.x0 - plain.x0).max() > 1e-2


def test_what_cannot_be_is_refused():
    denoise, _ = made("dit")
    assert guidance.perturbed_attention(denoise, ["block/0"], scale=1.0) is denoise
    with pytest.raises(ValueError, match="needs the names of blocks"):
        guidance.perturbed_attention(denoise, [], scale=2.0)
    call = lambda denoise: jax.eval_shape(lambda x: denoise(x, jnp.asarray(T)), XT)
    with pytest.raises(ValueError, match="block/9/attention/weights were never reached"):
        call(guidance.perturbed_attention(denoise, ["block/9"], scale=2.0))

    def pooled(xt, t, cond=None):
        return Prediction(xt * taps.tap("pool/attention/weights", jnp.ones((2, 1, 1, 5))).sum(), "noise")

    with pytest.raises(ValueError, match="not of sites to themselves"):
        call(guidance.perturbed_attention(pooled, ["pool"], scale=2.0))
