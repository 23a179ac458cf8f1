"""A trained network as a file that runs without netfission: ONNX, or PyTorch's own."""

from netfission.export.write import Exported, export, export_reduced

__all__ = ["Exported", "export", "export_reduced"]
