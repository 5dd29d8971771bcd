"""The training loop, read from top to bottom.

Everything that decides the parameters is in the checkpoint: state, key, the data iterator's place. A run
that is killed and started again by the same command ends where the uninterrupted one would have, bit for bit on a CPU.
"""

from __future__ import annotations

import collections
import errno
import json
import math
import warnings
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddjax import cluster, companions
from ddjax import data as datasets
from ddjax.chips import peak_flop_per_s
from ddjax.config import Config, ConfigError, differences, to_dict, typed
from ddjax.data.dataset import Dataset
from ddjax.data.describe import describe, differing
from ddjax.evaluation import label_accuracy
from ddjax.experiment import Experiment, build
from ddjax.loading import load_data
from ddjax.run import CHECKPOINTS, DESCRIPTION, Run
from ddjax.training.backend import disk_full
from ddjax.training.checkpoint import Checkpoints, stored_steps
from ddjax.training.heartbeat import Heartbeat
from ddjax.training.lock import locked
from ddjax.training.manifest import CheckpointError, write_atomically
from ddjax.training.mesh import BATCH_AXES, abstract_state, on_devices, shard_batch
from ddjax.training.preemption import notices, stop_signals
from ddjax.training.profile import Profile
from ddjax.training.report import Report, Work, require_writers
from ddjax.training.setup import prepare, step_flops
from ddjax.training.spread import Spread
from ddjax.training.state import TrainState
from ddjax.training.teacher import Teacher
from ddjax.types import batch_size, per_example

BAD_STEP_POLICIES = ("stop", "skip", "roll_back")
IN_FLIGHT = 2  # steps dispatched ahead of the device: enough to keep it busy, few enough to bound memory


class BadStep(RuntimeError):
    """The loss or the gradient stopped being a number, or the loss is a spike (`config.train.spike`)."""


