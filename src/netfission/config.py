"""The settings of a run as plain data; their descriptions are the help of the command line."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any, Literal, Self, TypedDict, get_args

from netfission.utils.errors import (
    check_choice,
    check_image_size,
    check_positive,
    check_positive_integer,
    check_within,
    invalid,
)
from netfission.utils.typed import type_hints, typed

CORRUPTION_IMAGES = 1000  # test images at most that are corrupted, unless a number is asked for
DEFAULT_RISK = 0.05  # accepted share of wrong answers, where a network abstains by default

LARGEST_INTEGER = 2**31 - 1  # of a setting
LARGEST_SEED = 2**32 - 1  # that NumPy accepts

ONE_PREDICTION = frozenset({"born-again"})  # methods with one exit, whose default number of exits is 1

STOPS_EARLY = frozenset({"fission", "multi-exit"})  # methods whose exits can answer one after another

COPY_NOISE = 0.1  # on copies of trained weights, by default

BranchPoints = Literal["auto", "late"]
BudgetIn = Literal["macs", "time", "training"]
TaskName = Literal["classification", "multilabel", "regression", "segmentation"]
Teacher = Literal["logits", "probabilities", "others"]
Reduction = Literal["sum", "mean"]


_LARGEST = 1_000_000  # of a number that multiplies losses, gradients or pixels: float32 has room beyond it
_LEAST_STD = 1e-6


@dataclass(frozen=True)
class DataConfig:
    """Which images to train on, and how to augment them.

    Args:
        data: digits, cifar10, cifar100, tiny-imagenet, hf/OWNER/NAME (of the hub), a folder of images or of
            parquet shards, or a table of paths and labels (.csv, .tsv or .parquet).
        task: what the images are labelled with: classification (one class), multilabel (any number of labels,
            in a table or with a folder for each), regression (one or several numbers, in a table), or
            segmentation (a class for each pixel, in a folder of photographs and masks).
        void: with segmentation, the number that masks give to pixels without a class; default that of the
            class void in classes.txt, or else 255.
        image_size: resize images to this height and width, in pixels; with segmentation the shorter side;
            default their own size.
        mean: what is subtracted from images, one number per channel, on the scale [0, 1], as a list:
            [0.5,0.5,0.5]; default the mean of the training images.
        std: what images are divided by, on the same scale, as a list; default the standard deviation of the
            training images.
        validation: share of the training images held out for validation, in [0, 1); a validation split of the
            data set replaces it, unless it is 0.
        limit_per_class: train on at most this number of images per class; default all.
        corrupt: what to do with an image that cannot be read: refuse or skip.
        crop_padding: pixels of zero padding for random crops; default an eighth of the image, 0 for digits.
        crop_scale: smallest share of an image's area that a random crop keeps, in (0, 1]; the crop is resized
            to image_size, from a larger image if the file has one, and there is no padding; default no such
            crops. With segmentation, photographs are scaled by up to its square root, down or up, and then
            cropped; default 0.5.
        flip: flip images left to right at random; default true, false for digits.
        rand_augment: strength of RandAugment (two random changes of colour or geometry per image), from 0 to
            30; default none.
        color_jitter: largest relative change of brightness, contrast and saturation, in [0, 1].
        erase: probability that a random rectangle of an image is erased, in [0, 1].
        mix: mix pairs of images and their labels: none, cutmix or mixup.
        mix_alpha: parameter of the Beta distribution of the mixing share, from 0.1 to 1000.
        label_smoothing: share of each label that is spread over all classes, in [0, 1).
        balance: with uneven classes: none, weights (the loss of an image has a factor inverse to the size of
            its class; with segmentation that of a pixel) or sampler (images of all classes are drawn equally
            often).
        workers: processes that decode images, for data sets too large for memory.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> DataConfig("cifar100", validation=1.0)
        Traceback (most recent call last):
        ValueError: validation must be a share of the training images, in [0, 1), got 1.0
    """

    data: str = "digits"
    task: TaskName = "classification"
    void: int | None = None
    image_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    validation: float = 0.1
    limit_per_class: int | None = None
    corrupt: Literal["refuse", "skip"] = "refuse"
    crop_padding: int | None = None
    crop_scale: float | None = None
    flip: bool | None = None
    rand_augment: int | None = None
    color_jitter: float = 0.0
    erase: float = 0.0
    mix: Literal["none", "cutmix", "mixup"] = "none"
    mix_alpha: float = 1.0
    label_smoothing: float = 0.0
    balance: Literal["none", "weights", "sampler"] = "none"
    workers: int = 2

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_image_size("image_size", self.image_size)
        if self.limit_per_class is not None:
            check_positive_integer("limit_per_class", self.limit_per_class)
        if self.void is not None and not 0 <= self.void <= 255:
            raise invalid("void", "a number of a mask's pixels, from 0 to 255", self.void)
        if self.mean is not None and not all(abs(value) <= _LARGEST for value in self.mean):
            raise invalid("mean", f"a finite number per channel, of at most {_LARGEST:,}", self.mean)
        if self.std is not None and not all(_LEAST_STD <= value <= _LARGEST for value in self.std):
            expected = f"a positive number per channel, from {_LEAST_STD:g} to {_LARGEST:,}"
            raise invalid("std", expected, self.std)
        if not 0 <= self.validation < 1:
            raise invalid("validation", "a share of the training images, in [0, 1)", self.validation)
        for name in ("crop_padding", "workers"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise invalid(name, "an integer of at least 0", value)
        check_within("mix_alpha", self.mix_alpha, 0.1, 1000)  # others are not drawn correctly in float32
        if self.crop_scale is not None and not 0 < self.crop_scale <= 1:
            raise invalid("crop_scale", "a share of an image's area, in (0, 1]", self.crop_scale)
        if self.rand_augment is not None and not 0 <= self.rand_augment <= 30:
            raise invalid("rand_augment", "an integer from 0 to 30", self.rand_augment)
        for name in ("color_jitter", "erase"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise invalid(name, "a number in [0, 1]", share)
        if not 0 <= self.label_smoothing < 1:
            raise invalid("label_smoothing", "a share in [0, 1)", self.label_smoothing)


@dataclass(frozen=True)
class ModelConfig:
    """Which network to start from.

    Args:
        model: cifar-resnet18, cifar-resnet34, cifar-resnet50 (with -wN for base width N), wrn-DEPTH-WIDTH, a
            timm name, torchvision/NAME, smp/ARCHITECTURE/ENCODER for a network that classifies pixels, or
            hf/NAME for an image classifier of Hugging Face (a name on the hub or a folder with config.json).
        pretrained: start from published weights.
        weights: start from the weights in a file (safetensors, or a state dict saved by PyTorch), or in the
            folder of a run of one exit, of which linear exits are left out; a classifier of other classes
            gets random weights, and so does a decoder if the file is of an encoder.

    Raises:
        ValueError: both `pretrained` and `weights` are given, or `weights` is empty.

    Example:
        >>> ModelConfig("wrn-28-10")
        ModelConfig(model='wrn-28-10', pretrained=False, weights=None)
    """

    model: str = "wrn-16-2"
    pretrained: bool = False
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights == "":
            raise invalid("weights", "a file, or the folder of a run", "")
        if self.pretrained and self.weights is not None:
            raise invalid("weights", "left out with pretrained, which loads others", self.weights)

    @property
    def trained(self) -> bool:
        """Whether the network starts from trained weights."""
        return self.pretrained or self.weights is not None


@dataclass(frozen=True)
class FissionConfig:
    """How to make a multi-exit network: the settings of `fission` that are plain data.

    Args:
        exits: number of exits; 1 is the network itself; default 3, or 1 with born-again.
        branch_after: the stage (name or number from 1) after which each exit but the first leaves exit 0, as
            a list: [1,2]; or late (all after the last stage but one, so that most of the network stays
            whole, or after an earlier one if a budget cannot be met there), or auto (late for trained
            weights: pretrained, weights or reconstruct); default 1, 2, ….
        linear_exits: stages (name or number from 1) after which a linear classifier leaves exit 0, in
            addition to the exits, as a list: [3,4]; default none.
        linear_weight: weight of each linear exit in the ensemble's mean of logits, above 0, if that of the
            other exits is 1; default 1. The mean that teaches the exits has equal weights.
        stages: names of the modules that end the stages, as a list: [layer1,layer2]; default found from the
            model's graph.
        grouping: how each stage is divided among its paths: weights, channels or copies.
        keep_shortcuts: with weights, give each path the whole projection of every shortcut.
        exact_partition: with channels, give each channel to exactly one path, whatever the cost.
        budget: with channels, multiply-accumulates of the network with all its paths over those of the model;
            default 1. Below 1 paths are narrower and the ensemble is cheaper than the model, above 1 wider.
        budget_in: what the budget limits: macs, or what is measured beside the model: time (of inference,
            deployed) or training (time of a training step).
        budget_batch_size: with budget_in time or training, number of images whose time is measured.
        assignment: with channels, how they are assigned to paths: random, or importance (by the criterion).
        overlap: with channels, share of the channels of the narrowest path that all paths start with, in
            [0, 1]; default 0, as few as their widths allow. Each path trains its own weights of them.
        ratio: relative shares of the paths, exit 0 first, as a list: [2,1,1]; default equal.
        reconstruct: with channels, solve the layers of each path and of linear exits by least squares on
            training images, so that they compute what the whole network does; for trained weights.
        copy_noise: with copies, each path but the first starts from the weights plus normal noise, whose
            standard deviation is this share of that of each tensor; default the same weights in random order,
            or 0.1 if they are trained (pretrained, weights).
        sparsity: share of the prunable weights removed before grouping, in [0, 1).
        criterion: score by which weights are pruned: random, erk, magnitude, snip, grasp or synflow.
        pruning_steps: number of steps in which to prune; default 1, for synflow 100.
        seed: seed of all random choices.

    Raises:
        ValueError: a value is out of range, or a setting is not one of the grouping's.

    Example:
        >>> FissionConfig(exits=3, ratio=[2, 1, 1]).shares
        [2.0, 1.0, 1.0]
        >>> FissionConfig(grouping="copies", keep_shortcuts=True)
        Traceback (most recent call last):
        ValueError: keep_shortcuts must be False unless grouping='weights', got True
    """

    exits: int = 3
    branch_after: list[int | str] | BranchPoints | None = None
    linear_exits: list[int | str] | None = None
    linear_weight: float = 1.0
    stages: list[str] | None = None
    grouping: str = "weights"
    keep_shortcuts: bool = False
    exact_partition: bool = False
    budget: float = 1.0
    budget_in: BudgetIn = "macs"
    budget_batch_size: int = 32
    assignment: str = "random"
    overlap: float = 0.0
    ratio: list[float] | None = None
    reconstruct: bool = False
    copy_noise: float | None = None
    sparsity: float = 0.0
    criterion: str = "snip"
    pruning_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_integer("exits", self.exits)
        for name, expected in _LISTS.items():
            value = getattr(self, name)
            named = name == "branch_after" and isinstance(value, str) and value in get_args(BranchPoints)
            if value is not None and not named:
                object.__setattr__(self, name, _as_list(name, expected, value))
        if self.stages is not None and not all(isinstance(stage, str) for stage in self.stages):
            raise invalid("stages", _LISTS["stages"], self.stages)
        if not isinstance(self.seed, Integral):
            raise invalid("seed", "an integer", self.seed)
        if self.pruning_steps is not None:
            check_positive_integer("pruning_steps", self.pruning_steps)
        if not isinstance(self.sparsity, Real) or not 0 <= self.sparsity < 1:
            raise invalid("sparsity", "the share of weights to remove, in [0, 1)", self.sparsity)
        if self.ratio is not None and not _are_shares(self.ratio, self.exits):
            raise invalid("ratio", f"{self.exits} positive numbers, one per exit", self.ratio)
        check_choice("assignment", self.assignment, ("importance", "random"))
        check_positive("linear_weight", self.linear_weight)
        if self.copy_noise is not None:
            check_positive("copy_noise", self.copy_noise)
        if not isinstance(self.overlap, Real) or not 0 <= self.overlap <= 1:
            raise invalid("overlap", "a share of the channels, in [0, 1]", self.overlap)
        check_positive("budget", self.budget)
        check_choice("budget_in", self.budget_in, get_args(BudgetIn))
        check_positive_integer("budget_batch_size", self.budget_batch_size)
        for name, default, grouping in (
            ("keep_shortcuts", False, "weights"),
            ("exact_partition", False, "channels"),
            ("budget", 1.0, "channels"),
            ("budget_in", "macs", "channels"),
            ("assignment", "random", "channels"),
            ("overlap", 0.0, "channels"),
            ("reconstruct", False, "channels"),
            ("copy_noise", None, "copies"),
        ):
            value = getattr(self, name)
            if value == default:
                continue
            if self.grouping != grouping:
                raise invalid(name, f"{default!r} unless grouping={grouping!r}", value)
            if self.exact_partition and name in ("budget", "budget_in", "overlap"):
                raise invalid(name, f"{default!r} with exact_partition", value)

    @property
    def budget_is_timed(self) -> bool:
        """Whether the budget limits a time, which is measured.

        Example:
            >>> FissionConfig(grouping="channels", budget_in="training").budget_is_timed
            True
        """
        return self.budget_in != "macs"

    @property
    def linear(self) -> int:
        """The number of linear exits."""
        return len(self.linear_exits or ())

    def known_branch_after(self, *, trained: bool) -> list[int | str] | BranchPoints | None:
        """Return `branch_after`, or what `auto` stands for.

        Args:
            trained: whether the network has trained weights; `reconstruct` says so, too.

        Example:
            >>> FissionConfig(branch_after="auto").known_branch_after(trained=True)
            'late'
        """
        if self.branch_after != "auto":
            return self.branch_after
        return "late" if trained or self.reconstruct else None

    @property
    def predictions(self) -> int:
        """The number of predictions: of exits and of linear exits."""
        return self.exits + self.linear

    @property
    def exit_weights(self) -> tuple[float, ...] | None:
        """The weights of the exits in the ensemble's mean of logits; None if all are the same.

        Example:
            >>> FissionConfig(exits=1, linear_exits=[4, 4], linear_weight=0.5).exit_weights
            (1.0, 0.5, 0.5)
        """
        if not self.linear or self.linear_weight == 1:
            return None
        return (1.0,) * self.exits + (self.linear_weight,) * self.linear

    @property
    def shares(self) -> list[float]:
        """The relative share of each exit's path, exit 0 first: `ratio`, or equal shares."""
        return [1.0] * self.exits if self.ratio is None else [float(share) for share in self.ratio]


