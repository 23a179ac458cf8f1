"""The metadata of an exported file, with which it can be used without netfission."""

import math
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from netfission.classifier import AnswerLimits, Classifier, Predictor
from netfission.classifier.folder import NetworkSpec

FORMAT = 1  # increases when an older reader would misread the metadata


def promises_metadata(classifier: Classifier, limits: AnswerLimits) -> dict[str, Any]:
    """Return what the outputs of an exported file promise, and by which numbers, of types that JSON has.

    A quantile is None if it is infinite: the class is in every set.
    """
    calibration, detector = classifier.calibration, limits.detector
    above = math.inf if detector is None else detector.alarm_above
    return {
        "risk": limits.risk,
        "delta": limits.delta,
        "threshold": limits.threshold,  # of the largest probability
        "threshold_temperature": classifier.temperature if limits.delta is None else 1.0,
        "coverage": limits.coverage,
        "score": limits.score,
        "class_wise": limits.class_wise,
        "quantiles": [value if math.isfinite(value) else None for value in limits.quantiles],
        "accept_false_alarms": limits.accept_false_alarms,
        "detector": None if detector is None else detector.score,
        "alarm_above": above if math.isfinite(above) else None,
        "calibration_images": 0 if calibration is None else calibration.n,
        "calibrated_on": None if calibration is None else calibration.fitted_on,
    }


def classifier_metadata(classifier: Classifier) -> dict[str, Any]:
    """Return classes, preprocessing and calibration of a classifier, of types that JSON has.

    Example:
        >>> import netfission as nf, torch
        >>> from netfission.models import create_model
        >>> network = nf.fission(create_model("wrn-10-1", 2), 2, example_input=torch.zeros(2, 3, 16, 16))
        >>> classifier = nf.Classifier.from_network(
        ...     network, model=None, classes=["cat", "dog"], shape=(3, 16, 16), mean=[0.5] * 3, std=[0.2] * 3
        ... )
        >>> classifier_metadata(classifier)["classes"]
        ['cat', 'dog']
    """
    calibration = classifier.calibration
    return network_metadata(classifier.spec) | {
        "temperature": classifier.temperature,
        "calibration": None if calibration is None else calibration.digest,
        # To abstain at a target risk: answer if the largest probability is at least the last threshold whose
        # risk, the share of wrong answers on the validation split, is at most the target.
        "risk_coverage": None if calibration is None else asdict(calibration.risk_coverage),
    }


def target_metadata(predictor: Predictor, coverage: float | None) -> dict[str, Any]:
    """Return names, preprocessing and calibration of a network of another task, of types that JSON has."""
    calibration = predictor.calibration
    learned = {} if calibration is None else asdict(calibration)
    for of_all_images in ("errors", "uncertainty"):
        learned.pop(of_all_images, None)
    metadata = network_metadata(predictor.spec)
    if not predictor.task.crops:
        metadata["preprocessing"]["crops"] = False
        metadata["preprocessing"]["resizing"] = (
            "scaled to fit into height and width, bilinear with antialiasing; black at the right or below"
        )
    return metadata | {
        "task": predictor.task.name,
        "scale": predictor.task.scale,
        "calibration": learned or None,
        "calibration_digest": None if calibration is None else calibration.digest,
        "coverage": coverage,
    }


def network_metadata(spec: NetworkSpec) -> dict[str, Any]:
    """Return classes and preprocessing of a network, of types that JSON has."""
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
            "floating point": "times 255 if all values are in [0, 1], else clipped to [0, 255]",
            "transparency": "on white",
            "crops": True,
            "resizing": "scaled to cover height and width, bilinear with antialiasing; cropped at the centre",
            "layout": "uint8 (batch, channels, height, width), 0 to 255",
            "normalisation": "in the graph: (pixel / 255 - mean) / std",
            "mean": spec.mean,
            "std": spec.std,
        },
    }
