"""Evaluation of a finished run on its test split: of all exits together, and as an early-exit cascade."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from netfission.classifier.folder import NetworkSpec, figures_json
from netfission.config import STOPS_EARLY, RunConfig
from netfission.data import Batches, ImageData, Split
from netfission.data.summary import class_differences
from netfission.evaluation import collect_logits, evaluate_logits, run_batches
from netfission.evaluation.calibration import VALIDATION
from netfission.evaluation.cascade import CascadeEvaluation, measure_cascade
from netfission.evaluation.cascade import evaluate_cascade as evaluate_class_cascade
from netfission.evaluation.target_cascade import TargetAnswers, Tiling
from netfission.inference.cascade import Rule
from netfission.network import FissionNetwork
from netfission.runs.folder import RunFolder, environment
from netfission.runs.overlap import validation_dependence
from netfission.runs.setup import check_unchanged, load_run_data, make_batches, run_device
from netfission.surgery.tracing import MAIN_OUTPUT
from netfission.tasks.base import Accumulator, EvaluationResult, Task
from netfission.tasks.early_exit import EarlyExit
from netfission.utils.errors import invalid
from netfission.utils.files import write_json

EVALUATION_BATCH = 256
_ALONE = 8  # images that are timed one by one, if few go through the network at once

Result = TypeVar("Result")


def evaluate(folder: RunFolder, config: RunConfig, data: ImageData | None = None) -> EvaluationResult:
    """Evaluate the network of a run on the test split, and write the metrics into the run's folder.

    The ensemble averages by the rule of the run's method, see `netfission.methods.base.Method`. If there is a
    validation split, its probabilities are calibrated on it, unless they have been calibrated on other data,
    see `netfission.runs.calibrate`. The files are `evaluation.json`, `calibration.json` and, of classes,
    `reliability.json`, see `RunFolder`.

    Args:
        folder: folder of a finished run.
        config: the run's settings.
        data: the run's data set; loaded by default.

    Raises:
        ValueError: the folder holds no finished run, or the data set has other classes than the network.
    """
    network, spec, data, device = load_for_evaluation(folder, config, data, any_task=True)
    task = spec.find_task()

    def measured(accumulator: Accumulator[Result], split: Split) -> Result:
        batches = _batches(split, data, config, device, task.batch_size(data.shape, EVALUATION_BATCH))
        run_batches(network, batches, accumulator.add, device)
        return accumulator.result()

    calibration = readable_calibration(folder)
    if calibration is not None and calibration.fitted_on == VALIDATION:
        calibration = None
    if calibration is None and data.validation is not None:
        calibrator = task.calibrator(
            average=spec.average,
            dependence=own_dependence(folder, config),
            sizes=data.validation.photograph_sizes,
        )
        fitted: Any = measured(calibrator, data.validation)
        calibration = replace(fitted, weights=folder.weights_sha256())
        write_json(folder.calibration, calibration.to_json())
    overlap = "" if calibration is None else calibration.overlap
    evaluator = task.evaluator(average=spec.average, calibration=None if overlap else calibration)
    evaluation, report = measured(evaluator, data.test)
    weights = folder.weights_sha256()
    write_json(folder.evaluation, figures_json(evaluation, weights))
    if overlap:
        what = folder.reliability.name if task.targets.exclusive else "calibrated figures"
        warnings.warn(f"no {what}: {overlap}", stacklevel=2)
        folder.reliability.unlink(missing_ok=True)
        report = None
    if report is not None:
        write_json(folder.reliability, figures_json(report, weights))
    return evaluation


def evaluate_cascade(
    folder: RunFolder,
    config: RunConfig,
    *,
    rule: Rule | None = None,
    max_accuracy_drop: float | None = None,
    max_cost: float | None = None,
    delta: float | None = None,
    single: RunFolder | None = None,
    tile: int | None = None,
    halo: int | None = None,
) -> CascadeEvaluation:
    """Choose a cascade's thresholds on the validation split of a run and evaluate it on its test split.

    The results and plots of them are written into the run's folder, see `RunFolder`.

    Args:
        folder: folder of a finished run.
        config: the run's settings.
        rule: confidence by which an image stops, see `netfission.inference.cascade_confidence`; default the
            margin. Other tasks than classification have their own, see `Task.early_exit`.
        max_accuracy_drop: accepted loss of accuracy, in percentage points, see
            `netfission.inference.choose_thresholds`; or of the measure of another task.
        max_cost: in its place, accepted mean MACs relative to the single network's.
        delta: with `max_accuracy_drop`, probability that more is lost on new images, see
            `netfission.inference.bounded_thresholds`; by default it is bounded on validation images alone.
        single: a finished run of the same model with one exit, whose accuracy is shown for comparison.
        tile: of maps, height and width of the tiles that stop by themselves, see
            `netfission.inference.tiles`; default whole images.
        halo: pixels around a tile that later exits see, default 0.

    Raises:
        ValueError: the run has no validation split, `single` is of another model, the target cannot be met,
            an argument has no meaning for the task, or see `evaluate`.
    """
    from netfission.evaluation.cascade_plot import draw_cascade  # here, as it needs matplotlib

    if config.data.validation == 0:
        raise invalid("validation", "above 0 to choose the thresholds of a cascade", config.data.validation)
    if delta is not None and (dependence := own_dependence(folder, config)):
        raise invalid("delta", "left out for this run", delta, hint=dependence)
    network, spec, data, device = load_for_evaluation(folder, config, any_task=True)
    task = spec.find_task()
    _check_cascade_settings(task, rule=rule, delta=delta, tile=tile, halo=halo)
    method = config.method.method
    if method not in STOPS_EARLY:
        expected = f"a run with method={' or '.join(sorted(STOPS_EARLY))} for a cascade"
        raise invalid(str(folder.path), expected, found=f"method={method}")
    assert isinstance(network, FissionNetwork)
    if network.exits == 1:
        raise invalid("exits", "2 or more for a cascade", network.exits)
    early_exit = task.early_exit()
    accuracy = None
    if single is not None:
        accuracy = _single_accuracy(single, config, spec, data, device, early_exit)
    with torch.random.fork_rng([]):
        model = spec.single().eval().to(device)
    assert data.validation is not None
    size = task.batch_size(data.shape, EVALUATION_BATCH)
    validation, test = (_batches(split, data, config, device, size) for split in (data.validation, data.test))
    shuffled = zip(_batches(data.test, data, config, device, size, shuffle=True), range(2), strict=False)
    images = torch.cat([images for (images, _), _ in shuffled])
    if early_exit is None:
        evaluation = evaluate_class_cascade(
            network,
            model,
            collect_logits(network, validation, device),
            collect_logits(network, test, device),
            images,
            rule=rule or "margin",
            max_accuracy_drop=max_accuracy_drop,
            max_cost=max_cost,
            delta=delta,
            single_accuracy=accuracy,
        )
    else:
        tiling = None if tile is None else Tiling(tile, halo or 0)
        answers = TargetAnswers(network, early_exit, validation, test, images[:1], tiling)
        evaluation = measure_cascade(
            network,
            _MainOutput(model),
            answers,
            images,
            max_accuracy_drop=max_accuracy_drop,
            max_cost=max_cost,
            single_accuracy=accuracy,
            batches=None if size == EVALUATION_BATCH else {1: min(size, _ALONE), size: size},
        )
    record = asdict(evaluation) | {"environment": environment(), "weights": folder.weights_sha256()}
    write_json(folder.cascade, json.dumps(record, indent=2) + "\n")
    draw_cascade(evaluation, folder.cascade)
    return evaluation


def _check_cascade_settings(
    task: Task, *, rule: str | None, delta: float | None, tile: int | None, halo: int | None
) -> None:
    """Raise ValueError if a setting of a cascade has no meaning for a task."""
    has_own_rule = task.early_exit() is not None
    unused = {"rule": rule, "delta": delta} if has_own_rule else {}
    unused |= {} if task.draws_maps else {"tile": tile, "halo": halo}
    for name, value in unused.items():
        if value is not None:
            raise invalid(name, f"left out for a run of task={task.name}", value)
    if halo is not None and tile is None:
        raise invalid("halo", "left out unless tile is given", halo)


class _MainOutput(nn.Module):
    """A network without the dictionary that torchvision's networks of maps put around their output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor | Mapping[str, Tensor] = self.network(images)
        return outputs[MAIN_OUTPUT] if isinstance(outputs, Mapping) else outputs


