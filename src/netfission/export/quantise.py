"""Quantise a network to integers of 8 bits."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from netfission.export.onnx import OnnxModel, import_package
from netfission.export.predictor import INPUT, export_errors

_BATCH = 16


def quantise(model: OnnxModel, images: Tensor) -> OnnxModel:
    """Quantise a network's weights and features to signed integers of 8 bits, with ONNX Runtime.

    Quantisation is static: the scale of features is their range on calibration images, and each channel of a
    weight has its own scale. Normalisation, and everything that follows the logits, stays in float32.

    Args:
        model: made from a `Predictor`; not changed.
        images: training images to calibrate with, uint8 `(n, channels, height, width)`.

    Raises:
        RuntimeError: ONNX Runtime cannot quantise the network.
    """
    quantization, onnx = import_package("onnxruntime.quantization"), import_package("onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(images.split(_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            pixels = next(self._batches, None)
            return None if pixels is None else {INPUT: pixels.numpy()}

    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    with tempfile.TemporaryDirectory() as folder, export_errors(), _without_remarks():
        file = Path(folder) / "model.onnx"
        quantization.quantize_static(
            proto,
            file,
            Reader(),
            per_channel=True,
            nodes_to_exclude=model.nodes_outside_network(),
        )
        return OnnxModel(onnx.load(file))


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence remarks on preparations that the exporter has made already."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
