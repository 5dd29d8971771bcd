"""Mini-batch optimal transport: pair every item of a batch with a draw of noise that is near it.

Straight paths between such pairs cross less, so that fewer steps follow the flow (Tong et al. 2024, "Improving and
generalizing flow-based generative models with minibatch optimal transport"; Pooladian et al. 2023). The plan is exact
(SciPy's `linear_sum_assignment`, cubic in the size of a group), computed on the host while the device trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ddjax.data.pipeline import Batches

Source = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]  # (generator, shape) -> x1


def assignment(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
    """The permutation p that makes the sum of |x0[i] - x1[p[i]]|^2 least. Raises ValueError for different shapes."""
    from scipy.optimize import linear_sum_assignment

    if x0.shape != x1.shape:
        raise ValueError(f"both ends must have one shape, got {x0.shape} and {x1.shape}")
    a, b = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (x0, x1))
    # |a|^2 and |b|^2 cost the same under every permutation.
    return linear_sum_assignment(-a @ b.T)[1]


def gaussian_source(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normals, float32."""
    return rng.standard_normal(shape, np.float32)


class Transported(Iterator[dict[str, Any]]):
    """Batches whose items come with x1, for `objectives.paired`: `cond = {"x1": ..., "cond": the batch's own}`.

    Items are paired within groups of `group` consecutive rows of the global batch, with draws that depend on the seed,
    the batch's number and the group's alone. So a run on many hosts, each of which has whole groups, sees the pairs
    that one host would, and a resumed one those that it would have seen. A larger group comes closer to the optimal
    plan between the two laws; a group larger than one host's rows would have to move data between hosts.

    batches: from `ddjax.data.batches`. group: items paired with each other. seed: of the draws. source: draws x1.
    process_index: as given to `batches`.
    Raises ValueError where a host's rows are no whole number of groups.
    """

    def __init__(
        self, batches: Batches, *, group: int, seed: int, source: Source = gaussian_source, process_index: int = 0
    ):
        if group < 1:
            raise ValueError(f"group must be at least 1, got {group}")
        self._batches, self._group, self._seed = batches, group, seed
        self._source, self._process = source, process_index

    def __next__(self) -> dict[str, Any]:
        number = self.get_state()["next_index"]
        batch = next(self._batches)
        x0 = np.asarray(batch["x0"])
        if len(x0) % self._group:
            raise ValueError(f"{len(x0)} rows on this host are no multiple of group={self._group}: groups are whole")
        groups = len(x0) // self._group
        x1 = [self._pair(number, self._process * groups + i, part) for i, part in enumerate(np.split(x0, groups))]
        return {**batch, "cond": {"x1": np.concatenate(x1), "cond": batch.get("cond")}}

    def _pair(self, number: int, group: int, x0: np.ndarray) -> np.ndarray:
        x1 = self._source(np.random.default_rng((self._seed, number, group)), x0.shape)
        return x1[assignment(x0, x1)]

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands: that of `batches`."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        self._batches.set_state(state)
