"""Self-attention guidance against its definition, in NumPy and SciPy, for a network that says what it attends to.

Of ddjax's own networks: tests/guidance/test_attention.py. Against diffusers: test_attention_parity.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

import ddjax
from ddjax import grids, guidance, solvers, taps
from ddjax.predictions import Prediction
from ddjax.processes import (
    PFGM,
    Gaussian,
    Geometric,
    InBasis,
    Interpolant,
    LearnedVariance,
    Masked,
    MixtureOutput,
    Reflected,
    critically_damped,
    in_basis,
)
from ddjax.schedules import EDM, CondOT, ShortestPath, VPCosine

RNG = np.random.default_rng(3)
T = np.array([0.3, 0.8])
MATRIX, HEADS = RNG.normal(size=(3, 3)), RNG.normal(size=(2, 2, 3, 4))  # of channels; of queries and keys in each head
VP, DCT = Gaussian(VPCosine()), in_basis.DCT((1, 2))


def pooled(x, side):
    """Means over squares, `(batch, sites, channels)`."""
    batch, *sides, channels = x.shape
    apart = x.reshape(batch, *(n for whole in sides for n in (whole // side, side)), channels)
    return apart.mean(tuple(range(2, 2 * len(sides) + 1, 2))).reshape(batch, -1, channels)


def map_of(np, x, side):
    """The softmax of two heads over coarse sites, in NumPy or JAX: `(batch, heads, queries, keys)`."""
    q, k = (np.einsum("bnc,hcd->bhnd", pooled(x, side), HEADS[i]) for i in (0, 1))
    scores = np.exp(np.einsum("bhqd,bhkd->bhqk", q, k))
    return scores / scores.sum(-1, keepdims=True)


def clean(np, x, t, cond):
    """What it takes for x0: of neighbours and the condition, and no more than a few."""
    t = t.reshape(-1, *(1,) * (x.ndim - 1))
    return np.tanh(x @ MATRIX + 0.7 * np.roll(x, 1, axis=1) + (0.0 if cond is None else cond)) * (1.0 + t)


VALUES = {  # of each kind, by alpha, sigma and their derivatives
    "x0": lambda x0, noise, a, s, da, ds: x0,
    "noise": lambda x0, noise, a, s, da, ds: noise,
    "score": lambda x0, noise, a, s, da, ds: -noise / s,
    "v": lambda x0, noise, a, s, da, ds: a * noise - s * x0,
    "velocity": lambda x0, noise, a, s, da, ds: da * x0 + ds * noise,
    "edm": lambda x0, noise, a, s, da, ds: (s * x0 - a * noise) / np.hypot(s, a),  # data of unit width
    "x1": lambda x0, noise, a, s, da, ds: noise,
    "residual": lambda x0, noise, a, s, da, ds: noise - x0,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """How states are made of x0 and noise."""

    process: object
    kind: str

    def weights(self, x):
        """alpha, sigma and their derivatives."""
        path, t = self.process.schedule, jnp.asarray(T).reshape(-1, *(1,) * (x.ndim - 1))
        names = ("alpha", "beta") if isinstance(self.process, Interpolant) else ("alpha", "sigma")
        return [np.asarray(getattr(path, n)(t)) for n in (*names, *(f"{n}_prime" for n in names))]

    @property
    def basis(self):
        """To coordinates and back."""
        if not isinstance(self.process, InBasis):
            return (lambda x: x,) * 2
        return tuple(lambda x, f=f: f(x, axes=(1, 2), norm="ortho") for f in (scipy.fft.dctn, scipy.fft.idctn))

    def noise(self, x, x0):
        """In coordinates."""
        (to, _), (a, s, *_) = self.basis, self.weights(x)
        return (to(x) - a * to(x0)) / s

    def value(self, x, noise):
        """What is said of x by its noise."""
        (to, back), (a, s, *slopes) = self.basis, self.weights(x)
        return back(VALUES[self.kind]((to(x) - s * noise) / a, noise, a, s, *slopes))

    def said(self, x, x0):
        """What is said of x by its x0."""
        return self.value(x, self.noise(x, x0))


def network(process, kind, side):
    """A denoiser whose x0 and map are as above."""

    def denoise(x, t, cond=None):
        taps.tap("part/attention/weights", map_of(jnp, x, side))
        x0 = taps.tap("part", clean(jnp, x, t, cond))
        return process.convert(Prediction(x0, "x0"), kind, x, t)

    return denoise


def spread(mask, shape, side):
    """A mask of coarse sites at the sites of the state, one by one."""
    coarse = [n // side for n in shape[1:-1]]
    out = np.zeros(shape)
    for at in np.ndindex(*shape[1:-1]):
        out[:, *at] = mask[:, np.ravel_multi_index([i // side for i in at], coarse)][:, None]
    return out


def filtered(x0, sigma, kernel):
    """Each channel under a Gaussian filter, along all sides."""
    for axis in range(1, x0.ndim - 1):
        x0 = scipy.ndimage.gaussian_filter1d(x0, sigma, axis, mode="mirror", radius=kernel // 2)
    return x0


def by_definition(case, x, cond, side, scale, threshold=1.0, sigma=1.0, kernel=9):
    """The noise of the state moved away from that of the state blurred where all attend, as a prediction."""
    x0 = clean(np, x, T, cond)
    noise = case.noise(x, x0)
    got = map_of(np, x, side).mean(1).sum(1)
    assert np.abs(got - threshold).min() > 1e-6
    mask = spread(got > threshold, x.shape, side)
    assert all(0 < of_one.mean() < 1 for of_one in mask)
    (to, back), (a, s, *_) = case.basis, case.weights(x)
    degraded = back(a * to(mask * filtered(x0, sigma, kernel) + (1 - mask) * x0) + s * noise)
    weak = case.noise(degraded, clean(np, degraded, T, cond))
    return case.value(x, noise + (scale - 1) * (noise - weak))


CASES = {
    **{kind: Case(VP, kind) for kind in ("x0", "noise", "score", "v", "velocity", "edm")},
    "ve": Case(Gaussian(EDM(3.0)), "edm"),
    "flow": Case(Gaussian(CondOT()), "velocity"),
    "pfgm": Case(PFGM(CondOT()), "x0"),
    "basis": Case(InBasis(Gaussian(ShortestPath(np.linspace(0.5, 3.0, 48).reshape(8, 6, 1))), DCT), "noise"),
    "basis-x0": Case(InBasis(Gaussian(ShortestPath(np.linspace(0.5, 3.0, 48).reshape(8, 6, 1))), DCT), "x0"),
    **{kind: Case(Interpolant(), kind) for kind in ("x1", "residual")},
}


QUICK = ("noise", "v")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_it_is_its_definition(name):
    case, x = CASES[name], RNG.normal(size=(2, 8, 6, 3))
    denoise = network(case.process, case.kind, side=2)
    np.testing.assert_allclose(denoise(x, T).value, case.said(x, clean(np, x, T, None)), atol=1e-12)
    for options in ({"scale": 1.75}, {"scale": 0.4, "threshold": 0.9, "sigma": 2.0, "kernel": 5}):
        guided = guidance.self_attention(denoise, "part", case.process, **options)
        out = jax.jit(lambda denoise, x: denoise(x, jnp.asarray(T)))(guided, x)
        assert (out.kind, guided.evaluations) == (case.kind, 2)
        np.testing.assert_allclose(out.value, by_definition(case, x, None, 2, **options), atol=1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "side"), [((12, 3), 3), ((4, 6, 3), 1), ((4, 2, 6, 3), 2)])
def test_sites_are_those_of_the_states_grid_or_squares_of_them(shape, side):
    x, case = RNG.normal(size=(2, *shape)), CASES["noise"]
    guided = guidance.self_attention(network(VP, "noise", side), "part", VP, scale=2.5)
    np.testing.assert_allclose(guided(x, T).value, by_definition(case, x, None, side, 2.5), atol=1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_with_classifier_free_guidance():
    case, denoise, x = CASES["v"], network(VP, "v", 2), RNG.normal(size=(2, 8, 6, 3))
    cond, null = RNG.normal(size=(2, 1, 1, 3)), np.zeros((2, 1, 1, 3))
    sides = [case.said(x, clean(np, x, T, of)) for of in (cond, null)]
    g, s = 4.0, 0.75  # both as the paper has them

    moved = [by_definition(case, x, of, 2, 1 + s) for of in (cond, null)]
    both = guidance.classifier_free(guidance.self_attention(denoise, "part", VP, scale=1 + s), null=0.0, scale=g)
    assert both.evaluations == 4
    np.testing.assert_allclose(both(x, T, cond).value, moved[1] + g * (moved[0] - moved[1]), atol=1e-9)

    # Equation 25: the condition's guidance, and beside it that of the attention without a condition.
    weaker = guidance.self_attention(denoise, "part", VP, scale=1 - s / (g - 1))
    paper = guidance.by_weaker(denoise, weaker, scale=g, told=False)
    assert paper.evaluations == 3
    expected = sides[1] + g * (sides[0] - sides[1]) + (moved[1] - sides[1])
    np.testing.assert_allclose(paper(x, T, cond).value, expected, atol=1e-9)

    within = guidance.self_attention(guidance.classifier_free(denoise, null=0.0, scale=g), "part", VP, scale=2.0)
    with pytest.raises(ValueError, match=r"expected 2 examples of 48 or 12 sites \(put classifier-free"):
        within(x, T, cond)


def test_listeners_hear_the_plain_call_alone():
    denoise, x = network(VP, "x0", 2), RNG.normal(size=(2, 8, 6, 3)).astype(np.float32)
    guided, t = guidance.self_attention(denoise, "part", VP, scale=2.0), T.astype(np.float32)
    names = ("part", "part/attention/weights")
    with taps.record(*names) as heard:
        guided(x, t)
    with taps.record(*names) as own:
        denoise(x, t)
    for name in names:
        np.testing.assert_array_equal(heard[name], own[name])
    # An override of the map is what the mask is made of: where all get as much, 1, nothing is blurred.
    with taps.override({names[1]: lambda w: jnp.broadcast_to(jnp.eye(12), w.shape)}):
        np.testing.assert_allclose(guided(x, t).value, denoise(x, t).value, atol=1e-6)


def test_a_learned_variance_is_the_plain_one():
    process, x = LearnedVariance(VPCosine()), RNG.normal(size=(2, 8, 6, 3)).astype(np.float32)
    plain, t = network(process, "noise", 2), T.astype(np.float32)

    def both(x, t, cond=None):
        return Prediction(jnp.concatenate([plain(x, t).value, jnp.sin(x)], -1), "noise")

    out = guidance.self_attention(both, "part", process, scale=3.0)(x, t).value
    expected = guidance.self_attention(plain, "part", VP, scale=3.0)(x, t).value
    np.testing.assert_allclose(out, np.concatenate([expected, np.sin(x)], -1), atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_states_with_auxiliary_variables():
    """The blur of x0 moves the variables beside it too, by the process's mean; what is predicted does not matter."""
    process, x = critically_damped(), RNG.normal(size=(2, 8, 6, 6))

    def denoise(kind):
        def denoise(x, t, cond=None):
            taps.tap("part/attention/weights", map_of(jnp, x[..., :3], 2))
            return process.convert(Prediction(clean(jnp, x[..., :3] - x[..., 3:], t, cond), "x0"), kind, x, t)

        return denoise

    x0 = clean(np, x[..., :3] - x[..., 3:], T, None)
    got = map_of(np, x[..., :3], 2).mean(1).sum(1)
    smooth = np.where(spread(got > 1, x0.shape, 2), filtered(x0, 1.0, 9), x0)
    mean = lambda x0: np.asarray(process.marginal(x0, T).mean)
    degraded = x - mean(x0) + mean(smooth)
    weak = clean(np, degraded[..., :3] - degraded[..., 3:], T, None)
    for kind in ("x0", "noise", "score"):
        out = guidance.self_attention(denoise(kind), "part", process, scale=1.75)(jnp.asarray(x), jnp.asarray(T))
        said = process.convert(out, "x0", jnp.asarray(x), jnp.asarray(T)).value
        # The x0 that the noise of the blurred state says of x_t: what it says there, less what the blur added.
        np.testing.assert_allclose(said, x0 + 0.75 * (x0 - (weak - (smooth - x0))), atol=1e-9)


