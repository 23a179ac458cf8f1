import shutil
from pathlib import Path

import pytest

from netfission.report import write_report


@pytest.fixture(scope="session")
def reported(finished_run, tmp_path_factory) -> Path:
    """A copy of a finished run with its report; not to be changed."""
    run = tmp_path_factory.mktemp("reported") / "first <run> & $1"
    shutil.copytree(finished_run, run)
    write_report([run])
    return run


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of a finished run that a test may damage."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"
