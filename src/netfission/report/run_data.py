"""Read a run's folder for its report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import nn

from netfission.classifier.folder import NetworkSpec
from netfission.config import RunConfig
from netfission.data.summary import CUT
from netfission.evaluation import Evaluation
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.cascade import CascadeEvaluation
from netfission.evaluation.corruption import Corruptions
from netfission.evaluation.out_of_distribution import OutOfDistribution
from netfission.evaluation.reliability import ReliabilityReport
from netfission.profiling.cost import NetworkCounts, count
from netfission.runs.folder import RunFolder
from netfission.tasks.base import EvaluationResult
from netfission.utils.errors import invalid
from netfission.utils.text import exit_names, printable

_METRICS = {"top1", "nll", "ece", "brier"}


@dataclass(frozen=True)
class NetworkRun:
    """A finished run of any task.

    Attributes:
        folder: the run's folder.
        key: `run-1`, `run-2`, …: name in identifiers and folders of the page.
        letter: A, B, … if there are several runs, else empty.
        name: title on the page.
        config: settings of the run.
        spec: description of the network.
        network: the trained network, on the CPU, in eval mode.
        costs: of the network.
        single: costs of the single network, before fission or before a baseline copies it.
        epochs: rows of `metrics.csv`; empty if the file does not exist.
        evaluation: on the test split; None if it has not been measured, as `cascade`.
        cascade: quality and cost of early exit.
    """

    folder: RunFolder
    key: str
    letter: str
    name: str
    config: RunConfig
    spec: NetworkSpec
    network: nn.Module
    costs: NetworkCounts
    single: NetworkCounts
    epochs: list[dict[str, float]]
    evaluation: EvaluationResult | None
    cascade: CascadeEvaluation | None

    @property
    def exits(self) -> int:
        """The number of exits, or of a baseline's members."""
        return self.spec.predictions

    @property
    def whole(self) -> str:
        """What all exits or members together are called: an ensemble, unless there is one alone."""
        return "ensemble" if self.exits > 1 else "network"

    @property
    def badge(self) -> str:
        """The letter of all exits together in figures: that of the run among several, or of `whole`."""
        return self.letter or self.whole[0].upper()

    @property
    def exit_names(self) -> list[str]:
        """Names of the exits, of which linear ones are marked, or of a baseline's members."""
        if not self.costs.exits:
            return [f"member {number}" for number in range(self.exits)]
        return exit_names(self.exits, self.config.fission.linear)

    @property
    def linear_exits(self) -> list[int]:
        """Numbers of the linear exits, which come last."""
        return list(range(self.exits - self.config.fission.linear, self.exits))

    @property
    def validation_images(self) -> int | None:
        """The number of validation images of the run's own data; None if it has none or is not known.

        Raises:
            ValueError: the file is damaged.
        """
        summary = self.folder.load_data_summary()
        return None if summary is None or summary.validation is None else summary.validation.images

    @property
    def data(self) -> str:
        """The name of the data set, without its folder."""
        return printable(Path(self.config.data.data).name)

    @property
    def title(self) -> str:
        """The model, and how it was divided or which baseline it is."""
        return f"{self.spec.model}, {self.spec.kind}"

    @cached_property
    def versions(self) -> dict[str, Any]:
        """Versions and devices that the run was made with."""
        environment = self.folder.load_environment()
        return {**environment.pop("versions", {}), **environment}

    @classmethod
    def load(cls, folder: RunFolder, *, key: str, letter: str, name: str) -> Self:
        """Read a run's folder.

        Args:
            folder: the folder.
            key: see the class, as what follows.
            letter: if there are several runs.
            name: title on the page.

        Raises:
            ValueError: it does not contain a finished run, or a file is damaged.
        """
        raise NotImplementedError

    @staticmethod
    def parts(folder: RunFolder) -> dict[str, Any]:
        """Read what runs of all tasks have: the attributes from `config` to `epochs`, and `cascade`.

        Raises:
            ValueError: the folder does not contain a finished run, or a file is damaged.
        """
        config = folder.load_config()
        network, spec = folder.load_network(any_task=True)
        image = torch.zeros(1, *spec.shape)
        with torch.random.fork_rng([]):
            single = spec.single().eval()
        return {
            "config": config,
            "spec": spec,
            "network": network,
            "costs": count(network, image),
            "single": count(single, image),
            "epochs": folder.load_metrics(),
            "cascade": folder.load_cascade(),
        }


