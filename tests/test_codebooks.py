"""Codebooks: laws over their draw in closed form, choices by brute force, expected maxima, round trips, files."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ode_laws import Pair
from scipy import integrate, stats

import ddjax
from ddjax import codebook_files, codebooks, grids, random
from ddjax.codebooks import Codes
from ddjax.config import typed
from ddjax.data import from_arrays
from ddjax.experiment import build
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Geometric, InBasis, Masked
from ddjax.processes.in_basis import DCT
from ddjax.processes.linear_sde import critically_damped
from ddjax.run import Run
from ddjax.schedules import VE, VPCosine
from ddjax.solvers import (
    DDIM,
    Ancestral,
    Churned,
    Codebook,
    EulerMaruyama,
    Given,
    Langevin,
    PredictorCorrector,
    Restart,
    StepsDown,
    heun_in_noise,
    sde_dpm_solver_pp,
)

PROCESS = Gaussian(VPCosine(0.0))
NETWORK = Pair(PROCESS)
TIMES = grids.uniform(4)
X0 = np.random.default_rng(0).normal(size=(3, 2)) * 0.6
SOLVERS = {
    "ddim": lambda p, z: DDIM(p, 1.0, z),
    "eta": lambda p, z: DDIM(p, 0.4, z),
    "ancestral": lambda p, z: Ancestral(p, z),
    "multistep": lambda p, z: sde_dpm_solver_pp(p, 2, noise=z),
    "down": lambda p, z: StepsDown(heun_in_noise(p), noise=z),
    "churned": lambda p, z: Churned(DDIM(p), 0.3, noise=z),
    "euler": lambda p, z: EulerMaruyama(p, noise=z),
}
FEW = ("ancestral",)
every_solver = pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in SOLVERS]
)


def encode(solver, x0=X0, times=TIMES, **options):
    return codebooks.encode(NETWORK, PROCESS, jnp.asarray(x0, jnp.float32), solver=solver, times=times, **options)


def decode(solver, codes, times=TIMES, shape=X0.shape):
    return codebooks.decode(NETWORK, PROCESS, codes, shape=shape, solver=solver, times=times)


BOOK = Codebook(3, 20, chunk=8)


@every_solver
def test_round_trip_is_exact(name):
    """Bit for bit: the suite runs without fused multiply-adds."""
    solver = SOLVERS[name](PROCESS, BOOK if name in FEW else dataclasses.replace(BOOK, atoms=2, levels=3))
    whole = encode(solver)
    np.testing.assert_array_equal(decode(solver, whole.codes), whole.x0)
    assert whole.codes.indices.shape == (3, 3, solver.noise.atoms)  # the step to t = 0 chooses nothing
    assert np.isfinite(whole.x0).all()
    swapped = dataclasses.replace(whole.codes, indices=whole.codes.indices[:, ::-1])
    assert np.any(decode(solver, swapped) != whole.x0)


@pytest.mark.slow
def test_rows_are_their_own():
    """One example alone, two or seven have the codes and the samples that they have among others."""
    x0, solver = np.concatenate([X0, -X0, X0[:1] + 1]), Ancestral(PROCESS, BOOK)
    whole = encode(solver, x0)
    for few in (1, 2):
        some = encode(solver, x0[:few])
        np.testing.assert_array_equal(some.codes.indices, whole.codes.indices[:few])
        np.testing.assert_array_equal(some.x0, whole.x0[:few])


@pytest.mark.slow
def test_an_entry_is_the_same_however_it_is_asked_for():
    """By its draw and number alone: the chunk is no part of a code, the seed and the draw are."""
    one = np.asarray(BOOK.entries(2, jnp.asarray([7]), (2,), jnp.float32))[0]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 2), 7)
    np.testing.assert_array_equal(one, jax.random.normal(key, (2,)))
    codes = [encode(Ancestral(PROCESS, Codebook(3, 20, chunk=c))).codes for c in (1, 7, 50)]
    for other in codes[1:]:
        np.testing.assert_array_equal(other.indices, codes[0].indices)


@pytest.mark.slow
def test_choices_are_those_of_brute_force(x64):
    """Each step again in NumPy: all entries, the largest inner product; then every pair at every level."""
    book, sites = Codebook(1, 12, atoms=3, levels=3, chunk=5), 8
    direction = np.random.default_rng(1).normal(size=(2, sites))
    score = lambda z: (z * direction).sum(-1)

    @jax.jit
    def chosen():
        code = book.best(5, score, 2, (sites,), jnp.float64)
        return *code, book.vector(5, *code, (sites,), jnp.float64)

    indices, weights, z = chosen()
    entries = np.asarray(book.entries(5, jnp.arange(12), (sites,), jnp.float64))
    for row in range(2):
        k = int(np.argmax(entries @ direction[row]))
        now, numbers, levels = entries[k], [k], []
        for _ in range(2):
            best, found = now @ direction[row], (0, 0, now)
            for j in (1, 2):
                for other in range(12):
                    new = np.sqrt(j / 3) * now + np.sqrt(1 - j / 3) * entries[other]
                    new = new / np.sqrt(np.mean(new**2))
                    if new @ direction[row] > best:
                        best, found = new @ direction[row], (other, j, new)
            numbers, levels, now = [*numbers, found[0]], [*levels, found[1]], found[2]
        np.testing.assert_array_equal(indices[row], numbers)
        np.testing.assert_array_equal(weights[row], levels)
        np.testing.assert_allclose(z[row], now, rtol=1e-12)
    assert (np.asarray(weights) > 0).any()


def test_encode_takes_the_entry_nearest_to_what_is_missing(x64):
    """The whole loop against ancestral steps in NumPy, by the paper's equations."""
    book, x0, times = Codebook(2, 8), X0, np.linspace(1.0, 0.0, 4)
    out = codebooks.encode(NETWORK, PROCESS, jnp.asarray(x0), solver=Ancestral(PROCESS, book), times=jnp.asarray(times))
    alpha, sigma = (lambda t: np.cos(np.pi * t / 2)), (lambda t: np.sin(np.pi * t / 2))
    x = np.asarray(book.entries(0, jnp.zeros(3, int), (2,), x0.dtype)) * np.asarray(PROCESS.prior_std(jnp.asarray(1.0)))
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        total = 0.25 * alpha(t) ** 2 + sigma(t) ** 2
        hat = (0.25 * alpha(t) * x + 0.8 * sigma(t) ** 2 * np.tanh(0.8 * alpha(t) * x / total)) / total
        entries = np.asarray(book.entries(i + 1, jnp.arange(8), (2,), x0.dtype))
        k = np.argmax((x0 - hat) @ entries.T, axis=1) if s > 0 else np.zeros(3, int)
        if s > 0:
            np.testing.assert_array_equal(out.codes.indices[:, i, 0], k)
        ratio = alpha(t) / alpha(s)  # the posterior of a chain (Ho et al. 2020, eq. 7)
        beta = 1 - ratio**2
        mean = (alpha(s) * beta * hat + ratio * sigma(s) ** 2 * x) / sigma(t) ** 2
        x = mean + np.sqrt(beta) * sigma(s) / sigma(t) * entries[k]
    np.testing.assert_allclose(out.x0, x, atol=1e-10)


