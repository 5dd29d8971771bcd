"""Judging samples."""

from ddjax.evaluation.labels import label_accuracy, label_judge, label_reader
from ddjax.evaluation.projection import ProjectionError, projection_error
from ddjax.evaluation.tables import Utility, nearest_record_distance, utility

__all__ = [
    "ProjectionError",
    "Utility",
    "label_accuracy",
    "label_judge",
    "label_reader",
    "nearest_record_distance",
    "projection_error",
    "utility",
]
