"""What a training step and a batch of samples cost: time, throughput, FLOP/s, compilation, memory.

The step measured is the one that `ddjax train` runs: same mesh, same shardings, same donation. What the numbers mean
is in benchmarks/README.md.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddjax import bench_cases, flops, random
from ddjax import data as datasets
from ddjax.chips import peak_flop_per_s
from ddjax.config import Config, to_dict
from ddjax.data.dataset import Dataset
from ddjax.experiment import Experiment, build
from ddjax.loading import load_data
from ddjax.predictions import bind
from ddjax.sampling import sample
from ddjax.training.loop import labels_in_turn
from ddjax.training.manifest import write_atomically
from ddjax.training.memory import device_peak, host_peak
from ddjax.training.mesh import shard_batch
from ddjax.training.provenance import versions
from ddjax.training.setup import as_model, prepare, step_flops


def bench_train(config: Config, *, steps: int = 20, warmup: int = 3) -> dict[str, Any]:
    """Measure the training step of `config` on its own first batch; nothing is written.

    steps: how many to time, each to its end. warmup: steps made before, untimed.

    Returns a dict that JSON can hold; times in seconds, memory in bytes, FLOPs of the *model*, without what `remat`
    computes again.
    Raises ValueError for fewer than one step, ConfigError for a config that cannot be used.
    """
    _check(steps=steps, warmup=warmup)
    data, experiment = _load(config)
    stepper, size = _Stepper(experiment, data), config.train.batch_size
    seconds = _time(lambda _: stepper(), steps, warmup)
    operations = step_flops(experiment, stepper.batch, stepper.teacher)
    devices = jax.devices()
    return {
        "benchmark": "train",
        **_about(experiment, stepper.parameters, devices),
        "batch_size": size,
        "steps": steps,
        "warmup": warmup,
        "init_s": stepper.init_s,
        **stepper.compile_times,
        "step_s": seconds,
        **_throughput(experiment, size, seconds["median"]),
        **_rates(operations, seconds["median"], devices),
        "memory": _memory(stepper.compiled),
    }


def bench_sample(
    config: Config, *, num: int | None = None, steps: int | None = None, repeats: int = 5, warmup: int = 1
) -> dict[str, Any]:
    """Measure drawing one batch of samples from an untrained network, on one device, as `Run.sample` draws it.

    num: samples in the batch; default the config's. steps: solver steps; default the config's.
    repeats: how many batches to time. warmup: batches drawn before, untimed.

    Returns a dict as `bench_train` does. `solver_overhead` is the time of a batch over that of its network evaluations
    alone, each timed as one call of the compiled network: 1 is a sampler that costs nothing.
    """
    num = config.sample.num if num is None else num
    steps = config.sample.steps if steps is None else steps
    _check(num=num, steps=steps, repeats=repeats, warmup=warmup)
    data, experiment = _load(config)
    times = experiment.times(steps)
    shape = experiment.batch_shape(num)
    cond = datasets.conditions.of(data, labels_in_turn(data, np.arange(num)) if data.num_classes else None, num)
    cond = jax.tree.map(jnp.asarray, cond)
    init_key, prior_key, draw_key = jax.random.split(jax.random.key(config.sample.seed), 3)
    experiment, params = experiment.trained(jax.jit(experiment.init)(init_key))
    process, solver = experiment.sampling_process, experiment.solver()
    denoise = experiment.guided(bind(experiment.apply, params, process, experiment.kind), config.sample.guidance, cond)
    cond = experiment.to_sample(prior_key, jnp.arange(num), cond)

    @jax.jit
    def draw(key, denoise, times, cond):
        return sample(key, denoise, process, shape=shape, solver=solver, times=times, cond=cond)

    draw_keys = list(jax.random.split(draw_key, warmup + repeats))
    program, compile_times = _compile(draw, jax.eval_shape(lambda: jax.random.key(0)), denoise, times, cond)
    nfe = 0

    def once(i: int) -> None:
        nonlocal nfe
        drawn = jax.block_until_ready(program(draw_keys[i], denoise, times, cond))
        nfe = drawn.nfe

    seconds = _time(once, repeats, warmup)
    nfe = int(np.max(nfe))

    xt = process.prior(shape, times[0]).sample(random.example_keys(prior_key, num))
    t = jnp.full((num,), times[len(times) // 2])
    inputs = (params, *process.network_inputs(xt, t, experiment.kind), cond)
    network, _ = _compile(jax.jit(experiment.apply), *inputs)
    call = _time(lambda _: jax.block_until_ready(network(*inputs)), max(repeats, 10), max(warmup, 1))
    operations = nfe * flops.count(as_model(experiment).apply, *inputs)
    devices = jax.devices()[:1]
    return {
        "benchmark": "sample",
        **_about(experiment, _parameters(params), devices),
        "num": num,
        "solver_steps": steps,
        "repeats": repeats,
        "warmup": warmup,
        **compile_times,
        "batch_s": seconds,
        **_throughput(experiment, num, seconds["median"]),
        "nfe": nfe,
        "network_call_s": call,
        "solver_overhead": seconds["median"] / (nfe * call["median"]),
        **_rates(operations, seconds["median"], devices),
        "memory": _memory(program),
    }


def bench_objectives(
    config: Config, *, names: Sequence[str] = (), vocabulary: int | None = None, rounds: int = 10, warmup: int = 2
) -> dict[str, Any]:
    """Measure the training step of several processes and objectives, with the network of `config`, against the first.

    names: of `bench_cases.cases`; default: all that need not be asked for. vocabulary: train on sequences of that many
        symbols with Zipf's frequencies, of the length of config's data, in place of them; default: config's data.
    rounds: each times one step of each, in random order: all see the same neighbours on a shared machine, and what is
        reported are ratios within a round.
    Raises ValueError for a name or number that cannot be used.
    """
    _check(rounds=rounds, warmup=warmup)
    data = load_data(config, "train")
    size = config.train.batch_size
    if vocabulary is not None:
        zipf = 1.0 / np.arange(1, vocabulary + 1)
        tokens = np.random.default_rng(0).choice(vocabulary, (size, *data.shape), p=zipf / zipf.sum())
        data = datasets.from_arrays(tokens.astype(np.int32), num_symbols=vocabulary)
    usual, besides = bench_cases.cases(data.num_symbols)
    names = tuple(names) or tuple(usual)
    for name in names:
        if name not in usual | besides:
            raise ValueError(f"unknown objective {name!r}; it is one of {', '.join(usual | besides)}")
    steps = {}
    for name in names:
        case = (usual | besides)[name]
        theirs = case.data(data)
        steps[name] = _Stepper(build(case.of(config), theirs), theirs)
    # In another order each round: a step after a large one finds colder caches.
    rng, seconds = np.random.default_rng(0), np.zeros((warmup + rounds, len(names)))
    for times in seconds:
        for i in rng.permutation(len(names)):
            times[i] = steps[names[i]]()
    seconds = seconds[warmup:]
    ratios = np.percentile(seconds / seconds[:, :1], [10, 50, 90], axis=0).T
    memory = {name: _memory(stepper.compiled)["executable"]["total"] for name, stepper in steps.items()}
    first = steps[names[0]]
    return {
        "benchmark": "objectives",
        **_about(first.experiment, first.parameters, jax.devices()),
        "batch_size": size,
        "num_symbols": data.num_symbols,
        "rounds": rounds,
        "warmup": warmup,
        "step_s": float(np.median(seconds[:, 0])),  # of the first
        "objectives": {
            name: {
                **dict(zip(("p10", "median", "p90"), map(float, row), strict=True)),
                "memory": memory[name],
                "memory_ratio": memory[name] / memory[names[0]],
            }
            for name, row in zip(names, ratios, strict=True)
        },
    }


class _Stepper:
    """A compiled training step with its state; each call makes one and returns its seconds."""

    def __init__(self, experiment: Experiment, data: Dataset):
        start = time.perf_counter()
        setup = jax.block_until_ready(prepare(experiment))
        self.init_s = time.perf_counter() - start
        self.experiment, self.teacher = experiment, setup.teacher
        self.state = setup.state  # the step donates the state: nobody else may hold it
        self.parameters = _parameters(self.state.params)
        self.batch = shard_batch(_first_batch(experiment, data), setup.mesh)
        held = setup.step.held
        self.compiled, self.compile_times = _compile(setup.step.jitted, held, self.state, self.batch)
        self.step = functools.partial(self.compiled, held)

    def __call__(self) -> float:
        start = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start


def format_objectives(result: Mapping[str, Any]) -> str:
    """The result of `bench_objectives` as a table to read."""
    rows = result["objectives"]
    wide = max(map(len, rows))
    symbols = "values" if result["num_symbols"] is None else f"{result['num_symbols']:,} symbols"
    lines = [
        f"a training step of {result['batch_size']} x {result['sites']} sites, {symbols}, "
        f"{result['parameters']:,} parameters; {next(iter(rows))}: {_ms(result['step_s'])}",
        f"{'':<{wide}}   time (p10 - p90)        memory",
    ]
    for name, row in rows.items():
        lines.append(
            f"{name:<{wide}}  x{row['median']:.3f} ({row['p10']:.3f} - {row['p90']:.3f})  "
            f"x{row['memory_ratio']:.2f}, {_si(row['memory'])}B"
        )
    return "\n".join(lines)


def format_report(result: Mapping[str, Any]) -> str:
    """The result as a few lines to read."""
    config, about, memory = result["config"], result["environment"], result["memory"]
    train = result["benchmark"] == "train"
    seconds = result["step_s" if train else "batch_s"]
    count = f"{result['steps']} steps" if train else f"{result['repeats']} batches"
    what = f"batches of {result['batch_size']}" if train else f"{result['num']} samples"
    commit, _, changes = (about["commit"] or "").partition("+")
    commit = f" at {commit[:10]}{changes and ' with changes'}" if commit else ""
    ddjax = f"ddjax {about['ddjax'] or '(not installed)'}{commit}"
    lines = {
        "": f"{config['data']['name']}, {config['process']['name']} process, {config['denoiser']['name']} denoiser "
        f"with {result['parameters']:,} parameters, {what}",
        "device": f"{about['device_count']} x {about['device_kind']} ({about['platform']})",
        "software": f"{ddjax}, jax {about['jax']}, flax {about['flax']}, Python {about['python']}",
        "compile": f"{result['compile_s']:.2f} s, after {result['lower_s']:.2f} s of tracing and lowering",
        "step" if train else "batch": (
            f"{_ms(seconds['median'])} (p10 {_ms(seconds['p10'])}, p90 {_ms(seconds['p90'])}) over {count}"
        ),
        "throughput": f"{result['examples_per_s']:,.1f} {'examples' if train else 'samples'}/s"
        + (f", {result['tokens_per_s']:,.0f} tokens/s" if result["tokens_per_s"] else ""),
    }
    if not train:
        lines["network"] = (
            f"{result['nfe']} evaluations, {_ms(result['network_call_s']['median'])} each when called alone; "
            f"solver overhead x{result['solver_overhead']:.2f}"
        )
    mfu = f"; {result['mfu']:.1%} of the peak in bfloat16" if result["mfu"] is not None else ""
    rate = f"{_si(result['flop_per_s'])}FLOP/s"
    lines["arithmetic"] = f"{_si(result['flops'])}FLOP a {'step' if train else 'batch'}, {rate}{mfu}"
    source = {"device": "in use on a device, at most", "executable": "the program's own, per device"}[memory["source"]]
    host = f"; the process held {_si(memory['host_peak_bytes'])}B at most" if memory["host_peak_bytes"] else ""
    lines["memory"] = f"{_si(memory['peak_bytes'])}B ({source}){host}"
    return "\n".join(f"{name:<12}{text}" if name else text for name, text in lines.items())


def write(result: Mapping[str, Any], path: str | Path) -> None:
    """Write the result as JSON, atomically; folders are made."""
    write_atomically(Path(path), (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < (least := 0 if name == "warmup" else 1):
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _load(config: Config) -> tuple[Dataset, Experiment]:
    data = load_data(config, "train")
    return data, build(config, data)


def _first_batch(experiment: Experiment, data: Dataset) -> dict[str, Any]:
    """The first training batch's rows of this process."""
    return next(experiment.batches(data, process_index=jax.process_index(), process_count=jax.process_count()))


