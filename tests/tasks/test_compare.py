"""Comparisons of networks that learn other things than the class of an image."""

import shutil

import pytest
from matplotlib.figure import Figure

from netfission.experiments.compare import compare, timed_images
from netfission.experiments.grid import Grid
from netfission.experiments.records import Record, run_folder
from netfission.experiments.results import Comparison
from netfission.tasks import TASKS, find_task, task_kind
from netfission.utils.checksums import parse_json
from netfission.utils.typed import typed

AVERAGED = {"multilabel": "logits", "regression": "Gaussians", "segmentation": "logits"}
TITLES = {
    "multilabel": ["mAP %", "F1 %", "NLL", "ECE %"],
    "regression": ["MAE", "RMSE", "NLL", "CRPS"],
    "segmentation": ["mIoU %", "accuracy %", "NLL", "ECE %", "AUROC of errors %", "AURC %"],
}


@pytest.fixture
def grid_for(settings_for):
    def make(task, contenders, starts=(), **changes):
        common = settings_for(task, **changes).to_dict()
        return Grid(contenders, range(1), common, next(iter(contenders)), starts=dict(starts))

    return make


@pytest.fixture
def drawn(monkeypatch):
    """The measures that are drawn, each time that a comparison is.

    Networks are timed on two images, and not deployed, which takes long.
    """
    monkeypatch.setattr("netfission.experiments.compare.LARGEST_BATCH", 2)
    monkeypatch.setattr("netfission.experiments.costs.deploy", lambda network, _images: network)
    found = []
    monkeypatch.setattr(
        "netfission.experiments.plots.plot_against_cost",
        lambda _title, columns, *_: found.append(list(columns)) or Figure((1, 1)),
    )
    return found


@pytest.mark.parametrize("task", AVERAGED)
def test_a_comparison_shows_the_measures_of_the_task(task, grid_for, run_of, tmp_path, drawn):
    grid = grid_for(task, {"fission": {}})
    shutil.copytree(run_of(task), run_folder(*grid.cells(), tmp_path).path)  # trained already
    comparison = compare(grid, tmp_path, rounds=1)
    assert comparison.task == task
    assert comparison.averages == {"fission": AVERAGED[task]}
    assert typed(Comparison, parse_json((tmp_path / "comparison.json").read_text("utf-8"))) == comparison
    (record,) = (tmp_path / "records").iterdir()
    evaluation = typed(Record, parse_json(record.read_text("utf-8"))).read_evaluation()
    measures = {**evaluation.uncertainty, **evaluation.ensemble}
    for name in task_kind(task).columns:
        assert comparison.metrics["fission"][name].values == {0: measures[name]}
    differences, _, times = comparison.table().split("\n\n")[2:5]
    assert [title for title in TITLES[task] if title in differences] == TITLES[task]
    assert "inference, batch 2" in times
    assert task_kind(task).remark in comparison.table()
    assert drawn == [[task_kind(task).headline, "nll"]]


def test_a_deep_ensemble_and_a_longer_training_of_maps_are_compared(grid_for, tmp_path, drawn):
    contenders = {
        "single": {"exits": 1, "grouping": "weights"},
        "longer": {"exits": 1, "grouping": "weights"},
        "deep-ensemble": {"method": "deep-ensemble", "grouping": "weights"},
    }
    grid = grid_for("segmentation", contenders, {"longer": "single"}, epochs=1, validation=0.0, batch_size=40)
    comparison = compare(grid, tmp_path, rounds=1)
    assert comparison.averages == {"single": "–", "longer": "–", "deep-ensemble": "probabilities"}
    row = comparison.costs.contenders["deep-ensemble"], comparison.costs.single
    assert row[0].size.macs_dense == 2 * row[1].size.macs_dense
    assert row[0].training_macs == 2 * row[1].training_macs
    started = run_folder(grid.cell("longer", 0), tmp_path).load_config()
    assert started.model.weights == str(run_folder(grid.cell("single", 0), tmp_path).path)


@pytest.mark.parametrize(
    ("task", "contenders", "changes", "message"),
    [
        (
            "segmentation",
            {"single": {"exits": 1}, "packed": {"method": "packed"}},
            {},
            "^contender packed: method must be .* with task=segmentation, got 'packed'$",
        ),
        (
            "regression",
            {"single": {"exits": 1}, "mimo": {"method": "mimo"}},
            {},
            "^contender mimo: method must be .* with task=regression, got 'mimo'$",
        ),
        ("regression", {"fission": {}}, {"mix": "cutmix"}, "^mix must be 'none' with task=regression"),
        (
            "regression",
            {"fission": {}, "other": {"task": "multilabel"}},
            {},
            "^contender other: task must be 'regression', the task of all contenders, got 'multilabel'$",
        ),
    ],
)
def test_what_a_task_does_not_have_is_refused_by_name(task, contenders, changes, message, grid_for, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(grid_for(task, contenders, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", TASKS)
def test_a_task_compares_its_headline_and_its_likelihood(task):
    columns = task_kind(task).columns
    assert next(iter(columns)) == task_kind(task).headline
    assert {"nll", "disagreement"} <= columns.keys()
    assert any(column.higher_is_better for column in columns.values()) == (task != "regression")


def test_networks_of_maps_are_timed_on_fewer_images():
    names = ["a", "b"]
    assert len(timed_images(find_task("classification", names), (3, 180, 240))) == 128
    assert len(timed_images(find_task("segmentation", names), (3, 180, 240))) == 6
    assert len(timed_images(find_task("segmentation", names), (1, 1024, 1024))) == 2
