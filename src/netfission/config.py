"""Everything that says what a run does, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Any, Literal, Self, TypedDict, get_type_hints

from netfission.utils.errors import check_choice, check_positive, check_positive_integer, invalid
from netfission.utils.typed import typed

Teacher = Literal["logits", "probabilities", "others"]
Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on and how its images are varied.

    Args:
        data: digits, cifar10, cifar100, tiny-imagenet, or a folder of parquet shards or of images.
        image_size: height and width that images are resized to; default as they are.
        validation: share of the training images held out for validation, in [0, 1).
        limit_per_class: keep only so many training images of each class.
        corrupt: what to do with an image that cannot be read: refuse or skip.
        crop_padding: pixels of zero padding for random crops; default an eighth of the image, none for
            digits.
        flip: flip images left to right at random; default yes, except for digits.
        mix: mix pairs of images and their labels: none, cutmix or mixup.
        mix_alpha: parameter of the Beta distribution that mixing draws from.
        workers: processes that decode images, for data sets too large for memory.
    """

    data: str = "digits"
    image_size: int | None = None
    validation: float = 0.1
    limit_per_class: int | None = None
    corrupt: Literal["refuse", "skip"] = "refuse"
    crop_padding: int | None = None
    flip: bool | None = None
    mix: Literal["none", "cutmix", "mixup"] = "none"
    mix_alpha: float = 1.0
    workers: int = 2


@dataclass(frozen=True)
class ModelConfig:
    """Which network to start from.

    Args:
        model: cifar-resnet18, cifar-resnet34, cifar-resnet50 (with -wN for base width N), wrn-DEPTH-WIDTH, a
            timm name or torchvision/NAME.
        pretrained: start from published weights.
    """

    model: str = "wrn-16-2"
    pretrained: bool = False


@dataclass(frozen=True)
class FissionConfig:
    """The settings of `fission` that are plain data; see there for what each takes.

    Args:
        exits: number of exits; 1 is the network itself.
        branch_after: one stage (name or number from 1) per extra exit, after which it leaves exit 0, as a
            list: [1,2]; default 1, 2, ….
        stages: names of the modules that end the stages, as a list: [layer1,layer2]; default found from the
            model's graph.
        grouping: how each stage is dealt out to its paths: channels, weights or copies.
        keep_shortcuts: with weights, give every path the whole of each shortcut's projection.
        exact_partition: with channels, give out every channel exactly once, whatever it costs.
        assignment: with channels, deal them random or by importance (scored by the criterion).
        ratio: relative shares of the paths, exit 0 first, as a list: [2,1,1]; default equal.
        sparsity: share of the prunable weights removed before grouping, in [0, 1).
        criterion: what scores weights for pruning: random, erk, magnitude, snip, grasp or synflow.
        pruning_steps: prune in this many steps; default 1, for synflow 100.
        seed: seed of everything drawn at random.
    """

    exits: int = 3
    branch_after: list[int | str] | None = None
    stages: list[str] | None = None
    grouping: str = "weights"
    keep_shortcuts: bool = False
    exact_partition: bool = False
    assignment: str = "random"
    ratio: list[float] | None = None
    sparsity: float = 0.0
    criterion: str = "snip"
    pruning_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("branch_after", "stages", "ratio"):
            if isinstance(value := getattr(self, name), tuple):
                object.__setattr__(self, name, list(value))
        check_positive_integer("exits", self.exits)
        if self.pruning_steps is not None:
            check_positive_integer("pruning_steps", self.pruning_steps)
        if not 0 <= self.sparsity < 1:
            raise invalid("sparsity", "the share of weights to remove, in [0, 1)", self.sparsity)
        if self.ratio is not None and not _are_shares(self.ratio, self.exits):
            raise invalid("ratio", f"{self.exits} positive numbers, one per exit", self.ratio)
        check_choice("assignment", self.assignment, ("importance", "random"))
        for name, default, grouping in (
            ("keep_shortcuts", False, "weights"),
            ("exact_partition", False, "channels"),
            ("assignment", "random", "channels"),
        ):
            value = getattr(self, name)
            if value != default and self.grouping != grouping:
                raise invalid(name, f"{default!r} unless grouping={grouping!r}", value)

    @property
    def shares(self) -> list[float]:
        """The relative share of each exit's path, exit 0 first: `ratio`, or equal shares."""
        return [1.0] * self.exits if self.ratio is None else [float(share) for share in self.ratio]


class FissionSettings(TypedDict, total=False):
    """What `netfission.fission` takes by keyword; see `FissionConfig`."""

    branch_after: Sequence[int | str] | None
    stages: Sequence[str] | None
    keep_shortcuts: bool
    exact_partition: bool
    assignment: str
    ratio: Sequence[float] | None
    sparsity: float
    criterion: str
    pruning_steps: int | None
    seed: int


def _are_shares(ratio: Sequence[float], exits: int) -> bool:
    return len(ratio) == exits and all(isfinite(share) and share > 0 for share in ratio)


