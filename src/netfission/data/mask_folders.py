"""Load photographs with masks, images whose pixels are class numbers, as splits of a data set.

A folder holds `SPLIT/images` and `SPLIT/masks`, or `images/SPLIT` and `masks/SPLIT`. A photograph and its
mask have the same name up to the ending. Masks are in a format without loss, such as PNG. `classes.txt` in
the folder may name the classes, one per line, in the order of their numbers from 0; pixels of a class of the
name `void` have no class.
"""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from netfission.data.files import find_images
from netfission.data.formats import load, open_image
from netfission.data.images import size_within, to_pixels_within, upright_size
from netfission.data.load import MEMORY_LIMIT
from netfission.data.split_names import SplitName, assign_splits, may_be_split
from netfission.data.splits import CorruptImageError, DecodedSplit, FileRecords, corrupt_image
from netfission.data.summary import count_classes
from netfission.utils.errors import invalid
from netfission.utils.text import count_noun, printable

VOID = 255  # the label of pixels without a class; masks may give them another number
_VOID_NAME = "void"
_STATISTICS_IMAGES = 1024
CLASS_NAMES = "classes.txt"
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "photographs")
_MASK_FOLDERS = ("masks", "mask", "labels", "annotations")
# Pillow's names of formats, and of compressions in TIFF, that may change the numbers of pixels.
_LOSSY = {"AVIF", "HEIF", "JPEG", "JPEG2000", "JXL", "MPO", "WEBP", "jpeg", "tiff_jpeg", "webp"}
_ONE_INTEGER = (
    "1",
    "L",
    "P",
    "I",
    "I;16",
    "I;16B",
    "I;16L",
)  # Pillow's modes of which a pixel is one integer


class MaskSplit(DecodedSplit):
    """Photographs with masks: index → pixels `(3, height, width)` uint8 and classes `(height, width)` int64.

    Args:
        files: the photograph and the mask of each.
        table: number in the masks → class, or `VOID`; `(256,)` uint8.
        in_memory: whether they are held in memory once decoded; else they are decoded at each access.
        size: height and width, into which photographs of another size are fitted, see
            `netfission.data.images.to_pixels_within`; masks with them, and what is added is void. Default
            their own sizes.

    Attributes:
        size: height and width; those of the first photograph if they have their own sizes.
        records: the photographs, without a class.
        rows: numbers of the records: all of them.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, str]],
        table: Tensor,
        *,
        in_memory: bool,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.files = list(files)
        self.labels = torch.empty(len(files), 0)
        self.rows = np.arange(len(files))
        self.records = FileRecords([photograph for photograph, _ in files], np.zeros_like(self.rows))
        self._table = table
        self._fitted = size
        self.size = size or _size(self.files[0][0])
        self._in_memory = in_memory
        self._decoded: dict[int, tuple[Tensor, Tensor]] = {}

    def fitted(self, size: tuple[int, int], rows: Sequence[int] | None = None) -> "MaskSplit":
        """Return some photographs of the split, or all, fitted into a size; decoded at each access."""
        chosen = range(len(self)) if rows is None else rows
        return MaskSplit([self.files[row] for row in chosen], self._table, in_memory=False, size=size)

    @property
    def photograph_sizes(self) -> Sequence[tuple[int, int]]:
        """Height and width of each photograph in its file."""
        return [_size(photograph) for photograph, _ in self.files]

    def unscaled(self) -> "MaskSplit":
        """Return the photographs in their own sizes, decoded at each access."""
        return MaskSplit(self.files, self._table, in_memory=False)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Decode one photograph and its mask; both are copies of what is in memory.

        Raises:
            CorruptImageError: one of them cannot be read.
            ValueError: the mask has several channels, or another size than the photograph, or its format may
                have changed its numbers.
        """
        number = range(len(self))[index]
        pixels, mask = self._decoded.get(number) or _decode(*self.files[number], self._table, self._fitted)
        if self._in_memory:
            self._decoded[number] = pixels, mask
            pixels = pixels.clone()
        return pixels, mask.long()


