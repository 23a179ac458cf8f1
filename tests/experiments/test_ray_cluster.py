import sys
from functools import partial

import pytest

from netfission.cli import main
from netfission.experiments.runner import run_missing


@pytest.mark.thorough
def test_a_local_cluster_does_the_runs_and_gets_the_same_figures(grid_of, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}  # one process imports what the runs need
    monkeypatch.setattr(ray, "init", partial(ray.init, **small))
    cells = grid_of("single", "treenet").cells()
    alone = run_missing(cells, tmp_path / "alone")
    distributed = run_missing(cells, tmp_path / "cluster", ray="local")
    for one, other in zip(alone, distributed, strict=True):
        assert one.contender == other.contender
        nll, its_nll = (run.read_evaluation().ensemble["nll"] for run in (one, other))
        assert nll == pytest.approx(its_nll, rel=1e-3)
    assert run_missing(cells, tmp_path / "cluster") == distributed


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "127.0.0.1:99999999"])
def test_an_address_that_does_not_answer_is_refused_in_one_line(address, tmp_path, capsys):
    pytest.importorskip("ray")
    request = "compare --data digits --model wrn-10-1 --methods [single] --epochs 1"
    assert main([*request.split(), "--ray", address, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--ray must be the address of a Ray cluster (auto, local, HOST:PORT or ray://HOST:PORT)" in error
    assert f"got no answer at {address}" in error
    assert not (tmp_path / "out" / "runs").exists()


def test_without_ray_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    request = "compare --data digits --model wrn-10-1 --methods [single] --epochs 1 --ray local"
    assert main([*request.split(), "--out", str(tmp_path / "out")]) == 2
    hint = "install it by pip install 'netfission[ray]'"
    assert capsys.readouterr().err.splitlines()[-1] == f"netfission: a Ray cluster needs ray; {hint}"
    assert not (tmp_path / "out" / "runs").exists()
