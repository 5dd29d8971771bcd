"""Groups chosen before the network is asked: their law, and the same from keys and values as from full passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, guidance, random
from ddjax.denoisers import DiT, TextTransformer, functional_init, taps
from ddjax.fixtures import Categorical
from ddjax.predictions import Prediction, bind
from ddjax.processes import Masked, Uniform
from ddjax.schedules import Cosine
from ddjax.solvers import Confidence, Grouped, LeftToRight, Local, Planner, RandomOrder, Stopping, Unmask

LAW = Categorical(3, 2, seed=2)
CLEAN = np.asarray(LAW.configurations)
PROCESS, KEY = Masked(2), jax.random.key(5)


def law():
    """The law as a table, `(2, 2, 2)`."""
    rng = np.random.default_rng(LAW.seed)
    p = rng.dirichlet(np.full(8, LAW.concentration)) + 1e-4
    return (p / p.sum()).reshape(2, 2, 2)


def exact(xt, t, cond=None):
    """The conditional of each site given what groups before its own show."""
    taps.tap("sites", np.arange(3))
    if not isinstance(cond, dict):
        return Prediction(jnp.zeros((*xt.shape, 2)), "posterior")
    own = cond["groups"]
    shown = jnp.where(own[:, :, None] > own[:, None], xt[:, None], 2)
    fits = ((shown[..., None, :] == CLEAN) | (shown[..., None, :] == 2)).all(-1)
    p = jnp.where(fits, jnp.asarray(law().ravel()), 0.0)
    value = jnp.einsum("bic,cik->bik", p, jnp.asarray(np.eye(2)[CLEAN]))
    return Prediction(jnp.log(value + 1e-30).astype(jnp.float32), "posterior")


def of_groups(*groups):
    """The law that writes these groups of sites, from the table."""
    p, out = law(), np.ones((2, 2, 2))
    done = ()
    for group in groups:
        for i in group:
            rest = tuple(k for k in range(3) if k not in (*done, i))
            joint, past = p.sum(rest, keepdims=True), p.sum((*rest, i), keepdims=True)
            out = out * joint / past
        done = (*done, *group)
    return out


def draw(solver, batch, denoise, shape, steps, **options):
    settings = {"shape": (batch, *shape), "times": grids.uniform(steps), **options}
    return ddjax.sample(KEY, denoise, solver.process, solver=solver, **settings)


ORDERED = {1: of_groups((0, 1, 2)), 2: of_groups((0, 1), (2,)), 3: law()}
ANY_TWO = np.mean([of_groups((0, 1), (2,)), of_groups((0, 2), (1,)), of_groups((1, 2), (0,))], axis=0)


@pytest.mark.parametrize(
    ("order", "steps", "expected"),
    [
        (LeftToRight(), 1, ORDERED[1]),
        (LeftToRight(), 2, ORDERED[2]),
        (LeftToRight(), 3, ORDERED[3]),
        (RandomOrder(), 2, ANY_TWO),
        (RandomOrder(), 3, law()),
        (Local(), 3, law()),
        (Local(), 7, law()),
    ],
)
def test_the_law_is_that_of_the_groups(order, steps, expected):
    """Chi-squared of 20,000 draws; one site a step is exact, in any order; steps may be more than sites."""
    batch = 20_000
    drawn = draw(Grouped(PROCESS, order, keep=False), batch, exact, (3,), steps)
    counts = np.zeros((2, 2, 2))
    np.add.at(counts, tuple(np.asarray(drawn.x0).T), 1)
    assert np.sum((counts - batch * expected) ** 2 / (batch * expected)) < 26  # of 7 degrees of freedom: 5e-4
    np.testing.assert_array_equal(drawn.nfe, steps)


TEXT, PATCHED = (12,), (4, 4, 2)


@functools.cache
def network(shape, **options):
    def make(rngs):
        sizes = {"symbols_in": 4, "symbols_out": 3, "width": 8, "depth": 2, "heads": 2, "dtype": jnp.float64}
        sizes |= {"time": False, "num_classes": 3} | options
        if len(shape) == 1:
            return TextTransformer(length=shape[0], **sizes, rngs=rngs)
        return DiT(shape=shape, patch=2, **sizes, rngs=rngs)

    init, apply = functional_init(make)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.6), jax.eval_shape(init, jax.random.key(0))
    )
    return bind(apply, params, Masked(3, Cosine()), "posterior")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "order", "steps", "scale"),
    [
        (TEXT, RandomOrder(), 1, 1.0),
        (TEXT, Local(), 3, 2.5),
        (TEXT, LeftToRight(), 6, 1.0),
        (PATCHED, Local(), 2, 2.5),
        (PATCHED, RandomOrder(), 4, 1.0),
    ],
)
def test_keys_and_values_of_what_is_written_change_nothing(x64, shape, order, steps, scale):
    """Token by token, with some sites known, whole patches and parts of them; and each example as if alone."""
    process = Masked(3, Cosine())
    denoise = guidance.classifier_free(network(shape), null=3, scale=scale)
    known = np.random.default_rng(0).random((5, *shape)) < 0.3
    if shape == PATCHED:
        known[:, :2, :2] = True
    known[0] = False
    value = np.random.default_rng(1).integers(0, 3, known.shape)
    observed = ddjax.Observed(jnp.asarray(known), jnp.asarray(value, jnp.int32))
    options = {"cond": jnp.arange(5) % 3, "observed": observed, "trajectory": True}
    full, kept = (draw(Grouped(process, order, keep), 5, denoise, shape, steps, **options) for keep in (False, True))
    np.testing.assert_array_equal(kept.trajectory, full.trajectory)
    np.testing.assert_array_equal(kept.nfe, steps * (1 if scale == 1.0 else 2))
    x = np.asarray(kept.trajectory)
    assert (x[-1] < 3).all()
    np.testing.assert_array_equal(x[-1][known], value[known])
    one = jax.tree.map(lambda v: v[2:3] if hasattr(v, "shape") else v, options)
    alone = draw(Grouped(process, order), 1, denoise, shape, steps, rows=jnp.asarray([2]), **one)
    np.testing.assert_array_equal(alone.x0[0], kept.x0[2])


@pytest.mark.slow
def test_a_sample_has_the_likelihood_that_its_groups_say(x64):
    """Replayed: the logits that wrote each site are those of one teacher-forced pass over the sample."""
    process, denoise, said = Masked(3, Cosine()), network(PATCHED), []
    solver = Grouped(process, RandomOrder())

    def spy(xt, t, cond=None):
        prediction = denoise(xt, t, cond)
        if isinstance(cond, dict):
            jax.debug.callback(lambda *a: said.append(a), cond["groups"], cond["sites"], prediction.value, ordered=True)
        return prediction

    drawn = draw(solver, 3, spy, PATCHED, 3, trajectory=True)
    jax.effects_barrier()
    x = np.asarray(drawn.trajectory)
    patches = np.arange(4).reshape(2, 2).repeat(2, 0).repeat(2, 1)[..., None] + np.zeros((4, 4, 2), int)
    masked = [(x[k] == 3).all(-1)[:, ::2, ::2].reshape(3, 4) for k in range(4)]
    first = np.sum(masked, axis=0)  # the step that wrote each patch
    at_once = denoise(jnp.full(x[0].shape, 3), jnp.ones(3), {"groups": jnp.asarray(first), "clean": drawn.x0}).value
    for k, (_, _, value) in enumerate(said[-3:], 1):
        here = (first == k)[:, patches]
        assert here.any()
        np.testing.assert_allclose(value[here], at_once[here], atol=1e-10)


def test_a_step_writes_as_many_as_unmask_and_where_the_order_says(x64):
    denoise = lambda xt, t, cond=None: exact_everywhere(xt)
    masks = lambda solver: (np.asarray(draw(solver, 2, denoise, (9,), 4, trajectory=True).trajectory) == 2).sum(-1)
    process = Masked(2, Cosine())
    np.testing.assert_array_equal(
        masks(Grouped(process, LeftToRight(), keep=False)), masks(Unmask(process, LeftToRight()))
    )
    shape = (4, 4, 1)
    path = np.asarray(draw(Grouped(PROCESS, Local(), keep=False), 3, denoise, shape, 4, trajectory=True).trajectory)
    for x in path[1]:
        first = np.argwhere(x[..., 0] != 2)
        assert len(first) == 4
        apart = np.abs(first[:, None] - first).max(-1) + 9 * np.eye(4)
        assert apart.min() > 1  # no two of the first group are neighbours


def exact_everywhere(xt):
    taps.tap("sites", np.arange(xt[0].size).reshape(xt.shape[1:]))
    return Prediction(jnp.zeros((*xt.shape, 2)), "posterior")


@pytest.mark.slow
def test_what_something_else_writes_is_of_the_step_before():
    """A stop token after the first step: the padding behind it is seen, and not written again."""
    told = []

    def denoise(xt, t, cond=None):
        if isinstance(cond, dict):
            jax.debug.callback(lambda g: told.append(np.asarray(g)), cond["groups"])
        taps.tap("sites", np.arange(4))
        return Prediction(jnp.tile(jnp.asarray([-50.0, 50.0]), (*xt.shape, 1)), "posterior")

    drawn = draw(Stopping(Grouped(PROCESS, LeftToRight(), keep=False), 1), 1, denoise, (4,), 4)
    jax.effects_barrier()
    np.testing.assert_array_equal(drawn.x0, 1)
    assert int(drawn.nfe[0]) == 1
    np.testing.assert_array_equal(told[0][0], [1, 2, 2, 2])
    solver, keys = (
        Grouped(PROCESS, LeftToRight(), keep=False),
        lambda i: random.fold_in(random.example_keys(jax.random.key(5), 1), i),
    )
    x = jnp.full((1, 4), 2)
    carry = solver.begin(x, None, denoise)
    x, carry, _ = solver.step(keys(0), carry, x, 1.0, 0.75, denoise)
    _, carry, _ = solver.step(keys(1), carry, x.at[0, 3].set(0), 0.75, 0.5, denoise)
    np.testing.assert_array_equal(carry.groups[0], [1, -1, -1, 1])


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(ValueError, match=r"must be processes.Masked, got Uniform"):
        Grouped(Uniform(3))
    for order in (Confidence(), Planner()):
        with pytest.raises(ValueError, match=f"{type(order).__name__} looks at what it says"):
            Grouped(PROCESS, order)
    with pytest.raises(ValueError, match="call begin"):
        Grouped(PROCESS).init(jnp.zeros((1, 2), int))
    with pytest.raises(ValueError, match="cannot be tapped"):
        draw(Grouped(PROCESS), 1, exact, (3,), 1)
