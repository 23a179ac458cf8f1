"""Export a cascade as one ONNX graph per exit, which a runtime runs one after another."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from netfission.classifier import Classifier, Predictor
from netfission.config import STOPS_EARLY
from netfission.data.batches import Normalisation
from netfission.evaluation.target_cascade import choose_for_images
from netfission.export.cascade_answers import StepAnswers, answers_of
from netfission.export.check import (
    TOLERANCE,
    check_batches,
    check_difference,
    check_images,
    largest_magnitude,
    with_progress,
)
from netfission.export.formats import Runner
from netfission.export.metadata import classifier_metadata, target_metadata
from netfission.export.onnx import OnnxModel
from netfission.export.predictor import INPUT, make_exportable
from netfission.inference.cascade import RULES, Cascade, Rule, exit_costs
from netfission.inference.thresholds import choose_thresholds
from netfission.network import FissionNetwork
from netfission.surgery.features import Features, tensors_of
from netfission.utils.checksums import parse_json
from netfission.utils.errors import check_choice, invalid
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
        rule: name of the confidence, see `netfission.inference.cascade_confidence`, or
            `netfission.tasks.early_exit.EarlyExit` of other tasks.
        target: what the thresholds were chosen for: `TARGET`, as attributes of `CascadeEvaluation`.

    Example:
        >>> plan = Plan(order=(0, 2, 1), thresholds=(0.8, 0.6), rule="margin")
        >>> len(plan.thresholds) == len(plan.order) - 1
        True
    """

    order: Sequence[int]
    thresholds: Sequence[float]
    rule: str
    target: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, weights: str) -> "Plan":
        """Read what `netfission evaluate --cascade` chose.

        Args:
            path: of the file.
            weights: SHA-256 of the network's weights.

        Raises:
            ValueError: the file is not its output, of a network with other weights, or of tiles.
        """
        try:
            written = parse_json(path.read_bytes())
            target = {name: written.get(name) for name in TARGET}  # a file of an earlier version lacks some
            plan = cls(written["order"], written["choice"]["thresholds"], written["rule"], target)
            of_this = written.get("weights", weights) == weights  # a file of an earlier version has none
            tile = written.get("tile")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected, found = "a file written by netfission evaluate --cascade", "other content"
            raise invalid(str(path), expected, found=found) from error
        if not of_this:
            hint = "`netfission evaluate RUN --cascade` chooses thresholds anew"
            raise invalid(str(path), "of this network", found="one of another network", hint=hint)
        if tile is not None:
            hint = "`netfission evaluate RUN --cascade` without --tile chooses such thresholds"
            expected = "of whole images, which an exported cascade runs"
            raise invalid(str(path), expected, found=f"one of tiles of {tile} pixels", hint=hint)
        return plan

    @classmethod
    def choose(cls, network: Classifier | Predictor, validation: Iterable[tuple[Tensor, Tensor]]) -> "Plan":
        """Choose the thresholds of least cost that lose at most 0.2 points of accuracy, or of the measure.

        Args:
            network: a classifier or a network of another task, of a `FissionNetwork`.
            validation: pixels, uint8 `(batch, channels, height, width)`, and targets of the batch.
        """
        early_exit = network.spec.find_task().early_exit()
        fission: Any = network.network
        image = torch.zeros(1, *network.spec.shape)
        if early_exit is not None:
            normalise = Normalisation(network.spec.mean, network.spec.std)
            batches = (
                (normalise(pixels), targets.long() if targets.dtype == torch.uint8 else targets)
                for pixels, targets in with_progress(validation, "choosing")
            )
            unit = choose_for_images(fission, early_exit, batches, image, MAX_ACCURACY_DROP)
            return cls(unit.order, unit.thresholds, early_exit.name, _target(unit.images))
        costs = exit_costs(fission, image)
        answers = [
            (network.logits(pixels), labels) for pixels, labels in with_progress(validation, "choosing")
        ]
        logits, labels = (torch.cat(parts) for parts in zip(*answers, strict=True))
        choice = choose_thresholds(
            logits,
            labels,
            costs.dense,
            order=costs.order,
            weights=fission.exit_weights,
            max_accuracy_drop=MAX_ACCURACY_DROP,
        )
        return cls(costs.order, choice.thresholds, "margin", _target(len(labels)))


