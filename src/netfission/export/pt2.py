"""Export to PyTorch's own format, `torch.export`, which needs only torch to load and run."""

import io
import json
import warnings
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from netfission.export.formats import METADATA_KEY, Metadata, Runner
from netfission.export.predictor import export_errors, trace


class Pt2Model:
    """A module as an exported program."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._program = program

    @classmethod
    def from_module(cls, module: nn.Module, inputs: Mapping[str, Tensor]) -> Self:
        """Export a module; see `trace`."""
        return cls(trace(module, inputs))

    def to_bytes(self, metadata: Metadata) -> bytes:
        """Return the contents of the file, with its metadata as an extra file."""
        buffer = io.BytesIO()
        with export_errors():
            torch.export.save(
                self._program, buffer, extra_files={f"{METADATA_KEY}.json": json.dumps(metadata)}
            )
        return buffer.getvalue()

    def load(self, content: bytes) -> Runner:
        """Load the contents of a file."""
        with warnings.catch_warnings():
            # Of PyTorch 2.11: it reads the weights from bytes in place, and nobody writes to them.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            module = torch.export.load(io.BytesIO(content)).module()

        @torch.no_grad()
        def run(**inputs: Tensor) -> dict[str, Tensor]:
            outputs: dict[str, Tensor] = module(*inputs.values())
            return outputs

        return run
