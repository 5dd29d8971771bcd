"""Guidance: from denoisers to a denoiser."""

from ddjax.guidance.attention import PerturbedAttention, SelfAttention, perturbed_attention, self_attention
from ddjax.guidance.classifier_free import ClassifierFree, Contrasted, classifier_free, contrasted
from ddjax.guidance.networks import ByClassifier, ByWeaker, GuidedMean, by_classifier, by_weaker
from ddjax.guidance.regressor import Regressed, regressed

__all__ = [
    "ByClassifier",
    "ByWeaker",
    "ClassifierFree",
    "Contrasted",
    "GuidedMean",
    "PerturbedAttention",
    "Regressed",
    "SelfAttention",
    "by_classifier",
    "by_weaker",
    "classifier_free",
    "contrasted",
    "perturbed_attention",
    "regressed",
    "self_attention",
]
