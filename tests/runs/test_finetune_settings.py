import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from netfission.config import ENSEMBLE_EPOCHS, FINETUNE_RECIPE, RECIPES, FissionConfig
from netfission.runs.finetune_settings import check_ensemble, plan_finetuning
from netfission.runs.folder import RunFolder

SINGLE = Path("run/single")
DIGITS = {"data": "digits", "model": "wrn-10-1", "pretrained": False}


def plan(**given):
    return plan_finetuning(DIGITS | given, SINGLE)


@pytest.mark.parametrize("recipe", [FINETUNE_RECIPE, "finetune"])
def test_both_networks_follow_the_recipe(recipe):
    planned = plan_finetuning(DIGITS, SINGLE, recipe=recipe)
    settings = dict(RECIPES[recipe])
    assert settings.items() <= planned.single.to_dict().items()
    assert settings.items() <= (planned.ensemble.to_dict() | {"epochs": settings["epochs"]}).items()
    assert planned.ensemble.training.epochs == ENSEMBLE_EPOCHS


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 64),  # 1,293 training images
        ({"validation": 0.5}, 64),
        ({"limit_per_class": 40}, 32),
        ({"limit_per_class": 8}, 8),
        ({"limit_per_class": 2}, 8),
        ({"limit_per_class": 2, "batch_size": 20}, 20),
    ],
)
def test_an_epoch_of_few_images_has_several_steps(given, expected):
    planned = plan(**given)
    assert planned.single.training.batch_size == planned.ensemble.training.batch_size == expected


def test_a_fine_tuning_goes_on_with_the_batch_size_that_it_began_with(tmp_path):
    given = DIGITS | {"limit_per_class": 8}
    single = RunFolder(tmp_path / "run").single.path
    begun = plan_finetuning(given | {"batch_size": 64}, single)
    assert plan_finetuning(given, single).single.training.batch_size == 8
    RunFolder(tmp_path / "run").claim(begun.ensemble, resume=False)
    assert plan_finetuning(given, single) == begun


def test_a_model_by_name_starts_from_published_weights_unless_others_are_named():
    given = {"data": "digits", "model": "resnet10t", "image_size": 32}
    single = plan_finetuning(given, SINGLE).single
    assert single.model.pretrained
    assert not plan_finetuning(given | {"weights": "net.pt"}, SINGLE).single.model.pretrained
    assert not plan_finetuning(given | {"pretrained": False}, SINGLE).single.model.pretrained


def test_the_ensembles_settings_are_not_the_single_networks():
    given = {"exits": 2, "temperature": 2.0, "parent_weight": 0.5, "ratio": [2.0, 1.0], "sparsity": 0.1}
    planned = plan(**given, learning_rate=0.01, flip=False)
    assert given.items() <= planned.ensemble.to_dict().items()
    single = planned.single.to_dict()
    assert (single["exits"], single["temperature"], single["ratio"], single["sparsity"]) == (
        1,
        3.0,
        None,
        0.0,
    )
    assert single["learning_rate"] == planned.ensemble.training.learning_rate == 0.01
    assert single["flip"] is planned.ensemble.data.flip is False


def test_only_exits_that_are_asked_for_divide_the_network():
    assert plan().ensemble.fission == FissionConfig(
        exits=1, grouping="channels", linear_exits=[2, 2], linear_weight=0.3, reconstruct=True
    )
    asked = (
        {"exits": 3},
        {"branch_after": [2, 2]},
        {"branch_after": "late"},
        {"ratio": [1.0, 1.0, 1.0]},
    )
    assert [plan(**settings).ensemble.fission.exits for settings in asked] == [3] * 4


def test_a_single_prediction_is_no_ensemble():
    message = r"^linear_exits must be one or more unless exits is 2 or more, got \[\]$"
    with pytest.raises(ValueError, match=message):
        plan(linear_exits=[])
    assert plan(linear_exits=[], exits=2).ensemble.fission.linear_exits == []


def test_exits_leave_late_unless_they_are_told_where():
    assert plan(exits=4).ensemble.fission.branch_after == [2, 2, 2]
    fission = plan(branch_after=[1, 2], linear_exits=[]).ensemble.fission
    assert (fission.branch_after, fission.linear_exits) == ([1, 2], [])


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ({"grouping": "weights"}, {"reconstruct": False, "branch_after": None}),
        ({"grouping": "copies", "exits": 3}, {"reconstruct": False}),
    ],
)
def test_defaults_without_effect_are_left_out(given, left_out):
    config = plan(**given).ensemble
    assert left_out.items() <= config.to_dict().items()


