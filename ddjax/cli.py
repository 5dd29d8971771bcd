"""The command line: `ddjax train | sample | search | eval | bench | export`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OVERRIDES = """\
Any key of the config can be overridden: --config.train.steps=2000 --config.denoiser.options.width=128
All keys are listed and explained in ddjax/config.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns 0 where all went well, or a signal asked to stop and all was saved; 1 or 2 with one clear line where not.

    DDJAX_DEBUG=1 in the environment shows the whole traceback of an error.
    """
    arguments, overrides = parser().parse_known_args(argv)
    name = f"ddjax {arguments.command}"
    taken = tuple(f"--config.{section}" for section in getattr(arguments, "overrides", ()))
    stray = [a for a in overrides if not a.startswith(taken)]
    if stray:
        print(
            f"{name}: unknown argument {stray[0]} (see {name} --help; overrides are --config.key=value)",
            file=sys.stderr,
        )
        return 2
    shown, warnings.formatwarning = warnings.formatwarning, lambda text, *_: f"{name}: warning: {_one_line(text)}\n"
    try:
        _prepare_jax()
        return arguments.run(arguments, overrides) or 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        # What users can put right is raised as one of these with a message that says how.
        if os.environ.get("DDJAX_DEBUG"):
            raise
        print(f"{name}: {_one_line(_message(error))}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = shown


def parser() -> argparse.ArgumentParser:
    """The argument parser with all sub-commands."""
    top = argparse.ArgumentParser(
        prog="ddjax",
        description="Denoising diffusion on any state space, in JAX.",
        epilog="Start with: ddjax train --config configs/digits_masked.py --workdir runs/digits",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    train = _command(commands, "train", _train, "train a model, or continue where a run stopped", epilog=OVERRIDES)
    _add_config(train)
    _add_workdir(train, "folder of the run: checkpoints, metrics, samples; made if absent, continued if it holds a run")
    train.add_argument("--quiet", action="store_true", help="print nothing but errors")

    sample = _command(commands, "sample", _sample, "draw samples from a trained model")
    _add_workdir(sample, "folder of the run")
    sample.add_argument("--num", type=int, help="how many (default: the config's)")
    sample.add_argument(
        "--out",
        type=Path,
        help="file to write: .png for images, .txt for text, .npy for raw states; .gif (images) or .html (text) for an "
        "animation of the sampling",
    )
    sample.add_argument("--label", type=int, help="draw this class only (default: all in turn)")
    sample.add_argument("--unconditional", action="store_true", help="draw without labels")
    sample.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 is off")
    sample.add_argument("--steps", type=int, help="solver steps")
    sample.add_argument(
        "--solver",
        metavar="NAME",
        help="by name, as config.sample.solver (default: the config's), or a file that ddjax search wrote",
    )
    sample.add_argument(
        "--solver-option", action="append", default=[], metavar="KEY=VALUE", help="of the solver (may be repeated)"
    )
    sample.add_argument(
        "--parallel", type=int, metavar="WINDOW",
        help="make so many steps at once and correct them until they agree (solvers without a memory)",
    )  # fmt: skip
    sample.add_argument(
        "--tolerance", type=float, default=0.1,
        help="of --parallel, in units of a step's noise (default: 0.1); 0 gives what one step after the other gives",
    )  # fmt: skip
    sample.add_argument("--prompt", help="text that the samples begin with")
    sample.add_argument(
        "--infill", metavar="TEXT",
        help='text with gaps, "To be ___ the question": ___ is what is left of the window, ___{12} is 12 tokens',
    )  # fmt: skip
    sample.add_argument(
        "--temperature", type=float, default=1.0, help="of each symbol's law: 1 is off, 0 the likeliest"
    )
    sample.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest symbols")
    sample.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest symbols that have probability P"
    )
    sample.add_argument(
        "--repetition", type=float, default=1.0, metavar="PENALTY",
        help="divide the probability of symbols that an example shows already by this; 1 is off",
    )  # fmt: skip
    sample.add_argument("--no-repeats", action="store_true", help="text: no symbol that a neighbour shows")
    sample.add_argument("--stop", metavar="TOKEN", help="texts: each ends before its first such token")
    sample.add_argument("--seed", type=int, help="of the samples; the same seed gives the same samples")
    sample.add_argument(
        "--rows", type=int, nargs="+", metavar="ROW",
        help="draw these of the seed's samples only, numbered from 0 (in place of --num)",
    )  # fmt: skip
    sample.add_argument("--step", type=int, help="checkpoint to use (default: the newest good one)")

    search = _command(commands, "search", _search, "learn a fast sampler for a trained model, whose weights stay")
    _add_workdir(search, "folder of the run")
    search.add_argument("--steps", type=int, required=True, help="solver steps, one network evaluation each")
    search.add_argument("--out", type=Path, required=True, help="file to write, .json: for ddjax sample --solver")
    search.add_argument(
        "--loss", choices=("fine", "kernel"), default="fine",
        help="fine: distance to the solution in many steps (default); kernel: distance to the training data",
    )  # fmt: skip
    search.add_argument(
        "--family", choices=("general", "grid", "compensation"), default="general",
        help="general: all coefficients and times (default); grid: times; compensation: DC-Solver's ratios",
    )  # fmt: skip
    search.add_argument("--solver", default="dpm_solver_pp", help="where to begin (default: dpm_solver_pp)")
    search.add_argument("--num", type=int, default=256, help="examples to learn from (default: 256)")
    search.add_argument("--iterations", type=int, default=300, help="steps of the search (default: 300)")
    search.add_argument("--guidance", type=float, help="classifier-free guidance scale to learn for")
    search.add_argument("--seed", type=int, default=0, help="of the search")
    search.add_argument("--step", type=int, help="checkpoint to use (default: the newest good one)")

    evaluate = _command(
        commands, "eval", _eval, "report the likelihood of held-out data, in bits per dimension",
        epilog="How it is estimated can be overridden: --config.eval.max_examples=100 --config.eval.probes=2",
    )  # fmt: skip
    evaluate.set_defaults(overrides=("eval.",))
    _add_workdir(evaluate, "folder of the run")
    evaluate.add_argument(
        "--likelihood",
        choices=("bound", "ode"),
        default="bound",
        help="bound: the variational bound (default); ode: that of the probability-flow ODE, for continuous states "
        "(data with levels are dequantised by uniform noise)",
    )
    evaluate.add_argument("--num-times", type=int, help="bound: times per example (default: the config's)")
    evaluate.add_argument(
        "--labels", type=int, default=None, metavar="N",
        help="for labelled images: also the fraction of N samples that a classifier fitted on the training data "
        "gives their own label",
    )  # fmt: skip
    evaluate.add_argument("--guidance", type=float, help="guidance scale of those samples (default: the config's)")
    evaluate.add_argument("--data", help="path of the data, if it has moved since training")
    evaluate.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    evaluate.add_argument("--step", type=int, help="checkpoint to use (default: the newest good one)")

    bench = _command(
        commands, "bench", _bench, "measure step time, throughput, FLOP/s, compile time and memory", epilog=OVERRIDES
    )
    bench.add_argument(
        "what",
        nargs="?",
        choices=("train", "sample", "objectives", "samplers"),
        default="train",
        help="what to measure (default: train); objectives: a training step of each process and objective, against the "
        "masked bound; samplers: the speed of each solver on masked sequences, what caching saves, and what they take "
        "beside the network (no --config)",
    )
    _add_config(bench, required=False)
    bench.add_argument(
        "--steps",
        type=int,
        help="train, objectives, samplers: steps or rounds to time (default: 20, 10, 5); sample: solver steps "
        "(default: the config's)",
    )
    bench.add_argument(
        "--vocabulary", type=int, help="objectives: this many symbols with Zipf's frequencies, not the config's data"
    )
    bench.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="objectives, samplers: one of them (may be repeated)",
    )
    bench.add_argument("--out", type=Path, help="also write the result, with versions and device, to this JSON file")

    export = _command(commands, "export", _export, "write the averaged parameters as safetensors")
    _add_workdir(export, "folder of the run")
    export.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    export.add_argument("--step", type=int, help="checkpoint to use (default: the newest good one)")
    return top


def _command(commands: Any, name: str, run: Any, words: str, epilog: str | None = None) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=words,
        description=words[0].upper() + words[1:] + ".",
        epilog=epilog,
        allow_abbrev=False,  # --conf must not swallow an override
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_config(command: argparse.ArgumentParser, required: bool = True) -> None:
    command.add_argument("--config", type=Path, required=required, help="config file, e.g. configs/digits_masked.py")
    command.set_defaults(overrides=("",))


def _add_workdir(command: argparse.ArgumentParser, words: str) -> None:
    command.add_argument("--workdir", type=Path, required=True, help=words)


def _prepare_jax() -> None:
    """Settings of every command: quiet logs and a compilation cache that outlives the process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ddjax" / "jax"
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _message(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return (
        text
        if isinstance(error, ValueError | RuntimeError | ImportError) or not isinstance(error, OSError)
        else _os_message(error)
    )


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _os_message(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from ddjax.config import load
    from ddjax.training.loop import train

    train(load(arguments.config, overrides), arguments.workdir, show=not arguments.quiet)
    return 0


def _load(arguments: argparse.Namespace) -> Any:
    from ddjax.run import load

    return load(arguments.workdir, step=arguments.step)


def _sample(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import jax
    import numpy as np

    from ddjax import companions
    from ddjax.animation import SUFFIXES, animate, check_animation
    from ddjax.experiment import load_data
    from ddjax.training.loop import samples_path, write_samples

    run = _load(arguments)
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
        cond = rows % run.data.num_classes
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
        solver_options=dict(map(_option, arguments.solver_option)),
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
        trajectory=moving,
        parallel=arguments.parallel,
        tolerance=arguments.tolerance,
    )
    if moving:
        animate(run.data, np.asarray(drawn.trajectory), path)
    else:
        write_samples(run.data, np.asarray(drawn), path, arguments.stop)
    x0 = drawn.x0 if moving else drawn
    print(f"{len(rows)} samples -> {path}")
    if run.data.vocabulary is not None:
        print(run.data.to_text(np.asarray(x0[:1]), arguments.stop)[0])
    return 0


def _option(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value a Python literal or else a string."""
    import ast

    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"--solver-option {text}: expected KEY=VALUE, for example eta=0.5")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _search(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import jax

    from ddjax import search
    from ddjax.solvers import learned

    if arguments.out.suffix != ".json":
        raise ValueError(f"--out must end in .json, got {arguments.out}")
    run = _load(arguments)
    names = ("steps", "loss", "family", "solver", "num", "iterations", "guidance")
    options = {name: getattr(arguments, name) for name in names}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is an error now
    found = search.for_run(run, jax.random.key(arguments.seed), **options)
    about = {**options, "seed": arguments.seed, "step": run.step, "before": found.before, "after": found.after}
    learned.save(arguments.out, found.solver, **about)
    print(
        f"loss on examples not searched on: {arguments.solver} {found.before:.4g}, learned {found.after:.4g} "
        f"-> {arguments.out}"
    )
    return 0


def _eval(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import json

    from ddjax.config import overridden
    from ddjax.training.loop import evaluate, judge_labels
    from ddjax.training.manifest import write_atomically
    from ddjax.training.report import describe_bound

    run = _load(arguments)
    config = _with_data(overridden(run.config, overrides), arguments.data, arguments.num_times)
    values = evaluate(run, config, likelihood=arguments.likelihood)
    print(describe_bound(values, config.data.eval_split))
    if arguments.labels:
        scale = run.config.sample.guidance if arguments.guidance is None else arguments.guidance
        values["label_accuracy"], values["guidance"] = judge_labels(run, config, arguments.labels, scale), scale
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


def _bench(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from ddjax import bench
    from ddjax.config import default, load, typed

    if arguments.config is None and overrides:
        raise ValueError("overrides need a --config to override")
    if arguments.what == "samplers":
        from ddjax import bench_samplers

        if arguments.config is not None or arguments.vocabulary is not None:
            raise ValueError("ddjax bench samplers has a network of its own: no --config, no --vocabulary")
        rounds = {} if arguments.steps is None else {"rounds": arguments.steps}
        result = bench_samplers.bench_samplers(solvers=arguments.only, **rounds)
        print(bench_samplers.format_samplers(result))
        if arguments.out is not None:
            bench.write(result, arguments.out)
        return 0
    config = typed(_small(default())) if arguments.config is None else load(arguments.config, overrides)
    if arguments.what == "objectives":
        rounds = {} if arguments.steps is None else {"rounds": arguments.steps}
        result = bench.bench_objectives(config, names=arguments.only, vocabulary=arguments.vocabulary, **rounds)
        print(bench.format_objectives(result))
    else:
        if arguments.only or arguments.vocabulary is not None:
            raise ValueError("--only is for ddjax bench objectives and samplers, --vocabulary for objectives")
        measure = bench.bench_train if arguments.what == "train" else bench.bench_sample
        result = measure(config, **({} if arguments.steps is None else {"steps": arguments.steps}))
        print(bench.format_report(result))
    if arguments.out is not None:
        bench.write(result, arguments.out)
    return 0


def _small(config: Any) -> Any:
    """The network of configs/digits_masked.py, for a bench without a config."""
    config.denoiser.options = {"width": 96, "depth": 3, "heads": 4, "time": False}
    config.objective.name = "any_order"
    return config


def _export(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import json

    from ddjax.config import to_dict
    from ddjax.training import export_safetensors

    run = _load(arguments)
    metadata = {"step": str(run.step), "config": json.dumps(to_dict(run.config))}
    export_safetensors(arguments.out, run.params, metadata)
    print(f"parameters of step {run.step} -> {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
