"""A side network that is shown an image: at first nothing, then the published sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax.denoisers import EDM2, DiffiT, DiT, UNet, UNetDesign, functional_init, taps
from ddjax.denoisers.control import attach
from ddjax.denoisers.edm2 import mp_concatenate

RNG = np.random.default_rng(1)
SMALL = {"shape": (4, 4, 1), "patch": 2, "width": 8, "depth": 3, "heads": 2, "num_classes": 3}
X, IMAGE = (RNG.normal(size=(3, 4, 4, n)).astype(np.float32) for n in (1, 2))
T, LABELS = np.float32([0.1, 0.5, 0.9]), np.int32([2, 0, 3])
COND = {"image": IMAGE, "cond": LABELS}


def make(rngs, **options):
    return DiT(**SMALL, **options, rngs=rngs)


@pytest.fixture(scope="module")
def trunk(noise):
    init, apply = functional_init(make)
    return apply, noise(jax.eval_shape(init, jax.random.key(0)))


@pytest.mark.slow
def test_a_new_one_is_the_trunk_bit_for_bit(trunk):
    plain, params = trunk
    apply, side = attach(make, params, blocks=2, channels=2, key=jax.random.key(1))
    expected = plain(params, X, T, LABELS)
    np.testing.assert_array_equal(apply(side, X, T, COND), expected)
    np.testing.assert_array_equal(apply(side, X, T, LABELS), expected)
    assert "final" not in side["side"]
    assert set(side["side"]["stack"]["blocks"]) == {"0", "1"}
    blocks = params["stack"]["blocks"]
    for i in "01":
        jax.tree.map(np.testing.assert_array_equal, side["side"]["stack"]["blocks"][i], blocks[i])


@pytest.mark.slow
def test_what_it_adds_is_made_of_its_own_blocks(trunk, noise):
    """Every layer by hand: the copy fed with the image's patches, its blocks' outputs added to the trunk's."""
    plain, params = trunk
    apply, side = attach(make, params, blocks=2, channels=2, key=jax.random.key(1))
    side = noise(side, seed=3)
    patches = IMAGE.reshape(3, 2, 2, 2, 2, 2).swapaxes(2, 3).reshape(3, 4, 8)
    hint = patches @ side["hint"]["0"]["kernel"] + side["hint"]["0"]["bias"]
    # The copy as a whole network, whose last block is not heard.
    copy = {**side["side"], "final": params["final"]}
    copy["stack"] = {"blocks": {**copy["stack"]["blocks"], "2": params["stack"]["blocks"]["2"]}}
    with taps.override({"embed": lambda h: h + hint}), taps.record("block/0", "block/1") as seen:
        plain(copy, X, T, LABELS)
    out = [seen[f"block/{i}"] @ side["out"][str(i)]["kernel"] + side["out"][str(i)]["bias"] for i in range(2)]
    with taps.override({f"block/{i}": lambda h, i=i: h + out[i] for i in range(2)}):
        expected = plain(params, X, T, LABELS)
    with taps.record("block/1", "block/0/attention/weights") as heard:
        np.testing.assert_allclose(apply(side, X, T, COND), expected, atol=1e-5)
    assert np.abs(expected - plain(params, X, T, LABELS)).max() > 1e-2
    with taps.record("block/0/attention/weights") as own:
        plain(params, X, T, LABELS)
    name = "block/0/attention/weights"
    np.testing.assert_array_equal(heard[name], own[name])
    # Outside, the trunk's taps are meant, and not the copy's of the same names.
    with taps.override({f"block/{i}": lambda h, i=i: h + (i == 0) + out[i] for i in range(2)}):
        expected = plain(params, X, T, LABELS)
    with taps.override({"block/0": lambda h: h + 1}):
        np.testing.assert_allclose(apply(side, X, T, COND), expected, atol=1e-5)


@pytest.mark.slow
def test_all_of_the_side_network_learns_and_rows_do_not_mix(trunk, noise, jit):
    _, params = trunk
    apply, side = attach(make, params, blocks=2, channels=2, key=jax.random.key(1))
    side = noise(side, seed=3)
    grads = jit(jax.grad(lambda p: (apply(p, X, T, COND) ** 2).sum()))(side)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 1e-5, path
    whole = apply(side, X, T, COND)
    one = apply(side, X[1:2], T[1:2], jax.tree.map(lambda c: c[1:2], COND))
    np.testing.assert_allclose(one[0], whole[1], atol=1e-5)
    small = functools.partial(make, dtype=jnp.bfloat16)
    apply, side = attach(small, params, blocks=1, channels=2, key=jax.random.key(1))
    assert apply(side, X, T, COND).dtype == jnp.float32


