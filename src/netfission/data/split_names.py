"""Which names of folders, tables and rows stand for which split of a data set."""

import re
from collections.abc import Iterable
from typing import Literal

from netfission.utils.errors import invalid

SplitName = Literal["train", "validation", "test"]
# Names of splits, in any case.
SPLIT_NAMES: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# Names of splits only beside a training split, for a split that has none of the usual names.
_BESIDE_TRAINING: dict[SplitName, tuple[str, ...]] = {
    "test": ("tests", "eval", "evaluation", "holdout"),
    "validation": ("dev", "eval", "evaluation"),
}


def split_of(name: str) -> SplitName | None:
    """Return the split that a name stands for; None if it is not the name of a split.

    Example:
        >>> split_of("Training"), split_of("valid"), split_of("daisy")
        ('train', 'validation', None)
    """
    return next((split for split, names in SPLIT_NAMES.items() if name.casefold() in names), None)


def may_be_split(name: str) -> bool:
    """Return whether a name can stand for a split, be it only beside a training split.

    Example:
        >>> may_be_split("Val"), may_be_split("holdout"), may_be_split("extra")
        (True, True, False)
    """
    synonyms = {synonym for names in _BESIDE_TRAINING.values() for synonym in names}
    return split_of(name) is not None or name.casefold() in synonyms


def assign_splits(names: Iterable[str], where: str, *, train_required: bool = True) -> dict[SplitName, str]:
    """Return which of some names stands for which split, training first.

    Without a test split, the validation split is the test split. Beside a training split, `tests`, `holdout`,
    `eval` and `evaluation` can stand for a test split, and `dev`, `eval` and `evaluation` for a validation
    split, if no other name does.

    Args:
        names: those that stand for no split are left out.
        where: name of the data set, for messages.
        train_required: refuse names of which none stands for the training split; if False, the validation
            split stays one without a training split.

    Raises:
        ValueError: two names stand for one split, or a split is required that none stands for.

    Example:
        >>> assign_splits(["Test", "Training", "extra"], "here")
        {'train': 'Training', 'test': 'Test'}
        >>> assign_splits(["train", "val"], "here")
        {'train': 'train', 'test': 'val'}
        >>> assign_splits(["train", "val", "eval"], "here")
        {'train': 'train', 'validation': 'val', 'test': 'eval'}
    """
    given = list(names)
    found: dict[SplitName, str] = {}
    for name in given:
        split = split_of(name)
        if split is not None and found.setdefault(split, name) != name:
            raise invalid(where, f"a data set with one {split} split", found=f"{found[split]} and {name}")
    if "train" in found:
        _assign_synonyms(given, found)
        if "test" not in found and "validation" in found:
            found["test"] = found.pop("validation")
    elif train_required or not found:
        listed = ", ".join(given) or "none"
        raise invalid(where, "a data set with a train split", found=f"the splits {listed}")
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def _assign_synonyms(names: Iterable[str], found: dict[SplitName, str]) -> None:
    """Add the test and the validation split to `found`, where exactly one name can stand for them."""
    for split, synonyms in _BESIDE_TRAINING.items():
        free = [name for name in names if name.casefold() in synonyms and name not in found.values()]
        if split not in found and len(free) == 1:
            found[split] = free[0]


def test_name(names: Iterable[str]) -> str | None:
    """Return the name that stands for the test split, or else for the validation split; None without either.

    Example:
        >>> test_name(["train", "val"]), test_name(["train", "val", "Testing"]), test_name(["train"])
        ('val', 'Testing', None)
        >>> test_name(["train", "eval"]), test_name(["eval", "photographs"])
        ('eval', None)
    """
    given = list(names)
    found: dict[SplitName, str] = {split: name for name in given if (split := split_of(name)) is not None}
    if "train" in found:
        _assign_synonyms(given, found)
    return found.get("test") or found.get("validation")


def splits_in(name: str) -> set[SplitName]:
    """Return the splits that words of a name stand for.

    Example:
        >>> splits_in("seg_train"), splits_in("train2017"), splits_in("trains")
        ({'train'}, {'train'}, set())
    """
    words = re.split(r"[^a-z]+", name.casefold())
    return {split for word in words if (split := split_of(word))}
