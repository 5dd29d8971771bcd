"""What networks and objectives hold (adapters' trunks, teachers, LPIPS) goes into compiled programs as inputs."""

import dataclasses
import functools
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddjax import bind, grids, lora, sample, sampling
from ddjax.autoencoders import KLAutoencoder, KLObjective, perceptual
from ddjax.denoisers import TextTransformer, functional_init, taught
from ddjax.denoisers.outputs import FirstHeads
from ddjax.objectives import elbo
from ddjax.processes import Masked
from ddjax.pytrees import as_pytree
from ddjax.solvers import Ancestral
from ddjax.training import init_state, make_train_step
from ddjax.training import mesh as meshes

SMALL = {"length": 8, "symbols_in": 5, "symbols_out": 4, "width": 128, "depth": 1, "heads": 2}
PROCESS = Masked(4)


def noise(tree, seed=7, scale=0.1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree)


@functools.cache
def trunk():
    init, apply = functional_init(lambda rngs: TextTransformer(**SMALL, rngs=rngs))
    return apply, noise(jax.eval_shape(init, jax.random.key(0)))


def adapted():
    apply, params = trunk()
    network, new = lora.wrap(apply, params, [r"attention/.*kernel$"], rank=2, key=jax.random.key(1))
    return network, noise(new, seed=5)


def student():
    apply, params = trunk()
    return taught(apply, apply, params), noise(params, seed=3)


NETWORKS = {"lora": adapted, "taught": student}


def constants(lowered):
    """Bytes of the constants in a lowered program: what is written out, element by element, and nothing splat."""
    total = 0
    for raw, shape in re.findall(r'dense<("0x[0-9A-F]+"|\[[^>]*\])> : tensor<([0-9x]*)', lowered.as_text()):
        sizes = [int(n) for n in shape.split("x") if n]
        total += (len(raw) - 4) // 2 if raw.startswith('"') else 4 * int(np.prod(sizes or [1]))
    return total


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def setup(network, params, axes=None, devices=1):
    rule = optax.sgd(1e-3)  # AdamW would blow up the rounding of gradients near 0
    step = make_train_step(elbo(PROCESS, "posterior"), network, rule)
    mesh = meshes.make_mesh(axes, jax.devices()[:devices])
    start = functools.partial(init_state, lambda key: jax.tree.map(jnp.copy, params), rule)
    state, shardings = meshes.init_sharded(start, mesh, (), jax.random.key(2), fsdp_min_size=256)
    return mesh, state, step, meshes.compile_step(step, shardings, mesh)


BATCH = {"x0": np.random.default_rng(0).integers(0, 4, (8, 8)).astype(np.int32)}


@pytest.mark.parametrize("name", [pytest.param("lora"), pytest.param("taught", marks=pytest.mark.slow)])
def test_a_training_step_has_no_constant_of_its_size(name):
    network, params = NETWORKS[name]()
    held = size(network)
    assert held > 4e5
    mesh, state, step, compiled = setup(network, params)
    batch = meshes.shard_batch(BATCH, mesh)
    assert constants(compiled.lower(state, batch)) < 1000
    closed = jax.jit(lambda state, batch: step(state, batch))
    assert constants(closed.lower(state, batch)) > held  # the count sees constants
    by_hand = jax.jit(lambda step, *rest: step(*rest))
    assert constants(by_hand.lower(step, state, batch)) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_step_is_the_one_with_constants(name):
    """To the last bit or two: a compiler works out beforehand what it can of constants."""
    network, params = NETWORKS[name]()
    mesh, state, step, compiled = setup(network, params)
    batch = meshes.shard_batch(BATCH, mesh)
    closed, closed_metrics = jax.jit(lambda state, batch: step(state, batch))(state, batch)
    new, metrics = compiled(state, batch)
    assert jax.tree.structure(new.params) == jax.tree.structure(params)
    found = (new.params, new.ema, metrics), (closed.params, closed.ema, closed_metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), *found)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "tensor": 2, "fsdp": 2}])
@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_mesh_what_is_held_lies_in_pieces_and_nothing_else_changes(name, axes):
    network, params = NETWORKS[name]()
    results = []
    for sizes, devices in ((None, 1), (axes, 8)):
        mesh, state, _, compiled = setup(network, params, sizes, devices)
        losses = []
        for _ in range(3):
            state, metrics = compiled(state, meshes.shard_batch(BATCH, mesh))
            losses.append(float(metrics["loss"]))
        results.append(losses)
    np.testing.assert_allclose(*results, rtol=1e-5)
    pieces = [(leaf.addressable_shards[0].data.size, leaf.size) for leaf in jax.tree.leaves(compiled.held)]
    assert sum(a for a, _ in pieces) < 0.5 * sum(b for _, b in pieces)