class FissionSettings(TypedDict, total=False):
    """Types of the settings that `netfission.fission` accepts as keywords; see `FissionConfig`."""

    branch_after: Sequence[int | str] | BranchPoints | None
    linear_exits: Sequence[int | str] | None
    linear_weight: float
    stages: Sequence[str] | None
    keep_shortcuts: bool
    exact_partition: bool
    budget: float
    budget_in: BudgetIn
    budget_batch_size: int
    assignment: str
    overlap: float
    ratio: Sequence[float] | None
    reconstruct: bool
    copy_noise: float | None
    sparsity: float
    criterion: str
    pruning_steps: int | None
    seed: int


_LISTS = {
    "branch_after": "auto, late or a list such as [1, 2] or ['blocks.1', 'blocks.3']",
    "linear_exits": "a list such as [3, 4] or ['layer3']",
    "stages": "a list of names of modules, such as ['blocks.1']",
    "ratio": "a list of numbers, such as [2, 1, 1]",
}


def _as_list(name: str, expected: str, value: Any) -> list[Any]:
    """Return the values of a list or tuple; text is refused, as its letters would be values."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise invalid(name, expected, value)
    return list(value)


def _are_shares(ratio: Sequence[float], exits: int) -> bool:
    return len(ratio) == exits and all(
        isinstance(share, Real) and isfinite(share) and share > 0 for share in ratio
    )


@dataclass(frozen=True)
class MethodConfig:
    """Which method makes the ensemble, and the settings of the baselines.

    The number of a baseline's members is `exits`. Ranges are checked by the methods that read a setting.

    Args:
        method: fission, or a baseline: batch-ensemble, born-again, deep-ensemble, dst-ensemble,
            edst-ensemble, fge, lora-ensemble, masksembles, mc-dropout, mimo, multi-exit, narrow,
            neurotrails, packed, singular-value-ensemble, snapshot, treenet.
        alpha: with packed: width of all members together, relative to the network.
        branch_groups: with narrow: groups of each branch's convolutions, as a list: [1,2,3]; default 1, 2, ….
        cycling: with fge: share of the training spent in cycles of the learning rate, in (0, 1].
        dropout_layers: with mc-dropout: dropout before all layers but the first, or before the last alone,
            which keeps what a trained network knows and runs the rest once.
        dropout_rate: with mc-dropout: share of the features that is dropped, in (0, 1).
        gamma: with packed: groups that each member's convolutions are divided into.
        generations: with born-again: networks trained one after another, each the next one's teacher.
        one_by_one: with deep-ensemble: train the members one after another, each for all epochs; default
            together.
        rank: with lora-ensemble: rank of each member's change of a projection.
        regrow: with dst-ensemble, edst-ensemble and neurotrails: which removed weights come back: gradient
            (largest gradients, RigL) or random (SET).
        regrow_every: with dst-ensemble, edst-ensemble and neurotrails: steps between two moves of weights;
            default 1000, or a fiftieth of all steps if there are fewer than 50,000.
        regrow_share: with dst-ensemble, edst-ensemble and neurotrails: share of each layer's kept weights
            that move at first, in (0, 1].
        repetitions: with mimo: how often each image occurs in a training batch.
        rho: with mimo: share of a batch in which all members see the same image, in [0, 1].
        scale: with masksembles: how little the members' masks overlap, from 1 (equal masks) to 6.

    Example:
        >>> MethodConfig("packed", alpha=3.0).method
        'packed'
    """

    method: str = "fission"
    alpha: float = 2.0
    branch_groups: list[int] | None = None
    cycling: float = 0.2
    dropout_layers: Literal["all", "last"] = "all"
    dropout_rate: float = 0.1
    gamma: int = 1
    generations: int = 2
    one_by_one: bool = False
    rank: int = 8
    regrow: Literal["gradient", "random"] = "gradient"
    regrow_every: int | None = None
    regrow_share: float = 0.5
    repetitions: int = 4
    rho: float = 0.0
    scale: float = 2.0


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Args:
        epochs: passes over the training images.
        batch_size: images per step on each device.
        optimizer: sgd (Nesterov momentum), adamw, or another optimiser of timm by name, such as lamb.
        learning_rate: peak learning rate; default 0.1 for sgd, 0.001 for others.
        momentum: momentum of sgd and of timm's optimisers that have one, in [0, 1).
        weight_decay: weight decay; default 0.0005 for sgd on all parameters, 0.05 for adamw on weights alone,
            0 for others.
        layer_decay: factor on the learning rate per layer (of timm's models: per block), from the last one
            back, in (0, 1); default one rate for all.
        schedule: of the learning rate: paper (constant, then linear), cosine or one_cycle.
        warmup: share of the training in which the learning rate rises linearly before the schedule, in
            [0, 1); one_cycle has its own rise.
        temperature: temperature of the ensemble distillation.
        distillation_weight: factor on the distillation term; default 1 for fission, 0 (cross-entropy alone)
            for baselines defined without distillation.
        parent_weight: factor on the distillation from the network as its file of weights holds it, with the
            same temperature; for a network that is already trained on these classes.
        teacher: of the distillation: logits (softmax of the exits' mean logits), probabilities (mean of their
            softmaxes) or others (for each exit, softmax of the other exits' mean logits).
        reduction: of the exits' losses: sum or mean; default as the method's authors do (fission: sum).
        pruning_batches: training batches that the criteria snip and grasp read, and reconstruct.
        precision: 32-true, bf16-mixed or 16-mixed.
        channels_last: store images and weights in channels-last order.
        compile: compile the network with torch.compile.
        accumulate: batches whose gradients are added for one step.
        clip: maximum norm of the gradient; default no clipping, or 1 with regression.
        ema: decay of an exponential moving average of the weights, which becomes the result; default none.
        drop_path: probability by which a timm model skips its last block in training, in [0, 1); it falls
            linearly to 0 at the first block.
        patience: stop after this number of epochs without a lower validation NLL, and keep the weights of
            the epoch with the lowest; default all epochs, and the last one is kept.
        accelerator: auto, cpu or gpu.
        devices: number of devices on each machine.
        machines: number of machines.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> TrainingConfig(epochs=200, batch_size=0)
        Traceback (most recent call last):
        ValueError: batch_size must be a positive integer, got 0
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: str = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    layer_decay: float | None = None
    schedule: Literal["paper", "cosine", "one_cycle"] = "paper"
    warmup: float = 0.0
    temperature: float = 3.0
    distillation_weight: float | None = None
    parent_weight: float = 0.0
    teacher: Teacher = "logits"
    reduction: Reduction | None = None
    pruning_batches: int = 4
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    drop_path: float = 0.0
    patience: int | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    machines: int = 1

    @property
    def peak_rate(self) -> float:
        """The peak learning rate: `learning_rate`, or the optimiser's default."""
        return self.learning_rate or (0.1 if self.optimizer == "sgd" else 1e-3)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "devices", "machines", "pruning_batches"):
            check_positive_integer(name, getattr(self, name))
        if self.patience is not None:
            check_positive_integer("patience", self.patience)
        for name in ("learning_rate", "clip", "temperature"):
            if (value := getattr(self, name)) is not None:
                check_positive(name, value)
        for name in ("weight_decay", "distillation_weight", "parent_weight"):
            if (value := getattr(self, name)) is not None and not 0 <= value < inf:
                raise invalid(name, "a finite number of at least 0", value)
        for name in (
            "learning_rate",
            "clip",
            "temperature",
            "weight_decay",
            "distillation_weight",
            "parent_weight",
        ):
            if (getattr(self, name) or 0) > _LARGEST:
                raise invalid(name, f"at most {_LARGEST:,}", getattr(self, name))
        for name in ("momentum", "warmup", "drop_path"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise invalid(name, "a number in [0, 1)", value)
        if self.layer_decay is not None and not 0 < self.layer_decay < 1:
            raise invalid("layer_decay", "a factor between 0 and 1, such as 0.75", self.layer_decay)
        if self.ema is not None and not 0 < self.ema < 1:
            raise invalid("ema", "a decay between 0 and 1, such as 0.999", self.ema)


# Settings for a purpose, by name. A user's settings override them.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "finetune": {  # a pretrained network, on photographs
        "epochs": 20,
        "batch_size": 64,
        "optimizer": "adamw",
        "learning_rate": 5e-4,
        "weight_decay": 0.05,
        "schedule": "cosine",
        "warmup": 0.1,
        "clip": 1.0,
        "crop_scale": 0.5,
        "rand_augment": 7,
        "erase": 0.1,
        "label_smoothing": 0.1,
    },
    "finetune-short": {  # the same in few epochs, with weak augmentation
        "epochs": 8,
        "batch_size": 64,
        "optimizer": "adamw",
        "learning_rate": 5e-4,
        "weight_decay": 0.05,
        "schedule": "one_cycle",
    },
}

