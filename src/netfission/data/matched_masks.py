"""Photographs with masks of any folder, matched to the classes and the image shape of a trained network."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from netfission.data.mask_folders import (
    VOID,
    MaskCounts,
    MaskSplit,
    check_numbers,
    find_pairs,
    number_of_void,
    read_class_names,
)
from netfission.data.matched import MatchedImages, Part, choose_part, full_name, number_classes
from netfission.utils.errors import invalid
from netfission.utils.text import count_noun, printable


def load_matched_masks(
    name: str,
    classes: Sequence[str],
    shape: Sequence[int],
    *,
    part: Part | None = None,
    preferred: Sequence[Part] = ("test",),
    void: int | None = None,
) -> MatchedImages:
    """Load photographs with masks, fitted into the size that a network expects; all masks are checked.

    Args:
        name: of the folder, see `netfission.data.mask_folders`. It needs no training split; `images` and
            `masks` without splits will do.
        classes: the network's classes. Those of the folder's masks are matched by name, in any order and of
            any number; they may be a part of the network's.
        shape: channels, height and width.
        part: see `netfission.data.matched.load_matched`.
        preferred: see there.
        void: the number in masks of pixels without a class, unless the folder's `classes.txt` names that
            number as a class that the network knows; default see `netfission.data.mask_folders.load_masks`.

    Raises:
        ValueError: the folder has another layout, there is no such part, the network lacks a class of a
            pixel, all pixels are void, or see `netfission.data.mask_folders.load_masks`.
        FileNotFoundError: the folder does not exist.

    Warns:
        UserWarning: masks are all void.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     for kind, colour, mode in (("images", "red", "RGB"), ("masks", 1, "L")):
        ...         Path(folder, kind).mkdir()
        ...         Image.new(mode, (6, 4), colour).save(Path(folder, kind, "a.png"))
        ...     _ = Path(folder, "classes.txt").write_text("road\\nsky\\n")
        ...     images = load_matched_masks(folder, ["sky", "tree", "road"], (3, 2, 3))
        ...     pixels, mask = images.splits[0][0]
        >>> images.part, images.classes, mask.tolist()
        ('all', ['sky'], [[0, 0, 0], [0, 0, 0]])
    """
    folder = Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {printable(name)}")
    pairs, *_ = find_pairs(folder, train_required=False)
    chosen, files = choose_part(pairs, part, preferred)
    listed = read_class_names(folder)
    if void is None or (listed is not None and void < len(listed) and listed[void] in classes):
        void = number_of_void(listed)
    counts = [MaskCounts.of(pairs_of_split, void) for pairs_of_split in files]
    if listed is None:
        listed = [str(number) for number in range(max(split.classes for split in counts))]
    for split in counts:
        check_numbers(split, len(listed), void, "name it void in classes.txt")
    present = torch.stack([split.pixels for split in counts]).sum(dim=0).nonzero().flatten().tolist()
    if not present:
        raise invalid(f"the masks of {printable(name)}", "labelled", found="void pixels alone")
    if all_void := sum(split.all_void for split in counts):
        masks = count_noun(all_void, "mask")
        warnings.warn(f"{masks} without a labelled pixel: nothing is measured there", stacklevel=2)
    numbers = number_classes(os.fspath(name), [listed[number] for number in present], classes)
    table = torch.full((256,), VOID, dtype=torch.uint8)
    table[present] = torch.tensor(numbers, dtype=torch.uint8)
    size = (shape[1], shape[2])
    splits = [MaskSplit(pairs_of_split, table, in_memory=False, size=size) for pairs_of_split in files]
    return MatchedImages(
        full_name(name), chosen, splits, [classes[number] for number in sorted(set(numbers))], left_out=0
    )
