import csv

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.models import _api as torchvision_models

from netfission.config import RunConfig
from netfission.runs.train import train

SPLITS = ["train"] * 40 + ["val"] * 20 + ["test"] * 20


class TinyPixels(nn.Module):
    """A class for each pixel, from features of half the size, in a dictionary as torchvision returns it."""

    def __init__(self, classes):
        super().__init__()
        layers = []
        for inputs, outputs, stride in ((3, 8, 1), (8, 16, 2), (16, 16, 1)):
            layers.append(
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                    nn.Conv2d(outputs, outputs, 1),
                )
            )
        self.backbone = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(16, classes, 1)

    def forward(self, images):
        maps = self.classifier(self.backbone(images))
        return {"out": F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False)}


def tiny_pixels(*, weights=None, weights_backbone=None, num_classes=21):
    return TinyPixels(num_classes)


@pytest.fixture(scope="session", autouse=True)
def tiny_model():
    """Makes torchvision know a tiny network of pixels by name."""
    tiny_pixels.__module__ = f"{models.segmentation.__name__}.tiny"
    torchvision_models.BUILTIN_MODELS["tiny_pixels"] = tiny_pixels
    yield "torchvision/tiny_pixels"
    del torchvision_models.BUILTIN_MODELS["tiny_pixels"]


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """The folder of 80 images with a red square, a green one, both or none, and a share of blue columns.

    Two tables say so: labels.csv and numbers.csv. The folder masks holds them with a class for each pixel:
    ground, red, blue, which is void on the last row.
    """
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    labels, numbers = [["path", "red", "green", "split"]], [["path", "blue", "split"]]
    for number, split in enumerate(SPLITS):
        image = rng.integers(0, 60, (8, 8, 3)).astype(np.uint8)
        red, green, blue = number % 2, number // 2 % 2, int(rng.integers(0, 9))
        image[:4, :4, 0] += np.uint8(180 * red)
        image[4:, :4, 1] += np.uint8(180 * green)
        image[:, 8 - blue :, 2] += np.uint8(140)
        Image.fromarray(image).save(folder / f"{number}.png")
        labels.append([f"{number}.png", red, green, split])
        numbers.append([f"{number}.png", blue / 8, split])
        mask = np.zeros((8, 8), np.uint8)
        mask[:4, :4] = red
        mask[:, 8 - blue :] = 2
        mask[7] = 255
        for kind, pixels in (("images", image), ("masks", mask)):
            (folder / "masks" / split / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "masks" / split / kind / f"{number}.png")
    (folder / "masks" / "classes.txt").write_text("ground\nred\nblue\n")
    for name, rows in (("labels.csv", labels), ("numbers.csv", numbers)):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


_DATA = {"multilabel": "labels.csv", "regression": "numbers.csv", "segmentation": "masks"}
_OWN = {
    "segmentation": {
        "model": "torchvision/tiny_pixels",
        "grouping": "channels",
        "workers": 0,
        "flip": None,
        "crop_padding": None,
        "learning_rate": 0.3,
    }
}


@pytest.fixture(scope="session")
def settings_for(tables):
    """Settings of a run of seconds: task and changes → `RunConfig`."""

    def settings(task, **changes):
        flat = {
            "task": task,
            "data": str(tables / _DATA[task]),
            "model": "wrn-10-1",
            "exits": 2,
            "epochs": 3,
            "batch_size": 10,
            "accelerator": "cpu",
            "flip": False,
            "crop_padding": 0,
        }
        return RunConfig.from_dict(flat | _OWN.get(task, {}) | changes)

    return settings


@pytest.fixture(scope="session")
def run_of(tmp_path_factory, settings_for):
    """Task → the folder of a finished run; not to be changed."""
    folders = {}

    def run(task):
        if task not in folders:
            path = tmp_path_factory.mktemp("runs") / task
            train(settings_for(task), path, progress=False)
            folders[task] = path
        return folders[task]

    return run
