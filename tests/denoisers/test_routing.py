"""Sites that bypass blocks (TREAD), channels that do (task routing), keys that are left out (ToDo)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax import auxiliary, random
from ddjax.denoisers import DiT, TextTransformer, functional, functional_init, stack_blocks, taps
from ddjax.denoisers.layers import Layout
from ddjax.denoisers.layers.routing import channel_mask, nearest_grid, routed

RNG = np.random.default_rng(3)
SMALL = {"symbols_in": 5, "symbols_out": 4, "width": 8, "depth": 4, "heads": 2}
XT, T, KEY = RNG.integers(0, 5, (3, 6), np.int32), np.float32([0.1, 0.5, 0.9]), jax.random.key(5)
MAKERS = {
    "text": lambda rngs, **o: TextTransformer(length=6, **SMALL, **o, rngs=rngs),
    "dit": lambda rngs, **o: DiT(shape=(2, 3, 1), **SMALL, **o, rngs=rngs),
}


def states(name):
    return XT if name == "text" else XT.reshape(3, 2, 3, 1)


def made(name, noise, **options):
    init, apply = functional_init(functools.partial(MAKERS[name], **options))
    return apply, noise(jax.eval_shape(init, jax.random.key(0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_where_none_bypass_it_is_the_plain_network_bit_for_bit(name, noise):
    plain, params = made(name, noise)
    expected = plain(params, states(name), T)
    for route in ((1, 3, 0.0), (0, 4, 0.0)):
        apply, _ = made(name, noise, route=route)
        np.testing.assert_array_equal(apply(params, states(name), T, rng=KEY, train=True), expected)
    # When not training all go through all, whatever the route.
    apply, _ = made(name, noise, route=(1, 3, 0.5))
    np.testing.assert_array_equal(apply(params, states(name), T), expected)
    assert np.abs(apply(params, states(name), T, rng=KEY, train=True) - expected).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_kept_sites_are_by_themselves_and_the_others_stay(name, noise):
    apply, params = made(name, noise, route=(1, 3, 0.5))
    with taps.record() as seen:
        apply(params, states(name), T, rng=KEY, train=True)
    blocks = nnx.merge(apply.graphdef, noise(nnx.split(MAKERS[name](nnx.Rngs(0)))[1])).stack.blocks
    c, h = seen["condition"], seen["block/0"]
    kept = seen["block/1/queries"].shape[1]
    assert kept == 3
    sites = routed(random.fold_in(random.example_keys(KEY, 3), 2**20 + 1), 6, 0.5)
    assert len({tuple(row) for row in np.asarray(sites).tolist()}) > 1  # each example its own
    for b in range(3):
        own = sites[b]
        alone = h[b : b + 1, own]
        for i in (1, 2):
            alone = blocks[i](alone, c[b : b + 1], layout=Layout(own, None))
        np.testing.assert_allclose(seen["block/2"][b : b + 1], alone, atol=1e-5)
        whole = np.array(h[b : b + 1])
        whole[:, own] = seen["block/2"][b]
        again = blocks[3](jnp.asarray(whole), c[b : b + 1])
        np.testing.assert_allclose(seen["block/3"][b : b + 1], again, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_several_routes_are_one_after_the_other_each_with_its_own_sites(noise, scan):
    """The stack's pieces by hand; and two routes of the same sites as one would be."""
    routes = [[0, 1, 0.5], [1, 3, 0.34]]
    apply, params = made("dit", noise, route=routes)
    with taps.record() as seen:
        whole = apply(params, states("dit"), T, rng=KEY, train=True)
    blocks = nnx.merge(apply.graphdef, noise(nnx.split(MAKERS["dit"](nnx.Rngs(0)))[1])).stack.blocks
    keys = random.fold_in(random.example_keys(KEY, 3), 2**20 + 1)
    first, second = routed(keys, 6, 0.5), routed(random.fold_in(keys, 1), 6, 0.34)
    assert first.shape == (3, 3)
    assert second.shape == (3, 4)
    h, c = seen["embed"], seen["condition"]
    for sites, layers in ((first, (0,)), (second, (1, 2))):
        inner = jax.vmap(lambda x, s: x[s])(h, sites)
        for i in layers:
            inner = jnp.concatenate(
                [blocks[i](inner[b : b + 1], c[b : b + 1], layout=Layout(sites[b], None)) for b in range(3)]
            )
        h = jax.vmap(lambda x, s, new: x.at[s].set(new))(h, sites, inner)
    np.testing.assert_allclose(seen["block/3"], blocks[3](h, c), atol=1e-5)
    if scan:
        scanned, _ = made("dit", noise, route=routes, scan=True)
        again = scanned(stack_blocks(params), states("dit"), T, rng=KEY, train=True)
        np.testing.assert_allclose(again, whole, atol=1e-4)