@pytest.mark.slow
def test_any_entries_have_the_law_of_the_solver():
    """Over the draw of codebooks, which is new for each site: the covariances of examples, in closed form.

    Of N(0, 1) data DDIM is linear, x_s = c x_t + d z. Two examples share a normal where they took the same entry, so
    their covariance follows V <- c^2 V + d^2 (share), and each one's variance is that of fresh normals.
    """
    times, eta, sites = np.linspace(0.9, 0.0, 5), 0.7, 40_000
    out = codebooks.generate(
        jax.random.key(1),
        lambda x, t, cond: Prediction(0 * x, "v"),
        PROCESS,
        shape=(6, sites),
        solver=DDIM(PROCESS, eta, Codebook(0, 2)),
        times=jnp.asarray(times),
    )
    indices = np.asarray(out.codes.indices)[..., 0]
    assert indices.shape == (6, 4)  # the first state and three steps
    share = [indices[:, None, j] == indices[None, :, j] for j in range(4)]
    assert 0 < np.mean(share) < 1
    alpha, sigma = (lambda t: np.cos(np.pi * t / 2)), (lambda t: np.sin(np.pi * t / 2))
    covariance = 1.0 * share[0]
    for t, s, same in zip(times, times[1:], [*share[1:], share[0]], strict=False):
        new = eta**2 * (1 - (alpha(t) * sigma(s) / (sigma(t) * alpha(s))) ** 2)
        c = alpha(s) * alpha(t) + sigma(s) * np.sqrt(1 - new) * sigma(t)
        covariance = c**2 * covariance + sigma(s) ** 2 * new * same
    x = np.asarray(out.x0, np.float64)
    np.testing.assert_allclose(x @ x.T / sites, covariance, atol=6 / np.sqrt(sites))
    assert abs(x.mean()) < 6 / np.sqrt(6 * sites)


