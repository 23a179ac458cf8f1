"""The files of a trained network, and what is needed beside its weights to build it again."""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from netfission.config import FissionConfig, MethodConfig, RunConfig
from netfission.evaluation import Evaluation
from netfission.evaluation.calibration import Calibration
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.registry import METHODS, find_method, reads_setting
from netfission.models import create_model
from netfission.surgery.narrowing import fit
from netfission.utils.errors import check_choice
from netfission.utils.files import write_together
from netfission.utils.typed import read_json, typed

Factory = Callable[..., nn.Module]  # of num_classes and in_channels, by name
FORMAT = 1  # of config.json


class WeightsError(ValueError):
    """Weights are not those of the network."""


@dataclass(frozen=True)
class NetworkSpec:
    """All that is needed to build the trained network again and feed it: `config.json`.

    Raises ValueError where an attribute is not what it takes.

    Attributes:
        model: its name, see `netfission.models.create_model`; None where a factory of the user's own made it.
        classes: names of the classes, each another, in the order of the logits.
        shape: channels (1 or 3), height and width of an image.
        mean: of each channel, on the scale [0, 1]; subtracted from images before the network.
        std: of each channel, on the same scale; images are divided by it.
        fission: the settings it was fissioned with; of a baseline the number of its members.
        netfission: version that wrote this.
        method: the method's settings; as `MethodConfig` where they are missing.
        format: rises when what an older version would misread is written.
    """

    model: str | None
    classes: list[str]
    shape: list[int]
    mean: list[float]
    std: list[float]
    fission: dict[str, Any]
    netfission: str
    method: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        names = self.classes
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError(f"classes={self.classes}: takes names, each another")
        if len(self.shape) != 3 or self.shape[0] not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"shape={self.shape}: takes 1 or 3 channels, height and width")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.shape[0] or not all(map(math.isfinite, values)):
                raise ValueError(f"{name}={values}: takes a number for each of {self.shape[0]} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std}: takes numbers above 0")

    def single(self, factory: Factory | None = None) -> nn.Module:
        """The single network with fresh weights, on the CPU.

        Args:
            factory: makes it in place of `create_model`.

        Raises:
            ValueError: the model has no name and there is no factory.
        """
        if factory is None:
            if self.model is None:
                raise ValueError("factory=None: takes what made the single network, which has no name")
            factory = partial(create_model, self.model)
        return factory(num_classes=len(self.classes), in_channels=self.shape[0])

    def build(self, factory: Factory | None = None) -> nn.Module:
        """The network with fresh weights, on the CPU, in eval mode.

        Args:
            factory: see `single`.

        Raises:
            ValueError: the network cannot be built.
        """
        # Which weights are removed is read with the weights: scoring them again would be for nothing.
        config = replace(
            typed(FissionConfig, self.fission), criterion="random", pruning_steps=None, assignment="random"
        )
        if config.grouping == "channels":
            config = replace(config, sparsity=0.0)  # widths are read with the weights, too
        plan = BuildPlan(
            partial(call_with_seed, partial(self.single, factory)), config, torch.zeros(2, *self.shape)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers left empty: the weights' own have been reported
            return find_method(self._method()).build(plan).eval()

    def restore(self, state: Mapping[str, Tensor], factory: Factory | None = None) -> nn.Module:
        """The network with those weights, on the CPU, in eval mode.

        Args:
            state: its weights and masks.
            factory: see `single`.

        Raises:
            ValueError: the network cannot be built, or the weights are another's.
        """
        network = self.build(factory)
        try:
            has_own_widths = self.fission.get("grouping") == "channels"
            if has_own_widths:
                fit(network, {name: tensor.shape for name, tensor in state.items()})
            network.load_state_dict(state)
            if has_own_widths:
                with torch.no_grad():
                    network(torch.zeros(1, *self.shape))  # layers that do not fit one another are found here
        except RuntimeError as error:
            lines = str(error).splitlines()
            raise WeightsError(lines[min(1, len(lines) - 1)].strip()) from error  # the first is no reason
        return network

    def _method(self) -> MethodConfig:
        """The method's own settings; those of others may have had another default when this was written."""
        method = check_choice("method", typed(MethodConfig, self.method).method, METHODS)
        return typed(
            MethodConfig, {name: value for name, value in self.method.items() if reads_setting(method, name)}
        )


@dataclass(frozen=True)
class ModelFolder:
    """The files of a trained network.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """All settings, with versions, seed and device."""
        return self.path / "config.yaml"

    @property
    def weights(self) -> Path:
        """The trained weights and masks."""
        return self.path / "model.safetensors"

    @property
    def spec(self) -> Path:
        """What is needed beside the weights to use the network."""
        return self.path / "config.json"

    @property
    def evaluation(self) -> Path:
        """The figures on the test split."""
        return self.path / "evaluation.json"

    @property
    def calibration(self) -> Path:
        """What the validation split says about the probabilities."""
        return self.path / "calibration.json"

    def load_config(self) -> RunConfig:
        """The run's settings.

        Raises:
            ValueError: the folder is no run, or its settings cannot be read.
        """
        settings = _read(self.config, lambda text: yaml.safe_load(text))
        try:
            return RunConfig.from_dict(settings)
        except ValueError as error:
            raise ValueError(f"{self.config}: {error}") from error

    def load_spec(self) -> NetworkSpec:
        """The description of the trained network.

        Raises:
            ValueError: it is missing, damaged, or of a newer version.
        """
        if self.config.is_file() and not self.spec.is_file():
            raise ValueError(f"{self.path}: its training has not ended; go on with resume")
        settings = _read(self.spec, json.loads)
        written = settings.get("format", FORMAT)
        if not isinstance(written, int) or written > FORMAT:
            raise ValueError(
                f"{self.spec}: has format {written}, of netfission {settings.get('netfission')}; this is "
                f"{version('netfission')}, which reads up to {FORMAT}: update it"
            )
        try:
            return typed(NetworkSpec, settings)
        except ValueError as error:
            raise ValueError(f"{self.spec}: is not a network's description ({error})") from error

    def load_network(self, factory: Factory | None = None) -> tuple[nn.Module, NetworkSpec]:
        """The trained network on the CPU, in eval mode, and its spec. No pickle is read.

        It maps images to logits `(batch, exits, classes)`.

        Args:
            factory: makes the single network, where it was one of the user's own.

        Raises:
            ValueError: a file is missing or damaged, or the two do not belong together.
        """
        spec = self.load_spec()
        if not self.weights.is_file():
            raise ValueError(f"{self.weights}: is missing; the run may not have ended, train with resume")
        try:
            return spec.restore(load_file(self.weights), factory), spec
        except (SafetensorError, WeightsError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.weights}: are not the weights of {self.spec} ({reason})") from error

    def load_calibration(self) -> Calibration | None:
        """What the validation split said; None where there was none. ValueError where it is damaged."""
        return read_json(self.calibration, Calibration)

    def load_evaluation(self) -> Evaluation | None:
        """The figures on the test split; None where there are none yet. ValueError where they are damaged."""
        return read_json(self.evaluation, Evaluation)

    def save_network(self, network: nn.Module, spec: NetworkSpec) -> None:
        """Write weights, masks and card; neither changes where the disk is full."""
        write_together(self.network_files(network, spec))

    def network_files(self, network: nn.Module, spec: NetworkSpec) -> dict[Path, str | bytes]:
        """What the files of weights and masks, and of the card, are to hold."""
        about = json.dumps(asdict(spec), indent=2, ensure_ascii=False) + "\n"
        return {self.weights: save(network_state(network)), self.spec: about}


def network_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's weights and masks, on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def _read(path: Path, parse: Any) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: is missing; takes the folder of a run, as `netfission train` writes it")
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: takes settings by name, not {type(content).__name__}")
    return dict(content)
