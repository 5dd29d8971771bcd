"""A finished (or running) training, ready to sample and score."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from ddjax import companions, compensation, editing, policies, prompts, scoring
from ddjax.batching import chunks, seeds
from ddjax.config import Config, ConfigError, typed
from ddjax.data import conditions
from ddjax.data.dataset import Dataset
from ddjax.data.describe import from_description
from ddjax.experiment import Experiment, build
from ddjax.long import extended, sample_long
from ddjax.parallel import sample_parallel
from ddjax.policies import Policy
from ddjax.predictions import BoundDenoiser, bind
from ddjax.sampling import Observed, Partial, padded, sample, stream
from ddjax.shaping import shaped
from ddjax.solvers import Stopping, learned
from ddjax.training.mesh import state_shardings
from ddjax.training.spread import Spread
from ddjax.types import Params, Sample, State

DESCRIPTION = "run.json"  # config and data description, written once at the start of a training
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """A network with its parameters, and everything needed to use it."""

    experiment: Experiment  # as it samples: `Experiment.trained`
    params: Params  # the network's, the moving average
    step: int  # of training
    mesh: jax.sharding.Mesh | None = None  # over which `sample`, `nelbo` and `ode` lay their batches

    @property
    def config(self) -> Config:
        """The experiment's config."""
        return self.experiment.config

    @property
    def data(self) -> Dataset:
        """Shapes, symbols, and `to_images` / `to_text`. Holds no items: see `ddjax.data.load`."""
        return self.experiment.data

    @property
    def process(self) -> Any:
        """The forward process."""
        return self.experiment.process

    @functools.cached_property
    def denoise(self) -> BoundDenoiser:
        """The network closed over its averaged parameters."""
        return bind(self.experiment.apply, self.params, self.process, self.experiment.kind)

    def sample(
        self,
        key: Key[Array, ""],
        n: int,
        *,
        cond: Int[Array, " n"] | int | Mapping[str, Any] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | Path | Any | None = None,
        solver_options: Mapping[str, Any] | None = None,
        observed: Observed | None = None,
        init: State | None = None,
        prompt: str | None = None,
        infill: str | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition: float = 1.0,
        no_repeats: bool = False,
        rows: Sequence[int] | None = None,
        trajectory: bool = False,
        stop: int | str | None = None,
        lengths: Int[Array, " n"] | int | None = None,
        length: int | None = None,
        stride: int | None = None,
        callback: Callable[[Partial], None] | None = None,
        every: int = 1,
        batch_size: int = 256,
        policy: str | Path | Policy | None = None,
        parallel: int | None = None,
        tolerance: float = 0.1,
    ) -> State | Sample:
        """Draw n samples, `(n, *shape)`; in the config's way where nothing else is said.

        cond: labels `(n,)`, or one label for all; of data with conditions also a dict of these, each of n examples or
            one for all, with the labels as "cond". None for unconditional samples.
        steps: number of solver steps. guidance: classifier-free scale, 1 is off. solver: a name or an object of
            `ddjax.solvers`, or a file that `ddjax search` wrote, which says the number of steps. solver_options: of a
            solver by name, over the config's where it is the config's.
        observed: known sites, `(n, *shape)` each (in-painting). For texts, in its place: prompt, how they begin;
            infill, a text with gaps, "To be ___ the question" (`ddjax.prompts`).
        init: `(n, *shape)`, the ends x_1 to start from where they come with the data (`starts`); for other processes
            states at the grid's first time.
        temperature, top_k, top_p, repetition, no_repeats: of the law of each symbol (`ddjax.shaping`); all are off.
        rows: n numbers that seed the samples one by one, default 0 ... n - 1: the same key and number give the same
            sample, whatever else is drawn.
        trajectory: give a `Sample` back, with every state `(steps + 1, n, *shape)` (`ddjax.animation.animate`) and the
            network evaluations spent on each sample.
        stop: a token (or the text of one) behind the first of which a sequence is the same token again and costs
            nothing (`solvers.Stopping`); cut there with `data.to_text(x, stop=...)`. lengths: stop token at this site,
            `(n,)` or one for all; needs `stop`.
        length: of sequences longer than the window that the network was trained on, drawn window by window, each
            `stride` tokens after the last (default: half a window; `ddjax.sample_long`). A prompt begins them.
        callback: shown the samples while they are drawn, after every `every` steps and at the end
            (`sampling.Partial`), one `batch_size` of them after the other.
        batch_size: drawn at a time; it does not change the samples.
        policy: chooses solver and steps by label (`ddjax.policies`), or the file of one that `ddjax search --family
            policy` wrote: each sample is the one that these give.
        parallel: so many steps at once, made and corrected until they are right to `tolerance` (`sample_parallel`):
            fewer calls of the network one after the other, of `parallel` times as many states.
        """
        if self.mesh is not None and length is not None:
            self = self.alone  # window by window: every process by itself
        experiment = self.experiment
        if n < 1:
            raise ValueError(f"at least one sample is needed, got {n}")
        cond = self.labels(cond, n)
        denoise = shaped(
            self.guided(guidance, cond),
            experiment.sampling_process,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition=repetition,
            no_repeats=no_repeats,
        )
        stop = None if stop is None else self.data.token(stop)
        observed = self._known(n, lengths, stop, self._shown(n, observed, prompt, infill))
        if length is None and stride is not None:
            raise ValueError(f"stride={stride} is that of windows: give the length that they are to reach")
        if length is not None:
            unfit = {"init": init, "infill": infill, "lengths": lengths, "callback": callback, "trajectory": trajectory}
            unfit = [name for name, value in unfit.items() if value is not None and value is not False]
            observed = self._beyond(n, length, observed, unfit)
        for name, given in (("observed", observed), ("init", init)):
            if any(len(leaf) != n for leaf in jax.tree.leaves(given)):
                shapes = ", ".join(str(np.shape(leaf)) for leaf in jax.tree.leaves(given))
                raise ValueError(f"{name} must be of {n} examples, as many as are drawn, got shape {shapes}")
        if trajectory and callback is not None:
            raise ValueError("a callback is shown the states while they are drawn: leave out trajectory")
        if parallel is not None and (callback is not None or length is not None):
            raise ValueError("steps made at once are of one window, and not shown: leave out parallel, or the others")
        if policy is None:
            groups = [(self.sampler(solver, steps, solver_options, guidance), np.arange(n))]
        elif trajectory or callback is not None or any(v is not None for v in (solver, steps, solver_options)):
            raise ValueError("a policy chooses solver and steps for each sample: leave out these, trajectory, callback")
        else:
            groups = self._chosen(policy, cond, guidance)
        own_rows, parts, order = seeds(rows, n), [], np.concatenate([own for _, own in groups])
        spread = Spread(self.mesh)
        for (step, times), own, chunk in (
            (s, g, c) for s, g in groups for c in chunks(len(g), batch_size, spread.ways)
        ):
            which, new = own[chunk], min(len(chunk), len(own) - chunk[0])
            if stop is not None and length is None:
                step = Stopping(step, stop)
            labels, known, x1 = jax.tree.map(lambda a, which=which: jnp.asarray(a[which]), (cond, observed, init))
            rows = jnp.asarray(own_rows[which])
            if (size := experiment.sizes(key, rows)) is not None:  # what a smaller graph does not have is known
                known = _beside(experiment.absent(size), known)
            settings = {
                "shape": experiment.batch_shape(len(which)),
                "solver": step,
                "times": times,
                "cond": experiment.to_sample(key, rows, labels, x1),
                "init": None if x1 is None else companions.depart(experiment, key, x1, rows),
                "observed": known,
                "rows": rows,
            }
            settings |= spread.rows({name: settings[name] for name in ("cond", "init", "observed", "rows")})
            arguments = key, denoise, experiment.sampling_process
            if length is not None:
                (window,) = self.data.shape
                settings |= {"shape": (len(chunk), length), "window": window, "stop": stop}
                settings |= {"stride": max(window // 2, 1) if stride is None else stride}
                drawn = sample_long(*arguments, **{k: v for k, v in settings.items() if k != "init"})
            elif parallel is not None:
                settings |= {"window": parallel, "tolerance": tolerance}
                drawn = spread.whole(sample_parallel(*arguments, **settings, trajectory=trajectory))
            elif callback is None:
                drawn = spread.whole(sample(*arguments, **settings, trajectory=trajectory))
            else:
                for part in stream(*arguments, **settings, every=every):
                    part = part._replace(**spread.whole({"x": part.x, "nfe": part.nfe, "x0": part.x0}))
                    drawn = Sample(part.x, part.nfe)
                    x0 = None if part.x0 is None else part.x0[:new]
                    shown = jax.tree.map(lambda v, new=new: v[:new], experiment.clean(part.x))
                    callback(Partial(part.step, shown, part.nfe[:new], x0))
            path = jax.vmap(experiment.clean)(drawn.trajectory) if trajectory else None
            # The last chunk repeats its last row to keep one compiled shape.
            x0, path = jax.tree.map(lambda v, new=new: v[:new], (experiment.clean(drawn.x0), _swapped(path)))
            parts.append(Sample(x0, drawn.nfe[:new], path))
        joined = jax.tree.map(lambda *v: jnp.concatenate(v), *parts)
        if not trajectory:
            return joined.x0 if policy is None else jax.tree.map(lambda v: v[np.argsort(order)], joined.x0)
        return joined._replace(trajectory=_swapped(joined.trajectory))

    def _chosen(
        self, policy: str | Path | Policy, cond: Any, guidance: float | None
    ) -> list[tuple[tuple[Any, Array], np.ndarray]]:
        """Solver and grid of each arm that a policy chooses, and for which of the samples."""
        if cond is None:
            raise ValueError("a policy chooses by label: give cond")
        if not isinstance(policy, Policy):
            policy = policies.load(policy, self.experiment.sampling_process)
        choice = policy.choose(conditions.labels(cond))
        arms = [self.sampler(**arm, guidance=guidance) if isinstance(arm, Mapping) else arm for arm in policy.arms]
        return [(arms[arm], np.flatnonzero(choice == arm)) for arm in np.unique(choice)]

    def labels(self, cond: Any, n: int) -> Any:
        """Labels, or the condition, of n examples (`data.conditions.of`, which raises ValueError)."""
        return conditions.of(self.data, cond, n)

    def guided(self, guidance: float | None, cond: Any) -> Any:
        """The denoiser at a guidance scale, the config's where none is given."""
        if cond is None and guidance not in (None, 1.0):
            raise ValueError(f"guidance={guidance} leads towards labels, and there are none: give cond, or no guidance")
        scale = self.config.sample.guidance if guidance is None else guidance
        return self.experiment.denoiser(self.params, float(scale), cond)

    record, edit = editing.record, editing.edit

    def sampler(
        self,
        solver: str | Path | Any | None = None,
        steps: int | None = None,
        options: Mapping[str, Any] | None = None,
        guidance: float | None = None,
    ) -> tuple[Any, Array]:
        """The solver and the grid that `sample` uses; those of a file of ratios go by steps and guidance.

        Raises ValueError for files that do not fit the process, and for settings that a file's ratios do not reach.
        """
        if isinstance(solver, str | Path) and str(solver).endswith(".json"):
            solver = self._read(Path(solver), steps, guidance)
        elif solver is None or isinstance(solver, str):
            solver, options = self.experiment.solver(solver, **options or {}), None
        if options:
            raise ValueError("solver_options are for a solver by name; this one is made already")
        if isinstance(solver, Path):
            raise ValueError(f"{solver}: the file of a sampler, as `ddjax search` writes it, ends in .json")
        own = getattr(solver, "times", None)
        if own is None:
            return solver, self.experiment.times(steps)
        if steps not in (None, len(own) - 1):
            raise ValueError(f"the solver is made for {len(own) - 1} steps, not for {steps}: search one for those")
        return solver, jnp.asarray(own, float)

    def _read(self, path: Path, steps: int | None, guidance: float | None) -> Any:
        """The solver in a file of `ddjax search`."""
        process, sample = self.experiment.sampling_process, self.config.sample
        found = compensation.load(path, process)
        if found is None:
            return learned.load(path, process)
        ratios = found[0].ratios(
            sample.steps if steps is None else steps, sample.guidance if guidance is None else guidance
        )
        return dataclasses.replace(self.experiment.solver(found[1]), compensation=ratios)

    def starts(self, key: Key[Array, ""], items: Mapping[str, Any]) -> State:
        """The ends x_1 of items of a data set, for `sample(init=...)` (`companions.starts`)."""
        return companions.starts(self.experiment, key, items)

    def _shown(self, n: int, observed: Observed | None, prompt: str | None, infill: str | None) -> Observed | None:
        """What is known of n samples."""
        if sum(known is not None for known in (observed, prompt, infill)) > 1:
            raise ValueError("observed, prompt and infill all say what is known: give one of them")
        if prompt is not None:
            return prompts.prompt(self.data, prompt, n)
        return observed if infill is None else prompts.infill(self.data, infill, n)

    def _known(self, n: int, lengths: Any, stop: int | None, observed: Observed | None) -> Observed | None:
        """What is observed, with the ends of sequences of known lengths."""
        if lengths is None:
            return observed
        if stop is None:
            raise ValueError("lengths are ends of sequences: give their stop token too")
        if len(self.data.shape) != 1:
            raise ValueError(f"lengths are those of sequences, and {self.data.name!r} has shape {self.data.shape}")
        lengths, (longest,) = np.broadcast_to(np.asarray(lengths), (n,)), self.data.shape
        if ((lengths < 0) | (lengths > longest)).any():
            raise ValueError(f"lengths run from 0 to {longest}, got {lengths}")
        ends = padded(lengths, longest, stop)
        if observed is None:
            return ends
        return Observed(ends.mask | observed.mask, jnp.where(ends.mask, ends.value, observed.value))

    def _beyond(self, n: int, length: int, observed: Observed | None, unfit: list[str]) -> Observed | None:
        """What is known of sequences of this length, of which the first tokens may be."""
        if len(self.data.shape) != 1 or self.process.state != "categorical":
            raise ValueError(
                f"length is that of sequences of tokens, and {self.data.name!r} has shape {self.data.shape}"
            )
        if unfit:
            raise ValueError(f"{unfit[0]} is for one window: leave it out, or the length")
        return extended(observed, length)

    nelbo, ode, marginals = scoring.nelbo, scoring.ode, scoring.marginals

    @property
    def alone(self) -> Run:
        """The same without a mesh, its parameters whole on one device of each process. All processes must ask."""
        return dataclasses.replace(self, params=Spread(self.mesh).whole(self.params), mesh=None)

    def over(self, mesh: jax.sharding.Mesh) -> Run:
        """The same over a mesh of any devices: `sample`, `nelbo` and `ode` share their batches out.

        Large parameters are cut along the mesh's axis `fsdp`, if it has one. With several processes, every one of them
        calls the same with the same arguments and gets the whole result; it is what one device gives, to rounding.
        """
        shardings = state_shardings(self.params, mesh)

        def place(array, sharding):
            array = np.asarray(array)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return dataclasses.replace(self, params=jax.tree.map(place, self.params, shardings), mesh=mesh)

    def checked(self, x0: State) -> np.ndarray:
        """States of the data's shape, any number of them. Raises ValueError for others."""
        x0 = jax.tree.map(np.asarray, x0)
        shapes = jax.tree.map(np.shape, x0)
        if self.data.parts:
            if jax.tree.map(lambda part: part.shape[1:], x0) != self.data.shape:
                raise ValueError(f"expected states of parts (n, ...) of shapes {self.data.shape}, got {shapes}")
        elif shapes[1:] != self.data.shape:
            raise ValueError(f"expected states of shape (n, {', '.join(map(str, self.data.shape))}), got {shapes}")
        return x0


def _beside(one: Observed, other: Observed | None) -> Observed:
    """What either knows; where both do, the first."""
    if other is None:
        return one
    mask = jax.tree.map(jnp.logical_or, one.mask, other.mask)
    return Observed(mask, jax.tree.map(jnp.where, one.mask, one.value, other.value))


def _swapped(path: Any) -> Any:
    """The first two axes of a trajectory exchanged, examples first; None stays."""
    return jax.tree.map(lambda v: v.swapaxes(0, 1), path)


def load(workdir: str | Path, *, step: int | Literal["best"] | None = None) -> Run:
    """Load the run in `workdir`: its config, and the averaged parameters of its newest good checkpoint (or of `step`).

    step: "best" is the one with the lowest evaluated bound, where `train.keep_best` kept it.

    Raises FileNotFoundError where there is no run, `training.CheckpointError` where no checkpoint can be read.
    """
    run = load_on_host(workdir, step=step)
    return dataclasses.replace(run, params=jax.tree.map(jnp.asarray, run.params))


def load_on_host(workdir: str | Path, *, step: int | Literal["best"] | None = None) -> Run:
    """As `load`, but parameters are NumPy's arrays, on no device."""
    from ddjax.training import load_ema

    workdir = Path(workdir)
    config, data = read_description(workdir)
    params, extras = load_ema(workdir / CHECKPOINTS, step)
    return Run(*build(config, data).trained(params), int(extras["step"]))


def read_description(workdir: str | Path) -> tuple[Config, Dataset]:
    """The config and the data description of the run in `workdir`. Raises FileNotFoundError, ConfigError."""
    path = Path(workdir) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f"no run in {Path(workdir)} (there is no {DESCRIPTION}); train one with `ddjax train --workdir {workdir}`"
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return typed(stored["config"]), from_description(stored["data"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error})") from error
