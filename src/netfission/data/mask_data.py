"""A folder of photographs and masks as a data set for training: all of one size, in splits."""

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from netfission.data.checks import Copies, compare_splits
from netfission.data.load import MEMORY_LIMIT, VALIDATION_SHARE, ImageData
from netfission.data.mask_folders import MaskData, MaskSplit, find_pairs, load_masks
from netfission.data.split_names import SplitName
from netfission.data.splits import FileRecords, StreamedSplit, TensorSplit, stratified_cut
from netfission.data.summary import CUT, DataSummary, SplitSummary, count_classes
from netfission.data.targets import MASKS
from netfission.utils.errors import check_image_size, invalid
from netfission.utils.text import percent, printable


def load_mask_data(
    name: str,
    *,
    image_size: int | None = None,
    validation: float = VALIDATION_SHARE,
    seed: int = 0,
    void: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    checks: bool = True,
) -> ImageData:
    """Load a folder of photographs and masks, and hold out a validation split if it has none.

    Photographs are fitted into the size of most of them, see `netfission.data.images.to_pixels_within`, or
    into that size scaled to a shorter side of `image_size`. Labels are masks `(height, width)`: classes, and
    `netfission.data.mask_folders.VOID` for pixels without one.

    Args:
        name: the folder, see `netfission.data.mask_folders`.
        image_size: the shorter side of photographs in pixels; default their own size, if all have one.
        validation: share of the training photographs to hold out, in [0, 1). If the folder has a validation
            split, that replaces any share above 0.
        seed: determines which photographs are held out.
        void: see `netfission.data.mask_folders.load_masks`.
        memory_limit: bytes of pixels and masks up to which they are held in memory, default 2 GiB; larger
            data sets are decoded on access.
        checks: look for photographs that are in two splits, which reads a part of many files. If False, the
            summary has no warnings and counts no copies.

    Raises:
        ValueError: an argument is not valid, photographs differ in size, or see `load_masks`.
        FileNotFoundError: the folder does not exist.

    Warns:
        UserWarning: a validation split replaces a share other than 0.1, all photographs of a class were held
            out, or see `load_masks`.
    """
    if image_size is not None:
        check_image_size("image_size", image_size)
    if not 0 <= validation < 1:
        raise invalid("validation", "a share in [0, 1)", validation)
    found = load_masks(name, void=void, memory_limit=0)
    size = fitted_size(found, image_size)
    rows = _rows(found, validation, seed)
    pixels = 4 * size[0] * size[1] * sum(map(len, rows.values()))
    parts = {
        split: found.splits["train" if split == "validation" and found.validation is None else split].fitted(
            size, numbers
        )
        for split, numbers in rows.items()
    }
    splits = {split: _decoded(part) if pixels <= memory_limit else part for split, part in parts.items()}
    return ImageData(
        name=name,
        classes=found.classes,
        shape=(3, *size),
        mean=found.mean,
        std=found.std,
        train=splits["train"],
        validation=splits.get("validation"),
        test=splits["test"],
        summary=_summarise(found, rows, parts, _copies(parts, name) if checks else Copies({}, [])),
        numbers=found.numbers,
        pixels=found.in_masks["train"][rows["train"]].sum(dim=0).tolist(),
    )


def fitted_size(found: MaskData, shorter: int | None) -> tuple[int, int]:
    """Return the height and width that `load_mask_data` fits photographs into.

    Args:
        found: the folder.
        shorter: the shorter side in pixels; default that of the photographs.

    Raises:
        ValueError: photographs differ in size, and no side is given.
    """
    if shorter is None and found.shape is None:
        hint = f"those of {printable(found.name)} differ"
        raise invalid("image_size", "given if photographs differ in size", None, hint=hint)
    size = found.common_size
    factor = 1.0 if shorter is None else shorter / min(size)
    return round(factor * size[0]), round(factor * size[1])


def _rows(found: MaskData, validation: float, seed: int) -> dict[SplitName, list[int]]:
    """Return the photographs of each split, as positions in the folder's split that they are from."""
    rows = _cut({split: len(part) for split, part in found.splits.items()}, validation, seed)
    if found.validation is not None:
        if validation not in (0, VALIDATION_SHARE):
            message = f"validation={validation} has no effect, as {found.name} has a validation split"
            warnings.warn(message, stacklevel=3)
        return rows
    if validation:
        rest, cut = rows["train"], rows["validation"]
        if not found.present["train"][cut].any():
            what = "photographs with a labelled pixel" if cut else "photographs"
            hint = f"there are {len(found.train)} training photographs"
            raise invalid("validation", f"0, or a share that holds out {what}", validation, hint=hint)
        lost = found.present["train"].any(dim=0) & ~found.present["train"][rest].any(dim=0)
        if lost.any():
            names = count_classes([name for name, gone in zip(found.classes, lost, strict=True) if gone])
            what = "as all that are were held out for validation; choose another seed"
            warnings.warn(f"no training pixel is of {names}, {what}", stacklevel=3)
    return rows