@dataclass(frozen=True)
class MaskData:
    """A data set of photographs with masks.

    Attributes:
        name: folder that it was loaded from.
        classes: names of the classes.
        numbers: of the classes in masks, in the order of `classes`: 0, 1, … without that of void.
        shape: channels, height and width of the photographs; None if they differ in size.
        common_size: height and width of most training photographs.
        mean: one number per channel, of pixels of the training split scaled to [0, 1]: of all photographs if
            there are fewer than 2,048, else of 1,024 to 2,047 of them at equal distances.
        std: standard deviation, as `mean`.
        train: training split.
        validation: validation split; None if the folder has no such split.
        test: test split.
        pixels: split → number of pixels of each class, and of void pixels at the end.
        in_masks: split → number of pixels of each class in each mask, int32 `(masks, classes)`.
        origins: split → the folder of its photographs, within the data set's.
        left_out: reason → number of files that are in no split.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     for split in ("train", "test"):
        ...         for kind, colour, mode in (("images", "red", "RGB"), ("masks", 1, "L")):
        ...             Path(folder, split, kind).mkdir(parents=True)
        ...             Image.new(mode, (6, 4), colour).save(Path(folder, split, kind, "a.png"))
        ...     _ = Path(folder, "classes.txt").write_text("road\\nsky\\n")
        ...     with warnings.catch_warnings(action="ignore"):
        ...         data = load_masks(folder)
        >>> data.classes, data.shape, len(data.train), data.pixels["test"]
        (['road', 'sky'], (3, 4, 6), 1, [0, 24, 0])
    """

    name: str
    classes: list[str]
    numbers: list[int]
    shape: tuple[int, int, int] | None
    common_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: MaskSplit
    validation: MaskSplit | None
    test: MaskSplit
    pixels: dict[SplitName, list[int]]
    in_masks: dict[SplitName, Tensor]
    origins: dict[SplitName, str]
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def present(self) -> dict[SplitName, Tensor]:
        """Split → whether each mask has each class, bool `(masks, classes)`."""
        return {split: counts > 0 for split, counts in self.in_masks.items()}

    @property
    def void(self) -> int:
        """The label of pixels without a class in what splits return: 255, whatever masks give them."""
        return VOID

    @property
    def splits(self) -> dict[SplitName, MaskSplit]:
        """The splits that there are, by name."""
        found: dict[SplitName, MaskSplit] = {"train": self.train, "test": self.test}
        return found if self.validation is None else found | {"validation": self.validation}


