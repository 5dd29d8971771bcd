"""The up-sampler against a loop over pairs of patches, and block by block against all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_networks import Weights, looking, put_cross

from ddjax import bind, grids, sample
from ddjax.denoisers import InfDiT, functional_init, taps
from ddjax.processes import Gaussian
from ddjax.schedules import VPCosine
from ddjax.sites import Sites
from ddjax.solvers import DDIM, Ancestral

SMALL = {"scale": 2, "patch": 2, "low_patch": 2, "block": 2, "width": 16, "depth": 3, "heads": 2, "image_channels": 1}
SHAPE, BATCH = (12, 8, 3), 2  # 3 x 2 blocks of 2 x 2 patches of 2 x 2 pixels
RNG = np.random.default_rng(1)
XT, T = RNG.normal(size=(BATCH, *SHAPE)).astype(np.float32), np.float32([0.2, 0.8])
LOW = RNG.normal(size=(BATCH, 6, 4, 1)).astype(np.float32)
WORDS, VALID = RNG.normal(size=(BATCH, 3, 5)).astype(np.float32), np.array([[1, 0, 1], [0, 0, 0]], bool)
TOLD = {"image": LOW, "sequence": WORDS, "valid": VALID}


def made(noise, shape=SHAPE, **options):
    init, apply = functional_init(lambda rngs: InfDiT(shape=shape, **{**SMALL, **options}, rngs=rngs))
    return apply, noise(jax.eval_shape(init, jax.random.key(0)))


def linear(p, x):
    return x @ np.asarray(p["kernel"], float) + np.asarray(p["bias"], float)


def norm(x, p=None):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x if p is None else x * np.asarray(p["scale"], float) + np.asarray(p.get("bias", 0), float)


def rotated(x, row, column):
    """One head's features: pairs (i, i + 2) of each half, turned by row or column times 1 and 1 / 100."""
    out = []
    for half, place in ((x[:4], row), (x[4:], column)):
        turned = (half[:2] + 1j * half[2:]) * np.exp(1j * place * np.array([1.0, 1e-2]))
        out += [turned.real, turned.imag]
    return np.concatenate(out)


def attended(q, keys, values):
    scores = np.array([q @ k for k in keys]) / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return weights @ np.array(values) / weights.sum()


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def cubic(image, scale):
    """Keys' kernel with a = -1/2, its weights renormalised at the edges."""

    def matrix(n):
        kernel = lambda d: np.where(
            d < 1, 1.5 * d**3 - 2.5 * d**2 + 1, np.where(d < 2, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2, 0)
        )
        at = (np.arange(n * scale) + 0.5) / scale - 0.5
        w = kernel(np.abs(at[:, None] - np.arange(n)))
        return w / w.sum(1, keepdims=True)

    rows, columns = matrix(image.shape[1]), matrix(image.shape[2])
    return np.einsum("ri,bijc,sj->brsc", rows, image, columns)


