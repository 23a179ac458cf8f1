"""PyTorch's own format: `torch.export`, which torch alone loads and runs."""

import io
import json
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from netfission.export.formats import KEY, Metadata, Run
from netfission.export.predictor import exporting, traced


class Pt2Model:
    """A module as an exported program."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._program = program

    @classmethod
    def from_module(cls, module: nn.Module, inputs: Mapping[str, Tensor]) -> Self:
        """Export a module; see `traced`."""
        return cls(traced(module, inputs))

    def content(self, metadata: Metadata) -> bytes:
        """The file, its metadata as an extra file."""
        buffer = io.BytesIO()
        with exporting():
            torch.export.save(self._program, buffer, extra_files={f"{KEY}.json": json.dumps(metadata)})
        return buffer.getvalue()

    def load(self, content: bytes) -> Run:
        """The program in a file."""
        module = torch.export.load(io.BytesIO(content)).module()

        @torch.no_grad()
        def run(**inputs: Tensor) -> dict[str, Tensor]:
            outputs: dict[str, Tensor] = module(*inputs.values())
            return outputs

        return run
