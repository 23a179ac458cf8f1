"""Tables under `results/` are those drawn from the records there, and the documentation shows them."""

import json
from pathlib import Path

import pytest

from netfission.experiments.compare import summarise
from netfission.experiments.costs import Costs
from netfission.experiments.grid_files import find_grid
from netfission.experiments.grids import named_grids
from netfission.experiments.records import Records
from netfission.utils.typed import typed

ROOT = Path(__file__).parents[2]
FOLDERS = [
    folder
    for name in named_grids()
    for scale in ("laptop", "paper")
    if (folder := ROOT / "results" / f"{name}-{scale}").is_dir()
]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_are_those_of_the_records(folder):
    name, _, scale = folder.name.rpartition("-")
    grid = find_grid(name).at(scale)
    cells, records = grid.cells(), Records(folder / "records")
    found = [records.find(cell) for cell in cells]
    assert len(list(records.path.iterdir())) == len(cells)
    costs = typed(Costs, json.loads((folder / "costs.json").read_text())["costs"])
    comparison = summarise(grid, cells, found, costs)
    assert comparison.table() + "\n" == (folder / "comparison.txt").read_text()
    assert comparison.markdown() + "\n" == (folder / "comparison.md").read_text()


def test_the_documentation_shows_the_table_of_methods_as_it_was_drawn():
    _, table = (ROOT / "results" / "figure3-laptop" / "comparison.md").read_text().split("\n\n")
    assert table in (ROOT / "docs" / "results.md").read_text()
