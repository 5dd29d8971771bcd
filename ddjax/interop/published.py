"""Published models: their weights in our network, with the process, the kind and the sampler they were made for."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from ddjax import grids, solvers
from ddjax import guidance as guides
from ddjax.denoisers import functional_init
from ddjax.interop import mapping, orbax
from ddjax.interop.adapters import guided_channels
from ddjax.interop.mapping import Entry, Fixed, Report
from ddjax.interop.tensors import Tensors, open_tensors, prefix_of
from ddjax.predictions import BoundDenoiser, bind
from ddjax.pytrees import as_pytree
from ddjax.sampling import Observed, sample
from ddjax.types import Apply, Denoise, Params, Sample, State

CLASSES = "classes"  # the kind of a classifier's output: logits of labels
AUTOENCODER = "autoencoder"  # of an image's reconstruction
FORMAT = "ddjax.interop 1"


@dataclasses.dataclass(frozen=True)
class Model:
    """What a family makes of a model's settings: the network and all that stands around it.

    make: our network. entries: whose tensors are its parameters. wrap: what stands between it and the process
        (`interop.adapters`). shape: of one example. num_classes: its labels; that number is the null label.
    scale, guided: guidance by default, and of how many outputs (None: all).
    steps, solver, grid: of sampling by default: `solver(process)` and `grid(steps)`.
    within: keeps what is predicted in the range of the data, `within(denoise, process)`, under guidance too.
    notes: what the report tells beside the tensors.
    autoencoder: the `autoencoders.KLAutoencoder`, of a model that is one.
    """

    make: Callable[..., nnx.Module]
    entries: Sequence[Entry | Fixed]
    process: Any
    kind: str
    shape: tuple[int, ...]
    wrap: Callable[[Apply], Apply] = lambda apply: apply
    num_classes: int = 0
    scale: float = 1.0
    guided: int | None = None
    steps: int = 250
    solver: Callable[[Any], Any] = solvers.Ancestral
    grid: Callable[[int], Array] = grids.uniform
    within: Callable[[Denoise, Any], Denoise] = lambda denoise, process: denoise
    notes: tuple[str, ...] = ()
    autoencoder: Any = None


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of published networks.

    name: what `load(family=...)` calls it. source: whose it is, in words.
    marks: tensors that each of its files has, by which it is recognised; others: or those of one of these sets;
        without: those that none has.
    claims: whether a config.json says that it is of this family; None: it says nothing.
    settings: from tensors, config.json and what the caller says, all that is needed to build it: what JSON can hold.
    model: of the settings.
    orbax: whether its authors' weights are an Orbax checkpoint, not safetensors.
    """

    name: str
    source: str
    marks: tuple[str, ...]
    settings: Callable[[Tensors, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    model: Callable[[Mapping[str, Any]], Model]
    without: tuple[str, ...] = ()
    claims: Callable[[Mapping[str, Any]], bool | None] = lambda config: None
    others: tuple[tuple[str, ...], ...] = ()
    orbax: bool = False

    def prefix(self, names: Sequence[str]) -> tuple[str | None, list[str]]:
        """See `tensors.prefix_of`, for whichever of its sets of marks is there."""
        found = [prefix_of(names, marks) for marks in (self.marks, *self.others)]
        return next((one for one in found if one[0] is not None), found[0])


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model in our hands (`interop.load`).

    `.denoise` is a denoiser for everything in ddjax; `.sample(key, num)` draws as its authors do.
    """

    family: str
    settings: dict[str, Any]
    model: Model
    init: Callable[[Key[Array, ""]], Params]
    apply: Apply
    params: Params
    report: Report
    prefix: str = ""
    orbax: bool = False

    @property
    def process(self) -> Any:
        """The process that it was trained under."""
        return self.model.process

    @property
    def kind(self) -> str:
        """What its output says."""
        return self.model.kind

    @property
    def denoise(self) -> BoundDenoiser:
        """The network closed over its parameters."""
        return bind(self.apply, self.params, self.process, self.kind)

    @property
    def log_prob(self) -> Callable:
        """Of a classifier: `(xt, t, labels)` to log p(label | x_t), `(batch,)`. Raises ValueError for other models."""
        if self.kind != CLASSES:
            raise ValueError(f"{self.family} is no classifier of noisy states")
        return jax.tree_util.Partial(_log_prob, as_pytree(self.apply), self.params)

    @property
    def autoencoder(self) -> tuple[Any, Params]:
        """The `autoencoders.KLAutoencoder` that it is, and its parameters: what `autoencoders.save` takes.

        Raises ValueError for other models.
        """
        if self.kind != AUTOENCODER:
            raise ValueError(f"{self.family} is no autoencoder")
        return self.model.autoencoder, self.params

    def guided(self, scale: float | None = None, null: Any = None) -> Denoise:
        """The denoiser under classifier-free guidance, by default as strong as the authors'.

        null: what it leads away from (`guidance.classifier_free`), default the null label: of a model of texts the
            empty prompt, `{"sequence": its entries}`.
        """
        scale, null = self.model.scale if scale is None else scale, self.model.num_classes if null is None else null
        if not null and scale != 1.0:
            raise ValueError(
                f"guidance={scale} leads towards labels, and {self.family} has none here: say away from what, null=..."
            )
        if self.model.guided is None:
            return guides.classifier_free(self.denoise, null=null, scale=scale)
        return guided_channels(self.denoise, null=null, scale=scale, channels=self.model.guided)

    def sample(
        self,
        key: Key[Array, ""],
        num: int,
        cond: Any = None,
        *,
        guidance: float | None = None,
        null: Any = None,
        steps: int | None = None,
        solver: Any = None,
        length: int | None = None,
        observed: Observed | None = None,
        init: State | None = None,
        classifier: Published | None = None,
        weaker: Published | None = None,
    ) -> Sample:
        """Draw `num` examples with the authors' sampler.

        cond: labels, or a dict (`denoisers.given.Given`: of a model of texts `{"sequence": ..., "valid": ...}`); None
            draws without, and without guidance. guidance: 1 is off; null: away from what, see `guided`.
        steps: of the solver. solver: another one, for this process. length: of texts, up to the model's own. observed:
            sites that are known. init: states at the first time of the grid, for those of the prior.
        classifier: one of noisy images (family "adm_classifier"), whose gradient, times `guidance` (default 1), leads
            towards the labels: `guidance.GuidedMean`, or with another solver `guidance.by_classifier`.
        weaker: another model of the same process, from which `guidance` leads away (EDM2; `guidance.by_weaker`).
        A continuous chain that ends with noise ends at what the network then says of x_0 (DDPM's last step).
        Raises ValueError as `ddjax.sample` does.
        """
        if self.kind in (CLASSES, AUTOENCODER):
            raise ValueError(
                f"{self.family} is no denoiser to sample from: a classifier guides one, with classifier=this"
            )
        model = self.model
        shape = model.shape if length is None else (length,)
        if length is not None and len(model.shape) != 1:
            raise ValueError(f"length={length}: examples of {self.family} have the shape {model.shape}")
        own, labelled = model.solver, model.num_classes > 0
        if classifier is not None and weaker is not None:
            raise ValueError("give a classifier or a weaker model to guide by, not both")
        if classifier is not None:
            if cond is None:
                raise ValueError("a classifier leads towards labels, and there are none: give cond")
            scale = 1.0 if guidance is None else guidance
            inside = model.within(self.denoise, self.process)
            denoise = guides.by_classifier(inside, classifier.log_prob, self.process, scale=scale, told=labelled)
            own = guides.GuidedMean
        elif weaker is not None:
            if guidance is None:
                raise ValueError("guidance away from a weaker model needs its scale: give guidance")
            told = weaker.model.num_classes > 0
            denoise = model.within(
                guides.by_weaker(self.denoise, weaker.denoise, scale=guidance, told=told), self.process
            )
        else:
            denoise = model.within(self.denoise if cond is None else self.guided(guidance, null), self.process)
        if cond is None and weaker is None and guidance not in (None, 1.0):
            raise ValueError(f"guidance={guidance} leads towards labels, and there are none: give cond")
        cond = jax.tree.map(jnp.asarray, cond)
        times = grids.check_grid(model.grid(model.steps if steps is None else steps))
        drawn = sample(
            key, denoise, self.process, shape=(num, *shape), cond=cond, observed=observed, init=init,
            solver=own(self.process) if solver is None else solver,
            times=times,
        )  # fmt: skip
        if self.process.state != "gaussian" or not np.isfinite(float(self.process.schedule.log_snr(times[-1]))):
            return drawn
        return _to_data(denoise, self.process, drawn, times[-1], cond)

    def save(self, path: str | os.PathLike) -> None:
        """Write it as one safetensors file of ours, which says how to build it. Atomic."""
        from ddjax.training import export_safetensors

        about = {"format": FORMAT, "family": self.family, "settings": json.dumps(self.settings), "prefix": self.prefix}
        export_safetensors(path, self.params, about)

    def export(self, path: str | os.PathLike, dtype: Any = None) -> None:
        """Write it under the authors' names and in their shapes: one safetensors file, or where they have Orbax a new
        directory. Atomic.

        dtype: of the tensors, default the parameters'.
        """
        from safetensors.numpy import save

        from ddjax.training.manifest import write_atomically

        tensors = mapping.save(self.model.entries, self.params, dtype)
        tensors = {f"{self.prefix}{name}": np.ascontiguousarray(value) for name, value in tensors.items()}
        if self.orbax:
            return orbax.save(path, tensors)
        return write_atomically(Path(path), save(tensors, metadata={"format": "pt"}))


def is_ours(path: str | os.PathLike) -> bool:
    """Whether `Published.save` wrote it. Raises as `open_tensors` does."""
    return open_tensors(path)[2].get("format") == FORMAT


def load(
    path: str | os.PathLike,
    family: str | None = None,
    *,
    families: Mapping[str, Family],
    partial: bool = False,
    dtype: Any = jnp.float32,
    key: Key[Array, ""] | None = None,
    **settings: Any,
) -> Published:
    """See `ddjax.interop.load`."""
    found, config, header = open_tensors(path)
    if header.get("format") == FORMAT:
        return _load_ours(path, header, families, dtype)
    chosen = _family(family, families, list(found), config, path)
    prefix, aside = chosen.prefix(list(found))
    if prefix is None:
        raise ValueError(f"{path} is no {chosen.name} ({chosen.source}): it has no {', no '.join(chosen.marks)}")
    own = found.under(prefix)
    all_settings = chosen.settings(own, config, settings)
    if beyond := settings.keys() - all_settings.keys():
        raise ValueError(f"{chosen.name} has no settings {sorted(beyond)}; it has {', '.join(all_settings)}")
    model = chosen.model(all_settings | settings)
    init, apply = functional_init(_making(model))
    # What is neither the network's nor another copy of it is unknown, under its whole name.
    rest = {n: n for n in found if not n.startswith(prefix) and n not in set(aside)}
    key = jax.random.key(0) if key is None else key
    params, report = mapping.load(
        model.entries, Tensors(found.files, own.names | rest), mapping.shapes_of(init), dtype=dtype,
        initial=(lambda: init(key)) if partial else None, aside=aside,
    )  # fmt: skip
    report = dataclasses.replace(report, notes=model.notes)
    return Published(
        chosen.name, all_settings | settings, model, init, model.wrap(apply), params, report, prefix, chosen.orbax
    )


def _load_ours(path: Any, header: Mapping[str, str], families: Mapping[str, Family], dtype: Any) -> Published:
    """What `Published.save` wrote."""
    from ddjax.training import load_safetensors

    settings, name = json.loads(header["settings"]), header["family"]
    if name not in families:
        raise ValueError(f"{path} is of the family {name!r}; this ddjax knows {', '.join(families)}")
    family = families[name]
    model = family.model(settings)
    init, apply = functional_init(_making(model))
    leaves, shapes = mapping.flat(load_safetensors(path)[0]), mapping.shapes_of(init)
    wrong = sorted(leaves.keys() ^ shapes.keys()) or [n for n in shapes if leaves[n].shape != shapes[n]]
    if wrong:
        raise ValueError(f"{path} does not hold the parameters that its header describes: {', '.join(wrong[:6])}")
    params = mapping.nested({n: np.asarray(leaves[n], dtype) for n in shapes})
    report = Report(matched=tuple(((n,), (n,)) for n in shapes), notes=model.notes)
    return Published(
        name, settings, model, init, model.wrap(apply), params, report, header.get("prefix", ""), family.orbax
    )


def _log_prob(apply: Apply, params: Params, xt: Array, t: Array, labels: Array) -> Array:
    logits = jax.nn.log_softmax(apply(params, xt, t))
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def _making(model: Model) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: model.make(rngs=rngs)


def _family(
    name: str | None, families: Mapping[str, Family], names: list[str], config: Mapping[str, Any], path: Any
) -> Family:
    """The one that is asked for, or the only one whose file it can be."""
    if name is not None:
        if name not in families:
            raise ValueError(f"family={name!r}: expected one of {', '.join(map(repr, families))}")
        return families[name]
    likely = []
    for family in families.values():
        prefix = family.prefix(names)[0]
        if prefix is not None and not any(prefix + n in names for n in family.without):
            likely.append(family)
    claimed = [family for family in likely if family.claims(config)]
    likely = claimed or [family for family in likely if family.claims(config) is None]
    if len(likely) == 1:
        return likely[0]
    found = f"could be {' or '.join(f.name for f in likely)}" if likely else "is of no family that ddjax knows"
    raise ValueError(f"{path} {found}: say which with family=..., one of {', '.join(families)}")


@partial(jax.jit, static_argnames="process")
def _ended(denoise: Denoise, process: Any, x: Array, t: Array, cond: Any) -> Array:
    t = jnp.full(x.shape[0], t)
    return process.convert(denoise(x, t, cond), "x0", x, t).value


def _to_data(denoise: Denoise, process: Any, drawn: Sample, t: Array, cond: Any) -> Sample:
    """The last step of a chain that ends with noise: to the mean, at one evaluation more."""
    from ddjax.predictions import evaluations
    from ddjax.pytrees import as_pytree

    denoise = as_pytree(denoise)
    return drawn._replace(x0=_ended(denoise, process, drawn.x0, t, cond), nfe=drawn.nfe + evaluations(denoise))
