"""What the commands of `ddjax.cli` do: `function(arguments, overrides) -> exit status`.

Each imports what it needs when it is called: `ddjax --help` is quick.
"""

from __future__ import annotations

import argparse
import os
from typing import Any


def train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Train, or go on."""
    from ddjax.config import load
    from ddjax.training import loop

    run = loop.train(load(arguments.config, overrides), arguments.workdir, show=not arguments.quiet)
    return arguments.stopped_status if run is None else 0


def _load(arguments: argparse.Namespace) -> Any:
    from ddjax.run import load

    return load(arguments.workdir, step=arguments.step)


def _load_over_all(arguments: argparse.Namespace) -> Any:
    """The run over all devices, of all processes: as it was trained where that fits, else batches alone are cut."""
    import jax

    from ddjax.training import make_mesh

    run = _load(arguments)
    if jax.device_count() == 1 or (jax.process_count() == 1 and jax.default_backend() == "cpu"):
        return run  # the CPU devices of one process are the same cores
    try:
        return run.over(make_mesh(run.config.train.mesh))
    except ValueError:  # made for other devices
        return run.over(make_mesh())


def sample(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Draw samples and write them."""
    import jax
    import numpy as np

    from ddjax import cluster, companions
    from ddjax.animation import SUFFIXES, animate, check_animation
    from ddjax.loading import load_data
    from ddjax.training.loop import labels_in_turn, samples_path, write_samples

    run = _load_over_all(arguments)
    num = run.config.sample.num if arguments.num is None else arguments.num
    if num < 1:
        raise ValueError(f"--num must be at least 1, got {num}")
    if arguments.rows is not None and arguments.num not in (None, len(arguments.rows)):
        raise ValueError(f"--rows names {len(arguments.rows)} samples and --num {arguments.num}: leave one of them out")
    if arguments.label is not None and arguments.unconditional:
        raise ValueError("--label draws a class, and --unconditional none: leave one of them out")
    rows = np.arange(num) if arguments.rows is None else np.asarray(arguments.rows)
    cond = None
    if arguments.label is not None:
        cond = np.full(len(rows), arguments.label)
    elif run.data.num_classes and not arguments.unconditional:
        cond = labels_in_turn(run.data, rows)
    if run.data.conditions and not arguments.unconditional:
        told = companions.held_out_conditions(load_data(run.config, run.config.data.eval_split), rows)
        cond = told if arguments.label is None else {**told, "cond": cond}
    seed = run.config.sample.seed if arguments.seed is None else arguments.seed
    init = None
    if companions.starts_from_data(run.experiment):
        held_out = load_data(run.config, run.config.data.eval_split)
        starts = companions.held_out_starts(run.experiment, held_out, jax.random.key(seed), int(rows.max()) + 1)
        init, labels = jax.tree.map(lambda a: a[rows], starts)
        cond = labels if arguments.label is None and not arguments.unconditional else cond
    path = arguments.out or arguments.workdir / "samples" / f"seed_{seed}"
    moving = path.suffix in SUFFIXES
    path = check_animation(run.data, path) if moving else samples_path(run.data, path)
    drawn = run.sample(
        jax.random.key(seed),
        len(rows),
        cond=cond,
        steps=arguments.steps,
        guidance=arguments.guidance,
        solver=arguments.solver,
        solver_options=dict(map(_option, arguments.solver_option)) or None,
        policy=arguments.policy,
        init=init,
        prompt=arguments.prompt,
        infill=arguments.infill,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        repetition=arguments.repetition,
        no_repeats=arguments.no_repeats,
        rows=rows,
        stop=arguments.stop,
        length=arguments.length,
        stride=arguments.stride,
        trajectory=moving,
        parallel=arguments.parallel,
        tolerance=arguments.tolerance,
    )
    if not cluster.first():
        return 0
    if moving:
        animate(run.data, np.asarray(drawn.trajectory), path)
    else:
        sizes = run.experiment.sizes(jax.random.key(seed), rows)
        write_samples(run.data, jax.tree.map(np.asarray, drawn), path, arguments.stop, cond, sizes)
    x0 = drawn.x0 if moving else drawn
    print(f"{len(rows)} samples -> {path}")
    if run.data.vocabulary is not None:
        print(run.data.to_text(np.asarray(x0[:1]), arguments.stop)[0])
    return 0