@pytest.mark.slow
def test_the_loss_of_routes_is_the_published_one(x64):
    """Gradients of mean over routes of (mean of unrouted sites + weight times the reconstruction of routed ones).

    Against a transcription of the first published version (CompVis/tread, January 2025; its loss is MaskDiT's).
    """
    routes, coefficient = [(0, 1, 0.5), (1, 2, 0.34)], 0.1
    options = {"shape": (4, 6, 2), "patch": 2, "width": 8, "depth": 3, "heads": 2, "dtype": jnp.float64}
    build = lambda **o: functional_init(lambda rngs: DiT(**options, **o, rngs=rngs))
    init, plain = build(route=routes)
    _, routed_loss = build(route=routes, route_loss=coefficient)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.3, jax.eval_shape(init, jax.random.key(0)))
    xt, x0, t = rng.normal(size=(3, 4, 6, 2)), rng.normal(size=(3, 4, 6, 2)), np.array([0.1, 0.5, 0.9])
    keys = random.fold_in(random.example_keys(KEY, 3), 2**20 + 1)
    kept = routed(keys, 6, 0.5), routed(random.fold_in(keys, 1), 6, 0.34)
    masks = [np.array([[i not in row for i in range(6)] for row in np.asarray(sites)], float) for sites in kept]
    patches = lambda x: x.reshape(3, 2, 2, 3, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(3, 6, 8)

    def theirs(params):
        out = plain(params, xt, t, rng=KEY, train=True)
        errors = patches((out - x0) ** 2).mean(-1)
        target = patches(xt)
        mean, variance = target.mean(-1, keepdims=True), target.var(-1, keepdims=True, ddof=1)
        apart = ((patches(out) - (target - mean) / (variance + 1e-6) ** 0.5) ** 2).mean(-1)
        loss = 0.0
        for mask in masks:
            loss += (errors * (1 - mask)).sum(1) / (1 - mask).sum(1) / 2
            loss += coefficient * (apart * mask).sum(1) / mask.sum(1) / 2
        return loss.mean()

    def ours(params):
        with auxiliary.collect() as collector:
            out = routed_loss(params, xt, t, rng=KEY, train=True)
        return ((out - x0) ** 2).mean() + sum(v.mean() for v in collector.found().losses.values())

    for a, b in zip(jax.tree.leaves(jax.grad(ours)(params)), jax.tree.leaves(jax.grad(theirs)(params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
    out = plain(params, xt, t, rng=KEY, train=True)
    np.testing.assert_allclose(routed_loss(params, xt, t, rng=KEY, train=True), out, atol=1e-12)  # the values stay
    np.testing.assert_array_equal(routed_loss(params, xt, t), plain(params, xt, t))


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_scanned_rematerialised_and_row_by_row_it_is_the_same(name, noise, jit):
    options = {"route": (1, 3, 0.5), "dropout": 0.1}
    apply, params = made(name, noise, **options)
    keys = random.example_keys(KEY, 3)
    call = lambda apply, params, rows=slice(None): jit(
        lambda p: apply(p, states(name)[rows], T[rows], rng=keys[rows], train=True)
    )(params)
    expected = call(apply, params)
    scanned, _ = made(name, noise, **options, scan=True)
    np.testing.assert_allclose(call(scanned, stack_blocks(params)), expected, atol=1e-4)
    again, _ = made(name, noise, **options, remat="full")
    np.testing.assert_allclose(call(again, params), expected, atol=1e-4)
    np.testing.assert_allclose(call(apply, params, slice(1, 2))[0], expected[1], atol=1e-4)
    one = jit(lambda p: apply(p, states(name), T, rng=KEY, train=True))(params)
    np.testing.assert_allclose(one, expected, atol=1e-4)


@pytest.mark.slow
def test_behind_a_clean_past_every_site_sees_its_own_past(noise):
    """Routes and masks together: a kept site attends to the kept ones of those that it saw."""
    apply, params = made("text", noise, block=2, route=(0, 4, 0.5))
    with taps.record("block/2/attention/weights") as seen:
        apply(params, XT, T, {"clean": XT % 4}, rng=KEY, train=True)
    sites = np.asarray(routed(random.fold_in(random.example_keys(KEY, 3), 2**20 + 1), 12, 0.5))
    block, noisy = sites % 6 // 2, sites < 6
    q, k = np.s_[:, :, None], np.s_[:, None, :]
    see = np.where(
        noisy[q], np.where(noisy[k], block[q] == block[k], block[q] > block[k]), ~noisy[k] & (block[q] >= block[k])
    )
    weights = np.asarray(seen["block/2/attention/weights"])
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(see[:, None], weights.shape))


@pytest.mark.slow
def test_what_layers_tell_is_a_mean_over_all_of_them(noise):
    experts = {"mlp": "experts", "experts": {"experts": 4, "top_k": 1}}
    for scan in (False, True):
        found = []
        for route in (None, (1, 2, 0.0)):
            apply, params = functional(MAKERS["text"](nnx.Rngs(0), **experts, route=route, scan=scan))
            params = noise(params)
            with auxiliary.collect() as collector:
                apply(params, XT, T, rng=KEY, train=True)
            found.append(collector.found())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)


@pytest.mark.slow
def test_as_many_are_kept_as_in_the_authors_code():
    for sites, share in ((10, 0.3), (10, 0.9), (7, 0.5), (6, 0.0)):
        kept = np.asarray(routed(random.example_keys(KEY, 50), sites, share))
        assert kept.shape == (50, sites - int(sites * share))
        assert (np.diff(kept, axis=1) > 0).all()  # in order, none twice
    counts = np.bincount(np.asarray(routed(random.example_keys(KEY, 4000), 6, 0.5)).reshape(-1), minlength=6)
    assert np.abs(counts - 2000).max() < 4 * np.sqrt(4000 / 4)


def test_channels_of_a_time_are_the_authors_table(x64):
    """Their table of masks for 1000 tasks, one for each time (Park et al. 2024, equation 5)."""
    tasks, width, alpha, beta = 1000, 24, 4, 0.8
    expected, window = np.zeros((tasks, width)), int(width * beta)
    begin = (np.linspace(0, 1, tasks) ** alpha * (width - window)).round().astype(int)
    for i, first in enumerate(begin):
        expected[i, first : first + window] = 1
    np.testing.assert_array_equal(channel_mask(jnp.linspace(0, 1, tasks), width, beta, alpha), expected)


@pytest.mark.slow
def test_masked_channels_pass_every_block_by(noise):
    apply, params = made("dit", noise, task_share=0.5)
    t = np.float32([0.1, 0.8, 0.95])
    with taps.record() as seen:
        apply(params, states("dit"), t)
    blocks = nnx.merge(apply.graphdef, noise(nnx.split(MAKERS["dit"](nnx.Rngs(0)))[1])).stack.blocks
    h, mask = seen["embed"], np.asarray(channel_mask(jnp.asarray(t), 8, 0.5))[:, None]
    assert len({tuple(row[0]) for row in mask.tolist()}) == 3
    for i in range(4):
        h = (1 - mask) * h + blocks[i](mask * h, seen["condition"])
        np.testing.assert_allclose(seen[f"block/{i}"], h, atol=1e-4)


def test_the_nearest_grid_is_that_of_interpolation():
    """`torch.nn.functional.interpolate(mode="nearest")` reads index floor(i size / new_size)."""
    np.testing.assert_array_equal(nearest_grid((4, 6), 2), [0, 2, 4, 12, 14, 16])
    np.testing.assert_array_equal(nearest_grid((5,), 2), [0, 2])
    np.testing.assert_array_equal(nearest_grid((7,), 2), [0, 2, 4])
    np.testing.assert_array_equal(nearest_grid((2, 2, 3), 1), np.arange(12))
    with pytest.raises(ValueError, match="downsample=3: expected a factor from 1 to the shortest side"):
        nearest_grid((2, 4), 3)


@pytest.mark.slow
def test_sites_attend_to_every_second_one_only(noise):
    build = lambda **o: functional_init(lambda rngs: DiT(shape=(4, 4, 1), **{**SMALL, "depth": 1}, **o, rngs=rngs))
    (init, plain), (_, thin) = build(), build(downsample=2)
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    xt, keys = RNG.integers(0, 5, (2, 4, 4, 1), np.int32), [0, 2, 8, 10]
    points = ("queries", "keys", "values", "attention", "attention/weights")
    with taps.record(*(f"block/0/{point}" for point in points)) as seen:
        thin(params, xt, T[:2])
    q, k, v = (np.asarray(seen[f"block/0/{p}"], float) for p in ("queries", "keys", "values"))
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k[:, keys]) / 2)
    y = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v[:, keys]).reshape(2, 16, 8)
    out = params["stack"]["blocks"]["0"]["attention"]["out"]
    np.testing.assert_allclose(seen["block/0/attention"], y @ out["kernel"] + out["bias"], atol=1e-4)
    assert seen["block/0/attention/weights"].shape == (2, 2, 16, 4)
    # Only when not training.
    again = thin(params, xt, T[:2], rng=KEY, train=True)
    np.testing.assert_array_equal(again, plain(params, xt, T[:2], rng=KEY, train=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": (1, 5, 0.5)}, "stop <= depth=4"),
        ({"route": (2, 2, 0.5)}, "expected .start, stop, share."),
        ({"route": (1, 2, 1.0)}, "at least 0 and below 1"),
        ({"route": [(0, 2, 0.5), (1, 3, 0.5)]}, "or several, one after the other"),
        ({"route_loss": 0.0}, "expected a route"),
        ({"route": (1, 2, 0.5), "route_loss": 0.1}, "0 for a discrete state"),
        ({"task_share": 0.0}, "task_share=0.0"),
        ({"task_share": 0.5, "time": False}, "1 without time"),
        ({"downsample": 0}, "downsample=0"),
        ({"downsample": 2, "relations": [[0] * 6]}, "relations may need all"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        functional_init(functools.partial(MAKERS["dit"], **options))


def test_a_network_that_is_told_nothing_has_routes(noise, jit):
    init, apply = functional_init(
        lambda rngs: TextTransformer(
            length=6, **{**SMALL, "num_classes": 0}, time=False, modulated=False, route=(1, 3, 0.5), rngs=rngs
        )
    )
    run = jit(lambda params: apply(params, XT, None, rng=KEY, train=True))
    out = run(noise(jax.eval_shape(init, jax.random.key(0))))
    assert jnp.isfinite(out).all()


def test_a_route_needs_a_key(noise):
    apply, params = made("dit", noise, route=(1, 2, 0.5))
    with pytest.raises(ValueError, match=r"route=\(1, 2, 0.5\) with train=True needs a key"):
        apply(params, states("dit"), T, train=True)
