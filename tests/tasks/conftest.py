import csv

import numpy as np
import pytest
from PIL import Image

from netfission.config import RunConfig
from netfission.runs.train import train

SPLITS = ["train"] * 40 + ["val"] * 20 + ["test"] * 20


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """The folder of 80 images with a red square, a green one, both or none, and a share of blue columns.

    Two tables say so: labels.csv and numbers.csv.
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
    for name, rows in (("labels.csv", labels), ("numbers.csv", numbers)):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="session")
def settings_for(tables):
    """Settings of a run of seconds: task and changes → `RunConfig`."""

    def settings(task, **changes):
        table = {"multilabel": "labels.csv", "regression": "numbers.csv"}[task]
        flat = {
            "task": task,
            "data": str(tables / table),
            "model": "wrn-10-1",
            "exits": 2,
            "epochs": 3,
            "batch_size": 10,
            "accelerator": "cpu",
            "flip": False,
            "crop_padding": 0,
        }
        return RunConfig.from_dict(flat | changes)

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
