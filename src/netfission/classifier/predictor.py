"""A trained network of another task than classification, with all that is needed to use it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from PIL import Image
from torch import Tensor, nn

from netfission.classifier.folder import Factory, ModelFolder, NetworkSpec
from netfission.classifier.image_network import ImageNetwork, find_folder
from netfission.tasks.base import TargetPredictions
from netfission.utils.errors import invalid


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
