"""Export to ONNX, which many runtimes run on many devices."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from netfission.export.formats import METADATA_KEY, Metadata, Runner
from netfission.export.predictor import batch_shapes, export_errors, trace
from netfission.utils.errors import invalid
from netfission.utils.extras import extra

if TYPE_CHECKING:
    from onnx import ModelProto

OPSETS = range(18, 24)  # that PyTorch's exporter supports
OPSET = 20
_OUTPUT = "output of "  # before the names of outputs, until the names within the graph are known
_SCOPES = "pkg.torch.onnx.name_scopes"  # under which the exporter keeps the module that a node comes from


@dataclass(frozen=True)
class OnnxModel:
    """A module as an ONNX graph.

    Attributes:
        proto: the graph.
    """

    proto: "ModelProto"

    @classmethod
    def from_module(cls, module: nn.Module, inputs: Mapping[str, Tensor], opset: int | None = None) -> Self:
        """Export a module.

        Args:
            module: see `trace`; returns outputs by name.
            inputs: see `trace`.
            opset: version of the operators; default 20.

        Raises:
            ValueError: the opset is not supported.
            MissingExtraError: a package is not installed.
            RuntimeError: the module cannot be exported.
        """
        opset = OPSET if opset is None else opset
        check_onnx(opset)
        program = trace(module, inputs)
        names = list(module(*inputs.values()))
        with export_errors(), torch.no_grad():
            exported = torch.onnx.export(
                program,
                input_names=list(inputs),
                output_names=[_OUTPUT + name for name in names],
                opset_version=opset,
                dynamic_shapes=batch_shapes(module, len(inputs), torch.export.Dim("batch")),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            assert exported is not None
            proto = exported.model_proto
        (found,) = (entry.version for entry in proto.opset_import if entry.domain == "")
        if found != opset:
            raise RuntimeError(f"the network cannot be exported with opset {opset}; pass opset {found}")
        for name in names:  # an operation such as a mean has its own name for what it gives
            _rename(proto.graph, name, f"{name}_within")
            _rename(proto.graph, _OUTPUT + name, name)
        return cls(proto)

    def nodes_outside_network(self) -> list[str]:
        """Return the names of the nodes that do not come from the module's attribute `network`."""
        return [node.name for node in self.proto.graph.node if "'network'" not in _scopes(node)]

    def to_bytes(self, metadata: Metadata) -> bytes:
        """Return the contents of the file, with its metadata as a property of the model."""
        onnx = import_package("onnx")
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(metadata, ensure_ascii=False)})
        content: bytes = proto.SerializeToString()
        return content

    def load(self, content: bytes) -> Runner:
        """Load the contents of a file in ONNX Runtime."""
        onnxruntime = import_package("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(**inputs: Tensor) -> dict[str, Tensor]:
            arrays = session.run(names, {name: value.numpy() for name, value in inputs.items()})
            return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

        return run


def _rename(graph: Any, name: str, new: str) -> None:
    """Rename a value in a graph and in those within its nodes."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        if value.name == name:
            value.name = new
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [new if value == name else value for value in values]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, name, new)


def check_onnx(opset: int) -> None:
    """Raise ValueError unless the opset is supported, MissingExtraError unless all packages are installed."""
    if opset not in OPSETS:
        raise invalid("opset", f"an integer from {OPSETS[0]} to {OPSETS[-1]}", opset)
    for package in ("onnx", "onnxruntime", "onnxscript"):
        import_package(package)


def import_package(module: str) -> Any:
    """Import a module of the packages that ONNX needs; raise MissingExtraError if it is not installed."""
    with extra("export", "format 'onnx'"):
        return importlib.import_module(module)


def _scopes(node: Any) -> str:
    """Return the modules that a node comes from, as text."""
    return next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
