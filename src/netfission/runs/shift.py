"""Evaluation of a finished run under distribution shift: out-of-distribution and corrupted images."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from netfission.classifier import Classifier
from netfission.classifier.folder import figures_json
from netfission.classifier.image_network import ImageNetwork
from netfission.config import CORRUPTION_IMAGES, RunConfig
from netfission.data import ImageData, Split, StreamedSplit, TensorSplit
from netfission.data.batches import decode_batches
from netfission.data.corrupted import CORRUPTIONS, STRENGTHS, open_corrupted
from netfission.data.sources import HUB_NAMES, check_data_name, hub_place
from netfission.data.unlabelled import load_unlabelled
from netfission.ensemble import weights_of
from netfission.evaluation.corruption import (
    CorruptionMetrics,
    Corruptions,
    corrupt_images,
    library_version,
)
from netfission.evaluation.feature_detectors import (
    ExitFeatures,
    FeatureDetector,
    FeatureScore,
    check_detectors,
    detectors_library,
    exit_features,
    fit_detector,
)
from netfission.evaluation.out_of_distribution import OutOfDistribution
from netfission.runs.evaluate import EVALUATION_BATCH, load_for_evaluation
from netfission.runs.folder import RunFolder
from netfission.runs.overlap import warn_of_own_images
from netfission.utils.errors import invalid
from netfission.utils.files import write_json
from netfission.utils.json_files import read_json

T = TypeVar("T")
Transform = Callable[[Tensor], Tensor]
DETECTOR_IMAGES = 50_000  # training images at most that detectors are fitted to, the number of CIFAR
# Data sets that are made of the run's own test images.
TRANSFORMS: dict[str, Transform] = {
    "inverted": lambda pixels: 255 - pixels,
    "rotated": lambda pixels: pixels.rot90(dims=(2, 3)),
}


def _unchanged(pixels: Tensor) -> Tensor:
    return pixels


def evaluate_ood(
    folder: RunFolder,
    config: RunConfig,
    names: Sequence[str],
    *,
    feature_detectors: Sequence[FeatureDetector] = (),
) -> list[OutOfDistribution]:
    """Measure how well a network's uncertainty distinguishes out-of-distribution images from its test split.

    The scores are those that a detector can use, at temperature 1, see
    `netfission.evaluation.p_values.detector_scores`, or with labels, numbers or a class for each pixel those
    of `Task.uncertainty_scores`. The results are written to the run's `ood.json`, beside
    those of other data sets.

    Args:
        folder: folder of a finished run.
        config: the run's settings.
        names: names of data sets, also of the hub, or folders, see `load_unlabelled`; their images are
            converted to the run's size and channels. `inverted` (255 − pixel) and `rotated` (a quarter turn)
            are made of the run's own test images.
        feature_detectors: names of detectors by features to measure beside the uncertainty, see
            `netfission.evaluation.feature_detectors.fit_detector`; only with one class per image. They are
            fitted to the images of the training split, without augmentation, or to 50,000 of them, which the
            run's seed chooses.

    Raises:
        ValueError: there are no such images, the run was trained on them, a detector is unknown or does not
            apply to the network, or see `evaluate`.
        MissingExtraError: the library that the detectors are from is not installed.
    """
    names = list(dict.fromkeys(names))  # each once
    feature_detectors = list(dict.fromkeys(feature_detectors))
    check_detectors(feature_detectors)
    network, data = _network(folder, config)
    if feature_detectors and not network.spec.find_task().targets.exclusive:
        expected = f"left out for a run of task={network.spec.task}"
        raise invalid("feature_detectors", expected, list(feature_detectors))
    others = [_other_images(name, config, data) for name in names]  # fails before the work
    fitted = _fit_detectors(network, data.train, config, feature_detectors) if feature_detectors else None
    test = _measure(network, data.test, config, "test split", fitted)
    results = []
    for name, (split, transform) in zip(names, others, strict=True):
        other = _measure(network, split, config, name, fitted, transform)
        result = OutOfDistribution.from_scores(name, test.uncertainty, other.uncertainty, 1.0)
        if fitted is not None:
            result = result.with_detectors(
                {name: (test.detectors[name], other.detectors[name]) for name in feature_detectors},
                training_images=fitted.images,
                library=detectors_library(),
            )
        results.append(result)
    weights = folder.weights_sha256()
    earlier = read_json(folder.out_of_distribution, list[OutOfDistribution]) or []
    kept = [result for result in earlier if result.weights in ("", weights)]
    results = [replace(result, weights=weights) for result in results]
    by_name = {result.data: asdict(result) for result in [*kept, *results]}
    text = json.dumps(list(by_name.values()), indent=1, ensure_ascii=False) + "\n"
    write_json(folder.out_of_distribution, text)
    return results


def evaluate_corruptions(
    folder: RunFolder, config: RunConfig, *, images: int | None = None, published: str | None = None
) -> Corruptions:
    """Measure a run's network on corrupted images: of its test split, or published ones.

    The results are written to the run's `corruptions.json`.

    Args:
        folder: folder of a finished run.
        config: the run's settings; their seed chooses the images and the corruptions' randomness.
        images: at most this many; default 1,000 of the test split, or all that are published.
        published: corrupted images in place of the test split: a folder, or a data set of the hub, see
            `netfission.data.corrupted.open_corrupted`.

    Raises:
        ValueError: images are smaller than 32×32, or see `evaluate` and `open_corrupted`.
        FileNotFoundError: there is no such folder of corrupted images.
        MissingExtraError: the library that corrupts is not installed.
    """
    if published is None:
        library_version()  # fails before the work
    classifier, data = _classifier(folder, config)
    seed = config.fission.seed
    source = (
        _test_images(data.test, images or CORRUPTION_IMAGES, seed)
        if published is None
        else _published_images(published, classifier, data, images, seed)
    )
    if classifier.calibration is not None and classifier.calibration.overlap:
        warnings.warn(f"NLL and ECE are at its temperature: {classifier.calibration.overlap}", stacklevel=2)
    measure = partial(
        CorruptionMetrics.from_logits, temperature=classifier.temperature, average=classifier.spec.average
    )
    clean = measure(_all_logits(classifier, source.clean), source.clean_labels)
    figures: dict[str, list[CorruptionMetrics]] = {name: [] for name in CORRUPTIONS}
    for name, strength in _bar(list(product(CORRUPTIONS, STRENGTHS)), "corruptions"):
        logits = _all_logits(classifier, source.corrupted(name, strength))
        figures[name].append(measure(logits, source.labels))
    result = Corruptions(len(source.labels), seed, classifier.temperature, source.library, clean, figures)
    write_json(folder.corruptions, figures_json(result, folder.weights_sha256()))
    return result


@dataclass(frozen=True)
class _CorruptibleImages:
    """Images that are measured under corruptions, in batches of pixels.

    Attributes:
        clean: without corruption.
        clean_labels: of these.
        corrupted: name and strength → the corrupted images.
        labels: of these.
        library: what corrupts, or has corrupted, them.
    """

    clean: Iterable[Tensor]
    clean_labels: Tensor
    corrupted: Callable[[str, int], Iterable[Tensor]]
    labels: Tensor
    library: str


def _test_images(test: Split, images: int, seed: int) -> _CorruptibleImages:
    pixels, labels = _sample(test, images, seed)

    def corrupted(name: str, strength: int) -> Iterable[Tensor]:
        batches: Iterable[Tensor] = corrupt_images(pixels, name, strength, seed).split(EVALUATION_BATCH)
        return batches

    return _CorruptibleImages(pixels.split(EVALUATION_BATCH), labels, corrupted, labels, library_version())


def _published_images(
    name: str, classifier: Classifier, data: ImageData, images: int | None, seed: int
) -> _CorruptibleImages:
    published = open_corrupted(name, classifier.spec.classes, data.shape)
    rows = _random_rows(len(published.labels), images, seed)

    def corrupted(name: str, strength: int) -> Iterable[Tensor]:
        return (published.pixels(name, strength, part) for part in rows.split(EVALUATION_BATCH))

    return _CorruptibleImages(
        _pixels(data.test, workers=0),
        data.test.labels,
        corrupted,
        published.labels[rows],
        published.title,
    )


def _network(folder: RunFolder, config: RunConfig) -> tuple[ImageNetwork, ImageData]:
    network, spec, data, _ = load_for_evaluation(folder, config, any_task=True)
    return ImageNetwork(network, spec), data


def _classifier(folder: RunFolder, config: RunConfig) -> tuple[Classifier, ImageData]:
    network, spec, data, _ = load_for_evaluation(folder, config)
    return Classifier(network, spec, folder.load_calibration()), data


def _other_images(name: str, config: RunConfig, data: ImageData) -> tuple[Split, Transform]:
    trained_on = config.data.data
    place = hub_place(name)
    if name == trained_on or str(Path(name).resolve()) == trained_on or _is_on_hub(trained_on, place):
        raise invalid("ood", "images that the run was not trained on", name)
    check_data_name(name, "ood", [*TRANSFORMS])
    if name not in TRANSFORMS:
        images = load_unlabelled(name, data.shape)
        warn_of_own_images(name, [images], config)
        return images, _unchanged
    _, height, width = data.shape
    if name == "rotated" and height != width:
        raise invalid("ood", f"other than 'rotated' on images of {height}×{width}", name)
    return data.test, TRANSFORMS[name]


def _is_on_hub(name: str, place: tuple[str, str | None] | None) -> bool:
    """Return whether a data set is that of a place on the hub, whose names are alike in small letters."""
    return place is not None and HUB_NAMES.get(name) == place[0].lower()


@dataclass(frozen=True)
class _FittedDetectors:
    scores: dict[str, FeatureScore]
    images: int


@dataclass(frozen=True)
class _Measured:
    """Scores `(n,)` of images, by the network's uncertainty and by the detectors."""

    uncertainty: dict[str, Tensor]
    detectors: dict[str, Tensor]


