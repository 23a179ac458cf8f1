"""The files of a trained network, and the description from which it is built again."""

import copy
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from netfission.algorithm import linear_paths
from netfission.config import FissionConfig, MethodConfig, RunConfig, TaskName
from netfission.ensemble import Average, describe_average
from netfission.evaluation import Evaluation
from netfission.evaluation.calibration import Calibration
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.registry import METHODS, find_method, reads_setting
from netfission.models import create_model
from netfission.models.weights import file_digest
from netfission.network import ExitPath, FissionNetwork
from netfission.surgery.backbone import cut, resolve_branches, resolve_linear_exits
from netfission.surgery.narrowing import fit
from netfission.tasks import Task, find_task
from netfission.tasks.base import Document
from netfission.tasks.registry import other_task
from netfission.utils.checksums import (
    BLANK,
    NAME,
    add_metadata,
    check_tensors,
    check_text,
    checksum_of,
    parse_json,
    stamp,
    stamp_json,
)
from netfission.utils.errors import check_choice, first_line, invalid
from netfission.utils.files import has_file, write_together
from netfission.utils.json_files import named_damage, read_json
from netfission.utils.text import count_noun
from netfission.utils.typed import typed
from netfission.utils.yaml_text import parse_yaml

Factory = Callable[..., nn.Module]  # called with num_classes and in_channels, by name
Digest = Callable[[], str]  # gives the digest of a network, once it is needed
FORMAT = 2  # version of the format of config.json that is read
CLASSES_FORMAT = 1  # of a network of classes, which earlier versions read, too
_SINCE_FORMAT_2 = ("task", "scale")
_WEIGHTS = "weights"  # entry of a file of figures: of which network they are
_ENVIRONMENT = "environment"  # another, in which they were measured
_DESCRIPTION = "description"  # entry of the metadata of the weights: checksum of `spec`
T = TypeVar("T")


class WeightsError(ValueError):
    """The weights belong to another network."""


