"""Merging of unimportant sites: the matching by hand, inside the network, and who tells what is important."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import random
from ddjax.denoisers import DiT, functional_init, taps
from ddjax.denoisers.layers.merging import merging
from ddjax.guidance import classifier_free
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.schedules import VPCosine
from ddjax.solvers import DDIM, Merging

SIZES = (9, 3, 5)
CONFIG = {"shape": (4, 3, 1), "width": 8, "depth": 2, "heads": 2}


def by_hand(h, importance, sizes):
    """One example, site by site: who remains, and whom each site has joined."""
    pool, targets, kept = sizes
    ranked = sorted(range(len(h)), key=lambda i: (-importance[i], i))
    into = [ranked[i * pool // targets] for i in range(targets)]
    cosine = lambda i, j: h[i] @ h[j] / np.linalg.norm(h[i]) / np.linalg.norm(h[j])
    match = {i: max(into, key=lambda j, i=i: cosine(i, j)) for i in range(len(h)) if i not in into}
    rest = sorted((i for i in ranked[:pool] if i not in into), key=lambda i: cosine(i, match[i]))
    alone = rest[: kept - targets]
    return set(into + alone), [i if i in into + alone else match[i] for i in range(len(h))]


def inputs(batch=4, sites=12, width=8):
    rng = np.random.default_rng(5)
    return rng.normal(size=(batch, sites, width)).astype(np.float32), rng.uniform(size=(batch, sites)).astype(
        np.float32
    )


@pytest.mark.parametrize("sizes", [SIZES, (12, 1, 1), (6, 6, 6), (10, 2, 10)])
def test_who_remains_and_who_joins_whom(sizes):
    h, importance = inputs()
    merged = jax.jit(merging, static_argnums=2)(h, importance, sizes)
    x = inputs()[0] ** 2
    mean, spread = np.asarray(merged.mean(x)), np.asarray(merged.spread(merged.mean(x)))
    for b in range(4):
        kept, joined = by_hand(h[b], importance[b], sizes)
        assert set(np.asarray(merged.kept[b]).tolist()) == kept
        assert np.asarray(merged.kept[b][merged.place[b]]).tolist() == joined
        assert mean.shape[1] == len(kept) == sizes[2]
        for site, stands in enumerate(joined):
            members = [i for i, j in enumerate(joined) if j == stands]
            np.testing.assert_allclose(spread[b, site], x[b, members].mean(0), rtol=1e-5)


@pytest.mark.slow
def test_in_the_network_the_means_attend_and_all_get_the_answer(noise):
    build = lambda **o: functional_init(lambda rngs: DiT(**CONFIG, **o, rngs=rngs))
    (init, plain), (_, apply) = build(), build(merge=SIZES)
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    rng = np.random.default_rng(6)
    x, t, importance = rng.normal(size=(2, 4, 3, 1)).astype(np.float32), np.float32([0.3, 0.7]), inputs()[1][:2]
    cond = {"importance": importance}
    with taps.record() as seen:
        apply(params, x, t, cond)
    block, c = params["stack"]["blocks"]["0"], np.asarray(seen["condition"])
    shift, scale = np.split(c @ block["modulation"]["kernel"] + block["modulation"]["bias"], 6, axis=-1)[:2]
    h = np.asarray(seen["embed"])
    normed = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    modulated = normed * (1 + scale[:, None]) + shift[:, None]
    for b in range(2):
        kept, joined = by_hand(h[b], importance[b], SIZES)
        kept = sorted(kept)
        means = np.stack([modulated[b, [i for i, j in enumerate(joined) if j == k]].mean(0) for k in kept])
        q, k, v = np.moveaxis((means @ block["attention"]["qkv"]["kernel"]).reshape(5, 2, 3, 4), 2, 0)
        scores = np.exp(np.einsum("qhd,khd->hqk", q, k) / 2)
        y = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(5, 8)
        y = y @ block["attention"]["out"]["kernel"] + block["attention"]["out"]["bias"]
        expected = y[[kept.index(j) for j in joined]]
        np.testing.assert_allclose(seen["block/0/attention"][b], expected, atol=1e-4)
    # Without being told, in training, and where all remain, it is the plain network.
    expected = plain(params, x, t)
    np.testing.assert_array_equal(apply(params, x, t), expected)
    np.testing.assert_array_equal(apply(params, x, t, cond, train=True), expected)
    _, whole = build(merge=(12, 4, 12))
    np.testing.assert_allclose(whole(params, x, t, cond), expected, atol=1e-4)
    assert np.abs(apply(params, x, t, cond) - expected).max() > 1e-2


def test_important_is_what_guidance_moved_in_the_step_before():
    process, place = Gaussian(VPCosine()), np.array([[0, 0, 1], [1, 2, 2]])[..., None]
    told, table = [], np.random.default_rng(2).normal(size=(3, 2, 3, 1)).astype(np.float32)

    def network(x, t, cond):
        taps.tap("sites", place)
        if not isinstance(cond["importance"], jax.core.Tracer):
            told.append(np.asarray(cond["importance"]))
        return Prediction(jnp.asarray(table)[cond["cond"]] + 0.1 * x, "x0")

    class Rest:
        """Sites can be asked for without an importance."""

        evaluations = 1

        def __call__(self, x, t, cond=None):
            cond = cond if isinstance(cond, dict) else {"importance": jnp.zeros((len(x), 3)), "cond": cond}
            return network(x, t, cond)

    denoise, labels = classifier_free(Rest(), null=2, scale=2.0), jnp.asarray([0, 1])
    solver, x = Merging(DDIM(process)), jnp.ones((2, 2, 3, 1))
    carry = solver.begin(x, labels, denoise)
    for i, (t, s) in enumerate(((1.0, 0.6), (0.6, 0.3), (0.3, 0.0))):
        keys = random.example_keys(jax.random.fold_in(jax.random.key(0), i), 2)
        x, carry, _ = solver.step(keys, carry, x, jnp.float32(t), jnp.float32(s), denoise, labels)
    change = (table[:2] - table[2:]) ** 2
    expected = np.sqrt(np.stack([change[:, place == i].sum(-1) for i in range(3)], axis=-1))
    assert len(told) == 3
    assert (np.ptp(told[0], axis=1) > 1e-3).all()  # drawn
    assert told[0].max() < 1
    for later in told[1:]:
        np.testing.assert_allclose(later, np.concatenate([expected, expected]), rtol=1e-5)


@pytest.mark.slow
def test_sampling_where_all_remain_is_the_plain_sampler(noise):
    process, labels = Gaussian(VPCosine()), jnp.asarray([0, 1])
    samples = []
    for merge in (None, (12, 4, 12), SIZES):
        init, apply = functional_init(lambda rngs, merge=merge: DiT(**CONFIG, num_classes=2, merge=merge, rngs=rngs))
        params = noise(jax.eval_shape(init, jax.random.key(0)))
        denoise = classifier_free(ddjax.bind(apply, params, process, "x0"), null=2, scale=2.0)
        solver = DDIM(process) if merge is None else Merging(DDIM(process))
        settings = {"shape": (2, 4, 3, 1), "solver": solver, "times": ddjax.grids.uniform(4), "cond": labels}
        samples.append(ddjax.sample(jax.random.key(1), denoise, process, **settings).x0)
    np.testing.assert_allclose(samples[1], samples[0], atol=1e-3)
    assert np.isfinite(samples[2]).all()
    assert np.abs(samples[2] - samples[0]).max() > 1e-2


def test_errors(noise):
    for sizes in ((13, 3, 5), (9, 6, 5), (4, 3, 5), (9, 0, 5)):
        with pytest.raises(ValueError, match=r"1 <= targets <= kept <= pool <= 12 sites"):
            functional_init(lambda rngs, sizes=sizes: DiT(**CONFIG, merge=sizes, rngs=rngs))
    x, t = jnp.zeros((2, 4, 3, 1)), jnp.ones(2)
    for options, cond, message in (
        ({}, {"importance": jnp.zeros((2, 12))}, "build it with merge="),
        ({"merge": SIZES}, {"importance": jnp.zeros((2, 11))}, r"shape \(2, 11\); expected \(2, 12\)"),
        ({"merge": SIZES, "downsample": 2}, {"importance": jnp.zeros((2, 12))}, "patches all attend to all"),
    ):
        init, apply = functional_init(lambda rngs, options=options: DiT(**CONFIG, **options, rngs=rngs))
        params = jax.eval_shape(init, jax.random.key(0))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda p, apply=apply, cond=cond: apply(p, x, t, cond), params)