# What `netfission finetune` does by default: the recipe of both networks, and settings of the ensemble.
FINETUNE_RECIPE = "finetune-short"
ENSEMBLE_EPOCHS = 5
LINEAR_EXITS = 2
OF_TRAINED_WEIGHTS: Mapping[str, Any] = {
    "exits": 1,  # beside the linear ones: dividing costs time, and gained nothing measurable on few images
    "linear_weight": 0.3,  # beside one exit; about the best weight on held-out training images
    "grouping": "channels",
    "reconstruct": True,
    "pruning_batches": 16,
    "parent_weight": 1.0,
}


def changed(part: MethodConfig | FissionConfig) -> dict[str, Any]:
    """Return the settings that differ from their defaults.

    Example:
        >>> changed(FissionConfig(exits=2, seed=0))
        {'exits': 2}
    """
    values = ((setting, getattr(part, setting.name)) for setting in fields(part))
    return {setting.name: value for setting, value in values if value != setting.default}


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run, in five parts; files and the command line hold them as one flat list.

    Example:
        >>> config = RunConfig.from_dict({"model": "wrn-28-10", "exits": 2, "epochs": 200})
        >>> config.fission.exits, config.training.epochs
        (2, 200)

    Raises:
        ValueError: an integer is too large, or the seed is negative.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    fission: FissionConfig = field(default_factory=FissionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    method: MethodConfig = field(default_factory=MethodConfig)

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            if isinstance(value, int) and value > LARGEST_INTEGER and name != "seed":
                raise invalid(name, f"an integer of at most {LARGEST_INTEGER}", value)
        if not 0 <= self.fission.seed <= LARGEST_SEED:
            raise invalid("seed", f"an integer from 0 to {LARGEST_SEED}", self.fission.seed)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings in one dict: name → value."""
        parts = (getattr(self, part.name) for part in fields(self))
        values = {setting.name: getattr(part, setting.name) for part in parts for setting in fields(part)}
        return {name: list(value) if isinstance(value, list) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Make the config from a flat dict, as `to_dict` returns; a setting left out has its default.

        Raises:
            ValueError: a setting is unknown, of another type, or out of range.

        Example:
            >>> RunConfig.from_dict({"epoch": 3})  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ValueError: setting must be one of data, task, ..., got 'epoch'; did you mean epochs ...
        """
        kinds: dict[str, Any] = {part.name: part.default_factory for part in fields(cls)}
        types = {name: hint for kind in kinds.values() for name, hint in type_hints(kind).items()}
        values = {
            name: typed(types[check_choice("setting", name, types)], value, name)
            for name, value in settings.items()
        }
        if values.get("method") in ONE_PREDICTION:
            values.setdefault("exits", 1)
        return cls(
            **{
                part: kind(**{name: values[name] for name in type_hints(kind) if name in values})
                for part, kind in kinds.items()
            }
        )

    def to_yaml(self) -> str:
        """Return the settings as YAML text, as `--config` reads it."""
        import yaml  # a late import: `import netfission` needs no YAML

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
