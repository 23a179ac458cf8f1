"""Images that are published in corrupted form: CIFAR-10-C, CIFAR-100-C and folders of their layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from netfission.data.images import Mode, to_pixels
from netfission.utils.errors import first_line, invalid

# The 15 of Hendrycks & Dietterich 2019 (arXiv 1903.12261); four more in the folders are for validation.
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
STRENGTHS = (1, 2, 3, 4, 5)
_LAYOUT = "a folder of CIFAR-10-C or CIFAR-100-C as published, with labels.npy and an array per corruption"


@dataclass(frozen=True)
class CorruptedImages:
    """The images of a folder, read on access.

    Attributes:
        folder: with `labels.npy`, and an array `(5 * n, height, width, 3)` per corruption, by strength.
        labels: `(n,)`, int64, in the order of the network's classes.
        shape: channels, height and width that images are converted to.
    """

    folder: Path
    labels: Tensor
    shape: tuple[int, int, int]

    def pixels(self, name: str, strength: int, rows: Tensor) -> Tensor:
        """Return images of one corruption, uint8 `(rows, channels, height, width)`.

        Args:
            name: one of `CORRUPTIONS`.
            strength: from 1 to 5.
            rows: `(rows,)`, int64, numbers of the images.
        """
        images = _array(self.folder / f"{name}.npy")
        chosen = np.asarray(images[(strength - 1) * len(self.labels) + rows.numpy()])
        channels, height, width = self.shape
        if (channels, height, width) == (3, *chosen.shape[1:3]):
            return torch.from_numpy(chosen).permute(0, 3, 1, 2).contiguous()
        mode: Mode = "L" if channels == 1 else "RGB"
        return torch.stack([to_pixels(Image.fromarray(image), mode, (height, width)) for image in chosen])


def open_corrupted(folder: Path, classes: Sequence[str], shape: tuple[int, int, int]) -> CorruptedImages:
    """Open a folder of corrupted images.

    Args:
        folder: with `labels.npy` and `NAME.npy` of the 15 corruptions. A label is the number of a class in
            alphabetical order, as it is in both published sets; each class has images.
        classes: names of the network's classes.
        shape: channels, height and width of the network's images.

    Raises:
        ValueError: the folder has another layout, or labels of other classes.
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"corrupted must be {_LAYOUT}, got {folder}, which does not exist")
    missing = [name for name in ("labels", *CORRUPTIONS) if not (folder / f"{name}.npy").is_file()]
    if missing:
        raise invalid("corrupted", _LAYOUT, found=f"{folder} without {missing[0]}.npy")
    labels = np.asarray(_array(folder / "labels.npy"))
    strengths = len(STRENGTHS)
    n, rest = divmod(len(labels), strengths) if labels.ndim == 1 else (0, 1)
    if not n or rest or labels.dtype.kind not in "iu" or (labels.reshape(strengths, n) != labels[:n]).any():
        found = f"{folder}, whose labels.npy is {_described(labels)}"
        raise invalid("corrupted", f"{_LAYOUT}; labels are the same at each strength", found=found)
    present = np.unique(labels)
    if len(present) != len(classes) or (present != np.arange(len(classes))).any():
        found = f"{len(present)} labels from {present[0]} to {present[-1]}"
        raise invalid("corrupted", f"images of the network's {len(classes)} classes", found=found)
    for name in CORRUPTIONS:
        images = _array(folder / f"{name}.npy")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[::3] != (len(labels), 3):
            expected = f"an array of uint8 {(len(labels), 'height', 'width', 3)}".replace("'", "")
            raise invalid(f"{name}.npy", expected, found=_described(images))
    alphabetical = sorted(range(len(classes)), key=classes.__getitem__)
    return CorruptedImages(folder, torch.tensor(alphabetical)[labels[:n].astype(np.int64)], shape)


def _array(file: Path) -> npt.NDArray[np.generic]:
    """Map an array into memory; one that wants to run code is refused."""
    try:
        array: npt.NDArray[np.generic] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise invalid(str(file), "an array of NumPy", found=f"another file ({first_line(error)})") from error
    return array


def _described(array: npt.NDArray[np.generic]) -> str:
    return f"{array.dtype} {array.shape}"
