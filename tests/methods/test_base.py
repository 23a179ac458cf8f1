"""A run by another method than fission: trained, saved, loaded and evaluated as any other."""

import json

import pytest
import torch

from netfission.cli import main
from netfission.methods.deep_ensemble import DeepEnsemble
from netfission.runs.evaluate import evaluate
from netfission.runs.folder import RunFolder
from netfission.runs.train import train
from netfission.utils.checksums import parse_json

FLAGS = [
    "--data",
    "digits",
    "--limit_per_class",
    "5",
    "--model",
    "wrn-10-1",
    "--epochs",
    "1",
    "--batch_size",
    "25",
]


@pytest.fixture(scope="module")
def ensemble_run(tmp_path_factory, settings_of):
    path = tmp_path_factory.mktemp("runs") / "deep"
    config = settings_of(method="deep-ensemble", epochs=1, limit_per_class=5, batch_size=25, sparsity=0.3)
    train(config, path, progress=False)
    return RunFolder(path)


def test_a_baseline_is_saved_loaded_and_evaluated(ensemble_run):
    network, spec = ensemble_run.load_network()
    assert isinstance(network, DeepEnsemble)
    assert spec.method["method"] == "deep-ensemble"
    assert network(torch.rand(2, *spec.shape)).shape == (2, 2, 10)
    before = ensemble_run.evaluation.read_text("utf-8")
    evaluation = evaluate(ensemble_run, ensemble_run.load_config())
    expected = parse_json(before)
    assert expected.pop("weights") == ensemble_run.weights_sha256()
    assert json.loads(evaluation.to_json()) == expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "cost {run}",
            "must be a run whose network is divided into paths, such as one with method=fission, got method=",
        ),
        (
            "evaluate {run} --cascade",
            "must be a run with method=fission or multi-exit for a cascade, got method=deep",
        ),
        (
            "train --method deep-ensemble --exits 1",
            "exits must be at least 2 with method=deep-ensemble, got 1",
        ),
        (
            "train --method packed --grouping channels",
            "grouping must be 'weights' unless method=fission, got 'channels'",
        ),
        ("train --method snapshot", "epochs must be enough for 3 different snapshots, got 1 (2 steps)"),
        ("train --method deep-ensembl", "got 'deep-ensembl'; did you mean deep-ensemble or dst-ensemble"),
    ],
)
def test_what_a_baseline_cannot_do_ends_in_one_line(ensemble_run, command, message, capsys, tmp_path):
    request = command.format(run=ensemble_run.path).split()
    if request[0] == "train":
        request += [*FLAGS, "--out", str(tmp_path / "run")]
    assert main(request) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_distillation_is_left_out_where_the_method_has_none(ensemble_run, settings_of, tmp_path):
    asked = settings_of(
        method="deep-ensemble", epochs=1, limit_per_class=5, batch_size=25, sparsity=0.3,
        distillation_weight=0.0,
    )  # fmt: skip
    train(asked, tmp_path / "run", progress=False)
    assert RunFolder(tmp_path / "run").metrics.read_text("utf-8") == ensemble_run.metrics.read_text("utf-8")
    mean = asked.from_dict(asked.to_dict() | {"reduction": "mean"})
    train(mean, tmp_path / "mean", progress=False)
    assert RunFolder(tmp_path / "mean").metrics.read_text("utf-8") != ensemble_run.metrics.read_text("utf-8")
    distilled = asked.from_dict(asked.to_dict() | {"distillation_weight": 1.0})
    train(distilled, tmp_path / "distilled", progress=False)
    assert RunFolder(tmp_path / "distilled").metrics.read_text("utf-8") != ensemble_run.metrics.read_text(
        "utf-8"
    )