def _target(images: int) -> dict[str, float | None]:
    """Return what the default thresholds are chosen for, by a number of validation images."""
    return dict.fromkeys(TARGET) | {"max_accuracy_drop": MAX_ACCURACY_DROP, "validation_images": images}


def check_cascade(trained: Classifier | Predictor) -> None:
    """Raise ValueError unless a network has two exits or more that run one after another."""
    network, method = trained.network, trained.spec.method_name
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
        answers: what is answered, of the ensemble of the exits so far.
        tensors: number of stages → number of tensors that exit 0 passes on after them; default one each.

    Attributes:
        inputs: names. The first step has `images`; others have `features_D` after D stages (`features_D_K`
            with K from 0 if these are several tensors), and `outputs_N` of the N exits before, `(batch, N,
            outputs, …)`: logits, or what else the network gives.
        outputs: names. Those of `answers`, and `confidence` `(batch,)`, are of the ensemble of the exits so
            far; `outputs_N` includes this exit's; `features_…` are new features.
        keeps: names of the inputs and outputs so far that later steps need.
    """

    def __init__(
        self,
        cascade: Cascade,
        step: int,
        normalise: Normalisation,
        answers: StepAnswers,
        tensors: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.cascade = cascade
        self.step = step
        self.normalise = normalise
        self.answers = answers
        tensors = tensors or {}
        kept = cascade.kept_depths[step]
        self.inputs, self._start = [INPUT], 0
        new = set(kept)
        if step:
            before = cascade.kept_depths[step - 1]
            self._start = min(cascade.branch_depths[cascade.order[step]], max(before))
            self.inputs = [*_feature_names(self._start, tensors), f"outputs_{step}"]
            new -= before
        self._new_depths = sorted(new)
        held = [f"outputs_{step + 1}"]
        self.outputs = [*answers.described, "confidence", *held]
        self.outputs += [name for depth in self._new_depths for name in _feature_names(depth, tensors)]
        self.keeps = [*held, *(name for depth in sorted(kept) for name in _feature_names(depth, tensors))]
        if step + 1 == len(cascade.order):
            self.keeps = []
        # Of the exits so far, in the order they run.
        self.weights = None if cascade.weights is None else cascade.weights[: step + 1]
        self.training = cascade.training

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return outputs by name from inputs in their order."""
        exit_outputs: list[Tensor] = []
        if self.step:
            *tensors, before = inputs
            start: Features = tensors[0] if len(tensors) == 1 else tuple(tensors)
            exit_outputs += before.unbind(dim=1)
        else:
            start = self.cascade.network.stem(self.normalise(inputs[0]))
        features: dict[int, Features] = {self._start: start}
        exit_outputs.append(self.cascade.run_exit(self.step, features))
        outputs = torch.stack(exit_outputs, dim=1)
        combined = self.answers.combined(outputs, self.weights)
        confidence = self.cascade.confidence(exit_outputs, combined)
        found = self.answers.answers(outputs, combined, self.weights)
        new = (tensor for depth in self._new_depths for tensor in tensors_of(features[depth]))
        return dict(zip(self.outputs, [*found.values(), confidence, outputs, *new], strict=True))


def _feature_names(depth: int, tensors: Mapping[int, int]) -> list[str]:
    """Return the names of what exit 0 passes on after some stages."""
    number = tensors.get(depth, 1)
    return [f"features_{depth}" if number == 1 else f"features_{depth}_{index}" for index in range(number)]


