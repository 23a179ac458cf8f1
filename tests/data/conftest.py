from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches out of the home folder."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes `classes × count` PNG files below a folder."""

    def write(
        part: str = "",
        classes: tuple[str, ...] = ("cat", "dog"),
        count: int = 10,
        size: tuple[int, int] = (6, 8),
        mode: str = "RGB",
    ) -> Path:
        rng = np.random.default_rng(0)
        for name in classes:
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / f"{mode}{index:03}.png")
        return tmp_path / "images"

    return write
