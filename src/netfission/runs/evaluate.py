"""A finished run's network on its test split: as it is, and as a cascade."""

import json
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import nn

from netfission.classifier.folder import NetworkSpec
from netfission.config import RunConfig
from netfission.data import ImageData
from netfission.evaluation import Evaluation, collect_logits, evaluate_logits
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.cascade import CascadeEvaluation
from netfission.evaluation.cascade import evaluate_cascade as measure_cascade
from netfission.evaluation.reliability import ReliabilityReport
from netfission.inference.cascade import Rule
from netfission.network import FissionNetwork
from netfission.runs.folder import RunFolder, environment
from netfission.runs.setup import load_run_data, make_batches
from netfission.utils.files import write_whole

EVALUATION_BATCH = 256


def evaluate(folder: RunFolder, config: RunConfig, data: ImageData | None = None) -> Evaluation:
    """Run the network that lies in a run's folder over the test split, and keep the figures there.

    Where there is a validation split, the network's probabilities are calibrated on it, and that kept too;
    `reliability.json` says what the calibration is worth on the test split, see `ReliabilityReport`.

    Args:
        folder: of a finished run.
        config: its settings.
        data: its data set, if loaded already.

    Raises:
        ValueError: the folder holds no finished run, or the data set's classes are not the network's.
    """
    network, _, data, device = load_for_evaluation(folder, config, data)
    batches = make_batches(data.test, data, EVALUATION_BATCH, device=device, workers=config.data.workers)
    logits, labels = collect_logits(network, batches, device)
    evaluation = evaluate_logits(logits, labels)
    write_whole(folder.evaluation, evaluation.to_json())
    calibration = None
    if data.validation is not None:
        shown = make_batches(
            data.validation, data, EVALUATION_BATCH, device=device, workers=config.data.workers
        )
        calibration = Calibration.fit(*collect_logits(network, shown, device))
        write_whole(folder.calibration, calibration.to_json())
    report = ReliabilityReport.from_logits(logits, labels, data.classes, calibration)
    write_whole(folder.reliability, report.to_json())
    return evaluation


def evaluate_cascade(
    folder: RunFolder,
    config: RunConfig,
    *,
    rule: Rule = "margin",
    max_accuracy_drop: float | None = None,
    max_cost: float | None = None,
    single: RunFolder | None = None,
) -> CascadeEvaluation:
    """Choose a cascade's thresholds on a run's validation split and measure it on its test split.

    The figures and a picture of them are kept in the run's folder.

    Args:
        folder: of a finished run.
        config: its settings.
        rule: when an image is sure enough to stop, see `netfission.inference.cascade_confidence`.
        max_accuracy_drop: points of accuracy that may be lost, see `netfission.inference.choose_thresholds`.
        max_cost: instead, mean MACs that may be spent, over the single network's.
        single: a finished run of the same model with one exit, whose accuracy is to stand beside.

    Raises:
        ValueError: the run has no validation split, `single` is another model's, the target is out of
            reach, or see `evaluate`.
    """
    from netfission.evaluation.cascade_plot import draw_cascade  # here, as it needs matplotlib

    if config.data.validation == 0:
        raise ValueError(
            "validation=0: thresholds are chosen on validation images; takes a run trained with a share of "
            "them above 0"
        )
    network, spec, data, device = load_for_evaluation(folder, config)
    if not isinstance(network, FissionNetwork):
        raise ValueError(
            f"run={folder.path}: a cascade takes a run with method=fission, not {config.method.method}"
        )
    if network.exits == 1:
        raise ValueError("exits=1: a cascade takes a run of two exits or more")
    accuracy = None if single is None else _single_accuracy(single, config, spec, data, device)
    with torch.random.fork_rng([]):
        model = spec.single()
    batches = partial(
        make_batches, data=data, batch_size=EVALUATION_BATCH, device=device, workers=config.data.workers
    )
    assert data.validation is not None
    validation = collect_logits(network, batches(data.validation), device)
    test = collect_logits(network, batches(data.test), device)
    mixed = zip(batches(data.test, shuffle=True), range(2), strict=False)
    images = torch.cat([images for (images, _), _ in mixed])
    evaluation = measure_cascade(
        network,
        model.eval().to(device),
        validation,
        test,
        images,
        rule=rule,
        max_accuracy_drop=max_accuracy_drop,
        max_cost=max_cost,
        single_accuracy=accuracy,
    )
    record = asdict(evaluation) | {"environment": environment()}
    write_whole(folder.cascade, json.dumps(record, indent=2) + "\n")
    draw_cascade(evaluation, folder.cascade)
    return evaluation


def load_for_evaluation(
    folder: RunFolder, config: RunConfig, data: ImageData | None = None
) -> tuple[nn.Module, NetworkSpec, ImageData, str]:
    """A finished run's network with its card, its data set, and the device that the network was put on."""
    network, spec = folder.load_network()
    data = data or load_run_data(config.data, config.fission.seed)
    if data.classes != spec.classes:
        raise ValueError(
            f"data={config.data.data!r}: its {len(data.classes)} classes are not the {len(spec.classes)} "
            f"that {folder.spec} names"
        )
    device = "cuda" if torch.cuda.is_available() and config.training.accelerator != "cpu" else "cpu"
    return network.to(device), spec, data, device


def _single_accuracy(
    single: RunFolder, config: RunConfig, spec: NetworkSpec, data: ImageData, device: str
) -> float:
    """Accuracy on the test split of the network with one exit that lies in another run's folder."""
    network, own = single.load_fission()
    if network.exits > 1 or (own.model, own.classes, own.shape) != (spec.model, spec.classes, spec.shape):
        raise ValueError(
            f"single={single.path}: is {own.model} with {network.exits} exits on {len(own.classes)} classes; "
            f"takes a run of {spec.model} with exits=1 on the same data"
        )
    data = replace(data, mean=tuple(own.mean), std=tuple(own.std))  # as it was trained
    batches = make_batches(data.test, data, EVALUATION_BATCH, device=device, workers=config.data.workers)
    return evaluate_logits(*collect_logits(network.to(device), batches, device)).ensemble["top1"]
