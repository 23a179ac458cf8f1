"""What README says holds: its Python runs, its rows are those drawn from the records, and its flags exist."""

import re
from pathlib import Path

import pytest
import torch

from netfission.config import FissionConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_is_short_and_starts_with_the_two_commands() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    first_screen = lines[:30]
    assert any(line.startswith("make demo") for line in first_screen)
    assert any(line.startswith("make test") for line in first_screen)


def test_its_python_runs() -> None:
    scope: dict[str, object] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), scope)
    logits, probabilities, uncertainty = (scope[name] for name in ("logits", "probabilities", "uncertainty"))
    assert isinstance(logits, torch.Tensor) and logits.shape == (32, 3, 10)
    assert isinstance(probabilities, torch.Tensor) and isinstance(uncertainty, torch.Tensor)
    assert torch.allclose(probabilities.sum(1), torch.ones(32))
    assert torch.allclose(probabilities, logits.mean(1).softmax(1))
    assert (uncertainty >= 0).all()


def test_its_results_are_rows_of_the_table_drawn_from_the_records() -> None:
    drawn = (ROOT / "results" / "figure3-laptop" / "comparison.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in README.splitlines() if " ± " in line and line.startswith("| ")]
    assert len(rows) == 6
    assert set(rows) <= set(drawn)
    head = next(line for line in README.splitlines() if "accuracy %" in line)
    assert head in drawn


def test_every_file_it_links_to_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", list(FissionConfig.__dataclass_fields__))
def test_every_setting_of_fission_is_explained(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "how-to" / "own-model.md").read_text(encoding="utf-8")


def test_every_flag_shown_exists() -> None:
    from netfission.cli import command_parser

    shown = re.findall(r"^netfission train (.*?)(?:\s{2,}#.*)?$", README, re.MULTILINE)
    assert shown
    for command in shown:
        command_parser("train").parse_args(command.split())