@pytest.mark.slow
def test_errors(trunk):
    _, params = trunk
    for options, blocks, message in (
        ({"scan": True}, 1, "scan=False"),
        ({"image_channels": 1}, 1, "must not be shown an image itself"),
        ({}, 4, "blocks=4: expected from 1 to the trunk's 3"),
        ({}, None, "blocks=None: expected from 1 to the trunk's 3"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(functools.partial(make, **options), params, blocks=blocks, channels=2, key=jax.random.key(1))
    apply, side = attach(make, params, blocks=1, channels=2, key=jax.random.key(1))
    past = {"past": (np.zeros((3, 3, 4, 2, 4)),) * 2, "sites": np.zeros((3, 1), int)}
    with pytest.raises(ValueError, match="says nothing of a past"):
        apply(side, X, T, {**past, "cond": COND})
    with pytest.raises(ValueError, match=r"the image in cond has shape"):
        apply(side, X, T, {"image": X})


LEVELS = {"shape": (4, 4, 1), "width": 8, "multipliers": (1, 2), "blocks": 1, "num_classes": 3}
FEW = {"groups": 4}
ATTENDING = {**LEVELS, "attend_at": (2,)}
U_SHAPED = {
    "adm": (UNet, {**ATTENDING, "vector": 5, "context_width": 6, "design": UNetDesign(**FEW)}),
    "ncsn++": (UNet, {**ATTENDING, "design": "ncsn++"}),
    "edm2": (EDM2, {**ATTENDING, "head_width": 8, "uncertainty": 4}),
    "diffit": (DiffiT, {**LEVELS, "heads": 2, "window": 2}),
}
WORDS = {name: RNG.normal(size=size).astype(np.float32) for name, size in (("vector", (3, 5)), ("sequence", (3, 2, 6)))}
WORDS["valid"] = np.array([[1, 0], [0, 0], [1, 1]], bool)


def u_shaped(name, rngs, **options):
    kind, own = U_SHAPED[name]
    return kind(**{**own, **options}, rngs=rngs)


def image_of(channels, side=4):
    return RNG.normal(size=(3, side, side, channels)).astype(np.float32)


def convolved(x, p, stride=1):
    """A 3 x 3 convolution, offset by offset."""
    x, side = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), x.shape[1]
    y = sum(x[:, i : i + side : stride, j : j + side : stride] @ p["kernel"][i, j] for i in range(3) for j in range(3))
    return y + p["bias"]


def merged(make, params):
    return nnx.merge(nnx.split(make(nnx.Rngs(0)))[0], jax.tree.map(jnp.asarray, params))


def down(network, h, c):
    """The skip connections, and what leaves the middle."""
    skips = [h]
    for stage, block in zip(network.stages[0], network.encoder, strict=True):
        h = block(h, c)
        skips += [h] if stage.kept else []
    for block in network.middle:
        h = block(h, c)
    return skips, h


@pytest.fixture(params=U_SHAPED)
def u_trunk(request, noise):
    make = functools.partial(u_shaped, request.param)
    init, apply = functional_init(make)
    return request.param, make, apply, noise(jax.eval_shape(init, jax.random.key(0)))


@pytest.mark.slow
def test_beside_a_u_net_a_new_one_is_the_trunk(u_trunk, jit):
    """Bit for bit where operations run one by one; in a program, as XLA fuses them."""
    name, make, plain, params = u_trunk
    apply, side = attach(make, params, channels=2, key=jax.random.key(1))
    told = {**WORDS, "cond": LABELS} if name == "adm" else LABELS
    shown = {**told, "image": IMAGE} if name == "adm" else COND
    expected, run = jit(plain)(params, X, T, told), jit(lambda *args: apply(*args))
    for cond in (shown, told):
        np.testing.assert_allclose(run(side, X, T, cond), expected, atol=1e-6 * np.abs(expected).max())
    if name == "adm":
        np.testing.assert_array_equal(apply(side, X, T, shown), plain(params, X, T, told))
    assert not {"final", "gain", "uncertainty"} & side["side"].keys()
    assert not side["side"].get("decoder")
    for part in ("encoder", "middle", "embed", "condition"):
        if part in params:
            jax.tree.map(np.testing.assert_array_equal, side["side"][part], params[part])


@pytest.mark.slow
def test_beside_a_u_net_it_adds_to_skip_connections_and_the_middle(u_trunk, noise, jit):
    """Block by block, by hand: Zhang et al. 2023, figure 3."""
    name, make, plain, params = u_trunk
    if name == "ncsn++":  # what is fed in at each resolution has its own test below
        return
    if name == "adm":  # blocks alone, without words
        make = functools.partial(make, context_width=0)
        init, plain = functional_init(make)
        params = noise(jax.eval_shape(init, jax.random.key(0)))
    apply, side = attach(make, params, channels=2, stem=(4, 6), key=jax.random.key(1))
    side, image = noise(side, seed=3), image_of(2, side=8)
    x = image
    for i, stride in enumerate((1, 1, 2)):
        x = convolved(x, side["hint"]["0"]["convs"][str(i)], stride)
        x = x * jax.nn.sigmoid(x)
    hint = convolved(x, side["hint"]["0"]["out"])
    linear = [side["out"][str(n)] for n in range(len(side["out"]))]

    @jit
    def by_hand(params, copied):
        with taps.record("condition", "embed") as seen:
            alone = plain(params, X, T, LABELS)
        with taps.record("condition", "embed") as own:
            plain(copied, X, T, LABELS)
        network, copy = merged(make, params), merged(make, copied)
        skips, h = down(network, seen["embed"], seen["condition"])
        added, middle = down(copy, own["embed"] + hint, own["condition"])
        h, taken = h + middle @ linear[-1]["kernel"] + linear[-1]["bias"], 0
        for stage, block in zip(network.stages[2], network.decoder, strict=True):
            if stage.joined:
                skip = skips.pop() + added.pop() @ linear[taken]["kernel"] + linear[taken]["bias"]
                h = mp_concatenate(h, skip, 0.5) if name == "edm2" else jnp.concatenate([h, skip], axis=-1)
                taken += 1
            h = block(h, seen["condition"])
        assert taken == len(linear) - 1 > 0
        return network.final(h, params["gain"] if name == "edm2" else seen["condition"]), alone

    y, alone = by_hand(params, {**params, **side["side"]})
    out = jit(lambda p: apply(p, X, T, {"image": image, "cond": LABELS}))(side)
    np.testing.assert_allclose(out, y, atol=2e-5 * np.abs(y).max())
    assert np.abs(y - alone).max() > 1e-2 * np.abs(y).max()


@pytest.mark.slow
def test_beside_a_u_net_all_learns_but_the_trunk_and_rows_do_not_mix(u_trunk, noise, jit):
    name, make, _, params = u_trunk
    apply, side = attach(make, params, channels=2, key=jax.random.key(1))
    side = noise(side, seed=3)
    told = {**WORDS, "cond": LABELS} if name == "adm" else {"cond": LABELS}
    value = jit(jax.grad(lambda p, image: (apply(p, X, T, {**told, "image": image}) ** 2).sum(), argnums=(0, 1)))
    grads, of_image = value(side, IMAGE)
    assert jax.tree.structure(grads) == jax.tree.structure(side)
    assert set(grads) == {"side", "hint", "out"}
    fixed = ("frequencies", "phases")  # random waves of the time, which never learn
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        assert (np.abs(g).max() > 0) != (path[-1].key in fixed), path
    assert np.abs(of_image).max(axis=(1, 2, 3)).min() > 0
    run = jit(lambda image: apply(side, X, T, {**told, "image": image}))
    out, other = run(IMAGE), run(np.concatenate([IMAGE[:1] + 1, IMAGE[1:]]))
    np.testing.assert_array_equal(out[1:], other[1:])
    assert np.abs(out[0] - other[0]).max() > 1e-3 * np.abs(out).max()


@pytest.mark.slow
def test_beside_ncsnpp_what_is_fed_in_again_goes_along(noise, jit):
    """The copy as a whole network gives the skip connections: behind what is fed in at the lower resolution."""
    make = functools.partial(u_shaped, "ncsn++")
    init, plain = functional_init(make)
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    apply, side = attach(make, params, channels=2, key=jax.random.key(1))
    side = noise(side, seed=3)
    names = [f"skip/{n}" for n in range(4)] + ["middle/1"]

    @jit
    def by_hand(params, side):
        hinted = {"embed": lambda h: h + _stem(side["hint"]["0"], IMAGE)}
        with taps.override(hinted), taps.record(*names) as seen:
            plain({**params, **side["side"]}, X, T, LABELS)
        add = lambda h, p, more: h + more @ p["kernel"] + p["bias"]
        added = {m: functools.partial(add, p=side["out"][str(n)], more=seen[m]) for n, m in enumerate(names)}
        with taps.override(added):
            return plain(params, X, T, LABELS)

    expected = by_hand(params, side)
    out = jit(lambda p: apply(p, X, T, COND))(side)
    np.testing.assert_allclose(out, expected, atol=2e-5 * np.abs(expected).max())


def _stem(p, image):
    x = convolved(image, p["convs"]["0"])
    return convolved(x * jax.nn.sigmoid(x), p["out"])


@pytest.mark.slow
def test_errors_beside_a_u_net(noise):
    make = functools.partial(u_shaped, "adm")
    init, _ = functional_init(make)
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    for options, blocks, message in (
        ({"image_channels": 1}, None, "must not be shown an image itself"),
        ({}, 1, "blocks=1: of a U-shaped network all on the way down are copied"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(functools.partial(make, **options), params, blocks=blocks, channels=2, key=jax.random.key(1))
    apply, side = attach(make, params, channels=2, stem=(4, 4), key=jax.random.key(1))
    with pytest.raises(ValueError, match=r"the image in cond has shape \(3, 4, 4, 2\); expected \(3, 8, 8, 2\)"):
        apply(side, X, T, {"image": IMAGE})
