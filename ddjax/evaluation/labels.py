"""Whether class-conditional samples look like their class to a classifier trained on real data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float, Int


def label_accuracy(
    real: Float[np.ndarray, train * sites],
    real_labels: Int[np.ndarray, " train"],
    samples: Float[np.ndarray, n * sites],
    labels: Int[np.ndarray, " n"],
    *,
    gamma: float | Literal["scale", "auto"] = "scale",
) -> float:
    """The fraction of `samples` that a support vector classifier, fitted on `real`, gives their own label.

    real, samples: any units, the same for both. For small images: the fit is quadratic in `train`.
    gamma: scikit-learn's (`SVC`); "scale" goes by the number of sites and their variance, whatever the units.
    """
    if len(samples) != len(labels) or len(real) != len(real_labels):
        raise ValueError(
            f"{len(real)} real states with {len(real_labels)} labels, {len(samples)} samples with {len(labels)} labels"
        )
    return float(np.mean(label_reader(real, real_labels, gamma=gamma)(samples) == labels))


def label_reader(
    real: Float[np.ndarray, train * sites],
    real_labels: Int[np.ndarray, " train"],
    *,
    gamma: float | Literal["scale", "auto"] = "scale",
) -> Callable[[Float[np.ndarray, n * sites]], Int[np.ndarray, " n"]]:
    """What reads the labels of samples: `label_accuracy`'s classifier, fitted once. Arguments as there."""
    from sklearn.svm import SVC  # here: scikit-learn takes a second to import

    judge = SVC(gamma=gamma).fit(np.asarray(real).reshape(len(real), -1), real_labels)
    return lambda samples: judge.predict(np.asarray(samples).reshape(len(samples), -1))


def label_judge(
    real: Float[np.ndarray, train * sites], real_labels: Int[np.ndarray, " train"]
) -> Callable[[np.ndarray, np.ndarray], Float[np.ndarray, " n"]]:
    """A judge of samples: `judge(samples, labels)` is the log-probability of each one's own label, nats.

    By logistic regression fitted on `real`, in units of its standard deviation. Raises ValueError, when asked, for
    labels that are not among `real_labels`.
    """
    from sklearn.linear_model import LogisticRegression  # here: scikit-learn takes a second to import

    if len(real) != len(real_labels):
        raise ValueError(f"{len(real)} real states with {len(real_labels)} labels")
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1) / std  # noqa: E731
    std = max(float(np.std(real)), 1e-12)
    fitted = LogisticRegression(max_iter=1000).fit(flat(real), real_labels)

    def judge(samples: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if len(strange := np.setdiff1d(labels, fitted.classes_)):
            raise ValueError(f"the label {strange[0]} is not among the real ones, {fitted.classes_}")
        log_p = fitted.predict_log_proba(flat(samples))
        return log_p[np.arange(len(labels)), np.searchsorted(fitted.classes_, labels)]

    return judge
