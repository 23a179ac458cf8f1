"""Data sets in, device-ready batches out."""

from netfission.data.augment import Augmentation
from netfission.data.batches import Batches
from netfission.data.load import ImageData, load_data
from netfission.data.splits import Split, StreamedSplit, TensorSplit

__all__ = [
    "Augmentation",
    "Batches",
    "ImageData",
    "Split",
    "StreamedSplit",
    "TensorSplit",
    "load_data",
]
