"""What a run's folder holds, read for its report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netfission.classifier.folder import NetworkSpec
from netfission.config import RunConfig
from netfission.evaluation import Evaluation
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.cascade import CascadeEvaluation
from netfission.evaluation.corruption import Corruptions
from netfission.evaluation.out_of_distribution import OutOfDistribution
from netfission.evaluation.reliability import ReliabilityReport
from netfission.profiling.cost import NetworkCounts, count
from netfission.runs.folder import RunFolder

_FIGURES = {"top1", "nll", "ece", "brier"}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it lies.
        key: `run-1`, `run-2`, …: its name in identifiers and folders.
        letter: A, B, … among several runs; empty for one.
        name: what it is called on the page.
        config: its settings.
        spec: the description of its network.
        network: trained, on the CPU, in eval mode.
        costs: of the network.
        single: of the network before its fission, or of what a baseline is made of.
        epochs: rows of `metrics.csv`; empty where there is none.
        evaluation: on the test split; None where it has not been evaluated, like all that follow.
        calibration: from the validation split.
        reliability: calibration and confusion on the test split.
        cascade: early stopping.
        out_of_distribution: how well its uncertainty detects out-of-distribution images.
        corruptions: accuracy on corrupted images.
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
    evaluation: Evaluation | None
    calibration: Calibration | None
    reliability: ReliabilityReport | None
    cascade: CascadeEvaluation | None
    out_of_distribution: list[OutOfDistribution] | None
    corruptions: Corruptions | None

    @classmethod
    def load(cls, folder: RunFolder, *, key: str, letter: str, name: str) -> "Run":
        """Read a folder.

        Raises:
            ValueError: it holds no finished run, or a file is damaged.
        """
        config = folder.load_config()
        network, spec = folder.load_network()
        image = torch.zeros(1, *spec.shape)
        with torch.random.fork_rng([]):
            single = spec.single().eval()
        evaluation = folder.load_evaluation()
        if evaluation is not None:
            _check_figures(folder.evaluation, [*evaluation.exits, evaluation.ensemble])
        calibration = folder.load_calibration()
        reliability = folder.load_reliability()
        if reliability is not None:
            curves = [curve for curve in (reliability.raw, reliability.scaled) if curve is not None]
            _check_figures(folder.reliability, [curve.metrics for curve in curves])
        return cls(
            folder=folder,
            key=key,
            letter=letter,
            name=name,
            config=config,
            spec=spec,
            network=network,
            costs=count(network, image),
            single=count(single, image),
            epochs=folder.load_metrics(),
            evaluation=evaluation,
            calibration=calibration,
            reliability=reliability,
            cascade=folder.load_cascade(),
            out_of_distribution=folder.load_out_of_distribution(),
            corruptions=folder.load_corruptions(),
        )

    @property
    def exits(self) -> int:
        """Its number of exits, or of a baseline's members."""
        return int(self.spec.fission["exits"])

    @property
    def data(self) -> str:
        """The name of its data set, without the folder that it lay in."""
        return Path(self.config.data.data).name

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        method = self.config.method.method
        grouping = self.spec.fission["grouping"]
        exits = "one exit" if self.exits == 1 else f"{self.exits} exits by {grouping}"
        way = exits if method == "fission" else f"{method} of {self.exits}"
        return f"{self.spec.model}, {way}"

    @cached_property
    def versions(self) -> dict[str, Any]:
        """What it was made with, from the comments of its settings."""
        environment = self.folder.load_environment()
        return {**environment.pop("versions", {}), **environment}


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the folders of runs that are to stand side by side.

    Raises:
        ValueError: one holds no finished run, a file is damaged, a folder is named twice, or they are on
            different data, where no figure of one would be about that of another.
    """
    for place, path in enumerate(paths):
        if path.resolve() in {other.resolve() for other in paths[:place]}:
            raise ValueError(f"run={path}: is named twice")
    names = [path.resolve().name for path in paths]
    runs = []
    for place, path in enumerate(paths):
        name = names[place] if names.count(names[place]) == 1 else str(path)
        letter = _letter(place) if len(paths) > 1 else ""
        runs.append(Run.load(RunFolder(path), key=f"run-{place + 1}", letter=letter, name=name))
    first = runs[0]
    for run in runs[1:]:
        if run.spec.classes != first.spec.classes or _tested(run) != _tested(first):
            raise ValueError(
                f"run={run.folder.path}: is on other data ({_data(run)}) than {first.folder.path} "
                f"({_data(first)}); takes runs on the same data, or make a report of each"
            )
    return runs


def _letter(place: int) -> str:
    """A … Z, then A2 … ."""
    letter = chr(ord("A") + place % 26)
    return letter if place < 26 else f"{letter}{place // 26 + 1}"


def _tested(run: Run) -> int | None:
    return None if run.evaluation is None else run.evaluation.n


def _data(run: Run) -> str:
    tested = "not evaluated" if run.evaluation is None else f"{run.evaluation.n} test images"
    return f"{run.data}, {len(run.spec.classes)} classes, {tested}"


def _check_figures(path: Path, figures: Iterable[dict[str, float]]) -> None:
    for each in figures:
        if missing := _FIGURES - each.keys():
            raise ValueError(f"{path}: cannot be read ({', '.join(sorted(missing))} missing)")
