"""Predictions for image files: found, read, predicted in batches, and written as text."""

from netfission.prediction.images import Failure, ImagePrediction, find_images, predict_images
from netfission.prediction.writers import FORMATS, Layout, Writer

__all__ = ["FORMATS", "Failure", "ImagePrediction", "Layout", "Writer", "find_images", "predict_images"]
