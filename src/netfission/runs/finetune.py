"""A fine-tuning: the single network, the ensemble made of it, and what was gained."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from netfission.config import DataConfig, RunConfig
from netfission.data import ImageData
from netfission.ensemble import ensemble_log_probabilities
from netfission.evaluation import collect_logits, run_batches
from netfission.evaluation.gain import Gain, NetworkFigures, change_errors
from netfission.evaluation.reliability import ReliabilityReport
from netfission.evaluation.resampling import Resampled, resampled_errors
from netfission.inference.deployment import deploy
from netfission.models import WeightsReport
from netfission.network import FissionNetwork
from netfission.profiling.cost import count
from netfission.profiling.timing import Quartiles, inference_times
from netfission.runs.callbacks import Stopwatch
from netfission.runs.evaluate import EVALUATION_BATCH, evaluate, load_matching_data, load_on_device
from netfission.runs.finetune_settings import FinetunePlan, check_ensemble
from netfission.runs.folder import MOVED, SAME_SETTINGS, RunFolder, environment
from netfission.runs.overlap import warn_of_held_out_images
from netfission.runs.setup import (
    build_network,
    check_weights_task,
    load_run_data,
    make_batches,
    network_spec,
    other_classes,
    run_device,
)
from netfission.runs.train import train
from netfission.tasks import Task, task_kind
from netfission.tasks.gain import TargetFigures, TargetGain
from netfission.utils.checksums import check_tensors
from netfission.utils.errors import first_line, invalid
from netfission.utils.files import has_file, write_json

BATCH_SIZES = (1, 32)  # of the time of inference


def finetune(
    plan: FinetunePlan, out: Path, *, progress: bool = True, say: Callable[[str], object] = print
) -> Gain | TargetGain:
    """Fine-tune a single network and the ensemble made of it, and compare the two; or go on with it.

    The folder `out` is that of the ensemble's run, and `out/single` holds the single network. A step whose
    files are there is not repeated, and a training goes on after its last whole epoch.

    Args:
        plan: the settings.
        out: a new or empty folder, or that of a fine-tuning with the same settings.
        progress: see `netfission.runs.train.train`.
        say: called with a line before each step.

    Raises:
        ValueError: the folder is another run's, or see `netfission.runs.train.train`.
        OSError: a file cannot be read or written.
        DivergedError: see `netfission.runs.train.train`.
        KeyboardInterrupt: it was stopped.
    """
    folder = RunFolder(out)
    single = folder.single
    begun = folder.config.is_file()
    if begun:
        _check_begun(plan, folder, single)
    else:
        check_ensemble(plan.ensemble)
        folder.claim(plan.ensemble, resume=False)
    try:
        _make_single(plan, single, progress, say)
    except BaseException:
        if not begun and not single.path.exists():  # it ended before the first step
            folder.release()
        raise
    _train(plan.ensemble, folder, "step 2 of 3: the ensemble", progress, say)
    gain = folder.current_gain()
    if gain is None or not gain.time:
        say("step 3 of 3: measure the cost of both networks")
        gain = measure_gain(folder, single, plan.ensemble)
        write_json(folder.gain, gain.to_json())
    return gain


def measure_gain(folder: RunFolder, single: RunFolder, config: RunConfig) -> Gain | TargetGain:
    """Compare an ensemble with the single network that it was made of, both evaluated and calibrated.

    Args:
        folder: of the ensemble.
        single: of the single network.
        config: settings of the ensemble.

    Raises:
        ValueError: a folder holds no such network.

    Warns:
        UserWarning: a network cannot be deployed, so that the time of inference is not measured.
    """
    if not task_kind(config.data.task).targets.exclusive:
        return _measure_target_gain(folder, single, config)
    data = load_matching_data(folder, config, folder.load_spec())
    alone, network, before, labels = _load(single, config, data)
    ensemble, divided, after, _ = _load(folder, config, data)
    images = torch.rand(max(BATCH_SIZES), *data.shape, device=run_device(config.training))
    return Gain(
        n=_reliability(folder).n,
        single=alone,
        ensemble=ensemble,
        time=_relative_times(divided, network, images),
        environment=environment(),
        errors=change_errors(before, after, labels),
    )


def _load(
    run: RunFolder, config: RunConfig, data: ImageData
) -> tuple[NetworkFigures, FissionNetwork, Tensor, Tensor]:
    """Return the figures of a network, the network on its device, and what it says of the test images.

    That are calibrated log-probabilities `(n, classes)`, and the labels `(n,)`, on the CPU.
    """
    network, spec, device = load_on_device(run, config)
    assert isinstance(network, FissionNetwork)
    size = count(network, torch.rand(1, *spec.shape, device=device)).size
    calibrated, calibration = _reliability(run).scaled, run.load_calibration()
    assert calibrated is not None
    assert calibration is not None
    figures = NetworkFigures(
        network.exits,
        calibrated.metrics,
        size.parameters_stored,
        size.macs_dense,
        Stopwatch(run.training_time).read() or None,
        run.weights_sha256(),
        calibration.temperature,
        calibration.images,
        calibration.guess,
    )
    batches = make_batches(data.test, data, EVALUATION_BATCH, device=device, workers=config.data.workers)
    logits, labels = collect_logits(network, batches, device)
    scaled = logits.double() / calibration.temperature
    return figures, network, ensemble_log_probabilities(scaled, spec.average), labels


def _measure_target_gain(folder: RunFolder, single: RunFolder, config: RunConfig) -> TargetGain:
    """Compare the networks of another task than classification."""
    data = load_matching_data(folder, config, folder.load_spec(any_task=True))
    alone, network, before, _ = _load_target(single, config, data)
    ensemble, divided, after, task = _load_target(folder, config, data)
    at_once = max(1, task.batch_size(data.shape, max(BATCH_SIZES)))
    images = torch.rand(at_once, *data.shape, device=run_device(config.training))
    n = len(data.test)
    return TargetGain(
        task=task.name,
        n=n,
        single=alone,
        ensemble=ensemble,
        time=_relative_times(divided, network, images),
        environment=environment(),
        errors=resampled_errors(before, after, n),
    )


def _load_target(
    run: RunFolder, config: RunConfig, data: ImageData
) -> tuple[TargetFigures, FissionNetwork, Resampled, Task]:
    """Return the figures of a network, the network on its device, and its measures on sets of test images.

    Raises:
        ValueError: it is calibrated on some of the test images, so that it has no calibrated measures.
    """
    network, spec, device = load_on_device(run, config, any_task=True)
    assert isinstance(network, FissionNetwork)
    task, calibration = spec.find_task(), run.load_calibration_of(spec)
    evaluation = run.load_target_evaluation(spec)
    assert calibration is not None
    assert evaluation is not None
    if evaluation.calibrated is None:
        expected = "a run that is not calibrated on its own test images"
        hint = f"`netfission calibrate {run.path}` calibrates it on its validation images"
        raise invalid(
            str(run.path), expected, found=calibration.overlap or "no calibrated figures", hint=hint
        )
    size = count(network, torch.rand(1, *spec.shape, device=device)).size
    figures = TargetFigures(
        network.exits,
        evaluation.calibrated,
        size.parameters_stored,
        size.macs_dense,
        Stopwatch(run.training_time).read() or None,
        run.weights_sha256(),
        calibration.digest,
        calibration.images,
    )
    resampler = task.resampler(average=spec.average, calibration=calibration)
    images = task.batch_size(data.shape, EVALUATION_BATCH)
    batches = make_batches(data.test, data, images, device=device, workers=config.data.workers)
    run_batches(network, batches, resampler.add, device)
    return figures, network, resampler.result(), task


def _reliability(run: RunFolder) -> ReliabilityReport:
    reliability = run.load_reliability()
    assert reliability is not None
    return reliability


def _relative_times(network: FissionNetwork, single: FissionNetwork, images: Tensor) -> dict[int, Quartiles]:
    """Return the time of inference over the single network's by the number of images in a batch, deployed.

    If that fails, say so and return nothing: both networks are trained, and their other figures stand.
    """
    try:
        return _measured_times({"network": deploy(network, images), "single": deploy(single, images)}, images)
    except Exception as error:  # what is done to a user's model fails with errors of every kind
        reason = f"as deployment failed: {first_line(error)}"
        effect = "the time of inference is not measured"
        warnings.warn(f"{effect}, {reason}; the same command tries again", stacklevel=2)
        return {}


def _measured_times(networks: Mapping[str, nn.Module], images: Tensor) -> dict[int, Quartiles]:
    relative = {}
    for size in sorted({min(size, len(images)) for size in BATCH_SIZES}):
        times = inference_times(networks, images[:size])
        relative[size] = Quartiles.of_ratios(times["network"], times["single"])
    return relative


def _check_begun(plan: FinetunePlan, folder: RunFolder, single: RunFolder) -> None:
    """Check that a folder is that of a fine-tuning with the same settings."""
    if not folder.is_finetuning(folder.load_config()):
        found = f"{folder.path}, which holds another run"
        raise invalid("out", "a new or empty folder, or that of a fine-tuning", found=found)
    if has_file(single.weights):
        check_tensors(single.weights)  # else another place of the folder would be blamed
    report, expected = single.load_weights_report(), plan.single.model.weights if plan.finetuned else None
    is_trained = single.config.is_file()
    if is_trained or report is not None:
        begun = None if is_trained or report is None else report.path
        if begun != expected and not single.have_moved(begun, expected):
            hint = SAME_SETTINGS if None in (begun, expected) else MOVED
            raise invalid(
                "finetuned", f"{begun!r}, as in {single.weights_report}", found=repr(expected), hint=hint
            )
    if is_trained:
        single.claim(plan.single, resume=True)
    folder.claim(plan.ensemble, resume=True, names={"epochs": "ensemble_epochs"})


def _make_single(plan: FinetunePlan, single: RunFolder, progress: bool, say: Callable[[str], object]) -> None:
    """Train the single network, or take over one that is fine-tuned already."""
    step = "step 1 of 3: the single network"
    if not plan.finetuned:
        _train(plan.single, single, step, progress, say)
    elif _is_finished(single):
        say(f"{step} is finished, in {single.path}")
    else:
        say(f"{step} is taken from {plan.single.model.weights}, and evaluated in {single.path}")
        say(f"its images are normalised by {_normalisation(plan.single.data)}")
        _take_over(plan.single, single)


def _normalisation(data: DataConfig) -> str:
    """Say how images are normalised."""
    words = {"mean": data.mean, "standard deviation": data.std}
    values = {
        word: "of the training images"
        if numbers is None
        else ", ".join(f"{number:.4g}" for number in numbers)
        for word, numbers in words.items()
    }
    return " and ".join(f"the {word} {value}" for word, value in values.items())


def _take_over(config: RunConfig, single: RunFolder) -> None:
    """Save and evaluate a network that is fine-tuned already.

    Raises:
        ValueError: it has other classes, or its weights cannot be read or do not fit.

    Warns:
        UserWarning: it is the network of a run that was trained on some of the held-out images.
    """
    weights = single.read_weights(config)  # before the data, which may take long
    check_weights_task(config, weights)
    data = load_run_data(config.data, config.fission.seed)
    noun = task_kind(config.data.task).targets.noun
    reports: list[WeightsReport] = []
    network = build_network(config, data, weights, reports.append)
    if reports[0].new:
        raise invalid(
            "finetuned",
            f"a network with a classifier of the {len(data.classes)} {noun}",
            found=other_classes(reports[0], weights, data),
            hint="give it as weights instead, and the single network is trained on these classes first",
        )
    warn_of_held_out_images(config)
    single.path.mkdir(exist_ok=True)
    single.save_weights_report(reports)
    single.save_network(network, network_spec(config, data, network))
    evaluate(single, config, data)


def _train(
    config: RunConfig, run: RunFolder, step: str, progress: bool, say: Callable[[str], object]
) -> None:
    """Train and evaluate one network unless it is finished; go on with a training that has begun."""
    if _is_finished(run):
        say(f"{step} is finished, in {run.path}")
        return
    say(f"{step} is trained in {run.path}")
    watch = Stopwatch(run.training_time)
    train(config, run.path, resume=run.config.is_file(), progress=progress, callbacks=[watch])


def _is_finished(run: RunFolder) -> bool:
    files = (run.weights, run.spec, run.evaluation, run.calibration)
    if not all(file.is_file() for file in files):
        return False
    return run.reliability.is_file() or not run.load_spec(any_task=True).find_task().targets.exclusive
