"""Trajectories that are found again: exact search, jumps, and what is lost at most."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, retrieval
from ddjax.gaussian_law import GaussianLaw
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Masked
from ddjax.retrieval import Retrieved, Trajectories, nearest
from ddjax.schedules import CondOT
from ddjax.solvers import DDIM, Teleport

PROCESS = Gaussian(CondOT())
RNG = np.random.default_rng(0)
TIMES = grids.uniform(6)
LABELS = np.arange(7) % 2


def own(xt, t, cond=None):
    """Something curved that labels change."""
    shift = 0.0 if cond is None else 0.3 * cond.reshape(-1, *[1] * (xt.ndim - 1))
    return Prediction(jnp.sin(2.0 * xt) + shift, "x0")


def built(labels=None):
    settings = {"shape": (7, 2, 2), "solver": DDIM(PROCESS), "times": TIMES, "cond": labels}
    return retrieval.build(jax.random.key(1), own, PROCESS, early=2, late=4, **settings)


def drawn(key, solver, batch=7, labels=None, **options):
    settings = {"shape": (batch, 2, 2), "solver": solver, "times": TIMES, "cond": labels} | options
    return ddjax.sample(jax.random.key(key), own, PROCESS, **settings)


@pytest.mark.parametrize("labels", [LABELS, pytest.param(None, marks=pytest.mark.slow)])
def test_what_is_in_the_base_is_found_again(labels):
    """Bit for bit, with fewer evaluations."""
    labels = None if labels is None else jnp.asarray(labels)
    base = built(labels)
    got = drawn(1, retrieval.redi(DDIM(PROCESS), base), labels=labels, trajectory=True)
    want = drawn(1, DDIM(PROCESS), labels=labels, trajectory=True)
    for name, step in (("early", 2), ("late", 4)):
        np.testing.assert_array_equal(getattr(base, name), want.trajectory[step])
    assert base.times == (float(TIMES[2]), float(TIMES[4]))
    np.testing.assert_array_equal(got.x0, want.x0)
    np.testing.assert_array_equal(got.nfe, 4)
    for step, same in enumerate((0, 1, 2, 4, 4, 5, 6)):
        np.testing.assert_array_equal(got.trajectory[step], want.trajectory[same])


@pytest.mark.parametrize("chunk", [4, *[pytest.param(n, marks=pytest.mark.slow) for n in (1, 100)]])
def test_the_nearest_is_that_of_brute_force(chunk):
    early, labels = RNG.normal(size=(9, 2, 3)), np.array([0, 0, 1, 1, 1, 0, 0, 1, 1])
    early[7] = early[2]  # of equals, the first
    x, wanted = (
        np.concatenate([RNG.normal(size=(5, 2, 3)), early[7:8]]).astype(np.float32),
        np.array([0, 1, 0, 1, 5, 1]),
    )
    base = Trajectories(early.astype(np.float32), early, (0.5, 0.2), labels)
    distances = np.sqrt(((x[:, None] - base.early.values) ** 2).sum((2, 3)))
    for cond in (None, wanted):
        found, far = nearest(base, jnp.asarray(x), None if cond is None else jnp.asarray(cond), 2, chunk)
        for i in range(6):
            allowed = np.arange(9) if cond is None or cond[i] == 5 else np.flatnonzero(labels == cond[i])
            order = allowed[np.argsort(distances[i, allowed], kind="stable")[:2]]
            np.testing.assert_array_equal(found[i], order)
            np.testing.assert_allclose(far[i], distances[i, order], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_the_loss_is_bounded_by_the_distance(x64):
    """On Gaussian data, whose ODE is solved exactly: each direction is lost by its sensitivity times the distance."""
    u = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    law = GaussianLaw(np.full((1, 2, 2), 0.3), u[None], [[4.0, 1.0, 0.3, 0.01]], [0.0])
    solver, times = Teleport(PROCESS, law), jnp.asarray([1.0, 0.6, 0.2, 0.0])
    settings = {"solver": solver, "times": times, "shape": (20, 2, 2)}
    base = retrieval.build(jax.random.key(1), own, PROCESS, early=1, late=2, **settings)
    settings |= {"solver": retrieval.redi(solver, base)}
    got = ddjax.sample(jax.random.key(2), own, PROCESS, **settings, trajectory=True)
    exact = ddjax.sample(jax.random.key(2), own, PROCESS, **settings | {"solver": solver}).x0
    found, far = nearest(base, got.trajectory[1])
    apart = (np.asarray(got.trajectory[1]) - base.early.values[found[:, 0]]).reshape(20, 4) @ u.T
    lost = np.asarray(exact - got.x0).reshape(20, 4) @ u.T
    sensitive = np.asarray(law.sensitivity(PROCESS, 0.6))[0]
    np.testing.assert_allclose(lost, sensitive * apart, atol=1e-10)
    assert (np.linalg.norm(lost, axis=1) <= sensitive.max() * np.asarray(far)[:, 0] + 1e-12).all()


@pytest.mark.slow
def test_combined_neighbours(x64):
    """Least squares of the early states: on a linear law exact, once they span the space."""
    law = GaussianLaw(np.zeros((1, 3)), np.eye(3)[None], [[4.0, 1.0, 0.1]], [0.0])
    early = RNG.normal(size=(5, 3))
    late = law.flow(PROCESS, jnp.asarray(early), jnp.asarray(0.6), jnp.asarray(0.2))
    base, x = Trajectories(early, late, (0.6, 0.2)), jnp.asarray(RNG.normal(size=(4, 3)))
    for neighbours in (2, 3):
        solver = Retrieved(PROCESS, base, neighbours, chunk=2)
        got = solver.step(None, solver.init(x), x, jnp.asarray(0.6), jnp.asarray(0.2), None)[0]
        found = np.asarray(nearest(base, x, None, neighbours)[0])
        for i in range(4):
            weights = np.linalg.lstsq(early[found[i]].T, np.asarray(x[i]))[0]
            np.testing.assert_allclose(got[i], weights @ np.asarray(late)[found[i]], atol=1e-9)
    np.testing.assert_allclose(got, law.flow(PROCESS, x, jnp.asarray(0.6), jnp.asarray(0.2)), atol=1e-9)


def test_kept_as_a_file(tmp_path):
    for base in (built(), built(jnp.asarray(LABELS))):
        base.save(tmp_path / "base.safetensors")
        assert retrieval.load(tmp_path / "base.safetensors") == base
    (tmp_path / "a").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        retrieval.load(tmp_path / "a")
    ddjax.training.export_safetensors(tmp_path / "b", {"x": np.zeros(1)})
    with pytest.raises(ValueError, match="holds no trajectories"):
        retrieval.load(tmp_path / "b")


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch():
    solver = retrieval.redi(DDIM(PROCESS), built())
    whole = drawn(2, solver).x0
    for batch in (1, 2):
        np.testing.assert_array_equal(drawn(2, solver, batch).x0, whole[:batch])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Trajectories(np.zeros((2, 3)), np.zeros((3, 3)), (0.5, 0.2)), "as many and alike"),
        (lambda: Trajectories(np.zeros((2, 3)), np.zeros((2, 3)), (0.2, 0.5)), "decreasing"),
        (lambda: Trajectories(np.zeros((2, 3)), np.zeros((2, 3)), (0.5, 0.2), [1]), "labels must be 2"),
        (lambda: Retrieved(Masked(3), Trajectories(np.zeros((2, 3)), np.zeros((2, 3)), (0.5, 0.2))), "real states"),
        (lambda: Retrieved(PROCESS, Trajectories(np.zeros((2, 3)), np.zeros((2, 3)), (0.5, 0.2)), 3), "1 ... 2"),
        (lambda: nearest(Trajectories(np.zeros((2, 3)), np.zeros((2, 3)), (0.5, 0.2)), jnp.zeros((1, 4))), "of shape"),
        (
            lambda: retrieval.build(
                jax.random.key(0), own, PROCESS, shape=(2, 2), solver=DDIM(PROCESS), times=TIMES, early=4, late=4
            ),
            "0 <= early < late <= 6",
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