@dataclass(frozen=True)
class Run(NetworkRun):
    """A finished run whose images have one class each.

    Attributes:
        evaluation: on the test split; this and all that follow are None if they have not been measured.
        calibration: on the validation split.
        reliability: calibration and confusion on the test split.
        out_of_distribution: how well uncertainty detects out-of-distribution images, per data set.
        corruptions: accuracy on corrupted images.
    """

    evaluation: Evaluation | None
    calibration: Calibration | None
    reliability: ReliabilityReport | None
    out_of_distribution: list[OutOfDistribution] | None
    corruptions: Corruptions | None

    @classmethod
    def load(cls, folder: RunFolder, *, key: str, letter: str, name: str) -> Self:
        """Read a run's folder, see `NetworkRun.load`."""
        parts = cls.parts(folder)
        evaluation = folder.load_evaluation()
        if evaluation is not None:
            _check_metrics(folder.evaluation, [*evaluation.exits, evaluation.ensemble])
        calibration = folder.load_calibration()
        reliability = folder.load_reliability()
        if reliability is not None:
            curves = [curve for curve in (reliability.raw, reliability.scaled) if curve is not None]
            _check_metrics(folder.reliability, [curve.metrics for curve in curves])
        return cls(
            folder=folder,
            key=key,
            letter=letter,
            name=name,
            **parts,
            evaluation=evaluation,
            calibration=calibration,
            reliability=reliability,
            out_of_distribution=folder.load_out_of_distribution(),
            corruptions=folder.load_corruptions(),
        )


_Kind = TypeVar("_Kind", bound=NetworkRun)


def load_runs(paths: Sequence[Path], kind: type[_Kind]) -> list[_Kind]:
    """Read the folders of runs that are compared side by side.

    Args:
        paths: of the runs.
        kind: how each is read.

    Raises:
        ValueError: a folder does not contain a finished run, a file is damaged, a folder is given twice, or
            the runs have different classes or test images.
    """
    for index, path in enumerate(paths):
        if path.resolve() in {other.resolve() for other in paths[:index]}:
            raise invalid("run", "different folders", found=f"{path} twice")
    names = [printable(path.resolve().name) for path in paths]
    runs: list[_Kind] = []
    for index, path in enumerate(paths):
        name = names[index] if names.count(names[index]) == 1 else str(path)
        letter = _letter(index) if len(paths) > 1 else ""
        runs.append(kind.load(RunFolder(path), key=f"run-{index + 1}", letter=letter, name=name))
    first = runs[0]
    for run in runs[1:]:
        if _tested(run) != _tested(first):
            raise invalid(
                "run",
                "folders of runs on the same data",
                found=f"{run.folder.path} ({_data(run)}) beside {first.folder.path} ({_data(first)})",
                hint="write a report of each",
            )
    return runs


def _letter(index: int) -> str:
    """Return A … Z, then A2 … ."""
    letter = chr(ord("A") + index % 26)
    return letter if index < 26 else f"{letter}{index // 26 + 1}"


def data_differences(runs: Sequence[NetworkRun]) -> list[str]:
    """Say in what the data differ that runs were trained on, one sentence per difference.

    Raises:
        ValueError: a file is damaged.
    """
    summaries = [run.folder.load_data_summary() for run in runs]
    columns: dict[str, list[str | None]] = {
        "They were trained on data in different places": [printable(run.config.data.data) for run in runs],
        "They were trained on different numbers of images": [
            None if summary is None else f"{summary.train.images:,}" for summary in summaries
        ],
    }
    differences = []
    for sentence, values in columns.items():
        known = {run.letter: value for run, value in zip(runs, values, strict=True) if value is not None}
        if len(set(known.values())) > 1:
            differences.append(f"{sentence}: {', '.join(map(' '.join, known.items()))}.")
    validation = [None if summary is None else summary.validation for summary in summaries]
    cut_by = {
        run.config.fission.seed
        for run, split in zip(runs, validation, strict=True)
        if split is not None and split.origin == CUT
    }
    if len(cut_by) > 1:
        differences.append("Their seeds cut different validation images from the training images.")
    return differences


def _tested(run: NetworkRun) -> tuple[list[str], int | None]:
    """What a run's targets are called, and the number of its test images: runs side by side share them."""
    return run.spec.classes, None if run.evaluation is None else run.evaluation.n


def _data(run: NetworkRun) -> str:
    tested = "not evaluated" if run.evaluation is None else f"{run.evaluation.n} test images"
    return f"{run.data}, {len(run.spec.classes)} {run.spec.find_task().targets.noun}, {tested}"


def _check_metrics(path: Path, parts: Iterable[dict[str, float]]) -> None:
    """Raise ValueError if a part of a file lacks a metric that the page shows."""
    for metrics in parts:
        if missing := _METRICS - metrics.keys():
            expected = f"a file with {', '.join(sorted(_METRICS))} of each network"
            raise invalid(str(path), expected, found=f"a file without {', '.join(sorted(missing))}")
