from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from netfission.classifier import Classifier
from netfission.runs.folder import RunFolder
from netfission.runs.train import train


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory) -> Path:
    """The first 400 digits as colour pictures of several sizes: train/CLASS/*.png and test/CLASS/*.png."""
    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    rng = np.random.default_rng(0)
    for index, (image, label) in enumerate(zip(digits.images[:400], digits.target, strict=False)):
        colour = image[..., None] / 16 * rng.integers(150, 256, 3)
        height, width = rng.integers(8, 24, 2)
        path = folder / ("test" if index < 100 else "train") / f"digit {label}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colour.astype(np.uint8)).resize((width, height)).save(path)
    return folder


@pytest.fixture(scope="session")
def digits_run(digit_files, settings_of, tmp_path_factory) -> RunFolder:
    """A run on them, calibrated; not to be changed."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "files")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        config = settings_of(data=str(digit_files), image_size=8, limit_per_class=None, epochs=3, exits=3)
        train(config, folder.path, progress=False)
    return folder


@pytest.fixture(scope="session")
def classifier(digits_run) -> Classifier:
    """What that run trained."""
    return Classifier.from_pretrained(digits_run.path)
