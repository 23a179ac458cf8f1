"""What README says holds: its Python runs, its rows are those drawn from the records, and its flags exist."""

import itertools
import json
import re
import statistics
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
    head = next(line for line in README.splitlines() if "averages" in line)
    assert head in drawn
    lines = README.splitlines()
    rows = list(itertools.takewhile(lambda line: line.startswith("| "), lines[lines.index(head) + 2 :]))
    assert len(rows) == 6
    assert set(rows) <= set(drawn)


def full_size_cells(kind: str, rule: str) -> list[str]:
    """n, accuracy, NLL and ECE of one kind of network as its records have them."""
    file = ROOT / "results" / "full-size" / "resnet18_cifar100.json"
    found = [row[rule] for row in json.loads(file.read_text("utf-8"))["rows"] if row["kind"] == kind]
    cells = [str(len(found))]
    for key, digits in (("accuracy", 2), ("nll", 3), ("ece", 2)):
        values = [row[key] for row in found]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
    return cells


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
@pytest.mark.parametrize(
    ("row", "kind", "rule"),
    [
        ("single", "single", "mean_logits"),
        ("deep-ensemble (of the three)", "deep ensemble of 3", "mean_probabilities"),
        ("fission-channels", "channels", "mean_logits"),
        ("fission-weights, SNIP 0.5", "weights-snip", "mean_logits"),
        ("multi-exit", "multi-exit", "mean_logits"),
        ("multi-exit, both after `layer3`", "late-linear", "mean_logits"),
    ],
)
def test_rows_at_full_size_are_those_of_the_records(page: str, row: str, kind: str, rule: str) -> None:
    cells = " | ".join([row, *full_size_cells(kind, rule)])
    assert f"| {cells} |" in (ROOT / page).read_text(encoding="utf-8")


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
