"""What samplers cost for one small network: their speed, what caching saves, what they take beside the network.

All that is compared is timed in the same rounds, in another order each, and reported as ratios within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddjax import grids, names, naming, processes, random
from ddjax.config import ConfigError
from ddjax.denoisers import TextTransformer, functional_init
from ddjax.predictions import bind
from ddjax.sampling import sample
from ddjax.solvers import Ancestral, Cached, KeyValues
from ddjax.training.provenance import versions

LENGTH = 256


class Drawn(NamedTuple):
    """A compiled sampler: each call draws a batch."""

    draw: Callable[[], Any]
    nfe: float  # mean over the batch


def bench_samplers(
    *,
    solvers: Sequence[str] = (),
    num: int = 2,
    steps: int = 64,
    many_steps: int = 1024,
    vocabularies: Sequence[int] = (27, 50_257),
    length: int = LENGTH,
    width: int = 128,
    depth: int = 2,
    block: int = 16,
    rounds: int = 3,
) -> dict[str, Any]:
    """Measure masked samplers on sequences, with an untrained text transformer that ignores the time.

    solvers: names of `names.SOLVERS`; default: all that take a masked process by their name alone.
    num, steps: examples in a batch, and steps of each solver. many_steps: with which caching is measured.
    vocabularies: for each, the ancestral sampler's time over that of its network calls alone, in the first of `steps`.
        The last ones' batch is one example.
    block: of the network in blocks whose keys and values are kept.

    Returns a dict that JSON can hold; ratios are medians with their p10 and p90.
    Raises ValueError for a solver that is not for masked sequences.
    """
    few, size = vocabularies[0], {"length": length, "width": width, "depth": depth}
    process, denoise = _network(few, **size)
    result = {
        "benchmark": "samplers",
        "environment": {**versions(), "device_kind": jax.devices()[0].device_kind},
        **size,
        "num": num,
        "steps": steps,
        "many_steps": many_steps,
        "rounds": rounds,
    }

    made, left_out = {}, {}
    for name in solvers or names.SOLVERS:
        try:
            solver = naming.make(names.SOLVERS, name, "solver", process)
            made[name] = _compiled(denoise, process, solver, num, grids.uniform(steps), length)
        except (ConfigError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            if solvers:
                raise ValueError(f"{name!r} is not for masked sequences: {error}") from error
            left_out[name] = " ".join(str(error).split())
    seconds = interleaved({name: one.draw for name, one in made.items()}, rounds)
    first = next(iter(made))
    result["solvers"] = {
        name: {
            "tokens_per_s": num * length / float(np.median(seconds[name])),
            "nfe": made[name].nfe,
            "speed": percentiles(seconds[first] / seconds[name]),  # of the first
        }
        for name in made
    }
    result["left_out"] = left_out

    plain = Ancestral(process)
    grid = grids.uniform(many_steps)
    pair = {
        "plain": _compiled(denoise, process, plain, num, grid, length),
        "cached": _compiled(denoise, process, Cached(plain), num, grid, length),
    }
    result["caching"] = _against(pair, rounds)

    blocks = -(-length // block)
    in_blocks = processes.in_blocks(process, length, block)
    _, causal = _network(few, **size, block=block, process=in_blocks)
    plain, grid = Ancestral(in_blocks), grids.in_turn(grids.uniform(max(many_steps // blocks, 1)), blocks)
    pair = {
        "plain": _compiled(causal, in_blocks, plain, num, grid, length),
        "cached": _compiled(causal, in_blocks, KeyValues(plain), num, grid, length),
        "both": _compiled(causal, in_blocks, KeyValues(Cached(plain)), num, grid, length),
    }
    result["blocks"] = _against(pair, rounds)

    result["overhead"] = {}
    for symbols in vocabularies:
        process, denoise = _network(symbols, **size)
        result["overhead"][str(symbols)] = _overhead(denoise, process, num if symbols == few else 1, length, rounds)
    return result


def _network(symbols: int, *, length: int, width: int, depth: int, block: int | None = None, process: Any = None):
    process = processes.Masked(symbols) if process is None else process

    def make(rngs):
        return TextTransformer(
            length=length, symbols_in=symbols + 1, symbols_out=symbols, width=width, depth=depth, heads=4,
            time=False, block=block, rngs=rngs,
        )  # fmt: skip

    init, apply = functional_init(make)
    return process, bind(apply, jax.jit(init)(jax.random.key(0)), process, "posterior")


def _compiled(denoise: Any, process: Any, solver: Any, num: int, times: Any, length: int) -> Drawn:
    def draw():
        drawn = sample(jax.random.key(0), denoise, process, shape=(num, length), solver=solver, times=times)
        return jax.block_until_ready(drawn)

    return Drawn(draw, float(np.mean(draw().nfe)))


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each call in each round, after one that warms up."""
    rng, keys = np.random.default_rng(0), list(calls)
    seconds = {key: np.zeros(rounds + 1) for key in keys}
    for i in range(rounds + 1):
        for j in rng.permutation(len(keys)):
            start = time.perf_counter()
            calls[keys[j]]()
            seconds[keys[j]][i] = time.perf_counter() - start
    return {key: values[1:] for key, values in seconds.items()}


