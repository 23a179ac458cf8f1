"""A trained network with all that is needed to use it on images, saved and loaded as one."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from torch import Tensor, nn

from netfission.classifier.folder import Factory, ModelFolder, NetworkSpec, WeightsError, network_state
from netfission.classifier.model_card import model_card
from netfission.classifier.predictions import Predictions
from netfission.config import RunConfig
from netfission.data.batches import Normalisation
from netfission.data.images import to_pixels
from netfission.evaluation import Evaluation
from netfission.evaluation.calibration import Calibration
from netfission.network import FissionNetwork
from netfission.utils.files import write_together
from netfission.utils.hub import is_in_reach, quick_when_offline

T = TypeVar("T")
_FILES = ("config.json", "model.safetensors", "calibration.json", "evaluation.json")


class Classifier(nn.Module, PyTorchModelHubMixin):
    """A trained network, what its classes are called, and how images are made ready for it.

    `from_pretrained` reads the folder of a run, what `save_pretrained` wrote, or a repository of the Hugging
    Face hub; `save_pretrained` and `push_to_hub` write one. Weights are safetensors and settings JSON: no
    pickle is read, and no code but this project's and, where given, your own `factory`.

    Attributes:
        network: images, normalised, to logits `(batch, exits, classes)`.
        spec: its description.
        calibration: of its probabilities, from a validation split; None where there was none.
        evaluation: its figures on a test split, where known.
        recipe: the settings it was trained with, where known.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: NetworkSpec,
        calibration: Calibration | None = None,
        evaluation: Evaluation | None = None,
        recipe: RunConfig | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.calibration = calibration
        self.evaluation = evaluation
        self.recipe = recipe
        self._normalise = Normalisation(spec.mean, spec.std)
        self.eval()

    @classmethod
    def from_network(
        cls,
        network: FissionNetwork,
        *,
        model: str | None,
        classes: Sequence[str],
        shape: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Self:
        """Describe a network that was fissioned and trained by code of your own; it goes into eval mode.

        Args:
            network: what `fission` gave, trained.
            model: the name that `netfission.models.create_model` makes the model of; None where a factory of
                your own made it, which `from_pretrained` is to be given then.
            classes: their names, each another, in the order of the logits.
            shape: channels (1 or 3), height and width of the images it was trained on.
            mean: of each channel, on the scale [0, 1]; subtracted from images before the network.
            std: of each channel, on the same scale; images are divided by it.

        Raises:
            ValueError: the network was made with a `Grouping` object, which no name tells; it is not
                what `model` makes; or an argument is not what it takes.
        """
        if network.config is None:
            raise ValueError("network: was made with a grouping of your own; takes one given by its name")
        spec = NetworkSpec(
            model,
            list(classes),
            _numbers("shape", shape, index),
            _numbers("mean", mean, float),
            _numbers("std", std, float),
            asdict(network.config),
            version("netfission"),
        )
        own = cls(network, spec)
        noise = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (2, *spec.shape), dtype=torch.uint8, generator=noise)
        try:
            logits = own.logits(pixels)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"shape={spec.shape}: is not what the network takes ({reason})") from error
        if logits.shape[2] != len(spec.classes):
            raise ValueError(f"classes: are {len(spec.classes)} names; the network has {logits.shape[2]}")
        if model is not None:
            try:
                again = cls(spec.restore(network_state(network)), spec)
                if not torch.allclose(again.logits(pixels), logits, rtol=1e-2, atol=1e-2):
                    raise WeightsError("its logits differ")
            except WeightsError as error:
                raise ValueError(
                    f"model={model!r}: makes another network than this ({error}); takes its own name, or "
                    "None and `factory` when it is loaded"
                ) from error
        return own

    @property
    def temperature(self) -> float:
        """What logits are divided by; 1 where nothing was calibrated."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, float `(batch, channels, height, width)` → logits `(batch, exits, classes)`."""
        logits: Tensor = self.network(images)
        return logits

    def pixels(self, image: Image.Image) -> Tensor:
        """Any image as the network takes it, `(channels, height, width)` uint8; see `to_pixels`.

        Raises what Pillow raises where the file behind it is corrupt: OSError, SyntaxError and others.
        """
        channels, *size = self.spec.shape
        return to_pixels(image, "L" if channels == 1 else "RGB", (size[0], size[1]))

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Pixels, uint8 `(n, channels, height, width)` → logits `(n, exits, classes)`, on the CPU."""
        logits: Tensor = self(self._normalise(pixels).to(self.device))
        return logits.float().cpu()

    def predict(self, pixels: Tensor, *, risk: float | None = None) -> Predictions:
        """Calibrated predictions.

        Args:
            pixels: uint8 `(n, channels, height, width)`, see `pixels`.
            risk: share of wrong answers that is borne; the ensemble abstains where it is less sure than that
                took on the validation split. Default: it never abstains.

        Raises:
            ValueError: `pixels` are not that; `risk` is given and nothing was calibrated, or it is outside
                [0, 1].
        """
        takes = f"takes uint8 of shape (n, {', '.join(map(str, self.spec.shape))}), see `Classifier.pixels`"
        if not isinstance(pixels, Tensor):
            raise ValueError(f"pixels: are of type {type(pixels).__name__}; {takes}")
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or list(pixels.shape[1:]) != self.spec.shape:
            raise ValueError(f"pixels: are {pixels.dtype} of shape {tuple(pixels.shape)}; {takes}")
        return Predictions(self.logits(pixels) / self.temperature, self.threshold(risk))

    def threshold(self, risk: float | None) -> float | None:
        """The probability below which to abstain, for `predict`; None without a `risk`."""
        if risk is None:
            return None
        if self.calibration is None:
            raise ValueError(
                f"risk={risk}: takes a network that was calibrated on a validation split; train with "
                "validation above 0, or leave it out"
            )
        return self.calibration.risk_coverage.threshold(risk)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # downloads by snapshot, so that one name fits all
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        factory: Factory | None = None,
    ) -> Self:
        """Load a network; on the CPU, in eval mode, its logits those of the one saved, bit for bit.

        Args:
            name: a run's folder, a folder that `save_pretrained` wrote, or a repository on the hub.
            revision: of the repository: a branch, a tag or a commit; default its main branch.
            token: of the hub; default the one kept by `hf auth login`.
            factory: `factory(num_classes, in_channels=channels)` makes the single network, where it was one
                of your own.

        Raises:
            ValueError: a file is missing, damaged or of a newer version, or the factory's network differs.
            ConnectionError: the hub is out of reach.
        """
        folder = ModelFolder(Path(name))
        if not folder.path.is_dir():
            folder = ModelFolder(_downloaded(str(name), revision=revision, token=token))
        network, spec = folder.load_network(factory)
        recipe = folder.load_config() if folder.config.is_file() else None
        return cls(network, spec, folder.load_calibration(), folder.load_evaluation(), recipe)

    # The mixin's own removes a file before it writes.
    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **settings: Any,
    ) -> str | None:
        """Write the network's files into a folder, in place of those of a network that it held before.

        All are on disk before the first takes its name, so that nothing changes where there is no room. A
        README that is there already stays; where it is not this network's, a warning says so.

        Args:
            save_directory: the folder; made where it is not there.
            repo_id: see `push_to_hub`; default the folder's name.
            push_to_hub: whether to push it, too.
            settings: of `huggingface_hub.ModelHubMixin.push_to_hub`.

        Returns:
            The address of the commit on the hub, where it was pushed.

        Raises:
            ValueError: the folder is that of a run; or see `push_to_hub`.
            OSError: it cannot be written.
            ConnectionError: see `push_to_hub`.
        """
        folder = ModelFolder(Path(save_directory))
        if folder.config.is_file():
            raise ValueError(f"save_directory={save_directory}: is the folder of a run; takes another")
        folder.path.mkdir(parents=True, exist_ok=True)
        files = folder.network_files(self.network, self.spec)
        if self.calibration is not None:
            files[folder.calibration] = self.calibration.to_json()
        if self.evaluation is not None:
            files[folder.evaluation] = self.evaluation.to_json()
        files |= self._readme(folder.path / "README.md")
        replaces = folder.weights.is_file()
        write_together(files, removed=[folder.calibration, folder.evaluation] if replaces else [])
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.path.name, **settings)
        return None

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Write the network's files into a repository of the hub, which is made where it is not there.

        Args:
            repo_id: its name, `OWNER/NAME`.
            settings: of `huggingface_hub.ModelHubMixin.push_to_hub`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: the hub refuses it: the name is none, or you may not write there.
            ConnectionError: the hub is out of reach.
        """
        if not is_in_reach():
            raise ConnectionError(f"{repo_id}: cannot be pushed to, as the hub cannot be reached")
        try:
            return super().push_to_hub(repo_id, **settings)
        except (HFValidationError, HfHubHTTPError) as error:
            raise ValueError(f"{repo_id}: cannot be pushed to ({str(error).splitlines()[0]})") from error

    def _readme(self, path: Path) -> dict[Path, str]:
        """What to write there; nothing where there is one, of which a warning tells if it is another's."""
        text = model_card(self.spec, self.calibration, self.evaluation, self.recipe)
        if not path.exists():
            return {path: text}
        if path.read_bytes() != text.encode():
            warnings.warn(f"{path}: stays as it is; without it, one is written of this network", stacklevel=3)
        return {}


def _numbers(name: str, values: Sequence[Any], kind: Callable[[Any], T]) -> list[T]:
    try:
        return [kind(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={values!r}: takes a list of numbers ({error})") from error


def _downloaded(name: str, **settings: Any) -> Path:
    """A copy of a hub's repository in the cache."""
    try:
        with quick_when_offline():
            return Path(snapshot_download(name, allow_patterns=list(_FILES), **settings))
    except HFValidationError as error:
        raise ValueError(f"{name}: is no folder, nor the name of a repository on the hub") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: is no folder here, nor found on the hub ({reason})") from error
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(
            f"{name}: is no folder here, and the hub cannot be reached nor is it cached; takes the folder "
            "of a run, or connect to a network once"
        ) from error
