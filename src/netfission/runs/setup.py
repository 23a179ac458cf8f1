"""From settings to a data set, a network, its description and batches of images."""

import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from math import ceil, isclose
from pathlib import Path

import torch
from torch import Tensor, nn

from netfission.classifier.folder import NetworkSpec
from netfission.config import DataConfig, RunConfig, TrainingConfig
from netfission.data import Augmentation, Batches, ImageData, Split
from netfission.data.augment import Balance
from netfission.data.batches import PairTransform
from netfission.data.matched import full_name
from netfission.data.sources import fingerprint, is_named
from netfission.data.summary import CUT, DataSummary, class_differences
from netfission.methods.base import BuildPlan, Method, call_with_seed
from netfission.methods.optimizers import layer_scales
from netfission.methods.registry import check_settings, find_method
from netfission.models import TrainedWeights, WeightsReport, create_model
from netfission.network import FissionNetwork
from netfission.runs.found_budget import FoundBudget
from netfission.tasks import Task, task_kind
from netfission.utils.errors import first_line, invalid
from netfission.utils.modes import trial_copy
from netfission.utils.processes import find_launch
from netfission.utils.text import count_noun


def with_processes(config: RunConfig, given: Collection[str] = ()) -> RunConfig:
    """Return the settings with the devices and machines that torchrun or SLURM has started processes for.

    Args:
        config: the settings.
        given: names of those that are given even if they have their default.

    Raises:
        ValueError: they name other numbers of devices or machines, or several machines where nothing says
            that processes were started on the others.

    Example:
        >>> with_processes(RunConfig()).training.devices  # started by itself
        1
    """
    launch = find_launch()
    training = config.training
    if launch is None:
        if training.machines > 1 and "MASTER_ADDR" not in os.environ:
            hint = "let torchrun or srun start a process per device on each machine"
            raise invalid(
                "machines", "1 for a command that is started by itself", training.machines, hint=hint
            )
        return config
    for name in ("devices", "machines"):
        started, asked = getattr(launch, name), getattr(training, name)
        if asked != started and (asked != 1 or name in given):
            hint = "leave it out"
            raise invalid(name, f"{started}, as {launch.launcher} has started", asked, hint=hint)
    return replace(config, training=replace(training, devices=launch.devices, machines=launch.machines))


def load_run_data(config: DataConfig, seed: int, *, training: bool = False) -> ImageData:
    """Load the data set that the settings name.

    Args:
        config: the settings.
        seed: seed that chooses the validation split.
        training: prepare what a training alone needs: look for what is probably wrong with the images, and
            decode larger ones for random crops.

    Raises:
        ValueError: see `netfission.data.load_data` and `netfission.data.mask_data`; or `mean` or `std` has
            not one number per channel.

    Example:
        >>> data = load_run_data(DataConfig("digits", limit_per_class=20), seed=0)
        >>> len(data.train), data.shape
        (200, (1, 8, 8))
    """
    data = task_kind(config.task).load_data(config, seed, training=training)
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != data.shape[0]:
            numbers = count_noun(data.shape[0], "number")
            raise invalid(name, f"a list of {numbers}, one per channel of the images", values)
    return replace(data, mean=tuple(config.mean or data.mean), std=tuple(config.std or data.std))


def data_task(config: RunConfig, data: ImageData) -> Task:
    """Return the task of a run on its data set.

    Example:
        >>> config = RunConfig(DataConfig("digits", limit_per_class=20))
        >>> data_task(config, load_run_data(config.data, seed=0)).outputs
        10
    """
    return task_kind(config.data.task).from_data(data, balance=config.data.balance == "weights")


def run_device(config: TrainingConfig) -> str:
    """Return the device that a run's network is evaluated and timed on.

    Example:
        >>> run_device(TrainingConfig(accelerator="cpu"))
        'cpu'
    """
    return "cuda" if torch.cuda.is_available() and config.accelerator != "cpu" else "cpu"


def check_run(config: RunConfig) -> Method:
    """Check the settings of a run, as far as that is possible without model and data.

    Returns:
        The method.

    Raises:
        ValueError: they do not suit the task, or see `netfission.methods.registry.check_settings`.

    Example:
        >>> check_run(RunConfig.from_dict({"task": "regression", "mix": "cutmix"}))
        Traceback (most recent call last):
        ValueError: mix must be 'none' with task=regression, got 'cutmix'
    """
    method = check_settings(config)
    task_kind(config.data.task).check(config)
    return method


