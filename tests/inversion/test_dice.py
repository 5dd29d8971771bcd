"""DICE: round trips bit for bit, residuals and edits by brute force, and the law of what is edited."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import inversion
from ddjax.fixtures import Categorical
from ddjax.fixtures.categorical import all_states, exact_reverse
from ddjax.predictions import Prediction
from ddjax.processes import Hybrid, Masked, StateMasked, Thinning, Uniform
from ddjax.schedules import Cosine
from ddjax.solvers import Ancestral
from ddjax.symbol_schedules import SymbolPolynomial

LAWS = [Categorical(2, 3, seed=1), Categorical(2, 3, seed=2)]
TIMES = (1.0, 0.75, 0.5, 0.2, 0.0)
MASKED, UNIFORM = Masked(3, Cosine()), Uniform(3)
X0 = jnp.asarray(np.tile(all_states(2, 3), (3, 1)), jnp.int32)


def exact(process):
    """The exact denoiser of p(x | c), c = 0 or 1, the same for a batch."""

    def denoise(xt, t, cond):
        each = [law.denoise(process)(xt, t).value for law in LAWS]
        return Prediction(jnp.where(cond[:, None, None] == 0, *each), "posterior")

    return jax.tree_util.Partial(denoise)


def condition(c, batch=len(X0)):
    return jnp.full((batch,), c)


def wild(xt, t, cond):
    """A network that is sure of the wrong symbols, with infinities."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32) * 1e4
    return Prediction(jnp.where(logits < -9e3, -jnp.inf, logits)[(xt + xt[:, ::-1]) % 5], "cavity")


@pytest.mark.parametrize("residual", ["logit", "gumbel"])
@pytest.mark.parametrize(
    "process", [Masked(4), Uniform(4), Hybrid(4, uniform_share=0.3)], ids=lambda p: type(p).__name__
)
def test_a_recording_gives_its_example_back(process, residual):
    """Under any network, with one step or four; what is between is given back too."""
    x0 = jnp.asarray(np.tile(all_states(2, 4), (4, 1)), jnp.int32)
    for times in (TIMES, TIMES[::4]):
        made = inversion.record(jax.random.key(0), wild, process, x0, times=times, residual=residual)
        np.testing.assert_array_equal(made.states[:, -1], x0)
        again = inversion.edit(jax.random.key(1), wild, process, made, trajectory=True)
        np.testing.assert_array_equal(again.x0, x0)
        np.testing.assert_array_equal(jnp.moveaxis(again.trajectory, 0, 1), made.states)
        assert (np.asarray(again.nfe) == len(times) - 1).all()
        assert np.isfinite(made.noise).all()


@pytest.mark.slow
def test_independent_states_and_another_start_come_back_too():
    x0 = jnp.asarray(np.tile(all_states(2, 4), (4, 1)), jnp.int32)
    options = {"times": TIMES[1:], "independent": True, "floor": -1.0}
    made = inversion.record(jax.random.key(0), wild, Uniform(4), x0, **options)
    np.testing.assert_array_equal(inversion.edit(jax.random.key(1), wild, Uniform(4), made).x0, x0)
    kept = np.mean(np.asarray(made.states[:, 0]) == x0)
    assert abs(kept - (0.25 + 0.75 / 4)) < 0.2  # q at 0.75 keeps a quarter


@pytest.mark.slow
@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=["masked", "uniform"])
def test_residuals_and_edits_by_brute_force(x64, process):
    """z = log one-hot - log p under c; the edit is the argmax under c', every law taken from the fixture's sums."""
    floor, weight = -3.0, 0.4
    denoise = exact(process)
    made = inversion.record(jax.random.key(2), denoise, process, X0, condition(0), times=TIMES, floor=floor)
    states, noise = np.asarray(made.states), np.asarray(made.noise)

    @functools.partial(jax.jit, static_argnums=(0, 2, 3))
    def model(law, xt, s, t):
        p = exact_reverse(law, process, xt, s, t)
        p = p[..., :3] if process is MASKED else p
        return jnp.log(p / p.sum(-1, keepdims=True))

    def brute(c, xt, i):
        with np.errstate(all="ignore"):
            return np.asarray(model(LAWS[c], jnp.asarray(xt), float(TIMES[i + 1]), float(TIMES[i])))

    injection = "max" if process is MASKED else "linear"
    xt, moved = states[:, 0], 0
    for i in range(4):
        drawn = states[:, i + 1]
        written = (states[:, i] == 3) & (drawn != 3) if process is MASKED else np.ones_like(drawn, bool)
        z = np.where(np.arange(3) == np.minimum(drawn, 2)[..., None], 0, floor) - brute(0, states[:, i], i)
        np.testing.assert_allclose(noise[:, min(i, noise.shape[1] - 1)][written], z[written], atol=1e-9)
        with np.errstate(invalid="ignore"):  # at sites that are not written
            noise_now = np.maximum(weight * z, 0) if injection == "max" else weight * z  # fresh noise has weight 0
            best = np.argmax(brute(1, xt, i) + noise_now, -1)
        xt = np.where(written, best, xt)
        moved += (xt != drawn).sum()
    found = inversion.edit(
        jax.random.key(6), denoise, process, made, condition(1), lambda_1=weight, injection=injection
    )
    np.testing.assert_array_equal(found.x0, xt)
    assert moved > 0
    assert (xt == np.asarray(X0)).any()
    # A number for each step.
    whole = inversion.edit(
        jax.random.key(7), denoise, process, made, condition(0), lambda_1=jnp.asarray([1.0, 1, 1, 1])
    )
    np.testing.assert_array_equal(whole.x0, X0)