def train(config: Config, workdir: str | Path, *, show: bool = True) -> Run | None:
    """Train in `workdir`, continuing from its newest good checkpoint if it has one.

    Writes run.json (config and data description), metrics.jsonl, events.jsonl, heartbeat.json, checkpoints/, samples/
    and, of steps that are to be traced, profile/. Stops cleanly, saving, on SIGINT and SIGTERM. With several processes
    (`ddjax.cluster`) all call this; evaluations and samples are shared out over all devices, and process 0 alone
    writes and prints.
    Returns the trained `Run`, over the mesh it was trained on, or None where it was asked to stop before the end.

    show: draw a progress bar (on a terminal) or print lines (elsewhere).
    Raises ConfigError where the workdir belongs to another config, `BadStep` where `config.train.on_bad_step` says so,
    `CheckpointError`, and what the data or the network find wrong.
    """
    workdir = Path(workdir)
    check_sizes(config)
    require_writers(config)
    policy = config.train.on_bad_step
    train_data = load_data(config, "train")
    held_out = load_data(config, config.data.eval_split) if config.train.eval_every else None
    experiment = build(config, train_data)

    fresh = not cluster.agreed(bool(stored_steps(workdir / CHECKPOINTS)))
    mesh, state, shardings, step_fn, teacher = prepare(experiment, fresh=fresh)
    check_batch_size(config, mesh)
    batches = experiment.batches(train_data, process_index=jax.process_index(), process_count=jax.process_count())
    batches = datasets.Ahead(batches, lambda batch: shard_batch(batch, mesh), config.train.device_prefetch)
    # Nothing is written before all of the config has been understood.
    cluster.on_first(lambda: claim(workdir, config, experiment.data))

    with (
        locked(workdir),
        stop_signals() as stop,
        notices(config.train.notices),
        closing(batches),
        Checkpoints(
            workdir / CHECKPOINTS, keep=config.train.keep, best="min" if config.train.keep_best else None
        ) as checkpoints,
        Report(workdir, config, parameters=_count(state.params), show=show and jax.process_index() == 0) as report,
        Heartbeat(workdir, config.train.steps, config.train.heartbeat_every * cluster.first()) as heartbeat,
        Profile(workdir, config.train.profile if cluster.first() else ()) as profile,
    ):
        shape = abstract_state(state, shardings)
        place: dict[str, Any] = {"window": [], "passed_over": 0}  # where the data and the report stand
        if (restored := checkpoints.restore(shape)) is not None:
            state, place = TrainState(*restored[0]), restored[1]["data"]
            batches.set_state(place["iterator"])
        elif not fresh:
            raise CheckpointError(f"there are steps in {workdir / CHECKPOINTS}, and none of them could be read")
        step = first = saved = int(state.step)
        passed_over, returns = place["passed_over"], collections.Counter()
        report.start(step, place["window"])

        def save() -> None:
            nonlocal saved
            settle()  # never keep a state that is not a number
            if saved < step or (policy == "roll_back" and checkpoints.latest_step() is None):
                place = {"iterator": batches.get_state(), "window": report.window(), "passed_over": passed_over}
                checkpoints.save(step, state, data=place, config=to_dict(config))
                saved = step

        def last_good() -> str:
            checkpoints.wait()
            good = checkpoints.latest_step()
            return f"the last good checkpoint is step {good}" if good is not None else "there is no checkpoint yet"

        pending: collections.deque[tuple[int, dict]] = collections.deque()

        def settle(keep: int = 0) -> None:
            """Fetch all but the newest `keep` steps' metrics. Raises BadStep at a bad one that is not skipped."""
            while len(pending) > keep:
                number, metrics = pending.popleft()
                values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
                finite, bad = values.pop("finite"), values.pop("bad")
                if not bad:
                    report.step(number, values)
                else:
                    what = (
                        f"the loss {'is a spike' if finite else 'or its gradient is not finite'} at step {number} "
                        f"(batch {number - 1 + passed_over} of the data order of seed {config.train.seed}; "
                        f"loss {values['loss']:.6g}, gradient norm {values['grad_norm']:.6g})"
                    )
                    if policy != "skip":
                        raise BadStep(what)
                    if bad >= config.train.bad_steps:
                        raise BadStep(f"{what}, {bad} such steps in a row")
                    report.skipped(number, what)
                heartbeat.beat(number)

        def roll_back(error: BadStep) -> None:
            """Go to the newest checkpoint, but not to its place in the data."""
            nonlocal state, step, saved, passed_over
            checkpoints.wait()
            pending.clear()
            heartbeat.beat(step, "restoring")
            state = None  # room for the other
            if (restored := checkpoints.restore(shape)) is None:
                raise BadStep(f"{error}, and there is no checkpoint in {workdir / CHECKPOINTS} to return to")
            state, place = TrainState(*restored[0]), restored[1]["data"]
            good = int(state.step)
            returns[good] += 1
            if returns[good] > config.train.bad_steps:
                raise BadStep(f"{error}, after {config.train.bad_steps} returns to step {good}")
            passed_over += step - good
            step = saved = good
            report.event(step, f"{error}: back to step {good}, and on with the batches after it")
            report.start(step, place["window"])

        def look(again: bool = False) -> None:
            """Evaluate and draw samples where they are due.

            again: at the checkpoint that a run goes on from, make up for what was cut off.
            """
            last, c, name = step == config.train.steps, config.train, f"step_{step:07d}"
            evaluation = (
                c.eval_every > 0 and (last or _due(step, c.eval_every)) and not (again and report.has_bound(step))
            )
            samples = c.sample_every > 0 and (last or _due(step, c.sample_every))
            samples = samples and not (again and any((workdir / "samples").glob(f"{name}.*")))
            if again:  # what is on disk is for process 0 to say: file systems may show it late
                evaluation, samples = cluster.agreed(evaluation), cluster.agreed(samples)
            if stop.is_set() or not (evaluation or samples):
                return
            settle()
            heartbeat.beat(step, "evaluating")
            with report.paused():
                run = _run(experiment, state, mesh)
                if evaluation:
                    values = evaluate(run, config, held_out)
                    if checkpoints.would_be_best(values["bits_per_dim"]):
                        save()
                    if saved == step:
                        checkpoints.score(step, values["bits_per_dim"])
                    report.bound(step, values)
                if samples:
                    draw(run, workdir / "samples", name)

        try:
            if policy == "roll_back":
                save()  # somewhere to go back to
            if step:
                look(again=True)
            while step < config.train.steps and not stop.is_set() and not _preempted(checkpoints, step):
                with report.waiting():
                    batch = next(batches)
                profile.before(step + 1, state)
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                    state, metrics = step_fn(state, batch)
                step += 1
                profile.after(step, metrics)
                pending.append((step, metrics))
                if step == first + 1 and cluster.first():
                    report.work = _work(experiment, batch, teacher)
                try:
                    settle(keep=IN_FLIGHT if step < config.train.steps else 0)
                    if _due(step, config.train.checkpoint_every):
                        save()
                    look()
                except BadStep as error:
                    if policy != "roll_back":
                        raise
                    roll_back(error)
            with suppress(BadStep) if policy == "roll_back" else nullcontext():  # met again by who goes on from here
                save()
            checkpoints.wait()
        except BadStep as error:
            raise BadStep(
                f"{error}; {last_good()}. Lower config.optimizer.learning_rate or config.optimizer.clip, in a new "
                "--workdir; or go on in this one with --config.train.on_bad_step=skip or roll_back"
            ) from None
        except datasets.ShardError as error:
            if jax.process_count() == 1:  # the others may have the batch: saving would wait for them
                save()
            raise datasets.ShardError(f"{error} (at step {step}; {last_good()})") from error
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            lost = str(error).splitlines()[0]
            raise cluster.ClusterError(
                f"what all processes do together failed at step {step} ({lost}): another one may be gone; start the "
                f"same command on all hosts again: it goes on from the newest checkpoint in {workdir}"
            ) from error
        except OSError as error:
            if not disk_full(error):
                raise
            raise OSError(
                errno.ENOSPC, f"no space left on the disk of {workdir}, at step {step}; {last_good()}"
            ) from error
        if step < config.train.steps:
            heartbeat.beat(saved, "stopped")
            report.stopped(saved)
            return None
        heartbeat.beat(step, "finished")
        report.finished(step, already=first == step)
        return _run(experiment, state, mesh)


