"""Options of the commands whose answers come with sets, bounds and marks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from netfission.cli.parser import Parser, flag_name
from netfission.config import DEFAULT_RISK

if TYPE_CHECKING:  # slow to import, and parsing needs none of it
    from netfission.tasks import Task


def add_answer_options(parser: Parser, group: Any = None) -> None:
    """Add the flags of `netfission.classifier.answer_settings.AnswerSettings`.

    Args:
        parser: of the command.
        group: what `add_argument_group` returned; default the parser's own options.
    """
    parser.add(
        "--risk",
        float | None,
        help="accepted share of wrong answers on the images of the calibration; above it the network "
        f"abstains (default: {DEFAULT_RISK} if the network is calibrated; with --delta and --coverage or "
        "--accept-false-alarms it never abstains)",
        group=group,
    )
    parser.add(
        "--delta",
        float | None,
        help="bound --risk, --coverage and --accept-false-alarms: probability that one does not hold, over "
        "the choice of the images of the calibration (default: the risk is that on those images, the other "
        "two are means)",
        group=group,
    )
    parser.add(
        "--coverage",
        float | None,
        help="write a set of classes that contains the true one, or of numbers an interval, for at least "
        "this share of the images (default: none)",
        group=group,
    )
    parser.add(
        "--score",
        Literal["lac", "aps", "raps"] | None,
        help="score by which classes enter a set: lac for small sets; aps or raps for sets that are larger "
        "if an image is difficult (default: lac)",
        group=group,
    )
    parser.add("--class-wise", True, help="keep to --coverage for the images of each class", group=group)
    parser.add(
        "--accept-false-alarms",
        float | None,
        help="mark images as out of distribution, and of images like those of the calibration at most this "
        "share (default: no marks)",
        group=group,
    )
    parser.add(
        "--detector",
        Literal["energy", "entropy", "maximum-probability", "mutual-information"] | None,
        help="score by which p-values and marks tell images out of distribution (default: energy)",
        group=group,
    )


ANSWER_OPTIONS = ("risk", "delta", "coverage", "score", "class_wise", "accept_false_alarms", "detector")


def answer_options(settings: Any) -> dict[str, Any]:
    """Return the values of the flags that `add_answer_options` adds."""
    return {name: getattr(settings, name) for name in ANSWER_OPTIONS}


def check_options(task: Task, given: Mapping[str, Any]) -> None:
    """Raise ValueError if an option is given that has no meaning for a task.

    Args:
        task: of a run.
        given: option → its value.
    """
    task.check_options(given, flag_name)


def given_options(settings: Any) -> dict[str, Any]:
    """Return those of `answer_options` that were asked for, 0 among them.

    Example:
        >>> from argparse import Namespace
        >>> given_options(Namespace(**dict.fromkeys(ANSWER_OPTIONS) | {"risk": 0.0, "class_wise": False}))
        {'risk': 0.0}
    """
    return {
        name: value
        for name, value in answer_options(settings).items()
        if value is not None and value is not False
    }