def check_weights_task(config: RunConfig, weights: TrainedWeights | None) -> None:
    """Refuse the weights of a run of another task, whose classifier has another meaning.

    Args:
        config: the settings.
        weights: content of the file that the run starts from, if it starts from one.

    Raises:
        ValueError: they are.
    """
    if weights is None or weights.classes is None:  # a file, which does not say
        return
    task = weights.task or DataConfig().task
    if task != config.data.task:
        hint = "its file model.safetensors gives the layers of the network alone"
        expected = f"those of a run of task={config.data.task}"
        raise invalid("weights", expected, found=f"{weights.path} of task={task}", hint=hint)


def is_run_data(config: RunConfig, spec: NetworkSpec, name: str) -> bool:
    """Whether a data set is the one that a run was trained on, which may have moved.

    It is if the run's settings name it, or if it is a copy of the folder that they name, by the names and
    sizes of its files. If there is no such folder any more, the images decide: classes, shape, and mean and
    standard deviation of the training images.

    Args:
        config: settings of the run.
        spec: description of its network.
        name: name or folder of the data set.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the folder does not exist.
        ConnectionError: the hub is out of reach.

    Example:
        >>> config = RunConfig(DataConfig("digits"))
        >>> spec = network_spec(config, load_run_data(config.data, seed=0))
        >>> is_run_data(config, spec, "digits")
        True
    """
    recorded = config.data.data
    if full_name(name) == (recorded if is_named(recorded) else str(Path(recorded).resolve())):
        return True
    if recorded == "digits":
        return False
    if Path(recorded).exists():
        targets = task_kind(config.data.task).targets
        return fingerprint(name, targets) == fingerprint(recorded, targets)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about images left out
            data = load_run_data(replace(config.data, data=name), config.fission.seed)
    except ValueError:  # its images do not suit the settings
        return False
    return data.classes == spec.classes and list(data.shape) == spec.shape and same_statistics(data, spec)


def same_statistics(data: ImageData, spec: NetworkSpec) -> bool:
    """Whether training images have the mean and standard deviation of those that a network was trained on."""
    statistics = zip([*data.mean, *data.std], [*spec.mean, *spec.std], strict=False)
    return all(isclose(value, trained, abs_tol=1e-4) for value, trained in statistics)


def check_unchanged(data: ImageData, trained_on: DataSummary | None) -> None:
    """Check that a run's data set has the splits that it had in training.

    If images are added to a data set whose splits are cut from it, or removed, images that the network was
    trained on come into its other splits.

    Args:
        data: the data set now.
        trained_on: what was found in it before the training; None if it is not known.

    Raises:
        ValueError: the number of images of a class differs in a split; of a test split only if it is cut from
            the training images. Or a split is cut from them, and the names of files differ.
    """
    if trained_on is None:
        return
    parts = [data.summary.validation, data.summary.test]
    is_cut = any(part is not None and part.origin == CUT for part in parts)
    names = ["train", "validation", *(["test"] if data.summary.test.origin == CUT else [])]
    for name in names:
        before, now = getattr(trained_on, name), getattr(data.summary, name)
        images_before, images_now = (0 if split is None else split.images for split in (before, now))
        counts_before, counts_now = (
            [] if split is None else split.images_per_class for split in (before, now)
        )
        if (images_before, counts_before) != (images_now, counts_now):
            found = f"{images_now:,}" if images_before != images_now else "as many of other labels"
        elif is_cut and before and now and before.digest and before.digest != now.digest:
            found = "as many of other names" if data.summary.exclusive else "as many with other targets"
        else:
            continue
        raise invalid(
            "data",
            f"as it was in training, with {images_before:,} {name} images",
            found=f"{data.summary.data} with {found}, so that the splits share images",
            hint="restore it, or evaluate a copy of the new images by `netfission evaluate --data`",
        )


_FEW_STEPS = 100  # of a training: the rate warms up in the first third of it


def check_batch_size(batch_size: int, network: nn.Module, data: ImageData) -> None:
    """Refuse batches of one image for a network whose batch norms cannot train on them.

    Raises:
        ValueError: `batch_size` is 1, and the network normalises features of one position over the batch.
    """
    if batch_size > 1:
        return
    try:
        with torch.no_grad():
            trial_copy(network).train()(torch.zeros(1, *data.shape))
    except ValueError as error:
        raise invalid("batch_size", "at least 2 for this network", 1, hint=first_line(error)) from error


def few_steps(images: int, batch_size: int, epochs: int) -> list[str]:
    """Return a remark for the user if a training has few steps.

    Example:
        >>> few_steps(images=45, batch_size=64, epochs=8)
        ['note: the training has only 8 steps; a smaller batch_size or more epochs give more']
        >>> few_steps(images=4500, batch_size=64, epochs=8)
        []
    """
    steps = ceil(images / batch_size) * epochs
    if steps >= _FEW_STEPS:
        return []
    few = f"the training has only {count_noun(steps, 'step')}"
    return [f"note: {few}; a smaller batch_size or more epochs give more"]