def one_site():
    """p(x | c) of one site and its exact denoiser: the reverse steps of one site are exact at any number of steps."""
    tables = jnp.asarray([[0.6, 0.25, 0.15], [0.1, 0.35, 0.55]])

    def denoise(xt, t, cond):
        return Prediction(jnp.log(tables)[cond][:, None], "cavity")

    return np.asarray(tables), jax.tree_util.Partial(denoise)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=["masked", "uniform"])
def test_an_example_of_the_model_becomes_one_of_the_other_condition_in_law(process):
    """By its own Gumbel noise (lambda_1 = 1), or by fresh noise (lambda_2 = 1); its own changes fewer examples."""
    batch, (p, denoise) = 20_000, one_site()
    key = jax.random.key
    x0 = jnp.asarray(np.random.default_rng(0).choice(3, (batch, 1), p=p[0] / p[0].sum()), jnp.int32)
    made = inversion.record(key(3), denoise, process, x0, condition(0, batch), times=(1.0, 0.5, 0.0), residual="gumbel")
    same = []
    for own in (1.0, 0.0):
        edited = inversion.edit(key(8), denoise, process, made, condition(1, batch), lambda_1=own, lambda_2=1.0 - own)
        counts = np.bincount(np.asarray(edited.x0)[:, 0], minlength=3)
        assert np.sum((counts - batch * p[1]) ** 2 / (batch * p[1])) < 20  # 2 degrees of freedom
        same.append(np.mean(np.asarray(edited.x0) == np.asarray(x0)))
    assert same[1] < np.minimum(p[0], p[1]).sum() + 0.03
    assert same[0] > same[1] + 0.05
    noise = np.asarray(made.noise)
    if process is UNIFORM:  # Gumbel noise: mean gamma, variance pi^2 / 6
        np.testing.assert_allclose(noise.mean(), np.euler_gamma, atol=0.02)
        np.testing.assert_allclose(noise.var(), np.pi**2 / 6, atol=0.05)


@pytest.mark.slow
def test_rows_do_not_depend_on_the_batch():
    denoise = exact(UNIFORM)

    def both(batch):
        made = inversion.record(jax.random.key(4), denoise, UNIFORM, X0[:batch], condition(0, batch), times=TIMES)
        return made, inversion.edit(
            jax.random.key(5), denoise, UNIFORM, made, condition(1, batch), lambda_1=0.2, lambda_2=0.5
        ).x0

    (whole, edited), others = both(7), [both(1), both(2)]
    for made, x in others:
        np.testing.assert_array_equal(x, edited[: len(x)])
        np.testing.assert_array_equal(made.states, whole.states[: len(x)])
    row = inversion.record(
        jax.random.key(4), denoise, UNIFORM, X0[2:3], condition(0, 1), times=TIMES, rows=jnp.asarray([2])
    )
    np.testing.assert_array_equal(row.states, whole.states[2:3])


def test_errors():
    record = functools.partial(inversion.record, jax.random.key(0), wild)
    made = inversion.Recording(
        jnp.asarray(TIMES), jnp.zeros((2, 5, 2), jnp.int32), jnp.zeros((2, 4, 2, 4)), Ancestral(UNIFORM)
    )
    for call, words in (
        (lambda: record(MASKED, X0, times=TIMES, residual="noise"), "residual='noise' is unknown"),
        (lambda: record(MASKED, X0, times=TIMES, floor=0.5), "floor is the logarithm of a small probability"),
        (lambda: record(MASKED, X0, times=TIMES, independent=True), "not masked again"),
        (lambda: record(MASKED, X0, times=TIMES[::-1]), "times must decrease"),
        (lambda: record(MASKED, X0, times=TIMES, rows=jnp.arange(3)), "one row number for each of the 27"),
        (lambda: record(Thinning(4), X0, times=TIMES), "reverse step of Thinning"),
        (lambda: record(StateMasked(4, SymbolPolynomial((1.0,) * 4)), X0, times=TIMES), "reverse step of StateMasked"),
        (lambda: inversion.edit(jax.random.key(0), wild, UNIFORM, made, lambda_1=jnp.ones(3)), "lambda_1 is a number"),
        (lambda: inversion.Replay(Ancestral(UNIFORM), "mean"), "injection='mean' is unknown"),
        (
            lambda: ddjax.sample(
                jax.random.key(0), wild, UNIFORM, shape=(2, 2), solver=inversion.Replay(Ancestral(UNIFORM)), times=TIMES
            ),
            "call inversion.edit",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
