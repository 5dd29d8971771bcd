"""Judging samples."""

from ddjax.evaluation.labels import label_accuracy

__all__ = ["label_accuracy"]