@dataclass(frozen=True)
class NetworkSpec:
    """A description of a trained network, from which it is built again: the content of `config.json`.

    Attributes:
        model: name of the single network, see `netfission.models.create_model`; None if a factory of the
            user makes it.
        classes: names of the classes, all different, in the order of the logits.
        shape: channels (1 or 3), height and width of an image.
        mean: per channel, on the scale [0, 1]; subtracted from images before the network.
        std: per channel, on the same scale; images are divided by it.
        fission: the fields of `FissionConfig`; of a baseline, `exits` is the number of its members.
        netfission: version that wrote the description.
        method: the fields of `MethodConfig`; default those of fission.
        format: version of the format, raised when older versions would misread a new one.
        task: what the network learned; `classes` are the names of its labels or numbers if that are others.
        scale: of the numbers, see `netfission.tasks.base.Task.scale`.

    Raises:
        ValueError: an attribute is not valid.

    Example:
        >>> spec = NetworkSpec("wrn-10-1", ["cat", "dog"], [3, 8, 8], [0.5] * 3, [0.2] * 3,
        ...                    fission={"exits": 2}, netfission="0.1.0")
        >>> spec.build()(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 2, 2])
        >>> NetworkSpec("wrn-10-1", ["cat", "cat"], [3, 8, 8], [0.5] * 3, [0.2] * 3, {}, "0.1.0")
        Traceback (most recent call last):
        ValueError: classes must be different names, got ['cat', 'cat']
    """

    model: str | None
    classes: list[str]
    shape: list[int]
    mean: list[float]
    std: list[float]
    fission: dict[str, Any]
    netfission: str
    method: dict[str, Any] = field(default_factory=dict)
    format: int = CLASSES_FORMAT
    task: TaskName = "classification"
    scale: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.classes
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise invalid("classes", "different names", names)
        if len(self.shape) != 3 or self.shape[0] not in (1, 3) or min(self.shape) < 1:
            raise invalid("shape", "1 or 3 channels, height and width", self.shape)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.shape[0] or not all(map(math.isfinite, values)):
                raise invalid(name, f"a finite number for each of {self.shape[0]} channels", values)
        if min(self.std) <= 0:
            raise invalid("std", "positive numbers", self.std)

    def single(self, factory: Factory | None = None) -> nn.Module:
        """Make the single network with fresh weights, on the CPU.

        Args:
            factory: makes it in place of `create_model`.

        Raises:
            ValueError: the model has no name and there is no factory.
        """
        if factory is None:
            if self.model is None:
                raise invalid(
                    "factory", "the function that makes the single network, as the network has no name", None
                )
            factory = partial(create_model, self.model, image_size=(self.shape[1], self.shape[2]))
        return factory(num_classes=self.find_task().outputs, in_channels=self.shape[0])

    def find_task(self) -> Task:
        """Return what the network learned."""
        return find_task(self.task, self.classes, self.scale)

    def build(self, factory: Factory | None = None) -> nn.Module:
        """Make the network with fresh weights, on the CPU, in eval mode.

        Nothing is pruned or divided by importance, as the trained weights say what was removed. With
        channel groups the paths have their full width, which `restore` fits to the weights.

        Args:
            factory: see `single`.

        Raises:
            ValueError: the network cannot be built.
        """
        config = typed(FissionConfig, self.fission)
        method = self._method()
        create = partial(call_with_seed, partial(self.single, factory))
        example = torch.zeros(2, *self.shape)
        structure = replace(
            config, criterion="random", pruning_steps=None, assignment="random", reconstruct=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about empty layers: the weights decide which are empty
            if self._has_channel_groups:
                network: nn.Module = _with_whole_stages(create(config.seed), config, example)
            else:
                network = find_method(method).build(BuildPlan(create, structure, example))
        if isinstance(network, FissionNetwork) and self.method_name == "fission":
            network.config = config
        return network.eval()

    def restore(self, state: Mapping[str, Tensor], factory: Factory | None = None) -> nn.Module:
        """Make the network with trained weights, on the CPU, in eval mode.

        Args:
            state: weights and masks by name, see `network_state`.
            factory: see `single`.

        Raises:
            ValueError: the network cannot be built.
            WeightsError: the weights belong to another network.

        Example:
            >>> spec = NetworkSpec("wrn-10-1", ["cat", "dog"], [3, 8, 8], [0.5] * 3, [0.2] * 3,
            ...                    fission={"exits": 2, "grouping": "copies"}, netfission="0.1.0")
            >>> state = network_state(spec.build())
            >>> again = spec.restore(state)
            >>> all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
            True
        """
        network = self.build(factory)
        if self.method_name == "multi-exit":
            state = {_OLD_EXIT.sub(_path_of, name): tensor for name, tensor in state.items()}
        try:
            if self._has_channel_groups:
                fit(network, {name: tensor.shape for name, tensor in state.items()})
            network.load_state_dict(state)
            if self._has_channel_groups:
                with torch.no_grad():
                    logits = network(torch.zeros(1, *self.shape))  # raises if layers do not fit one another
                if logits.shape[2] != (outputs := self.find_task().outputs):
                    raise RuntimeError(f"{logits.shape[2]} classes, not {outputs}")
        except RuntimeError as error:
            lines = str(error).splitlines()  # the first line of several is a title
            raise WeightsError(lines[min(1, len(lines) - 1)].strip()) from error
        return network

    @property
    def average(self) -> Average:
        """What the ensemble averages over its exits, by the rule of its method."""
        return find_method(self._method()).average_of(typed(FissionConfig, self.fission))

    @property
    def predictions(self) -> int:
        """The number of predictions: of exits and linear exits, or of a baseline's members."""
        return int(self.fission["exits"]) + self.linear

    @property
    def linear(self) -> int:
        """The number of linear exits."""
        return len(self.fission.get("linear_exits") or ())

    @property
    def kind(self) -> str:
        """How the network was divided, or which baseline it is, in words.

        Example:
            >>> fission = {"exits": 2, "grouping": "channels", "linear_exits": [1], "reconstruct": True}
            >>> NetworkSpec("wrn-10-1", ["cat", "dog"], [3, 8, 8], [0.5] * 3, [1] * 3, fission, "0.1.0").kind
            '2 exits by channels, reconstructed, and 1 linear exit'
        """
        exits = int(self.fission["exits"])
        if self.method_name != "fission":
            return f"{self.method_name} of {exits}"
        parts = ["one exit" if exits == 1 else f"{exits} exits by {self.fission['grouping']}"]
        parts += ["reconstructed"] if exits > 1 and self.fission.get("reconstruct") else []
        parts += [f"and {count_noun(self.linear, 'linear exit')}"] if self.linear else []
        return (" " if len(parts) == 2 and self.linear else ", ").join(parts)

    @property
    def method_name(self) -> str:
        """The name of its method."""
        return self._method().method

    @property
    def _has_channel_groups(self) -> bool:
        """Whether the widths of the paths are known from the weights alone."""
        return self.method_name == "fission" and self.fission.get("grouping") == "channels"

    def _method(self) -> MethodConfig:
        """Return the settings that the method reads; others may have had another default when written."""
        method = check_choice("method", typed(MethodConfig, self.method).method, METHODS)
        return typed(
            MethodConfig, {name: value for name, value in self.method.items() if reads_setting(method, name)}
        )


# In networks of multi-exit before they were fission networks.
_OLD_EXIT = re.compile(r"^(?:single\.|early\.(\d+)\.)")


def _path_of(match: re.Match[str]) -> str:
    """Return the start of a tensor's name in a fission network from that in a former multi-exit network."""
    return "" if match[1] is None else f"paths.{int(match[1]) + 1}.head."


def _with_whole_stages(model: nn.Module, config: FissionConfig, example: Tensor) -> FissionNetwork:
    """Return the network whose paths have whole stages, so that finding channel groups costs no time."""
    backbone = cut(model, example, config.stages, config.exits)
    branches = resolve_branches(config.known_branch_after(trained=False), config.exits, backbone.stage_names)
    paths = [
        ExitPath([copy.deepcopy(stage) for stage in backbone.stages[start:]], copy.deepcopy(backbone.head))
        for start in (0, *branches)
    ]
    after = resolve_linear_exits(config.linear_exits, backbone.stage_names)
    paths += linear_paths(backbone, after, example, config.seed)
    return FissionNetwork(backbone.stem, paths, [*branches, *after], backbone.stage_names)


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a trained network: the names of its files, and one reader for each.

    Attributes:
        path: the folder.

    Example:
        >>> import tempfile
        >>> spec = NetworkSpec("wrn-10-1", ["cat", "dog"], [3, 8, 8], [0.5] * 3, [0.2] * 3,
        ...                    fission={"exits": 2}, netfission="0.1.0")
        >>> with tempfile.TemporaryDirectory() as path:
        ...     folder = ModelFolder(Path(path))
        ...     folder.save_network(spec.build(), spec)
        ...     network, loaded = folder.load_network()
        >>> loaded == spec, network.exits
        (True, 2)
    """

    path: Path

    @property
    def config(self) -> Path:
        """All settings, with versions, seed and device; only in the folder of a run."""
        return self.path / "config.yaml"

    @property
    def weights(self) -> Path:
        """The trained weights and masks."""
        return self.path / "model.safetensors"

    @property
    def spec(self) -> Path:
        """The description of the network."""
        return self.path / "config.json"

    @property
    def evaluation(self) -> Path:
        """Metrics on the test split."""
        return self.path / "evaluation.json"

    @property
    def calibration(self) -> Path:
        """Temperature and risk–coverage curve from the validation split."""
        return self.path / "calibration.json"

    @property
    def readme(self) -> Path:
        """The model card of a shared network."""
        return self.path / "README.md"

    @property
    def shared(self) -> tuple[Path, ...]:
        """The files from which a shared network is loaded."""
        return self.spec, self.weights, self.calibration, self.evaluation

    def load_config(self) -> RunConfig:
        """Read the settings of the run.

        Raises:
            ValueError: the folder holds no run, or its settings cannot be read.
        """
        settings = _read(self.config, _checked_yaml)
        try:
            return RunConfig.from_dict(settings)
        except ValueError as error:
            found = f"invalid settings ({first_line(error)})"
            raise invalid(str(self.config), "the settings of a run", found=found) from error

    def settings_sha256(self) -> str:
        """Return the SHA-256 of the settings in `config`, as hexadecimal digits.

        It depends neither on comments nor on their order, nor on defaults of settings that are not there.

        Raises:
            ValueError: the folder holds no run, or its settings cannot be read.
        """
        settings = _read(self.config, _checked_yaml)
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def load_spec(self, *, any_task: bool = False) -> NetworkSpec:
        """Read the description of the network.

        Args:
            any_task: whether it may have learned something else than the classes of images.

        Raises:
            ValueError: it is missing, damaged, written by a newer version, or of another task unless
                `any_task`.
        """
        if has_file(self.config) and not has_file(self.spec):
            found = "one without config.json, as its training has not ended"
            raise invalid(str(self.path), "a finished run", found=found, hint="resume it")
        settings = _read(self.spec, parse_json)
        written = settings.get("format", FORMAT)
        if not isinstance(written, int) or written > FORMAT:
            raise invalid(
                str(self.spec),
                f"of format {FORMAT} at most, which netfission {version('netfission')} reads",
                found=f"format {written} of netfission {settings.get('netfission')}",
                hint="update netfission",
            )
        try:
            spec = typed(NetworkSpec, settings)
        except ValueError as error:
            found = f"damaged content ({first_line(error)})"
            raise invalid(str(self.spec), "the description of a network", found=found) from error
        if not (any_task or spec.find_task().targets.exclusive):
            raise other_task(str(self.path), spec.task, "this")
        return spec

    def load_network(
        self, factory: Factory | None = None, *, any_task: bool = False
    ) -> tuple[nn.Module, NetworkSpec]:
        """Load the trained network, on the CPU, in eval mode, and its description. No pickle is read.

        The network maps normalised images to logits `(batch, exits, classes)`.

        Args:
            factory: makes the single network, if it has no name.
            any_task: see `load_spec`.

        Raises:
            ValueError: a file is missing or damaged, the two do not belong together, or see `load_spec`.
        """
        spec = self.load_spec(any_task=any_task)
        if not has_file(self.weights):
            hint = "resume the training"
            raise invalid(str(self.weights), "the weights of a network", found="no such file", hint=hint)
        try:
            check_tensors(self.weights)
            network = spec.restore(load_file(self.weights), factory)
            self._check_spec()
            return network, spec
        except (SafetensorError, WeightsError) as error:
            found = f"others ({first_line(error)})"
            raise invalid(str(self.weights), f"the weights of {self.spec}", found=found) from error

    def _check_spec(self) -> None:
        """Raise WeightsError if the weights were written with another description.

        Weights of an earlier version do not say with which, and a description without a checksum is edited.
        """
        with safe_open(self.weights, "pt") as file:
            written = (file.metadata() or {}).get(_DESCRIPTION, "")
        found = checksum_of(self.spec.read_bytes())
        if written and found and written != found:
            raise WeightsError(
                f"written with another {self.spec.name}, of checksum {written[:12]}…; "
                "restore it, or remove its checksum if you edited the file"
            )

    @classmethod
    def of_weights(cls, file: Path) -> "ModelFolder | None":
        """Return the folder whose weights a file is, if their description is beside it; else None.

        Other programs give files such names, too.
        """
        folder = cls(file.parent)
        if file.name != folder.weights.name or not folder.spec.is_file():
            return None
        try:
            folder.load_spec(any_task=True)
            folder._check_spec()
        except (OSError, SafetensorError, ValueError):
            return None
        return folder

    def load_calibration(self, digest: Digest | None = None) -> Calibration | None:
        """Read `calibration`; None if there is no such file.

        Args:
            digest: gives that of the network; default `weights_sha256`.

        Raises:
            ValueError: it is damaged, or was fitted to another network, or to another average than that of
                the network's method.
        """
        if not has_file(self.calibration):
            return None
        calibration: Calibration | None = self.load_calibration_of(self.load_spec(), digest)
        return calibration

    def load_calibration_of(self, spec: NetworkSpec, digest: Digest | None = None) -> Any:
        """Read `calibration` of a network of any task, see `load_calibration`.

        Args:
            spec: the description of the network.
            digest: see `load_calibration`.
        """
        calibration: Any = read_json(self.calibration, spec.find_task().calibration_kind)
        if calibration is None:
            return None
        hint = "`netfission evaluate` fits it again"
        if calibration.average != (average := spec.average):
            raise invalid(
                str(self.calibration),
                f"of the mean of {describe_average(average)}, which the network's method takes",
                found=f"one of the mean of {describe_average(calibration.average)}",
                hint=hint,
            )
        weights = (digest or self.weights_sha256)() if calibration.weights else ""
        if calibration.weights == weights:
            return calibration
        # An earlier version kept the digest of the file, which is another one once the file is written anew.
        if calibration.weights != file_digest(self.weights):
            check_tensors(self.weights)  # else the figures are right, and the weights are damaged
            raise invalid(
                str(self.calibration),
                f"of the network in {self.weights.name}",
                found=f"one of another network (SHA-256 {calibration.weights[:12]}…)",
                hint=hint,
            )
        return replace(calibration, weights=weights)

    def weights_sha256(self) -> str:
        """Return the digest of the tensors in `weights`, see `state_sha256`; ValueError if it is damaged."""
        try:
            return state_sha256(load_file(self.weights))
        except SafetensorError as error:
            raise invalid(str(self.weights), "the weights of a network", found=first_line(error)) from error

    def load_evaluation(self, digest: Digest | None = None) -> Evaluation | None:
        """Read `evaluation`, see `load_figures`; None if there is no such file."""
        return self.load_figures(self.evaluation, Evaluation, digest=digest)

    def load_target_evaluation(self, spec: NetworkSpec) -> Any:
        """Read `evaluation` of a network of any task, see `load_evaluation`.

        Args:
            spec: the description of the network.
        """
        kind: type[Any] = spec.find_task().evaluation_kind
        return self.load_figures(self.evaluation, kind)

    def load_figures(
        self, path: Path, kind: type[T], *, flags: str = "", digest: Digest | None = None
    ) -> T | None:
        """Read figures of the network, see `figures_json`; None if there is no such file.

        Those of an earlier version do not say of which weights they are.

        Args:
            path: the file.
            kind: its content.
            flags: of `netfission evaluate`, which measures them again, for the message.
            digest: see `load_calibration`.

        Raises:
            ValueError: it is damaged, or of another network.
        """
        figures, weights = read_figures(path, kind)
        self.check_weights(path, weights, flags, digest)
        return figures

    def check_weights(
        self, path: Path, weights: str | None, flags: str = "", digest: Digest | None = None
    ) -> None:
        """Raise ValueError if figures in a file are of other weights, see `load_figures`."""
        if weights and self.weights.is_file() and weights != (digest or self.weights_sha256)():
            check_tensors(self.weights)
            raise invalid(
                str(path),
                f"of the network in {self.weights.name}",
                found=f"one of another network (SHA-256 {weights[:12]}…)",
                hint=f"`netfission evaluate{flags}` measures it again",
            )

    def save_network(self, network: nn.Module, spec: NetworkSpec) -> None:
        """Write weights, masks and description; if one cannot be written, neither file changes."""
        write_together(self.network_files(network, spec))

    def network_files(self, network: nn.Module, spec: NetworkSpec) -> dict[Path, str | bytes]:
        """Return the content of `weights` and of `spec`, by path."""
        content = asdict(spec)
        if spec.find_task().targets.exclusive:  # as earlier versions read it
            content = {name: value for name, value in content.items() if name not in _SINCE_FORMAT_2}
        else:
            content["format"] = FORMAT
        description = stamp_json(json.dumps(content, indent=2, ensure_ascii=False))
        weights = save(network_state(network), {NAME: BLANK})
        weights = stamp(add_metadata(weights, _DESCRIPTION, checksum_of(description.encode())))
        return {self.weights: weights, self.spec: description}


def read_figures(path: Path, kind: type[T]) -> tuple[T | None, str | None]:
    """Return figures of a network, and which, if it says so, see `figures_json`; no figures without a file.

    Args:
        path: the file.
        kind: what the figures are.

    Raises:
        ValueError: it is damaged.
    """
    content = read_json(path, dict[str, Any])
    if content is None:
        return None, None
    content.pop(_ENVIRONMENT, None)
    weights: Any = content.pop(_WEIGHTS, None)
    with named_damage(path):
        return typed(kind, content), None if weights is None else typed(str, weights, _WEIGHTS)


def figures_json(figures: Document, weights: str) -> str:
    """Return the JSON text of figures, an object, that also says of which network they are.

    Args:
        figures: what was measured.
        weights: digest of the network, see `state_sha256`.

    Example:
        >>> evaluation = Evaluation(4, "logits", [], {}, 0.0, 0.0)
        >>> figures_json(evaluation, "5e1f…")[-29:]
        'null,\\n  "weights": "5e1f…"\\n}\\n'
    """
    body = figures.to_json().rstrip().removesuffix("}").rstrip()
    return f'{body},\n  "{_WEIGHTS}": "{weights}"\n}}\n'


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors, as hexadecimal digits: of their names, dtypes, shapes and content.

    It does not depend on their order, or on how a file holds them.

    Args:
        state: by name, contiguous and on the CPU.

    Example:
        >>> state = {"a": torch.zeros(2), "b": torch.tensor(1)}
        >>> state_sha256(state) == state_sha256(dict(reversed(state.items())))
        True
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)} ".encode(errors="backslashreplace"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def network_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights and masks of a network by name, contiguous and on the CPU.

    A tensor that shares its memory with another, as that of a layer that runs twice, is copied.
    """
    state: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in network.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        state[name] = tensor.clone() if memory in held else tensor
        held.add(memory)
    return state


def _checked_yaml(content: bytes) -> Any:
    check_text(content)
    return parse_yaml(content.decode())


def has_description(file: Path) -> bool:
    """Return whether a file has weights that belong to a description, beside it or elsewhere."""
    try:
        with safe_open(file, "pt") as opened:
            return {_DESCRIPTION, NAME} <= (opened.metadata() or {}).keys()
    except (OSError, SafetensorError):
        return False


def _read(path: Path, parse: Callable[[bytes], Any]) -> dict[str, Any]:
    if not has_file(path):
        hint = "`netfission train` writes such a folder"
        found = f"one without {path.name}" if path.parent.is_dir() else "nothing there"
        raise invalid(str(path.parent), "the folder of a run", found=found, hint=hint)
    try:
        content = parse(path.read_bytes())
    except (ValueError, RecursionError) as error:
        found = f"damaged content ({first_line(error)})"
        raise invalid(str(path), f"a valid {path.suffix[1:].upper()} file", found=found) from error
    if not isinstance(content, Mapping):
        raise invalid(str(path), "a mapping from settings to values", content)
    return dict(content)