@torch.no_grad()
def _count_tensors(network: FissionNetwork, image: Tensor) -> dict[int, int]:
    """Return the number of tensors that exit 0 passes on after each number of stages, for an image."""
    features: list[Features] = [network.stem(image)]
    for stage in network.exit_paths[0].stages:
        features.append(stage(features[-1]))
    return {depth: len(tensors_of(passed)) for depth, passed in enumerate(features)}


def export_cascade(
    trained: Classifier | Predictor, plan: Plan, folder: Path, images: Tensor, opset: int | None = None
) -> float:
    """Write one graph per exit into a folder, and `cascade.json`, which describes how to run them.

    Args:
        trained: the network, on the CPU, see `check_cascade`.
        plan: order of the exits, and when to stop.
        folder: created if it does not exist.
        images: real images to check the graphs with, uint8 `(n, channels, height, width)`.
        opset: version of ONNX's operators, 18 to 23; default 20.

    Returns:
        The largest difference of a probability or of a confidence; of another task see
        `netfission.export.targets.export_targets`.

    Raises:
        ValueError: the plan does not fit the network, or the images do not.
        RuntimeError: the network cannot be exported, or an answer differs by more than rounding. Nothing is
            written then.
        OSError: the folder cannot be written.
    """
    check_images(trained, images)
    spec = trained.spec
    normalise = Normalisation(spec.mean, spec.std)
    network: Any = make_exportable(trained.network, torch.zeros(2, *spec.shape))
    answers, own_rule = answers_of(trained)
    if own_rule is not None and plan.rule != own_rule.name:
        raise invalid("rule", f"{own_rule.name} with task={spec.task}", plan.rule)
    rule = own_rule or cast(Rule, check_choice("rule", plan.rule, RULES))
    cascade = Cascade(network, plan.thresholds, order=plan.order, rule=rule)
    tensors = _count_tensors(network, torch.zeros(1, *spec.shape))
    steps = [Step(cascade, number, normalise, answers, tensors) for number in range(network.exits)]
    example = torch.zeros(2, *spec.shape, dtype=torch.uint8)
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
            for tensor in _differences(trained, steps, runners, pixels)
        ]
    )
    check_difference(difference, len(images), "probabilities" if own_rule is None else "answers")
    checked = {"images": len(images), "difference": difference, "tolerance": TOLERANCE}
    index = _metadata(trained) | {
        "checked": checked,
        "rule": plan.rule,
        "target": dict(plan.target),
        "answers": dict(answers.described),
        "steps": _index(plan, steps),
    }
    folder.mkdir(exist_ok=True)
    graphs: dict[Path, str | bytes] = {folder / name: content for name, content in files.items()}
    index_file = {folder / INDEX: json.dumps(index, indent=1, ensure_ascii=False) + "\n"}
    # If there is an index, then the graphs that it names are there, and are of the same network.
    write_together(graphs | index_file, removed=index_file)
    return difference


def _metadata(trained: Classifier | Predictor) -> dict[str, Any]:
    if isinstance(trained, Classifier):
        return classifier_metadata(trained)
    return target_metadata(trained, coverage=None)


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


@torch.no_grad()
def _differences(
    trained: Classifier | Predictor, steps: Sequence[Step], runners: Sequence[Runner], pixels: Tensor
) -> list[Tensor]:
    """Return the differences of answers and confidence if no image stops."""
    outputs = trained.logits(pixels)
    state: Mapping[str, Tensor] = {INPUT: pixels}
    differences = []
    for step, run in zip(steps, runners, strict=True):
        so_far = outputs[:, step.cascade.order[: step.step + 1]]
        combined = step.answers.combined(so_far, step.weights)
        state = {**state, **run(**{name: state[name] for name in step.inputs})}
        differences += step.answers.differences(state, so_far, combined, step.weights)
        if step.keeps:
            confidence = step.cascade.confidence(so_far.unbind(dim=1), combined)
            differences.append(state["confidence"] - confidence)
        state = {name: state[name] for name in step.keeps}
    return differences
