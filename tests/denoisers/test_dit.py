import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax import taps
from ddjax.denoisers import DiT, functional_init, stack_blocks, unstack_blocks
from ddjax.types import SoftTokens

SMALL = {"shape": (4, 6, 2), "patch": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 3}
DISCRETE = {**SMALL, "symbols_in": 6, "symbols_out": 5}


def maker(**config):
    return lambda rngs: DiT(**config, rngs=rngs)


def inputs(batch=5, discrete=True):
    rng = np.random.default_rng(1)
    shape = (batch, *SMALL["shape"])
    xt = rng.integers(0, 6, shape, np.int32) if discrete else rng.normal(size=shape).astype(np.float32)
    return xt, rng.uniform(size=batch).astype(np.float32), rng.integers(0, 4, batch, np.int32)


def largest(a, b=0.0):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


@pytest.fixture(scope="module")
def net(build):
    return build(maker(**DISCRETE))


@pytest.mark.parametrize("discrete", [True, False])
def test_shapes_and_zero_at_initialisation(discrete, jit):
    init, apply = functional_init(maker(**(DISCRETE if discrete else SMALL)))
    out = jit(lambda key, *args: apply(init(key), *args))(jax.random.key(0), *inputs(discrete=discrete))
    assert out.shape == ((5, 4, 6, 2, 5) if discrete else (5, 4, 6, 2))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)


@pytest.mark.slow
def test_rotary_positions_are_rows_and_columns(build):
    """The weights of the first block's attention, pair by pair; and no table of positions is left."""
    run, params = build(maker(**SMALL, rotary=True))
    assert "position" not in params
    xt, t, labels = inputs(2, discrete=False)
    names = ("embed", "condition", "block/0/attention/weights")
    _, apply = functional_init(maker(**SMALL, rotary=True))
    with taps.record(*names) as seen:
        out = apply(params, xt, t, labels)
    np.testing.assert_allclose(out, run(params, xt, t, labels), rtol=1e-4, atol=1e-5)
    h, c, weights = (np.asarray(seen[name], np.float64) for name in names)
    block = params["stack"]["blocks"]["0"]
    patches = xt.reshape(2, 2, 2, 3, 2, 2).swapaxes(2, 3).reshape(2, 6, 8)
    np.testing.assert_allclose(h, patches @ params["embed"]["kernel"] + params["embed"]["bias"], atol=1e-5)
    shift, scale = np.split(c @ block["modulation"]["kernel"] + block["modulation"]["bias"], 6, -1)[:2]
    x = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    x = x * (1 + scale[:, None]) + shift[:, None]
    q, k = np.moveaxis((x @ block["attention"]["qkv"]["kernel"]).reshape(2, 6, 2, 3, 8), 3, 0)[:2]
    turned = []
    for y in (q, k):  # (batch, patch, head, feature): features 0 and 2, 1 and 3 by the row, 4 and 6, 5 and 7 the column
        rows, columns = np.divmod(np.arange(6), 3)
        angles = np.stack([place[:, None] * [1.0, 1e-2] for place in (rows, columns)], 1)[:, None]
        y = y.reshape(2, 6, 2, 2, 2, 2)
        z = (y[..., 0, :] + 1j * y[..., 1, :]) * np.exp(1j * angles)
        turned.append(z.reshape(2, 6, 2, 4))
    scores = np.einsum("bqhi,bkhi->bhqk", turned[0], turned[1].conj()).real / np.sqrt(8)
    wanted = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(weights, wanted / wanted.sum(-1, keepdims=True), atol=1e-5)
    assert np.ptp(weights) > 0.1


@pytest.mark.slow
def test_rotary_positions_of_a_sequence(build):
    """Of equal patches, attention depends on the difference of their places only."""
    config = {**SMALL, "shape": (8, 2), "patch": 1, "rotary": True}
    _, params = build(maker(**config))
    with taps.record("block/0/attention/weights") as seen:
        functional_init(maker(**config))[1](params, np.ones((1, 8, 2), np.float32), np.float32([0.3]), np.int32([1]))
    weights = np.asarray(seen["block/0/attention/weights"], np.float64)[0]
    scores = np.log(weights) - np.log(np.diagonal(weights, axis1=1, axis2=2))[..., None]
    for offset in range(-7, 8):
        assert np.ptp(np.diagonal(scores, offset, 1, 2), axis=1).max() < 1e-4
    assert np.abs(scores[:, 0, 3] - scores[:, 3, 0]).min() > 1e-3  # left is not right


def test_out_channels():
    init, apply = functional_init(maker(**SMALL, out_channels=4))
    params = jax.eval_shape(init, jax.random.key(0))
    assert jax.eval_shape(apply, params, *inputs(discrete=False)).shape == (5, 4, 6, 4)


