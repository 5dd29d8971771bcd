"""One of the processes of test_hosts.py: its number, a port, how many there are, microbatches, the file."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddjax.objectives import elbo
from ddjax.processes import Uniform
from ddjax.training import init_state, make_train_step
from ddjax.training.mesh import compile_step, init_sharded, make_mesh, shard_batch

index, port, processes, accumulate = (int(v) for v in sys.argv[1:5])
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, index)

process = Uniform(5)


def apply(params, xt, t, cond, *, rng=None, train=False):
    return params["w"][xt] + t[:, None, None] * params["w"][xt[:, ::-1]]


def start(key):
    return init_state(lambda key: {"w": jnp.zeros((5, 5))}, optax.sgd(1.0), key)


mesh = make_mesh({"data": 4})
state, shardings = init_sharded(start, mesh, (), jax.random.key(0))
step = compile_step(
    make_train_step(elbo(process, "cavity"), apply, optax.sgd(1.0), accumulate=accumulate), shardings, mesh
)
for n in range(3):
    rng = np.random.default_rng(n)
    batch = {"x0": rng.integers(0, 5, (16, 3), dtype=np.int32), "weights": rng.uniform(0, 2, (16, 3))}
    mine = {name: values[index * 16 // processes : (index + 1) * 16 // processes] for name, values in batch.items()}
    state, _ = step(state, shard_batch(mine, mesh))
np.save(f"{sys.argv[5]}-{accumulate}-{processes}-{index}.npy", np.asarray(state.params["w"].addressable_data(0)))
