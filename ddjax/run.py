"""A finished (or running) training, ready to sample and score."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ddjax import companions, likelihood, prompts
from ddjax.config import Config, ConfigError, typed
from ddjax.data.dataset import Dataset
from ddjax.data.describe import from_description
from ddjax.experiment import Experiment, build
from ddjax.likelihood import FlowLikelihood
from ddjax.parallel import sample_parallel
from ddjax.predictions import BoundDenoiser, bind, check_bound
from ddjax.sampling import Observed, Partial, padded, sample, stream
from ddjax.shaping import shaped
from ddjax.solvers import Stopping, learned
from ddjax.types import Bound, Params, Rows, Sample, State

DESCRIPTION = "run.json"  # config and data description, written once at the start of a training
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """A network with its parameters, and everything needed to use it."""

    experiment: Experiment  # as it samples: `Experiment.trained`
    params: Params  # the network's, the moving average
    step: int  # of training

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
        cond: Int[Array, " n"] | int | None = None,
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
        callback: Callable[[Partial], None] | None = None,
        every: int = 1,
        batch_size: int = 256,
        parallel: int | None = None,
        tolerance: float = 0.1,
    ) -> State | Sample:
        """Draw n samples, `(n, *shape)`; in the config's way where nothing else is said.

        cond: labels `(n,)`, or one label for all; None for unconditional samples.
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
        callback: shown the samples while they are drawn, after every `every` steps and at the end
            (`sampling.Partial`), one `batch_size` of them after the other.
        batch_size: drawn at a time; it does not change the samples.
        parallel: so many steps at once, made and corrected until they are right to `tolerance` (`sample_parallel`):
            fewer calls of the network one after the other, of `parallel` times as many states.
        """
        experiment = self.experiment
        if n < 1:
            raise ValueError(f"at least one sample is needed, got {n}")
        if cond is not None:
            if not self.data.num_classes:
                raise ValueError(f"{self.data.name!r} has no labels, so cond must be None")
            cond = np.broadcast_to(np.asarray(cond, np.int32), (n,))
            if len(wrong := cond[(cond < 0) | (cond > self.data.num_classes)]):
                raise ValueError(
                    f"labels run from 0 to {self.data.num_classes - 1} ({self.data.num_classes} means none), "
                    f"got {wrong[0]}"
                )
        if cond is None and guidance not in (None, 1.0):
            raise ValueError(f"guidance={guidance} leads towards labels, and there are none: give cond, or no guidance")
        scale = self.config.sample.guidance if guidance is None else guidance
        denoise = shaped(
            experiment.denoiser(self.params, float(scale), cond),
            experiment.sampling_process,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition=repetition,
            no_repeats=no_repeats,
        )
        step, times = self.sampler(solver, steps, solver_options)
        if stop is not None:
            stop = self.data.token(stop)
            step = Stopping(step, stop)
        observed = self._known(n, lengths, stop, self._shown(n, observed, prompt, infill))
        for name, given in (("observed", observed), ("init", init)):
            if any(len(leaf) != n for leaf in jax.tree.leaves(given)):
                shapes = ", ".join(str(np.shape(leaf)) for leaf in jax.tree.leaves(given))
                raise ValueError(f"{name} must be of {n} examples, as many as are drawn, got shape {shapes}")
        if trajectory and callback is not None:
            raise ValueError("a callback is shown the states while they are drawn: leave out trajectory")
        if parallel is not None and callback is not None:
            raise ValueError("steps made at once cannot be shown one after the other: leave out callback or parallel")
        seeds = np.arange(n) if rows is None else np.asarray(rows)
        if seeds.shape != (n,) or seeds.dtype.kind not in "iu" or (seeds < 0).any():
            raise ValueError(f"rows are {n} whole numbers, 0 or more, one for each sample, got {rows}")
        parts = []
        for chunk in _chunks(n, batch_size):
            labels, known, x1 = jax.tree.map(lambda a, chunk=chunk: jnp.asarray(a[chunk]), (cond, observed, init))
            rows = jnp.asarray(seeds[chunk])
            settings = {
                "shape": (len(chunk), *experiment.state_shape),
                "solver": step,
                "times": times,
                "cond": experiment.to_sample(key, rows, labels, x1),
                "init": None if x1 is None else companions.depart(experiment, key, x1, rows),
                "observed": known,
                "rows": rows,
            }
            arguments = key, denoise, experiment.sampling_process
            if parallel is not None:
                drawn = sample_parallel(
                    *arguments, **settings, trajectory=trajectory, window=parallel, tolerance=tolerance
                )
            elif callback is None:
                drawn = sample(*arguments, **settings, trajectory=trajectory)
            else:
                new = min(len(chunk), n - chunk[0])
                for part in stream(*arguments, **settings, every=every):
                    drawn = Sample(part.x, part.nfe)
                    callback(Partial(part.step, experiment.clean(part.x)[:new], part.nfe[:new]))
            path = jax.vmap(experiment.clean)(drawn.trajectory) if trajectory else None
            parts.append(Sample(experiment.clean(drawn.x0), drawn.nfe, path))
        # The last chunk repeats its last row to keep one compiled shape.
        x0 = jnp.concatenate([part.x0 for part in parts])[:n]
        if not trajectory:
            return x0
        nfe = jnp.concatenate([part.nfe for part in parts])[:n]
        return Sample(x0, nfe, jnp.concatenate([part.trajectory for part in parts], axis=1)[:, :n])

    def sampler(
        self, solver: str | Path | Any | None = None, steps: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, Array]:
        """The solver and the grid that `sample` uses. Raises ValueError for files that do not fit the process."""
        if isinstance(solver, str | Path) and str(solver).endswith(".json"):
            solver = learned.load(solver, self.experiment.sampling_process)
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

    def nelbo(
        self,
        key: Key[Array, ""],
        x0: State,
        *,
        cond: Int[Array, " n"] | None = None,
        num_times: int | None = None,
        batch_size: int | None = None,
    ) -> Bound:
        """The bound on -log p(x0) of each example, nats: prior, diffusion and reconstruction (`likelihood.nelbo`).

        x0: `(n, *shape)`. cond: labels `(n,)`, or None for the unconditional bound.
        `.bits_per_dim` of the result is in bits per site. `batch_size` does not change the result.
        """
        check_bound(self.process)

        def score(x0: State, cond: Any, rows: Rows) -> Bound:
            return likelihood.nelbo(
                key,
                self.denoise,
                self.process,
                x0,
                self.experiment.shown(x0, cond),
                num_times=self.config.eval.num_times if num_times is None else num_times,
                t_range=self.experiment.t_range,
                reconstruction=self.experiment.reconstruction(),
                rows=rows,
            )

        return self._scored(score, x0, cond, batch_size)

    def ode(
        self,
        key: Key[Array, ""],
        x0: State,
        *,
        cond: Int[Array, " n"] | None = None,
        num_steps: int | None = None,
        num_probes: int | None = None,
        batch_size: int | None = None,
    ) -> FlowLikelihood:
        """The log-likelihood of each example under the probability-flow ODE, nats (`likelihood.ode`).

        Data with levels are dequantised by uniform noise of a bin's width, and the result bounds the log-probability of
        the levels; otherwise it is a density, or a bound on one where the process has a latent or auxiliary variables
        (`.bound`). The divergence is estimated with `num_probes` (Hutchinson's).

        x0, cond, batch_size: as in `nelbo`. num_steps: of the integrator.
        Raises ValueError for processes without such an ODE, and for levels that are not evenly spaced.
        """
        if self.process.state != "gaussian":
            raise ValueError(
                f"the process {self.config.process.name!r} corrupts tokens, which have no density and no flow of "
                "densities; use the bound (nelbo, --likelihood bound)"
            )
        noise = None
        if (levels := self.data.levels) is not None:
            widths = np.diff(np.asarray(levels, np.float64))
            if not np.allclose(widths, widths.mean(), rtol=1e-3):
                raise ValueError(f"uniform noise is for evenly spaced levels, got {np.asarray(levels)}; use the bound")
            noise = likelihood.UniformNoise(float(widths.mean()), *getattr(self.process, "support", ()))

        def score(x0: State, cond: Any, rows: Rows) -> FlowLikelihood:
            return likelihood.ode(
                key,
                self.denoise,
                self.process,
                x0,
                cond,
                divergence="hutchinson",
                num_probes=self.config.eval.probes if num_probes is None else num_probes,
                num_steps=self.config.eval.steps if num_steps is None else num_steps,
                dequantise=noise,
                rows=rows,
            )

        return self._scored(score, x0, cond, batch_size)

    def marginals(
        self,
        x0: State,
        shown: Bool[Array, batch * sites],
        *,
        cond: Int[Array, " n"] | None = None,
        batch_size: int | None = None,
    ) -> Float[Array, " n"]:
        """Log p(x_S), nats, S the sites shown of each example, in one pass of the network (`likelihood.marginals`).

        x0, shown: `(n, *shape)`; what x0 has at other sites is not looked at. cond, batch_size: as in `nelbo`.
        Raises ValueError for a network that was not trained with `objective.name=marginals`.
        """
        if (name := self.config.objective.name) != "marginals":
            raise ValueError(
                f"log p of any subset of sites is learned by config.objective.name='marginals', not {name!r}"
            )
        whole = self.experiment.apply.apply  # with the output that sampling cuts off (`Experiment.trained`)
        denoise = bind(whole, self.params, self.process, self.experiment.kind)
        x0, shown, parts = self._checked(x0), self._checked(shown), []
        for rows in _chunks(len(x0), self.config.eval.batch_size if batch_size is None else batch_size):
            labels = None if cond is None else jnp.asarray(np.asarray(cond)[rows])
            states = jnp.asarray(x0[rows]), jnp.asarray(shown[rows])
            parts.append(likelihood.marginals(denoise, self.process, *states, self.experiment.shown(states[0], labels)))
        return jnp.concatenate(parts)[: len(x0)]

    def _scored(
        self, score: Callable[[State, Any, Rows], NamedTuple], x0: State, cond: Any, batch_size: int | None
    ) -> Any:
        """What `score(x0, cond, rows)` says of all examples: chunk by chunk, its arrays joined."""
        x0, parts = self._checked(x0), []
        for rows in _chunks(len(x0), self.config.eval.batch_size if batch_size is None else batch_size):
            labels = None if cond is None else jnp.asarray(np.asarray(cond)[rows])
            parts.append(score(jnp.asarray(x0[rows]), labels, Rows(jnp.asarray(rows), len(rows))))
        arrays = (name for name, value in parts[0]._asdict().items() if isinstance(value, jax.Array))
        return parts[0]._replace(**{n: jnp.concatenate([getattr(p, n) for p in parts])[: len(x0)] for n in arrays})

    def _checked(self, x0: State) -> np.ndarray:
        x0 = np.asarray(x0)
        if x0.shape[1:] != self.data.shape:
            raise ValueError(f"expected states of shape (n, {', '.join(map(str, self.data.shape))}), got {x0.shape}")
        return x0


def _chunks(n: int, size: int) -> Iterator[np.ndarray]:
    """Row numbers in chunks of one size, so that one program serves all; the last is filled with the last row."""
    if n < 1 or size < 1:
        raise ValueError(f"at least one example and a batch_size of one are needed, got {n} and {size}")
    size = min(size, n)
    for start in range(0, n, size):
        yield np.minimum(np.arange(start, start + size), n - 1)


def load(workdir: str | Path, *, step: int | None = None) -> Run:
    """Load the run in `workdir`: its config, and the averaged parameters of its newest good checkpoint (or of `step`).

    Raises FileNotFoundError where there is no run, `training.CheckpointError` where no checkpoint can be read.
    """
    from ddjax.training import load_ema

    workdir = Path(workdir)
    config, data = read_description(workdir)
    experiment = build(config, data)
    params, extras = load_ema(workdir / CHECKPOINTS, step)
    return Run(*experiment.trained(jax.tree.map(jnp.asarray, params)), int(extras["step"]))


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
