import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from netfission.report import write_report
from netfission.report.style import render_svg


@pytest.fixture(scope="session")
def reported(finished_run, tmp_path_factory) -> Path:
    """A copy of a finished run with its report; not to be changed."""
    run = tmp_path_factory.mktemp("reported") / "first <run> & $1"
    shutil.copytree(finished_run, run)
    write_report([run])
    return run


@pytest.fixture
def blank_figures(monkeypatch) -> None:
    """Pages have figures without content, for tests that look at none: drawing takes most of their time."""
    blank = render_svg(lambda: Figure((1, 1)))
    monkeypatch.setattr("netfission.report.plots.render_svg", lambda draw: blank)


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of a finished run that a test may damage."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"
