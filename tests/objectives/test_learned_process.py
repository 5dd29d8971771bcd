"""The bound as a function of network and process: its value and gradient against quadrature, and what training does."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddjax import objectives, random
from ddjax.predictions import Prediction
from ddjax.processes import LearnedGaussian
from ddjax.schedules import CondOT, VPLinear
from ddjax.training import Ema, init_state, make_train_step
from ddjax.transforms import Residual, SiteNetwork

LEVELS = np.asarray([-1.0, 0.1, 0.7])
RANGE = (0.05, 0.9)  # at both ends the transform matters
NETWORK = SiteNetwork(3, 2)


def start(seed=0, dtype=float):
    rng = np.random.default_rng(seed)
    shapes = {"inputs": (2, 3), "bias": (3,), "outputs": (3, 2)}
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


PROCESS = LearnedGaussian(Residual(NETWORK), start(), VPLinear())


def apply(params, xt, t, cond, *, rng=None, train=False):
    """A wrong network, site by site."""
    return params * jnp.tanh(xt) * (1 - t[:, None])


PARAMS = {"network": np.asarray(0.8), "process": start()}


def whole(process):
    return objectives.whole_elbo(process, "x0", t_range=RANGE)


def exact(params):
    """The expected bound at one site, levels equally likely: sums over levels, noise, and time."""
    process = PROCESS.with_parameters(params["process"])
    noise, mass = np.polynomial.hermite_e.hermegauss(40)
    x0, noise = (jnp.asarray(v.ravel()[:, None]) for v in np.meshgrid(LEVELS, noise, indexing="ij"))
    mass = jnp.asarray(np.tile(mass / mass.sum() / 3, 3))

    def at(t, cost):
        t = jnp.full(x0.shape[:1], t)
        law = process.marginal(x0, t)
        xt = law.mean + law.std * noise
        return mass @ cost(x0, Prediction(apply(params["network"], xt, t, None), "x0"), xt, t)[:, 0]

    nodes, weights = np.polynomial.legendre.leggauss(32)
    times = RANGE[0] + (RANGE[1] - RANGE[0]) * jnp.asarray((1 + nodes) / 2)
    path = jnp.asarray(weights) / 2 @ jax.lax.map(lambda t: at(t, process.path_kl), times) * (RANGE[1] - RANGE[0])
    prior = mass @ process.prior_kl(x0, jnp.full(x0.shape[:1], RANGE[1]))[:, 0]
    return path + prior + at(RANGE[0], process.reconstruction)


def test_value_and_gradient_are_those_of_the_expected_bound(x64):
    """Estimates of many batches against quadrature, its slope by differences in three directions."""
    objective = objectives.learned_process(PROCESS, whole)
    x0 = jnp.asarray(np.tile(LEVELS, 500)[:, None])

    @jax.jit
    def estimate(key):
        (loss, _), slopes = jax.value_and_grad(lambda p: objective(key, apply, p, x0), has_aux=True)(params)
        return loss, slopes

    params = jax.tree.map(jnp.asarray, PARAMS)
    losses, slopes = jax.lax.map(estimate, jax.random.split(jax.random.key(0), 32))
    value = jax.jit(exact)
    h = 1e-4
    for seed in range(3):
        direction = jax.tree.map(lambda v, s=seed: np.random.default_rng(s).normal(size=v.shape), PARAMS)
        ahead, behind = (value(jax.tree.map(lambda v, d, e=e: v + e * d, PARAMS, direction)) for e in (h, -h))
        draws = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).reshape(32, -1).sum(1), slopes, direction)))
        expected = float(ahead - behind) / (2 * h)
        error = float(draws.std()) / math.sqrt(31)
        assert abs(float(draws.mean()) - expected) < 4 * error
        assert error < 0.05 * abs(expected)
    expected = float(value(PARAMS))
    assert abs(float(losses.mean()) - expected) < 4 * float(losses.std()) / math.sqrt(31)
    assert float(losses.std()) < 0.1 * expected


@pytest.mark.slow
def test_hidden_sites_cost_nothing_and_examples_weigh():
    """A site of weight 0 has no effect at all; `weights` per example leave out the rest of the batch."""
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), PARAMS)
    x0, weights = jnp.asarray([[0.3, -0.2], [0.1, 0.5]]), jnp.asarray([[1.0, 0.0], [1.0, 1.0]])
    run = jax.jit(
        lambda x0, weights: objectives.learned_process(PROCESS, whole)(
            jax.random.key(0), apply, params, x0, weights=weights, train=False
        )
    )
    one, other = (run(x0.at[0, 1].set(v), weights)[0] for v in (-0.2, 7.0))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert abs(float(run(x0.at[0, 0].set(7.0), weights)[0]) - float(one)) > 0.1
    kept, metrics = run(x0, jnp.asarray([1.0, 0.0]))
    np.testing.assert_allclose(kept, run(x0.at[1].set(3.0), jnp.asarray([1.0, 0.0]))[0], rtol=1e-6)
    np.testing.assert_allclose(
        metrics["loss"], sum(metrics[k] for k in ("diffusion", "prior", "reconstruction")), rtol=1e-6
    )


@pytest.mark.slow
def test_means_are_over_sites_examples_and_weights(x64):
    """The prior's term has no draw in it, and `curvature` none that weights change: all means are exact."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    x0, key = jnp.asarray([[0.3, -0.2], [0.1, 0.9]]), lambda: jax.random.key(0)
    bound, bend = objectives.learned_process(PROCESS, whole), objectives.curvature(PROCESS, t_range=RANGE)
    nats = np.asarray(PROCESS.prior_kl(x0, jnp.full(2, RANGE[1])))
    sites, seen = np.asarray([[2.0, 0.0], [1.0, 0.5]]), []

    def spy(params, xt, t, cond, **options):
        seen.append(xt)
        return apply(params, xt, t, cond, **options)

    for weights in (None, np.asarray([3.0, 1.0]), sites):
        given = None if weights is None else jnp.asarray(weights)
        shares = np.ones((2, 2)) if weights is None else np.broadcast_to(weights.reshape(2, -1), (2, 2))
        prior = bound(key(), spy, params, x0, weights=given, train=False)[1]["prior"]
        np.testing.assert_allclose(prior, (shares * nats).sum() / shares.sum(), rtol=1e-12)
    assert [float(xt[0, 1]) for xt in seen[-2:]] == [float(x0[0, 1])] * 2  # shown clean, on the path and at its end
    # One weight on one site at a time gives the parts, and these the others.
    bent = lambda weights: float(bend(key(), apply, params["network"], x0, weights=weights, train=False)[0])
    parts = np.asarray([[bent(jnp.zeros((2, 2)).at[i, j].set(1.0)) for j in (0, 1)] for i in (0, 1)])
    assert parts.min() > 0
    assert np.unique(parts).size == 4
    np.testing.assert_allclose(bent(None), parts.mean(), rtol=1e-10)
    np.testing.assert_allclose(bent(jnp.asarray([3.0, 1.0])), (3 * parts[0] + parts[1]).sum() / 8, rtol=1e-10)
    np.testing.assert_allclose(bent(jnp.asarray(sites)), (sites * parts).sum() / 3.5, rtol=1e-10)