def _cut(photographs: Mapping[SplitName, int], validation: float, seed: int) -> dict[SplitName, list[int]]:
    """Return the photographs of each split, by the number of those in each split of the folder."""
    rows: dict[SplitName, list[int]] = {split: list(range(count)) for split, count in photographs.items()}
    if "validation" in rows:
        return rows if validation else {split: rows[split] for split in rows if split != "validation"}
    if validation:
        rest, cut = stratified_cut(np.zeros(len(rows["train"]), np.int64), validation, seed)
        rows["train"], rows["validation"] = rest.tolist(), cut.tolist()
    return rows


def find_photographs(name: str, *, validation: float, seed: int) -> dict[SplitName, StreamedSplit]:
    """Find the photographs of each split that `load_mask_data` makes of a folder, without reading a mask.

    Args:
        name: the folder.
        validation: see `load_mask_data`, as `seed`.

    Returns:
        Split → photographs of any size, all with the label 0.

    Raises:
        ValueError, FileNotFoundError: see `load_mask_data`.

    Example:
        >>> find_photographs("no-such-folder", validation=0.1, seed=0)
        Traceback (most recent call last):
        FileNotFoundError: no folder no-such-folder
    """
    if not Path(name).is_dir():
        raise FileNotFoundError(f"no folder {printable(name)}")
    pairs, *_ = find_pairs(Path(name))
    rows = _cut({split: len(files) for split, files in pairs.items()}, validation, seed)
    return {
        split: _photographs(
            [
                pairs["train" if split == "validation" and "validation" not in pairs else split][row]
                for row in chosen
            ]
        )
        for split, chosen in rows.items()
    }


def _photographs(files: Sequence[tuple[str, str]], size: tuple[int, int] = (1, 1)) -> StreamedSplit:
    """Return the photographs of pairs, whose contents can be compared."""
    records = FileRecords([photograph for photograph, _ in files], np.zeros(len(files), np.int64))
    return StreamedSplit(records, np.arange(len(files)), size)


def _decoded(part: MaskSplit) -> TensorSplit:
    """Decode a split into memory."""
    height, width = part.size
    images = torch.empty(len(part), 3, height, width, dtype=torch.uint8)
    masks = torch.empty(len(part), height, width, dtype=torch.uint8)
    for row in range(len(part)):
        images[row], masks[row] = part[row]
    return TensorSplit(images, masks, part.photograph_sizes)


def _copies(parts: Mapping[SplitName, MaskSplit], folder: str) -> Copies:
    """Find photographs that are in two splits."""
    photographs = {split: _photographs(part.files, part.size) for split, part in parts.items()}
    return compare_splits(photographs, None, folder)


def _summarise(
    found: MaskData,
    rows: dict[SplitName, list[int]],
    parts: dict[SplitName, MaskSplit],
    copies: Copies,
) -> DataSummary:
    def summary(split: SplitName) -> SplitSummary:
        is_cut = split == "validation" and found.validation is None
        present = found.present["train" if is_cut else split][rows[split]]
        files = [photograph for photograph, _ in parts[split].files]
        origin = CUT if is_cut else os.path.join(found.name, found.origins[split])
        images_per_class: list[int] = present.sum(dim=0).tolist()
        copied, digest = copies.in_training.get(split, 0), _digest(files, present.tolist())
        return SplitSummary(origin, len(files), images_per_class, copied, digest)

    left_out = dict(found.left_out)
    if found.validation is not None and "validation" not in rows:
        left_out["of the validation split, which is not used"] = len(found.validation)
    return DataSummary(
        data=found.name,
        classes=found.classes,
        train=summary("train"),
        validation=summary("validation") if "validation" in rows else None,
        test=summary("test"),
        left_out=left_out,
        remarks=_remarks(found),
        warnings=copies.remarks,
        targets=MASKS.noun,
        exclusive=MASKS.exclusive,
    )


def _digest(files: Sequence[str], present: list[list[bool]]) -> str:
    """Return a short hash of the names of photographs and of the classes in their masks."""
    names = [file.replace(os.sep, "/") for file in files]
    start = os.path.commonprefix(names).rfind("/") + 1  # noqa: RUF071 (cut after a folder)
    lines = (
        f"{name[start:]}\t{[number for number, has in enumerate(classes) if has]}"
        for name, classes in zip(names, present, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:12]


def _remarks(found: MaskData) -> list[str]:
    """Say how unevenly pixels are spread over classes, and how many have none."""
    *counts, void = found.pixels["train"]
    labelled = sum(counts)
    by_count = sorted((count, name) for count, name in zip(counts, found.classes, strict=True) if count)
    (few, rare), (many, frequent) = by_count[0], by_count[-1]
    rarest, largest = f"{percent(few / labelled)} % of {rare}", f"{percent(many / labelled)} % of {frequent}"
    return [
        f"pixels of the training photographs, held-out ones included: {rarest} to {largest}",
        f"{percent(void / (labelled + void))} % void",
    ]
