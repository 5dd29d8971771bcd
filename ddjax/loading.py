"""The data of a config: loaded, mixed, encoded, with their conditions, in their interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ddjax import data as datasets
from ddjax import naming
from ddjax.config import Config, ConfigError, DataConfig
from ddjax.data.dataset import Dataset


def load_data(config: Config, split: str) -> Dataset:
    """A split of the config's data.

    Raises what `ddjax.data.load` raises, and ConfigError for options that do not fit.
    """
    return _by_class(config, _load(config, split))


def _load(config: Config, split: str) -> Dataset:
    c = config.data
    if clash := {"tokens", "split"} & set(c.options):
        raise ConfigError(
            f"config.data.options: {min(clash)!r} is not an option; "
            "there are config.data.tokens and config.data.eval_split"
        )
    try:
        data = _mixture(c, split) if c.mixture else datasets.load(c.name, split, tokens=c.tokens, **c.options)
    except TypeError as error:
        raise ConfigError(f"config.data.options: {error}") from error
    data = _encoded(config, data, split)
    if c.interval != DataConfig().interval:
        try:
            data = datasets.rescaled(data, *c.interval)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.data.interval={c.interval}: {error}") from error
    return _conditioned(config, data)


def _encoded(config: Config, data: Dataset, split: str) -> Dataset:
    """The latents that `config.data.latents` asks for, in the place of images."""
    c, key = config.data.latents, "config.data.latents"
    if not c:
        return data
    options = dict(c)
    if unknown := sorted(options.keys() - {"autoencoder", "scale", "rounds", "seed"}):
        raise ConfigError(f"{key} has no {unknown[0]!r}; it takes autoencoder, scale, rounds, seed")
    if "autoencoder" not in options:
        raise ConfigError(f"{key} needs autoencoder, the file of one (`ddjax.autoencoders.save`)")
    if config.train.workers:
        raise ConfigError(f"config.train.workers={config.train.workers}: latents are made by this process, set it to 0")
    if config.data.interval != DataConfig().interval:
        raise ConfigError(
            f"config.data.interval={config.data.interval}: latents have a scale of their own, leave it out"
        )
    path, scale = options.pop("autoencoder"), options.pop("scale", None)
    try:
        if scale is None:
            images = dataclasses.replace(config, data=dataclasses.replace(config.data, latents={}, conditions={}))
            scale = datasets.scale_of(data if split == "train" else _load(images, "train"), path)
        return datasets.encoded(data, datasets.Latents(str(path), float(scale)), **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error


def _conditioned(config: Config, data: Dataset) -> Dataset:
    """The data with what `config.data.conditions` names in their condition."""
    c = config.data
    if not c.conditions:
        return data
    if c.coherence or c.classes:
        raise ConfigError("config.data.conditions does not go with config.data.coherence or config.data.classes")
    try:
        return datasets.conditioned(data, c.conditions)
    except ValueError as error:
        raise ConfigError(f"config.data.conditions: {error}") from error


def _mixture(c: DataConfig, split: str) -> Dataset:
    """The data sets that `config.data.mixture` names, as one."""
    for entry in c.mixture:
        if not isinstance(entry, Mapping) or not {"name", "weight"} <= set(entry) <= {"name", "weight", "options"}:
            raise ConfigError(f"config.data.mixture: expected dicts of name, weight and perhaps options, got {entry!r}")
    parts = [
        datasets.load(entry["name"], split, tokens=c.tokens, **{**c.options, **entry.get("options", {})})
        for entry in c.mixture
    ]
    try:
        return datasets.mixed(parts, [entry["weight"] for entry in c.mixture])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.data.mixture: {error}") from error


def _by_class(config: Config, data: Dataset) -> Dataset:
    """The classes that the config names as the ends of an interpolant; without any, the data as they are."""
    c = config.data
    if not c.classes:
        return data
    name = "ends" if config.objective.name == "multimarginal" else "x1"
    made = {"classes": datasets.by_class}
    return naming.make(made, "classes", "config.data.classes", data, c.classes, name)