def test_a_sum_has_its_weights_and_each_part_a_key_of_its_own():
    part = lambda key, *_, **__: (jax.random.uniform(key), {})
    total, metrics = objectives.weighted_sum(a=(2.0, part), b=(3.0, part))(jax.random.key(0), None, {}, None)
    assert metrics["a"] != metrics["b"]
    np.testing.assert_allclose(total, 2 * metrics["a"] + 3 * metrics["b"], rtol=1e-6)
    assert metrics["loss"] == total


def test_what_cannot_be_learned_is_an_error_at_once():
    with pytest.raises(ValueError, match="needs a process with parameters"):
        objectives.learned_process(object(), whole)
    with pytest.raises(ValueError, match="does not understand"):
        objectives.learned_process(PROCESS, lambda process: objectives.gaussian(process, "x0", error="noize"))


@pytest.mark.slow
def test_a_train_step_moves_both():
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), PARAMS)
    optimizer, ema = optax.adam(1e-2), Ema(0.9)
    step = jax.jit(make_train_step(objectives.learned_process(PROCESS, whole), apply, optimizer, ema=ema))
    state = init_state(lambda key: params, optimizer, jax.random.key(1))
    after, metrics = step(state, {"x0": jnp.asarray([[0.3, -0.2]])})
    assert bool(metrics["finite"])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a != b)), after.params, params))
    learned = PROCESS.with_parameters(jax.tree.map(np.asarray, after.params["process"]))
    assert hash(learned) == hash(PROCESS.with_parameters(after.params["process"]))


