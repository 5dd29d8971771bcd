"""Each optimizer against its formulas in NumPy, and what is common to all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddjax.denoisers import EDM2, MultiResolution, UNet, functional_init, unstack_blocks
from ddjax.training.optimizers import adamw, decays, matrices, optimizer, projected

RATE, DECAY = 0.1, 0.3
RNG = np.random.default_rng(0)
# In no block: "head"; a matrix and a vector of two layers, stacked as scanned blocks are; large enough to be factored.
PARAMS = {
    "head": {"kernel": RNG.normal(size=(130, 128))},
    "stack": {
        "blocks": {"attention": {"out": {"kernel": RNG.normal(size=(2, 6, 4)), "bias": RNG.normal(size=(2, 4))}}}
    },
}
GRADS = [jax.tree.map(lambda p: RNG.normal(size=p.shape), PARAMS) for _ in range(3)]


def run(name, params=PARAMS, grads=GRADS, **options):
    """Parameters and state after the steps."""
    made = optimizer(name, RATE, 100, schedule="constant", **{"weight_decay": DECAY, **options})
    params = jax.tree.map(jnp.asarray, params)
    state, update = made.init(params), jax.jit(made.update)
    for g in grads:
        updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def decayed(p):
    return DECAY * p if p.ndim >= 2 and p.shape != (2, 4) else 0.0  # not the two layers' vectors


def adam(p, grads, nesterov=False, b1=0.9, b2=0.999, eps=1e-8):
    m = v = np.zeros_like(p)
    for n, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        mean = b1 * m / (1 - b1 ** (n + 1)) + (1 - b1) * g / (1 - b1**n) if nesterov else m / (1 - b1**n)
        p = p - RATE * (mean / (np.sqrt(v / (1 - b2**n)) + eps) + decayed(p))
    return p


def lion(p, grads, b1=0.9, b2=0.99):
    m = np.zeros_like(p)
    for g in grads:
        p = p - RATE * (np.sign(b1 * m + (1 - b1) * g) + decayed(p))
        m = b2 * m + (1 - b2) * g
    return p


def adafactor(p, grads):
    rows, columns, v = 0.0, 0.0, 0.0
    for n, g in enumerate(grads, 1):
        b = 1 - n**-0.8
        if p.ndim == 2 and min(p.shape) >= 128:
            rows, columns = (b * s + (1 - b) * (g**2 + 1e-30).mean(axis=a) for s, a in ((rows, 1), (columns, 0)))
            u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        else:
            v = b * v + (1 - b) * (g**2 + 1e-30)
            u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt((u**2).mean()))
        u = u * max(1e-3, np.sqrt((p**2).mean()))
        p = p - RATE * (u + decayed(p))
    return p


def muon(p, grads, beta=0.95):
    """Of one matrix; optax's momentum is an average, whose scale the orthogonalisation forgets."""
    m = np.zeros_like(p)
    for n, g in enumerate(grads, 1):
        m = beta * m + (1 - beta) * g
        x = beta * m / (1 - beta ** (n + 1)) + (1 - beta) * g / (1 - beta**n)  # Nesterov, without bias
        x = x.T if p.shape[0] > p.shape[1] else x
        x = x / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if p.shape[0] > p.shape[1] else x
        p = p - RATE * (0.2 * np.sqrt(max(p.shape)) * x + decayed(p))
    return p


def expected(name, path, p, grads):
    if name == "muon" and path[0].key == "stack" and p.ndim == 3:
        return np.stack([muon(p[i], [g[i] for g in grads]) for i in range(len(p))])
    return (
        adam(p, grads, nesterov=True)
        if name == "muon"
        else {"adamw": adam, "lion": lion, "adafactor": adafactor}[name](p, grads)
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_updates_are_the_formulas(x64, name):
    got, _ = run(name, **{"b2": 0.99} if name == "lion" else {})
    want = jax.tree_util.tree_map_with_path(lambda path, p, *g: expected(name, path, p, g), PARAMS, *GRADS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: MultiResolution(shape=(4, 4, 1), widths=(8, 4), depths=(5, 3), heads=2, num_classes=2, **o),
        lambda **o: EDM2(shape=(4, 4, 1), width=8, multipliers=(1, 2), blocks=3, head_width=8, num_classes=2, **o),
        lambda **o: UNet(shape=(4, 4, 1), width=32, multipliers=(1,), blocks=2, **o),
    ],
)
def test_a_scanned_network_decays_as_it_does_unrolled(make):
    """No vectors of layers, such as the slopes and offsets of times (qihao067/DiMR, utils.py: without decay)."""
    plain, scanned = (
        jax.eval_shape(functional_init(lambda rngs, s=s: make(scan=s, rngs=rngs))[0], jax.random.key(0))
        for s in (False, True)
    )
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, bool), scanned)
    masks = jax.tree.map(lambda mask, zero: mask | zero, decays({"network": scanned})["network"], zeros)
    masks = unstack_blocks(masks)
    found = jax.tree.map(lambda mask: bool(mask.all()), masks)
    assert found == decays(plain)
    for path, decay in jax.tree_util.tree_leaves_with_path(found):
        assert decay == (path[-1].key in ("kernel", "labels", "position", "table")), path