def percentiles(values: np.ndarray) -> dict[str, float]:
    """The median, and what a tenth lies below and above."""
    return dict(zip(("p10", "median", "p90"), map(float, np.percentile(values, [10, 50, 90])), strict=True))


def _against(pair: Mapping[str, Drawn], rounds: int) -> dict[str, Any]:
    """How many times as fast as "plain" the others are."""
    seconds = interleaved({name: one.draw for name, one in pair.items()}, rounds)
    return {
        name: {
            "batch_s": float(np.median(seconds[name])),
            "nfe": pair[name].nfe,
            "speedup": percentiles(seconds["plain"] / seconds[name]),
        }
        for name in pair
    }


def _overhead(denoise: Any, process: Any, num: int, length: int, rounds: int, steps: int = 8) -> dict[str, Any]:
    """The sampler's time over that of as many calls of the compiled network."""
    drawn = _compiled(denoise, process, Ancestral(process), num, grids.uniform(steps), length)
    xt = process.prior((num, length)).sample(random.example_keys(jax.random.key(0), num))
    network = jax.jit(lambda denoise, xt, t: denoise(xt, t).value)
    t = jnp.full((num,), 0.5)

    def calls():
        for _ in range(steps):
            jax.block_until_ready(network(denoise, xt, t))

    seconds = interleaved({"sampler": drawn.draw, "network": calls}, rounds)
    return {
        "num": num,
        "steps": steps,
        "network_call_s": float(np.median(seconds["network"])) / steps,
        "ratio": percentiles(seconds["sampler"] / seconds["network"]),
    }


def spread(ratio: Mapping[str, float]) -> str:
    """What `percentiles` gives, to read."""
    return f"x{ratio['median']:.3f} ({ratio['p10']:.3f} - {ratio['p90']:.3f})"


def format_samplers(result: Mapping[str, Any]) -> str:
    """The result of `bench_samplers` as lines to read."""
    lines = [
        f"masked sampling of {result['num']} x {result['length']} sites, a network {result['width']} wide and "
        f"{result['depth']} deep, {result['environment']['device_kind']}",
        f"solvers, {result['steps']} steps; times as fast as the first:",
    ]
    lines += [
        f"  {name:<28}{row['tokens_per_s']:>10,.0f} tokens/s, {spread(row['speed'])}, {row['nfe']:.1f} evaluations"
        for name, row in result["solvers"].items()
    ]
    for what, title in (("caching", "cached predictions"), ("blocks", "cached keys and values, in blocks")):
        lines.append(f"{title}, about {result['many_steps']} steps, times as fast as without:")
        for name, row in result[what].items():
            lines.append(f"  {name:<28}{spread(row['speedup'])}, {row['batch_s']:.3g} s, {row['nfe']:.1f} evaluations")
    lines.append("the ancestral sampler's time over that of its network calls:")
    for symbols, row in result["overhead"].items():
        lines.append(f"  {int(symbols):,} symbols, {row['num']} at a time: {spread(row['ratio'])}")
    return "\n".join(lines)
