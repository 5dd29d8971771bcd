"""What a step waits for its data: the input pipeline beside the step that it feeds.

Three numbers of one run: how quickly batches come when nothing else is done, how quickly the step takes them, and how
long the loop of `ddjax train` waits for each. The step is the config's own; or, with a device's name, a pause of the
time that this device needs for the step's FLOPs at a given utilisation: a pipeline can be judged before the device is
there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ddjax import bench
from ddjax import data as datasets
from ddjax.chips import PEAK_FLOP_PER_S, peak_flop_per_s
from ddjax.config import Config
from ddjax.training.mesh import make_mesh, shard_batch
from ddjax.training.setup import step_flops


def bench_data(
    config: Config, *, steps: int = 20, warmup: int = 3, device: str | None = None, mfu: float = 0.4
) -> dict[str, Any]:
    """Measure the input pipeline of `config` against its training step; nothing is written.

    steps: to time, after `warmup` more. device: such as "H100" (`PEAK_FLOP_PER_S`): a pause in the place of the
        step, as long as that device takes at a model FLOP utilisation of `mfu`; None: the step itself, on this machine.

    Returns a dict that JSON can hold; seconds, examples and tokens a second, and `wait_share`, what of the loop's
    time is spent waiting for data.
    Raises ValueError for an unknown device, and as `bench_train` does.
    """
    bench._check(steps=steps, warmup=warmup)
    data, experiment = bench._load(config)
    size = config.train.batch_size
    if device is None:
        stepper = bench._Stepper(experiment, data)
        mesh, teacher = make_mesh(config.train.mesh), stepper.teacher

        def step(batch: Any) -> None:
            stepper.state, metrics = stepper.step(stepper.state, batch)
            jax.block_until_ready((stepper.state, metrics))

    else:
        if (peak := peak_flop_per_s(device)) is None:
            raise ValueError(f"unknown device {device!r}: one of {', '.join(name for name, _ in PEAK_FLOP_PER_S)}")
        if not 0 < mfu <= 1:
            raise ValueError(f"a utilisation lies between 0 and 1, got {mfu}")
        mesh, teacher = make_mesh({"data": 1}, jax.devices()[:1]), None

        def step(batch: Any) -> None:
            jax.block_until_ready(batch)
            time.sleep(operations / (peak * mfu))

    operations = step_flops(experiment, next(_batches(experiment, data)), teacher)
    alone = _alone(_batches(experiment, data), steps, warmup)
    ahead = datasets.Ahead(_batches(experiment, data), lambda b: shard_batch(b, mesh), config.train.device_prefetch)
    waits, seconds = np.zeros(warmup + steps), np.zeros(warmup + steps)
    for i in range(warmup + steps):
        start = time.perf_counter()
        batch = next(ahead)
        middle = time.perf_counter()
        step(batch)
        waits[i], seconds[i] = middle - start, time.perf_counter() - middle
    ahead.close()
    waits, seconds = waits[warmup:], seconds[warmup:]
    tokens = experiment.sites if data.num_symbols is not None else None
    rates = {"pipeline": size / alone, "step": size / float(np.median(seconds))}
    return {
        "benchmark": "data",
        **bench._about(
            experiment, bench._parameters(jax.eval_shape(experiment.init, jax.random.key(0))), jax.devices()
        ),
        "batch_size": size,
        "steps": steps,
        "warmup": warmup,
        "device": device,
        "mfu": None if device is None else mfu,
        "flops": operations,
        "batch_alone_s": alone,
        "step_s": float(np.median(seconds)),
        "wait_s": float(np.median(waits)),
        "wait_share": float(waits.sum() / (waits.sum() + seconds.sum())),
        "examples_per_s": rates,
        "tokens_per_s": tokens and {name: rate * tokens for name, rate in rates.items()},
        "pipeline_over_step": rates["pipeline"] / rates["step"],
    }


def _batches(experiment: Any, data: Any) -> Any:
    return experiment.batches(data, process_index=jax.process_index(), process_count=jax.process_count())


def _alone(batches: Any, steps: int, warmup: int) -> float:
    """Seconds a batch takes when nothing else is done: of many together, since they are loaded ahead."""
    for _ in range(warmup):
        next(batches)
    start, count = time.perf_counter(), 0
    while count < steps or time.perf_counter() - start < 1.0:
        next(batches)
        count += 1
    return (time.perf_counter() - start) / count


def format_data(result: Mapping[str, Any]) -> str:
    """The result as a few lines to read."""
    config, rates, tokens = result["config"], result["examples_per_s"], result["tokens_per_s"]
    train = config["train"]
    what = f"{result['device']} at {result['mfu']:.0%} of its peak (a pause)" if result["device"] else "this machine"

    def rate(name: str) -> str:
        return f"{rates[name]:,.0f} examples/s" + (f", {tokens[name]:,.0f} tokens/s" if tokens else "")

    lines = {
        "": f"{config['data']['name']}, batches of {result['batch_size']}, {train['workers']} workers, prefetch "
        f"{train['prefetch']}, {train['device_prefetch']} on the device; {result['parameters']:,} parameters",
        "pipeline": rate("pipeline"),
        "step": f"{rate('step')} on {what}",
        "ratio": f"the pipeline is x{result['pipeline_over_step']:.1f} as quick as the step needs",
        "wait": f"{result['wait_share']:.2%} of the loop's time (median {bench._ms(result['wait_s'])} a step of "
        f"{bench._ms(result['step_s'])})",
    }
    return "\n".join(f"{name:<10}{text}" if name else text for name, text in lines.items())