def load_for_evaluation(
    folder: RunFolder, config: RunConfig, data: ImageData | None = None, *, any_task: bool = False
) -> tuple[nn.Module, NetworkSpec, ImageData, str]:
    """Load a finished run.

    Args:
        folder: folder of the run.
        config: the run's settings.
        data: the run's data set; loaded by default.
        any_task: whether the run may be of another task than classification.

    Returns:
        The network, its description, the data set, and the device that the network is on.

    Raises:
        ValueError: see `evaluate`.
    """
    network, spec, device = load_on_device(folder, config, any_task=any_task)
    return network, spec, load_matching_data(folder, config, spec, data), device


def load_matching_data(
    folder: RunFolder, config: RunConfig, spec: NetworkSpec, data: ImageData | None = None
) -> ImageData:
    """Load the data set of a run unless it is given.

    Raises:
        ValueError: the run's network has other classes, or see `netfission.runs.setup.check_unchanged`.
    """
    if data is None:
        data = load_run_data(config.data, config.fission.seed)
    if data.classes != spec.classes:
        noun = spec.find_task().targets.noun
        expected = f"a data set with the {len(spec.classes)} {noun} in {folder.spec}"
        found = f"{config.data.data!r} {class_differences(spec.classes, data.classes)}"
        raise invalid("data", expected, found=found)
    check_unchanged(data, folder.load_data_summary())
    return data


