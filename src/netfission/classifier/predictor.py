"""A trained network of another task than classification, with all that is needed to use it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from netfission.classifier.folder import Factory, ModelFolder, NetworkSpec
from netfission.classifier.image_network import ImageNetwork, find_folder
from netfission.data.images import upright_size
from netfission.inference.windows import OVERLAP, Progress, Windows, stitched
from netfission.tasks.base import TargetPredictions
from netfission.tasks.pixel_maps import PhotographPrediction
from netfission.utils.errors import describe, first_line, invalid


class Predictor(ImageNetwork):
    """A trained network of another task than classification, with the preparation of its images.

    Attributes:
        network: normalised images → outputs `(batch, exits, outputs)`.
        spec: the description of the network.
        calibration: what was learned from validation images; None without them.
        task: what the network learned.

    Example:
        >>> import torch
        >>> spec = NetworkSpec("wrn-10-1", ["car", "tree"], [3, 8, 8], [0.5] * 3, [0.2] * 3,
        ...                    fission={"exits": 2}, netfission="0.1.0", task="multilabel")
        >>> predictor = Predictor(spec.build(), spec)
        >>> predictor.predict(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)).probabilities.shape
        torch.Size([5, 2])

        `from_pretrained` reads what `save_pretrained` wrote, and the folder of a run.
    """

    def __init__(self, network: nn.Module, spec: NetworkSpec, calibration: Any = None) -> None:
        super().__init__(network, spec, calibration)
        self.task = spec.find_task()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        factory: Factory | None = None,
    ) -> Self:
        """Load a network, on the CPU, in eval mode; see `Classifier.from_pretrained`.

        Args:
            name: the folder of a run, or a repository of the hub with its files.
            revision: branch, tag or commit of the repository; default its main branch.
            token: token of the hub; default the one kept by `hf auth login`.
            factory: makes the single network, if it has no name.

        Raises:
            ValueError: a file is missing, damaged or of a newer version, or the network is a classifier.
            ConnectionError: the hub cannot be reached.
        """
        return cls.from_folder(find_folder(name, revision=revision, token=token), factory)

    @classmethod
    def from_folder(cls, folder: ModelFolder, factory: Factory | None = None) -> Self:
        """Load a network from a folder, see `from_pretrained`."""
        network, spec = folder.load_network(factory, any_task=True)
        if spec.find_task().targets.exclusive:
            hint = "netfission.Classifier reads it"
            expected = "a network of another task than classification"
            raise invalid(str(folder.path), expected, found=f"task={spec.task}", hint=hint)
        return cls(network, spec, folder.load_calibration_of(spec))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the network's files into a folder, in place of those of a network that it held before.

        There is no model card, unlike with a `Classifier`.

        Args:
            save_directory: the folder; made if it does not exist.

        Raises:
            ValueError: the folder is that of a run, or the calibration is of other weights, as before further
                training.
            OSError: it cannot be written.
        """
        self.write_files(save_directory)

    def pixels(self, image: Image.Image) -> Tensor:
        """Convert any image to the network's size and channels: uint8 `(channels, height, width)`.

        See `netfission.data.images.to_pixels`; for a class of each pixel, `to_pixels_within`.

        Raises:
            Exception: what Pillow raises for a corrupt file: OSError, SyntaxError and others.
        """
        return self.task.to_pixels(image, self.spec.shape)

    def predict(
        self,
        pixels: Tensor,
        *,
        coverage: float | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Any:
        """Predict the targets of images.

        Args:
            pixels: uint8 `(n, channels, height, width)`, see `pixels`.
            coverage: of numbers, least share of the images whose number is in its interval, in (0, 1);
                default no intervals.
            sizes: of a class for each pixel, height and width of the photographs before `pixels` scaled them;
                default the network's.

        Returns:
            Of labels, a `netfission.tasks.multilabel.LabelPredictions`; of numbers, a
            `netfission.tasks.regression.NumberPredictions`; of a class for each pixel, a
            `netfission.tasks.segmentation.PixelPredictions`.

        Raises:
            ValueError: `pixels` is not valid, or the coverage cannot be kept.
        """
        self.check_pixels(pixels)
        return self.interpret(self.logits(pixels), coverage, sizes)

    def own_pixels(self, image: Image.Image) -> Tensor:
        """Convert an image to the network's channels in its own size: uint8 `(channels, height, width)`.

        Raises:
            Exception: those of `pixels`.
        """
        return self.task.to_pixels(image, [self.spec.shape[0], *upright_size(image)])

    def windows(self, size: tuple[int, int] | None = None, overlap: float = OVERLAP) -> Windows:
        """Return windows for `predict_windows`, after the network has run on one that is blank.

        Args:
            size: height and width of a window; default those that the network was trained for.
            overlap: see `netfission.inference.windows.Windows`.

        Raises:
            ValueError: the network gives no maps, it does not take windows of this size, or the overlap is
                out of range.
        """
        if not self.task.draws_maps:
            raise invalid("window", f"left out for a run of task={self.task.name}", size)
        channels, *trained = self.spec.shape
        windows = Windows((trained[0], trained[1]) if size is None else size, overlap)
        try:
            outputs = self.logits(torch.zeros(1, channels, *windows.size, dtype=torch.uint8))
        except Exception as error:  # of any kind, from the code of the network
            raise self._not_taken(windows, first_line(error)) from error
        if tuple(outputs.shape[-2:]) != tuple(windows.size):
            raise self._not_taken(windows, f"its maps are {outputs.shape[-2]}×{outputs.shape[-1]}")
        return windows

    def _not_taken(self, windows: Windows, reason: str) -> ValueError:
        found = f"{windows.size[0]}×{windows.size[1]} ({reason})"
        return invalid("window", f"a size that {self.spec.model} accepts", found=found)

    def predict_windows(
        self,
        pixels: Tensor,
        windows: Windows,
        *,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> PhotographPrediction:
        """Predict the maps of one photograph of any size, at its own resolution, window by window.

        Where windows overlap, the logits of each exit are averaged, see
        `netfission.inference.windows.stitched`.

        Args:
            pixels: uint8 `(channels, height, width)`, see `own_pixels`.
            windows: what `windows` returned.
            batch_size: largest number of windows that go through the network at once.
            progress: called with the number of windows so far, and of all.

        Raises:
            ValueError: `pixels` is not valid.
        """
        strips = self.strips(pixels, windows, batch_size=batch_size, progress=progress)
        size = pixels.shape[1], pixels.shape[2]
        return self.task.joined((self.interpret(strip) for strip in strips), size)

    def strips(
        self,
        pixels: Tensor,
        windows: Windows,
        *,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Iterator[Tensor]:
        """Yield the outputs for strips of one photograph, `(1, exits, outputs, rows, width)`, not calibrated.

        Args:
            pixels: see `predict_windows`, as the others.
            windows: those of `windows`.
            batch_size: of windows.
            progress: see there.
        """
        channels = self.spec.shape[0]
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != channels:
            expected = f"uint8 of shape ({channels}, height, width), see Predictor.own_pixels"
            raise invalid("pixels", expected, found=describe(pixels))
        at_once = self.task.batch_size([channels, *windows.size], batch_size)
        return stitched(self.logits, pixels, windows, batch_size=at_once, progress=progress)

    def interpret(
        self,
        outputs: Tensor,
        coverage: float | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> TargetPredictions:
        """Return the predictions of images from outputs `(n, exits, outputs)`, see `predict`."""
        return self.task.predict(
            outputs,
            average=self.spec.average,
            calibration=self.calibration,
            coverage=coverage,
            sizes=sizes,
        )
