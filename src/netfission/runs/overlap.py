"""Images of another data set that are copies of a run's own."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from netfission.config import RunConfig
from netfission.data.checks import count_copies
from netfission.data.load import digest_of_files
from netfission.data.matched import full_name
from netfission.data.sources import Source, find_targets, fingerprint, is_named
from netfission.data.split_names import SplitName
from netfission.data.splits import Selection
from netfission.runs.folder import RunFolder, find_run_splits
from netfission.tasks import task_kind
from netfission.utils.errors import first_line
from netfission.utils.text import count_noun

# What it means that a network has seen images of a split in training.
_EFFECTS: dict[SplitName, str] = {
    "validation": "its calibration is too confident",
    "test": "it looks better on the test split than it is on new images",
}


def validation_dependence(config: RunConfig) -> str:
    """Say how a run's network depends on its validation images, so that they promise nothing for others.

    A run that it started from counts if its data set is the same one, which may have moved since, or if that
    cannot be decided any more.

    Args:
        config: the run's settings.

    Returns:
        The reason; an empty text if the network does not depend on them.

    Example:
        >>> validation_dependence(RunConfig())
        ''
    """
    if config.training.patience is not None:
        return "patience chose the epoch on the validation images, so they promise nothing for others"
    split = (config.fission.seed, config.data.validation)
    for path, start in _starts(config):
        is_chosen = start.training.patience is not None
        is_split_alike = (start.fission.seed, start.data.validation) == split
        if (is_split_alike and not is_chosen) or not _may_share_data(path, start, config):
            continue
        if is_chosen:
            return (
                "the network started from a run whose epoch patience chose on validation images of the same "
                "data set, so they promise nothing for others"
            )
        return (
            "the network started from a run with another validation split of the same data set (seed or "
            "validation), which may have been trained on these images, so they promise nothing for others"
        )
    return ""


def images_dependence(name: str, images: Sequence[Selection], config: RunConfig) -> str:
    """Say how a run's network depends on other images: it was trained, or chosen, on the content of some.

    Args:
        name: name or folder of the images.
        images: the images.
        config: the run's settings.

    Returns:
        The reason; an empty text if the network does not depend on them.

    Warns:
        UserWarning: the run's data set can no longer be read, so that this was not checked.
    """
    if found := _training_copies(name, images, config):
        return found
    if validation_dependence(config) and (found := _copies(name, images, config, ["validation"])):
        return f"{found} as validation images that the network was chosen on"
    return ""


def overlap_with_test(name: str, images: Sequence[Selection], config: RunConfig) -> str:
    """Say how many images have the same content as test images of a run; empty if none has.

    Args:
        name: name or folder of the images.
        images: the images.
        config: the run's settings.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who asks has been warned if the run's data set cannot be read
        found = _copies(name, images, config, ["test"])
    return f"it is calibrated on test images of its own; {found} as these" if found else ""