def test_images_have_the_size_that_the_model_is_made_for():
    given = {"data": "digits", "model": "resnet10t", "pretrained": False}
    planned = plan_finetuning(given, SINGLE)
    assert planned.single.data.image_size == planned.ensemble.data.image_size == 176
    assert plan_finetuning(given | {"image_size": 32}, SINGLE).ensemble.data.image_size == 32
    assert plan().single.data.image_size is None  # a model without such a size


def test_what_cannot_be_divided_is_refused_before_a_training():
    check_ensemble(plan(exits=3, sparsity=0.5, assignment="importance").ensemble)
    last_is_a_norm = plan(exits=3, stages=["block1", "block3", "bn"])
    with pytest.raises(ValueError, match="stages must be divisible by channels"):
        check_ensemble(last_is_a_norm.ensemble)


def test_a_network_that_is_finetuned_already_has_the_normalisation_that_it_was_trained_with(
    finished_run, tmp_path
):
    torch.save({}, tmp_path / "net.pt")
    data = str(_photographs(tmp_path / "photographs"))
    given = {"data": data, "model": "resnet10t", "validation": 0.25}
    planned = plan_finetuning(given, SINGLE, finetuned=str(tmp_path / "net.pt"))
    for data in (planned.single.data, planned.ensemble.data):
        assert (data.mean, data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (
        plan_finetuning(given | {"mean": [0.1] * 3}, SINGLE, finetuned="net.pt").single.data.mean == [0.1] * 3
    )
    trained = plan_finetuning(given | {"pretrained": False}, SINGLE).single.data
    assert trained.mean is None is trained.std

    spec = RunFolder(finished_run).load_spec()
    of_run = plan_finetuning({"data": "digits"}, SINGLE, finetuned=str(finished_run))
    assert of_run.single.model.model == spec.model == "wrn-10-1"
    assert (of_run.ensemble.data.mean, of_run.ensemble.data.std) == (spec.mean, spec.std)
    assert of_run.ensemble.data.image_size == 8


def test_another_normalisation_than_that_of_the_run_is_warned_of(finished_run):
    spec = RunFolder(finished_run).load_spec()
    given = {"data": "digits", "mean": spec.mean, "std": [0.9]}
    with pytest.warns(UserWarning, match=rf"by std=\[{spec.std[0]}\], not std=\[0.9\]$"):
        plan_finetuning(given, SINGLE, finetuned=str(finished_run))


def test_the_weights_of_a_run_given_as_a_file_have_the_normalisation_of_the_run(finished_run, tmp_path):
    folder = RunFolder(finished_run)
    spec, given = folder.load_spec(), {"data": "digits", "model": "wrn-10-1"}
    planned = plan_finetuning(given, SINGLE, finetuned=str(folder.weights))
    assert (planned.single.data.mean, planned.ensemble.data.std) == (spec.mean, spec.std)
    assert planned.single.model.weights == str(folder.weights)
    copy = shutil.copy(folder.weights, tmp_path / "model.safetensors")
    message = (
        r"^finetuned must be the folder of its run, .*, got .*, a copy of its weights alone; or give mean"
    )
    with pytest.raises(ValueError, match=message):
        plan_finetuning(given | {"mean": [0.5]}, SINGLE, finetuned=str(copy))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViT"]}))  # of another program
    save_file({}, tmp_path / "model.safetensors", {"format": "pt"})
    others = plan_finetuning(given, SINGLE, finetuned=str(copy))
    assert others.single.data.mean is None
    shutil.copytree(finished_run, tmp_path / "run")
    earlier = RunFolder(tmp_path / "run")
    save_file(load_file(earlier.weights), earlier.weights)  # without a description, as of an earlier version
    assert plan_finetuning(given, SINGLE, finetuned=str(earlier.weights)).single.data.mean == spec.mean
    shutil.copy(folder.weights, earlier.weights)
    earlier.spec.write_text(
        earlier.spec.read_text("utf-8").replace('"checksum": "sha256:', '"checksum": "sha256:0')
    )
    with pytest.raises(ValueError, match=message):  # the description is another one's
        plan_finetuning(given, SINGLE, finetuned=str(earlier.weights))
    copy = shutil.copy(folder.weights, tmp_path / "copy.safetensors")
    with pytest.raises(ValueError, match=message):
        plan_finetuning(given | {"mean": None, "std": None}, SINGLE, finetuned=str(copy))
    with_both = plan_finetuning(given | {"mean": [0.5], "std": [0.1]}, SINGLE, finetuned=str(copy))
    assert (with_both.single.data.mean, with_both.ensemble.data.std) == ([0.5], [0.1])


def _photographs(folder: Path) -> Path:
    for number in range(10):
        file = folder / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 99)).save(file)
    return folder