def test_at_either_end_it_is_finite():
    """Without signal an x0 cannot be known from noise, and without noise the noise of an x0 cannot."""
    x, ends = RNG.normal(size=(2, 8, 6, 3)).astype(np.float32), np.float32([0.0, 1.0])
    for kind in ("x0", "noise", "v", "velocity"):
        guided = guidance.self_attention(network(VP, kind, 2), "part", VP, scale=2.0)
        assert np.isfinite(guided(x, ends).value).all(), kind


@pytest.mark.slow
def test_it_guides_a_sampler():
    settings = {"shape": (2, 8, 6, 3), "solver": solvers.DDIM(VP), "times": grids.uniform(4)}
    draw = lambda denoise: ddjax.sample(jax.random.key(3), denoise, VP, **settings)
    drawn = {}
    for kind in ("x0", "noise", "velocity"):
        denoise = network(VP, kind, 2)
        plain, guided = draw(denoise), draw(guidance.self_attention(denoise, "part", VP, scale=1.5))
        np.testing.assert_array_equal(guided.nfe, 2 * plain.nfe)
        assert np.abs(guided.x0 - plain.x0).max() > 1e-2
        drawn[kind] = guided.x0
    # At t = 1 nothing of x0 is known from noise, and of the others all: there alone they differ.
    assert np.isfinite(drawn["noise"]).all()
    np.testing.assert_allclose(drawn["x0"], drawn["velocity"], atol=1e-4)