def _starts(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield path and settings of the run that a run started from, of the one before that, and so on."""
    seen = set()
    path = config.model.weights
    while path is not None and path not in seen:
        seen.add(path)
        folder = _folder_of(path)
        try:
            if folder.config.is_file():
                start = folder.load_config()
                yield path, start
                path = start.model.weights
            else:  # perhaps the single network of a fine-tuning, which was taken over from another place
                report = folder.load_weights_report()
                path = None if report is None else report.path
        except ValueError:  # it cannot be read
            return


def _folder_of(path: str) -> RunFolder:
    """Return the folder of a run, of which a path may name a file."""
    return RunFolder(Path(path) if Path(path).is_dir() else Path(path).parent)


def _may_share_data(path: str, start: RunConfig, config: RunConfig) -> bool:
    """Whether the run at a path may have the data set of a run that started from it, in another place or not.

    A data set that is here and in the other place is the same if its files are, by their names and sizes.
    Else it is the same if any split, cut as the run at the path cut it, has the digest that this run
    recorded. Where there is nothing to compare, a place that is gone may have held the same data set.
    """
    before, now = start.data.data, config.data.data
    if before == now:
        return True
    if is_named(before) or is_named(now):  # they do not move
        return False
    targets, is_there = task_kind(start.data.task).targets, Path(before).exists()
    try:
        if not Path(now).exists():
            return True
        if is_there and fingerprint(before, targets) == fingerprint(now, targets):
            return True
        summary = _folder_of(path).load_data_summary()
        if summary is None or targets.masks:  # which have no digests
            return not is_there
        source = find_targets(now, targets)
    except (OSError, ValueError):  # one of them cannot be read
        return True
    if source.classes != summary.classes:
        return False
    try:
        splits = _find_splits(replace(start, data=replace(start.data, data=now)), source)
    except ValueError:  # it cannot be cut as the other one was
        return False
    pairs = [
        (digest_of_files(images), None if recorded is None else recorded.digest)
        for images, recorded in ((images, getattr(summary, name)) for name, images in splits.items())
    ]
    known = [digest == recorded for digest, recorded in pairs if None not in (digest, recorded)]
    return any(known) if known else not is_there


def warn_of_training_images(name: str, images: Sequence[Selection], config: RunConfig) -> None:
    """Warn if images have the same content as some that a run's network was trained on.

    That includes the training images of the run that it started from, of the one before that, and so on.

    Args:
        name: name or folder of the images.
        images: the images.
        config: the run's settings.

    Warns:
        UserWarning: there are such images; the message has their number and an example. Or the data set of a
            run cannot be read any more, so that this was not checked.
    """
    if found := _training_copies(name, images, config):
        warnings.warn(found, stacklevel=3)


def warn_of_held_out_images(config: RunConfig) -> None:
    """Warn if a run holds out images that a run which it starts from was trained on.

    Args:
        config: the run's settings.

    Warns:
        UserWarning: validation or test images have the same content as training images of that run, or its
            data set cannot be read any more, so that this was not checked.
    """
    starts = [(path, start) for path, start in _starts(config) if _cut(start) != _cut(config)]
    if not starts:
        return
    name = config.data.data
    splits = _find_splits(config)
    for path, start in starts:
        checked = f"whether held-out images of {Path(name).name} are training images of {path}"
        trained_on = [part for split, part in _read_splits(start, name, checked).items() if split == "train"]
        for split, effect in _EFFECTS.items():
            images = [splits[split]] if split in splits else []
            if found := _count(name, images, trained_on, f"{split} image"):
                hint = ""
                if start.data.data == name:
                    seed, share = start.fission.seed, start.data.validation
                    hint = f"; seed={seed} and validation={share:g}, as in that run, keep them apart"
                # Of this line, so that a fine-tuning says it once of its two networks.
                warnings.warn(
                    f"{found} as training images of {path}, from which the network starts, so {effect}{hint}",
                    stacklevel=1,
                )


def _training_copies(name: str, images: Sequence[Selection], config: RunConfig) -> str:
    """Say how many images a run's network, or one that it started from, was trained on; empty if none."""
    if found := _copies(name, images, config, ["train"]):
        return f"{found} as images that the network was trained on"
    for path, start in _starts(config):
        if _cut(start) == _cut(config):
            continue
        if found := _copies(name, images, start, ["train"]):
            return f"{found} as training images of {path}, from which the network started"
    return ""


def _cut(config: RunConfig) -> tuple[object, ...]:
    """Return what decides which images a run is trained on."""
    data = config.data
    return data.data, data.task, data.validation, data.limit_per_class, config.fission.seed


def _find_splits(config: RunConfig, source: Source | None = None) -> Mapping[SplitName, Selection]:
    """Find the images of a run, without warnings about its splits; in `source` if they were found before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find_run_splits(config, source)


def warn_of_own_images(name: str, images: Sequence[Selection], config: RunConfig) -> None:
    """Warn if out-of-distribution images have the same content as some of a run's own data set.

    Arguments are those of `warn_of_training_images`.

    Warns:
        UserWarning: there are such images, or the run's data set cannot be read any more.
    """
    found = _copies(name, images, config, ["train", "validation", "test"])
    if found:
        warnings.warn(f"{found} as images of the run's own data set", stacklevel=3)


def _copies(name: str, images: Sequence[Selection], config: RunConfig, splits: Sequence[SplitName]) -> str:
    """Say how many images have the same content as those of some splits of a run; empty if none has."""
    splits_of_run = _read_splits(
        config, name, f"whether images of {Path(name).name} are copies of the run's own"
    )
    return _count(name, images, [splits_of_run[split] for split in splits if split in splits_of_run], "image")


def _read_splits(config: RunConfig, name: str, checked: str) -> Mapping[SplitName, Selection]:
    """Find the images of a run; none, with a warning that something was not `checked`, if they are gone.

    A data set that has to be downloaded is not read for images of another `name`.
    """
    recorded = config.data.data
    if recorded != "digits" and is_named(recorded) and full_name(name) != recorded:
        return {}
    try:
        return _find_splits(config)
    except (OSError, ValueError) as error:  # it has moved or changed
        reason = f"as the run's own data set cannot be read ({first_line(error)})"
        warnings.warn(f"{checked} was not checked, {reason}", stacklevel=5)
        return {}


def _count(name: str, images: Sequence[Selection], originals: Sequence[Selection], noun: str) -> str:
    number, example = count_copies(images, originals, str(Path(name)))
    if not number:
        return ""
    of_all = f"{number:,} of {count_noun(sum(len(part.rows) for part in images), noun)}"
    have = "has" if number == 1 else "have"
    return f"{of_all} of {Path(name).name} (such as {example}) {have} the same content"
