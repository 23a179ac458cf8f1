"""Answers for image files: found, read, predicted in batches, and written down as they come."""

from netfission.prediction.answers import Answer, Failure, answers, find_images
from netfission.prediction.writers import FORMATS, Layout, Writer

__all__ = ["FORMATS", "Answer", "Failure", "Layout", "Writer", "answers", "find_images"]
