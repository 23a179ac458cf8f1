import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save

from netfission.cli import main
from netfission.config import RunConfig
from netfission.data import load_data
from netfission.runs.evaluate import evaluate
from netfission.runs.folder import RunFolder
from netfission.runs.train import train
from netfission.utils.checksums import parse_json, stamp_json
from netfission.utils.files import write_json


@pytest.fixture
def copied(finished_run, tmp_path) -> RunFolder:
    return RunFolder(shutil.copytree(finished_run, tmp_path / "run"))


def test_a_run_folder_is_complete(finished_run):
    folder = RunFolder(finished_run)
    assert {path.name for path in finished_run.iterdir()} >= {
        "config.yaml",
        "metrics.csv",
        "checkpoints",
        "model.safetensors",
        "config.json",
        "evaluation.json",
        "tensorboard",
    }
    written = yaml.safe_load(folder.config.read_text("utf-8"))
    assert written["seed"] == 3
    assert f"#   torch: {torch.__version__.split('+')[0]}" in folder.config.read_text("utf-8")
    rows = folder.metrics.read_text("utf-8").splitlines()
    assert len(rows) == 3
    assert rows[0].startswith("epoch,step,train/exit0,train/exit1,train/ensemble")
    assert not list(finished_run.rglob("*.tmp*"))


def test_a_used_folder_is_not_overwritten(copied):
    before = copied.weights.read_bytes()
    with pytest.raises(
        ValueError,
        match=r"out must be a new or empty folder, got .*run, which is not empty; resume the run",
    ):
        copied.claim(copied.load_config(), resume=False)
    assert copied.weights.read_bytes() == before


def test_a_folder_that_a_killed_run_has_just_made_is_free(copied, tmp_path):
    folder = RunFolder(tmp_path / "new")
    folder.path.mkdir()
    (folder.path / f".config.yaml.{2**22 + 1}-0123abcd.tmp").touch()
    folder.claim(copied.load_config(), resume=False)
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]


def test_resuming_with_other_settings_is_refused(copied):
    config = type(copied.load_config()).from_dict(copied.load_config().to_dict() | {"epochs": 9})
    with pytest.raises(ValueError, match=r"epochs must be 2, as in .*config\.yaml, got 9"):
        copied.claim(config, resume=True)


@pytest.fixture
def begun(tmp_path):
    """A run that has read its photographs, and its settings."""
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(8):
            file = tmp_path / "pets" / name / f"{number}.png"
            Image.new("RGB", (8, 8), (number, ord(name[0]), 0)).save(file)
    config = RunConfig.from_dict({"data": str(tmp_path / "pets"), "validation": 0.2})
    folder = RunFolder(tmp_path / "run")
    folder.claim(config, resume=False)
    write_json(folder.data_summary, load_data(config.data.data, validation=0.2).summary.to_json())
    return folder, config


def with_data(config: RunConfig, place: Path) -> RunConfig:
    return replace(config, data=replace(config.data, data=str(place)))


@pytest.mark.parametrize("is_there", [True, False])
def test_a_run_goes_on_where_its_data_are_now_if_they_are_the_same(is_there, begun, tmp_path):
    (folder, config), now = begun, tmp_path / "now"
    shutil.copytree(tmp_path / "pets", now)
    if not is_there:
        shutil.rmtree(tmp_path / "pets")
    folder.claim(with_data(config, now), resume=True)
    (now / "cat" / "0.png").rename(now / "cat" / "new.png")
    why = "files in the two differ in names or sizes" if is_there else "its training images are not those in "
    with pytest.raises(ValueError, match=rf"^data must be '.*pets', as in .*, got '.*now'; {why}"):
        folder.claim(with_data(config, now), resume=True)
    with pytest.raises(ValueError, match=r"; a run resumes with the settings it began with$"):
        folder.claim(with_data(config, Path("digits")), resume=True)
    folder.data_summary.unlink()
    if not is_there:
        folder.claim(with_data(config, now), resume=True)  # nothing was trained yet


@pytest.mark.parametrize("is_there", [True, False])
def test_a_place_without_data_is_named_so(is_there, begun, tmp_path):
    folder, config = begun
    if not is_there:
        shutil.rmtree(tmp_path / "pets")
    message = r"^data must be '.*pets', as in .*, got '.*typo'; there is no folder or table at that place$"
    with pytest.raises(ValueError, match=message):
        folder.claim(with_data(config, tmp_path / "typo"), resume=True)


def test_a_run_goes_on_with_other_workers(begun):
    folder, config = begun
    folder.claim(replace(config, data=replace(config.data, workers=5)), resume=True)


def test_weights_of_another_content_are_not_those_that_moved(begun, tmp_path):
    folder, config = begun
    config = replace(config, model=replace(config.model, weights="net.pt"))
    with pytest.raises(ValueError, match=r"^weights must be None.*; a run resumes with the settings it"):
        folder.claim(config, resume=True)
    other = RunFolder(tmp_path / "other")
    other.claim(config, resume=False)
    moved = replace(config, model=replace(config.model, weights="other.pt"))
    with pytest.raises(ValueError, match="; what a run begins with may move if its name and content"):
        other.claim(moved, resume=True)


