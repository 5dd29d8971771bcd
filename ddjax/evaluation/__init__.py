"""Judging samples."""

from ddjax.evaluation.labels import label_accuracy, label_judge, label_reader
from ddjax.evaluation.projection import ProjectionError, projection_error

__all__ = ["ProjectionError", "label_accuracy", "label_judge", "label_reader", "projection_error"]
