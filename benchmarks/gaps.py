"""Print the table of measured gaps in docs/methods.md: `python benchmarks/gaps.py` (float64, CPU, ten minutes).

The large law is tried with one kind of prediction for each process.
"""

import dataclasses
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_X64"] = "1"
# The table of pairs and what they must be by definition are the tests'.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

from pairs import CHAINS, CONTINUOUS, LOOSE, by_definition, exact_gap, nelbo
from trained import OBJECTIVES, exact_trained_gap, trained_gap

from ddjax.fixtures import Categorical

SMALL, LARGE = Categorical(2, 3), Categorical(3, 5)


def row(*cells):
    print("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:+.0e}" for cell in cells) + " |", flush=True)


def exact(pair, law):
    """NELBO - H with the exact denoiser, less what an imperfect prior costs."""
    return nelbo(pair, law, 0.0, pair.low) - by_definition(pair, law, 0.0).start()


def gaps(pair, large):
    """The table's three numbers."""
    wrong = nelbo(pair, SMALL, 1.0, pair.wide) - exact_gap(pair, SMALL, 1.0, pair.wide)
    if pair.times is None:
        few_nodes = dataclasses.replace(pair, order=min(pair.order, 12))  # 27,000 pairs of states for each
        return exact(pair, SMALL), exact(few_nodes, LARGE) if large else "", wrong
    return nelbo(pair, SMALL, 0.0, None), "", wrong


def main():
    row("process", "prediction", "bound or objective", "2x3", "3x5", "wrong denoiser: less the exact KL")
    row(*["---"] * 6)
    seen = set()
    for pair in (*CONTINUOUS, *CHAINS):
        row(pair.name, pair.kind, pair.bound, *gaps(pair, large=(pair.name, pair.bound) not in seen))
        seen.add((pair.name, pair.bound))
    for pair in LOOSE:
        row(pair.name, pair.kind, f"{pair.bound} (loose)", *gaps(pair, large=False)[:2], "dearer than it")
    for trained in OBJECTIVES:
        wrong = trained_gap(trained, 1.0) - exact_trained_gap(trained, 1.0)
        kind = trained.pair.kind + (", moved freely" if trained.free else "")
        row(trained.pair.name, kind, f"objective {trained.name}", trained_gap(trained, 0.0), "", wrong)


if __name__ == "__main__":
    main()