def test_the_ensemble_of_a_fine_tuning_starts_from_the_single_network_where_that_is_now(tmp_path):
    folder = RunFolder(tmp_path / "run")
    config = RunConfig.from_dict({"weights": str(tmp_path / "before" / "single")})
    folder.claim(config, resume=False)
    assert folder.load_config() == config
    folder.single.path.mkdir()
    assert folder.load_config().model.weights == str(folder.single.path)
    (tmp_path / "before" / "single").mkdir(parents=True)
    assert folder.load_config() == config  # it is a copy


def test_resuming_what_was_never_begun_is_refused(copied, tmp_path):
    told = "^resume must be given for the folder of a run, got .*{}; leave it out to start the run$"
    with pytest.raises(ValueError, match=told.format("none, which does not exist")):
        RunFolder(tmp_path / "none").claim(copied.load_config(), resume=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=told.format("empty, which holds no run")):
        RunFolder(tmp_path / "empty").claim(copied.load_config(), resume=True)


def test_a_folder_whose_name_is_not_utf8_is_refused(copied, tmp_path):
    path = tmp_path / os.fsdecode(b"r\xf9n")
    with pytest.raises(
        ValueError, match=r"^out must be a path of UTF-8 text, which TensorBoard needs, got .*/r"
    ):
        RunFolder(path).claim(copied.load_config(), resume=False)
    assert not path.exists()


def test_an_unwritable_folder_is_refused(copied, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"out=.*file/run cannot be written \(Not a directory\)"):
        RunFolder(tmp_path / "file" / "run").claim(copied.load_config(), resume=False)


def test_what_is_no_regular_file_is_not_taken_for_none(copied):
    for file, read in {
        copied.metrics: copied.load_metrics,
        copied.calibration: copied.load_calibration,
        copied.evaluation: copied.load_evaluation,
        copied.checkpoint: copied.resumable,
        copied.weights: copied.load_network,
        copied.spec: copied.load_spec,
        copied.config: copied.load_config,
    }.items():
        file.unlink(missing_ok=True)
        file.mkdir()
        with pytest.raises(ValueError, match=rf"{file} must be a regular file, got a folder$"):
            read()


