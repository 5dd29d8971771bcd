"""Recording and editing with a trained model: `run.record`, `run.edit` and `ddjax edit`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from ddjax import data as datasets
from ddjax import inversion, prompts
from ddjax.batching import chunks, seeds
from ddjax.data.dataset import Dataset
from ddjax.inversion import Recording
from ddjax.solvers import Cached, KeyValues
from ddjax.types import State

if TYPE_CHECKING:
    from ddjax.run import Run


def record(
    run: Run,
    key: Key[Array, ""],
    x0: State,
    *,
    cond: Int[Array, " n"] | int | None = None,
    steps: int | None = None,
    start: float = 1.0,
    guidance: float = 1.0,
    solver: str | Any = "ancestral",
    solver_options: Mapping[str, Any] | None = None,
    independent: bool = False,
    iterations: int = 8,
    residual: str = "gumbel",
    rows: Sequence[int] | None = None,
    batch_size: int = 256,
) -> Recording:
    """Invert examples, `(n, *shape)`: the noise with which this model draws them (`inversion.record`), for `edit`.

    cond: their labels `(n,)`, or one for all; None to record without. steps: of the whole grid; start: the fraction
        of them to go up, from the data on: the less, the less can change.
    guidance: while recording; 1 is off. solver: "ancestral" or "ddim" with `solver_options={"eta": ...}` for the
        noise of each step; one without noise ("ddim", "heun") for the ODE, with so many fixed-point iterations.
    independent, iterations, residual: see `inversion.record`. rows, batch_size: as in `sample`.
    Raises ValueError for a process that has no inversion.
    """
    x0 = run.checked(x0)
    n, experiment = len(x0), run.experiment
    if getattr(experiment.coupling, "show", False):
        raise ValueError("this network is shown the end that sampling starts from, which an inversion looks for")
    if hasattr(run.process, "latents"):
        raise ValueError(
            "this model draws a latent for each sample, and what that of an item is, an inversion cannot say"
        )
    if not 0 < start <= 1:
        raise ValueError(f"start is the fraction of the steps to go up, in (0, 1], got {start}")
    cond, numbers = run.labels(cond, n), seeds(rows, n)
    denoise = run.guided(guidance, cond)
    step, times = run.sampler(solver, steps, solver_options)
    while isinstance(step, Cached | KeyValues):
        step = step.solver
    times = times[len(times) - 1 - max(1, round(start * (len(times) - 1))) :]
    parts = []
    for chunk in chunks(n, batch_size):
        labels = jax.tree.map(lambda v, chunk=chunk: jnp.asarray(v[chunk]), cond)
        own = jnp.asarray(numbers[chunk])
        parts.append(
            inversion.record(
                key,
                denoise,
                experiment.sampling_process,
                jnp.asarray(x0[chunk]),
                experiment.to_sample(key, own, labels),
                times=times,
                solver=step,
                independent=independent,
                iterations=iterations if getattr(step, "deterministic", False) else 0,
                residual=residual,
                rows=own,
            )
        )
    states, noise = ([getattr(part, name) for part in parts] for name in ("states", "noise"))
    noise = None if noise[0] is None else jnp.concatenate(noise)[:n]
    return dataclasses.replace(parts[0], states=jnp.concatenate(states)[:n], noise=noise)


def edit(
    run: Run,
    key: Key[Array, ""],
    recording: Recording,
    *,
    cond: Int[Array, " n"] | int | None = None,
    guidance: float | None = None,
    lambda_1: float | Array = 1.0,
    lambda_2: float | Array = 0.0,
    injection: str = "linear",
    skip: int = 0,
    rows: Sequence[int] | None = None,
    batch_size: int = 256,
) -> State:
    """Draw recorded examples again, `(n, *shape)`, under other labels (`inversion.edit`).

    recording: of `record`. cond, guidance: as in `sample`; those of the recording (there guidance is off unless
        given) give the examples back, see `inversion.round_trip_error`. The others: see `inversion.edit`.
    """
    n, experiment = len(recording.states), run.experiment
    cond, numbers = run.labels(cond, n), seeds(rows, n)
    denoise, parts = run.guided(guidance, cond), []
    for chunk in chunks(n, batch_size):
        labels = jax.tree.map(lambda v, chunk=chunk: jnp.asarray(v[chunk]), cond)
        own = jnp.asarray(numbers[chunk])
        noise = None if recording.noise is None else recording.noise[chunk]
        drawn = inversion.edit(
            key,
            denoise,
            experiment.sampling_process,
            dataclasses.replace(recording, states=recording.states[chunk], noise=noise),
            experiment.to_sample(key, own, labels),
            lambda_1=lambda_1,
            lambda_2=lambda_2,
            injection=injection,
            skip=skip,
            rows=own,
        )
        parts.append(experiment.clean(drawn.x0))
    return jnp.concatenate(parts)[:n]


def command(arguments: argparse.Namespace) -> int:
    """`ddjax edit`: record items, draw them again, and draw them edited; write all three, print how far they are."""
    from ddjax.run import load
    from ddjax.training.loop import samples_path
    from ddjax.training.manifest import write_atomically

    run = load(arguments.workdir, step=arguments.step)
    x0, own = _items(run, arguments)
    label = own if arguments.label is None else np.asarray(arguments.label)
    if arguments.label is not None and own is None:
        raise ValueError(f"{run.data.name!r} has no labels to edit towards: leave out --label (--lambda-2 draws anew)")
    if arguments.label is not None:
        if len(label) not in (1, len(x0)):
            raise ValueError(f"--label takes one label, or one for each of {len(x0)} items, got {len(label)}")
        label = label if len(label) == len(x0) else label[0]
        label = {**own, "cond": label} if isinstance(own, Mapping) else label
    label = run.labels(label, len(x0))
    out = arguments.out or arguments.workdir / "samples" / "edited"
    path = samples_path(run.data, out)
    weights = {"lambda_1": arguments.lambda_1, "lambda_2": arguments.lambda_2}
    weights = {name: value for name, value in weights.items() if value is not None}
    keys = jax.random.split(jax.random.key(arguments.seed), 3)
    made = run.record(
        keys[0],
        x0,
        cond=own,
        steps=arguments.steps,
        start=arguments.start,
        solver=_solver(run, arguments),
        solver_options=arguments.options,
        independent=arguments.independent,
        iterations=arguments.iterations,
        residual=arguments.residual,
    )
    again = run.edit(keys[1], made, cond=own, guidance=1.0)
    edited = run.edit(keys[2], made, cond=label, guidance=arguments.guidance, **weights)
    error = np.asarray(inversion.round_trip_error(x0, again))
    shown = {"original": x0, "reconstruction": np.asarray(again), "edit": np.asarray(edited)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        write_images(run.data, shown, path)
    elif path.suffix == ".txt":
        texts = zip(*(run.data.to_text(x) for x in shown.values()), strict=True)
        blocks = [
            f"{name} {i}\n{text}" for i, three in enumerate(texts) for name, text in zip(shown, three, strict=True)
        ]
        write_atomically(path, ("\n" + "-" * 80 + "\n").join(blocks).encode())
    else:
        with open(path, "wb") as file:
            np.save(file, np.stack(list(shown.values())), allow_pickle=False)
    what = "of a site, root mean square" if x0.dtype.kind == "f" else "of the sites differ"
    changed = float(np.mean(inversion.round_trip_error(x0, edited)))
    print(f"round-trip error: {error.mean():.3g} on average, {error.max():.3g} at most ({what}); edited: {changed:.3g}")
    print(f"{len(x0)} originals, reconstructions and edits -> {path}")
    return 0


def _items(run: Run, arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray | None]:
    """What to edit, and its labels."""
    from ddjax.loading import load_data

    text = arguments.text
    if arguments.text_file is not None:
        if text is not None:
            raise ValueError("--text and --text-file both say what to edit: give one of them")
        text = arguments.text_file.read_text(encoding="utf-8")
    if text is not None:
        if arguments.rows is not None:
            raise ValueError("--rows are items of --data, and --text is none of them: leave one of them out")
        tokens, window = prompts.encode(run.data, text, "--text"), run.data.shape[0]
        if len(tokens) < window:
            raise ValueError(
                f"--text: {len(tokens)} tokens, and an example has {window}: an inversion needs all of them"
            )
        return tokens[None, :window].astype(np.int32), None
    data, rows = load_data(run.config, arguments.data), np.asarray([0] if arguments.rows is None else arguments.rows)
    if len(wrong := rows[(rows < 0) | (rows >= len(data))]):
        raise ValueError(f"--rows: {arguments.data!r} of {data.name!r} has items 0 to {len(data) - 1}, got {wrong[0]}")
    items = data[rows]
    return np.asarray(items["x0"]), items.get("cond")


def _solver(run: Run, arguments: argparse.Namespace) -> Any:
    """Of the noise space, or of the ODE: the run's own where its single steps are deterministic."""
    if arguments.solver is not None:
        return arguments.solver
    if arguments.method == "noise":
        return "ancestral"
    if run.process.state == "categorical":
        raise ValueError(f"tokens ({run.config.process.name!r}) have no ODE to go up: use --method noise")
    own = run.config.sample.solver
    return own if getattr(run.sampler()[0], "deterministic", False) else "heun"


def write_images(data: Dataset, shown: Mapping[str, np.ndarray], path: Path) -> None:
    """Originals above their reconstructions above their edits, as many as there are in blocks of up to 16 columns."""
    images = [data.to_images(x) for x in shown.values()]
    columns = min(len(images[0]), 16)
    blank = np.full((-len(images[0]) % columns, *images[0].shape[1:]), 255, np.uint8)
    images = [np.concatenate([part, blank]) for part in images]
    rows = [part[i : i + columns] for i in range(0, len(images[0]), columns) for part in images]
    scale = max(1, 64 // max(images[0].shape[1:3]))
    datasets.write_png(path, datasets.grid(np.concatenate(rows), columns, scale=scale))
