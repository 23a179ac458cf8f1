"""Eight-bit integers in place of floats."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from netfission.export.onnx import OnnxModel, needed
from netfission.export.predictor import INPUT, exporting

_BATCH = 16


def quantise(model: OnnxModel, images: Tensor) -> OnnxModel:
    """A network's weights and features as signed integers of 8 bits, by ONNX Runtime.

    Static quantisation: of features by the range they take on calibration images, of weights channel by
    channel. Normalisation of images, and probabilities and uncertainty from the logits, stay as they are.

    Args:
        model: a `Predictor`.
        images: uint8 `(n, channels, height, width)`, to calibrate with; of the training split.

    Raises:
        RuntimeError: it cannot be quantised.
    """
    quantization, onnx = needed("onnxruntime.quantization"), needed("onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(images.split(_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            pixels = next(self._batches, None)
            return None if pixels is None else {INPUT: pixels.numpy()}

    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    with tempfile.TemporaryDirectory() as folder, exporting(), _quietly():
        file = Path(folder) / "model.onnx"
        quantization.quantize_static(
            proto,
            file,
            Reader(),
            per_channel=True,
            nodes_to_exclude=model.around_network(),
        )
        return OnnxModel(onnx.load(file))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without remarks on preparations that the exporter has made already."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
