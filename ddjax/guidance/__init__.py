"""Guidance: from denoisers to a denoiser."""

from ddjax.guidance.classifier_free import ClassifierFree, Contrasted, classifier_free, contrasted
from ddjax.guidance.regressor import Regressed, regressed

__all__ = ["ClassifierFree", "Contrasted", "Regressed", "classifier_free", "contrasted", "regressed"]
