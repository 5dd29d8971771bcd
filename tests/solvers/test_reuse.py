"""Features reused between full passes: nothing reused is the solver; a cheap pass is the network with old keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, guidance, processes, random
from ddjax.denoisers import DiT, TextTransformer, functional_init, taps
from ddjax.predictions import Prediction, bind
from ddjax.sites import Sites
from ddjax.solvers import Ancestral, Reuse
from ddjax.solvers.key_values import keys_values

PLAIN, KEY = processes.Masked(3), jax.random.key(5)
TEXT, SMALL, PATCHED = (5,), (2, 3, 1), (4, 4, 2)  # states; the last one's patches are of 2 x 2
NULL = 3
# These programs run once: compiling them is all they cost.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)


@functools.cache
def network(shape=TEXT, **options):
    def make(rngs):
        sizes = {"symbols_in": 4, "symbols_out": 3, "width": 8, "depth": 2, "heads": 2, "dtype": jnp.result_type(float)}
        sizes |= {"time": False, "num_classes": 3} | options
        if len(shape) == 1:
            return TextTransformer(length=shape[0], **sizes, rngs=rngs)
        return DiT(shape=shape, patch=1 + (shape == PATCHED), **sizes, rngs=rngs)

    init, apply = functional_init(make)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.6), jax.eval_shape(init, jax.random.key(0))
    )
    return bind(apply, params, PLAIN, "posterior")


def guided(denoise, scale=2.5):
    return guidance.classifier_free(denoise, null=NULL, scale=scale)


def draw(solver, batch, denoise, shape=TEXT, **options):
    settings = {"shape": (batch, *shape), "times": grids.uniform(12), "trajectory": True, **options}
    return ddjax.sample(KEY, denoise, PLAIN, solver=solver, **settings)


def noisy(batch, shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 4, (batch, *shape)), jnp.int32)


def labels(batch):
    return jnp.arange(batch) % 3


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "scale"), [(TEXT, 1.0), (SMALL, 1.0), (PATCHED, 2.5)])
def test_reuse_of_nothing_is_the_solver(x64, shape, scale):
    """A full pass in every step, or cheap ones at all sites; then on, and it is another sampler, of each example's."""
    denoise, of = guided(network(shape), scale), {"shape": shape, "cond": labels(6)}
    plain, first, second, other = (
        draw(s, 6, denoise, **of)
        for s in (Ancestral(PLAIN), *(Reuse(Ancestral(PLAIN), *sizes) for sizes in ((2, 1), (99, 3), (1, 4))))
    )
    np.testing.assert_array_equal(first.trajectory, plain.trajectory)
    np.testing.assert_array_equal(second.trajectory, plain.trajectory)
    np.testing.assert_array_equal(other.nfe, 12 if scale == 1.0 else 24)
    assert (np.asarray(other.x0) < 3).all()
    few = draw(Reuse(Ancestral(PLAIN), 1, 4), 1, denoise, shape, cond=labels(1))
    np.testing.assert_array_equal(few.x0, other.x0[:1])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [TEXT, PATCHED])
def test_where_nothing_changed_some_sites_are_the_full_pass(x64, shape):
    """In any order, of each example's own, one beyond the last; tokens at other sites would change nothing."""
    relations = ((0, 1, 0, 1), (0, 0, 1, 2)) if shape == PATCHED else None
    plain = [network(shape), *([network(shape, relations=relations)] if relations else [])]
    weaker = lambda cond: jnp.ones_like(cond)
    both = guidance.contrasted(guided(plain[0]), weaker, scale=1.5)  # four evaluations
    for denoise in (*plain, guided(plain[-1]), both, guidance.contrasted(plain[0], weaker, scale=3.0)):
        x, t, cond = noisy(6, shape), jnp.full(6, 0.5), labels(6)
        place = Sites.of(denoise, x, t, cond)
        order = np.random.default_rng(2).permuted(np.tile(np.arange(place.count), (6, 1)), axis=1)[:, :3]
        sites = jnp.asarray(order, jnp.int32).at[0, 2].set(place.count)
        ran = place.spread((np.asarray(sites)[:, :, None] == np.arange(place.count)).any(1))

        @jit
        def both(x, other, denoise=denoise, t=t, cond=cond, sites=sites):
            view = {"past": keys_values(denoise, x, t, cond), "sites": sites, "cond": cond}
            return denoise(other, t, view).value, denoise(x, t, cond).value

        part, whole = both(x, jnp.where(ran, x, (x + 1) % 4))
        np.testing.assert_allclose(part[ran], whole[ran], atol=1e-10)
        assert (np.ptp(np.asarray(part[~ran]), axis=-1) == 0).all()  # nothing is said elsewhere


