"""Judging samples."""

from ddjax.evaluation.labels import label_accuracy, label_reader

__all__ = ["label_accuracy", "label_reader"]