# -- straight paths from a Gaussian to a Gaussian (NFDM-OT) ----------------------------------------------------------

STD, INNER = 0.3, (0.02, 0.98)


def series(coefficients, t):
    return sum(c * t**j for j, c in enumerate(coefficients))[:, None]


def scalings(parameters, x0, t):
    """F = x0 (1 + t a(t)), k = t (1 - t) z(t), a and z cubic."""
    return series(parameters[0], t) * x0, jnp.broadcast_to(series(parameters[1], t), x0.shape)


def posterior_mean(parameters, xt, t, cond, **_):
    """Of N(0, STD^2), exact for the transform that has these parameters."""
    wide = t[:, None]
    gain = (1 - wide) * (1 + wide * series(parameters[0], t))
    sigma = wide * jnp.exp(wide * (1 - wide) * series(parameters[1], t))
    return gain * STD**2 / (gain**2 * STD**2 + sigma**2) * xt


@pytest.mark.slow
def test_a_straight_path_penalty_straightens_paths():
    """The flow maps x_1 to x_t by the widths m(t) of the marginals: straight where m is, bent by m''.

    The denoiser is exact for whichever transform is tried. CondOT's mean square of m'' falls by 15, and m comes near
    the line from STD to 1.
    """
    process = LearnedGaussian(Residual(scalings), np.zeros((2, 4)), CondOT(), data_std=STD)
    objective = objectives.learned_process(
        process,
        lambda learned: objectives.weighted_sum(
            bound=(1.0, objectives.whole_elbo(learned, "x0", t_range=INNER)),
            curvature=(1.0, objectives.curvature(learned, t_range=INNER)),
        ),
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 300))

    def step(carry, key):
        parameters, state = carry
        x0 = STD * random.normal(random.example_keys(jax.random.fold_in(key, 1), 128), (1,))
        loss = lambda p: objective(key, posterior_mean, {"network": p, "process": p}, x0)
        slope, metrics = jax.grad(loss, has_aux=True)(parameters)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(parameters, updates), state), metrics["curvature"]

    @jax.jit
    def train(parameters):
        keys = jax.random.split(jax.random.key(0), 300)
        (parameters, _), curvature = jax.lax.scan(step, (parameters, optimizer.init(parameters)), keys)
        return parameters, curvature

    def widths(parameters):
        t = np.linspace(0, 1, 401)
        a, z = (np.polynomial.polynomial.polyval(t, c) for c in np.asarray(parameters, float))
        return np.hypot((1 - t) * (1 + t * a) * STD, t * np.exp(t * (1 - t) * z)), STD + (1 - STD) * t

    def bend(parameters):
        return (np.diff(widths(parameters)[0], 2) ** 2).mean() * 400**4

    learned, curvature = train(process.parameters)
    assert bend(learned) < bend(np.zeros((2, 4))) / 15
    (bent, line), (straight, _) = widths(np.zeros((2, 4))), widths(learned)
    assert np.abs(straight - line).max() < 0.05 < 0.1 < np.abs(bent - line).max()
    # The penalty is the mean square of m'' itself: at the start, over the times it is drawn at.
    inner = slice(8, 392)
    expected = (np.diff(widths(np.zeros((2, 4)))[0], 2)[inner] ** 2).mean() * 400**4
    found = objectives.curvature(process, t_range=INNER)
    x0 = STD * random.normal(random.example_keys(jax.random.key(5), 20_000), (1,))
    value, _ = jax.jit(lambda x0: found(jax.random.key(6), posterior_mean, jnp.zeros((2, 4)), x0))(x0)
    np.testing.assert_allclose(value, expected, rtol=0.05)
    assert float(curvature[-50:].mean()) < expected / 15
