"""A cascade as one graph an exit, which any runtime runs one after another."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netfission.classifier import Classifier
from netfission.data.batches import Normalisation
from netfission.export.check import TOLERANCE, batches, check_difference, check_images, largest, shown
from netfission.export.formats import Run
from netfission.export.metadata import metadata
from netfission.export.onnx import OnnxModel
from netfission.export.predictor import INPUT, plain
from netfission.inference.cascade import Cascade, Rule, cascade_confidence, exit_costs, step_by_step
from netfission.inference.thresholds import choose_thresholds
from netfission.network import FissionNetwork
from netfission.utils.files import write_together

INDEX = "cascade.json"
LOSE = 0.2  # points of accuracy, where nothing was chosen before


@dataclass(frozen=True)
class Plan:
    """When a cascade stops.

    Attributes:
        order: the exits as they run.
        thresholds: one for each but the last.
        rule: what is compared with them, see `netfission.inference.cascade_confidence`.
    """

    order: Sequence[int]
    thresholds: Sequence[float]
    rule: Rule

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """What `netfission evaluate --cascade` chose; ValueError where the file is not its."""
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            return cls(written["order"], written["choice"]["thresholds"], written["rule"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is not what `netfission evaluate --cascade` writes") from error

    @classmethod
    def choose(cls, classifier: Classifier, validation: Iterable[tuple[Tensor, Tensor]]) -> "Plan":
        """Lose 0.2 points of accuracy at most, and spend as little as that allows.

        Args:
            classifier: of a `FissionNetwork`.
            validation: pixels, uint8 `(batch, channels, height, width)`, and labels `(batch,)`.
        """
        network: Any = classifier.network
        costs = exit_costs(network, torch.zeros(1, *classifier.spec.shape))
        answers = [(classifier.logits(pixels), labels) for pixels, labels in shown(validation, "choosing")]
        logits, labels = (torch.cat(parts) for parts in zip(*answers, strict=True))
        choice = choose_thresholds(logits, labels, costs.dense, order=costs.order, max_accuracy_drop=LOSE)
        return cls(costs.order, choice.thresholds, "margin")


def check_cascade(classifier: Classifier) -> None:
    """ValueError unless a network has exits that run one by one."""
    if not isinstance(classifier.network, FissionNetwork):
        raise ValueError("cascade: takes a run with method=fission")
    if classifier.network.exits == 1:
        raise ValueError("cascade: takes a run of two exits or more, not exits=1")


class Step(nn.Module):
    """One exit of a cascade: what it starts from → its answer and what later exits start from.

    All inputs and outputs hold a row for each image that goes on.

    Args:
        cascade: of a plain network, see `plain`.
        step: the exit's place in the order.
        normalise: pixels → float32.
        temperature: what mean logits are divided by for probabilities.

    Attributes:
        inputs: `images` for the first step; for others `features_D` after D stages, and `logits_N` of the
            N exits before, `(batch, N, classes)`.
        outputs: `probabilities` `(batch, classes)`, `classes` `(batch,)` and `confidence` `(batch,)` of the
            ensemble of the exits so far; `logits_N` with this exit's, and any new `features_D`.
        keeps: of all inputs and outputs so far, those that later steps take.
    """

    def __init__(self, cascade: Cascade, step: int, normalise: Normalisation, temperature: float) -> None:
        super().__init__()
        self.cascade = cascade
        self.step = step
        self.normalise = normalise
        self.temperature = temperature
        kept = cascade._kept[step]
        self.inputs, self._start = [INPUT], 0
        made = set(kept)
        if step:
            before = cascade._kept[step - 1]
            self._start = min(cascade._leaves[cascade.order[step]], max(before))
            self.inputs = [f"features_{self._start}", f"logits_{step}"]
            made -= before
        self.made = sorted(made)
        self.outputs = ["probabilities", "classes", "confidence", f"logits_{step + 1}"]
        self.outputs += [f"features_{depth}" for depth in self.made]
        self.keeps = [f"logits_{step + 1}", *(f"features_{depth}" for depth in sorted(kept))]
        if step + 1 == len(cascade.order):
            self.keeps = []
        self.eval().requires_grad_(False)

    def forward(self, start: Tensor, before: Tensor | None = None) -> dict[str, Tensor]:
        """Inputs in their order → outputs by name."""
        so_far = [] if before is None else list(before.unbind(dim=1))
        if before is None:
            start = self.cascade.network.stem(self.normalise(start))
        features = {self._start: start}
        so_far.append(self.cascade._run_exit(self.step, features))
        logits = torch.stack(so_far, dim=1)
        mean = logits.mean(dim=1)
        probabilities = (mean / self.temperature).softmax(dim=1)
        sure = cascade_confidence(so_far, mean, len(self.cascade.order), self.cascade.rule)
        found = [probabilities, mean.argmax(dim=1), sure, logits, *(features[depth] for depth in self.made)]
        return dict(zip(self.outputs, found, strict=True))


def export_cascade(
    classifier: Classifier, plan: Plan, folder: Path, images: Tensor, opset: int | None = None
) -> float:
    """Write a graph for each exit into a folder, and `cascade.json`, which says how to run them.

    Args:
        classifier: on the CPU, see `check_cascade`.
        plan: when to stop.
        folder: made where it is missing.
        images: to check with, uint8 `(n, channels, height, width)`.
        opset: see `OnnxModel.from_module`.

    Returns:
        The largest difference of a probability or of a confidence.

    Raises:
        ValueError: the plan is not the network's, or the images are not what it takes.
        RuntimeError: the network cannot be exported, or the graphs answer otherwise than it; nothing is
            written then.
        OSError: the folder cannot be written.
    """
    check_images(classifier, images)
    normalise = Normalisation(classifier.spec.mean, classifier.spec.std)
    network: Any = plain(classifier.network, torch.zeros(2, *classifier.spec.shape))
    cascade = Cascade(network, plan.thresholds, order=plan.order, rule=plan.rule)
    steps = [Step(cascade, number, normalise, classifier.temperature) for number in range(network.exits)]
    example = torch.zeros(2, *classifier.spec.shape, dtype=torch.uint8)
    state = {INPUT: example}
    files: dict[str, bytes] = {}
    runs: list[Run] = []
    for step in steps:
        inputs = {name: state[name] for name in step.inputs}
        model = OnnxModel.from_module(step, inputs, opset)
        files[f"step{step.step}.onnx"] = model.content({})
        runs.append(model.load(files[f"step{step.step}.onnx"]))
        state |= step(*inputs.values())
    worst = largest(
        [
            difference
            for pixels in batches(images, "checking")
            for difference in _differences(classifier, plan, steps, runs, pixels)
        ]
    )
    check_difference(worst, len(images))
    checked = {"images": len(images), "difference": worst, "tolerance": TOLERANCE}
    index = metadata(classifier) | {"checked": checked, "rule": plan.rule, "steps": _index(plan, steps)}
    folder.mkdir(exist_ok=True)
    graphs: dict[Path, str | bytes] = {folder / name: content for name, content in files.items()}
    about = {folder / INDEX: json.dumps(index, indent=1, ensure_ascii=False) + "\n"}
    # Where there is an index, what it names is there, and of the same network.
    write_together(graphs | about, removed=about)
    return worst


def _index(plan: Plan, steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [
        {
            "file": f"step{step.step}.onnx",
            "exit": number,
            "stops_above": threshold,
            "inputs": step.inputs,
            "outputs": step.outputs,
            "keeps": step.keeps,
        }
        for step, number, threshold in zip(steps, plan.order, [*plan.thresholds, None], strict=True)
    ]


def _differences(
    classifier: Classifier, plan: Plan, steps: Sequence[Step], runs: Sequence[Run], pixels: Tensor
) -> list[Tensor]:
    """Differences of probabilities and confidence, where no image stops."""
    means, scores = step_by_step(classifier.logits(pixels), plan.order, plan.rule)
    probabilities = (means / classifier.temperature).softmax(dim=2)
    state: Mapping[str, Tensor] = {INPUT: pixels}
    differences = []
    for step, run in zip(steps, runs, strict=True):
        state = {**state, **run(**{name: state[name] for name in step.inputs})}
        differences.append(state["probabilities"] - probabilities[:, step.step])
        if step.keeps:
            differences.append(state["confidence"] - scores[:, step.step])
        state = {name: state[name] for name in step.keeps}
    return differences