def by_definition(params, xt, low, c, scale=2, patch=2, low_patch=2, block=2, heads=2, width=16, look=None):
    """The network, one patch after the other."""
    batch, rows, columns = xt.shape[0], xt.shape[1] // patch, xt.shape[2] // patch
    cut = lambda x, i, j, p: x[:, i * p : i * p + p, j * p : j * p + p].reshape(batch, -1)
    big = cubic(low.astype(float), scale)
    h = {
        (i, j): linear(params["embed"], np.concatenate([cut(xt, i, j, patch), cut(big, i, j, patch)], -1))
        for i in range(rows)
        for j in range(columns)
    }
    place = lambda i, j: (i // block, j // block)
    directions, side = [(0, 0), (1, 1), (0, 1), (1, 0)], block * patch // (scale * low_patch)
    head = width // heads
    layers = [params["first"], *(params["stack"]["blocks"][str(i)] for i in range(len(params["stack"]["blocks"])))]
    for p in layers:
        told = np.split(linear(p["modulation"], c), 6, -1)
        a, own = p["attention"], {}
        for (i, j), x in h.items():
            qkv = linear(a["qkv"], norm(x) * (1 + told[1]) + told[0]).reshape(batch, heads, 3, head)
            q, k = (norm(qkv[:, :, n], a[name]) for n, name in ((0, "query_norm"), (1, "key_norm")))
            turn = lambda y, i=i, j=j: np.array([[rotated(y[b, m], i, j) for m in range(heads)] for b in range(batch)])
            own[i, j] = turn(q), turn(k), qkv[:, :, 2]
        new = {}
        for (i, j), x in h.items():
            seen = [
                (n, other)
                for n, (down, right) in enumerate(directions)
                for other in h
                if place(*other) == (place(i, j)[0] - down, place(i, j)[1] - right)
            ]
            y = np.zeros((batch, heads, head))
            for b in range(batch):
                for m in range(heads):
                    keys = [own[other][1][b, m] + np.asarray(a["direction"])[n, m] for n, other in seen]
                    y[b, m] = attended(own[i, j][0][b, m], keys, [own[other][2][b, m] for _, other in seen])
            new[i, j] = x + told[2] * linear(a["out"], y.reshape(batch, -1))
        if "nearby" in p:
            new = nearby(p["nearby"], params["low_embed"], new, low, block, low_patch, side, heads)
        if look is not None:
            w = Weights()
            put_cross(w, "", p["cross"], heads)
            new = {at: look(w, x[:, None])[:, 0] for at, x in new.items()}
        h = {
            at: x
            + told[5]
            * linear(
                p["mlp"]["down"], np.asarray(jax.nn.gelu(linear(p["mlp"]["up"], norm(x) * (1 + told[4]) + told[3])))
            )
            for at, x in new.items()
        }
    shift, scaled = np.split(linear(params["final"]["modulation"], c), 2, -1)
    out = np.zeros((batch, *xt.shape[1:3], 3))
    for (i, j), x in h.items():
        y = linear(params["final"]["out"], norm(x) * (1 + scaled) + shift)
        out[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = y.reshape(batch, patch, patch, 3)
    return out


def nearby(p, embed, h, low, block, low_patch, side, heads):
    batch, (rows, columns) = low.shape[0], (low.shape[1] // low_patch, low.shape[2] // low_patch)
    new = {}
    for (i, j), x in h.items():
        first = (i // block - 1) * side, (j // block - 1) * side
        entries = []
        for a in range(first[0], first[0] + 3 * side):
            for b in range(first[1], first[1] + 3 * side):
                if 0 <= a < rows and 0 <= b < columns:
                    piece = low[:, a * low_patch : (a + 1) * low_patch, b * low_patch : (b + 1) * low_patch]
                    entries.append(linear(embed, piece.reshape(batch, -1)))
                else:
                    entries.append(np.zeros_like(x))
        kv = linear(p["key_value"], np.stack(entries, 1)).reshape(batch, len(entries), heads, 2, -1)
        q = norm(linear(p["query"], norm(x)).reshape(batch, heads, -1), p["query_norm"])
        q = q + np.asarray(p["query_position"])[(i % block) * block + j % block]
        k = norm(kv[..., 0, :], p["key_norm"]) + np.asarray(p["key_position"])
        y = np.array([[attended(q[b, m], k[b, :, m], kv[b, :, m, 1]) for m in range(heads)] for b in range(batch)])
        new[i, j] = x + linear(p["out"], y.reshape(batch, -1))
    return new


@pytest.mark.slow
@pytest.mark.parametrize("words", [False, True])
def test_it_is_the_definition(words, noise, jit):
    apply, params = made(noise, context_width=5 * words)
    with taps.record("condition") as seen:
        out = apply(params, XT, T, TOLD if words else {"image": LOW})
    look = looking(WORDS, VALID, params["nothing"], 2) if words else None
    want = by_definition(params, XT, LOW, np.asarray(seen["condition"], float), look=look)
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.slow
def test_every_parameter_learns_and_bfloat16_runs(noise, jit):
    apply, params = made(noise)
    grads = jit(jax.grad(lambda p: (apply(p, XT, T, {"image": LOW}, train=True) ** 2).mean()))(params)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 1e-7, path
    out, half = apply(params, XT, T, {"image": LOW}), made(noise, dtype=jnp.bfloat16)[0](params, XT, T, {"image": LOW})
    turn = made(noise, dtype=jnp.bfloat16, in_turn=True)[0](params, XT, T, {"image": LOW})
    rms = lambda x: np.sqrt(np.square(np.asarray(x, float)).mean())
    assert half.dtype == jnp.float32
    assert rms(half - out) < 0.1 * rms(out)
    assert rms(half - turn) < 0.05 * rms(out)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_block_by_block_it_is_the_same(noise, jit, scan):
    whole, params = made(noise, context_width=5)
    turn, _ = made(noise, context_width=5, in_turn=True, scan=scan)
    own = params
    if scan:
        from ddjax.denoisers import stack_blocks

        own = stack_blocks(params)
    for cond in (TOLD, None):
        want = jit(whole)(params, XT, T, cond)
        out = jit(turn)(own, XT, T, cond)
        np.testing.assert_allclose(out, want, rtol=0, atol=2e-5 * np.abs(want).max())
    # In training all at once, whatever was asked for.
    train = turn(own, XT, T, {"image": LOW}, train=True)
    np.testing.assert_allclose(train, whole(params, XT, T, {"image": LOW}), atol=1e-4)


@pytest.mark.slow
def test_a_patch_depends_on_its_past_and_on_the_image_around(noise, jit):
    """Unidirectional: nothing to the right or below matters, but in the low-resolution image next to the block."""
    shape = (16, 16, 3)
    apply, params = made(noise, shape)
    xt, low = RNG.normal(size=(1, *shape)).astype(np.float32), RNG.normal(size=(1, 8, 8, 1)).astype(np.float32)
    out = jit(apply)(params, xt, T[:1], {"image": low})
    later = xt.copy()
    later[:, 8:, 4:] += 1.0  # blocks of the third row and below, from the second column on
    changed = np.abs(jit(apply)(params, later, T[:1], {"image": low}) - out).max(-1)[0]
    assert (changed[:8] == 0).all()
    assert (changed[8:, :4] == 0).all()
    assert (changed[8:, 4:] > 0).all()


@pytest.mark.slow
def test_the_same_parameters_are_for_any_size_and_memory_is_that_of_a_row(noise):
    """Compiled temporary memory: all at once it grows with the rows; in turn by no more than images of the pixels."""
    sizes = {"width": 64, "depth": 4, "heads": 4, "block": 4, "scan": True}
    parameters, memory = None, {}
    for in_turn in (False, True):
        for rows in (4, 16):
            shape = (8 * rows, 32, 3)
            init, apply = functional_init(
                lambda rngs, shape=shape, in_turn=in_turn: InfDiT(
                    shape=shape, **{**SMALL, **sizes}, in_turn=in_turn, rngs=rngs
                )
            )
            shapes = jax.eval_shape(init, jax.random.key(0))
            parameters = shapes if parameters is None else parameters
            assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, parameters)
            xt = jax.ShapeDtypeStruct((1, *shape), np.float32)
            low = jax.ShapeDtypeStruct((1, shape[0] // 2, 16, 1), np.float32)
            lowered = jax.jit(apply).lower(shapes, xt, jax.ShapeDtypeStruct((1,), np.float32), {"image": low})
            memory[in_turn, rows] = lowered.compile().memory_analysis().temp_size_in_bytes
    pixels = 4 * 8 * 12 * 32 * (3 + 1)  # twelve rows of blocks more, of floats of state and image
    assert memory[False, 16] > 3 * memory[False, 4]
    assert memory[True, 16] - memory[True, 4] < 8 * pixels
    assert memory[True, 16] < memory[False, 16] / 4


@pytest.mark.slow
def test_it_samples_under_any_solver_and_says_its_sites(noise):
    process = Gaussian(VPCosine())
    times = grids.uniform(4)
    for make in (DDIM, Ancestral):
        drawn = []
        for in_turn in (False, True):
            apply, params = made(noise, in_turn=in_turn)
            denoise = bind(apply, jax.tree.map(lambda x: 0.3 * x, params), process, "v")
            options = {"shape": (BATCH, *SHAPE), "solver": make(process), "times": times, "cond": {"image": LOW}}
            drawn.append(sample(jax.random.key(0), denoise, process, **options).x0)
        assert np.isfinite(drawn[0]).all()
        np.testing.assert_allclose(*drawn, atol=1e-3)
    sites = Sites.of(denoise, XT, T, {"image": LOW})
    assert sites.grid == (6, 4, 1)
    with pytest.raises(ValueError, match="the blocks run in turn"), taps.record():
        denoise(XT, jnp.asarray(T), {"image": LOW})


def test_errors():
    for shape, options, message in (
        ((12, 10, 3), {}, "do not divide the image's sides"),
        (SHAPE, {"scale": 3}, "not whole patches of 2 pixels of an image 3 times"),
        (SHAPE, {"depth": 1}, "expected two layers or more"),
        (SHAPE, {"heads": 8}, "heads of a multiple of 4 features"),
    ):
        with pytest.raises(ValueError, match=message):
            functional_init(
                lambda rngs, shape=shape, options=options: InfDiT(shape=shape, **{**SMALL, **options}, rngs=rngs)
            )
    init, apply = functional_init(lambda rngs: InfDiT(shape=SHAPE, **SMALL, rngs=rngs))
    with pytest.raises(ValueError, match=r"of the low resolution"):
        jax.eval_shape(apply, jax.eval_shape(init, jax.random.key(0)), XT, T, {"image": XT})
