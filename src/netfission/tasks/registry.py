"""All tasks by name. To add one, write a file with a `Task` and enter it in `TASKS`."""

from collections.abc import Mapping, Sequence
from importlib import import_module

from netfission.tasks.base import Task
from netfission.utils.errors import check_choice, invalid

# Name → `file:class` in this package; a file is imported when its task is first looked up.
TASKS: Mapping[str, str] = {
    "classification": "classification:Classification",
    "multilabel": "multilabel:Multilabel",
    "regression": "regression:Regression",
    "segmentation": "segmentation:Segmentation",
}
_FOR_ALL = "train, finetune, evaluate, predict, calibrate, report, serve, export, cost and compare support it"


def task_kind(name: str) -> type[Task]:
    """Return the class of a task.

    Raises:
        ValueError: the task does not exist.

    Example:
        >>> task_kind("multilabel").targets.noun
        'labels'
        >>> task_kind("multilable")
        Traceback (most recent call last):
        ValueError: task must be one of classification, multilabel, regression, segmentation, got \
'multilable'; did you mean multilabel?
    """
    file, _, kind = TASKS[check_choice("task", name, TASKS)].partition(":")
    found: type[Task] = getattr(import_module(f"netfission.tasks.{file}"), kind)
    return found


def find_task(name: str, names: Sequence[str], scale: Mapping[str, list[float]] | None = None) -> Task:
    """Create the task of a network.

    Args:
        name: of the task.
        names: of its classes, labels or numbers, in the order of the targets.
        scale: what `Task.scale` was; default none.

    Raises:
        ValueError: the task does not exist.

    Example:
        >>> find_task("regression", ["road"], {"mean": [0.3], "std": [0.1]}).outputs
        2
    """
    return task_kind(name)(names, scale)


def other_task(argument: str, task: str, command: str) -> ValueError:
    """Return the error for something that cannot be done yet with a task.

    Example:
        >>> print(other_task("runs/first", "regression", "this"))
        runs/first must be of task=classification for this, got task=regression; train, finetune, \
evaluate, predict, calibrate, report, serve, export, cost and compare support it
    """
    expected = f"of task={next(iter(TASKS))} for {command}"
    return invalid(argument, expected, found=f"task={task}", hint=_FOR_ALL)