def check_sizes(config: Config) -> None:
    """Raise ConfigError for a number that cannot be."""
    sizes = {
        "train": ("steps", "batch_size", "accumulate", "keep", "bad_steps"),
        "sample": ("num", "steps"),
        "eval": ("num_times", "steps", "probes", "batch_size"),
    }
    for section, names in sizes.items():
        for name in names:
            if (value := getattr(getattr(config, section), name)) < 1:
                raise ConfigError(f"config.{section}.{name} must be at least 1, got {value}")
    for name in ("log_every", "eval_every", "sample_every", "checkpoint_every", "heartbeat_every", "spike"):
        if (value := getattr(config.train, name)) < 0:
            raise ConfigError(f"config.train.{name} must be positive, or 0 for never; got {value}")
    if config.train.on_bad_step not in BAD_STEP_POLICIES:
        raise ConfigError(
            f"config.train.on_bad_step must be {', '.join(BAD_STEP_POLICIES)}, got {config.train.on_bad_step!r}"
        )
    if bad := [step for step in config.train.profile if not isinstance(step, int) or step < 1]:
        raise ConfigError(f"config.train.profile lists numbers of steps, from 1; got {bad[0]!r}")


def check_batch_size(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise ConfigError for a batch that does not divide over the devices and microbatches."""
    size, parts = config.train.batch_size, config.train.accumulate
    ways = math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)
    if size % (ways * parts):
        raise ConfigError(
            f"config.train.batch_size={size} must be a multiple of {ways * parts}: {ways} devices (config.train.mesh) "
            f"times {parts} microbatches (config.train.accumulate)"
        )


def claim(workdir: Path, config: Config, data: Dataset) -> None:
    """Make `workdir` this config's, or raise ConfigError if it is another's."""
    path = workdir / DESCRIPTION
    description = {"config": to_dict(config), "data": describe(data)}
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            # Keys that an older run does not know were at their defaults.
            changed = differences(to_dict(typed(old["config"])), description["config"])
            differ = differing(old["data"], description["data"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); use another --workdir or repair it") from error
        if changed:
            raise ConfigError(
                f"{workdir} belongs to a run with another config ({'; '.join(changed)}); use another --workdir, "
                "or the same config"
            )
        if differ:
            raise ConfigError(
                f"the data {data.name!r} have changed since the run in {workdir} began ({', '.join(differ)}); "
                "use another --workdir"
            )
    elif workdir.exists() and any(
        not p.match(f"{DESCRIPTION}.*.tmp") for p in workdir.iterdir()
    ):  # a claim that was killed
        raise ConfigError(f"{workdir} is not empty and holds no run; give a new folder as --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(description, indent=1).encode())


def evaluate(run: Run, config: Config, held_out: Dataset | None = None, likelihood: str = "bound") -> dict[str, float]:
    """The likelihood of the held-out split, averaged parameters: bits per dimension and its terms, which add up to it.

    For labelled data, without the label and (`*_labelled`) with it. `stderr` is the standard error over examples; of
    it, `probe_error` is what the estimate of the ODE's divergence adds.

    config: which data and how many times, examples and so on (`data`, `eval`). held_out: the data, if loaded already.
    likelihood: "bound" (`Run.nelbo`) or "ode" (`Run.ode`, continuous states only).
    Raises ValueError where the data are not of the kind that the run was trained on, or the process has no such
    likelihood.
    """
    held_out = load_data(config, config.data.eval_split) if held_out is None else held_out
    if differ := [key for key in differing(describe(run.data), describe(held_out)) if key != "counts"]:
        raise ValueError(f"{held_out.name!r} is not what this run was trained on: they differ in {', '.join(differ)}")
    items = held_out[held_out.first(min(len(held_out), config.eval.max_examples or len(held_out)))]
    count = batch_size(items["x0"])
    key = jax.random.key(config.eval.seed)  # the same noise at every evaluation: curves are smooth
    results = {}
    for suffix, cond in (("", None), ("_labelled", items.get("cond"))):
        if suffix and cond is None:
            continue
        asked = {"cond": cond, "batch_size": config.eval.batch_size}
        sites = np.full(count, float(run.experiment.sites))
        if "segments" in items:  # packed documents, and padding, which costs nothing and is not counted
            sites = items["weights"].sum(axis=1, dtype=np.float64)
            asked |= {"segments": items["segments"], "known": items["weights"] == 0}
        if "size" in items and likelihood == "bound":  # graphs: sites of nodes that there are not
            sites = np.asarray(per_example(items["weights"]), np.float64)
            asked |= {"size": items["size"], "known": jax.tree.map(lambda w: w == 0, items["weights"])}
        if likelihood == "bound":
            found = run.nelbo(key, items["x0"], num_times=config.eval.num_times, **asked)
            terms = {name: getattr(found, name) for name in ("prior", "diffusion", "reconstruction")}
        else:
            found = run.ode(key, items["x0"], num_steps=config.eval.steps, num_probes=config.eval.probes, **asked)
            terms = {name: -getattr(found, name) for name in ("prior", "volume", "data", "drawn")}
        nats = sites.mean() * math.log(2)  # of a bit per dimension
        bits = np.asarray(sum(terms.values())) / nats
        results[f"bits_per_dim{suffix}"] = float(bits.mean())
        bits = bits - results[f"bits_per_dim{suffix}"] * sites / sites.mean()  # the mean is over sites, not windows
        results[f"stderr{suffix}"] = float(bits.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf
        results |= {f"{name}{suffix}": float(np.mean(term)) / nats for name, term in terms.items()}
        if likelihood == "ode":
            results[f"probe_error{suffix}"] = float(np.linalg.norm(found.volume_error)) / (count * nats)
    return results


JUDGED_BY = 10_000  # the classifier's fit is quadratic in them


def judge_labels(run: Run, config: Config, num: int, guidance: float) -> float:
    """The fraction of `num` class-conditional samples that `evaluation.label_accuracy` gives their own label.

    Classes come in turn; with conditions beside labels, these and the labels are those of held-out items. The
    classifier is fitted on the first `JUDGED_BY` training examples.

    Pixels are judged as level numbers (0 to 16 for the digits), which suits tokens and scaled values alike.
    Raises ValueError for data without labels or levels.
    """
    if not run.data.num_classes:
        raise ValueError(f"{run.data.name!r} has no labels to judge samples by")
    real = load_data(config, "train")
    items = real[np.arange(min(len(real), JUDGED_BY))]
    cond = labels = np.arange(num) % run.data.num_classes
    if run.data.conditions:
        cond = companions.held_out_conditions(load_data(config, config.data.eval_split), np.arange(num))
        labels = datasets.conditions.labels(cond)
    x0 = run.sample(jax.random.key(config.sample.seed), num, cond=cond, guidance=guidance)
    own = datasets.conditions.labels(items["cond"])
    return label_accuracy(levels(run.data, items["x0"]), own, levels(run.data, np.asarray(x0)), labels)


def levels(data: Dataset, x0: np.ndarray) -> np.ndarray:
    """Tokens as they are; values as the number of the nearest level."""
    if data.num_symbols is not None:
        return x0
    if data.levels is None:
        raise ValueError(f"{data.name!r} is continuous without levels; its samples cannot be judged by pixel levels")
    middles = (data.levels[1:] + data.levels[:-1]) / 2
    return np.searchsorted(middles, x0)


def draw(run: Run, folder: Path, name: str, *, num: int | None = None, cond: Any = None) -> Path:
    """Draw samples into `folder`: a PNG grid of images, or a text file. Labels go round unless `cond` is given.

    Where sampling starts from data, or goes by conditions beside labels, these are those of the first held-out items,
    and the labels theirs.
    """
    num, key, init = num or run.config.sample.num, jax.random.key(run.config.sample.seed), None
    if companions.starts_from_data(run.experiment):
        held_out = load_data(run.config, run.config.data.eval_split)
        init, labels = companions.held_out_starts(run.experiment, held_out, key, num)
        cond = labels if cond is None else cond
    elif cond is None and run.data.conditions:
        cond = companions.held_out_conditions(load_data(run.config, run.config.data.eval_split), np.arange(num))
    elif cond is None and run.data.num_classes:
        cond = labels_in_turn(run.data, np.arange(num))
    x0 = jax.tree.map(np.asarray, run.sample(key, num, cond=cond, init=init))
    if not cluster.first():
        return samples_path(run.data, folder / name)
    sizes = run.experiment.sizes(key, jnp.arange(num))
    return write_samples(run.data, x0, folder / name, cond=cond, sizes=sizes)


def labels_in_turn(data: Dataset, rows: np.ndarray) -> np.ndarray:
    """Labels of samples by their row numbers: the classes in turn; of a table, as often as they occur in it."""
    return rows % data.num_classes if data.columns is None else data.columns.labels(rows)


def samples_path(data: Dataset, path: Path) -> Path:
    """The path with a suffix that suits the data. Raises ValueError for one that does not."""
    suffix = ".png" if data.is_image else ".txt" if data.vocabulary is not None else ".npz" if data.parts else ".npy"
    suffix, plain = ".csv" if data.columns is not None else suffix, ".npz" if data.parts else ".npy"
    path = path if path.suffix else path.with_suffix(suffix)
    if path.suffix not in (suffix, plain):
        also = "" if suffix == plain else f" or {plain}"
        raise ValueError(f"cannot write samples of {data.name!r} to {path}: use a name ending in {suffix}{also}")
    return path


def write_samples(
    data: Dataset, x0: Any, path: Path, stop: str | None = None, cond: Any = None, sizes: np.ndarray | None = None
) -> Path:
    """Write states as a PNG grid (images), a text file (text), a CSV file (tables) or an .npy array, as the data are.

    States of several parts that are no table are an .npz. A path without a suffix gets the right one. stop: where texts
    end (`Dataset.to_text`). cond: labels, which are a column of a table. sizes: of graphs, their numbers of nodes,
    written as "size". Returns the path written.
    """
    path = samples_path(data, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        images = data.to_images(x0)
        # Labels go round, so with a column for each class a class stands in one column.
        columns = data.num_classes if 2 <= data.num_classes <= 16 else None
        datasets.write_png(path, datasets.grid(images, columns, scale=max(1, 64 // max(images.shape[1:3]))))
    elif path.suffix == ".txt":
        bar = "\n" + "-" * 80 + "\n"
        write_atomically(path, bar.join(data.to_text(x0, stop)).encode())
    elif path.suffix == ".csv":
        datasets.write_csv(path, data.columns.decode(x0, cond))
    else:
        x0 = x0 if sizes is None else {**x0, "size": np.asarray(sizes)}
        with open(path, "wb") as file:
            np.savez(file, **x0) if data.parts else np.save(file, x0, allow_pickle=False)
    return path


def _run(experiment: Experiment, state: TrainState, mesh: jax.sharding.Mesh) -> Run:
    """The averaged parameters, as they lie on the mesh."""
    params = on_devices(jax.tree.map(jnp.copy, state.ema))  # the next step donates the state
    if experiment.learns_process:
        params = {**params, "process": Spread(mesh).whole(params["process"])}
    return Run(*experiment.trained(params), int(state.step), mesh)


def _work(experiment: Experiment, batch: dict[str, Any], teacher: Teacher | None) -> Work:
    """What a step on such batches does."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            operations = step_flops(experiment, batch, teacher)
        except (
            RuntimeWarning
        ):  # loops of unknown length, kernels without a program: no number is better than a wrong one
            operations = None
    devices = jax.devices()
    peak = peak_flop_per_s(devices[0].device_kind)
    tokens = experiment.config.train.batch_size * experiment.sites if experiment.data.num_symbols is not None else None
    return Work(tokens, operations, peak and peak * len(devices))


def _preempted(checkpoints: Checkpoints, step: int) -> bool:
    """Whether all processes have agreed to stop here; with one process, `stop_signals` sees to it."""
    return jax.process_count() > 1 and checkpoints.reached_preemption(step)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
