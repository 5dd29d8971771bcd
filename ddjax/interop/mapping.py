"""One description of whose tensor is which parameter, that loads and saves.

A family of published networks gives a list of entries. `load` reads their tensors into our parameters, `save` writes
ours under their names; both go by the same entries, so that a round trip is exact.

    [*linear("stack/blocks/0/mlp/up", "blocks.0.mlp.fc1"), Entry("position", "pos", reshaped((1, 16, 64), (16, 64)))]
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ddjax.types import Params


@dataclasses.dataclass(frozen=True)
class Change:
    """How tensors of theirs become parameters of ours, and back: `load` and `save` undo each other.

    Both take arrays and give one, or a tuple of several.
    """

    load: Callable[..., Any]
    save: Callable[..., Any]

    def then(self, other: Change) -> Change:
        """Both changes, on the way to ours the other after this one."""
        return Change(
            lambda *theirs: other.load(*_several(self.load(*theirs))),
            lambda *ours: self.save(*_several(other.save(*ours))),
        )


def _same(x: Any) -> Any:
    return x


SAME = Change(_same, _same)
TRANSPOSED = Change(lambda w: w.T, lambda w: w.T)  # of a linear layer: torch holds (out, in)


def permuted(*axes: int) -> Change:
    """Their axes in another order: ours are `theirs.transpose(axes)`."""
    back = tuple(np.argsort(axes))
    return Change(lambda w: w.transpose(axes), lambda w: w.transpose(back))


# Of a convolution: torch holds (out, in, height, width), we (height, width, in, out).
CONVOLUTION = permuted(2, 3, 1, 0)


def reshaped(theirs: Sequence[int], ours: Sequence[int]) -> Change:
    """Their shape, and ours, of the same numbers in the same order."""
    return Change(lambda w: _as(w, theirs).reshape(ours), lambda w: w.reshape(theirs))


def taken(order: Sequence[int], axis: int = 0) -> Change:
    """Ours is theirs along one axis in another order: `theirs[order]`."""
    back = np.argsort(order)
    return Change(lambda w: w.take(order, axis=axis), lambda w: w.take(back, axis=axis))


def joined(sizes: Sequence[int], axis: int = 0) -> Change:
    """Several of theirs, of these sizes along one axis, are one of ours."""
    ends = np.cumsum(sizes)[:-1]
    return Change(
        lambda *parts: np.concatenate(parts, axis=axis), lambda whole: tuple(np.split(whole, ends, axis=axis))
    )


def split(sizes: Sequence[int], axis: int = 0) -> Change:
    """One of theirs is several of ours, of these sizes along one axis."""
    both = joined(sizes, axis)
    return Change(both.save, both.load)


def copied(times: int) -> Change:
    """Several of theirs are one of ours, and must be equal: on the way to ours ValueError where they are not."""

    def one(*copies: np.ndarray) -> np.ndarray:
        if not all(np.array_equal(copy, copies[0]) for copy in copies[1:]):
            raise ValueError("copies of one parameter, which are not equal")
        return copies[0]

    return Change(one, lambda w: (w,) * times)


def constant(ours: str, value: np.ndarray) -> Entry:
    """A parameter of ours that they compute. `save` raises ValueError where it has another value."""

    def nothing(w: np.ndarray) -> tuple:
        if not _close(w, value):
            raise ValueError("a table that cannot be learned in their network, and has been in ours")
        return ()

    return Entry(ours, (), Change(lambda: np.array(value), nothing))


def by_heads(heads: int, parts: int = 3) -> Change:
    """Rows of queries, keys and values, (part, head, feature) with them, in our order: (head, part, feature).

    (`layers.Attention`.) Of a weight `(parts width, in)`, still to be transposed, or a bias.
    """

    def order(w: np.ndarray, first: int, second: int) -> np.ndarray:
        w = w.reshape(first, second, -1, *w.shape[1:])
        return w.swapaxes(0, 1).reshape(-1, *w.shape[3:])

    return Change(lambda w: order(w, parts, heads), lambda w: order(w, heads, parts))


def by_groups(heads: int, groups: int) -> Change:
    """As `by_heads`, where heads / groups neighbouring queries share their keys and values.

    Rows of all queries, keys and values become (group, its queries and then its key and value, feature).
    """
    each = heads // groups

    def load(w: np.ndarray) -> np.ndarray:
        head = w.shape[0] // (heads + 2 * groups)
        parts = np.split(w, [heads * head, (heads + groups) * head])
        parts = [part.reshape(groups, -1, head, *w.shape[1:]) for part in parts]
        return np.concatenate(parts, axis=1).reshape(w.shape)

    def save(w: np.ndarray) -> np.ndarray:
        parts = np.split(w.reshape(groups, each + 2, -1, *w.shape[1:]), [each, each + 1], axis=1)
        return np.concatenate([part.reshape(-1, *w.shape[1:]) for part in parts])

    return Change(load, save)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Parameters of ours, by path ("stack/blocks/0/mlp/up/kernel"), and the tensors of theirs that they are."""

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    change: Change = SAME


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A tensor of theirs that is no parameter of ours.

    value: what it must be, as a table of frequencies that we compute; it is written again where `written`. None: what
        it holds has no part in what the network gives (rows of a cache), and it is left out.
    """

    theirs: str
    value: np.ndarray | None = None
    written: bool = False


def linear(ours: str, theirs: str, bias: bool = True) -> list[Entry]:
    """A linear layer: `ours/kernel` and `ours/bias`, `theirs.weight` and `theirs.bias`."""
    entries = [Entry(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED)]
    return [*entries, Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else entries


def convolution(ours: str, theirs: str, bias: bool = True) -> list[Entry]:
    """A convolution in two dimensions, as `linear`."""
    entries = [Entry(f"{ours}/kernel", f"{theirs}.weight", CONVOLUTION)]
    return [*entries, Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else entries


def norm(ours: str, theirs: str, bias: bool = True) -> list[Entry]:
    """The affine part of a normalisation: `ours/scale` and `ours/bias`, `theirs.weight` and `theirs.bias`."""
    entries = [Entry(f"{ours}/scale", f"{theirs}.weight")]
    return [*entries, Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else entries


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of each tensor, by its name."""

    matched: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()  # (theirs, ours)
    checked: tuple[str, ...] = ()  # theirs, no parameters, as they must be
    unknown: tuple[str, ...] = ()  # theirs that no entry names
    missing: tuple[str, ...] = ()  # theirs that are not there
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()  # theirs, shape, the shape expected
    different: tuple[str, ...] = ()  # theirs that must have other values
    aside: tuple[str, ...] = ()  # other copies of the weights (those in training, beside their average)
    notes: tuple[str, ...] = ()  # what was taken of the model beside its weights

    @property
    def whole(self) -> bool:
        """Whether every tensor has its place and every parameter its tensor."""
        return not (self.unknown or self.missing or self.misshapen or self.different)

    def problems(self) -> list[str]:
        """Each in a line."""
        return [
            *(f"unknown: {name}" for name in self.unknown),
            *(f"missing: {name}" for name in self.missing),
            *(f"mis-shaped: {name} has {found}, expected {wanted}" for name, found, wanted in self.misshapen),
            *(f"not the fixed values that the network computes: {name}" for name in self.different),
        ]

    def counted(self) -> str:
        """How many of each problem."""
        words = ("unknown", "missing", "misshapen", "different")
        numbers = ((len(getattr(self, word)), word) for word in words)
        return ", ".join(f"{number} {word}" for number, word in numbers if number)

    def __str__(self) -> str:
        """How many of each, and every problem by name."""
        tensors = sum(len(theirs) for theirs, _ in self.matched)
        ours = sum(len(ours) for _, ours in self.matched)
        lines = [f"{tensors} tensors matched {ours} parameters"]
        lines += [f"{len(self.checked)} fixed tensors are as they must be"] if self.checked else []
        lines += [f"{len(self.aside)} tensors of another copy of the weights set aside"] if self.aside else []
        return "\n".join([*lines, *self.problems(), *self.notes])


