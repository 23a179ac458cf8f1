"""The README of a shared network: what it is, how to use it, how accurate and how well calibrated it is."""

from pathlib import Path

import yaml

from netfission.classifier.folder import NetworkSpec
from netfission.config import RunConfig
from netfission.evaluation import Evaluation
from netfission.evaluation.calibration import Calibration
from netfission.utils.text import as_markdown, decimal, percent, printable

_SHOWN = {"top1": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier score"}
_CLASSES = 20  # named in full


def model_card(
    spec: NetworkSpec,
    calibration: Calibration | None = None,
    evaluation: Evaluation | None = None,
    recipe: RunConfig | None = None,
) -> str:
    """Write the README of a network: Markdown with the hub's YAML header.

    Args:
        spec: description of the network.
        calibration: calibration of its probabilities, if any.
        evaluation: metrics on a test split, if known.
        recipe: the settings it was trained with, if known.

    Example:
        >>> spec = NetworkSpec("wrn-10-1", ["cat", "dog"], [3, 8, 8], [0.5] * 3, [0.2] * 3,
        ...                    fission={"exits": 2, "grouping": "copies"}, netfission="0.1.0")
        >>> "# wrn-10-1, 2 exits by copies" in model_card(spec).splitlines()
        True
    """
    header = {
        "library_name": "netfission",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "ensemble", "uncertainty", "calibration"],
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {_title(spec)}",
        _what_it_is(spec),
        _use(spec),
    ]
    if evaluation is not None:
        parts.append(_figures(evaluation, recipe, spec.linear))
    if calibration is not None:
        parts.append(_calibrated(calibration))
    if recipe is not None:
        parts.append(_recipe(recipe))
    return "\n\n".join(parts) + "\n"


def _title(spec: NetworkSpec) -> str:
    return f"{as_markdown(spec.model or 'Unnamed network')}, {spec.kind}"


def _what_it_is(spec: NetworkSpec) -> str:
    channels, height, width = spec.shape
    names = ", ".join(map(as_markdown, spec.classes[:_CLASSES])) + (
        ", …" if len(spec.classes) > _CLASSES else ""
    )
    return (
        "An image classifier that averages several predictions; their disagreement measures its "
        f"uncertainty. Images are {channels}×{height}×{width}. There are {len(spec.classes)} "
        f"classes: {names}. Made with netfission {spec.netfission}."
    )


def _use(spec: NetworkSpec) -> str:
    factory = "" if spec.model else ", factory=make_model"
    return f"""## Use

```python
import torch
import netfission as nf
from PIL import Image

classifier = nf.Classifier.from_pretrained("FOLDER OR REPOSITORY"{factory})
predictions = classifier.predict(torch.stack([classifier.pixels(Image.open("image.jpg"))]))
print(classifier.spec.classes[predictions.classes[0]], predictions.confidence[0], predictions.disagreement[0])
```"""


def _figures(evaluation: Evaluation, recipe: RunConfig | None, linear: int) -> str:
    data = f" of {as_markdown(Path(recipe.data.data).name)}" if recipe else ""
    rows = evaluation.by_exit(linear)
    rows["**ensemble**"] = evaluation.ensemble
    lines = ["| | " + " | ".join(_SHOWN.values()) + " |", "| --- |" + " --- |" * len(_SHOWN)]
    for name, metrics in rows.items():
        accuracy, ece = f"{percent(metrics['top1'])} %", f"{percent(metrics['ece'])} %"
        lines.append(
            f"| {name} | {accuracy} | {decimal(metrics['nll'], 4)} | {ece} | {metrics['brier']:.4f} |"
        )
    table = "\n".join(lines)
    return f"## Metrics\n\n{evaluation.n} images, test split{data}, before calibration.\n\n{table}"


def _calibrated(calibration: Calibration) -> str:
    raw, scaled = calibration.raw, calibration.scaled
    guess = f", {calibration.guess}" if calibration.guess else ""
    return (
        f"Probabilities are divided by a temperature of {calibration.temperature:.3f}, fit on "
        f"{calibration.images}{guess}, where it took NLL from {decimal(raw['nll'], 4)} to "
        f"{decimal(scaled['nll'], 4)} and ECE from {percent(raw['ece'])} % to {percent(scaled['ece'])} %."
    )


def _recipe(recipe: RunConfig) -> str:
    settings = recipe.to_dict() | {"data": printable(Path(recipe.data.data).name)}  # without its folder
    default = RunConfig().to_dict()
    changed = {name: value for name, value in settings.items() if value != default[name]}
    return f"## Training\n\n```yaml\n{yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)}```"