def _option(text: str, of: str = "--solver-option") -> tuple[str, Any]:
    """KEY=VALUE, the value a Python literal or else a string."""
    import ast

    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"{of} {text}: expected KEY=VALUE, for example eta=0.5")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def edit(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Invert items and draw them again."""
    from ddjax import editing

    arguments.options = dict(map(_option, arguments.solver_option))
    return editing.command(arguments)


def search(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Learn a sampler, ratios or a policy."""
    import jax

    from ddjax.search import for_run
    from ddjax.solvers import learned

    if arguments.out.suffix != ".json":
        raise ValueError(f"--out must end in .json, got {arguments.out}")
    run, key = _load(arguments), jax.random.key(arguments.seed)
    names = ("loss", "solver", "num", "iterations")
    options = {name: getattr(arguments, name) for name in names}
    scales = arguments.guidance or [None]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is an error now
    if arguments.family == "policy":
        return _search_policy(arguments, run, key, scales, options)
    options["family"] = arguments.family
    if len(arguments.steps) * len(scales) > 1:
        return _search_settings(arguments, run, scales, options)
    options |= {"steps": arguments.steps[0], "guidance": scales[0]}
    found = for_run(run, key, **options)
    about = {**options, "seed": arguments.seed, "step": run.step, "before": found.before, "after": found.after}
    learned.save(arguments.out, found.solver, **about)
    print(
        f"loss on examples not searched on: {arguments.solver} {found.before:.4g}, learned {found.after:.4g} "
        f"-> {arguments.out}"
    )
    return 0


def _search_policy(
    arguments: argparse.Namespace, run: Any, key: Any, scales: list[float | None], options: dict[str, Any]
) -> int:
    """Which number of steps for which label."""
    from ddjax import policies

    if len(scales) > 1:
        raise ValueError(f"--guidance: one scale for --family policy, got {scales}")
    options |= {"steps": arguments.steps, "guidance": scales[0], "cost": arguments.cost}
    found = policies.for_run(run, key, **{"quality" if k == "loss" else k: v for k, v in options.items()})
    about = found._replace(policy=None)._asdict() | options | {"seed": arguments.seed, "step": run.step}
    policies.save(arguments.out, found.policy, run.experiment.sampling_process, **about)
    print(
        f"on examples not learned on: the policy {found.evaluations:.3g} evaluations, reward {found.reward:.4g}; "
        f"best for all {found.fixed_evaluations:.3g}, {found.fixed_reward:.4g} -> {arguments.out}"
    )
    return 0


def _search_settings(arguments: argparse.Namespace, run: Any, scales: list[Any], options: dict[str, Any]) -> int:
    """Ratios for several numbers of steps and guidance scales, and all between."""
    import jax

    from ddjax import compensation

    if options.pop("family") != "compensation":
        raise ValueError("several --steps or --guidance are for --family compensation: give one of each")
    key, settings = jax.random.key(arguments.seed), {"steps": arguments.steps, "guidance": scales}
    found = compensation.for_run(run, key, **settings, **options)
    for one, (before, after) in zip(found.searched, found.losses, strict=True):
        print(
            f"{one.steps} steps, guidance {one.guidance:g}: loss on examples not searched on {before:.4g}, with ratios "
            f"{after:.4g}"
        )
    about = {**options, "searched": [one._asdict() for one in found.searched], "losses": found.losses}
    about |= {"seed": arguments.seed, "step": run.step}
    compensation.save(arguments.out, found.cascade, run.process, options["solver"], **about)
    print(f"ratios for all settings between these -> {arguments.out}")
    return 0


def evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Report likelihoods, and how many labels are right."""
    import json

    from ddjax import cluster
    from ddjax.config import overridden
    from ddjax.training import loop
    from ddjax.training.manifest import write_atomically
    from ddjax.training.report import describe_bound

    run = _load_over_all(arguments)
    config = _with_data(overridden(run.config, overrides), arguments.data, arguments.num_times)
    values = loop.evaluate(run, config, likelihood=arguments.likelihood)
    if cluster.first():
        print(describe_bound(values, config.data.eval_split))
    if arguments.labels:
        scale = run.config.sample.guidance if arguments.guidance is None else arguments.guidance
        values["label_accuracy"], values["guidance"] = loop.judge_labels(run, config, arguments.labels, scale), scale
    if not cluster.first():
        return 0
    if arguments.labels:
        print(
            f"{values['label_accuracy']:.1%} of {arguments.labels} samples are given their own label "
            f"(guidance {scale:g})"
        )
    if arguments.out is not None:
        write_atomically(arguments.out, json.dumps({"step": run.step, **values}, indent=1).encode())
    return 0


def _with_data(config: Any, path: str | None, num_times: int | None) -> Any:
    import dataclasses

    if path is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, name=path))
    if num_times is not None:
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, num_times=num_times))
    return config


def benchmark(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Measure, print and write."""
    from ddjax import bench
    from ddjax.config import default, load, typed

    if arguments.config is None and overrides:
        raise ValueError("overrides need a --config to override")
    if arguments.vs is not None and arguments.what != "sample":
        raise ValueError("--vs is for ddjax bench sample")
    if arguments.vs is not None:
        return _bench_samples(arguments)
    config = typed(_small(default())) if arguments.config is None else load(arguments.config, overrides)
    if arguments.device is not None and arguments.what != "data":
        raise ValueError("--device is for ddjax bench data")
    if arguments.what == "data":
        from ddjax import bench_data

        steps = {} if arguments.steps is None else {"steps": arguments.steps}
        result = bench_data.bench_data(config, device=arguments.device, mfu=arguments.mfu, **steps)
        print(bench_data.format_data(result))
    elif arguments.what == "objectives":
        rounds = {} if arguments.steps is None else {"rounds": arguments.steps}
        result = bench.bench_objectives(config, names=arguments.only, vocabulary=arguments.vocabulary, **rounds)
        print(bench.format_objectives(result))
    else:
        if arguments.only or arguments.vocabulary is not None:
            raise ValueError("--only is for ddjax bench objectives and sample --vs, --vocabulary for objectives")
        measure = bench.bench_train if arguments.what == "train" else bench.bench_sample
        result = measure(config, **({} if arguments.steps is None else {"steps": arguments.steps}))
        print(bench.format_report(result))
    if arguments.out is not None:
        bench.write(result, arguments.out)
    return 0


def _bench_samples(arguments: argparse.Namespace) -> int:
    """The benches of samplers, with networks of their own."""
    from ddjax import bench, bench_peers, bench_samplers

    if arguments.config is not None or arguments.vocabulary is not None:
        raise ValueError(
            f"ddjax bench sample --vs {arguments.vs} has a network of its own: no --config, no --vocabulary"
        )
    measure, show, number = {
        "solvers": (bench_samplers.bench_samplers, bench_samplers.format_samplers, "rounds"),
        "diffusers": (bench_peers.bench_diffusers, bench_peers.format_diffusers, "steps"),
    }[arguments.vs]
    chosen = {"solvers": arguments.only} if arguments.only else {}
    result = measure(**chosen, **({} if arguments.steps is None else {number: arguments.steps}))
    print(show(result))
    if arguments.out is not None:
        bench.write(result, arguments.out)
    return 0


def _small(config: Any) -> Any:
    """The network of configs/digits_masked.py, for a bench without a config."""
    config.denoiser.options = {"width": 96, "depth": 3, "heads": 4, "time": False}
    config.objective.name = "any_order"
    return config


def prepare(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Write texts or images as shards."""
    from pathlib import Path

    from ddjax import data
    from ddjax.data import documents
    from ddjax.data.prepare import prepare_items, prepare_text

    def is_text(name: str) -> bool:
        path = Path(name).expanduser()
        if path.is_dir():
            from ddjax.data import images

            return not images.find(path, images.EXTENSIONS) and bool(images.find(path, documents.EXTENSIONS))
        return path.name.lower().endswith(documents.EXTENSIONS)

    options = {"shard_bytes": int(arguments.shard_size * 2**20), "say": lambda line: print(line, flush=True)}
    if arguments.storage is not None:
        options["storage"] = arguments.storage
    texts = [is_text(name) for name in arguments.inputs]
    if all(texts):
        if unfit := [n for n in ("size", "grey", "split") if getattr(arguments, n)]:
            raise ValueError(f"--{unfit[0]} is for images, and {arguments.inputs[0]} is text")
        options |= {name: getattr(arguments, name) for name in ("vocabulary", "document", "field", "end")}
        prepare_text(arguments.inputs, arguments.out, **options)
        return 0
    if any(texts) or len(arguments.inputs) > 1:
        raise ValueError("give either files and folders of text, or one folder or file of images")
    asked = {"size": arguments.size, "grey": arguments.grey or None}
    asked = {name: value for name, value in asked.items() if value is not None}
    load = dict(asked) if arguments.split else {**asked, "fractions": (1.0, 0.0, 0.0)}
    found = data.load(arguments.inputs[0], arguments.split or "train", **load)
    prepare_items(found, arguments.inputs, arguments.out, options=asked, **options)
    return 0


def verify(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Compare shards with their manifest."""
    from ddjax.data.prepare import verify
    from ddjax.data.shards import MEND, ShardError

    if wrong := verify(arguments.folder):
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ShardError(f"the shard {wrong[0]}{more}: {MEND}")
    print(f"{arguments.folder}: every shard is as its manifest says")
    return 0


def export(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Write the parameters."""
    import json

    from ddjax import cluster
    from ddjax.config import to_dict
    from ddjax.training import export_safetensors

    run = _load(arguments)  # every process reads, because Orbax reads together; one writes

    def write() -> None:
        metadata = {"step": str(run.step), "config": json.dumps(to_dict(run.config))}
        export_safetensors(arguments.out, run.params, metadata)
        print(f"parameters of step {run.step} -> {arguments.out}")

    cluster.on_first(write)
    return 0


def convert(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Published weights to ours, or back."""
    import jax.numpy as jnp
    from rich.console import Console
    from rich.table import Table

    from ddjax import interop

    settings = dict(_option(text, "--set") for text in arguments.set)
    try:
        back = interop.published.is_ours(arguments.input)
        if back and (settings or arguments.family or arguments.partial):
            raise ValueError(f"{arguments.input} says itself what it is: no --set, no --family, no --partial")
        model = interop.load(arguments.input, arguments.family, partial=arguments.partial, **settings)
    except ValueError as error:
        summary, *lines = str(error).splitlines()
        if lines:
            print("\n".join(lines))
        raise ValueError(summary) from error
    dtype = None if arguments.dtype is None else jnp.dtype(arguments.dtype)
    if arguments.out.suffix != ".safetensors" and not (back and model.orbax):
        raise ValueError(f"--out must end in .safetensors, got {arguments.out}")
    if back:
        model.export(arguments.out, dtype)
    else:
        if dtype is not None:
            raise ValueError("--dtype is of the published tensors; ours are float32")
        model.save(arguments.out)
    if arguments.names:
        table = Table("theirs", "ours", box=None)
        for theirs, ours in model.report.matched:
            table.add_row(", ".join(theirs), ", ".join(ours))
        Console(soft_wrap=True).print(table, highlight=False, markup=False)
    if not back:
        print(model.report)
    whose = interop.FAMILIES[model.family].source
    print(f"{model.family} ({whose}), {'theirs' if back else 'ours'} -> {arguments.out}")
    return 0


def plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Plan a training for devices that are not there."""
    import jax

    # Before anything else asks for devices: fake ones, however many, on a machine with any or none. Their code never
    # runs, so LLVM need not improve it.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(arguments.devices, 1))
    jax.config.update("jax_enable_compilation_cache", False)  # programs for devices that are absent cannot be read back
    from ddjax import plan as plans
    from ddjax.config import load
    from ddjax.loading import load_data

    config = load(arguments.config, overrides)
    if arguments.shape is None and (arguments.symbols or arguments.classes):
        raise ValueError("--symbols and --classes describe data by --shape: give it too")
    data = (
        load_data(config, "train")
        if arguments.shape is None
        else plans.described(tuple(arguments.shape), arguments.symbols, arguments.classes)
    )
    made = plans.plan(config, data, arguments.devices, chip_name=arguments.chip, compiler=arguments.compile)
    print(plans.format_plan(made))
    return 0


def launch(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run a command as several processes."""
    import sys

    from ddjax import launch

    if not arguments.command_line:
        raise ValueError("nothing to launch: give a command behind --, such as: -- train --config ... --workdir ...")
    return launch.local(
        [sys.executable, "-m", "ddjax", *arguments.command_line],
        processes=arguments.processes,
        devices_per_process=arguments.devices_per_process,
    )
