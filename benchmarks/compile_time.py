"""Compilation of a training step against the number of layers, with and without `scan`.

    python benchmarks/compile_time.py --network dit --depths 6 48 --rounds 3

A DiT on images or a text transformer; the gradient and AdamW are in the program. Tracing and lowering are counted with
the compilation, JAX's caches are off, every round takes all cases in another order, and ratios are within a round.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

from ddjax import denoisers


def seconds(network: str, depth: int, scan: bool, width: int) -> float:
    """Of tracing, lowering and compiling."""
    layers = {"width": width, "depth": depth, "heads": 4, "scan": scan}

    def make(rngs):
        if network == "dit":
            return denoisers.DiT(shape=(16, 16, 3), patch=2, num_classes=10, rngs=rngs, **layers)
        return denoisers.TextTransformer(length=64, symbols_in=28, symbols_out=27, rngs=rngs, **layers)

    init, apply = denoisers.functional_init(make)
    params = jax.eval_shape(init, jax.random.key(0))
    optimizer = optax.adamw(1e-4)
    shape, dtype = ((8, 16, 16, 3), jnp.float32) if network == "dit" else ((8, 64), jnp.int32)

    def step(params, state, x, t):
        gradient = jax.grad(lambda params: jnp.mean(apply(params, x, t) ** 2))(params)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state

    state = jax.eval_shape(optimizer.init, params)
    inputs = params, state, jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((8,), jnp.float32)
    jax.clear_caches()
    began = time.perf_counter()
    jax.jit(step).lower(*inputs).compile()
    return time.perf_counter() - began


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=("dit", "text"), default="dit")
    parser.add_argument("--depths", type=int, nargs=2, default=(6, 48))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unrolled", action="store_true", help="also without scan")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    cases = [(depth, scan) for scan in ((True, False) if arguments.unrolled else (True,)) for depth in arguments.depths]
    found = {case: [] for case in cases}
    for _ in range(arguments.rounds):
        for depth, scan in random.sample(cases, len(cases)):
            found[depth, scan].append(seconds(arguments.network, depth, scan, arguments.width))
    low, high = arguments.depths
    for scan in dict.fromkeys(scan for _, scan in cases):
        ratios = [b / a for a, b in zip(found[low, scan], found[high, scan], strict=True)]
        print(
            f"{arguments.network}, {'scanned' if scan else 'unrolled'}: {high} layers against {low}: "
            f"x{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}); "
            f"{statistics.median(found[low, scan]):.1f} s and {statistics.median(found[high, scan]):.1f} s"
        )


if __name__ == "__main__":
    main()
