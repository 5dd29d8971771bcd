"""Predictions kept, keys and values kept, sequences that end: the samples are the same, the calls are fewer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, guidance, processes, random, solvers
from ddjax.denoisers import TextTransformer, functional_init
from ddjax.fixtures import Categorical
from ddjax.predictions import Prediction, bind
from ddjax.processes import Masked
from ddjax.solvers import Ancestral, Cached, KeyValues, Stopping

LAW, PROCESS, STEPS = Categorical(2, 3, seed=1), Masked(3), 12
KEY = jax.random.key(5)
CALLS = []  # of how many rows each was


def law():
    """The law as a table."""
    rng = np.random.default_rng(LAW.seed)
    p = rng.dirichlet(np.full(9, LAW.concentration)) + 1e-4
    return (p / p.sum()).reshape(3, 3)


def posteriors(p):
    """Logits of both sites for every state of two (3 is the mask), by Bayes; there is no time in them."""
    logits = np.zeros((4, 4, 2, 3))
    for a, b in np.ndindex(4, 4):
        q = p * (np.arange(3)[:, None] == a if a < 3 else 1) * (np.arange(3) == b if b < 3 else 1)
        q = q / q.sum() if q.sum() else np.full((3, 3), 1 / 9)
        logits[a, b] = q.sum(1), q.sum(0)
    return np.log(np.maximum(logits, 1e-30)).astype(np.float32)


TABLE = posteriors(law())


def look_up(xt, t, cond=None):
    """The exact denoiser, tilted by a condition; its calls are counted."""
    jax.debug.callback(lambda: CALLS.append(len(xt)))
    value = jnp.asarray(TABLE)[xt[:, 0], xt[:, 1]]
    return Prediction(value if cond is None else value + cond["tilt"][:, None], "posterior")


def draw(solver, batch, denoise=look_up, **options):
    settings = {"shape": (batch, 2), "times": grids.uniform(STEPS), **options}
    return ddjax.sample(KEY, denoise, settings.pop("process", PROCESS), solver=solver, **settings)


def changes(path):
    """At how many steps each example is not what it was a step before (the last state is asked nothing)."""
    path = np.asarray(path)[:-1]
    return 1 + (path[1:] != path[:-1]).any(-1).sum(0)


def test_cached_samples_are_the_same_and_cost_a_call_for_each_change():
    plain, cached = (draw(s, 7, trajectory=True) for s in (Ancestral(PROCESS), Cached(Ancestral(PROCESS))))
    np.testing.assert_array_equal(cached.trajectory, plain.trajectory)
    np.testing.assert_array_equal(plain.nfe, STEPS)
    np.testing.assert_array_equal(cached.nfe, changes(plain.trajectory))
    assert cached.nfe.max() < STEPS
    for batch in (1, 2):
        few = draw(Cached(Ancestral(PROCESS)), batch)
        np.testing.assert_array_equal(few.x0, plain.x0[:batch])
        np.testing.assert_array_equal(few.nfe, cached.nfe[:batch])


def test_only_rows_that_changed_are_evaluated_in_powers_of_two():
    cached = Cached(Ancestral(PROCESS))
    path = np.asarray(draw(cached, 7, trajectory=True).trajectory)[:-1]
    jax.effects_barrier()
    CALLS.clear()
    draw(cached, 7, trajectory=True)
    jax.effects_barrier()
    changed = [7, *(path[1:] != path[:-1]).any(-1).sum(1)]
    assert sorted(CALLS) == sorted(min(1 << (int(n) - 1).bit_length(), 7) for n in changed if n)
    assert changed.count(0) > 0


def test_rows_that_only_fill_up_a_batch_keep_what_they_had():
    """Three of seven change and four are evaluated, by a network that says how many it was given."""
    solver = Cached(Ancestral(PROCESS))
    denoise = lambda xt, t, cond: Prediction(jnp.full((*xt.shape, 3), 1.0 * len(xt)), "posterior")
    step = jax.jit(lambda carry, x: solver.step(random.example_keys(KEY, 7), carry, x, 0.5, 0.4, denoise)[1:])
    x = jnp.full((7, 2), 3)
    carry, first = step(solver.begin(x, None, denoise), x)
    carry, then = step(carry, x.at[jnp.asarray([1, 2, 6]), 0].set(1))
    np.testing.assert_array_equal(carry.prediction.value[:, 0, 0], [7, 4, 4, 7, 7, 7, 4])
    np.testing.assert_array_equal(first.nfe, 1)
    np.testing.assert_array_equal(then.nfe, [0, 1, 1, 0, 0, 0, 1])


@pytest.mark.slow
def test_conditions_guidance_prompts_and_other_calls():
    tilt = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
    guided = guidance.classifier_free(look_up, null={"tilt": 0.0}, scale=2.0)
    known = ddjax.Observed(jnp.asarray([[True, False]] * 7), jnp.ones((7, 2), jnp.int32))
    for options in ({"cond": {"tilt": tilt}}, {"cond": {"tilt": tilt}, "denoise": guided}, {"observed": known}):
        plain, cached = (
            draw(s, 7, trajectory=True, **options) for s in (Ancestral(PROCESS), Cached(Ancestral(PROCESS)))
        )
        np.testing.assert_array_equal(cached.trajectory, plain.trajectory)
        np.testing.assert_array_equal(cached.nfe, changes(plain.trajectory) * (2 if "denoise" in options else 1))


@pytest.mark.slow
def test_evaluations_are_as_many_as_expected(x64):
    drawn = draw(Cached(Ancestral(PROCESS)), 20_000)
    p = 1 - (1 - 1 / STEPS) ** 2
    error = np.asarray(drawn.nfe).std() / np.sqrt(20_000)
    assert abs(np.asarray(drawn.nfe).mean() - (1 + (STEPS - 1) * p)) < 4 * error


def test_what_cannot_be_cached_is_refused():
    timed = lambda xt, t, cond: Prediction(t[:, None, None] * jnp.ones((*xt.shape, 3)), "posterior")
    with pytest.raises(ValueError, match="this one depends on the time"):
        draw(Cached(Ancestral(PROCESS)), 1, timed)

    class Elsewhere(Ancestral):
        def step(self, keys, carry, xt, t, s, denoise, cond=None):
            return super().step(keys, carry, xt + 0, t, s, denoise, cond)

    with pytest.raises(ValueError, match="Elsewhere does not ask the network"):
        draw(Cached(Elsewhere(PROCESS)), 1)
    with pytest.raises(ValueError, match="call begin"):
        Cached(Ancestral(PROCESS)).init(jnp.zeros((1, 2), int))


# Blocks of 2 sites, the last of one.
BLOCKS = processes.in_blocks(PROCESS, 5, 2)
IN_TURN = grids.in_turn(grids.uniform(3), 3)


@functools.cache
def network(**options):
    make = lambda rngs: TextTransformer(
        length=5, symbols_in=4, symbols_out=3, width=8, depth=2, heads=2, dtype=jnp.float64, rngs=rngs,
        **{"block": 2, "time": False} | options,
    )  # fmt: skip
    init, apply = functional_init(make)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.6), jax.eval_shape(init, jax.random.key(0))
    )
    return bind(apply, params, BLOCKS, "posterior")


def in_blocks(solver, denoise, **options):
    settings = {"process": BLOCKS, "shape": (6, 5), "times": IN_TURN, **options}
    return draw(solver, 6, denoise, **settings)


@pytest.mark.parametrize("timed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_block_behind_the_keys_and_values_of_the_others_is_the_whole_sequence(x64, timed):
    """Logits to 1e-10 (times are embedded in float32: 1e-5), by hand, block after block."""
    denoise = network(time=timed)
    rng = np.random.default_rng(0)
    clean = jnp.asarray(rng.integers(0, 3, (6, 5)), jnp.int32)

    @jax.jit
    def both(x, past, b, t):
        sites = jnp.broadcast_to(2 * b + jnp.arange(2), (6, 2))
        view = {"past": past, "sites": sites, "cond": None}
        done = jnp.where(jnp.arange(5) < 2 * (b + 1), clean, 3)
        new = solvers.key_values.keys_values(denoise, done, jnp.full(6, 1 - (b + 1) / 3), view)
        return denoise(x, t).value, denoise(x, t, view).value, new

    past = (jnp.full((6, 2, 5, 2, 4), 1e3),) * 2  # what was never written must not be seen
    for b in range(3):
        noisy = jnp.where(jnp.asarray(rng.random((6, 5))) < 0.5, 3, clean)
        x = jnp.where(np.arange(5) // 2 < b, clean, jnp.where(np.arange(5) // 2 == b, noisy, 3))
        whole, part, new = both(x, past, b, jnp.full(6, 1 - (b + 0.4) / 3))
        here = np.arange(5) // 2 == b
        np.testing.assert_allclose(part[:, here], whole[:, here], atol=1e-5 if timed else 1e-10)
        np.testing.assert_array_equal(part[:, ~here], 0.0)
        put = np.flatnonzero(here)
        past = tuple(a.at[:, :, put].set(n[:, :, : len(put)]) for a, n in zip(past, new, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("timed", [True, False])
def test_samples_behind_keys_and_values_are_those_of_the_whole_sequence(x64, timed):
    """Every token; and one call more for each block that others stand behind."""
    denoise = network(time=timed)
    plain = in_blocks(Ancestral(BLOCKS), denoise, trajectory=True)
    kept = in_blocks(KeyValues(Ancestral(BLOCKS)), denoise, trajectory=True)
    np.testing.assert_array_equal(kept.trajectory, plain.trajectory)
    np.testing.assert_array_equal(kept.nfe, 9 + 2)
    if not timed:
        both = in_blocks(KeyValues(Cached(Ancestral(BLOCKS))), denoise)
        np.testing.assert_array_equal(both.x0, plain.x0)
        path = np.asarray(plain.trajectory)
        parts = [changes(path[i : i + 4]) for i in (0, 3, 6)]  # every block begins with a call
        np.testing.assert_array_equal(both.nfe, sum(parts) + 2)


@pytest.mark.slow
def test_a_start_between_blocks_writes_all_that_stand_before_it(x64):
    denoise = network()
    init = jnp.where(jnp.arange(5) < 4, in_blocks(Ancestral(BLOCKS), denoise).x0, 3)
    plain, kept = (
        in_blocks(s, denoise, times=IN_TURN[6:], init=init) for s in (Ancestral(BLOCKS), KeyValues(Ancestral(BLOCKS)))
    )
    np.testing.assert_array_equal(kept.x0, plain.x0)
    np.testing.assert_array_equal(kept.nfe, 3 + 2)


@pytest.mark.slow
def test_some_sites_with_the_keys_and_values_of_a_full_pass_are_the_full_pass(x64):
    """A network without blocks, at sites of each example's own, in any order; new tokens at sites that are not run
    again would change nothing."""
    denoise = network(block=None)
    x, t = jnp.asarray(np.random.default_rng(1).integers(0, 4, (6, 5)), jnp.int32), jnp.full(6, 0.5)
    sites = jnp.asarray(np.random.default_rng(2).permuted(np.tile(np.arange(5), (6, 1)), axis=1)[:, :3], jnp.int32)
    sites = sites.at[0, 2].set(5)  # beyond the sequence
    view = {"past": solvers.key_values.keys_values(denoise, x, t), "sites": sites, "cond": None}
    ran = (np.asarray(sites)[:, :, None] == np.arange(5)).any(1)
    hidden = jnp.where(ran, x, (x + 1) % 4)
    np.testing.assert_allclose(
        denoise(hidden, t, view).value, np.where(ran[..., None], denoise(x, t).value, 0), atol=1e-10
    )


def test_what_has_no_keys_and_values_is_refused():
    with pytest.raises(ValueError, match="goes block by block"):
        KeyValues(Ancestral(PROCESS))
    plain = lambda xt, t, cond: Prediction(jnp.zeros((*xt.shape, 3)), "posterior")
    with pytest.raises(ValueError, match="cannot be tapped"):
        in_blocks(KeyValues(Ancestral(BLOCKS)), plain)
    twice = lambda xt, t, cond: denoise(xt, t, denoise(xt, t, cond) and cond)
    twice.evaluations, denoise = 2, network()
    with pytest.raises(ValueError, match="evaluated 2 times, not in one batch"):
        in_blocks(KeyValues(Ancestral(BLOCKS)), twice)


@pytest.mark.slow
def test_under_guidance_each_evaluation_has_its_own_keys_and_values(x64):
    """As the whole sequence, token by token; also with what is cached in the block."""
    guided = guidance.classifier_free(network(num_classes=3), null=3, scale=2.5)
    cond = jnp.arange(6) % 3
    plain = in_blocks(Ancestral(BLOCKS), guided, cond=cond, trajectory=True)
    for solver in (KeyValues(Ancestral(BLOCKS)), KeyValues(Cached(Ancestral(BLOCKS)))):
        kept = in_blocks(solver, guided, cond=cond, trajectory=True)
        np.testing.assert_array_equal(kept.trajectory, plain.trajectory)
        assert (np.asarray(kept.nfe) <= 2 * (9 + 2)).all()


# Stop tokens: symbol 1, and behind it padding, symbol 2.


@pytest.mark.slow
def test_all_behind_a_stop_token_is_padding_and_costs_nothing():
    plain = draw(Ancestral(PROCESS), 7, trajectory=True)
    stopped = draw(Stopping(Cached(Ancestral(PROCESS)), 1, 2), 7, trajectory=True)
    path = np.asarray(stopped.trajectory)
    after = path[:, :, 0] == 1
    assert (path[:, :, 1][after] == 2).all()
    assert after[-1].any()
    np.testing.assert_array_equal(path[:, :, 0], plain.trajectory[:, :, 0])  # nothing else is touched
    np.testing.assert_array_equal(stopped.nfe, changes(path))
    np.testing.assert_array_equal(solvers.stopping.lengths(stopped.x0, 1)[after[-1]], 0)


@pytest.mark.slow
def test_stopping_is_exact_where_padding_is_certain():
    """The law of the output against the law, where sites are all but always written one at a time."""
    p = law()
    p[1] = [0.0, 0.0, p[1].sum()]
    logits = posteriors(p)
    denoise = lambda xt, t, cond: Prediction(jnp.asarray(logits)[xt[:, 0], xt[:, 1]], "posterior")
    batch = 20_000
    x = np.asarray(draw(Stopping(Ancestral(PROCESS), 1, 2), batch, denoise, times=grids.uniform(64)).x0)
    counts = np.zeros((3, 3))
    np.add.at(counts, tuple(x.T), 1)
    seen = p > 0
    assert counts[~seen].sum() == 0
    assert np.sum((counts - batch * p)[seen] ** 2 / (batch * p[seen])) < 30  # 6 degrees of freedom


@pytest.mark.slow
def test_when_all_have_stopped_the_network_is_not_called(x64):
    """Forced to stop in the first block of three: the second and third cost nothing, with their keys and values."""
    denoise = network()

    def forced(xt, t, cond=None):
        jax.debug.callback(lambda: CALLS.append(len(xt)))
        prediction = denoise(xt, t, cond)
        return Prediction(prediction.value.at[:, 1].set(jnp.asarray([-50.0, 50.0, -50.0])), prediction.kind)

    for inner in (KeyValues(Ancestral(BLOCKS)), KeyValues(Cached(Ancestral(BLOCKS))), Ancestral(BLOCKS)):
        drawn = in_blocks(Stopping(inner, 1), forced)
        jax.effects_barrier()
        CALLS.clear()
        in_blocks(Stopping(inner, 1), forced)
        jax.effects_barrier()
        assert (np.asarray(drawn.x0)[:, 1:] == 1).all()
        assert (np.asarray(drawn.nfe) <= 3).all()
        assert len(CALLS) <= 3


def test_bad_stop_tokens_are_refused():
    for bad in ({"stop": 3}, {"stop": 0, "padding": -1}):
        with pytest.raises(ValueError, match="must be a symbol, 0 to 2"):
            Stopping(Ancestral(PROCESS), **bad)
    with pytest.raises(ValueError, match="for masked processes, not for Uniform"):
        Stopping(Ancestral(processes.Uniform(3)), 0)
    with pytest.raises(ValueError, match="for sequences"):
        draw(Stopping(Ancestral(PROCESS), 0), 1, look_up, shape=(1, 2, 1))


@pytest.mark.slow
def test_a_stream_ends_as_the_sample():
    """Every k steps, the trajectory's own states; one program whatever k."""
    traces = []

    def denoise(xt, t, cond):
        traces.append(1)
        return look_up(xt, t, cond)

    solver = Cached(Ancestral(PROCESS))
    whole = draw(solver, 3, trajectory=True)
    settings = {"shape": (3, 2), "times": grids.uniform(STEPS), "solver": solver}
    first = None
    for every in (5, 1, 100):
        parts = list(ddjax.stream(KEY, denoise, PROCESS, every=every, **settings))
        first = first or len(traces)
        assert [p.step for p in parts] == [*range(every, STEPS, every), STEPS]
        for p in parts:
            np.testing.assert_array_equal(p.x, whole.trajectory[p.step])
        np.testing.assert_array_equal(parts[-1].nfe, whole.nfe)
    assert len(traces) == first
    with pytest.raises(ValueError, match="every=0"):
        ddjax.stream(KEY, denoise, PROCESS, every=0, **settings)
