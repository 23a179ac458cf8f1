"""Export a trained network to a file that runs without netfission: ONNX, or PyTorch's own format."""

from netfission.export.write import ExportResult, export, export_reduced

__all__ = ["ExportResult", "export", "export_reduced"]
