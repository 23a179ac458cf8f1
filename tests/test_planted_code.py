"""No command runs code that a file holds: each file that one opens is replaced by a pickle that would."""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import netfission
from netfission.cli import main
from netfission.experiments.grid import Grid
from netfission.experiments.records import run_folder
from netfission.experiments.runner import run_missing
from netfission.models import create_model
from netfission.runs.folder import RunFolder
from netfission.runs.train import train
from netfission.utils.outputs import ENVIRONMENT_MARK


class Payload:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    """What a payload makes; it works, and has not run when the test ends."""
    mark = tmp_path / "executed"
    for content in (pickle.dumps(Payload(mark), 2), archive(mark)):
        torch.load(io.BytesIO(content), weights_only=False) if content[:2] == b"PK" else pickle.loads(content)
        mark.rmdir()
    yield mark
    assert not mark.exists()


def archive(mark: Path) -> bytes:
    """A file of PyTorch with a payload; its checksums are right."""
    content = io.BytesIO()
    torch.save({"state_dict": Payload(mark), "epoch": 0}, content)
    return content.getvalue()


def yaml(mark: Path) -> bytes:
    return f"seed: !!python/object/apply:os.mkdir ['{mark}']\n".encode()


READERS = {
    "config.yaml": ["load_config", "load_environment"],
    "config.json": ["load_spec"],
    "model.safetensors": ["load_network"],
    "evaluation.json": ["load_evaluation"],
    "calibration.json": ["load_calibration"],
    "reliability.json": ["load_reliability"],
    "data.json": ["load_data_summary"],
    "weights.json": ["load_weights_report"],
    "budget.json": ["load_budget"],
    "metrics.csv": ["load_metrics"],
    "cascade.json": ["load_cascade"],
    "ood.json": ["load_out_of_distribution"],
    "corruptions.json": ["load_corruptions"],
    "gain.json": ["load_gain", "load_target_gain"],
    "evaluation-windows.json": ["load_window_evaluation"],
}


@pytest.mark.parametrize("name", READERS)
def test_no_file_of_a_run_is_unpickled(name, finished_run, tmp_path, mark):
    run = shutil.copytree(finished_run, tmp_path / "run")
    for content in (pickle.dumps(Payload(mark), 2), archive(mark), yaml(mark)):
        (run / name).write_bytes(content)
        for reader in READERS[name]:
            with contextlib.suppress(ValueError):
                getattr(RunFolder(run), reader)()
            assert not mark.exists(), reader


def test_settings_are_read_without_running_code(tmp_path, mark, capsys):
    file = tmp_path / "settings.yaml"
    file.write_bytes(yaml(mark))
    assert main(["train", "--config", str(file)]) == 2
    assert main(["train", "--seed", yaml(mark).decode().removeprefix("seed: ").rstrip()]) == 2
    run = RunFolder(tmp_path)
    run.config.write_text(f"{ENVIRONMENT_MARK}\n# {yaml(mark).decode()}")
    with pytest.raises(ValueError, match=r"config\.yaml must be the settings of a run, got damaged comments"):
        run.load_environment()


# What runs code of a file, or may.
UNSAFE = re.compile(
    r"weights_only=False|allow_pickle=True|trust_remote_code=True|unsafe_load|full_load|yaml\.load\(|"
    r"pickle\.loads?\(|\b(?:torch|np)\.load\((?!.*(?:weights_only=True|allow_pickle=False))"
)


def test_no_reader_that_may_run_code_is_called():
    for file in Path(netfission.__file__).parent.rglob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if UNSAFE.search(line) and ">>>" not in line] == [], file


def test_every_reader_is_tried():
    readers = {name for name in dir(RunFolder) if name.startswith("load_")}
    # As `load_network`, `load_evaluation` and `load_calibration`.
    others = {"load_fission", "load_evaluation_of", "load_target_evaluation", "load_calibration_of"}
    others |= {"load_target_evaluation_of", "load_figures"}
    assert readers - others == {reader for names in READERS.values() for reader in names}


@pytest.mark.parametrize("name", ["config.yaml", "config.json", "model.safetensors", "image.png"])
def test_no_command_runs_code_of_a_run(name, finished_run, tmp_path, mark, capsys):
    run, image = shutil.copytree(finished_run, tmp_path / "run"), tmp_path / "image.png"
    Image.new("L", (8, 8)).save(image)
    (image if name == "image.png" else run / name).write_bytes(archive(mark))
    statuses = [main(["predict", str(run), str(image)])]
    if name != "image.png":
        statuses += [main(["evaluate", str(run)]), main(["report", str(run)])]
        flags = [
            "--config",
            str(run / "config.yaml"),
            "--out",
            str(tmp_path / "other"),
            "--weights",
            str(run),
        ]
        statuses.append(main(["train", *flags]))
    assert set(statuses) <= {1, 2}
    assert all(line.startswith("netfission: ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("name", ["last.ckpt", "previous.ckpt"])
def test_a_run_is_resumed_without_running_code(name, finished_run, tmp_path, mark, settings_of):
    run = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    run.weights.unlink()
    run.checkpoint.unlink()
    (run.path / "checkpoints" / name).write_bytes(archive(mark))
    with pytest.raises(ValueError, match=rf"{name} must be a checkpoint of tensors and plain data, got"):
        train(settings_of(), run.path, resume=True, progress=False)


def test_a_comparison_resumes_without_running_code(tmp_path, mark, capsys):
    """The run of a grid that was killed is gone on with unasked."""
    settings = {"data": "digits", "limit_per_class": 5, "model": "wrn-10-1", "epochs": 1}
    grid = Grid({"single": {"exits": 1}}, [0], settings, "single")
    (cell,) = grid.cells()
    folder = run_folder(cell, tmp_path / "grid")
    folder.claim(cell.config, resume=False)
    folder.checkpoint.parent.mkdir()
    folder.checkpoint.write_bytes(archive(mark))
    (record,) = run_missing([cell], tmp_path / "grid")
    assert "last.ckpt must be a checkpoint of tensors and plain data" in record.error


def test_published_weights_in_the_cache_are_read_without_running_code(tmp_path, mark, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    file.parent.mkdir()
    for content in (archive(mark), pickle.dumps(Payload(mark), 2), b"damaged"):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"pretrained weights must be those of .*, or one that would run"
        ):
            create_model("torchvision/squeezenet1_1", 10, pretrained=True)


def test_weights_of_your_own_are_read_without_running_code(tmp_path, mark):
    for content in (archive(mark), pickle.dumps(Payload(mark), 2)):
        (tmp_path / "net.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"net\.pt must be"):
            create_model("wrn-10-1", 10, weights=tmp_path / "net.pt")


def test_a_model_of_hugging_face_runs_no_code_of_its_folder(tmp_path, mark):
    pytest.importorskip("transformers")
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    (tmp_path / "code.py").write_text(code)
    auto = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    with pytest.raises(ValueError, match="model must be hf/NAME"):
        create_model(f"hf/{tmp_path}", 10)
    settings = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes = {"intermediate_size": 8, "image_size": 16, "patch_size": 8, "num_labels": 3}
    auto = {"auto_map": {"AutoModelForImageClassification": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(settings | sizes | auto | {"architectures": []}))
    create_model(f"hf/{tmp_path}", 10)  # by the library's own code
    (tmp_path / "pytorch_model.bin").write_bytes(archive(mark))
    with pytest.raises(ValueError, match="model must be hf/NAME"):
        create_model(f"hf/{tmp_path}", 10, pretrained=True)