def shapes_of(init: Callable[[Any], Params]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that `init(key)` gives, by path; nothing is computed."""
    return {path: leaf.shape for path, leaf in flat(jax.eval_shape(init, jax.random.key(0))).items()}


def flat(params: Params, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by path, names joined by "/"."""
    if not isinstance(params, Mapping):
        return {prefix: params}
    return {
        path: leaf
        for name, child in params.items()
        for path, leaf in flat(child, f"{prefix}/{name}" if prefix else name).items()
    }


def nested(leaves: Mapping[str, Any]) -> Params:
    """Undoes `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def load(
    entries: Iterable[Entry | Fixed],
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: Any = np.float32,
    initial: Callable[[], Params] | None = None,
    aside: Sequence[str] = (),
) -> tuple[Params, Report]:
    """Their tensors as our parameters.

    tensors: by name, without their file's prefix; each is read once, when it is needed (`tensors.Tensors`). One that
        has `shape_of(name)` is asked for shapes first.
    shapes: of all our parameters, by path (`shapes_of`).
    dtype: of the parameters.
    initial: gives parameters that stay where a tensor is missing or mis-shaped. None refuses such files.
    aside: names for the report only.

    Raises ValueError that lists every unknown, missing, mis-shaped or different tensor, unless `initial` is given; and
    for entries that are not one for each parameter.
    """
    entries = list(entries)
    _check(entries, shapes)
    found = dict.fromkeys(tensors)
    report: dict[str, list] = {f.name: [] for f in dataclasses.fields(Report)} | {"aside": list(aside)}
    ready = []
    for entry in entries:
        if isinstance(entry, Fixed):
            if entry.theirs in found:
                right = entry.value is None or _close(tensors[entry.theirs], entry.value)
                report["checked" if right else "different"].append(entry.theirs)
                del found[entry.theirs]
            continue
        theirs, ours = _names(entry.theirs), _names(entry.ours)
        there = [name for name in theirs if name in found]
        report["missing"] += [name for name in theirs if name not in found]
        wrong = [
            (name, _shape(tensors, name), wanted)
            for name, wanted in zip(theirs, _wanted(entry, shapes), strict=True)
            if name in found and _shape(tensors, name) != wanted
        ]
        report["misshapen"] += wrong
        if len(there) == len(theirs) and not wrong:
            ready.append((entry, theirs, ours))
            report["matched"].append((theirs, ours))
        for name in there:
            found[name] = True
    report["unknown"] = [name for name, used in found.items() if not used]
    told = Report(**{name: tuple(values) for name, values in report.items()})
    if not told.whole and initial is None:
        raise ValueError("\n".join([f"these weights are not this network's: {told.counted()}", *told.problems()]))
    leaves = {} if told.whole else {path: np.asarray(leaf, dtype) for path, leaf in flat(initial()).items()}
    for entry, theirs, ours in ready:
        arrays = [np.asarray(tensors[name]).astype(dtype) for name in theirs]
        values = _several(_named(entry, lambda arrays=arrays, entry=entry: entry.change.load(*arrays)))
        for path, value in zip(ours, values, strict=True):
            leaves[path] = np.ascontiguousarray(value, dtype=dtype).reshape(shapes[path])
    return nested({path: leaves[path] for path in shapes}), told


def save(entries: Iterable[Entry | Fixed], params: Params, dtype: Any = None) -> dict[str, np.ndarray]:
    """Our parameters as their tensors, by name: what `load` takes.

    dtype: of the tensors, default that of the parameters. Raises ValueError for parameters that are not the entries'.
    """
    entries, leaves = list(entries), flat(params)
    _check(entries, leaves)
    tensors = {}
    for entry in entries:
        if isinstance(entry, Fixed):
            if entry.written:
                tensors[entry.theirs] = np.asarray(entry.value)
            continue
        arrays = [np.asarray(jax.device_get(leaves[path])) for path in _names(entry.ours)]
        values = _several(_named(entry, lambda arrays=arrays, entry=entry: entry.change.save(*arrays)))
        for name, value in zip(_names(entry.theirs), values, strict=True):
            tensors[name] = np.ascontiguousarray(value, dtype=dtype).reshape(value.shape)
    return tensors


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _several(values: Any) -> tuple:
    return values if isinstance(values, tuple) else (values,)


def _named(entry: Entry, change: Callable[[], Any]) -> Any:
    """What a change gives; its error with the names."""
    try:
        return change()
    except ValueError as error:
        raise ValueError(f"{', '.join((*_names(entry.theirs), *_names(entry.ours)))}: {error}") from error


def _as(w: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    if w.shape != tuple(shape):
        raise ValueError(f"a tensor of shape {w.shape} is not of shape {tuple(shape)}")
    return w


def _shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return tuple(tensors.shape_of(name) if hasattr(tensors, "shape_of") else np.shape(tensors[name]))


def _wanted(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes of the entry's tensors, for parameters of these shapes: `save` says them."""
    if not entry.theirs:
        return []
    nothing = np.zeros((), np.int8)
    values = entry.change.save(*(np.broadcast_to(nothing, shapes[path]) for path in _names(entry.ours)))
    return [value.shape for value in _several(values)]


def _close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether they are equal to what half precision may have left of them."""
    found = np.asarray(found)
    rough = found.dtype.itemsize < 4
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    close = {"rtol": 1e-2, "atol": 1e-2} if rough else {"rtol": 1e-4, "atol": 1e-5}
    return found.shape == wanted.shape and np.allclose(found, wanted, **close)


def _check(entries: Sequence[Entry | Fixed], ours: Mapping[str, Any]) -> None:
    """Raise ValueError unless each parameter is in one entry, and no tensor in two."""
    paths = [path for entry in entries if isinstance(entry, Entry) for path in _names(entry.ours)]
    names = [name for entry in entries for name in _names(entry.theirs)]
    twice = sorted(x for counts in (Counter(paths), Counter(names)) for x, count in counts.items() if count > 1)
    without, beyond = sorted(ours.keys() - set(paths)), sorted(set(paths) - ours.keys())
    if twice or without or beyond:
        raise ValueError(
            f"the entries are not this network's: parameters without an entry {without[:6]} ({len(without)}), entries "
            f"without a parameter {beyond[:6]} ({len(beyond)}), named twice {twice[:6]} ({len(twice)})"
        )
