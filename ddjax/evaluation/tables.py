"""Whether synthetic rows of a table are as useful as real ones, and no copies of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ddjax.data.columns import Columns, Table


class Utility(NamedTuple):
    """Of a model fitted on rows, scored on real ones that neither saw."""

    synthetic: float  # fitted on the synthetic rows
    real: float  # fitted on the real ones
    score: str  # "f1" (macro) for symbols, "r2" for numbers


def utility(columns: Columns, synthetic: Table, train: Table, test: Table, target: str, *, seed: int = 0) -> Utility:
    """Train on synthetic, test on real (Kotelnikov et al. 2023, TabDDPM, section 4, "machine learning efficiency").

    The model is scikit-learn's gradient boosting with its defaults (theirs CatBoost, tuned for each data set).

    target: the column that is predicted from the others: macro F1 where it is one of symbols, else R^2.
    Raises ValueError for a column that is not there.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.metrics import f1_score, r2_score

    if target not in columns.names:
        raise ValueError(f"no column {target!r}, only {', '.join(columns.names)}")
    number = target in columns.numbers

    def aims(table: Table) -> np.ndarray:
        return np.asarray(table[target], np.float64) if number else np.asarray(table[target], str)

    def score(table: Table) -> float:
        make: Any = HistGradientBoostingRegressor if number else HistGradientBoostingClassifier
        fitted = make(random_state=seed).fit(columns.features(table, [target]), aims(table))
        said = fitted.predict(columns.features(test, [target]))
        return float(r2_score(aims(test), said) if number else f1_score(aims(test), said, average="macro"))

    return Utility(score(synthetic), score(train), "r2" if number else "f1")


def nearest_record_distance(columns: Columns, synthetic: Table, real: Table) -> Float[np.ndarray, " n"]:
    """Each synthetic row's distance to the nearest real one (TabDDPM's DCR): 0 for a copy; compare medians.

    Euclidean in `Columns.features`, each of the two entries in which one-hot vectors differ counting half.
    """
    from sklearn.neighbors import NearestNeighbors

    width = len(columns.numbers)
    scale = lambda x: np.concatenate([x[:, :width], x[:, width:] / np.sqrt(2.0)], axis=1)  # noqa: E731
    fitted = NearestNeighbors(n_neighbors=1).fit(scale(columns.features(real)))
    return fitted.kneighbors(scale(columns.features(synthetic)))[0][:, 0]
