"""Neural diffusion processes: the published network, and what permutations do."""

import numpy as np
import numpy_networks
import pytest

from ddjax.denoisers import NeuralProcess, functional_init

SMALL = {"width": 8, "depth": 3, "heads": 2}
T = np.array([0.0625, 0.015625], np.float32)  # angles whose rounding does not count


def inputs(points=5, coordinates=3):
    rng = np.random.default_rng(1)
    y = rng.normal(size=(2, points)).astype(np.float32)
    return y, T, {"points": rng.normal(size=(2, points, coordinates)).astype(np.float32)}


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def by_definition(p, y, t, x):
    """Dutordoir et al. 2023 (vdutor/neural-diffusion-processes, bidimensional_attention_model.py)."""
    linear = lambda p, x: x @ np.asarray(p["kernel"], np.float64) + p.get("bias", 0.0)
    angles = 1000.0 * t[:, None] * np.exp(-np.log(1e4) / 3 * np.arange(4))
    c = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    def attended(p, which, y):  # the last axis but one
        qkv = linear(p["qkv"][which], y)
        qkv = qkv.reshape(*qkv.shape[:-1], 2, 3, 4)
        q, k, v = (np.moveaxis(qkv[..., i, :], -2, -3) for i in range(3))
        z = np.moveaxis(numpy_networks.softmax(q @ k.swapaxes(-1, -2) / 2.0) @ v, -3, -2)
        return linear(p["project"][which], z.reshape(*z.shape[:-2], 8))

    s = np.stack([x, np.broadcast_to(y[..., None], x.shape)], axis=-1)  # (batch, points, coordinates, 2)
    s, total = gelu(linear(p["embed"], s)), 0.0
    for i in range(3):
        own = p["stack"]["blocks"][str(i)]
        z = s + linear(own["time"], c)[:, None, None]
        points = attended(own, "points", z.swapaxes(1, 2)).swapaxes(1, 2)
        residual, skip = np.split(points + attended(own, "coordinates", z), 2, axis=-1)
        s, total = (s + gelu(residual)) / np.sqrt(2), total + gelu(skip)
    return linear(p["out"], gelu(linear(p["hidden"], total.mean(2) / np.sqrt(3))))[..., 0]


@pytest.fixture(scope="module")
def net(build):
    return build(lambda rngs: NeuralProcess(**SMALL, rngs=rngs))


def test_it_is_the_published_network(net):
    run, params = net
    y, t, cond = inputs()
    want = by_definition(params, y, t, cond["points"])
    np.testing.assert_allclose(run(params, y, t, cond), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_points_go_along_and_coordinates_do_not_count(net):
    run, params = net
    y, t, cond = inputs()
    out = np.asarray(run(params, y, t, cond))
    order, turned = [3, 0, 4, 1, 2], [2, 0, 1]
    permuted = run(params, y[:, order], t, {"points": cond["points"][:, order]})
    np.testing.assert_allclose(permuted, out[:, order], atol=2e-6 * np.abs(out).max())
    other = run(params, y, t, {"points": cond["points"][..., turned]})
    np.testing.assert_allclose(other, out, atol=2e-6 * np.abs(out).max())
    assert np.abs(run(params, y, t, {"points": cond["points"][:, order]}) - out).max() > 1e-2
    assert np.abs(run(params, y[:, order], t, cond) - out[:, order]).max() > 1e-2


def test_any_number_of_points_and_coordinates(net):
    run, params = net
    y, t, cond = inputs()
    np.testing.assert_array_equal(run(params, y, t, {**cond, "cond": None}), run(params, y, t, cond))
    assert run(params, *inputs(2, 1)).shape == (2, 2)


def test_what_cannot_be_is_refused(net):
    run, params = net
    y, t, cond = inputs()
    for wrong in (None, {}, {"points": cond["points"][:, :2]}, {"points": cond["points"], "cond": np.zeros(2, int)}):
        with pytest.raises(ValueError, match=r'expected cond={"points"'):
            run(params, y, t, wrong)
    with pytest.raises(ValueError, match="that heads divides"):
        functional_init(lambda rngs: NeuralProcess(width=10, heads=3, rngs=rngs))
