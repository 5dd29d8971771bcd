"""Accelerators as their makers describe them: what bounds a training step."""

from __future__ import annotations

import dataclasses

NVIDIA = "NVIDIA's data sheet, SXM, dense bfloat16; NVLink and network (DGX) each way"
GOOGLE = "Google Cloud's pages of its TPUs; interchip interconnect each way"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. Rates are peaks, a second; an achieved rate is lower."""

    flops: float  # dense bfloat16 FLOP/s
    memory: float  # bytes of HBM
    bandwidth: float  # of it, bytes/s
    link: float  # to devices of the same domain, bytes/s each way
    domain: int  # devices that such links join: a node, or the largest slice
    network: float | None  # beyond it, bytes/s each way; None: not told per chip
    topology: str  # what JAX calls such devices in a compile-only topology; "" for none
    source: str


GB, GIB, GBIT = 1e9, 2**30, 1e9 / 8
CHIPS = {
    "h100": Chip(989.4e12, 80 * GB, 3350 * GB, 450 * GB, 8, 400 * GBIT, "", NVIDIA),
    "h200": Chip(989.4e12, 141 * GB, 4800 * GB, 450 * GB, 8, 400 * GBIT, "", NVIDIA),
    "a100": Chip(312e12, 80 * GB, 2039 * GB, 300 * GB, 8, 200 * GBIT, "", NVIDIA),
    "v4": Chip(275e12, 32 * GIB, 1228 * GB, 300 * GB, 4096, None, "v4", GOOGLE),
    "v5e": Chip(197e12, 16 * GB, 819 * GB, 200 * GB, 256, 25 * GBIT, "v5e", GOOGLE),
    "v5p": Chip(459e12, 95 * GIB, 2765 * GB, 600 * GB, 6144, 50 * GBIT, "v5p", GOOGLE),
    "v6e": Chip(918e12, 32 * GB, 1638 * GB, 400 * GB, 256, None, "v6e", GOOGLE),
}


# Peak dense bfloat16 FLOP/s by what JAX calls a device, from the makers' data sheets; the first name found in it
# decides.
PEAK_FLOP_PER_S = (
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h200 nvl", 835e12),
    ("h100", 989e12),
    ("h200", 989e12),
    ("a100", 312e12),
    ("tpu v4 lite", 138e12),
    ("tpu v4", 275e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5", 459e12),  # v5p, under either name
    ("tpu v6 lite", 918e12),
    ("tpu v6e", 918e12),
)


def chip(name: str) -> Chip:
    """The chip of that name. Raises ValueError for one that is not in the table."""
    if name.lower() not in CHIPS:
        raise ValueError(f"unknown chip {name!r}; it is one of {', '.join(CHIPS)}")
    return CHIPS[name.lower()]


def slice_shape(name: str, devices: int) -> str:
    """A compile-only topology of so many TPUs, such as "v5p:4x8x8": the most even box of powers of two.

    Raises ValueError for a number that is not a power of two (pass --compile cpu), or is more than a pod.
    """
    kind = chip(name)
    bits = devices.bit_length() - 1
    if devices != 2**bits or devices > kind.domain:
        raise ValueError(
            f"{devices} {name} are no slice: expected a power of two up to {kind.domain}; try --compile cpu"
        )
    axes = 2 if name.lower() in ("v5e", "v6e") else 3
    sides = [2 ** (bits // axes + (i < bits % axes)) for i in range(axes)]
    return f"{kind.topology}:{'x'.join(map(str, sorted(sides)))}"


def peak_flop_per_s(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a whole device of this kind; None where it is not in the table."""
    kind = device_kind.lower()
    if "mig " in kind:  # a slice of a GPU
        return None
    return next((peak for name, peak in PEAK_FLOP_PER_S if name in kind), None)
