"""MuLAN with its latent: the bound is H(x) + KL(q(z) || p(z)) with the exact denoiser, and unbiased in its slopes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import random
from ddjax.latents import Subsets
from ddjax.likelihood import binned, nelbo
from ddjax.objectives import adaptive_noise, whole_elbo
from ddjax.objectives.leave_one_out import leave_one_out
from ddjax.processes import AdaptiveGaussian, Gaussian
from ddjax.schedules import PerSite
from ddjax.solvers import DDIM, Ancestral, GivenLatent
from ddjax.types import Rows

ATOMS = np.asarray([[-0.9, 0.4], [0.7, 0.8], [0.3, -0.9]])
P = np.asarray([0.2, 0.5, 0.3])
Z = np.asarray([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])  # two ones among three bits
RNG = np.random.default_rng(0)
VALUES = {
    "encoder": {"w": RNG.normal(size=(2, 3)), "b": RNG.normal(size=3)},
    "polynomials": {"w": 0.3 * RNG.normal(size=(3, 6)), "b": np.asarray([0.0, 0.0, 0.0, 0.0, 1.2, 1.2])},
}


def encode(parameters, x0):
    return jnp.tanh(x0 @ parameters["w"]) + parameters["b"]


def polynomials(parameters, z):
    return jnp.moveaxis((z @ parameters["w"] + parameters["b"]).reshape(-1, 3, 2), 1, 0)


PROCESS = AdaptiveGaussian(encode, polynomials, VALUES, bits=3, ones=2, log_snr_max=9.0, log_snr_min=-15.0)


def posterior(values):
    """q(z | atom), (atoms, latents), by enumeration."""
    scores = (np.tanh(ATOMS @ values["encoder"]["w"]) + values["encoder"]["b"]) @ Z.T
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


def exact(process, q):
    """E[x0 | x_t, z], with the atoms' chances given z."""
    table = jnp.log(jnp.asarray(P[:, None] * q))

    def apply(params, xt, t, cond, *, rng=None, train=False):
        z, schedule = cond["z"], process.given(cond["z"]).schedule
        alpha, sigma = (c(t[:, None])[:, None] for c in (schedule.alpha, schedule.sigma))
        which = jnp.argmin(jnp.abs(z[:, None] - Z).sum(-1), axis=-1)
        fit = -0.5 * (((xt[:, None] - alpha * ATOMS) / sigma) ** 2).sum(-1)
        return jax.nn.softmax(fit + table.T[which]) @ ATOMS

    return apply


def nowhere(process, x0, prediction, x_low, low):
    """The decoder's term of atoms far apart under little noise."""
    return jnp.zeros_like(x0)


@pytest.fixture
def quadrature(monkeypatch):
    """The objective's draws replaced by every latent, atom, time and noise; returns what it then costs in all."""

    def run(process, values, q, apply, noises=40, times=72):
        z, h = np.linspace(-6.0, 6.0, noises, retstep=True)
        wz = h * np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
        u, wu = np.polynomial.legendre.leggauss(times)
        grid = np.meshgrid(*map(np.arange, (3, 3, noises, noises, times)), indexing="ij")
        a, k, i, j, n = (g.ravel() for g in grid)
        weights = P[a] * q[a, k] * wz[i] * wz[j] * 0.5 * wu[n]
        objective = adaptive_noise(process, "x0", t_range=(0.0, 1.0), reconstruction=nowhere)
        params = {"network": {}, "process": jax.tree.map(jnp.asarray, values)}
        drawn = {}
        monkeypatch.setattr(random, "example_keys", lambda key, rows: rows)
        monkeypatch.setattr(random, "fold_in", lambda keys, data: keys)
        monkeypatch.setattr(random, "stratified", lambda key, rows, dtype=None: drawn["u"][rows.index])
        monkeypatch.setattr(random, "normal", lambda keys, shape, dtype=None: drawn["noise"][keys])
        monkeypatch.setattr(Subsets, "sample", lambda self, keys: drawn["z"][keys])

        @jax.jit  # all as arguments: constants would be folded while compiling
        def cost(x0, weights, **draws):
            drawn.update(draws)
            return objective(jax.random.key(0), apply, params, x0, None, weights, train=False)

        noise = np.stack([z[i], z[j]], -1)
        loss, terms = cost(ATOMS[a], weights, u=0.5 * (u[n] + 1.0), noise=noise, z=Z[k])
        return 2.0 * float(loss) * weights.sum(), {name: 2.0 * float(v) for name, v in terms.items()}

    return run