def test_damaged_files_are_named(copied):
    original = copied.weights.read_bytes()
    for damaged in (b"", b"no tensors here"):
        copied.weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors must be the weights of .*json, got others"):
            copied.load_network()
    for damaged in (original[: len(original) // 2], original[:-1] + bytes([original[-1] ^ 4])):
        copied.weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors must be as it was written, got other"):
            copied.load_network()
    copied.weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors must be the weights of a network, got no such"):
        copied.load_network()
    copied.spec.write_text("{not json")
    with pytest.raises(ValueError, match=r"config\.json must be a valid JSON file, got damaged content"):
        copied.load_network()
    copied.spec.write_text(json.dumps({"model": "wrn-10-1"}))
    with pytest.raises(ValueError, match=r"config\.json must be the description of a network, got damaged"):
        copied.load_network()
    text = copied.config.read_text("utf-8")
    copied.config.write_text(text.replace("seed: 3", "seed: 7"))
    with pytest.raises(ValueError, match=r"config\.yaml must be .*\(checksum must be that of the content"):
        copied.load_config()
    edited = [line for line in text.replace("seed: 3", "seed: 7").splitlines() if "checksum" not in line]
    copied.config.write_text("\n".join(edited))
    assert copied.load_config().fission.seed == 7
    copied.config.write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml must be a valid YAML file, got damaged content"):
        copied.load_config()
    copied.config.write_text("epochs: many")
    with pytest.raises(
        ValueError,
        match=r"config\.yaml must be the settings .*\(epochs must be an integer, got ",
    ):
        copied.load_config()


@pytest.mark.parametrize("name", ["config", "evaluation", "calibration", "reliability", "data"])
def test_a_digit_that_changed_is_found(copied, name):
    path = copied.path / f"{name}.json"
    content = path.read_bytes()
    place = max(content.rfind(digit) for digit in (b"1,", b"1\n", b"5,", b"5\n", b"8\n"))
    path.write_bytes(content[:place] + b"2" + content[place + 1 :])
    readers = {
        "config": copied.load_spec,
        "evaluation": copied.load_evaluation,
        "calibration": copied.load_calibration,
        "reliability": copied.load_reliability,
        "data": copied.load_data_summary,
    }
    with pytest.raises(ValueError, match=rf"{name}\.json must be a valid JSON file, .*\(checksum must"):
        readers[name]()


@pytest.mark.parametrize("name", ["evaluation", "reliability"])
def test_figures_of_another_network_are_refused(copied, name):
    """Those of an earlier version do not say of which they are."""
    file, load = getattr(copied, name), getattr(copied, f"load_{name}")
    figures = load()
    network, spec = copied.load_network()
    with torch.no_grad():
        next(network.parameters()).mul_(1.01)
    copied.save_network(network, spec)
    message = rf"{name}\.json must be of the network in model\.safetensors, got one of another network \("
    with pytest.raises(ValueError, match=message):
        load()
    damaged = bytearray(copied.weights.read_bytes())
    damaged[-1] ^= 1
    copied.weights.write_bytes(damaged)  # for which the figures are not to blame
    for read in (load, copied.load_calibration):
        with pytest.raises(ValueError, match=r"model\.safetensors must be as it was written"):
            read()
    file.write_text(figures.to_json())
    assert load() == figures


def test_figures_that_are_measured_beside_are_bound_to_the_network(copied, tmp_path, capsys):
    other = tmp_path / "other"
    for name in "73":
        (other / name).mkdir(parents=True)
        Image.new("L", (8, 8), int(name)).save(other / name / "a.png")
    again = [["--ood", "inverted"], ["--cascade"], ["--data", str(other)]]
    loads = [
        copied.load_out_of_distribution,
        copied.load_cascade,
        partial(copied.load_evaluation_of, str(other)),
    ]
    for flags, load in zip(again, loads, strict=True):
        assert main(["evaluate", str(copied.path), *flags]) == 0
        assert load() is not None
    assert main(["evaluate", str(copied.path), "--ood", "rotated"]) == 0
    network, spec = copied.load_network()
    with torch.no_grad():
        next(network.parameters()).mul_(1.01)
    copied.save_network(network, spec)
    copied.calibration.unlink()
    for flags, load in zip(again, loads, strict=True):
        with pytest.raises(
            ValueError, match=rf"of the network .* `netfission evaluate {flags[0]}` measures it"
        ):
            load()
        assert main(["evaluate", str(copied.path), *flags]) == 0
        assert load() is not None
    assert [entry.data for entry in copied.load_out_of_distribution()] == ["inverted"]


def test_weights_of_another_network_are_refused(copied):
    spec = parse_json(copied.spec.read_text("utf-8"))
    spec["fission"]["exits"] = 3
    copied.spec.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"model\.safetensors must be the weights of .*json, got others"):
        copied.load_network()


def test_a_description_of_another_network_is_refused(copied):
    """One that was edited has no checksum, and earlier versions wrote weights that tell of none."""
    own, weights = copied.spec.read_text("utf-8"), load_file(copied.weights)
    spec = parse_json(own)
    other = stamp_json(json.dumps(spec | {"mean": [0.9]}))
    copied.spec.write_text(other)
    message = r"model\.safetensors must be .*config\.json, got others \(written with another config\.json"
    with pytest.raises(ValueError, match=message):
        copied.load_network()
    copied.spec.write_text(json.dumps(spec | {"mean": [0.9]}))
    assert copied.load_network()[1].mean == [0.9]
    copied.spec.write_text(other)
    copied.weights.write_bytes(save(weights))
    assert copied.load_network()[1].mean == [0.9]


def test_the_network_comes_back_with_its_masks(finished_run):
    from netfission.surgery.masks import kept_masks

    network, spec = RunFolder(finished_run).load_network()
    assert spec.classes == [str(digit) for digit in range(10)]
    masks = kept_masks(network)
    prunable = sum(mask.numel() for mask in masks.values())
    assert 0 < sum(int(mask.sum()) for mask in masks.values()) < 0.7 * prunable
    for name, mask in masks.items():
        assert not network.get_parameter(name)[~mask].any()


def test_a_network_of_channel_groups_comes_back_with_its_widths(tmp_path, settings_of):
    """Widths hang on what pruning removed and are in no setting: they are read with the weights."""
    config = settings_of(grouping="channels", sparsity=0.5, criterion="magnitude", assignment="importance")
    evaluation = train(config, tmp_path / "run", progress=False)
    folder = RunFolder(tmp_path / "run")
    network, spec = folder.load_network()
    fresh = spec.build()
    assert {p.shape for p in fresh.parameters()} != {p.shape for p in network.parameters()}
    assert evaluate(folder, config) == evaluation
    assert train(config, folder.path, resume=True, progress=False) == evaluation


def test_weights_that_do_not_fit_one_another_are_refused(tmp_path, settings_of):
    train(settings_of(grouping="channels", sparsity=0.0, epochs=1), tmp_path / "run", progress=False)
    folder = RunFolder(tmp_path / "run")
    state = load_file(folder.weights)
    name = "paths.0.stages.2.block3.0.conv1.weight"
    folder.weights.write_bytes(save(state | {name: state[name][:-2].contiguous()}))
    with pytest.raises(ValueError, match=r"model\.safetensors must be the weights of .*json, got others"):
        folder.load_network()


def test_settings_of_other_methods_may_have_had_other_defaults(copied):
    spec = parse_json(copied.spec.read_text("utf-8"))
    spec["method"]["regrow_every"] = 1000
    copied.spec.write_text(json.dumps(spec))
    assert copied.load_network()[0].exits == 2