@pytest.mark.slow
def test_any_entry_is_as_likely_as_any_other():
    keys = random.example_keys(jax.random.key(0), 20_000)
    assert stats.chisquare(np.bincount(Codebook(0, 7).any(keys), minlength=7)).pvalue > 1e-3


def expected_maximum(k):
    """Of k standard normals."""
    density = lambda v: v * k * stats.norm.pdf(v) * stats.norm.cdf(v) ** (k - 1)
    return integrate.quad(density, -9, 9)[0]


@pytest.mark.parametrize("size", [4, pytest.param(1, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)])
def test_the_chosen_normal_is_the_expected_maximum(size):
    """Of one site towards +1: the mean of the chosen entry over many draws of codebooks."""
    book = Codebook(0, size)
    find = lambda d: book.vector(d, *book.best(d, lambda z: z[..., 0], 1, (1,), jnp.float32), (1,), jnp.float32)[0, 0]
    z = np.asarray(jax.jit(jax.vmap(find))(jnp.arange(2000)))
    assert abs(z.mean() - expected_maximum(size)) < 4 * z.std() / np.sqrt(len(z))


@pytest.mark.slow
def test_distortion_falls_with_entries_steps_and_atoms():
    x0 = np.sign(np.random.default_rng(2).normal(size=(64, 8))) * 0.8

    def error(steps, size, **options):
        solver = Ancestral(PROCESS, Codebook(0, size, **options))
        return float(np.mean((np.asarray(encode(solver, x0, grids.uniform(steps)).x0) - x0) ** 2))

    errors = [error(4, 1), error(4, 16), error(4, 256)]
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]
    assert error(16, 16) < 0.8 * errors[1]
    assert error(4, 16, atoms=3, levels=4) < 0.8 * errors[1]


@pytest.mark.slow
def test_rules_lead_where_they_say():
    """A rule of one's own, restoration from a measurement of one site, and the prediction under a condition."""
    solver, zero = Ancestral(PROCESS, Codebook(0, 64)), jnp.zeros((3, 2))
    drawn = codebooks.encode(
        NETWORK, PROCESS, jnp.asarray([0.9, -0.9, 0.2]), shape=(3, 2), solver=solver, times=grids.uniform(8), rule=FIRST
    )
    np.testing.assert_allclose(drawn.x0[:, 0], [0.9, -0.9, 0.2], atol=0.35)
    np.testing.assert_array_equal(drawn.nfe, 8)

    def shifted(x, t, cond=None):
        move = 0.0 if cond is None else cond
        return Prediction(NETWORK(x, t).value + move, "x0")

    up = codebooks.encode(
        shifted, PROCESS, 0.5 + zero, shape=(3, 2), solver=solver, times=TIMES, rule=codebooks.towards_prediction
    )
    same = codebooks.encode(NETWORK, PROCESS, None, shape=(3, 2), solver=solver, times=TIMES, rule=total)
    np.testing.assert_array_equal(up.codes.indices, same.codes.indices)  # a direction of equal entries
    np.testing.assert_array_equal(up.nfe, 4)


def first_site(x, s):
    return x[:, 0] / PROCESS.schedule.alpha(s)


FIRST = codebooks.measured(first_site)


def total(z, about):
    return z.sum(-1) + 0 * about.x0.sum(-1)


