"""What U-Nets promise beside their published forward passes (tests/interop): sizes, conditions, taps, FreeU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax import flops
from ddjax.denoisers import (
    EDM2,
    EDM2_SIZES,
    UNET_DESIGNS,
    UNET_SIZES,
    FreeU,
    UNet,
    UNetDesign,
    freeu,
    functional_init,
    taps,
)
from ddjax.denoisers.edm2 import Uncertainty, forced
from ddjax.denoisers.unet import input_waves

SMALL = {"shape": (8, 8, 2), "width": 8, "multipliers": (1, 2), "blocks": 1, "attend_at": (4,), "num_classes": 3}
NORM = {"groups": 4, "least": 1}


def small(design="adm", **options):
    design = dataclasses.replace(UNET_DESIGNS[design], **NORM) if design in UNET_DESIGNS else design
    return lambda rngs: UNet(**{**SMALL, "design": design, **options}, rngs=rngs)


def inputs(batch=3):
    rng = np.random.default_rng(1)
    xt = rng.normal(size=(batch, 8, 8, 2)).astype(np.float32)
    return xt, rng.uniform(size=batch).astype(np.float32), rng.integers(0, 3, batch, np.int32)


def largest(a, b=0.0):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


@pytest.fixture(scope="module")
def net(build):
    return build(small())


def described(sizes, channels, kind=UNet, side=None, classes=0, out=None, **options):
    side = side or int("".join(c for c in sizes.split("-")[1] if c.isdigit()).removeprefix("10") or 32)
    sizes = UNET_SIZES[sizes] if kind is UNet else EDM2_SIZES[sizes]
    make = lambda rngs: kind(
        shape=(side, side, channels), num_classes=classes, out_channels=out, **sizes, **options, rngs=rngs
    )
    init, apply = functional_init(make)
    return jax.eval_shape(init, jax.random.key(0)), apply


def count(params):
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions", "options"),
    [
        # Ho et al. 2020, section 4; Dhariwal & Nichol 2021 as counted by Peebles & Xie 2023, table 4, and Karras et
        # al. 2024, table 3; Karras et al. 2022.
        ("ddpm-cifar10", 35.7, {"side": 32}),
        ("adm-imagenet256", 554, {"side": 256, "classes": 1000, "out": 6}),
        ("adm-imagenet64", 296, {"side": 64, "classes": 1000, "out": 6}),
        ("edm-imagenet64", 296, {"side": 64, "classes": 1000}),
    ],
)
def test_published_sizes(name, millions, options):
    params, _ = described(name, 3, **options)
    assert count(params) / 1e6 == pytest.approx(millions, abs=0.05 if millions < 100 else 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    [("xs", 125), ("s", 280), ("m", 498), ("l", 777), ("xl", 1119), ("xxl", 1523)],  # Karras et al. 2024, table 2
)
def test_published_sizes_of_edm2(name, millions):
    params, _ = described(f"edm2-{name}", 4, EDM2, side=64, classes=1000)
    assert count(params) / 1e6 == pytest.approx(millions, abs=0.6)


@pytest.mark.slow
def test_published_operations():
    # 1120 billion multiply-adds for an image (Peebles & Xie 2023, table 4), with those of zeros around the images.
    params, apply = described("adm-imagenet256", 3, side=256, classes=1000, out=6)
    state = jax.ShapeDtypeStruct((1, 256, 256, 3), np.float32), jax.ShapeDtypeStruct((1,), np.float32)
    label = jax.ShapeDtypeStruct((1,), np.int32)
    assert 0.98 * 1120 < flops.count(apply, params, *state, label) / 2e9 < 1120


def test_labels_time_and_the_null_label(net):
    run, params = net
    xt, t, _ = inputs()
    out = [run(params, xt, t, np.full(3, k, np.int32)) for k in range(4)]
    assert min(largest(out[i], out[j]) for i in range(4) for j in range(i)) > 1e-2
    np.testing.assert_array_equal(run(params, xt, t, None), out[3])
    unlabelled = {**params, "condition": {**params["condition"], "labels": 0 * params["condition"]["labels"]}}
    np.testing.assert_allclose(run(unlabelled, xt, t, np.int32([0, 1, 2])), out[3], atol=1e-5)  # it adds nothing
    assert largest(run(params, xt, t + np.float32(0.01), None), out[3]) > 1e-2
    assert np.isnan(run(params, xt, t, np.int32([4, 0, 0]))[0]).all()


@pytest.mark.slow
def test_waves_of_the_state_beside_it(x64):
    x = np.random.default_rng(0).normal(size=(2, 3))
    waves = input_waves(jnp.asarray(x), (6, 7))
    expected = [f(2 ** (n + 1) * np.pi * x[:, c]) for f in (np.sin, np.cos) for c in range(3) for n in (6, 7)]
    np.testing.assert_allclose(waves, np.stack(expected, -1), atol=1e-9)


@pytest.mark.slow
def test_a_latent_or_none(build):
    run, params = build(small(latent=4))
    xt, t, labels = inputs()
    z = np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)
    plain = run(params, xt, t, labels)
    assert largest(run(params, xt, t, {"z": z, "cond": labels}), plain) > 1e-2
    np.testing.assert_allclose(run(params, xt, t, {"z": 0 * z, "cond": labels}), plain, atol=1e-5)
    with pytest.raises(ValueError, match="knows a latent"):
        run(params, xt, t, {"z": z[:, :3], "cond": labels})


@pytest.mark.slow
def test_an_untimed_network_ignores_the_time(build):
    run, params = build(small(time=False))
    xt, t, labels = inputs()
    np.testing.assert_array_equal(run(params, xt, t, labels), run(params, xt, None, labels))


def test_errors():
    for options, message in [
        ({"design": "vgg"}, "expected a UNetDesign, or one of"),
        ({"multipliers": (1, 1, 1, 1, 1)}, "halve the sides 4 times"),
        ({"attend_at": (2,)}, "never 2 high"),
        ({"width": 6}, "groups of a norm do not divide"),
        ({"heads": 3}, "3 heads do not divide"),
        ({"remat": "some"}, "remat="),
        ({"design": "vdm", "out_channels": 4}, "as many channels out"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda options=options: functional_init(small(**options)) and None)
    with pytest.raises(ValueError, match="up_attention='some'"):
        UNetDesign(up_attention="some")
    with pytest.raises(ValueError, match="weights="):
        UNetDesign(weights=(1, 2, 1))


@pytest.mark.slow
def test_taps_name_skips_and_backbones(net):
    run, params = net
    apply, args = run.args[0], inputs()
    with taps.record() as seen:
        whole = apply(params, *args)
    assert [seen[f"skip/{n}"].shape[1:] for n in range(4)] == [(4, 4, 16), (4, 4, 8), (8, 8, 8), (8, 8, 8)]
    assert [seen[f"backbone/{n}"].shape[1:] for n in range(4)] == [(4, 4, 16), (4, 4, 16), (8, 8, 16), (8, 8, 8)]
    with taps.override({name: lambda h: h for name in seen if name != "sites"}):
        np.testing.assert_array_equal(apply(params, *args), whole)
    attending = ("encoder/2", "middle/0", "decoder/1")
    parts = ("queries", "keys", "values", "attention", "attention/weights")
    for name in (*(f"{n}/{part}" for n in attending for part in parts), "final"):
        with taps.override({name: lambda h: 2 * h}):  # each is a point that the output depends on
            assert largest(apply(params, *args), whole) > 1e-4, name


def published(x, b, s, adaptive):
    """FreeU as its authors wrote it, features second (github.com/ChenyangSi/FreeU; the second version if adaptive)."""
    h, skip = (np.moveaxis(v, -1, 1) for v in x)
    half, mean = h.shape[1] // 2, np.ones((len(h), 1, 1, 1))
    if adaptive:
        mean = h.mean(1, keepdims=True)
        low, high = (f(mean, axis=(2, 3), keepdims=True) for f in (np.min, np.max))
        mean = (mean - low) / (high - low)
    h = np.concatenate([h[:, :half] * ((b - 1) * mean + 1), h[:, half:]], axis=1)
    spectrum = np.fft.fftshift(np.fft.fftn(skip, axes=(-2, -1)), axes=(-2, -1))
    row, column = skip.shape[2] // 2, skip.shape[3] // 2
    spectrum[..., row - 1 : row + 1, column - 1 : column + 1] *= s
    skip = np.fft.ifftn(np.fft.ifftshift(spectrum, axes=(-2, -1)), axes=(-2, -1)).real
    return np.moveaxis(h, 1, -1), np.moveaxis(skip, 1, -1)


@pytest.mark.parametrize("adaptive", [True, False])
def test_freeu_is_the_published_computation(x64, adaptive):
    overrides = freeu((1.3, 1.5), (0.7, 0.2), blocks=1, adaptive=adaptive)
    assert sorted(overrides) == sorted(f"{kind}/{n}" for kind in ("backbone", "skip") for n in range(4))
    rng = np.random.default_rng(0)
    for n, b, s in ((1, 1.3, 0.7), (2, 1.5, 0.2)):
        x = [rng.normal(size=(2, 6, 5, 7)) for _ in range(2)]
        expected = published(x, b, s, adaptive)
        for kind, value, theirs in zip(("backbone", "skip"), x, expected, strict=True):
            np.testing.assert_allclose(overrides[f"{kind}/{n}"](jnp.asarray(value)), theirs, atol=1e-12)


@pytest.mark.slow
def test_freeu_off_changes_nothing_and_on_it_does(net, jit):
    run, params = net
    apply, args = run.args[0], inputs()
    call = jit(lambda apply, *args: apply(*args), static_argnums=0)
    plain = call(apply, params, *args)
    np.testing.assert_array_equal(call(FreeU(apply, (1, 1), (1, 1), blocks=1), params, *args), plain)
    free = FreeU(apply, blocks=1)
    assert hash(free) == hash(FreeU(apply, blocks=1))
    assert largest(call(free, params, *args), plain) > 1e-3
    with taps.override({f"backbone/{n}": lambda h: h for n in (0, 1)}), taps.record("skip/0") as seen:
        free(params, *args)
    with taps.record("skip/0") as before:
        apply(params, *args)
    np.testing.assert_allclose(seen["skip/0"], published([before["skip/0"]] * 2, 1.2, 0.9, True)[1], atol=1e-5)
    with pytest.raises(ValueError, match="one of each"):
        freeu((1.2,), (0.9, 0.2))


@pytest.mark.slow
def test_forced_weights_change_no_output(build):
    """Not of what it makes of a sequence either, nor of the entry that stands for none."""
    run, params = build(lambda rngs: EDM2(**{**SMALL, "head_width": 8, "context_width": 5}, rngs=rngs))
    xt, t, labels = inputs()
    words = np.random.default_rng(5).normal(size=(len(t), 3, 5)).astype(np.float32)
    cond = {"sequence": words, "valid": np.arange(len(t) * 3).reshape(-1, 3) > 2, "cond": labels}
    out, again = run(params, xt, t, cond), run(forced(params), xt, t, cond)
    np.testing.assert_allclose(out, again, atol=1e-3 * largest(out))  # the epsilon of the norm acts again
    kernel = forced(params)["encoder"]["0"]["conv_in"]["kernel"]
    np.testing.assert_allclose(np.sqrt((kernel**2).mean((0, 1, 2))), 1, atol=1e-3)
    np.testing.assert_allclose(np.sqrt((forced(params)["nothing"]["kernel"] ** 2).mean()), 1, atol=1e-3)


def test_edm2s_uncertainty():
    """u(t), by equations 47 and 75 in NumPy (with its network: tests/interop/test_unet_weights.py)."""
    module = Uncertainty(6, rngs=nnx.Rngs(0))
    module.linear.kernel[...] = 3.0 * module.linear.kernel[...] + 0.1
    t = np.float32([-1.2, 0.1, 0.8])
    kernel, frequencies, phases = (
        np.asarray(v[...], np.float64) for v in (module.linear.kernel, module.frequencies, module.phases)
    )
    unit = kernel[:, 0] / (1e-4 + np.sqrt((kernel**2).mean()))
    expected = np.sqrt(2) * np.cos(t.astype(np.float64)[:, None] * frequencies + phases) @ unit / np.sqrt(6)
    np.testing.assert_allclose(module(t), expected, rtol=0, atol=2e-5)
    assert np.ptp(expected) > 0.1
    with pytest.raises(ValueError, match="uncertainty=6"):
        functional_init(lambda rngs: EDM2(**SMALL, head_width=8, time=False, uncertainty=6, rngs=rngs))
