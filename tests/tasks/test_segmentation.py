"""A class for each pixel: what is counted batch by batch, what is written, and what is refused."""

import csv
import json
import math
import re
import shutil
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from netfission.classifier import Predictor
from netfission.cli import main
from netfission.config import DataConfig, RunConfig, TrainingConfig
from netfission.data.mask_data import load_mask_data
from netfission.data.mask_folders import VOID, load_masks
from netfission.data.splits import TensorSplit
from netfission.ensemble import ensemble_log_probabilities, fit_temperature, predictive_entropy
from netfission.evaluation.pixels import PixelScores
from netfission.methods.fission import FissionMethod
from netfission.prediction.maps import MapFolder
from netfission.runs.folder import RunFolder
from netfission.runs.lightning_module import TrainingModule
from netfission.runs.overlap import warn_of_held_out_images
from netfission.runs.setup import build_network, check_run, data_task, load_run_data, make_batches
from netfission.runs.train import train
from netfission.tasks.segmentation import (
    PixelCalibration,
    PixelSample,
    Segmentation,
    median_frequency_weights,
)

NAMES = ["road", "sky", "car"]


def random_maps(seed, images=6, exits=2):
    """Logits of exits that are mostly right, and masks of which a fifth is void."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(3, (images, 5, 7), generator=generator)
    logits = torch.randn(images, exits, 3, 5, 7, generator=generator)
    logits += 2 * F.one_hot(masks, 3).movedim(-1, 1).unsqueeze(1)
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = VOID
    return logits, masks


def result(accumulator, logits, masks, sizes):
    for part in zip(logits.split(sizes), masks.split(sizes), strict=True):
        accumulator.add(*part)
    return accumulator.result()


def test_what_is_beside_a_photograph_is_not_uncertain():
    task, (logits, masks) = Segmentation(NAMES), random_maps(0)
    sizes = [(3, 7), (5, 2)] * 3  # which the network's 5×7 pixels hold unscaled
    expected = [
        task.total_uncertainty(maps[None, ..., :height, :width], average="logits").item()
        for maps, (height, width) in zip(logits, sizes, strict=True)
    ]
    assert task.total_uncertainty(logits, average="logits", sizes=sizes).tolist() == pytest.approx(expected)
    calibration = result(task.calibrator(average="logits", sizes=sizes), logits, masks, [4, 2])
    assert calibration.uncertainty == pytest.approx(sorted(expected))


@given(seed=st.integers(0, 100), sizes=st.sampled_from([[6], [1, 5], [2, 2, 2], [1] * 6]))
@settings(max_examples=15)
def test_batches_do_not_matter(seed, sizes):
    task, (logits, masks) = Segmentation(NAMES), random_maps(seed)
    calibration = task.calibrate(logits, masks, average="logits")
    assert result(task.calibrator(average="logits"), logits, masks, sizes) == calibration
    whole = task.evaluate(logits, masks, average="logits", calibration=calibration)
    evaluator = task.evaluator(average="logits", calibration=calibration)
    streamed, report = result(evaluator, logits, masks, sizes)
    assert report is None and streamed.n == whole.n == 6
    for name in ("ensemble", "calibrated", "uncertainty"):
        assert getattr(streamed, name) == pytest.approx(getattr(whole, name))
    assert streamed.by_target == whole.by_target


def test_measures_are_those_of_pixel_scores():
    logits, masks = random_maps(0)
    evaluation = Segmentation(NAMES).evaluate(logits, masks, average="probabilities")
    scores = PixelScores(3, VOID)
    scores.add(ensemble_log_probabilities(logits, "probabilities"), masks)
    assert evaluation.ensemble == scores.result()
    assert [found["iou"] for found in evaluation.by_target.values()] == scores.class_iou().tolist()
    entropy = predictive_entropy(logits, "probabilities")[masks != VOID].double().mean().item()
    assert evaluation.uncertainty["entropy"] == pytest.approx(entropy)
    assert "mIoU %" in evaluation.table() and "road" in evaluation.table()


def test_calibrated_measures_are_those_at_the_temperature():
    logits, masks = random_maps(0)
    calibration = PixelCalibration(n=6, average="logits", pixels=100, temperature=2.5)
    task = Segmentation(NAMES)
    evaluation = task.evaluate(logits, masks, average="logits", calibration=calibration)
    assert evaluation.calibrated == task.evaluate(logits / 2.5, masks, average="logits").ensemble
    found = task.predict(logits, average="logits", calibration=calibration)
    torch.testing.assert_close(found.logits, logits / 2.5)


def test_nothing_of_a_batch_is_kept():
    evaluator, (logits, masks) = Segmentation(NAMES).evaluator(average="logits"), random_maps(0)
    evaluator.add(logits, masks)
    held = [weakref.ref(logits), weakref.ref(masks)]
    del logits, masks
    assert all(reference() is None for reference in held)


@given(limit=st.integers(1, 300), seed=st.integers(0, 100))
@settings(max_examples=20)
def test_a_sample_is_of_labelled_pixels_and_of_no_more_than_the_limit(limit, seed):
    logits, masks = random_maps(seed)
    sample = PixelSample(limit, seed)
    found, labels = result(sample, logits, masks, 2)
    labelled = masks != VOID
    assert len(found) == len(labels) == min(limit, int(labelled.sum()))
    rows = logits.permute(0, 3, 4, 1, 2)[labelled].flatten(1)
    pairs = {(*row, label) for row, label in zip(rows.tolist(), masks[labelled].tolist(), strict=True)}
    drawn = [(*row, label) for row, label in zip(found.flatten(1).tolist(), labels.tolist(), strict=True)]
    assert len(set(drawn)) == len(drawn) and set(drawn) <= pairs


def test_every_pixel_is_drawn_equally_often():
    masks = torch.zeros(2, 1, 10, dtype=torch.int64)
    logits = torch.arange(20.0).view(2, 1, 1, 1, 10).expand(2, 1, 2, 1, 10)
    counts = torch.zeros(20)
    for seed in range(500):
        found, _ = result(PixelSample(5, seed), logits, masks, 1)
        counts[found[:, 0, 0].long()] += 1
    assert (counts / 500 - 0.25).abs().max() < 0.1  # five standard deviations


def test_a_temperature_is_fitted_to_all_labelled_pixels_if_there_are_few():
    logits, masks = random_maps(1)
    calibration = Segmentation(NAMES).calibrate(3 * logits, masks, average="logits", dependence="chosen")
    labelled = masks != VOID
    rows = 3 * logits.permute(0, 3, 4, 1, 2)[labelled]
    assert calibration.temperature == pytest.approx(fit_temperature(rows, masks[labelled]))
    assert (calibration.n, calibration.pixels) == (6, int(labelled.sum()))
    assert PixelCalibration.from_json(calibration.to_json()) == calibration
    with pytest.raises(ValueError, match="masks must be of at least one pixel that is not void, got none"):
        Segmentation(NAMES).calibrate(logits, torch.full_like(masks, VOID), average="logits")


def test_void_pixels_are_neither_learned_nor_shown():
    task, (logits, masks) = Segmentation(NAMES), random_maps(2)
    loss = task.loss(FissionMethod.__new__(FissionMethod), TrainingConfig())
    void = (masks == VOID)[:, None, None].expand_as(logits)
    other = torch.where(void, -logits, logits)
    torch.testing.assert_close(loss(other, masks), loss(logits, masks))
    shown = [task.progress(outputs, masks, "logits") for outputs in (logits, other)]
    for first, second in zip(*shown, strict=True):
        torch.testing.assert_close(first, second)
    measures = task.evaluate(logits, masks, average="logits").ensemble
    assert (shown[0][0][-1] / 6).item() == pytest.approx(measures["pixel_accuracy"])
    assert (shown[0][1] / 6).item() == pytest.approx(measures["nll"], rel=1e-5)
    assert task.progress(logits, torch.full_like(masks, VOID), "logits")[1] == 0


def test_classes_that_occur_nowhere_have_no_iou():
    masks = torch.zeros(1, 2, 2, dtype=torch.int64)
    logits = torch.tensor([9.0, 0.0, 0.0]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 2, 2)
    evaluation = Segmentation(NAMES).evaluate(logits, masks, average="logits")
    assert evaluation.by_target == {"road": {"iou": 1.0}, "sky": {}, "car": {}}
    assert evaluation.ensemble["mean_iou"] == 1 and "error_auroc" not in evaluation.ensemble
    assert "NaN" not in evaluation.to_json()
    assert evaluation.table().splitlines()[-3].split() == ["sky"]


def test_outputs_that_are_not_finite_are_refused():
    task, masks, outputs = Segmentation(NAMES), torch.zeros(3, 2, 2).long(), torch.zeros(3, 1, 3, 2, 2)
    outputs[1, 0, 0, 0, 0] = math.nan
    message = "^outputs must be finite, got NaN or infinity in 1 of 3 images$"
    for refused in (
        lambda: task.calibrate(outputs, masks, average="logits"),
        lambda: task.evaluate(outputs, masks, average="logits"),
        lambda: task.predict(outputs, average="logits"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_images_go_through_a_network_in_batches_of_limited_memory():
    assert Segmentation.batch_size((3, 180, 240), 256) == 6
    assert Segmentation.batch_size((3, 8, 8), 256) == 256
    assert Segmentation.batch_size((3, 2000, 3000), 256) == 1


def write_pair(folder, split, name, mask, size=None):
    """Write a grey photograph, as large as the mask unless a height and width are given, and the mask."""
    for kind in ("images", "masks"):
        (folder / split / kind).mkdir(parents=True, exist_ok=True)
    height, width = size or mask.shape[:2]
    Image.new("RGB", (width, height), "grey").save(folder / split / "images" / f"{name}.png")
    Image.fromarray(mask).save(folder / split / "masks" / f"{name}.png")


def halves(*numbers, size=(8, 12)):
    """A mask whose columns have these numbers in equal shares."""
    mask = np.zeros(size, np.uint8)
    for part, number in zip(np.array_split(np.arange(size[1]), len(numbers)), numbers, strict=True):
        mask[:, part] = number
    return mask


@pytest.fixture
def folder(tmp_path):
    """Masks in which 0 is void, and 1 and 2 are classes."""
    for number in range(10):
        write_pair(tmp_path / "data", "train", number, halves(0, 1, 2))
    write_pair(tmp_path / "data", "test", "a", halves(1, 2))
    (tmp_path / "data" / "classes.txt").write_text("void\nroad\nsky\n")
    return tmp_path / "data"


def test_void_may_be_any_number(folder):
    data = load_mask_data(str(folder), validation=0.2)
    assert (data.classes, data.numbers, data.shape) == (["road", "sky"], [1, 2], (3, 8, 12))
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 1)
    images, masks = next(iter(make_batches(data.train, data, 8)))
    assert masks.dtype == torch.int64 and masks[0, 0].tolist() == [VOID] * 4 + [0] * 4 + [1] * 4
    assert images.shape == (8, 3, 8, 12)
    assert data.summary.line().endswith(
        "1 test; pixels of the training photographs, held-out ones included: 50.00 % of road to 50.00 % of "
        "sky; 33.33 % void"
    )
    (folder / "classes.txt").unlink()
    by_number = load_mask_data(str(folder), void=2)
    assert (by_number.classes, by_number.numbers) == (["0", "1"], [0, 1])


def test_a_data_set_is_the_same_decoded_on_access(folder):
    held, streamed = (load_mask_data(str(folder), image_size=6, memory_limit=limit) for limit in (10**9, 0))
    assert isinstance(held.train, TensorSplit) and not isinstance(streamed.train, TensorSplit)
    assert held.shape == streamed.shape == (3, 6, 9) and held.summary == streamed.summary
    transform = Segmentation.transform(DataConfig(), held)
    for change in (None, transform):
        parts = (
            make_batches(data.train, data, 4, shuffle=True, transform=change) for data in (held, streamed)
        )
        for first, second in zip(*parts, strict=True):
            assert all(map(torch.equal, first, second))


def test_photograph_and_mask_are_changed_together(folder):
    data = load_mask_data(str(folder))
    transform = Segmentation.transform(DataConfig(color_jitter=0.1), data)
    seen = set()
    for seed in range(10):
        (batch,) = make_batches(data.test, data, 1, transform=transform, shuffle=True, seed=seed)
        image, mask = batch[0][0], batch[1][0]
        assert ((image == image.min()).all(dim=0) == (mask == VOID)).all() or (mask != VOID).all()
        seen.add(str(mask.tolist()))
    assert len(seen) > 5


def test_photographs_of_other_shapes_are_fitted_whole(folder):
    write_pair(folder, "test", "tall", halves(1, 2, size=(24, 12)))
    with pytest.raises(ValueError, match="image_size must be given if photographs differ in size"):
        load_mask_data(str(folder))
    data = load_mask_data(str(folder), image_size=8)
    image, mask = data.test.images[1], data.test.labels[1]
    assert mask[:, :4].tolist() == [[0, 0, 1, 1]] * 8 and (mask[:, 4:] == VOID).all()
    assert (image[:, :, :4] > 100).all() and (image[:, :, 4:] == 0).all()


def test_copies_of_training_photographs_are_told_of(folder):
    data = load_mask_data(str(folder))
    assert data.summary.test.in_training == 1  # all are grey
    assert any(line.startswith("1 of 1 test image has the same content") for line in data.summary.warnings)
    unchecked = load_mask_data(str(folder), checks=False).summary
    assert (unchecked.test.in_training, unchecked.warnings) == (0, [])


def test_a_class_that_is_held_out_as_a_whole_is_warned_of(folder):
    write_pair(folder, "train", 0, halves(0, 1, 2, 3))
    (folder / "classes.txt").write_text("void\nroad\nsky\ncar\n")
    told = "no training pixel is of car, as all that are were held out for validation; choose another seed"
    warned = set()
    for seed in range(8):
        with warnings.catch_warnings(record=True, action="always") as caught:
            data = load_mask_data(str(folder), validation=0.5, seed=seed)
        has_car = bool(data.summary.train.images_per_class[2])
        assert [str(warning.message) for warning in caught] == ([] if has_car else [told])
        warned.add(has_car)
    assert warned == {False, True}


@pytest.mark.parametrize("validation", [-0.1, 1, 1.5])
def test_a_share_is_below_one(folder, validation):
    with pytest.raises(ValueError, match=rf"validation must be a share in \[0, 1\), got {validation}"):
        load_mask_data(str(folder), validation=validation)


def test_few_photographs_cannot_be_held_out(folder):
    with pytest.raises(ValueError, match=r"validation must be 0, or a share that holds out photographs, got"):
        load_mask_data(str(folder), validation=0.01)
    shutil.copytree(folder / "test", folder / "val")
    with pytest.warns(UserWarning, match=r"validation=0.3 has no effect, as .* has a validation split"):
        assert len(load_mask_data(str(folder), validation=0.3).validation) == 1
    without = load_mask_data(str(folder), validation=0)
    assert without.validation is None
    assert without.summary.left_out == {"of the validation split, which is not used": 1}


def test_a_changed_mask_is_noticed(folder):
    before = load_mask_data(str(folder)).summary
    found = {before.train.digest}
    for mask in (halves(0, 1, 1), halves(0, 2, 2)):
        write_pair(folder, "train", 0, mask)
        found.add(load_mask_data(str(folder)).summary.train.digest)
    assert len(found) == 3


def test_maps_are_written_beside_figures(run_of, tables, tmp_path, capsys):
    photograph = tmp_path / "tall.png"
    with Image.open(tables / "61.png") as image:
        image.resize((16, 32)).save(photograph)
    images = [str(tables / "61.png"), str(photograph), str(tables / "none.png")]
    out = tmp_path / "maps"
    assert main(["predict", str(run_of("segmentation")), *images, "--out", str(out)]) == 1
    assert "1 of 3 images could not be read" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [
        "61-uncertainty.png", "61.png", "predictions.csv", "tall-uncertainty.png", "tall.png"
    ]  # fmt: skip
    rows = list(csv.DictReader((out / "predictions.csv").read_text("utf-8").splitlines()))
    assert [row["error"] for row in rows] == ["", "", "no such file or directory"]
    for name, size, row in (("61", (8, 8), rows[0]), ("tall", (16, 32), rows[1])):
        with Image.open(out / f"{name}.png") as classes, Image.open(out / f"{name}-uncertainty.png") as grey:
            assert (classes.mode, classes.size, grey.mode, grey.size) == ("P", size, "L", size)
            numbers = np.array(classes)
            assert set(numbers.flat) <= {0, 1, 2} and classes.getpalette()[3:6] == [128, 0, 0]
        shares = [float(row[f"shares_{name}"]) for name in ("ground", "red", "blue")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        if name == "61":
            assert shares == pytest.approx(np.bincount(numbers.flat, minlength=3) / 64)
    assert main(["predict", str(run_of("segmentation")), images[0], "--format", "jsonl"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record) == ["image", "shares", "confidence", "disagreement", "entropy", "mutual_information"]


def test_maps_can_be_read_as_masks(run_of, tables, tmp_path):
    """A folder whose masks are predicted is a data set of the same numbers."""
    images = tables / "masks" / "test" / "images"
    for split in ("train", "test"):
        shutil.copytree(images, tmp_path / split / "images")
        arguments = ["predict", str(run_of("segmentation")), str(images)]
        assert main([*arguments, "--out", str(tmp_path / split / "masks")]) == 0
        for file in (tmp_path / split / "masks").glob("*-uncertainty.png"):
            file.unlink()
        (tmp_path / split / "masks" / "predictions.csv").unlink()
    data = load_masks(tmp_path, classes=["ground", "red", "blue"])
    assert sum(data.pixels["test"][:3]) == 20 * 64


def test_python_draws_the_same_maps(run_of, tables, tmp_path):
    predictor = Predictor.from_pretrained(run_of("segmentation"))
    with Image.open(tables / "61.png") as image:
        large = image.resize((20, 10))
        found = predictor.predict(predictor.pixels(large)[None], sizes=[(10, 20)])
        whole = predictor.predict(predictor.pixels(image)[None])
    assert found.class_map(0).size == found.uncertainty_map(0).size == (20, 10)
    own = ensemble_log_probabilities(whole.logits)[0].argmax(dim=0)
    assert np.array(whole.class_map(0)).tolist() == own.tolist()
    entropy = predictive_entropy(whole.logits)[0] / math.log(3)
    torch.testing.assert_close(
        torch.from_numpy(np.array(whole.uncertainty_map(0))) / 255, entropy, atol=0.003, rtol=0
    )
    inner = found._of(0)
    assert inner.shape[3:] == (4, 8)  # what the photograph takes of 8 × 8
    sums = [sum(record["shares"].values()) for record in found.records()]
    assert sums == [pytest.approx(1)]


def test_numbers_of_masks_are_kept(folder, settings_for, tmp_path):
    config = settings_for("segmentation", data=str(folder), epochs=1, batch_size=4)
    train(config, tmp_path / "run", progress=False)
    predictor = Predictor.from_pretrained(tmp_path / "run")
    found = predictor.predict(torch.zeros(1, 3, 8, 12, dtype=torch.uint8))
    assert set(np.array(found.class_map(0)).flat) <= {1, 2}
    predictor.save_pretrained(tmp_path / "copy")
    again = Predictor.from_pretrained(tmp_path / "copy")
    assert again.task.numbers == [1, 2] and again.calibration == predictor.calibration


@pytest.mark.parametrize("sizes", [[(10, 20)], [(10, 20), (4, 4), (4, 4)]])
def test_each_image_has_a_size(sizes):
    logits, _ = random_maps(0, images=2)
    with pytest.raises(ValueError, match=f"sizes must be 2, one per image, got {len(sizes)}"):
        Segmentation(NAMES).predict(logits, average="logits", sizes=sizes)


def test_maps_replace_only_maps(run_of, tables, tmp_path, capsys):
    shutil.copytree(tables / "masks" / "test", tmp_path / "test")
    images, masks = tmp_path / "test" / "images", tmp_path / "test" / "masks"
    before = {path: path.read_bytes() for path in masks.iterdir()}
    command = ["predict", str(run_of("segmentation")), str(images), "--out"]
    assert main([*command, str(masks)]) == 2
    error = capsys.readouterr().err
    assert "--out must be a folder in which no map replaces another file, got that of" in error
    assert {path: path.read_bytes() for path in masks.iterdir()} == before
    for _ in range(2):  # the second time in place of the first
        assert main([*command, str(tmp_path / "maps")]) == 0


def test_maps_replace_neither_images_nor_one_another(run_of, tables, tmp_path, capsys):
    image, other = tables / "61.png", tables / "masks" / "test" / "images" / "61.png"
    run = str(run_of("segmentation"))
    for images, out, told in (
        ([image], tables, "--out must be a folder in which no map replaces another file, got that of"),
        ([image, other], tmp_path / "maps", "images must be files whose maps have different names, got"),
        ([image], run_of("segmentation"), "--out must be another folder than a run's"),
        ([image], tmp_path / "maps.csv", "--out must be a folder for maps"),
        ([image], tmp_path / "none" / "maps", "--out must be a folder for maps"),
    ):
        before = image.read_bytes()
        assert main(["predict", run, *map(str, images), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
        assert image.read_bytes() == before
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="images must be files whose maps have different names"):
        MapFolder(tmp_path, [tables / "a.png", tables / "a-uncertainty.png"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": "cutmix"}, "mix must be 'none' with task=segmentation"),
        ({"balance": "sampler"}, "balance must be none or weights with task=segmentation, got 'sampler'"),
        ({"crop_padding": 4}, "crop_padding must be left out with task=segmentation"),
        ({"rand_augment": 5}, "rand_augment must be left out with task=segmentation"),
        ({"erase": 0.1}, r"erase must be 0\.0 with task=segmentation"),
        ({"corrupt": "skip"}, "corrupt must be 'refuse' with task=segmentation"),
        (
            {"method": "mimo", "grouping": "weights"},
            "method must be deep-ensemble or fission or multi-exit or treenet with task=segm",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(settings_for, changes, message):
    with pytest.raises(ValueError, match=message):
        check_run(settings_for("segmentation", **changes))


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_void_is_for_masks_alone(settings_for, task):
    with pytest.raises(ValueError, match=f"void must be left out with task={task}, got 3"):
        check_run(RunConfig.from_dict({"task": task, "void": 3}))
    with pytest.raises(ValueError, match="void must be a number of a mask's pixels, from 0 to 255, got 300"):
        settings_for("segmentation", void=300)


@pytest.mark.parametrize("model", ["wrn-10-1", "torchvision/squeezenet1_1", "resnet10t"])
def test_networks_of_whole_images_are_refused_in_one_line(settings_for, tmp_path, model):
    told = f"model must be a network that classifies each pixel, such as .*, got {model}, whose output is"
    with pytest.raises(ValueError, match=told) as error:
        train(settings_for("segmentation", model=model, image_size=32), tmp_path / "run", progress=False)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_network_may_start_from_that_of_a_run(settings_for, tables, tmp_path):
    data = shutil.copytree(tables / "masks", tmp_path / "masks")
    shutil.rmtree(data / "val")
    settings = {"epochs": 1, "data": str(data), "validation": 0.2}
    train(settings_for("segmentation", exits=1, **settings), tmp_path / "one", progress=False)
    config = settings_for("segmentation", weights=str(tmp_path / "one"), **settings)
    train(config, tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run" / "weights.json").read_text("utf-8"))
    other_seed = settings_for("segmentation", weights=str(tmp_path / "one"), seed=1, **settings)
    with pytest.warns(UserWarning, match="as training images of .*, from which the network starts"):
        warn_of_held_out_images(other_seed)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda folder: write_pair(folder, "train", 0, halves(1, 2), size=(16, 12)),
            r"0\.png must be of the size of its photograph \(16×12\), got 8×12",
        ),
        (
            lambda folder: write_pair(folder, "test", "a", halves(1, 7)),
            r"a\.png must be of numbers from 0 to 2, of which 0 is void, got 7 \(48 pixels\)",
        ),
        (
            lambda folder: write_pair(folder, "test", "a", np.zeros((8, 12, 3), np.uint8)),
            "a mask of one channel, whose pixels are class numbers, got an image of mode RGB",
        ),
        (
            lambda folder: (folder / "train" / "masks" / "3.png").unlink(),
            "a folder with a mask of each photograph, got none of",
        ),
        (
            lambda folder: write_pair(folder, "test", "a", halves(0)),
            "the test masks of .* must be labelled, got void pixels alone",
        ),
        (lambda folder: shutil.rmtree(folder / "train"), "train"),
        (lambda folder: shutil.rmtree(folder), "no folder"),
    ],
)
def test_bad_data_is_refused_in_one_line(folder, settings_for, tmp_path, capsys, spoil, told):
    spoil(folder)
    config = settings_for("segmentation", data=str(folder)).to_dict()
    given = ("task", "data", "model", "grouping", "exits", "workers")
    flags = [part for name in given for part in (f"--{name}", str(config[name]))]
    assert main(["train", *flags, "--out", str(tmp_path / "run")]) in (1, 2)
    error = capsys.readouterr().err.splitlines()
    lines = [line for line in error if not line.startswith("netfission: warning")]
    assert len(lines) == 1, error
    assert re.search(told, lines[0]), lines
    assert not (tmp_path / "run").exists()


def test_a_folder_that_has_moved_is_known_again(run_of, tables, tmp_path, capsys):
    shutil.copytree(tables / "masks", tmp_path / "moved")
    run = str(run_of("segmentation"))
    assert main(["evaluate", run, "--data", str(tmp_path / "moved")]) == 0
    assert "calibrated" in capsys.readouterr().out
    (tmp_path / "moved" / "test" / "masks" / "61.png").unlink()
    assert main(["evaluate", run, "--data", str(tmp_path / "moved")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_costs_are_counted(run_of, capsys):
    assert main(["cost", str(run_of("segmentation")), "--rounds", "1", "--batch-sizes", "[1]"]) == 0
    assert "torchvision/tiny_pixels, exits: 2" in capsys.readouterr().out


def test_the_description_of_a_run_has_the_numbers(run_of):
    spec = RunFolder(run_of("segmentation")).load_spec(any_task=True)
    assert (spec.task, spec.scale, spec.format) == ("segmentation", {"numbers": [0.0, 1.0, 2.0]}, 2)


def test_held_out_photographs_do_not_weigh(settings_for, tmp_path):
    """The counts are those of the training masks alone."""
    folder = settings_for("segmentation").data.data
    shutil.copytree(folder, tmp_path / "masks", ignore=shutil.ignore_patterns("val"))
    config = settings_for("segmentation", balance="weights", validation=0.3, data=str(tmp_path / "masks"))
    data = load_run_data(config.data, 0, training=True)
    masks = data.train.labels  # scaled to one size, unlike the masks that are counted
    counted = [int((masks == number).sum()) for number in range(len(data.classes))]
    assert data.pixels == counted


def test_a_class_that_does_not_occur_changes_no_weight():
    expected = median_frequency_weights([800, 150, 50], [10, 10, 5], total=10)
    found = median_frequency_weights([800, 150, 50, 0], [10, 10, 5, 0], total=10)
    assert found.tolist() == [*expected.tolist(), 1.0]


def test_rare_classes_weigh_more_in_the_loss(settings_for):
    config = settings_for("segmentation", balance="weights")
    check_run(config)
    data = load_run_data(config.data, 0, training=True)
    task = data_task(config, data)
    shares = torch.tensor(data.pixels, dtype=torch.float64) / sum(data.pixels)
    images = torch.tensor(data.summary.train.images_per_class) / data.summary.train.images
    frequencies = shares / images
    assert torch.allclose(task.class_weights.double(), frequencies.median() / frequencies, rtol=1e-6)
    module = TrainingModule(build_network(config, data), config.training, task=task)
    assert module.loss.class_weights is task.class_weights
    assert data_task(settings_for("segmentation"), data).class_weights is None