@pytest.mark.slow
def test_other_processes_and_both_ends():
    """In a basis, with auxiliary variables, VE; one step, which chooses nothing; a grid that ends before the data."""
    network = lambda x, t, cond: Prediction(0.3 * x, "x0")
    cases = [
        (InBasis(PROCESS, DCT((1,))), grids.uniform(3)),
        (Gaussian(VE()), grids.uniform(3)),
        (PROCESS, grids.uniform(1)),
        (PROCESS, grids.uniform(2, end=0.1)),
    ]
    for process, times in cases:
        solver, x0 = Ancestral(process, Codebook(0, 4)), jnp.asarray(X0, jnp.float32)
        out = codebooks.encode(network, process, x0, solver=solver, times=times)
        assert np.isfinite(out.x0).all()
        assert out.codes.indices.shape[1] == len(times) - 1 - (float(times[-1]) == 0)
        back = codebooks.decode(network, process, out.codes, shape=X0.shape, solver=solver, times=times)
        np.testing.assert_array_equal(back, out.x0)


@pytest.mark.slow
def test_a_law_at_its_own_normals_is_its_draw():
    """`drawn` of the laws that are made of normals, from those that `sample` draws."""
    keys, x = (lambda: random.example_keys(jax.random.key(0), 3)), jnp.asarray(X0, jnp.float32)
    z = random.normal(keys(), (2,))
    for process in (PROCESS, Geometric(PROCESS)):
        law = process.marginal(jnp.exp(x), 0.4)
        np.testing.assert_array_equal(law.drawn(fresh=z), law.sample(keys()))
    turned = InBasis(PROCESS, DCT((1,)))
    law = turned.marginal(x, 0.4)
    np.testing.assert_allclose(law.drawn(fresh=turned.basis.inverse(z)), law.sample(keys()), atol=1e-6)
    law = critically_damped().marginal(x[..., None], 0.4)
    drawn = law.sample(keys())
    normals = random.normal(keys(), (2 * 2,))
    assert law.drawn().shape == drawn.shape == law.drawn(fresh=normals.reshape(drawn.shape)).shape
    np.testing.assert_allclose(law.drawn(), law.mean)


@pytest.mark.slow
def test_given_normals_make_the_reverse_step(x64):
    """`Ancestral(noise=)` against DDIM with eta = 1, from the same normals."""
    z = Given(np.random.default_rng(3).normal(size=(3, 3, 2)))
    a, b = (
        ddjax.sample(jax.random.key(0), NETWORK, PROCESS, shape=(3, 2), solver=s, times=grids.uniform(3))
        for s in (Ancestral(PROCESS, z), DDIM(PROCESS, 1.0, z))
    )
    np.testing.assert_allclose(a.x0, b.x0, atol=1e-12)


@pytest.mark.slow
def test_as_a_source_of_noise():
    """`ddjax.sample` with it: any of K entries, so that with one entry all rows get one normal a step."""
    sample = lambda book, n: (
        ddjax.sample(
            jax.random.key(0),
            NETWORK,
            PROCESS,
            shape=(n, 2),
            solver=DDIM(PROCESS, 1.0, book),
            times=TIMES,
            init=jnp.ones((n, 2)),
        ).x0
    )
    same = np.asarray(sample(Codebook(0, 1), 4))
    assert len(np.unique(same, axis=0)) == 1
    other = np.asarray(sample(Codebook(0, 500), 4))
    assert len(np.unique(other, axis=0)) == 4
    np.testing.assert_array_equal(sample(Codebook(0, 500), 2), other[:2])


