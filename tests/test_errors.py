"""Errors for users are made in one place, by one template."""

import ast
from pathlib import Path

import pytest

import netfission

PACKAGE = Path(netfission.__file__).parent
TEMPLATE = PACKAGE / "utils" / "errors.py"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != TEMPLATE)


def made_by_hand(tree: ast.AST) -> list[int]:
    """Lines that construct a `ValueError`, or raise the bare class."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    names = [call.func for call in calls] + raised
    return sorted(name.lineno for name in names if isinstance(name, ast.Name) and name.id == "ValueError")


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_no_value_error_is_made_by_hand(path: Path) -> None:
    lines = made_by_hand(ast.parse(path.read_text(encoding="utf-8")))
    assert not lines, f"{path.name}:{lines}: raise netfission.utils.errors.invalid(…) instead"


def test_a_value_error_made_by_hand_is_found() -> None:
    assert made_by_hand(ast.parse("raise ValueError(f'{1}')\nraise ValueError\nerror = ValueError()")) == [
        1,
        2,
        3,
    ]
