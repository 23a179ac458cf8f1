"""Export a cascade as one ONNX graph per exit, which a runtime runs one after another."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netfission.classifier import Classifier
from netfission.config import STOPS_EARLY
from netfission.data.batches import Normalisation
from netfission.ensemble import mean_logits, weights_of
from netfission.export.check import (
    TOLERANCE,
    check_batches,
    check_difference,
    check_images,
    largest_magnitude,
    with_progress,
)
from netfission.export.formats import Runner
from netfission.export.metadata import classifier_metadata
from netfission.export.onnx import OnnxModel
from netfission.export.predictor import INPUT, make_exportable
from netfission.inference.cascade import Cascade, Rule, exit_costs, step_by_step
from netfission.inference.thresholds import choose_thresholds
from netfission.network import FissionNetwork
from netfission.surgery.features import Features
from netfission.utils.checksums import parse_json
from netfission.utils.errors import invalid
from netfission.utils.files import write_together

INDEX = "cascade.json"
TARGET = ("max_accuracy_drop", "max_cost", "delta", "validation_images")
MAX_ACCURACY_DROP = 0.2  # percentage points, if `netfission evaluate --cascade` chose no thresholds


@dataclass(frozen=True)
class Plan:
    """The order of a cascade's exits, and when an image stops.

    Attributes:
        order: numbers of the exits in the order in which they run.
        thresholds: one per exit but the last; an image stops if its confidence is above it.
        rule: definition of confidence, see `netfission.inference.cascade_confidence`.
        target: what the thresholds were chosen for: `TARGET`, as attributes of `CascadeEvaluation`.

    Example:
        >>> plan = Plan(order=(0, 2, 1), thresholds=(0.8, 0.6), rule="margin")
        >>> len(plan.thresholds) == len(plan.order) - 1
        True
    """

    order: Sequence[int]
    thresholds: Sequence[float]
    rule: Rule
    target: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, weights: str) -> "Plan":
        """Read what `netfission evaluate --cascade` chose.

        Args:
            path: of the file.
            weights: SHA-256 of the network's weights.

        Raises:
            ValueError: the file is not its output, or of a network with other weights.
        """
        try:
            written = parse_json(path.read_bytes())
            target = {name: written.get(name) for name in TARGET}  # a file of an earlier version lacks some
            plan = cls(written["order"], written["choice"]["thresholds"], written["rule"], target)
            of_this = written.get("weights", weights) == weights  # a file of an earlier version has none
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected, found = "a file written by netfission evaluate --cascade", "other content"
            raise invalid(str(path), expected, found=found) from error
        if not of_this:
            hint = "`netfission evaluate RUN --cascade` chooses thresholds anew"
            raise invalid(str(path), "of this network", found="one of another network", hint=hint)
        return plan

    @classmethod
    def choose(cls, classifier: Classifier, validation: Iterable[tuple[Tensor, Tensor]]) -> "Plan":
        """Choose the thresholds of least cost that lose at most 0.2 percentage points of accuracy.

        Args:
            classifier: of a `FissionNetwork`.
            validation: pixels, uint8 `(batch, channels, height, width)`, and labels `(batch,)`.
        """
        network: Any = classifier.network
        costs = exit_costs(network, torch.zeros(1, *classifier.spec.shape))
        answers = [
            (classifier.logits(pixels), labels) for pixels, labels in with_progress(validation, "choosing")
        ]
        logits, labels = (torch.cat(parts) for parts in zip(*answers, strict=True))
        choice = choose_thresholds(
            logits,
            labels,
            costs.dense,
            order=costs.order,
            weights=network.exit_weights,
            max_accuracy_drop=MAX_ACCURACY_DROP,
        )
        target = dict.fromkeys(TARGET) | {
            "max_accuracy_drop": MAX_ACCURACY_DROP,
            "validation_images": len(labels),
        }
        return cls(costs.order, choice.thresholds, "margin", target)


def check_cascade(classifier: Classifier) -> None:
    """Raise ValueError unless a network has two exits or more that run one after another."""
    network, method = classifier.network, classifier.spec.method_name
    if method not in STOPS_EARLY or not isinstance(network, FissionNetwork) or network.exits == 1:
        found = "one exit" if method in STOPS_EARLY else f"method={method}"
        methods = " or ".join(sorted(STOPS_EARLY))
        raise invalid("run", f"of method={methods} with two exits or more to export a cascade", found=found)


class Step(nn.Module):
    """One exit of a cascade: the features it starts from → its prediction and features for later exits.

    All inputs and outputs have one row per image that continues.

    Args:
        cascade: of an exportable network, see `make_exportable`.
        step: position of the exit in the order.
        normalise: pixels → normalised images, float32.
        temperature: divisor of the mean logits.

    Attributes:
        inputs: names. The first step has `images`; others have `features_D` after D stages, and `logits_N`
            of the N exits before, `(batch, N, classes)`.
        outputs: names. `probabilities` `(batch, classes)`, `classes` `(batch,)` and `confidence` `(batch,)`
            are those of the ensemble of the exits so far; `logits_N` includes this exit's; `features_D` are
            new features.
        keeps: names of the inputs and outputs so far that later steps need.
    """

    def __init__(self, cascade: Cascade, step: int, normalise: Normalisation, temperature: float) -> None:
        super().__init__()
        self.cascade = cascade
        self.step = step
        self.normalise = normalise
        self.temperature = temperature
        kept = cascade.kept_depths[step]
        self.inputs, self._start = [INPUT], 0
        new = set(kept)
        if step:
            before = cascade.kept_depths[step - 1]
            self._start = min(cascade.branch_depths[cascade.order[step]], max(before))
            self.inputs = [f"features_{self._start}", f"logits_{step}"]
            new -= before
        self._new_depths = sorted(new)
        self.outputs = ["probabilities", "classes", "confidence", f"logits_{step + 1}"]
        self.outputs += [f"features_{depth}" for depth in self._new_depths]
        self.keeps = [f"logits_{step + 1}", *(f"features_{depth}" for depth in sorted(kept))]
        if step + 1 == len(cascade.order):
            self.keeps = []
        # Of the exits so far, in the order they run.
        weights = cascade.network.exit_weights
        self._weights = weights and [weights[number] for number in cascade.order[: step + 1]]
        self.training = cascade.training

    def forward(self, start: Tensor, before: Tensor | None = None) -> dict[str, Tensor]:
        """Return outputs by name from inputs in their order."""
        exit_logits = [] if before is None else list(before.unbind(dim=1))
        if before is None:
            start = self.cascade.network.stem(self.normalise(start))
        features: dict[int, Features] = {self._start: start}
        exit_logits.append(self.cascade.run_exit(self.step, features))
        logits = torch.stack(exit_logits, dim=1)
        mean = mean_logits(logits, self._weights)
        probabilities = (mean / self.temperature).softmax(dim=1)
        confidence = self.cascade.confidence(exit_logits, mean)
        new_features = (_one_tensor(features[depth]) for depth in self._new_depths)
        outputs = [probabilities, mean.argmax(dim=1), confidence, logits, *new_features]
        return dict(zip(self.outputs, outputs, strict=True))


def _one_tensor(features: Features) -> Tensor:
    if isinstance(features, tuple):
        expected = "of a network whose stages give one tensor each to export a cascade"
        found = f"stages that give {len(features)} tensors"
        raise invalid("run", expected, found=found, hint="export the whole network")
    return features


def export_cascade(
    classifier: Classifier, plan: Plan, folder: Path, images: Tensor, opset: int | None = None
) -> float:
    """Write one graph per exit into a folder, and `cascade.json`, which describes how to run them.

    Args:
        classifier: on the CPU, see `check_cascade`.
        plan: order of the exits, and when to stop.
        folder: created if it does not exist.
        images: real images to check the graphs with, uint8 `(n, channels, height, width)`.
        opset: version of ONNX's operators, 18 to 23; default 20.

    Returns:
        The largest difference of a probability or of a confidence.

    Raises:
        ValueError: the plan does not fit the network, or the images do not.
        RuntimeError: the network cannot be exported, or a probability differs by more than 1e-4. Nothing is
            written then.
        OSError: the folder cannot be written.
    """
    check_images(classifier, images)
    normalise = Normalisation(classifier.spec.mean, classifier.spec.std)
    network: Any = make_exportable(classifier.network, torch.zeros(2, *classifier.spec.shape))
    cascade = Cascade(network, plan.thresholds, order=plan.order, rule=plan.rule)
    steps = [Step(cascade, number, normalise, classifier.temperature) for number in range(network.exits)]
    example = torch.zeros(2, *classifier.spec.shape, dtype=torch.uint8)
    state = {INPUT: example}
    files: dict[str, bytes] = {}
    runners: list[Runner] = []
    for step in steps:
        inputs = {name: state[name] for name in step.inputs}
        model = OnnxModel.from_module(step, inputs, opset)
        files[f"step{step.step}.onnx"] = model.to_bytes({})
        runners.append(model.load(files[f"step{step.step}.onnx"]))
        state |= step(*inputs.values())
    difference = largest_magnitude(
        [
            tensor
            for pixels in check_batches(images, "checking")
            for tensor in _differences(classifier, plan, steps, runners, pixels)
        ]
    )
    check_difference(difference, len(images))
    checked = {"images": len(images), "difference": difference, "tolerance": TOLERANCE}
    index = classifier_metadata(classifier) | {
        "checked": checked,
        "rule": plan.rule,
        "target": dict(plan.target),
        "steps": _index(plan, steps),
    }
    folder.mkdir(exist_ok=True)
    graphs: dict[Path, str | bytes] = {folder / name: content for name, content in files.items()}
    index_file = {folder / INDEX: json.dumps(index, indent=1, ensure_ascii=False) + "\n"}
    # If there is an index, then the graphs that it names are there, and are of the same network.
    write_together(graphs | index_file, removed=index_file)
    return difference


def _index(plan: Plan, steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [
        {
            "file": f"step{step.step}.onnx",
            "exit": number,
            "threshold": threshold,
            "inputs": step.inputs,
            "outputs": step.outputs,
            "keeps": step.keeps,
        }
        for step, number, threshold in zip(steps, plan.order, [*plan.thresholds, None], strict=True)
    ]


def _differences(
    classifier: Classifier, plan: Plan, steps: Sequence[Step], runners: Sequence[Runner], pixels: Tensor
) -> list[Tensor]:
    """Return the differences of probabilities and confidence if no image stops."""
    means, scores = step_by_step(
        classifier.logits(pixels), plan.order, plan.rule, weights_of(classifier.spec.average)
    )
    probabilities = (means / classifier.temperature).softmax(dim=2)
    state: Mapping[str, Tensor] = {INPUT: pixels}
    differences = []
    for step, run in zip(steps, runners, strict=True):
        state = {**state, **run(**{name: state[name] for name in step.inputs})}
        differences.append(state["probabilities"] - probabilities[:, step.step])
        if step.keeps:
            differences.append(state["confidence"] - scores[:, step.step])
        state = {name: state[name] for name in step.keeps}
    return differences
