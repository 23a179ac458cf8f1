"""Packages import only those below them, without circles, and inference imports no trainer."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[1]
TRAINERS = {"lightning", "matplotlib", "pytorch_lightning", "tensorboard"}


def test_the_contracts_of_pyproject_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert lint_imports(cache_dir=None, no_cache=True) == EXIT_STATUS_SUCCESS


@pytest.mark.parametrize(
    "module", ["netfission.classifier", "netfission.inference", "netfission.evaluation.cascade"]
)
def test_inference_and_evaluation_load_neither_a_trainer_nor_plots(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({TRAINERS!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
