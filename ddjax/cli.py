"""The command line: `ddjax train | sample | edit | search | eval | bench | plan | data | export | convert | launch`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddjax import cluster, commands

OVERRIDES = """\
Any key of the config can be overridden: --config.train.steps=2000 --config.denoiser.options.width=128
All keys are listed and explained in ddjax/config.py."""


PREPARE = """\
Texts: .txt and the like, .jsonl, folders of them, .gz or .xz or plain; images: folders of PNG, JPEG, ..., .npz, .npy.
The same command goes on where it was stopped, and mends a finished folder that has lost shards. The folder is
config.data.name of a training."""


EDIT = """\
Example: ddjax edit --workdir runs/digits --rows 0 1 2 --label 7 --start 0.7 --out edited.png
Writes the originals, what is drawn of them under their own labels, and the edits; prints how far the second are from
the first. The less of the way is gone up (--start), the more is kept."""


PLAN = """\
Example: ddjax plan --config configs/dit_xl2.py --devices 64 --chip h200 --shape 32 32 4 --classes 1000
Prints where each parameter lies, bytes per device, collectives, FLOPs, and the least time of a step. Any key of the
config can be overridden: --config.train.mesh="{'fsdp': -1, 'tensor': 8}". docs/scaling.md checks it by hand."""


CONVERT = """\
Example: ddjax convert DiT-XL-2-256.safetensors --family dit --out dit.safetensors
Then in Python: ddjax.interop.load("dit.safetensors").sample(key, 4, cond=labels). A file of ours is turned into its
authors' again. Families: dit, sit, diffusers_dit, uvit, adm, edm_song,
edm_adm, edm2, diffusers_unet, diffusers_conditioned_unet, mdlm, sedd, udlm, duo, radd, llada."""


LAUNCH = """\
Example: ddjax launch local --processes 2 --devices-per-process 4 -- train --config CONFIG --workdir runs/two
What comes behind -- is a command of ddjax."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns 0 where all went well, or a signal asked to stop and all was saved; 1 or 2 with one clear line where not.

    DDJAX_DEBUG=1 in the environment shows the whole traceback of an error.
    """
    argv, command = _split(sys.argv[1:] if argv is None else list(argv))
    arguments, overrides = parser().parse_known_args(argv)
    arguments.command_line = command
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
        if arguments.joins:
            cluster.join()
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
        if cluster.joined():  # an orderly exit waits for the others, who wait for this one in the middle of a step
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        return 1
    finally:
        warnings.formatwarning = shown


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What comes before and after the `--` of `ddjax launch`."""
    if argv[:1] != ["launch"] or "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def parser() -> argparse.ArgumentParser:
    """The argument parser with all sub-commands."""
    top = argparse.ArgumentParser(
        prog="ddjax",
        description="Denoising diffusion on any state space, in JAX.",
        epilog="Start with: ddjax train --config configs/digits_masked.py --workdir runs/digits",
    )
    known = top.add_subparsers(dest="command", required=True, metavar="command")

    train = _command(known, "train", commands.train, "train a model, or continue where a run stopped", epilog=OVERRIDES)
    _add_config(train)
    _add_workdir(train, "folder of the run: checkpoints, metrics, samples; made if absent, continued if it holds a run")
    train.add_argument("--quiet", action="store_true", help="print nothing but errors")
    train.add_argument(
        "--stopped-status", type=int, default=0, metavar="N",
        help="exit status where a signal stopped the run before its end, all saved (default: 0); schedulers start "
        "again what ends with another",
    )  # fmt: skip
    train.set_defaults(joins=True)

    sample = _command(known, "sample", commands.sample, "draw samples from a trained model")
    _add_workdir(sample, "folder of the run")
    sample.set_defaults(joins=True)
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
    sample.add_argument("--policy", metavar="FILE", help="steps by label, as ddjax search --family policy wrote them")
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
    sample.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="texts: of this many tokens, window by window where that is more than one",
    )
    sample.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: half a window)")
    sample.add_argument("--seed", type=int, help="of the samples; the same seed gives the same samples")
    sample.add_argument(
        "--rows", type=int, nargs="+", metavar="ROW",
        help="draw these of the seed's samples only, numbered from 0 (in place of --num)",
    )  # fmt: skip
    _add_step(sample)

    edit = _command(
        known, "edit", commands.edit, "invert items of the data and draw them again, under another label", epilog=EDIT
    )
    _add_workdir(edit, "folder of the run")
    edit.add_argument("--data", choices=("test", "valid", "train"), default="test", help="split (default: test)")
    edit.add_argument("--rows", type=int, nargs="+", metavar="ROW", help="its items to edit, from 0 (default: 0)")
    edit.add_argument("--text", help="for texts: edit this one in the place of items")
    edit.add_argument("--text-file", type=Path, metavar="FILE", help="for texts: the text in this file")
    edit.add_argument("--label", type=int, nargs="+", help="new label, one or one an item (default: their own)")
    edit.add_argument("--out", type=Path, help="file to write: .png for images, .txt for text, .npy for raw states")
    edit.add_argument(
        "--method", choices=("noise", "ode"), default="noise",
        help="noise: that of each sampling step (default); ode: up the probability-flow ODE (continuous states)",
    )  # fmt: skip
    edit.add_argument(
        "--solver", metavar="NAME", help="in the place of ancestral (noise), or the config's or heun (ode)"
    )
    edit.add_argument(
        "--solver-option", action="append", default=[], metavar="KEY=VALUE", help="of the solver (may be repeated)"
    )
    edit.add_argument("--independent", action="store_true", help="noise: each state by itself (edit-friendly)")
    edit.add_argument("--iterations", type=int, default=8, help="ode: fixed points of each step (default: 8; 0: naive)")
    edit.add_argument(
        "--residual", choices=("gumbel", "logit"), default="gumbel",
        help="tokens: the Gumbel noise of each draw (default), or DICE's residual, for a small --lambda-1",
    )  # fmt: skip
    edit.add_argument("--steps", type=int, help="solver steps of the whole way (default: the config's)")
    edit.add_argument("--start", type=float, default=1.0, help="fraction of the steps to go up (default: 1)")
    edit.add_argument("--lambda-1", type=float, help="weight of the recorded noise (default: 1)")
    edit.add_argument("--lambda-2", type=float, help="weight of fresh noise (default: 0)")
    edit.add_argument(
        "--guidance", type=float, help="classifier-free guidance scale of the edit (default: the config's)"
    )
    edit.add_argument("--seed", type=int, default=0, help="of the path and of fresh noise")
    _add_step(edit)

    search = _command(known, "search", commands.search, "learn a fast sampler for a trained model, whose weights stay")
    _add_workdir(search, "folder of the run")
    search.add_argument(
        "--steps", type=int, required=True, nargs="+",
        help="solver steps, one network evaluation each; several: compensation gives ratios for all between, policy "
        "chooses among them",
    )  # fmt: skip
    search.add_argument(
        "--out", type=Path, required=True, help="file to write, .json: for ddjax sample --solver, or --policy"
    )
    search.add_argument(
        "--loss", choices=("fine", "kernel", "label"), default="fine",
        help="fine: distance to the solution in many steps (default); kernel: distance to the training data; label, of "
        "policy: how unlike their label a classifier finds samples",
    )  # fmt: skip
    search.add_argument(
        "--family", choices=("general", "grid", "compensation", "policy"), default="general",
        help="general: all coefficients and times (default); grid: times; compensation: DC-Solver's ratios; policy: "
        "which number of steps for which label",
    )  # fmt: skip
    search.add_argument("--cost", type=float, default=1e-3, help="policy: loss that an evaluation is worth (0.001)")
    search.add_argument("--solver", default="dpm_solver_pp", help="where to begin (default: dpm_solver_pp)")
    search.add_argument("--num", type=int, default=256, help="examples to learn from (default: 256)")
    search.add_argument("--iterations", type=int, default=300, help="steps of the search (default: 300)")
    search.add_argument(
        "--guidance", type=float, nargs="+", help="classifier-free guidance scale to learn for; several as --steps"
    )
    search.add_argument("--seed", type=int, default=0, help="of the search")
    _add_step(search)

    evaluate = _command(
        known, "eval", commands.evaluate, "report the likelihood of held-out data, in bits per dimension",
        epilog="How it is estimated can be overridden: --config.eval.max_examples=100 --config.eval.probes=2",
    )  # fmt: skip
    evaluate.set_defaults(overrides=("eval.",))
    _add_workdir(evaluate, "folder of the run")
    evaluate.set_defaults(joins=True)
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
    _add_step(evaluate)

    bench = _command(
        known,
        "bench",
        commands.benchmark,
        "measure step time, throughput, FLOP/s, compile time and memory",
        epilog=OVERRIDES,
    )
    bench.add_argument(
        "what",
        nargs="?",
        choices=("train", "sample", "objectives", "data"),
        default="train",
        help="what to measure (default: train); objectives: a training step of each process and objective, against the "
        "masked bound; data: what a step waits for its data",
    )
    _add_config(bench, required=False)
    bench.add_argument(
        "--steps",
        type=int,
        help="train, objectives, sample --vs solvers: steps or rounds to time (default: 20, 10, 3); sample: solver "
        "steps (default: the config's; with --vs diffusers: 50)",
    )
    bench.add_argument(
        "--vocabulary", type=int, help="objectives: this many symbols with Zipf's frequencies, not the config's data"
    )
    bench.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="objectives, sample --vs: one of them (may be repeated)",
    )
    bench.add_argument(
        "--vs",
        choices=("solvers", "diffusers"),
        help="sample (no --config): solvers: tokens/s and NFE of each solver of masked sequences, what caching saves "
        "and what they take beside the network; diffusers: whole samplers with a tiny network beside that library's "
        "(needs ddjax[parity])",
    )
    bench.add_argument(
        "--device", metavar="NAME",
        help="data: a step is a pause of the time that this device (H100, A100, TPU v5p, ...) needs for its FLOPs",
    )  # fmt: skip
    bench.add_argument(
        "--mfu", type=float, default=0.4, help="data: share of its peak that the device reaches (default: 0.4)"
    )
    bench.add_argument("--out", type=Path, help="also write the result, with versions and device, to this JSON file")

    _add_data(known)

    plan = _command(
        known, "plan", commands.plan, "say what a training would take on devices that are not there", epilog=PLAN
    )  # fmt: skip
    _add_config(plan)
    plan.add_argument("--devices", type=int, required=True, help="how many")
    plan.add_argument("--chip", choices=("h100", "h200", "a100", "v4", "v5e", "v5p", "v6e"), help="to estimate times")
    plan.add_argument(
        "--compile", choices=("auto", "tpu", "cpu", "none"), default="auto",
        help="tpu: by the TPU compiler (needs libtpu; for GPUs too, as a stand-in); cpu: for fake CPU devices; none: "
        "layout and arithmetic alone; auto (default): tpu where it is installed, else cpu",
    )  # fmt: skip
    plan.add_argument("--shape", type=int, nargs="+", help="of one example, in the place of the config's data")
    plan.add_argument("--symbols", type=int, help="of those data, if they are tokens")
    plan.add_argument("--classes", type=int, default=0, help="of those data, if they have labels")

    export = _command(known, "export", commands.export, "write the averaged parameters as safetensors")
    _add_workdir(export, "folder of the run")
    export.set_defaults(joins=True)
    export.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    _add_step(export)

    _add_convert(known)

    launch = _command(
        known, "launch", commands.launch, "run a command as several processes that find each other", epilog=LAUNCH
    )
    launch.add_argument("where", choices=("local",), help="local: on this machine's CPU (clusters: docs/launch.md)")
    launch.add_argument("--processes", type=int, required=True, help="how many")
    launch.add_argument("--devices-per-process", type=int, default=1, help="CPU devices of each (default: 1)")
    return top