def _compile(jitted: Any, *args: Any) -> tuple[Callable, dict[str, float]]:
    """Ahead-of-time compilation and what it took, from scratch."""
    start = time.perf_counter()
    lowered = jitted.lower(*args)
    middle = time.perf_counter()
    with _no_persistent_cache():
        compiled = lowered.compile()
    return compiled, {"lower_s": middle - start, "compile_s": time.perf_counter() - middle}


@contextlib.contextmanager
def _no_persistent_cache() -> Iterator[None]:
    """The command line keeps compiled programs on disk; reading one back is not compiling it."""
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX decides once whether to use the cache, and remembers
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def _time(once: Callable[[int], Any], repeats: int, warmup: int) -> dict[str, float]:
    """Median and spread of the seconds of `once(i)`, which must wait for its result."""
    seconds = []
    for i in range(warmup + repeats):
        start = time.perf_counter()
        once(i)
        seconds.append(time.perf_counter() - start)
    p10, median, p90 = np.percentile(seconds[warmup:], [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def _about(experiment: Experiment, parameters: int, devices: Sequence[jax.Device]) -> dict[str, Any]:
    return {
        "config": to_dict(experiment.config),
        "environment": {
            **versions(),
            "python": platform.python_version(),
            "system": platform.platform(),
            "platform": devices[0].platform,
            "device_kind": devices[0].device_kind,
            "device_count": len(devices),  # that were used
            "process_count": jax.process_count(),
        },
        "parameters": parameters,
        "sites": experiment.sites,
    }


def _throughput(experiment: Experiment, examples: int, seconds: float) -> dict[str, float | None]:
    """Tokens are the sites of categorical states; values have none."""
    tokens = examples * experiment.sites / seconds if experiment.data.num_symbols is not None else None
    return {"examples_per_s": examples / seconds, "tokens_per_s": tokens}


def _rates(operations: int, seconds: float, devices: Sequence[jax.Device]) -> dict[str, float | None]:
    peak = peak_flop_per_s(devices[0].device_kind)
    rate = operations / seconds
    return {
        "flops": operations,
        "flop_per_s": rate,
        "peak_flop_per_s": peak and peak * len(devices),
        "mfu": peak and rate / (peak * len(devices)),
    }


def _memory(compiled: Any) -> dict[str, Any]:
    """Peak bytes on a device: since the process began where its allocator says, else as the program was planned."""
    device = device_peak()
    plan = compiled.memory_analysis()
    sizes = {name: int(getattr(plan, f"{name}_size_in_bytes", 0)) for name in ("argument", "output", "temp", "alias")}
    # Donated outputs lie in the arguments.
    program = sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
    return {
        "peak_bytes": program if device is None else device,
        "source": "executable" if device is None else "device",
        "executable": {**sizes, "total": program},
        "host_peak_bytes": host_peak(),
    }


def _parameters(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _si(value: float) -> str:
    """Three digits and a prefix: 1.53 G."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5 or prefix == "P":
            return f"{value:.3g} {prefix}"
        value /= 1000
    raise AssertionError