def check_run_data(config: RunConfig, spec: NetworkSpec, name: str) -> None:
    """Raise ValueError if a data set is not the one that a run was trained on; see `is_run_data`."""
    if not is_run_data(config, spec, name):
        expected = f"where the run's own data set is now ({config.data.data} in its settings)"
        raise invalid("data", expected, found=f"{name}, another data set")


def build_network(
    config: RunConfig,
    data: ImageData,
    weights: TrainedWeights | None = None,
    report: Callable[[WeightsReport], object] | None = None,
    *,
    budget: FoundBudget | None = None,
) -> nn.Module:
    """Build the network that the settings name, on the CPU, with its weights drawn from the seed.

    Args:
        config: the settings.
        data: the data set.
        weights: content of the file that `config.model.weights` names, if it is read already.
        report: called with what was loaded from the file, once for each network that the method makes.
        budget: what was found for a budget in time when the run began; it is not measured again.

    Raises:
        ValueError: the model or the method is unknown, the method cannot build it, or the weights of the file
            cannot be read or do not fit.

    Example:
        >>> from netfission.config import FissionConfig, ModelConfig
        >>> config = RunConfig(DataConfig("digits"), ModelConfig("wrn-10-1"), FissionConfig(exits=2))
        >>> network = build_network(config, load_run_data(config.data, seed=0))
        >>> network(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 2, 10])
    """
    try:
        return find_method(config.method).build(_plan(config, data, weights, report, budget)).cpu()
    except ValueError as error:
        if not str(error).startswith("example_input must be accepted by the network"):
            raise
        height, width = data.shape[1:]
        found = f"images of {height}×{width} ({first_line(error.__cause__ or error)})"
        raise invalid("image_size", f"a size that {config.model.model} accepts", found=found) from error


def check_start(config: RunConfig, data: ImageData, weights: TrainedWeights | None = None) -> None:
    """Check that the trained weights which the settings name fit the network, and suit the method.

    Args:
        config: the settings.
        data: the data set.
        weights: content of the file that `config.model.weights` names, if it is read already.

    Raises:
        ValueError: they do not, see `build_network` and `build_parent`.

    Example:
        >>> config = RunConfig(DataConfig("digits"))
        >>> check_start(config, load_run_data(config.data, seed=0))
    """
    find_method(config.method).check_start(_plan(config, data, weights))
    build_parent(config, data, weights)


def _plan(
    config: RunConfig,
    data: ImageData,
    weights: TrainedWeights | None,
    report: Callable[[WeightsReport], object] | None = None,
    budget: FoundBudget | None = None,
) -> BuildPlan:
    """Return what the method needs to build the network that the settings name."""

    fission = config.fission if budget is None else budget.applied(config.fission)
    # A resumed run scores and prunes on the device that it began with.
    device = run_device(config.training) if config.fission.budget_is_timed else "cpu"

    def create() -> nn.Module:
        return _create(config, data, weights, report).to(device)

    batches: list[tuple[Tensor, Tensor]] = []
    if fission.reconstruct and not config.model.trained:
        warnings.warn(
            "reconstruct has nothing to keep: without weights or pretrained, all weights are random",
            stacklevel=3,
        )
    if fission.sparsity > 0 or fission.assignment == "importance" or fission.reconstruct:
        size = task_kind(config.data.task).batch_size(data.shape, config.training.batch_size)
        shown = make_batches(data.train, data, size, device=device, shuffle=True, seed=fission.seed)
        batches = [batch for batch, _ in zip(shown, range(config.training.pruning_batches), strict=False)]
    example = torch.zeros(2, *data.shape, device=device)
    return BuildPlan(partial(call_with_seed, create), fission, example, batches, config.model.trained)


def _create(
    config: RunConfig,
    data: ImageData,
    weights: TrainedWeights | None,
    report: Callable[[WeightsReport], object] | None,
) -> nn.Module:
    """Create the single network that the settings name."""
    task = data_task(config, data)
    model = create_model(
        config.model.model,
        task.outputs,
        in_channels=data.shape[0],
        pretrained=config.model.pretrained,
        weights=weights or config.model.weights,
        report=report,
        drop_path=config.training.drop_path,
        classes=data.classes,
        image_size=(data.shape[1], data.shape[2]),
    )
    task.check_model(config.model.model, model, data.shape)
    return model.to(memory_format=torch.channels_last) if config.training.channels_last else model


