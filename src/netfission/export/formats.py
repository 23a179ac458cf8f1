"""What the formats have in common."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

Metadata = Mapping[str, Any]  # of what JSON holds
Run = Callable[..., dict[str, Tensor]]  # inputs by name → outputs by name

KEY = "netfission"  # under which a file holds its metadata, as JSON


class Model(Protocol):
    """A module in a format."""

    def content(self, metadata: Metadata) -> bytes:
        """The file."""

    def load(self, content: bytes) -> Run:
        """The module in such a file, as its format's own runtime runs it on the CPU."""
