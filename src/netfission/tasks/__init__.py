"""What a network learns from an image: one class, several labels, or numbers. One file per task."""

from netfission.tasks.base import Task
from netfission.tasks.registry import TASKS, find_task, task_kind

__all__ = ["TASKS", "Task", "find_task", "task_kind"]