def load_masks(
    folder: str | Path,
    *,
    classes: Sequence[str] | None = None,
    void: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> MaskData:
    """Load a folder of photographs and masks; see the layout above. All masks are read and checked.

    Without a test split, the validation split is the test split.

    Args:
        folder: the folder.
        classes: names of the classes in the order of their numbers; default those in `classes.txt`, else the
            numbers up to the largest in the training masks. The number `void` is not a class.
        void: the number in masks of pixels without a class, which may also be that of no pixel; default that
            of the class `void`, or else 255.
        memory_limit: bytes of pixels and masks up to which they are held in memory, default 2 GiB; larger
            data sets are decoded at each access.

    Raises:
        ValueError: the folder has another layout, a photograph has no mask or several, a mask has several
            channels, another size than its photograph, a number that is no class or a format that may have
            changed its numbers, a split has no labelled pixel, or the names of classes are not valid.
        FileNotFoundError: the folder does not exist.

    Warns:
        UserWarning: a class has no training pixel, or masks are all void.
    """
    name = os.fspath(folder)
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {printable(name)}")
    pairs, origins, left_out = find_pairs(Path(folder))
    listed = read_class_names(Path(folder)) if classes is None else _checked_names("classes", classes)
    if void is None:
        void = number_of_void(listed)
    found = {split: MaskCounts.of(files, void) for split, files in pairs.items()}
    hint = found["train"].void_hint(void) if listed is None else ""
    if listed is None:
        listed = [str(number) for number in range(found["train"].classes)]
    numbers = [number for number in range(len(listed)) if number != void]
    names = [listed[number] for number in numbers]
    if len(names) < 2:
        raise invalid("classes", "two or more", found=f"{len(names)} in {printable(name)}", hint=hint)
    if len(names) > VOID:
        raise invalid("classes", f"at most {VOID}", found=f"{len(names)} in {printable(name)}")
    for split, counts in found.items():
        check_numbers(counts, len(listed), void, "name more classes, or set void")
        if not counts.pixels.sum():
            raise invalid(f"the {split} masks of {printable(name)}", "labelled", found="void pixels alone")
    _warn(found, names, numbers, void)
    needed = 4 * sum(int(counts.pixels.sum()) + counts.void for counts in found.values())
    table = torch.full((256,), VOID, dtype=torch.uint8)
    table[numbers] = torch.arange(len(numbers), dtype=torch.uint8)
    splits = {
        split: MaskSplit(files, table, in_memory=needed <= memory_limit) for split, files in pairs.items()
    }
    sizes = {size for counts in found.values() for size in counts.sizes}
    mean, std = _statistics(splits["train"])
    return MaskData(
        name,
        names,
        numbers,
        (3, *sizes.pop()) if len(sizes) == 1 else None,
        found["train"].sizes.most_common(1)[0][0],
        mean,
        std,
        splits["train"],
        splits.get("validation"),
        splits["test"],
        {split: [*counts.pixels[numbers].tolist(), counts.void] for split, counts in found.items()},
        {split: counts.in_masks[:, numbers] for split, counts in found.items()},
        origins,
        left_out,
    )


Pairs = list[tuple[str, str]]


def find_pairs(
    folder: Path, *, train_required: bool = True
) -> tuple[dict[SplitName, Pairs], dict[SplitName, str], dict[str, int]]:
    """Return the photographs and masks of each split, the name of its folder, and what is left out.

    Args:
        folder: see `load_masks`; no mask is read.
        train_required: refuse a folder without a training and a test split; if False, `images` and `masks`
            without splits are a training split, too.

    Raises:
        ValueError: the folder has another layout, or a photograph has no mask or several.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for part in ("train/images", "train/masks", "test/images", "test/masks"):
        ...         Path(folder, part).mkdir(parents=True)
        ...         Path(folder, part, "a.png").touch()
        ...     pairs, origins, left_out = find_pairs(Path(folder))
        >>> len(pairs["train"]), origins["test"], left_out
        (1, 'test', {})
    """
    images, masks = _subfolder(folder, _IMAGE_FOLDERS), _subfolder(folder, _MASK_FOLDERS)
    within: dict[str, tuple[Path, Path]] = {}
    if images and masks:  # the splits are within them
        within = {path.name: (path, masks / path.name) for path in _subfolders(images)}
        if not train_required and not any(map(may_be_split, within)):
            within = {"train": (images, masks)}
    else:
        for path in _subfolders(folder):
            images, masks = _subfolder(path, _IMAGE_FOLDERS), _subfolder(path, _MASK_FOLDERS)
            if images and masks:
                within[path.name] = images, masks
    where = printable(os.fspath(folder))
    if not within:
        layout = "a folder with SPLIT/images and SPLIT/masks, or images/SPLIT and masks/SPLIT"
        raise invalid(where, layout, found="others")
    named = assign_splits(within, where, train_required=train_required)
    if train_required and "test" not in named:
        raise invalid(where, "a data set with a test or validation split", found=f"{', '.join(within)}")
    left_out: dict[str, int] = {}
    pairs: dict[SplitName, Pairs] = {}
    for split, name in named.items():
        pairs[split], more = _match(*within[name])
        for reason, count in more.items():
            left_out[reason] = left_out.get(reason, 0) + count
    return pairs, dict(named), left_out


def _match(images: Path, masks: Path) -> tuple[Pairs, dict[str, int]]:
    """Pair photographs with masks of the same name, up to the ending."""
    found, of_masks = find_images(images), find_images(masks)
    by_name = _by_name(of_masks.images, masks)
    pairs = [(path, by_name.pop(name, "")) for name, path in _by_name(found.images, images).items()]
    where = printable(os.fspath(images))
    if not pairs:
        raise invalid(where, "a folder with photographs", found="none")
    if lacking := [path for path, mask in pairs if not mask]:
        which = f"none of {printable(lacking[0])}" + (
            f" and {count_noun(len(lacking) - 1, 'other')}" if lacking[1:] else ""
        )
        raise invalid(printable(os.fspath(masks)), "a folder with a mask of each photograph", found=which)
    left_out = found.counts() | ({"masks without a photograph": len(by_name)} if by_name else {})
    return pairs, left_out


def _by_name(paths: Sequence[str], folder: Path) -> dict[str, str]:
    """Return the files of a folder by their paths within it up to the ending; refuse two of one name."""
    found: dict[str, str] = {}
    for path in paths:
        within = os.path.relpath(path, folder)
        if (other := found.setdefault(os.path.splitext(within)[0], path)) != path:
            both = f"{printable(os.path.relpath(other, folder))} and {printable(within)}"
            expected = "a folder of files with different names up to the ending"
            raise invalid(printable(os.fspath(folder)), expected, found=both)
    return found


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _subfolder(folder: Path, names: Sequence[str]) -> Path | None:
    return next((path for path in _subfolders(folder) if path.name.casefold() in names), None)


def read_class_names(folder: Path) -> list[str] | None:
    """Return the names in `classes.txt` of a folder; None if there is no such file.

    Raises:
        ValueError: it is not UTF-8, or a name is empty or comes twice.

    Example:
        >>> read_class_names(Path("no such folder")) is None
        True
    """
    file = folder / CLASS_NAMES
    if not file.is_file():
        return None
    where = printable(os.fspath(file))
    try:
        text = file.read_bytes().decode("utf-8-sig")  # some editors put a mark before the text
    except UnicodeDecodeError as error:
        raise invalid(where, "a text in UTF-8", found="other bytes") from error
    return _checked_names(where, [line.strip() for line in text.rstrip().splitlines()])


def number_of_void(names: Sequence[str] | None) -> int:
    """Return the number of void pixels in masks: that of a class `void`, or else 255.

    Args:
        names: of the classes by their numbers; None without names.

    Example:
        >>> number_of_void(["road", "Void"]), number_of_void(None)
        (1, 255)
    """
    lower = [name.casefold() for name in names or ()]
    return lower.index(_VOID_NAME) if _VOID_NAME in lower else VOID


def _checked_names(where: str, names: Sequence[str]) -> list[str]:
    """Return names of classes; refuse an empty one, and one that comes twice."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise invalid(where, "a list of names", names)
    for number, name in enumerate(names):
        if name in names[:number] or not name.strip():
            found = f"{name!r} twice" if name.strip() else f"{name!r} as class {number}"
            raise invalid(where, "names that all differ", found=printable(found))
    return list(names)


@dataclass(frozen=True)
class MaskCounts:
    """How many pixels of the masks of a split have each number.

    Attributes:
        pixels: int64 `(256,)`: how many pixels have each number; void ones are not counted.
        void: number of void pixels.
        sizes: heights and widths, with the number of masks of each.
        first: number → the first mask that has it.
        in_masks: int32 `(masks, 256)`: how many pixels of each mask have each number; void ones do not count.
    """

    pixels: Tensor
    void: int
    sizes: Counter[tuple[int, int]]
    first: dict[int, str]
    in_masks: Tensor

    @property
    def present(self) -> Tensor:
        """Whether each mask has each number, bool `(masks, 256)`."""
        return self.in_masks > 0

    @property
    def classes(self) -> int:
        """One more than the largest number."""
        return max(self.first, default=-1) + 1

    @classmethod
    def of(cls, files: Pairs, void: int) -> "MaskCounts":
        """Read and count the masks of a split.

        Args:
            files: photographs and masks.
            void: the number of pixels that do not count.

        Raises:
            ValueError: a mask has another size than its photograph, or see `load_masks`.
        """
        pixels, voids = torch.zeros(256, dtype=torch.int64), 0
        sizes: Counter[tuple[int, int]] = Counter()
        first: dict[int, str] = {}
        in_masks = torch.zeros(len(files), 256, dtype=torch.int32)
        for row, (photograph, file) in enumerate(files):
            mask = _read_mask(file)
            size = (mask.shape[0], mask.shape[1])
            _check_size(file, size, _size(photograph))
            sizes[size] += 1
            counts = mask.flatten().long().bincount(minlength=256)
            if 0 <= void < 256:
                voids += int(counts[void])
                counts[void] = 0
            in_masks[row] = counts
            for number in counts.nonzero().flatten().tolist():
                first.setdefault(number, file)
            pixels += counts
        return cls(pixels, voids, sizes, first, in_masks)

    @property
    def all_void(self) -> int:
        """Number of masks without a labelled pixel."""
        return int((~self.present.any(dim=1)).sum())

    def void_hint(self, void: int) -> str:
        """Say what may be wrong if training masks have fewer than two classes; empty without void pixels."""
        if not self.void:
            return ""
        pixels = count_noun(self.void, "training pixel")
        return f"{void} is void, the number of {pixels}: number the classes from 0"


def check_numbers(counts: MaskCounts, classes: int, void: int, hint: str) -> None:
    """Raise ValueError if a pixel has a number that is no class.

    Args:
        counts: of the masks.
        classes: number of classes, that of void included if it is among them.
        void: the number of pixels without a class.
        hint: what a user can do.
    """
    if outside := [number for number in counts.first if number >= classes]:
        number = min(outside)
        kinds = f"numbers from 0 to {classes - 1}, of which {void} is void"
        if void >= classes:
            kinds = f"class numbers from 0 to {classes - 1}, or {void} for void pixels"
        expected = f"of {kinds}"
        pixels = count_noun(int(counts.pixels[number]), "pixel")
        raise invalid(printable(counts.first[number]), expected, found=f"{number} ({pixels})", hint=hint)


def _warn(
    found: Mapping[SplitName, MaskCounts], names: Sequence[str], numbers: Sequence[int], void: int
) -> None:
    trained = found["train"].pixels[numbers].tolist()
    if absent := [name for name, count in zip(names, trained, strict=True) if not count]:
        message = f"no training pixel is of {count_classes(absent)}"
        hint = found["train"].void_hint(void) if len(names) - len(absent) == 1 else ""
        warnings.warn(f"{message}; {hint}" if hint else message, stacklevel=3)
    for split, counts in found.items():
        if counts.all_void:
            masks = count_noun(counts.all_void, f"{split} mask")
            warnings.warn(
                f"{masks} without a labelled pixel: nothing is learned or measured there", stacklevel=3
            )


def _decode(photograph: str, mask: str, table: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Return pixels `(3, height, width)` uint8 and classes `(height, width)` uint8.

    Raises:
        CorruptImageError: a file is not as it was when the data set was loaded.
    """
    try:
        classes = table[_read_mask(mask).long()]
        own = classes.shape[0], classes.shape[1]
        with _readable(photograph), open_image(Path(photograph)) as image:
            shape = upright_size(image)
            pixels = to_pixels_within(image, "RGB", size or shape)
        _check_size(mask, own, shape)
    except ValueError as error:
        raise CorruptImageError(str(error)) from error
    return pixels, classes if size is None else mask_within(classes, size)


def mask_within(classes: Tensor, size: tuple[int, int]) -> Tensor:
    """Fit a mask into a size as `netfission.data.images.to_pixels_within` fits its photograph.

    Each pixel has the class of the nearest one; below the mask and to its right, pixels are void.

    Args:
        classes: `(height, width)` uint8.
        size: height and width.

    Example:
        >>> mask_within(torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8), (2, 2))
        tensor([[  0,   1],
                [255, 255]], dtype=torch.uint8)
    """
    own = classes.shape[0], classes.shape[1]
    inner = size_within(own, size)
    rows, columns = (
        ((torch.arange(count) + 0.5) * (side / count)).long() for side, count in zip(own, inner, strict=True)
    )
    padding = (0, size[1] - inner[1], 0, size[0] - inner[0])
    return torch.nn.functional.pad(classes[rows][:, columns], padding, value=VOID)


def _check_size(mask: str, size: tuple[int, int], photograph: tuple[int, int]) -> None:
    if size != photograph:
        expected = f"of the size of its photograph ({photograph[0]}×{photograph[1]})"
        raise invalid(printable(mask), expected, found=f"{size[0]}×{size[1]}")


def _size(file: str) -> tuple[int, int]:
    """Return height and width of a photograph that is turned upright."""
    with _readable(file), open_image(Path(file)) as image:
        return upright_size(image)


def _read_mask(file: str) -> Tensor:
    with _readable(file), open_image(Path(file)) as image:
        lossy = _LOSSY & {image.format, image.info.get("compression")}
        numbers = np.array(load(image)) if image.mode in _ONE_INTEGER else None
    if lossy:
        expected = "a mask in a format without loss, such as PNG"
        hint = "other formats change the numbers of pixels"
        raise invalid(printable(file), expected, found=" ".join(lossy).upper(), hint=hint)
    if numbers is None:
        expected = "a mask of one channel, whose pixels are class numbers"
        hint = "convert its colours to numbers"
        raise invalid(printable(file), expected, found=f"an image of mode {image.mode}", hint=hint)
    for number in (numbers.min(), numbers.max()):
        if not 0 <= number <= 255:
            raise invalid(printable(file), "a mask of numbers from 0 to 255", found=f"{number}")
    return torch.from_numpy(numbers.astype(np.uint8))


@contextmanager
def _readable(file: str) -> Iterator[None]:
    """Name the file in the error if it cannot be decoded."""
    try:
        yield
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and many more
        raise corrupt_image(printable(file), error) from error


def _statistics(split: MaskSplit) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, of pixels scaled to [0, 1]."""
    count, total, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    step = max(1, len(split) // _STATISTICS_IMAGES)
    for index in range(0, len(split), step):
        pixels = split[index][0].flatten(1).double() / 255
        count += pixels.shape[1]
        total += pixels.sum(dim=1)
        squares += pixels.square().sum(dim=1)
    mean = total / count
    # Never below one grey level, so that a channel without contrast can be divided by it.
    std = (squares / count - mean.square()).clamp(min=1 / 255**2).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
