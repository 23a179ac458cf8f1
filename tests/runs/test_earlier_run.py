"""The folder of a run that version 0.1.0 wrote: later versions use it as their own."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from netfission.cli import main
from netfission.runs.folder import RunFolder

RUN = Path(__file__).parents[1] / "earlier_run"  # never written anew


@pytest.mark.filterwarnings("ignore:the run began with")  # other threads
def test_a_run_of_an_earlier_version_is_used_as_any_other(tmp_path, capsys):
    folder = RunFolder(Path(shutil.copytree(RUN, tmp_path / "run")))
    before = folder.load_evaluation()
    for read in (folder.load_data_summary, folder.load_metrics, folder.load_reliability):
        assert read()
    assert folder.load_environment()["versions"]["netfission"] == "0.1.0"
    assert folder.load_calibration().temperature == 0.3155880724722451
    flags = ["--config", str(folder.config), "--out", str(folder.path), "--resume"]
    assert main(["train", *flags]) == 0, capsys.readouterr().err  # which evaluates it
    for name, value in before.ensemble.items():
        assert folder.load_evaluation().ensemble[name] == pytest.approx(value, abs=0.01), (
            name
        )  # of another processor
    Image.linear_gradient("L").resize((8, 8)).save(tmp_path / "image.png")
    assert main(["predict", str(folder.path), str(tmp_path / "image.png")]) == 0
