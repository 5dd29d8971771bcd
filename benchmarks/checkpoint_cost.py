"""What a checkpoint every 100 steps costs of a training's wall time.

    python benchmarks/checkpoint_cost.py --config configs/digits_masked.py --rounds 7
    python benchmarks/checkpoint_cost.py --config configs/text8.py --device H100 --config.train.batch_size=512

Steps of the config's own training, waited for as the loop waits (two in flight): on a CPU the save has to share its
cores with them. Or, with the name of a device, pauses of the time that this device needs for their FLOPs, beside a
state of the true size, which is copied and written. Rounds of 100 steps without and with one save are taken in turn, in
random order within a pair, so that what a neighbour on the machine takes, it takes from both. Reported: the median of
the paired differences over the median round without, and how long `save` itself blocked.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ddjax.chips import peak_flop_per_s
from ddjax.config import load, to_dict
from ddjax.experiment import build, load_data
from ddjax.training import Checkpoints
from ddjax.training.loop import IN_FLIGHT
from ddjax.training.mesh import shard_batch
from ddjax.training.setup import prepare, step_flops


def paused(seconds: float) -> Callable[[Any, Any], tuple[Any, dict]]:
    """A step that leaves the state as it is, and the cores of this machine alone."""

    def step(state: Any, batch: Any) -> tuple[Any, dict]:
        jax.block_until_ready(batch)
        time.sleep(seconds)
        return state, {}

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/digits_masked.py"))
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints (default: 100)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of rounds (default: 7)")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    parser.add_argument("--device", help="a step is a pause of the time that this device needs (H100, TPU v5p, ...)")
    parser.add_argument("--mfu", type=float, default=0.4, help="the share of its peak that it reaches (default: 0.4)")
    arguments, overrides = parser.parse_known_args()
    config = load(arguments.config, overrides)
    data = load_data(config, "train")
    experiment = build(config, data)
    mesh, state, _, step_fn, _ = prepare(experiment)
    batches = experiment.batches(data)
    if arguments.device is not None:
        flops = step_flops(experiment, next(batches))
        step_fn = paused(flops / (peak_flop_per_s(arguments.device) * arguments.mfu))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state._replace(key=None)))
    number, rng = 0, random.Random(0)
    times = {False: [], True: []}
    processor = {False: [], True: []}
    blocked = []

    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder) / "checkpoints") as checkpoints:

        def take(save: bool) -> None:
            """A round; what was saved in it goes to disk in it, too, or at the latest while it is waited for."""
            nonlocal state, number
            began, used = time.perf_counter(), time.process_time()
            pending = collections.deque()
            for i in range(arguments.every):
                state, metrics = step_fn(state, shard_batch(next(batches), mesh))
                number += 1
                pending.append(metrics)
                while len(pending) > IN_FLIGHT:
                    jax.device_get(pending.popleft())
                if save and i == 0:
                    before = time.perf_counter()
                    place = {"iterator": batches.get_state(), "window": []}
                    checkpoints.save(number, state, data=place, config=to_dict(config))
                    blocked.append(time.perf_counter() - before)
            jax.device_get(list(pending))
            checkpoints.wait()
            times[save].append(time.perf_counter() - began)
            processor[save].append(time.process_time() - used)

        take(True)  # compiles, and imports Orbax
        for values in (*times.values(), *processor.values(), blocked):
            values.clear()
        for _ in range(arguments.rounds):
            for save in rng.sample((False, True), 2):
                take(save)

    def cost(found: dict[bool, list[float]]) -> float:
        return statistics.median(b - a for a, b in zip(found[False], found[True], strict=True)) / statistics.median(
            found[False]
        )

    result = {
        "every": arguments.every,
        "state_bytes": size,
        "round_s": statistics.median(times[False]),
        "cost_of_wall_time": cost(times),
        "cost_of_processor_time": cost(processor),
        "save_blocks_s": statistics.median(blocked),
        "all": {"without_s": times[False], "with_s": times[True], "blocked_s": blocked},
    }
    print(
        f"{size / 1e6:.1f} MB of state, {arguments.every} steps in {result['round_s']:.2f} s: one checkpoint costs "
        f"{result['cost_of_wall_time']:.2%} of wall time"
        + (f" ({result['cost_of_processor_time']:.2%} of processor time); " if arguments.device is None else "; ")
        + f"saving blocks {result['save_blocks_s'] * 1e3:.0f} ms, {result['save_blocks_s'] / result['round_s']:.2%}"
    )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
