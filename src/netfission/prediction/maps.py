"""Maps that a network predicts, as files named after the images."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from netfission.prediction.images import Failure
from netfission.prediction.targets import TargetPrediction
from netfission.utils.errors import invalid
from netfission.utils.files import write_together
from netfission.utils.outputs import is_output
from netfission.utils.png import is_own_png, png_bytes
from netfission.utils.text import printable

T = TypeVar("T")
MAP_NAMES = ("", "-uncertainty")  # what follows the name of an image in those of its maps


class MapFolder:
    """A folder for the maps of images; it is made with the first of them.

    Args:
        path: the folder.
        images: the files that are predicted.

    Raises:
        ValueError: the folder is that of a run, two images would have one map, or a map would replace an
            image or another file that is not a map.

    Example:
        >>> MapFolder(Path("maps"), [Path("a.png"), Path("b/a.jpg")])
        Traceback (most recent call last):
        ValueError: images must be files whose maps have different names, got a.png and \
b/a.jpg
    """

    def __init__(self, path: Path, images: Sequence[Path | Failure]) -> None:
        if is_output(path):
            raise invalid("--out", "another folder than a run's", found=printable(path))
        self.path = path
        known = {os.path.realpath(image) for image in images if isinstance(image, Path)}
        taken: dict[Path, Path] = {}
        for image in images:
            if isinstance(image, Failure):
                continue
            for file in (self._file(image, name) for name in MAP_NAMES):
                if (other := taken.setdefault(file, image)) != image:
                    found = f"{printable(other)} and {printable(image)}"
                    expected = "files whose maps have different names"
                    raise invalid("images", expected, found=found)
                if os.path.realpath(file) in known or (file.exists() and not is_own_png(file)):
                    expected = "a folder in which no map replaces another file"
                    found = f"that of {printable(file)}"
                    raise invalid("--out", expected, found=found)

    def written(self, predictions: Iterable[T]) -> Iterator[T]:
        """Write the maps of predictions as PNG, as they come, and yield the predictions.

        Both maps of an image are written whole, or neither changes.

        Raises:
            OSError: see `netfission.utils.files.write_together`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for prediction in predictions:
            if isinstance(prediction, TargetPrediction):
                maps = prediction.maps.items()
                write_together({self._file(prediction.image, name): png_bytes(drawn) for name, drawn in maps})
            yield prediction

    def _file(self, image: Path, name: str) -> Path:
        return self.path / f"{image.stem}{name}.png"
