"""Export a trained network to a file that runs without netfission: ONNX, or PyTorch's own format."""

from netfission.export.reduced import export_reduced
from netfission.export.targets import export_targets
from netfission.export.write import ExportResult, export

__all__ = ["ExportResult", "export", "export_reduced", "export_targets"]
