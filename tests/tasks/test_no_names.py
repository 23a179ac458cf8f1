"""Nothing but the tasks' own files asks which task a network learned, by the syntax trees of all files."""

import ast
from pathlib import Path

import netfission
from netfission.tasks import TASKS

SOURCE = Path(netfission.__file__).parent


def asked_names(tree):
    """The names of tasks that an expression compares, matches or looks up."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Call):
            is_lookup = isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "startswith")
            parts = node.args if is_lookup else []
        else:
            continue
        for part in parts:
            for constant in ast.walk(part):
                if isinstance(constant, ast.Constant) and constant.value in TASKS:
                    yield constant.value


def test_the_search_finds_such_a_question():
    for question in (
        "if task == 'regression': pass",
        "x = task in ('multilabel', 'regression')",
        "match task:\n    case 'multilabel':\n        pass",
        "{'regression': 1}[task]",
    ):
        assert list(asked_names(ast.parse(question))), question


def test_no_file_outside_the_tasks_asks_for_a_task_by_name():
    asking = {
        str(path.relative_to(SOURCE)): names
        for path in sorted(SOURCE.rglob("*.py"))
        if path.parent.name != "tasks"
        and (names := sorted(set(asked_names(ast.parse(path.read_text("utf-8"))))))
    }
    assert asking == {}