def _fit_detectors(
    network: ImageNetwork, train: Split, config: RunConfig, names: Sequence[FeatureDetector]
) -> _FittedDetectors:
    chosen = _random_part(train, DETECTOR_IMAGES, config.fission.seed)
    outputs = list(_exit_features(network, _batches(chosen, config, "training split")))
    features = torch.cat([output.side_by_side for output in outputs])
    head = outputs[0].mean_head(weights_of(network.spec.average))
    scores: dict[str, FeatureScore] = {}
    for name in names:
        scores[name] = fit_detector(name, features, chosen.labels, head)
    return _FittedDetectors(scores, len(chosen))


def _measure(
    network: ImageNetwork,
    split: Split,
    config: RunConfig,
    title: str,
    fitted: _FittedDetectors | None,
    transform: Transform = _unchanged,
) -> _Measured:
    task, average = network.spec.find_task(), network.spec.average
    size = task.batch_size(network.spec.shape, EVALUATION_BATCH)
    batches = _batches(split, config, title, transform, size)
    uncertainty: dict[str, list[Tensor]] = {}
    detectors: dict[str, list[Tensor]] = {}

    def add(outputs: Tensor) -> None:
        for name, values in task.uncertainty_scores(outputs, average=average).items():
            uncertainty.setdefault(name, []).append(values)

    if fitted is None:
        for pixels in batches:
            add(network.logits(pixels))
    else:
        for output in _exit_features(network, batches):  # features of all images may fill the memory
            add(output.logits)
            for name, score in fitted.scores.items():
                detectors.setdefault(name, []).append(score(output.side_by_side))
    return _Measured(
        {name: torch.cat(parts) for name, parts in uncertainty.items()},
        {name: torch.cat(parts) for name, parts in detectors.items()},
    )