def test_what_lies_on_the_mesh_is_not_kept_whole_besides():
    network, params = adapted()
    network = dataclasses.replace(network, held=jax.tree.map(jnp.copy, network.held))
    whole = [weakref.ref(leaf) for leaf in jax.tree.leaves(network)]
    _, _, step, compiled = setup(network, params, {"fsdp": 8}, 8)
    assert len(jax.tree.leaves(compiled.held)) == len(whole)
    del network, step
    gc.collect()
    assert not any(ref() is not None for ref in whole)


@pytest.mark.slow
def test_sampling_has_no_constant_of_its_size_and_does_not_compile_again():
    network, params = adapted()
    solver, times = Ancestral(PROCESS), grids.uniform(4)
    options = {"shape": (2, 8), "solver": solver, "times": times}
    for around in (lambda n: n, lambda n: FirstHeads(n, 1)):
        net = around(network)
        process = PROCESS if net is network else Masked(3)
        options["solver"] = Ancestral(process)
        draw = lambda denoise, process=process: sample(jax.random.key(0), denoise, process, **options).x0
        denoise = bind(net, params, process, "posterior")
        assert constants(jax.jit(draw).lower(denoise)) < 1000
        assert size(jax.tree.leaves(denoise)) > size(params) + size(network) - 1
    denoise = bind(network, params, PROCESS, "posterior")
    options["solver"] = solver
    drawn = sample(jax.random.key(0), denoise, PROCESS, **options).x0
    apply, held = trunk()
    merged = bind(apply, lora.merge(held, params, 2.0), PROCESS, "posterior")
    np.testing.assert_array_equal(drawn, sample(jax.random.key(0), merged, PROCESS, **options).x0)
    before = sampling._sample._cache_size()
    other, more = adapted()
    sample(jax.random.key(1), bind(other, noise(more, seed=8), PROCESS, "posterior"), PROCESS, **options)
    assert sampling._sample._cache_size() == before


def photographs(seed=4):
    """LPIPS with as many parts, a convolution of 32 features in each."""
    shapes = tuple(((3, 3, 3 if i == 0 else 32, 32),) for i in range(5))
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)
    kernels = tuple((draw(shape),) for (shape,) in shapes)
    return perceptual.Perceptual(kernels, tuple((draw(32),) for _ in kernels), tuple(draw(32) ** 2 for _ in kernels))


@pytest.mark.slow
def test_the_perceptual_loss_of_an_autoencoder_goes_in_as_well():
    autoencoder = KLAutoencoder((16, 16, 1), channels=2, width=4, multipliers=(1,), blocks=1, groups=2)
    objective = KLObjective(autoencoder, photographs(), width=4, layers=1)
    held = size(objective)
    assert held > 1e5
    rule, mesh = optax.sgd(1e-3), meshes.make_mesh(None, jax.devices()[:1])
    step = make_train_step(objective, None, rule)
    start = functools.partial(init_state, objective.init, rule)
    state, shardings = meshes.init_sharded(start, mesh, (), jax.random.key(2))
    batch = {"x0": np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 1)).astype(np.float32)}
    compiled = meshes.compile_step(step, shardings, mesh)
    assert constants(compiled.lower(state, batch)) < 1000
    closed = jax.jit(lambda state, batch: step(state, batch))
    assert constants(closed.lower(state, batch)) > held
    wanted, wanted_metrics = closed(state, batch)
    # Other weights, the same program.
    taking = jax.jit(lambda step, *rest: step(*rest)[1]["loss"])
    losses = [
        taking(jax.tree.unflatten(jax.tree.structure(step), jax.tree.leaves(photographs(seed))), state, batch)
        for seed in (4, 5)
    ]
    assert taking._cache_size() == 1
    np.testing.assert_allclose(losses[0], wanted_metrics["loss"], rtol=2e-6)
    assert abs(losses[1] - losses[0]) > 1e-3 * abs(losses[0])
    new, metrics = compiled(state, batch)
    found = (new.params, metrics), (wanted.params, wanted_metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *found)


def test_functions_around_others_are_pytrees_of_what_these_hold():
    network, params = adapted()
    plain = as_pytree(FirstHeads(trunk()[0], 1))
    assert not jax.tree.leaves(plain)
    around = as_pytree(FirstHeads(FirstHeads(network, 1), 1))
    assert jax.tree.structure(around) == jax.tree.structure(as_pytree(FirstHeads(FirstHeads(network, 1), 1)))
    assert len(jax.tree.leaves(around)) == len(jax.tree.leaves(network))
    xt = BATCH["x0"][:2]
    jitted = jax.jit(lambda f, p: f(p, xt, jnp.full(2, 0.5)))(around, params)
    plain = jax.jit(lambda p: network(p, xt, jnp.full(2, 0.5)))(params)
    np.testing.assert_allclose(jitted, plain[..., :-2], atol=1e-5)
    assert as_pytree(around) is around
