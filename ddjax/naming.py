"""How a name and its options become an object."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ddjax.config import ConfigError


def pick(table: Mapping[str, Any], name: str, key: str) -> Any:
    """What `name` stands for. key: where the config says it, for the ConfigError that an unknown name raises."""
    if name not in table:
        raise ConfigError(f"{key}={name!r} is unknown; it is one of {', '.join(table)}")
    return table[name]


def make(table: Mapping[str, Callable], name: str, key: str, *args: Any, **kwargs: Any) -> Any:
    """Call what `name` stands for. Raises ConfigError for arguments it does not take, lacks, or finds wrong."""
    named = pick(table, name, key)
    check_options(named, kwargs, key, given=len(args))
    try:
        return named(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {name!r}: {error}") from error


def taken(named: Callable, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are arguments of `named`."""
    return {name: value for name, value in values.items() if name in _parameters(named)}


def _parameters(named: Callable) -> Mapping[str, inspect.Parameter]:
    """Of a class, those of its __init__: NNX's metaclass hides the signature of the call."""
    return inspect.signature(named.__init__ if inspect.isclass(named) else named).parameters


def make_option(table: Mapping[str, Callable], option: str, options: dict[str, Any], key: str, process: Any) -> None:
    """Put what an option names in its place; its arguments are taken out of the options, e.g. `gamma` for min_snr."""
    name, key = options.pop(option), f"{key}.{option}"
    named = pick(table, name, key)
    own = taken(named, options)
    for argument in own:
        del options[argument]
    options[option] = make(table, name, key, **taken(named, {"process": process}), **own)


def check_options(named: Callable, options: Mapping[str, Any], key: str, given: int = 0) -> None:
    """Raise ConfigError for options that `named` does not take, or needs and lacks.

    Its first `given` arguments are not options.
    """
    taken = [p for name, p in _parameters(named).items() if name not in ("self", "rngs")][given:]
    passes_on = any(p.kind is p.VAR_KEYWORD for p in taken)  # to something that checks them itself
    taken = [p for p in taken if p.kind is not p.VAR_KEYWORD]
    names, name = [p.name for p in taken], named.__name__.lstrip("_")
    for option in options:
        if option not in names and not passes_on:
            near = difflib.get_close_matches(option, names, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names)}" if names else "it takes none"
            )
            raise ConfigError(f"{key}: {name} has no option {option!r}; {hint}")
    if missing := [p.name for p in taken if p.default is p.empty and p.name not in options]:
        raise ConfigError(f"{key}: {name} needs {', '.join(missing)}")