@pytest.mark.slow
def test_a_run_compresses_and_gives_back(tmp_path):
    values = {
        "data": {"tokens": False},
        "process": {"name": "gaussian", "schedule": "vp_cosine"},
        "denoiser": {"kind": "noise", "options": {"width": 8, "depth": 1, "heads": 2, "patch": 4}},
        "objective": {"name": "gaussian"},
        "sample": {"solver": "ddim"},
    }
    built = build(typed(values), from_arrays(np.zeros((4, 8, 8, 1), np.float32)))
    shapes, rng = jax.eval_shape(built.init, jax.random.key(0)), np.random.default_rng(1)
    run = Run(built, jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), shapes), 7)
    x0, path = rng.normal(size=(5, 8, 8, 1)).astype(np.float32), tmp_path / "x.codes"
    seen = codebook_files.compress(run, path, x0, codebook=Codebook(0, 30), steps=5, batch_size=3)
    assert seen.shape == x0.shape
    np.testing.assert_array_equal(codebook_files.decompress(run, path, batch_size=3), seen)
    one = codebook_files.size(Codebook(0, 30), 4)
    assert one == 3  # 4 log2 30 = 19.6 bits
    assert codebook_files.load(path).about["steps"] == 5
    with pytest.raises(ValueError, match="was written at training step 7, and this is 8"):
        codebook_files.decompress(dataclasses.replace(run, step=8), path)
    with pytest.raises(ValueError, match="codes are of states like the data"):
        codebook_files.compress(run, path, x0[:, :4], codebook=Codebook(0, 30))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_codes_are_packed_and_unpacked(tmp_path_factory, data):
    whole = lambda low, high: data.draw(st.integers(low, high))
    book = Codebook(whole(0, 9), whole(1, 3000), whole(1, 4), whole(2, 9))
    batch, draws, first = whole(1, 3), whole(0, 40), whole(0, 1)
    rng = np.random.default_rng(whole(0, 2**32))
    indices = rng.integers(0, book.size, (batch, draws, book.atoms))
    weights = rng.integers(0, book.levels, (batch, draws, book.atoms - 1))
    if whole(0, 1):  # the largest number
        indices[:], weights[:] = book.size - 1, book.levels - 1
    codes = Codes(indices, weights, first)
    packed = codebook_files.pack(codes, book)
    assert {len(p) for p in packed} == {int(np.ceil(codes.bits(book) / 8 - 1e-9))}
    path = tmp_path_factory.mktemp("codes") / "x.codes"
    codebook_files.save(path, codes, book, steps=draws)
    for read in (codebook_files.unpack(packed, book, draws, first), codebook_files.load(path).codes):
        np.testing.assert_array_equal(read.indices, indices)
        np.testing.assert_array_equal(read.weights, weights)
        assert read.first == first
    assert codebook_files.load(path).codebook == book
    assert codebook_files.load(path).about == {"steps": draws}


def test_a_number_in_mixed_radix():
    """Digits entry, level, entry: ((2 * 3 + 1) * 5 + 4) for K = 5, levels = 3; two draws of 75 values each."""
    book = Codebook(0, 5, atoms=2, levels=3)
    codes = Codes(np.array([[[2, 4], [0, 3]]]), np.array([[[1], [2]]]))
    assert codebook_files.pack(codes, book) == [((39 * 75) + 13).to_bytes(2, "big")]
    assert codes.bits(book) == pytest.approx(2 * np.log2(75))


def test_bad_arguments(tmp_path):
    book = BOOK
    codes = encode(Ancestral(PROCESS, book)).codes
    (tmp_path / "no").write_bytes(b"something else")
    codebook_files.save(tmp_path / "cut", codes, book)
    whole = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-1])
    for make, match in (
        (lambda: Codebook(0, 0), "size must be at least 1"),
        (lambda: Codebook(0, 4, levels=1), "levels must be at least 2"),
        (lambda: encode(DDIM(PROCESS, 1.0)), "give it noise=solvers.Codebook"),
        (lambda: encode(DDIM(PROCESS, 0.0, book)), "draws 0 normals a step"),
        (lambda: encode(Restart(DDIM(PROCESS), ((0.7, 3.0),), book)), "more than once a step"),
        (lambda: encode(PredictorCorrector(DDIM(PROCESS), Langevin(PROCESS))), "give it noise="),
        (lambda: encode(Ancestral(PROCESS, book), chosen=(0, 2)), "the first state is entry 0"),
        (lambda: encode(Ancestral(PROCESS, book), chosen=(2, 9)), "draws go from 0"),
        (lambda: decode(Ancestral(PROCESS, Codebook(0, 20, 2)), codes), "do not fit"),
        (lambda: codebook_files.pack(codes, Codebook(0, 20, 2)), "are not of a codebook of 2 atoms"),
        (lambda: codebook_files.pack(Codes(codes.indices + 20, codes.weights), book), "indices run from 0 to 19"),
        (lambda: codebook_files.unpack([b"abc"], book, 3), "3 bytes are not a code"),
        (lambda: codebook_files.load(tmp_path / "no"), "is no file of codes: it does not begin"),
        (lambda: codebook_files.load(tmp_path / "cut"), "bytes where 3 examples"),
        (lambda: codebooks.encode(NETWORK, Masked(3), X0, solver=Ancestral(Masked(3), book), times=TIMES), "has none"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