def build_parent(
    config: RunConfig, data: ImageData, weights: TrainedWeights | None = None
) -> nn.Module | None:
    """Build the network as the file of weights holds it, if it teaches; None if it does not.

    Args:
        config: the settings.
        data: the data set.
        weights: content of the file that `config.model.weights` names, if it is read already.

    Raises:
        ValueError: the file has no classifier of these classes, or its weights do not fit.
    """
    if not config.training.parent_weight:
        return None
    reports: list[WeightsReport] = []
    parent = call_with_seed(lambda: _create(config, data, weights, reports.append), config.fission.seed)
    (report,) = reports
    if report.new:
        expected = f"of a network trained on the {len(data.classes)} classes of the data, with parent_weight"
        found = other_classes(report, weights, data)
        raise invalid("weights", expected, found=found, hint="train it first, or leave parent_weight out")
    return parent


def other_classes(report: WeightsReport, weights: TrainedWeights | None, data: ImageData) -> str:
    """Say how the classes of a network of which no classifier was taken differ from those of the data.

    Args:
        report: of the weights.
        weights: content of the file that they are from; None if it is not known.
        data: the data set.
    """
    if weights is None:
        return f"{report.path}, which has no such classifier"
    if weights.classes is not None:
        return f"{report.path}, trained on classes {class_differences(data.classes, weights.classes)}"
    sizes = {
        len(tensor)
        for name, tensor in weights.tensors.items()
        if tensor.ndim and name.removeprefix(report.prefix) in report.new
    }
    if len(sizes) == 1:
        return f"{report.path}, with a classifier of {sizes.pop()} classes"
    return f"{report.path}, without a classifier"


def rate_scales(config: RunConfig, data: ImageData, network: nn.Module) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter of a run's network; none if all are 1."""
    decay = config.training.layer_decay
    if decay is None:
        return {}
    outputs = data_task(config, data).outputs
    create = partial(create_model, config.model.model, outputs, in_channels=data.shape[0])
    return layer_scales(network, call_with_seed(create, seed=0), decay)


def network_spec(config: RunConfig, data: ImageData, network: nn.Module | None = None) -> NetworkSpec:
    """Describe the trained network, with the stages that it was cut into if they were joined."""
    made = network.config if isinstance(network, FissionNetwork) else None
    branch_after = config.fission.known_branch_after(trained=config.model.trained)
    fission = replace(config.fission, branch_after=branch_after)
    if made is not None:
        fission = replace(fission, stages=made.stages, budget=made.budget, budget_in=made.budget_in)
        # The budget may have made late exits leave earlier.
        if branch_after == "late" and isinstance(made.branch_after, list):
            fission = replace(fission, branch_after=made.branch_after)
    return NetworkSpec(
        model=config.model.model,
        classes=list(data.classes),
        shape=list(data.shape),
        mean=list(data.mean),
        std=list(data.std),
        fission=asdict(fission),
        netfission=version("netfission"),
        method=asdict(config.method),
        task=config.data.task,
        scale=data_task(config, data).scale,
    )


def make_batches(
    split: Split,
    data: ImageData,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    shuffle: bool = False,
    augment: Augmentation | None = None,
    transform: PairTransform | None = None,
    balance: Balance = "none",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Batches:
    """Make normalised batches of a split, on a device; see `netfission.data.Batches`.

    Shuffled batches all have `batch_size` images, if the split has enough for one per process.
    """
    return Batches(
        split,
        batch_size,
        mean=data.mean,
        std=data.std,
        device=device,
        shuffle=shuffle,
        drop_last=shuffle and len(split) >= batch_size * world_size,
        augment=augment,
        transform=transform,
        balance=balance,
        seed=seed,
        rank=rank,
        world_size=world_size,
        workers=workers,
        classes=len(data.classes),
        crop_size=(data.shape[1], data.shape[2]),
    )


def augmentation(config: DataConfig, data: ImageData) -> Augmentation:
    """Return the settings' augmentation; by default it suits photographs, and digits get none."""
    photographs = data.name != "digits"
    padding = data.shape[1] // 8 if photographs else 0
    if config.crop_scale is not None:
        padding = 0
    elif config.crop_padding is not None:
        padding = config.crop_padding
        if padding >= (smallest := min(data.shape[1:])):
            raise invalid("crop_padding", f"less than the images' height and width ({smallest})", padding)
    return Augmentation(
        crop_padding=padding,
        crop_scale=config.crop_scale,
        flip=photographs if config.flip is None else config.flip,
        rand_augment=config.rand_augment,
        color_jitter=config.color_jitter,
        erase=config.erase,
        mix=config.mix,
        mix_alpha=config.mix_alpha,
        label_smoothing=config.label_smoothing,
    )