def _command(known: Any, name: str, run: Any, words: str, epilog: str | None = None) -> argparse.ArgumentParser:
    command = known.add_parser(
        name,
        help=words,
        description=words[0].upper() + words[1:] + ".",
        epilog=epilog,
        allow_abbrev=False,  # --conf must not swallow an override
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, joins=False)
    return command


def _add_convert(known: Any) -> None:
    convert = _command(
        known, "convert", commands.convert, "turn published PyTorch weights into ours, or back", epilog=CONVERT
    )
    convert.add_argument("input", type=Path, help="their .safetensors file, folder or pipeline, or a file of ours")
    convert.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    convert.add_argument("--family", metavar="NAME", help="whose network it is (default: found by its tensors)")
    convert.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="what the file does not say (may be repeated)"
    )
    convert.add_argument(
        "--partial", action="store_true", help="go on where tensors do not fit; what has none stays as it is drawn"
    )
    convert.add_argument("--names", action="store_true", help="also print which tensor became which parameter")
    convert.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="back: of their tensors (default: float32)"
    )


def _add_data(known: Any) -> None:
    top = known.add_parser("data", help="turn texts or images into shards, or check them")
    known = top.add_subparsers(dest="data_command", required=True, metavar="command")
    prepare = _command(known, "prepare", commands.prepare, "write texts or images as shards", epilog=PREPARE)
    prepare.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files or folders; of images one, or a data set's name"
    )
    prepare.add_argument("--out", type=Path, required=True, help="folder to write, with a manifest of its shards")
    prepare.add_argument(
        "--storage", choices=("bin", "array_record", "parquet"),
        help="bin: memory-mapped (default for text); array_record: compressed, with checksums (default for images); "
        "parquet: the same, and may be read from remote file systems",
    )  # fmt: skip
    prepare.add_argument(
        "--shard-size", type=float, default=64, metavar="MB", help="of the numbers in a shard, in 2**20 bytes (64)"
    )
    text = prepare.add_argument_group("texts")
    text.add_argument(
        "--vocabulary", default="bytes",
        help="bytes (default), characters, text8, a tokenizer's .json, or a prepared folder, for its vocabulary",
    )  # fmt: skip
    text.add_argument(
        "--document", choices=("file", "line", "paragraph"), default="file",
        help="what a document is in plain text (default: a file); in .jsonl it is a line",
    )  # fmt: skip
    text.add_argument("--field", default="text", help="entry of a line of .jsonl that is its text (default: text)")
    text.add_argument("--end", metavar="TOKEN", help="put this token, given by its text, behind every document")
    images = prepare.add_argument_group("images")
    images.add_argument("--size", type=int, help="resize the shorter side to this and crop the centre square")
    images.add_argument("--grey", action="store_true", help="one channel rather than three")
    images.add_argument(
        "--split", choices=("train", "valid", "test"), help="of input that has its own splits: this one"
    )
    verify = _command(known, "verify", commands.verify, "compare shards with their manifest, sizes and sha256")
    verify.add_argument("folder", help="folder, or fsspec URL")


def _add_config(command: argparse.ArgumentParser, required: bool = True) -> None:
    command.add_argument("--config", type=Path, required=required, help="config file, e.g. configs/digits_masked.py")
    command.set_defaults(overrides=("",))


def _add_workdir(command: argparse.ArgumentParser, words: str) -> None:
    command.add_argument("--workdir", type=Path, required=True, help=words)


def _add_step(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--step", type=_step, metavar="N|best",
        help="checkpoint to use: a step, or best, that with the lowest evaluated bound (default: the newest good one)",
    )  # fmt: skip


def _step(text: str) -> int | str:
    return text if text == "best" else int(text)


def _prepare_jax() -> None:
    """Settings of every command: quiet logs and a compilation cache that outlives the process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ddjax" / "jax"
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
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


if __name__ == "__main__":
    sys.exit(main())