def load_on_device(
    folder: RunFolder, config: RunConfig, *, any_task: bool = False
) -> tuple[nn.Module, NetworkSpec, str]:
    """Load the network of a finished run, its description, and the device that the network is put on.

    Raises:
        ValueError: the folder holds no finished run, or one of another task unless `any_task`.
    """
    network, spec = folder.load_network(any_task=any_task)
    device = run_device(config.training)
    return network.to(device), spec, device


def readable_calibration(folder: RunFolder) -> Any:
    """Read the calibration that another one replaces; None if its file is missing or damaged."""
    try:
        return folder.load_calibration_of(folder.load_spec(any_task=True))
    except ValueError:
        return None


def own_dependence(folder: RunFolder, config: RunConfig) -> str:
    """Say how a run's network depends on its validation images, see `validation_dependence`.

    What the calibration of the same weights says still holds if the runs that it started from are lost.
    """
    if found := validation_dependence(config):
        return found
    known = readable_calibration(folder)
    recorded = known is not None and (known.fitted_on, known.weights) == (VALIDATION, folder.weights_sha256())
    return known.dependence if recorded else ""


def _batches(
    split: Split,
    data: ImageData,
    config: RunConfig,
    device: str,
    batch_size: int = EVALUATION_BATCH,
    *,
    shuffle: bool = False,
) -> Batches:
    return make_batches(split, data, batch_size, device=device, shuffle=shuffle, workers=config.data.workers)


def _single_accuracy(
    single: RunFolder,
    config: RunConfig,
    spec: NetworkSpec,
    data: ImageData,
    device: str,
    early_exit: EarlyExit | None,
) -> float:
    """Return the accuracy, or the task's measure, on the test split of the network of another run."""
    network, other = single.load_fission(any_task=True)
    alike = (other.model, other.task, other.classes, other.shape, other.scale) == (
        spec.model,
        spec.task,
        spec.classes,
        spec.shape,
        spec.scale,
    )
    if network.exits > 1 or not alike:
        raise invalid(
            "single",
            f"a run of {spec.model} with exits=1 on the same data",
            found=f"{single.path}: {other.model} with {network.exits} exits on {len(other.classes)} classes",
        )
    data = replace(data, mean=tuple(other.mean), std=tuple(other.std))  # as it was trained
    size = spec.find_task().batch_size(data.shape, EVALUATION_BATCH)
    batches = _batches(data.test, data, config, device, size)
    if early_exit is not None:
        counts: list[Tensor] = []

        def count(outputs: Tensor, targets: Tensor) -> None:
            counts.append(early_exit.counts(outputs[:, 0], targets.to(outputs.device)).sum(dim=0).cpu())

        run_batches(network.to(device), batches, count, device)
        return early_exit.score(torch.stack(counts).sum(dim=0)).item()
    logits, labels = collect_logits(network.to(device), batches, device)
    return evaluate_logits(logits, labels, average=other.average).ensemble["top1"]
