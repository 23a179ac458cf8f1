"""What a file says about itself, so that it can be used without this project."""

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from netfission.classifier import Classifier

FORMAT = 1  # rises when what an older reader would misread is written


def metadata(classifier: Classifier) -> dict[str, Any]:
    """Classes, preprocessing and calibration of a classifier, as JSON takes them."""
    spec, calibration = classifier.spec, classifier.calibration
    channels, height, width = spec.shape
    return {
        "format": FORMAT,
        "netfission": version("netfission"),
        "model": spec.model,
        "method": spec.method.get("method", "fission"),
        "classes": spec.classes,
        "preprocessing": {
            "mode": "L" if channels == 1 else "RGB",
            "height": height,
            "width": width,
            "orientation": "upright, by the EXIF tag",
            "16 bits": "upper byte",
            "floating point": "times 255 where all values are in [0, 1], else clipped to [0, 255]",
            "transparency": "on white",
            "resizing": "scaled to cover height and width, bilinear with antialiasing; the centre is taken",
            "layout": "uint8 (batch, channels, height, width), 0 to 255",
            "normalisation": "in the graph: (pixel / 255 - mean) / std",
            "mean": spec.mean,
            "std": spec.std,
        },
        "temperature": classifier.temperature,
        # To abstain at a risk: answer where the largest probability is at least the last threshold whose
        # risk, the share of wrong answers on the validation split, is no more than that.
        "risk_coverage": None if calibration is None else asdict(calibration.risk_coverage),
    }
