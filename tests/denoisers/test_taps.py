import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.denoisers import TextTransformer, functional_init, taps
from ddjax.taps import tap

CONFIG = {"length": 4, "symbols_in": 3, "symbols_out": 3, "width": 8, "depth": 2, "heads": 2}
XT = jnp.array([[0, 1, 2, 1], [2, 2, 0, 1]])
T = jnp.array([0.2, 0.7])
PARTS = ("", "/queries", "/keys", "/values", "/attention", "/mlp")
BLOCKS = {f"block/{i}{part}" for i in range(2) for part in PARTS}
POINTS = {"condition", "embed", "final", "sites"} | BLOCKS


def network(noise, **config):
    init, apply = functional_init(lambda rngs: TextTransformer(**CONFIG, **config, rngs=rngs))
    return apply, noise(jax.eval_shape(init, jax.random.key(0)))


@pytest.fixture(scope="module")
def net(noise):
    return network(noise)


def test_record_sees_every_point_and_changes_nothing(net):
    apply, params = net
    plain = apply(params, XT, T)
    with taps.record() as seen:
        out = apply(params, XT, T)
    np.testing.assert_array_equal(out, plain)
    assert set(seen) == POINTS
    assert seen["block/1/attention"].shape == (2, 4, 8)
    # What was recorded is what the network used: the last layer from its input.
    head = params["final"]["out"]
    np.testing.assert_allclose(seen["final"] @ head["kernel"] + head["bias"], plain, rtol=1e-5, atol=1e-5)


def test_record_some(net):
    apply, params = net
    with taps.record("embed", "block/0/mlp") as seen:
        apply(params, XT, T)
    assert set(seen) == {"embed", "block/0/mlp"}


def test_identity_override_changes_no_bit(net):
    apply, params = net
    with taps.override({name: lambda h: h for name in POINTS}):
        out = apply(params, XT, T)
    np.testing.assert_array_equal(out, apply(params, XT, T))


def test_override_with_function_and_array(net):
    apply, params = net
    with taps.record() as seen:
        plain = apply(params, XT, T)
    with taps.override({"block/1": lambda h: jnp.zeros_like(h)}), taps.record() as other:
        zeroed = apply(params, XT, T)
    assert jnp.abs(zeroed - plain).max() > 1e-2
    np.testing.assert_array_equal(other["block/1"], 0)
    np.testing.assert_array_equal(other["block/0"], seen["block/0"])
    # Putting back the last block's output restores the network, whatever went on before.
    patches = {"block/0": lambda h: 3 * h, "block/1": np.asarray(seen["block/1"])}
    with taps.override(patches):
        np.testing.assert_array_equal(apply(params, XT, T), plain)
    np.testing.assert_array_equal(apply(params, XT, T), plain)  # nothing stays


def test_overrides_act_in_order_and_recordings_see_the_result():
    with (
        taps.record() as seen,
        taps.override({"a": lambda h: h + 1}),
        taps.override({"a": lambda h: 2 * h}),
    ):
        assert tap("a", jnp.float32(1)) == 4
    assert seen["a"] == 4


@pytest.mark.slow
def test_inside_jit_and_grad(net):
    apply, params = net

    @jax.jit
    def run(params):
        with taps.record("block/0/mlp") as seen:
            out = apply(params, XT, T)
        return out, seen

    out, seen = run(params)
    np.testing.assert_allclose(out, apply(params, XT, T), rtol=1e-4, atol=1e-5)
    with taps.record("block/0/mlp") as eager:
        apply(params, XT, T)
    np.testing.assert_allclose(seen["block/0/mlp"], eager["block/0/mlp"], rtol=1e-4, atol=1e-5)

    # The gradient with respect to an activation, by overriding it.
    def loss(shift):
        with taps.override({"block/1": lambda h: h + shift}):
            return apply(params, XT, T).sum()

    assert jnp.abs(jax.grad(loss)(jnp.zeros((2, 4, 8)))).max() > 1e-3


def test_unused_taps_cost_nothing():
    assert str(jax.make_jaxpr(lambda x: tap("a", x) + 1)(1.0)) == str(jax.make_jaxpr(lambda x: x + 1)(1.0))


def test_a_context_around_a_transformation_is_refused(net):
    apply, params = net
    for transform in (jax.jit, jax.grad):
        with pytest.raises(ValueError, match="put the `with` inside the transformed function"), taps.record():
            transform(lambda p: apply(p, XT, T).sum())(params)
    compiled = jax.jit(apply)
    compiled(params, XT, T)
    with pytest.raises(ValueError, match="embed were never reached"), taps.override({"embed": lambda h: 0 * h}):
        compiled(params, XT, T)


def test_errors(net):
    apply, params = net
    with pytest.raises(ValueError, match="block/7/mlp were never reached"), taps.record("block/7/mlp"):
        apply(params, XT, T)
    with (
        pytest.raises(ValueError, match=r"'embed' has shape \(8,\); what it replaces has \(2, 4, 8\)"),
        taps.override({"embed": jnp.zeros(8)}),
    ):
        apply(params, XT, T)
    # An error of the network itself is not hidden behind "never reached".
    with pytest.raises(ZeroDivisionError), taps.record("embed"):
        1 / 0  # noqa: B018
    assert not taps.active()


def test_scanned_blocks_are_refused_but_the_rest_is_there(noise):
    apply, params = network(noise, scan=True)
    with taps.record("embed", "final") as seen:
        apply(params, XT, T)
    assert set(seen) == {"embed", "final"}
    for listen in (lambda: taps.record(), lambda: taps.override({"block/0/mlp": lambda h: h})):
        with pytest.raises(ValueError, match="the blocks are scanned; build the network with scan=False"), listen():
            apply(params, XT, T)


def test_remat_is_transparent(noise):
    apply, params = network(noise, remat=True)
    with taps.record() as seen:
        apply(params, XT, T)
    assert set(seen) == POINTS


def test_threads_do_not_see_each_other():
    inside, out = threading.Event(), {}

    def other():
        inside.wait(5)
        out["active"] = taps.active()
        out["value"] = tap("a", 1)

    thread = threading.Thread(target=other)
    thread.start()
    with taps.override({"a": lambda h: h + 1}):
        assert tap("a", jnp.float32(1)) == 2
        inside.set()
        thread.join()
    assert out == {"active": False, "value": 1}