def cheap_by_override(denoise, old, new, ran, cond):
    """The network on all of a state, but for the keys and values of sites at which it does not run: those of another.

    ran: of the network's sites.
    """
    t = jnp.full(1, 0.5)
    with taps.record() as seen:
        denoise(old, t, cond)
    names = [name for name in seen if name.endswith(("/keys", "/values"))]
    kept = {name: lambda v, name=name: jnp.where(ran[None, :, None, None], v, seen[name]) for name in names}
    with taps.override(kept):
        return denoise(new, t, cond).value


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("shape", [TEXT, PATCHED])
def test_a_cheap_pass_is_the_network_with_the_old_keys_of_the_rest(x64, shape, scale):
    """Two steps by hand: a full pass, then one token is written; it runs there and at a patch with masks."""
    plain, cond, t = network(shape), labels(1) + 1, jnp.full(1, 0.5)
    denoise, solver = guided(plain, scale), Reuse(Ancestral(PLAIN), 2, 2)
    full = np.random.default_rng(4).integers(0, 3, (1, *shape))
    place = Sites.of(denoise, jnp.asarray(full), t, cond)
    # Of the network's sites the first is new, the third still has a mask in it.
    sites = place.spread(np.arange(place.count)[None])
    first, then = full.copy(), full.copy()
    first[tuple(np.argwhere(sites == 0)[0])] = 3
    masked = tuple(np.argwhere(sites == 2)[-1])
    first[masked] = then[masked] = 3
    first, then = jnp.asarray(first, jnp.int32), jnp.asarray(then, jnp.int32)
    ran = np.isin(np.arange(place.count), (0, 2))
    here = place.spread(ran[None])

    @jit
    def both(first, then):
        keys = random.example_keys(KEY, 1)
        carry = solver.begin(first, cond, denoise)
        carries = []
        for i, x in enumerate((first, then)):
            carries.append(carry := solver.step(random.fold_in(keys, i), carry, x, 0.5, 0.4, denoise, cond)[1])
        view = {"past": keys_values(denoise, first, t, cond), "sites": jnp.asarray([[0, 2]]), "cond": cond}
        overridden = [cheap_by_override(plain, first, then, ran, c) for c in (cond, jnp.full(1, NULL))]
        wholes = [denoise(x, t, cond).value for x in (first, then)]
        return carries, wholes, overridden, keys_values(denoise, then, t, view)

    (carry, after), (before, whole), (value, without), renewed = both(first, then)
    np.testing.assert_allclose(carry.prediction.value, before, atol=1e-12)
    if scale != 1.0:
        with_, without = jax.nn.log_softmax(value), jax.nn.log_softmax(without)
        value = without + scale * (with_ - without)
    assert np.abs(np.asarray(value - whole)[here]).max() > 1e-3  # the context's are old
    np.testing.assert_allclose(after.prediction.value[here], value[here], atol=1e-10)
    np.testing.assert_array_equal(after.prediction.value[~here], carry.prediction.value[~here])
    for a, b, c in zip(after.past, renewed, carry.past, strict=True):
        np.testing.assert_allclose(a[:, :, ran], b, atol=1e-12)
        np.testing.assert_array_equal(a[:, :, ~ran], c[:, :, ~ran])
    np.testing.assert_array_equal(after.seen, then)


def test_the_sites_of_a_network_are_counted_row_by_row():
    x, t = noisy(2, PATCHED), jnp.full(2, 0.5)
    sites = Sites.of(network(PATCHED), x, t)
    np.testing.assert_array_equal(sites.place[..., 1], [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2)
    assert (sites.count, sites.grid) == (4, (2, 2, 1))
    np.testing.assert_array_equal(sites.gathered(x)[0, 1], x[0, :2, 2:].reshape(-1))
    assert Sites.of(network(), noisy(2, TEXT), t).grid == (5,)


def test_bad_reuse_is_refused():
    with pytest.raises(ValueError, match=r"for processes.Masked, got Uniform"):
        Reuse(Ancestral(processes.Uniform(3)), 2)
    with pytest.raises(ValueError, match="at least 1"):
        Reuse(Ancestral(PLAIN), 0)
    with pytest.raises(ValueError, match="cannot be tapped"):
        draw(Reuse(Ancestral(PLAIN), 1), 1, lambda xt, t, cond: Prediction(jnp.zeros((*xt.shape, 3)), "posterior"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past": None}, r'cond\["past"\] and cond\["sites"\] go together'),
        ({"label": 1}, "cond has entries label"),
        ({"sites": jnp.zeros((3, 1), int)}, r'cond\["sites"\] has shape \(3, 1\); expected \(2, 2, 4\)'),
        ({"clean": noisy(2, PATCHED)}, r'without cond\["clean"\]'),
    ],
)
def test_bad_views_are_refused(change, message):
    view = {"past": (jnp.zeros((2, 2, 4, 2, 4)),) * 2, "sites": jnp.zeros((2, 1), int), "cond": None}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: network(PATCHED)(x, jnp.full(2, 0.5), view | change), noisy(2, PATCHED))