ENTROPY = -(P * np.log(P)).sum()


def test_the_bound_is_the_entropy_and_what_q_of_z_differs_from_p(x64, quadrature):
    """sum_z q(z) log(q(z) / p(z)) above it: 0 only for the aggregate posterior; the KL itself by enumeration."""
    q = posterior(VALUES)
    total, terms = quadrature(PROCESS, VALUES, q, exact(PROCESS, q))
    mixed = P @ q
    excess = (mixed * np.log(3.0 * mixed)).sum()
    assert excess > 0.05
    np.testing.assert_allclose(total, ENTROPY + excess, atol=1e-6)
    np.testing.assert_allclose(terms["latent"], (P[:, None] * q * np.log(3.0 * q)).sum(), rtol=1e-9)


@pytest.mark.slow
def test_it_is_the_entropy_where_q_is_p_and_more_for_a_denoiser_that_ignores_z(x64, quadrature):
    values = {**VALUES, "encoder": jax.tree.map(np.zeros_like, VALUES["encoder"])}
    process, q = PROCESS.with_parameters(values), np.full((3, 3), 1.0 / 3.0)
    np.testing.assert_allclose(quadrature(process, values, q, exact(process, q))[0], ENTROPY, atol=1e-6)
    # A denoiser that takes the law of x0 to be the same for all z pays for what z says: nothing of the KL comes back.
    told = posterior(VALUES)
    total, _ = quadrature(PROCESS, VALUES, told, exact(PROCESS, q))
    np.testing.assert_allclose(total, ENTROPY + (P[:, None] * told * np.log(3.0 * told)).sum(), atol=1e-6)


def network(params, xt, t, cond, *, rng=None, train=False):
    """Wrong, and uses all it is given."""
    return jnp.tanh(xt * params["a"] + t[:, None] + cond["z"] @ params["c"])


def some_params(process):
    c = jnp.asarray(np.random.default_rng(2).normal(size=(process.bits, 2)))
    return {"network": {"a": jnp.asarray(0.7), "c": c}, "process": process.parameters}


@pytest.mark.slow
def test_two_draws_have_the_slope_of_the_expected_bound(x64, monkeypatch):
    """In the mean over all pairs of draws, at given times and noises: rows for every example and pair."""
    params, law = some_params(PROCESS), lambda p, x0: PROCESS.with_parameters(p["process"]).posterior(x0)
    pairs = np.asarray(list(itertools.product(Z, Z)))  # (9, 2, 3)
    monkeypatch.setattr(random, "fold_in", lambda keys, data: data)
    monkeypatch.setattr(Subsets, "sample", lambda self, draw: jnp.asarray(np.tile(pairs[:, draw], (3, 1))))
    objective = adaptive_noise(PROCESS, "x0", draws=2, t_range=(0.1, 1.0))

    def of_pairs(params):
        x0, index = jnp.asarray(np.repeat(ATOMS, 9, axis=0)), jnp.repeat(jnp.arange(3), 9)
        chance = jnp.exp(sum(law(params, x0).log_prob(np.tile(pairs[:, draw], (3, 1))) for draw in (0, 1)))
        chance = jax.lax.stop_gradient(chance)
        return objective(jax.random.key(5), network, params, x0, None, chance, Rows(index, 3))[0]

    def expected(params):
        x0, z = jnp.asarray(np.repeat(ATOMS, 3, axis=0)), jnp.asarray(np.tile(Z, (3, 1)))
        log_q, key = law(params, x0).log_prob(z), jax.random.split(jax.random.key(5))[1]
        whole = whole_elbo(PROCESS.with_parameters(params["process"]).given(z), "x0", t_range=(0.1, 1.0))
        rows = Rows(jnp.repeat(jnp.arange(3), 3), 3)
        bound = whole(key, network, params["network"], x0, {"z": z}, jnp.exp(log_q), rows)[0]
        return bound + (jnp.exp(log_q) * (log_q + np.log(3.0))).sum() / 6.0

    (ours, slopes), (theirs, exact_slopes) = (jax.jit(jax.value_and_grad(f))(params) for f in (of_pairs, expected))
    np.testing.assert_allclose(ours, theirs, rtol=1e-11)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(exact_slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-6)  # times are in float32, and slopes there
        assert np.abs(a).max() > 1e-6


