"""Attention's insides as taps: what they are, that they cost nothing unheard, and over the steps of a sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import denoisers, grids, solvers
from ddjax.denoisers import DiT, TextTransformer, functional_init, taps
from ddjax.processes import Masked

SMALL = {"symbols_in": 4, "symbols_out": 3, "width": 8, "depth": 2, "heads": 2}
XT, T = np.random.default_rng(1).integers(0, 4, (2, 6), np.int32), jnp.asarray([0.2, 0.7])
NETWORKS = {
    "text": (lambda rngs, **o: TextTransformer(length=6, **SMALL, **o, rngs=rngs), XT),
    "dit": (lambda rngs, **o: DiT(shape=(2, 3, 1), **SMALL, **o, rngs=rngs), XT.reshape(2, 2, 3, 1)),
}
POINTS = [f"block/{i}/{part}" for i in range(2) for part in ("queries", "keys", "values", "attention/weights")]


@pytest.fixture(params=NETWORKS)
def case(request, noise):
    """`case(**options) -> (call of the parameters, parameters)`."""

    def case(**options):
        make, xt = NETWORKS[request.param]
        init, apply = functional_init(functools.partial(make, **options))
        return lambda params: apply(params, xt, T), noise(jax.eval_shape(init, jax.random.key(0)))

    return case


@pytest.mark.slow
def test_weights_are_the_softmax_and_what_the_branch_is_made_of(case):
    call, params = case()
    with taps.record(*POINTS, "block/0/attention", "block/1/attention") as seen:
        call(params)
    for i in range(2):
        q, k, v, w, branch = (np.asarray(seen[f"block/{i}/{p}"], float) for p in ("queries", "keys", "values",
            "attention/weights", "attention"))  # fmt: skip
        scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 2)  # heads of 4
        expected = scores / scores.sum(-1, keepdims=True)
        assert w.shape == (2, 2, 6, 6)
        np.testing.assert_allclose(w, expected, atol=1e-5)
        out = params["stack"]["blocks"][str(i)]["attention"]["out"]
        y = np.einsum("bhqk,bkhd->bqhd", expected, v).reshape(2, 6, 8) @ out["kernel"] + out["bias"]
        np.testing.assert_allclose(branch, y, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_overridden_with_themselves_they_change_no_bit(case, implementation):
    call, params = case(attention=implementation)
    plain = call(params)
    with taps.record(*POINTS) as seen:
        np.testing.assert_array_equal(call(params), plain)
    for overrides in ({p: lambda x: x for p in POINTS}, dict(seen)):
        with taps.override(overrides):
            np.testing.assert_array_equal(call(params), plain)


def test_an_override_of_the_weights_is_what_attention_uses(case):
    call, params = case()
    # Where all weigh the same, the branch is the projected mean of the values.
    with taps.override({"block/1/attention/weights": lambda w: jnp.full_like(w, 1 / 6)}), taps.record() as seen:
        call(params)
    out = params["stack"]["blocks"]["1"]["attention"]["out"]
    mean = np.asarray(seen["block/1/values"]).mean(1).reshape(2, 1, 8) @ out["kernel"] + out["bias"]
    np.testing.assert_allclose(seen["block/1/attention"], np.broadcast_to(mean, (2, 6, 8)), atol=1e-5)


def test_unheard_taps_leave_the_program_as_it_is(case, monkeypatch):
    call, params = case()
    text = jax.jit(call).lower(params).as_text()
    with monkeypatch.context() as patch:
        patch.setattr(taps.Below, "__call__", lambda self, point, x: x)
        patch.setattr(taps.Below, "wanted", lambda self, point: False)
        for module in (denoisers.dit, denoisers.text, denoisers.layers.blocks):
            patch.setattr(module, "tap", lambda name, x: x)
        call, _ = case()
        assert jax.jit(call).lower(params).as_text() == text

    def heard(params):
        with taps.record("block/0/attention/weights") as seen:
            return call(params), seen

    assert jax.jit(heard).lower(params).as_text() != text


def test_weights_are_written_down_only_where_someone_listens_for_them(case, monkeypatch):
    fused, calls = jax.nn.dot_product_attention, []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **o: calls.append(1) or fused(*a, **o))
    call, params = case(attention="xla")
    for names, count in (((), 2), (("embed",), 2), (("block/1/queries",), 2), (("block/1/attention/weights",), 1)):
        calls.clear()
        with taps.record(*names):  # without names everything but them
            call(params)
        assert len(calls) == count, names


@pytest.fixture(scope="module")
def sampler(noise):
    init, apply = functional_init(lambda rngs: TextTransformer(length=6, **SMALL, rngs=rngs))
    params, process = noise(jax.eval_shape(init, jax.random.key(0))), Masked(3)
    denoise = ddjax.bind(apply, params, process, "posterior")
    settings = {"shape": (2, 6), "solver": solvers.Ancestral(process), "times": grids.uniform(3)}
    return denoise, functools.partial(ddjax.sample, jax.random.key(3), process=process, **settings), settings["times"]


@pytest.mark.slow
def test_sampling_returns_taps_over_steps(sampler):
    denoise, draw, times = sampler
    plain = draw(denoise=denoise, trajectory=True)
    names = ("block/1/attention/weights", "embed")
    out = draw(denoise=denoise, trajectory=True, taps=names)
    np.testing.assert_array_equal(out.trajectory, plain.trajectory)
    assert plain.taps is None
    assert {n: v.shape for n, v in out.taps.items()} == {names[0]: (3, 2, 2, 6, 6), names[1]: (3, 2, 6, 8)}
    for i in range(3):
        with taps.record(*names) as seen:
            denoise(plain.trajectory[i], jnp.full(2, times[i]), None)
        for name in names:
            np.testing.assert_allclose(out.taps[name][i], seen[name], atol=1e-5)


def test_what_sampling_cannot_tap_is_an_error(sampler):
    denoise, draw, _ = sampler
    with pytest.raises(ValueError, match="taps are of the compiled loop"):
        draw(denoise=denoise, taps=("embed",), python_loop=True)
    with pytest.raises(ValueError, match="block/9 were never reached"):
        draw(denoise=denoise, taps=("block/9",))
