"""Guidance: from denoisers to a denoiser."""

from ddjax.guidance.classifier_free import ClassifierFree, classifier_free

__all__ = ["ClassifierFree", "classifier_free"]