@dataclass(frozen=True)
class MethodConfig:
    """Which way to several predictions, and what the baselines take beside the number of their members.

    Args:
        method: fission, or a baseline: batch-ensemble, deep-ensemble, dst-ensemble, edst-ensemble,
            fge, masksembles, mc-dropout, mimo, multi-exit, narrow, neurotrails, packed, snapshot.
        alpha: with packed: the members together are so many times as wide as the network.
        branch_groups: with narrow: groups of each branch's convolutions, as a list: [1,2,3]; default 1, 2, ….
        cycling: with fge: share of the training spent in cycles of the learning rate, in (0, 1].
        dropout_rate: with mc-dropout: share of the features that is dropped, in (0, 1).
        gamma: with packed: groups that each member's convolutions are divided into.
        one_by_one: with deep-ensemble: train its members one after another, each for all epochs; default
            together.
        regrow: with dst-ensemble, edst-ensemble and neurotrails: by what removed weights are chosen to come
            back, gradient (RigL) or random (SET).
        regrow_every: with dst-ensemble, edst-ensemble and neurotrails: steps from one move of connections to
            the next; default 1000, as in the papers, or a fiftieth of a training of fewer than 50,000.
        regrow_share: with dst-ensemble, edst-ensemble and neurotrails: share of each layer's kept weights
            that move at first, in (0, 1].
        repetitions: with mimo: how often each image stands in a training batch.
        rho: with mimo: share of the places of a batch where all members are shown the same image, in [0, 1].
        scale: with masksembles: how little the members' masks overlap, from 1 (equal masks) to 6.
    """

    method: str = "fission"
    alpha: float = 2.0
    branch_groups: list[int] | None = None
    cycling: float = 0.2
    dropout_rate: float = 0.1
    gamma: int = 1
    one_by_one: bool = False
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
        batch_size: images a step on each device.
        optimizer: sgd (Nesterov momentum) or adamw.
        learning_rate: peak rate; default 0.1 for sgd, 0.001 for adamw.
        momentum: of sgd.
        weight_decay: default 0.0005 for sgd on every parameter, 0.05 for adamw on weights alone.
        schedule: paper (held, then linear), cosine or one_cycle.
        temperature: of the ensemble distillation.
        distillation_weight: factor on the distillation term; 0 trains with cross-entropy alone; default 1
            for fission, and 0 for the baselines that are defined without.
        teacher: of the distillation: logits (softmax of the exits' mean logits), probabilities (mean of their
            softmaxes) or others (for each exit the softmax of the other exits' mean logits).
        reduction: of the exits' losses: sum (the paper's) or mean.
        pruning_batches: batches of training images shown to the criteria that look at data.
        precision: 32-true, bf16-mixed or 16-mixed.
        channels_last: keep images and weights in channels-last order.
        compile: compile the network with torch.compile.
        accumulate: batches whose gradients are added up for one step.
        clip: largest norm of the gradient; default none.
        ema: decay of an exponential moving average of the weights, which is then the result; default none.
        accelerator: auto, cpu or gpu.
        devices: number of devices on each machine.
        machines: number of machines.
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    schedule: Literal["paper", "cosine", "one_cycle"] = "paper"
    temperature: float = 3.0
    distillation_weight: float | None = None
    teacher: Teacher = "logits"
    reduction: Reduction = "sum"
    pruning_batches: int = 4
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    machines: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "devices", "machines", "pruning_batches"):
            check_positive_integer(name, getattr(self, name))
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None:
                check_positive(name, value)
        if self.ema is not None and not 0 < self.ema < 1:
            raise invalid("ema", "a decay between 0 and 1, such as 0.999", self.ema)


def changed(part: MethodConfig | FissionConfig) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    values = ((setting, getattr(part, setting.name)) for setting in fields(part))
    return {setting.name: value for setting, value in values if value != setting.default}


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. In a file and on the command line they stand flat, side by side."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    fission: FissionConfig = field(default_factory=FissionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    method: MethodConfig = field(default_factory=MethodConfig)

    def to_dict(self) -> dict[str, Any]:
        """Setting → value, flat."""
        return {name: value for part in asdict(self).values() for name, value in part.items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`; settings left out take their defaults.

        Raises:
            ValueError: a setting is unknown, or of another type than it takes.
        """
        kinds: dict[str, Any] = {part.name: part.default_factory for part in fields(cls)}
        takes = {name: hint for kind in kinds.values() for name, hint in get_type_hints(kind).items()}
        read = {
            name: typed(takes[check_choice("setting", name, takes)], value, name)
            for name, value in settings.items()
        }
        return cls(
            **{
                part: kind(**{name: read[name] for name in get_type_hints(kind) if name in read})
                for part, kind in kinds.items()
            }
        )

    def to_yaml(self) -> str:
        """The settings as YAML text, which `--config` reads."""
        import yaml  # here: `import netfission` needs the settings, not the files

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
