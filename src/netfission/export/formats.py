"""What all export formats have in common."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

Metadata = Mapping[str, Any]  # of types that JSON has
Runner = Callable[..., dict[str, Tensor]]  # inputs by name → outputs by name

FORMATS = {".onnx": "onnx", ".pt2": "pt2"}  # by the suffix of a file
METADATA_KEY = "netfission"  # under which a file keeps its metadata, as JSON


class ExportedModel(Protocol):
    """A module in an export format."""

    def to_bytes(self, metadata: Metadata) -> bytes:
        """Return the contents of the file."""

    def load(self, content: bytes) -> Runner:
        """Load the contents of a file in the runtime of its format, on the CPU."""
