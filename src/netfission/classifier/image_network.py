"""A trained network with the preparation of its images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from netfission.classifier.folder import ModelFolder, NetworkSpec, network_state, state_sha256
from netfission.classifier.hub import download
from netfission.data.batches import Normalisation
from netfission.data.images import to_pixels
from netfission.utils.checksums import stamp_json
from netfission.utils.errors import invalid
from netfission.utils.files import has_file, write_together


class ImageNetwork(nn.Module):
    """A trained network, its description, and the preparation of its images, in eval mode.

    Attributes:
        network: normalised images → outputs `(batch, exits, outputs)`.
        spec: the description of the network.
        calibration: what was learned from images that were held out; None without them.
    """

    def __init__(self, network: nn.Module, spec: NetworkSpec, calibration: Any = None) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.calibration = calibration
        self._normalise = Normalisation(spec.mean, spec.std)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images, float `(n, channels, height, width)`, to outputs `(n, exits, outputs)`."""
        outputs: Tensor = self.network(images)
        return outputs

    def pixels(self, image: Image.Image) -> Tensor:
        """Convert any image to the network's size and channels: uint8 `(channels, height, width)`.

        See `netfission.data.images.to_pixels`.

        Raises:
            Exception: what Pillow raises for a corrupt file: OSError, SyntaxError and others.
        """
        channels, *size = self.spec.shape
        return to_pixels(image, "L" if channels == 1 else "RGB", (size[0], size[1]))

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Map pixels, uint8 `(n, channels, height, width)`, to outputs `(n, exits, outputs)` on the CPU.

        The outputs are float32 and not calibrated; of a classifier they are logits, one per class.
        """
        logits: Tensor = self(self._normalise(pixels).to(next(self.network.parameters())))
        return logits.float().cpu()

    def check_pixels(self, pixels: Tensor) -> None:
        """Check that pixels are as `pixels` returns them, in a batch.

        Raises:
            ValueError: they are not.
        """
        expected = (
            f"uint8 of shape (n, {', '.join(map(str, self.spec.shape))}), see {type(self).__name__}.pixels"
        )
        if not isinstance(pixels, Tensor):
            raise invalid("pixels", expected, found=type(pixels).__name__)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or list(pixels.shape[1:]) != self.spec.shape:
            raise invalid("pixels", expected, found=f"{pixels.dtype} of shape {tuple(pixels.shape)}")

    def write_files(self, save_directory: str | Path) -> None:
        """Write the files of `files` into a folder, in place of those of a network that it held before.

        All files are on disk before the first gets its name, so that nothing changes if the disk is full.

        Args:
            save_directory: the folder; made if it does not exist.

        Raises:
            ValueError: the folder is that of a run, or the calibration is of other weights, as before further
                training.
            OSError: it cannot be written.
        """
        folder = ModelFolder(Path(save_directory))
        if has_file(folder.config):
            raise invalid("save_directory", "another folder than a run's", found=str(save_directory))
        files = self.files(folder)
        folder.path.mkdir(parents=True, exist_ok=True)
        replaces = has_file(folder.weights)
        write_together(files, removed=[folder.calibration, folder.evaluation] if replaces else [])

    def files(self, folder: ModelFolder) -> dict[Path, str | bytes]:
        """Return the content of the network's files in a folder, by path; ValueError as of `write_files`."""
        files = folder.network_files(self.network, self.spec)
        if self.calibration is None:
            return files
        digest = state_sha256(network_state(self.network))
        if self.calibration.weights not in ("", digest):
            raise invalid(
                "calibration",
                "of the network's weights",
                found=f"one of others (SHA-256 {self.calibration.weights[:12]}…)",
                hint="fit it again, or set it to None",
            )
        calibration = replace(self.calibration, weights=digest)
        return files | {folder.calibration: stamp_json(calibration.to_json())}


def find_folder(
    name: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> ModelFolder:
    """Return the folder of a network; one on the hub is downloaded.

    Args:
        name: the folder, or a repository of the hub.
        revision: branch, tag or commit of the repository; default its main branch.
        token: token of the hub; default the one kept by `hf auth login`.

    Raises:
        ValueError: the name is not one of a repository.
        ConnectionError: the hub cannot be reached.

    Example:
        >>> find_folder(".").path.is_dir()
        True
    """
    folder = ModelFolder(Path(name))
    if folder.path.is_dir():
        return folder
    files = [path.name for path in folder.shared]
    return ModelFolder(download(str(name), files, revision=revision, token=token))