def test_what_cannot_be_is_refused():
    denoise, x = network(VP, "noise", 2), jnp.zeros((2, 8, 6, 3))
    assert guidance.self_attention(denoise, "part", VP, scale=1.0) is denoise
    with pytest.raises(ValueError, match=r"kernel=8, .* expected an odd number"):
        guidance.self_attention(denoise, "part", VP, scale=2.0, kernel=8)
    with pytest.raises(ValueError, match="sigma=0: expected an odd number of weights, and a positive width"):
        guidance.self_attention(denoise, "part", VP, scale=2.0, sigma=0)
    for process in (Masked(3), Geometric(), Reflected()):
        with pytest.raises(ValueError, match=f"{type(process).__name__} does not say a state by x0 and noise alone"):
            guidance.self_attention(denoise, "part", process, scale=2.0)

    def call(denoise, process=VP, block="part", x=x):
        guided = guidance.self_attention(denoise, block, process, scale=2.0)
        jax.eval_shape(lambda x: guided(x, jnp.asarray(T)), x)

    def seen(shape):
        def denoise(xt, t, cond=None):
            taps.tap("part/attention/weights", jnp.ones(shape))
            return Prediction(xt, "noise")

        return denoise

    call(denoise)
    with pytest.raises(ValueError, match="else/attention/weights were never reached"):
        call(denoise, block="else")
    with pytest.raises(ValueError, match="not of sites to themselves: self-attention guidance"):
        call(seen((2, 1, 1, 12)))
    with pytest.raises(ValueError, match=r"\(2, 1, 14, 14\) is not of the sites .*: expected 2 examples of 48 or 12"):
        call(seen((2, 1, 14, 14)))  # tokens beside the patches
    with pytest.raises(ValueError, match="expected 2 examples of no sites"):
        call(seen((2, 1, 5, 5)), x=jnp.zeros((2, 5)))
    mixed = MixtureOutput(VPCosine())
    with pytest.raises(ValueError, match="needs one statement of a state"):
        call(lambda x, t, cond: Prediction(jnp.stack([seen((2, 1, 12, 12))(x, t).value] * 4, -1), "noise"), mixed)
