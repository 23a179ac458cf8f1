"""What a server asks of a network: to read images, to run on batches of them, and to answer requests."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from starlette.datastructures import QueryParams
from torch import Tensor, nn

from netfission.classifier.image_network import ImageNetwork
from netfission.data.images import upright_size
from netfission.inference.deployment import deploy
from netfission.network import FissionNetwork
from netfission.serve.drift import DriftWindow

Answer = dict[str, Any]
_DRAWN_PIXELS = 2**23  # of the photographs in a batch for which maps are drawn


class ImageInput(NamedTuple):
    """An image of a request.

    Attributes:
        pixels: of the network, uint8 `(channels, height, width)`.
        size: height and width of the image in the request, turned upright.
    """

    pixels: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class ImageResult:
    """One image's answer by the server's settings, and what answers by others need.

    Attributes:
        answer: by the server's settings.
        outputs: of the image, `(exits, outputs)`, in memory of their own: a part of those of its batch would
            keep these. None if a request cannot ask for other settings.
    """

    answer: Answer
    outputs: Tensor | None


def stack_outputs(results: Sequence[ImageResult]) -> Tensor:
    """Return the outputs of images as a batch, `(images, exits, outputs)`."""
    return torch.stack([result.outputs for result in results if result.outputs is not None])


class Question(Protocol):
    """What a request asks for in place of the server's settings."""

    def prepare(self) -> None:
        """Compute what all its answers need; ValueError if it asks for what cannot be kept."""

    def answers(self, results: Sequence[ImageResult]) -> list[Answer]:
        """Return the answers for its images."""


class Answerer(ABC):
    """Answers the requests for one network. Threads may use it at once.

    Attributes:
        task: what the network learned.
        parameters: names of those that a request may have.
        drift: the last images.
    """

    parameters: tuple[str, ...]
    drift: DriftWindow

    def __init__(self, network: ImageNetwork) -> None:
        self._images = network
        self.task = network.spec.find_task()

    def read(self, image: Image.Image) -> ImageInput:
        """Convert an image of a request; raises what Pillow raises for a corrupt file."""
        return ImageInput(self._images.pixels(image), upright_size(image))

    def batch_size(self, limit: int) -> int:
        """Return how many images run at once, of a number that is asked for."""
        return self.task.batch_size(self._images.spec.shape, limit)

    def share(self, image: ImageInput) -> float:
        """Return the share of a batch that an image fills by the pixels of its maps; 0 if none are drawn."""
        height, width = image.size
        return height * width / _DRAWN_PIXELS if self.task.draws_maps else 0.0

    @abstractmethod
    def run(self, images: Sequence[ImageInput]) -> Iterable[ImageResult]:
        """Run the network on images, and answer by the server's settings, in the order of the images."""

    @abstractmethod
    def question(self, query: QueryParams) -> Question | None:
        """Return what a query of known parameters asks for; None if that is what the server's settings say.

        Raises:
            HTTPException: a parameter is not valid (400).
        """

    def describe(self) -> dict[str, Any]:
        """Return what `GET /model` says of the network."""
        spec, calibration, task = self._images.spec, self._images.calibration, self.task
        return {
            "model": spec.model,
            "task": spec.task,
            "targets": task.targets.noun,
            "classes": spec.classes,
            "image": spec.shape,
            "crops": task.crops,
            "parameters": list(self.parameters),
            "exits": spec.predictions,
            "calibrated": calibration is not None,
            "calibration_images": 0 if calibration is None else calibration.n,
            "calibrated_on": None if calibration is None else calibration.fitted_on,
        }


def deployed_network(network: ImageNetwork) -> nn.Module:
    """Return a network that is deployed if it is a `FissionNetwork`; outputs agree within 1e-4.

    The difference of outputs is relative to the largest, see `netfission.inference.deploy`.
    """
    if not isinstance(network.network, FissionNetwork):
        return network.network
    return deploy(network.network, torch.zeros(2, *network.spec.shape, device=network.device))
