"""How good each checkpoint is, as it was evaluated: a small JSON file beside the checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ddjax.training.manifest import write_atomically

FILE = "scores.json"
Best = Literal["min", "max"]


def best_of(best: Best | None, scores: Mapping[int, float]) -> int | None:
    """The step with the best score, the later of equals; None where there is none."""
    if best is None or not scores:
        return None
    sign = 1 if best == "min" else -1
    return min(scores, key=lambda step: (sign * scores[step], -step))


def read(directory: Path) -> tuple[Best | None, dict[int, float]]:
    """Which end of the scale is best, and the finite scores by step; nothing where the file is absent or damaged.

    A score is worth no error: without it a step is one that was not evaluated.
    """
    try:
        content = json.loads((directory / FILE).read_text(encoding="utf-8"))
        scores = {int(step): float(value) for step, value in content["scores"].items()}
        best = content["best"] if content["best"] in ("min", "max") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, {}
    return best, {step: value for step, value in scores.items() if math.isfinite(value)}


def write(directory: Path, best: Best, scores: Mapping[int, float]) -> None:
    """Write what `read` reads. Atomic."""
    content = {"best": best, "scores": {str(step): scores[step] for step in sorted(scores)}}
    write_atomically(directory / FILE, json.dumps(content).encode())