def test_example_does_not_depend_on_its_batch(net):
    run, params = net
    xt, t, cond = inputs()
    whole = run(params, xt, t, cond)
    for i in (0, 3):
        one = run(params, xt[i : i + 1], t[i : i + 1], cond[i : i + 1])[0]
        np.testing.assert_allclose(one, whole[i], rtol=1e-4, atol=1e-5)
    assert largest(whole[0], whole[3]) > 0.1


@pytest.mark.parametrize("config", [DISCRETE, SMALL, {**DISCRETE, "time": False, "num_classes": 0}])
def test_every_parameter_gets_a_gradient(config, jit, noise):
    init, apply = functional_init(maker(**{**config, "depth": 1}))
    xt, t, cond = inputs(discrete="symbols_in" in config)
    cond = cond if config["num_classes"] else None
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    target = noise(jax.eval_shape(apply, params, xt, t, cond), scale=1)
    grads = jit(jax.grad(lambda p: ((apply(p, xt, t, cond) - target) ** 2).sum()))(params)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        assert largest(g) > 1e-4, path


@pytest.mark.parametrize("discrete", [True, False])
def test_a_site_is_embedded_in_its_own_patch(discrete, build):
    # One site changed, no attention (its output layer is zero): only that site's patch may change.
    run, params = build(maker(**(DISCRETE if discrete else SMALL)))
    for block in params["stack"]["blocks"].values():
        block["attention"]["out"]["kernel"][...] = 0
    xt, t, cond = inputs(discrete=discrete)
    changed = xt.copy()
    changed[0, 1, 4, 1] = (changed[0, 1, 4, 1] + 1) % 6
    moved = np.abs(run(params, changed, t, cond) - run(params, xt, t, cond))[0].reshape(4, 6, -1).max(-1)
    assert (moved[0:2, 4:6] > 1e-3).all()
    moved[0:2, 4:6] = 0
    assert (moved == 0).all()


def test_output_sites_are_read_in_their_own_order(build):
    # A network that copies its input patch, weights set by hand, returns the image.
    run, params = build(maker(shape=(4, 6, 2), patch=2, width=8, depth=1, heads=1))
    params = jax.tree.map(np.zeros_like, params)
    params["embed"]["kernel"] = params["final"]["out"]["kernel"] = np.eye(8, dtype=np.float32)
    xt = np.random.default_rng(0).normal(size=(3, 4, 6, 2)).astype(np.float32)
    patches = xt.reshape(3, 2, 2, 3, 2, 2)  # rows, patch, columns, patch, channels
    mean, var = (f((2, 4, 5), keepdims=True) for f in (patches.mean, patches.var))
    expected = ((patches - mean) / np.sqrt(var + 1e-6)).reshape(xt.shape)
    np.testing.assert_allclose(run(params, xt, 0.5), expected, atol=1e-5)


def test_channels_have_their_own_tables(net):
    run, params = net
    xt, t, cond = inputs()
    table = params["tokens"]["table"].copy()
    table[6:] = 0  # the second channel's rows
    other = {**params, "tokens": {"table": table}}
    assert largest(run(other, xt, t, cond), run(params, xt, t, cond)) > 1e-2
    constant = xt.copy()
    constant[..., 1] = 0
    np.testing.assert_array_equal(run(other, xt, t, cond), run(other, constant, t, cond))


def test_labels_and_null_label(net):
    run, params = net
    xt, t, _ = inputs()
    out = [run(params, xt, t, np.full(5, k, np.int32)) for k in range(4)]
    for i in range(4):
        for j in range(i):
            assert largest(out[i], out[j]) > 1e-2
    np.testing.assert_allclose(run(params, xt, t, None), out[3], rtol=1e-5, atol=1e-6)


