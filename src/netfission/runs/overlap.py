"""Images of another data set that are copies of a run's own."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from netfission.classifier.folder import ModelFolder
from netfission.config import RunConfig
from netfission.data.checks import count_copies
from netfission.data.load import find_splits
from netfission.data.matched import full_name
from netfission.data.sources import is_named
from netfission.data.split_names import SplitName
from netfission.data.splits import Selection
from netfission.utils.errors import first_line
from netfission.utils.text import count_noun


def validation_dependence(config: RunConfig) -> str:
    """Say how a run's network depends on its validation images, so that they promise nothing for others.

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
    for start in _starts(config):
        if start.data.data != config.data.data:
            continue
        if start.training.patience is not None:
            return (
                "the network started from a run whose epoch patience chose on validation images of the same "
                "data set, so they promise nothing for others"
            )
        if (start.fission.seed, start.data.validation) != split:
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
    if found := _copies(name, images, config, ["train"]):
        return f"{found} as images that the network was trained on"
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


def _starts(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the settings of the run that a run started from, of the one before that, and so on."""
    seen = set()
    while (start := _start(config)) is not None and config.model.weights not in seen:
        seen.add(config.model.weights)
        yield start
        config = start


def _start(config: RunConfig) -> RunConfig | None:
    """Return the settings of the run whose weights a run started from; None if they cannot be read."""
    if config.model.weights is None:
        return None
    path = Path(config.model.weights)
    folder = ModelFolder(path if path.is_dir() else path.parent)
    try:
        return folder.load_config() if folder.config.is_file() else None
    except ValueError:
        return None


def warn_of_training_images(name: str, images: Sequence[Selection], config: RunConfig) -> None:
    """Warn if images have the same content as some that a run's network was trained on.

    Args:
        name: name or folder of the images.
        images: the images.
        config: the run's settings.

    Warns:
        UserWarning: there are such images; the message has their number and an example. Or the run's own data
            set cannot be read any more, so that this was not checked.
    """
    found = _copies(name, images, config, ["train"])
    if found:
        warnings.warn(f"{found} as images that the network was trained on", stacklevel=3)


def warn_of_own_images(name: str, images: Sequence[Selection], config: RunConfig) -> None:
    """Warn if out-of-distribution images have the same content as some of a run's own data set.

    Arguments and warnings are those of `warn_of_training_images`.
    """
    found = _copies(name, images, config, ["train", "validation", "test"])
    if found:
        warnings.warn(f"{found} as images of the run's own data set", stacklevel=3)


def _copies(name: str, images: Sequence[Selection], config: RunConfig, splits: Sequence[SplitName]) -> str:
    """Say how many images have the same content as those of some splits of a run; empty if none has."""
    recorded = config.data.data
    if recorded != "digits" and is_named(recorded) and full_name(name) != recorded:
        return ""  # no reason to download it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its splits
            splits_of_run = find_splits(
                recorded,
                validation=config.data.validation,
                seed=config.fission.seed,
                limit_per_class=config.data.limit_per_class,
            )
    except (OSError, ValueError) as error:  # it has moved or changed
        reason = f"as the run's own data set cannot be read ({first_line(error)})"
        warnings.warn(
            f"whether images of {Path(name).name} are copies of the run's own was not checked, {reason}",
            stacklevel=4,
        )
        return ""
    number, example = count_copies(
        images, [splits_of_run[split] for split in splits if split in splits_of_run], str(Path(name))
    )
    if not number:
        return ""
    of_all = f"{number:,} of {count_noun(sum(len(part.rows) for part in images), 'image')}"
    return f"{of_all} of {Path(name).name} (such as {example}) have the same content"
