"""What a compiled program sends between devices, read off its HLO text.

XLA's own cost analysis says nothing of collectives, and counts the body of a loop once. This counts every collective as
often as it runs, with the bytes that a device sends, and says over which axes of the mesh it goes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BYTES = {"pred": 1, "token": 0, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}  # others: the digits of the name, in bits

_NAME = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_LIMIT = re.compile(r"ROOT .* compare\((.*)\), direction=LT")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str  # of KINDS
    over: tuple[str, ...]  # mesh axes; ("?",) where its groups are not those of any axes
    size: int  # devices in a group
    bytes: float  # of the whole array: gathered, to be scattered, reduced or exchanged, on one device
    count: int  # how often it runs; a loop of unknown length counts as one turn
    name: str  # the instruction's

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all its runs, along a ring: each device sends the rest of the group its part."""
        parts = self.bytes * (self.size - 1) / self.size
        each = {"all-reduce": 2 * parts, "collective-permute": self.bytes}.get(self.kind, parts)
        return each * self.count


def collectives(hlo: str, mesh: Sequence[tuple[str, int]]) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`), in the order of its text.

    mesh: names and sizes of the mesh's axes; its devices are numbered row by row, as JAX numbers them.
    """
    computations, entry = _computations(hlo)
    runs = dict.fromkeys(computations, 0)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for called, factor in _calls(computations[name], computations):
            if called in computations:
                visit(called, times * factor)

    visit(entry, 1)
    found = []
    for name, lines in computations.items():
        for line in lines:
            if runs[name] and (one := _collective(line, runs[name], mesh)):
                if name.startswith("all-reduce-scatter") and one.kind == "all-reduce":  # TPUs: and a slice of it
                    one = dataclasses.replace(one, kind="reduce-scatter")
                found.append(one)
    return found


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if line[:1] not in (" ", "}", "") and (head := _NAME.match(line)):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled HLO module")
    return computations, entry


def _calls(lines: list[str], computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """The computations that these instructions run, and how often; reductions too, which is harmless."""
    for line in lines:
        turns = _turns(line, computations) if " while(" in line else 1
        for called in _CALLED.findall(line):
            yield called, turns
        for group in _BRANCHES.findall(line):
            for called in group.split(","):
                yield called.strip().lstrip("%"), turns


def _turns(line: str, computations: dict[str, list[str]]) -> int:
    """Of a loop: known to the compiler, or the constant below which its condition keeps its counter."""
    if known := _TURNS.search(line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    for limit in filter(None, map(_LIMIT.search, lines)):
        for operand in re.findall(r"%?([\w.\-]+)", limit[1]):
            for other in lines:
                if value := re.match(rf"\s*%?{re.escape(operand)} = s\d+\[\]\S* constant\((\d+)\)", other):
                    return int(value[1])
    return 1


def _collective(line: str, count: int, mesh: Sequence[tuple[str, int]]) -> Collective | None:
    parsed = _INSTRUCTION.match(line)
    if not parsed:
        return None
    name, result, operation, rest = parsed.groups()
    started = operation.endswith("-start")
    kind = operation.removesuffix("-start")
    if kind not in KINDS:
        return None
    groups = _groups(rest, kind, math.prod(size for _, size in mesh))
    size = 2 if kind == "collective-permute" else groups.shape[1]
    if size == 1:
        return None
    shapes = [_bytes(*shape) for shape in _SHAPE.findall(result)]
    if started and kind in ("all-gather", "collective-permute"):  # (operands, results, ...)
        # TPU and GPU give operands, results and then scalars of their own.
        shapes = [s for s, (kind_, dims) in zip(shapes, _SHAPE.findall(result), strict=True) if dims or kind_ != "u32"]
        shapes = shapes[len(shapes) // 2 :]
    whole = sum(shapes) * (size if kind == "reduce-scatter" else 1)
    return Collective(kind, _axes(groups, kind, mesh), size, whole, count, name)


def _bytes(kind: str, dims: str) -> float:
    each = BYTES.get(kind)
    if each is None:
        digits = re.match(r"[a-z]+(\d+)", kind)
        each = int(digits[1]) / 8 if digits else 0
    return each * math.prod(int(d) for d in dims.split(",") if d)


def _groups(text: str, kind: str, devices: int) -> np.ndarray:
    """Who talks to whom: `(groups, size)`; of a permutation, pairs of source and target."""
    if iota := _IOTA.search(text):
        shape, dims, order = ([int(v) for v in part.split(",")] if part else None for part in iota.groups())
        numbers = np.arange(math.prod(dims)).reshape(dims)
        return (numbers if order is None else numbers.transpose(order)).reshape(shape)
    if named := _MESH.search(text):
        return _of_axes(*named.groups())
    if listed := _LISTED.search(text):
        groups = [[int(v) for v in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
        return np.array(groups)
    if "replica_groups=" in text and "replica_groups={}" not in text:
        raise ValueError(f"cannot read the groups of {text[:200]!r}")
    return np.arange(devices)[None]  # no groups: all together


def _of_axes(axes: str, ids: str | None, order: str | None, chosen: str) -> np.ndarray:
    """Groups along some axes, or parts (a:(before)size) of axes, of a mesh of the compiler's own."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if ids:
        numbers = numbers.reshape([int(v) for v in ids.split(",")])
        numbers = numbers.transpose([int(v) for v in order.split(",")]) if order else numbers
    wanted = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS.findall(chosen)}
    shape, along = [], []
    for name, size in sizes.items():
        before, own = wanted.get(name, (1, 1))
        shape += [before, own, size // before // own]
        along += [len(shape) - 2] if name in wanted else []
    rest = [axis for axis in range(len(shape)) if axis not in along]
    group = math.prod(shape[axis] for axis in along)
    return numbers.reshape(shape).transpose([*rest, *along]).reshape(-1, group)


def _axes(groups: np.ndarray, kind: str, mesh: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """The mesh axes along which a group's devices differ."""
    names, sizes = [name for name, _ in mesh], [size for _, size in mesh]
    places = np.stack(np.unravel_index(groups, sizes), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    over = tuple(name for name, d in zip(names, differ, strict=True) if d)
    whole = math.prod(size for size, d in zip(sizes, differ, strict=True) if d)
    # Groups that are part of an axis, or of several at once, are told by the axes all the same.
    return over if over and (kind == "collective-permute" or groups.shape[1] <= whole) else ("?",)


def by_axes(found: Sequence[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
    """`{(kind, axes): (runs, bytes sent by a device)}`."""
    total: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
    for one in found:
        runs, sent = total.get((one.kind, one.over), (0, 0.0))
        total[one.kind, one.over] = runs + one.count, sent + one.sent
    return total