def test_time_matters_and_a_scalar_is_every_examples_time(net):
    run, params = net
    xt, t, cond = inputs()
    assert largest(run(params, xt, t, cond), run(params, xt, t + np.float32(0.01), cond)) > 1e-2
    same = run(params, xt, np.full(5, 0.3, np.float32), cond)
    np.testing.assert_allclose(run(params, xt, 0.3, cond), same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_untimed_network_ignores_t(num_classes, build):
    run, params = build(maker(**{**DISCRETE, "num_classes": num_classes, "time": False}))
    xt, t, cond = inputs()
    cond = cond if num_classes else None
    out = run(params, xt, t, cond)
    np.testing.assert_array_equal(out, run(params, xt, 1 - t, cond))
    assert largest(out, run(params, xt, None, cond)) < 1e-5
    assert largest(out) > 0.1


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16(scan, net, build):
    run, params = build(maker(**DISCRETE, dtype=jnp.bfloat16, scan=scan))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    exact_run, exact_params = net
    args = inputs()
    out = run(stack_blocks(exact_params) if scan else exact_params, *args)
    exact = exact_run(exact_params, *args)
    assert out.dtype == jnp.float32
    assert 1e-4 < largest(out, exact) / largest(exact) < 0.1  # it is bfloat16, and it is the same network


def test_scan_equals_unrolled(net, build):
    run, params = net
    scanned, _ = build(maker(**DISCRETE, scan=True))
    args = inputs()
    np.testing.assert_allclose(scanned(stack_blocks(params), *args), run(params, *args), rtol=1e-4, atol=1e-5)
    again = unstack_blocks(stack_blocks(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
def test_scan_and_unrolled_start_from_the_same_weights(jit):
    inits = (functional_init(maker(**DISCRETE, scan=scan)).init for scan in (False, True))
    unrolled, scanned = (jit(init)(jax.random.key(0)) for init in inits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stack_blocks(unrolled), scanned)


def test_remat_and_scan_have_the_same_gradients_and_remat_recomputes(net, jit):
    xt, t, cond = inputs()
    grads, products = {}, {}
    for scan, remat in ((False, False), (True, False), (False, True), (True, True)):
        _, apply = functional_init(maker(**{**DISCRETE, "dropout": 0.2}, scan=scan, remat=remat))
        params = stack_blocks(net[1]) if scan else net[1]

        def loss(p, apply=apply):
            return (apply(p, xt, t, cond, rng=jax.random.key(5), train=True) ** 2).mean()

        products[scan, remat] = str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")
        if (scan, remat) != (True, False):
            grad = jit(jax.grad(loss))(params)
            grads[scan, remat] = grad if scan else stack_blocks(grad)
    for other in ((False, True), (True, True)):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        jax.tree.map(close, grads[False, False], grads[other])
    assert products[False, True] > products[False, False]
    assert products[True, True] > products[True, False]
    assert min(map(largest, jax.tree.leaves(grads[False, False]))) > 1e-4


def test_every_attention_implementation_is_the_same_network(net, build):
    run, params = net
    args = inputs()
    xla, _ = build(maker(**DISCRETE, attention="xla"))
    np.testing.assert_allclose(xla(params, *args), run(params, *args), rtol=1e-4, atol=1e-4)


def test_a_token_or_label_out_of_range_is_loud(net):
    run, params = net
    xt, t, cond = inputs()
    for token in (6, -1):
        wrong = xt.copy()
        wrong[0, 0, 0, 0] = token
        out = np.asarray(run(params, wrong, t, cond))
        assert np.isnan(out[0]).any()
        assert np.isfinite(out[1:]).all()
    assert np.isnan(run(params, xt, t, np.array([4, 0, 0, 0, 0], np.int32))[0]).all()


def test_small_integer_tokens_do_not_overflow(build):
    config = {"shape": (2, 2, 3), "symbols_in": 256, "symbols_out": 2, "width": 8, "depth": 1, "heads": 1}
    run, params = build(maker(**config))
    xt = np.full((1, 2, 2, 3), 255, np.uint8)
    np.testing.assert_allclose(run(params, xt, 0.5), run(params, xt.astype(np.int32), 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, "patch=3 does not divide"),
        ({"heads": 3}, "heads=3 does not divide width=16"),
        ({"shape": (4,)}, "expected .height, width, channels."),
        ({"symbols_out": None}, "give both for a discrete state"),
        ({"symbols_in": None}, "neither for a continuous one"),
        ({"out_channels": 3}, "out_channels=3 is for a continuous state"),
        ({"symbols_in": None, "symbols_out": None, "embed_width": 8}, "embed_width=8 is for a discrete"),
        ({"kinds": [0] * 6, "relative": True}, "go without relative or rotary places"),
        ({"kinds": [0] * 6, "rotary": True}, "go without relative or rotary places"),
        ({"rotary": True, "width": 12}, "width / heads = 6 must be even, and divide by 4 on a grid"),
        ({"rotary": True, "merge": (4, 2, 3)}, "without relative and without rotary positions"),
        ({"rotary": True, "shape": (2, 2, 2, 2)}, r"not of a grid \(1, 1, 1\)"),
        ({"depth": 0}, "at least one block"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"attention": "flash"}, "attention='flash'"),
        ({"attention": "cudnn"}, "needs bfloat16 or float16, not float32"),
        ({"attention": "cudnn", "dtype": jnp.bfloat16, "width": 24}, "multiple of 8 up to 128, not 12"),
    ],
)
def test_configuration_errors(change, message):
    with pytest.raises(ValueError, match=message):
        functional_init(maker(**{**DISCRETE, **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xt": np.zeros((5, 4, 6), np.int32)}, r"3 axes, shape \(5, 4, 6\); expected 4"),
        ({"xt": np.zeros((5, 6, 4, 2), np.int32)}, r"shape \(5, 6, 4, 2\); the network was built for"),
        ({"xt": np.zeros((5, 4, 6, 2))}, "takes integer tokens"),
        ({"xt": np.zeros((5, 4, 6, 2), bool)}, "takes integer tokens"),
        ({"t": np.zeros((5, 4, 6, 2))}, "for each site is not supported"),
        ({"t": np.zeros((4,))}, r"t has shape \(4,\); expected \(5,\)"),
        ({"t": None}, "t is None but"),
        ({"cond": np.zeros((5,))}, r"float(32|64)\): expected int labels of shape \(5,\)"),
        ({"cond": np.zeros((4,), np.int32)}, r"shape \(4,\), int32\): expected int labels"),
    ],
)
def test_call_errors(change, message, net):
    run, params = net
    arguments = dict(zip(("xt", "t", "cond"), inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        run(params, **arguments)


def test_call_errors_of_other_networks(build):
    run, params = build(maker(**SMALL))
    with pytest.raises(ValueError, match="takes floats: set symbols_in"):
        run(params, *inputs())
    run, params = build(maker(**{**SMALL, "num_classes": 0}))
    with pytest.raises(ValueError, match="the network has no labels"):
        run(params, *inputs(discrete=False))
    run, params = build(maker(**SMALL, attention="cudnn", dtype=jnp.bfloat16))
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="needs a GPU and the default backend is 'cpu'"):
            run(params, *inputs(discrete=False))


def test_soft_tokens_of_an_image_are_expected_embeddings(net):
    """Each channel from its own table: certain ones are the tokens themselves, and a few stand for all."""
    run, params = net
    xt, t, cond = inputs()
    hard = run(params, xt, t, cond)
    np.testing.assert_allclose(run(params, np.eye(6, dtype=np.float32)[xt], t, cond), hard, atol=1e-5)
    p = np.random.default_rng(0).dirichlet(np.ones(6), xt.shape).astype(np.float32)
    order = np.argsort(p)
    few = SoftTokens(order, np.take_along_axis(p, order, -1))
    expected = run(params, p, t, cond)
    assert largest(expected, hard) > 0.01
    np.testing.assert_allclose(run(params, few, t, cond), expected, atol=1e-5)


def test_tokens_as_bits_have_no_table_and_a_mask_of_zeros(jit, noise):
    """The first layer sees the signs of NumPy's bits: negating a bit's weights is negating the bit."""
    config = {**SMALL, "symbols_in": 9, "symbols_out": 8, "bits": 3}
    init, apply = functional_init(maker(**config))
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    assert "tokens" not in params
    xt, t, cond = inputs()
    xt = np.random.default_rng(3).integers(0, 9, xt.shape, np.int32)
    run = jit(apply)
    first = run(params, xt, t, cond)
    kernel = params["embed"]["kernel"]
    assert kernel.shape == (2 * 2 * 2 * 3, 16)  # sites of a patch, 3 bits each
    flipped = {**params, "embed": {**params["embed"], "kernel": kernel * np.tile([1.0, -1.0, 1.0], 8)[:, None]}}
    np.testing.assert_allclose(run(flipped, np.where(xt < 8, xt ^ 2, xt), t, cond), first, atol=1e-5)
    assert largest(run(params, np.where(xt < 8, xt ^ 2, xt), t, cond), first) > 0.1
    masks = run(params, np.full_like(xt, 8), t, cond)
    silent = {**params, "embed": {**params["embed"], "kernel": 0 * kernel}}
    np.testing.assert_array_equal(masks, run(silent, xt, t, cond))
    soft = np.eye(9, dtype=np.float32)[xt]
    np.testing.assert_allclose(run(params, soft, t, cond), first, atol=1e-5)
    for wrong in ({"symbols_in": 10}, {"embed_width": 8}, {"bits": 4}):
        with pytest.raises(ValueError, match="is for 2\\*\\*bits symbols"):
            jax.eval_shape(functional_init(maker(**{**config, **wrong}))[0], jax.random.key(0))


def test_heads_see_only_what_is_related(build):
    """By the first block a patch has heard of those in one of its groups, and of no others."""
    relations = [[0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]]
    run, params = build(maker(**{**SMALL, "depth": 1, "patch": 2, "heads": 4, "relations": relations}))
    xt, t, cond = inputs(discrete=False)
    other = xt.copy()
    other[:, :2, :2] += 1.0  # the first patch; they come in rows of three
    changed = run(params, other, t, cond)
    moved = np.abs(changed - run(params, xt, t, cond)).max((0, 3)).reshape(2, 2, 3, 2).max((1, 3)).ravel() > 1e-6
    related = [any(labels[0] == labels[i] for labels in relations) for i in range(6)]
    np.testing.assert_array_equal(moved, related)
    assert not all(related)
    with pytest.raises(ValueError, match="a label for each of 6 patches"):
        maker(**{**SMALL, "patch": 2, "relations": [[0, 1]]})(nnx.Rngs(0))
