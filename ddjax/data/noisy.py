"""Training data that were observed with noise, each item at a level of its own, for `objectives.ambient`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ddjax.data.dataset import Dataset, Source


class _Noisy:
    """See `noisy`."""

    def __init__(self, source: Source, sigma: float, share: float, seed: int):
        self._source, self._sigma, self._share, self._seed = source, sigma, share, seed

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: np.ndarray) -> dict[str, Any]:
        items = self._source[index]
        draws = [np.random.default_rng((self._seed, int(row))) for row in np.asarray(index)]
        seen = np.array([draw.random() < self._share for draw in draws])
        sigma = np.where(seen, self._sigma, 0.0).astype(np.float32)
        noise = np.stack([draw.standard_normal(items["x0"].shape[1:], np.float32) for draw in draws])
        x0 = items["x0"] + sigma.reshape(-1, *(1,) * (noise.ndim - 1)) * noise
        return {**items, "x0": x0, "cond": {"sigma": sigma, "cond": items.get("cond")}}


def noisy(data: Dataset, sigma: float, share: float = 1.0, seed: int = 0) -> Dataset:
    """The data, a share of the items seen through Gaussian noise of standard deviation sigma, the others clean.

    An item's noise is drawn once, by its row: it is the same in every epoch, so that nothing clean can be averaged out
    of it. Its level goes along, `cond = {"sigma": ..., "cond": its own}` (`objectives.with_noise_level`).
    Raises ValueError for tokens, a sigma that is not positive, or a share outside [0, 1].
    """
    if data.num_symbols is not None:
        raise ValueError(f"noise is added to continuous values, but the data {data.name!r} are tokens")
    if not (sigma > 0 and 0 <= share <= 1):
        raise ValueError(f"needs sigma > 0 and a share in [0, 1], got {sigma} and {share}")
    return dataclasses.replace(data, source=_Noisy(data.source, sigma, share, seed), levels=None)