def test_muon_takes_the_matrices_of_blocks_alone():
    place = optax.contrib.MuonDimensionNumbers(-2, -1)
    kernel, bias = np.zeros((2, 3)), np.zeros(3)
    tree = {
        "tokens": {"table": kernel},
        "stack": {"blocks": {"0": {"mlp": {"up": np.zeros((4, 2, 3)), "router": {"kernel": kernel}}, "bias": bias}}},
    }
    found = matrices({"network": tree})["network"]
    assert found["tokens"]["table"] is None
    assert found["stack"]["blocks"]["0"] == {"mlp": {"up": place, "router": {"kernel": place}}, "bias": None}
    # Networks of several stacks; a depthwise convolution is no matrix.
    square, depthwise = np.zeros((2, 2)), np.zeros((3, 3, 1, 2))
    block = {"inner": {"kernel": square}, "conv": {"kernel": depthwise}, "depthwise": {"kernel": np.zeros((9, 2))}}
    for tree in ({"0": {"down": {"blocks": {"0": block}}}}, {"up": {"blocks": block}}, {"middle": block}):
        flat, _ = jax.tree_util.tree_flatten_with_path(
            matrices({"stack": tree}), is_leaf=lambda x: x is None or x == place
        )
        assert {path[-2].key: leaf for path, leaf in flat} == {"inner": place, "conv": None, "depthwise": None}


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_first_moments_in_bfloat16_and_no_others(name):
    params = jax.tree.map(np.float32, PARAMS)
    whole, _ = run(name, params)
    half, state = run(name, params, moments="bfloat16")
    paths = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    assert {d for p, d in paths.items() if ".mu" in p} == {jnp.dtype("bfloat16")}
    assert {d for p, d in paths.items() if ".nu" in p} <= {jnp.dtype("float32")}
    moved = jax.tree.map(lambda a, b, p: np.abs(a - b).max() / np.abs(a - p).max(), whole, half, params)
    assert max(jax.tree.leaves(moved)) < (2.1 if name == "lion" else 0.1)  # a sign may turn


def test_a_second_moment_in_bfloat16_would_stand_still():
    """Why it is not offered: it should fall to 0.999 of itself, and rounds back."""
    v = jnp.asarray(1.0, jnp.bfloat16)
    assert jnp.bfloat16(0.999) * v == v


def test_groups_scale_learning_rates_and_clipping_comes_before(x64):
    groups = [["out/bias$", 0.0], ["stack", 0.5]]
    got, _ = run("adamw", clip=1.0, groups=groups, grads=GRADS[:1])
    base, _ = run("adamw", clip=1.0, grads=GRADS[:1])
    moved, whole = (jax.tree.map(lambda a, b: np.asarray(a) - b, tree, PARAMS) for tree in (got, base))
    out = lambda tree: tree["stack"]["blocks"]["attention"]["out"]
    np.testing.assert_allclose(moved["head"]["kernel"], whole["head"]["kernel"], atol=1e-12)
    np.testing.assert_allclose(out(moved)["kernel"], 0.5 * out(whole)["kernel"], atol=1e-12)
    assert (out(moved)["bias"] == 0).all()


def test_what_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match="unknown optimizer 'adam'; it is one of adamw"):
        run("adam")
    with pytest.raises(ValueError, match="float32 or bfloat16, got 'float16'"):
        run("adamw", moments="float16")
    with pytest.raises(ValueError, match=r"no parameter has 'haed' in its path .*head/kernel"):
        run("adamw", groups=[["haed", 2.0]])
    with pytest.raises(ValueError, match="pairs of a regular expression and a factor"):
        run("adamw", groups=["head"])


def test_adamw_alone_is_what_it_was():
    """Its state is optax's own where there is nothing to chain: checkpoints keep their names."""
    params = {"w": jnp.ones(3)}
    theirs = optax.adamw(lambda n: 0.1, mask=decays)
    assert jax.tree.structure(adamw(0.1, 3).init(params)) == jax.tree.structure(theirs.init(params))


def test_a_projection_comes_after_each_update_and_moments_do_not_see_it(x64):
    """Parameters on the unit sphere; the moments are those of the same gradients without it."""
    unit = lambda tree: jax.tree.map(lambda p: p / jnp.sqrt((p * p).sum()), tree)
    new, state = run("adamw", project=unit, weight_decay=0.0)
    plain, other = run("adamw", weight_decay=0.0)
    jax.tree.map(np.testing.assert_array_equal, state[0][0].mu, other[0].mu)
    own, inner = jax.tree.map(jnp.asarray, PARAMS), optimizer("adamw", RATE, 100, schedule="constant")
    inner_state = inner.init(own)
    for g in GRADS:
        updates, inner_state = inner.update(g, inner_state, own)
        own = unit(optax.apply_updates(own, updates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), new, own)
    for leaf, free in zip(jax.tree.leaves(new), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose((leaf**2).sum(), 1, rtol=1e-12)
        assert abs((free**2).sum() - 1) > 0.1
    with pytest.raises(ValueError, match="a projection is of parameters"):
        projected(unit).update(GRADS[0], projected(unit).init(PARAMS))