@pytest.mark.slow
def test_leave_one_out_is_zero_and_unbiased(x64):
    """Three draws of a coin with log odds theta, f(0) = 1, f(1) = 4: slope 3 p (1 - p)."""
    theta, f = jnp.asarray(0.3), jnp.asarray([1.0, 4.0])

    def surrogate(theta, draws):
        log_p = jnp.stack([jax.nn.log_sigmoid(-theta), jax.nn.log_sigmoid(theta)])
        return leave_one_out(f[draws][:, None], log_p[draws][:, None])[0]

    p = 1.0 / (1.0 + np.exp(-0.3))
    slope = 0.0
    for draws in itertools.product((0, 1), repeat=3):
        value, d = jax.value_and_grad(surrogate)(theta, np.asarray(draws))
        assert value == 0
        slope += float(d) * p ** sum(draws) * (1 - p) ** (3 - sum(draws))
    np.testing.assert_allclose(slope, 3 * p * (1 - p), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("draws", [1, 2])
def test_every_parameter_learns_in_float32_with_a_decoder(draws):
    process = AdaptiveGaussian.initial((2,), bits=5, ones=2, width=4, seed=1)
    params = some_params(process)
    nudge = lambda v: v + 0.3 * jnp.asarray(np.random.default_rng(3).normal(size=v.shape), jnp.float32)
    params = jax.tree.map(
        lambda v: jnp.asarray(v, jnp.float32), params | {"process": jax.tree.map(nudge, params["process"])}
    )
    objective = adaptive_noise(
        process, "noise", draws=draws, t_range=(0.0, 1.0), reconstruction=binned((-1.0, 0.0, 1.0))
    )
    x0 = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (4, 2)), jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda p, w: objective(jax.random.key(0), network, p, x0, None, w), has_aux=True))
    (loss, terms), slopes = run(params, None)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, sum(v for name, v in terms.items() if name != "loss"), rtol=1e-5)
    for slope in jax.tree.leaves(slopes):
        assert np.isfinite(slope).all()
        assert np.abs(slope).max() > 0
    # Where the divergence is least it has no slope, and the encoder's is that of the bound given z.
    encoder = params["process"]["encoder"]
    flat = params["process"] | {"encoder": encoder | {"outputs": jnp.zeros_like(encoder["outputs"])}}
    (_, terms_flat), slopes = run(params | {"process": flat}, None)
    assert abs(terms_flat["latent"]) < 1e-6
    assert np.abs(slopes["process"]["encoder"]["outputs"]).max() > 1e-4
    if draws == 1:
        # Weights per site: ones are no weights, and a site of weight 0 is free.
        np.testing.assert_allclose(run(params, jnp.ones_like(x0))[0][0], loss, rtol=1e-5)
        (_, some), slopes = run(params, jnp.ones_like(x0).at[:, 1].set(0.0))
        assert np.isfinite(jax.tree.leaves(slopes)[0]).all()
        np.testing.assert_allclose(some["latent"], 2 * terms["latent"], rtol=1e-5)


def test_given_its_latent_it_is_the_polynomial_of_each_site(x64):
    """Each example's own, from the formula of its slope by quadrature; all latents have the same ends."""
    a, b, c = np.asarray(polynomials(VALUES["polynomials"], Z))
    log_snr = jax.jit(PROCESS.given(jnp.asarray(Z)).schedule.log_snr)
    u, w = np.polynomial.legendre.leggauss(4)
    rise = lambda t: sum(0.5 * t * wi * ((a * s + b) * s + c) ** 2 for wi, s in zip(w, 0.5 * t * (u + 1), strict=True))
    for t in (0.0, 0.3, 1.0):
        share = (rise(t) + 1e-3 * t) / (rise(1.0) + 1e-3)
        np.testing.assert_allclose(log_snr(jnp.full((3, 1), t)), 9.0 - 24.0 * share, rtol=1e-12)