def _exit_features(network: ImageNetwork, batches: Iterable[Tensor]) -> Iterator[ExitFeatures]:
    return (exit_features(network.network, network.logits, pixels) for pixels in batches)


def _batches(
    split: Split,
    config: RunConfig,
    title: str,
    transform: Transform = _unchanged,
    size: int = EVALUATION_BATCH,
) -> Iterable[Tensor]:
    """Return batches of pixels, changed by `transform`, with a progress bar."""
    pixels = _pixels(split, config.data.workers, size)
    return _bar(map(transform, pixels), title, -(-len(split) // size))


def _pixels(split: Split, workers: int, size: int = EVALUATION_BATCH) -> Iterator[Tensor]:
    if isinstance(split, TensorSplit):
        yield from split.images.split(size)
    else:
        yield from (pixels for pixels, _ in decode_batches(split, size, workers=workers))


def _all_logits(classifier: Classifier, batches: Iterable[Tensor]) -> Tensor:
    return torch.cat([classifier.logits(pixels) for pixels in batches])


def _sample(split: Split, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return pixels and labels of a random choice of at most `images` images, in the split's order."""
    part = _random_part(split, images, seed)
    if isinstance(part, TensorSplit):
        return part.images, part.labels
    return torch.stack([part[row][0] for row in range(len(part))]), part.labels


def _random_part(split: Split, images: int, seed: int) -> Split:
    """Return a random choice of at most `images` images, in the split's order."""
    rows = _random_rows(len(split), images, seed)
    if isinstance(split, TensorSplit):
        return TensorSplit(split.images[rows], split.labels[rows])
    assert isinstance(split, StreamedSplit)  # of classes
    return StreamedSplit(split.records, split.rows[rows.numpy()], split.size)


def _random_rows(count: int, images: int | None, seed: int) -> Tensor:
    """Return a random choice of at most `images` of the numbers below `count`, sorted; all by default."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    rows: Tensor = order[:images].sort().values
    return rows


def _bar(items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
    """Show a progress bar if standard error is a terminal."""
    return tqdm(items, desc=title, total=total, disable=None, leave=False)