def test_the_evaluator_draws_a_latent_and_counts_its_divergence(x64):
    """Where q(z | x0) is sure of one of the three: the bound of that latent's own process, and log 3."""
    sure = {"w": np.zeros((2, 3)), "b": np.asarray([50.0, 50.0, -50.0])}
    process = PROCESS.with_parameters({**VALUES, "encoder": sure})
    x0, key, z = jnp.asarray(ATOMS), jax.random.key(4), np.asarray([[1.0, 1.0, 0.0]] * 3)
    options = {"num_times": 2, "t_range": (0.1, 0.9)}
    params = some_params(process)["network"]
    ours = nelbo(key, ddjax.bind(network, params, process, "x0"), process, x0, **options)
    alone = Gaussian(PerSite(np.asarray(polynomials(VALUES["polynomials"], z))[:, 0], 9.0, -15.0))
    key, cond = jax.random.split(jax.random.clone(key))[0], {"z": jnp.asarray(z)}
    theirs = nelbo(key, ddjax.bind(network, params, alone, "x0"), alone, x0, cond, **options)
    np.testing.assert_allclose(ours.prior, theirs.prior + np.log(3.0), rtol=1e-10)
    np.testing.assert_allclose(ours.diffusion, theirs.diffusion, rtol=1e-10)
    np.testing.assert_allclose(ours.reconstruction, theirs.reconstruction, rtol=1e-10)
    with pytest.raises(ValueError, match="none can be known"):
        nelbo(key, None, process, x0, known=x0 > 0)


@pytest.mark.slow
def test_a_step_is_that_of_each_examples_own_process(x64):
    z, xt = jnp.asarray(Z), jnp.asarray(ATOMS)
    denoise = ddjax.bind(network, some_params(PROCESS)["network"], PROCESS, "x0")
    draws = lambda: random.example_keys(jax.random.key(1), 3)
    t, s, cond = jnp.asarray(0.7), jnp.asarray(0.4), {"z": z, "cond": None}
    step = jax.jit(lambda xt: GivenLatent(PROCESS).step(draws(), (), xt, t, s, denoise, cond)[0])(xt)
    for i in range(3):
        row = slice(i, i + 1)
        alone = Gaussian(PerSite(np.asarray(polynomials(VALUES["polynomials"], Z))[:, i], 9.0, -15.0))
        said = denoise(xt[row], jnp.full(1, t), {"z": z[row]})
        np.testing.assert_allclose(step[i], alone.reverse(said, xt[row], s, t).sample(draws()[row])[0], rtol=1e-12)
    with pytest.raises(ValueError, match="z"):
        GivenLatent(PROCESS).init(xt)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Ancestral, DDIM], ids=["ancestral", "ddim"])
def test_sampling_draws_a_latent_then_the_law(make):
    """With q(z | x0) = p(z), every latent's samples are the atoms in their proportions."""
    process, q, n = PROCESS, np.full((3, 3), 1.0 / 3.0), 3000
    z = process.latents(n).sample(random.example_keys(jax.random.key(0), n))
    denoise = ddjax.bind(exact(process, q), {}, process, "x0")
    samples = ddjax.sample(
        jax.random.key(1), denoise, process, shape=(n, 2), solver=GivenLatent(process, make),
        times=ddjax.grids.uniform(120), cond={"z": z, "cond": None},
    ).x0  # fmt: skip
    distance = np.linalg.norm(np.asarray(samples)[:, None] - ATOMS, axis=-1)
    assert (distance.min(-1) < 0.05).mean() > 0.99
    for latent in Z:
        mine = (np.asarray(z) == latent).all(-1)
        share = np.bincount(distance[mine].argmin(-1), minlength=3) / mine.sum()
        assert np.abs(share - P).max() < 4.5 * np.sqrt(0.25 / mine.sum()) + 0.02


def test_processes_compare_by_value_and_say_what_is_wrong():
    again = PROCESS.with_parameters(jax.tree.map(np.asarray, VALUES))
    assert again == PROCESS
    assert hash(again) == hash(PROCESS)
    with pytest.raises(ValueError, match="draws"):
        adaptive_noise(PROCESS, "x0", draws=0)
    with pytest.raises(ValueError, match="posterior"):
        adaptive_noise(PROCESS, "posterior")
    with pytest.raises(ValueError, match="0 < ones < bits"):
        AdaptiveGaussian(encode, polynomials, VALUES, bits=2, ones=2)
