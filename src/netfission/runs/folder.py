"""A run's folder: the names of its files, how it is claimed, and one reader for each file."""

import csv
import hashlib
import json
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from netfission.classifier.folder import ModelFolder, NetworkSpec
from netfission.config import RunConfig
from netfission.data.checks import IN_WORDS
from netfission.data.load import digest_of_files, find_splits
from netfission.data.mask_data import find_photographs
from netfission.data.sources import NAMES, Source, fingerprint, is_named
from netfission.data.split_names import SplitName
from netfission.data.splits import Selection
from netfission.data.summary import DataSummary, SplitSummary
from netfission.evaluation.cascade import CascadeEvaluation
from netfission.evaluation.corruption import Corruptions
from netfission.evaluation.gain import Gain, NetworkFigures
from netfission.evaluation.other_data import OtherEvaluation
from netfission.evaluation.out_of_distribution import OutOfDistribution
from netfission.evaluation.reliability import ReliabilityReport
from netfission.models import TrainedWeights, WeightsReport, read_weights
from netfission.models.weights import file_digest
from netfission.network import FissionNetwork
from netfission.runs.found_budget import FoundBudget
from netfission.tasks import task_kind
from netfission.tasks.evaluation import OtherTargetEvaluation
from netfission.tasks.gain import TargetFigures, TargetGain
from netfission.tasks.window_evaluation import WindowEvaluation
from netfission.utils.checksums import BLANK, NAME, archive_damage, stamp
from netfission.utils.errors import first_line, invalid
from netfission.utils.files import has_file, remove_abandoned, safe_name, write_json, write_whole
from netfission.utils.json_files import read_json
from netfission.utils.outputs import ENVIRONMENT_MARK
from netfission.utils.text import as_text, count_noun
from netfission.utils.yaml_text import parse_yaml

_TIME_ONLY = {"workers"}  # settings that change how long a training takes, and nothing else
SAME_SETTINGS = "a run resumes with the settings it began with"
MOVED = "what a run begins with may move if its name and content stay the same"


@dataclass(frozen=True)
class RunFolder(ModelFolder):
    """The folder of a run: the files of its network and of its training.

    Attributes:
        path: the folder.

    Example:
        >>> RunFolder(Path("runs/first")).metrics.as_posix()
        'runs/first/metrics.csv'
        >>> RunFolder(Path("runs/first")).load_metrics()  # no such run
        []
    """

    @property
    def data_summary(self) -> Path:
        """Classes, images in each split, and what was left out of the data set."""
        return self.path / "data.json"

    @property
    def weights_report(self) -> Path:
        """The file of weights that the training started from, its SHA-256, and which tensors it gave."""
        return self.path / "weights.json"

    @property
    def budget(self) -> Path:
        """The multiply-accumulates that were found for a budget in time."""
        return self.path / "budget.json"

    @property
    def metrics(self) -> Path:
        """Accuracies, losses and learning rate of the training, one row per epoch."""
        return self.path / "metrics.csv"

    @property
    def checkpoint(self) -> Path:
        """The training's state after the last whole epoch, to resume from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def previous_checkpoint(self) -> Path:
        """The state one epoch before, in case `checkpoint` is damaged; removed once the network is saved."""
        return self.path / "checkpoints" / "previous.ckpt"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def training_time(self) -> Path:
        """The seconds that training took, of a run of a comparison or of a fine-tuning."""
        return self.path / "seconds.json"

    @property
    def gain(self) -> Path:
        """What the ensemble of a fine-tuning gains over its single network, and what it costs."""
        return self.path / "gain.json"

    @property
    def single(self) -> "RunFolder":
        """The folder of the single network of a fine-tuning."""
        return RunFolder(self.path / "single")

    @property
    def lock(self) -> Path:
        """Held by the process that trains in the folder."""
        return self.path / ".lock"

    @property
    def reliability(self) -> Path:
        """Calibration, selective prediction and confusions on the test split."""
        return self.path / "reliability.json"

    @property
    def cascade(self) -> Path:
        """Thresholds of an early-exit cascade, and its accuracy and cost on the test split."""
        return self.path / "cascade.json"

    @property
    def cascade_figures(self) -> tuple[Path, Path]:
        """Plots of the cascade, as PNG and as SVG."""
        return self.path / "cascade.png", self.path / "cascade.svg"

    @property
    def exports(self) -> list[Path]:
        """What `netfission export` has written into the folder."""
        files = [*self.path.glob("*.onnx"), *self.path.glob("*.pt2")]
        cascade = self.path / "cascade"
        return sorted([*files, cascade] if cascade.is_dir() else files)

    @property
    def out_of_distribution(self) -> Path:
        """How well uncertainty detects out-of-distribution images, one entry per data set."""
        return self.path / "ood.json"

    @property
    def corruptions(self) -> Path:
        """Accuracy and calibration on corrupted test images."""
        return self.path / "corruptions.json"

    @property
    def window_evaluation(self) -> Path:
        """Measures of maps on test photographs in their own sizes, window by window and scaled."""
        return self.path / "evaluation-windows.json"

    @property
    def evaluations(self) -> Path:
        """The folder of figures on other data sets than the run's own."""
        return self.path / "evaluations"

    def evaluation_of(self, data: str) -> Path:
        """Return the file of the figures on another data set; no two data sets have the same.

        Args:
            data: name of the data set, or the full path of its folder.

        Example:
            >>> RunFolder(Path("runs/first")).evaluation_of("cifar10").as_posix()
            'runs/first/evaluations/cifar10.json'
            >>> RunFolder(Path("runs/first")).evaluation_of("/data/my photos").name
            'my-photos-035ab4.json'
        """
        if data in NAMES:
            return self.evaluations / f"{data}.json"
        digest = hashlib.sha256(data.encode(errors="surrogateescape")).hexdigest()
        return self.evaluations / f"{safe_name(Path(data).name)}-{digest[:6]}.json"

    @property
    def report(self) -> Path:
        """The report of the run, one HTML page."""
        return self.path / "report.html"

    def claim(self, config: RunConfig, resume: bool, names: Mapping[str, str] | None = None) -> None:
        """Make the folder and write its settings, or with `resume` check that it holds such a run.

        Args:
            config: the settings.
            resume: whether to go on with a run.
            names: setting → its name in messages, if a user knows it by another.

        Raises:
            ValueError: it holds a run and `resume` is False, it holds none and `resume` is True, its run has
                other settings, or its name is not UTF-8 text.
            OSError: it cannot be written.
        """
        if resume:
            self._check_settings(config, names or {})
            return
        if as_text(str(self.path)) != str(self.path):
            raise invalid("out", "a path of UTF-8 text, which TensorBoard needs", found=str(self.path))
        remove_abandoned(self.path)  # of a run that was killed as it began
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise invalid(
                "out",
                "a new or empty folder",
                found=f"{self.path}, which is not empty",
                hint="resume the run that is there, or choose another folder",
            )
        comments = [ENVIRONMENT_MARK, *(f"# {line}" for line in yaml.safe_dump(environment()).splitlines())]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            settings = config.to_yaml() + "\n".join([f"# {NAME}: {BLANK}", *comments]) + "\n"
            write_whole(self.config, stamp(settings.encode()))
        except OSError as error:
            raise OSError(f"out={self.path} cannot be written ({error.strerror})") from error

    def release(self) -> None:
        """Undo `claim`: remove the folder of a run that ended before its first epoch."""
        shutil.rmtree(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in the folder.

        Raises:
            ValueError: another process trains in it.
        """
        lock = FileLock(self.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise invalid(
                "out",
                "a folder in which no other process trains",
                found=str(self.path),
                hint="wait until that process ends",
            ) from error
        for folder in (self.path, self.checkpoint.parent):
            remove_abandoned(folder)
        try:
            yield
        finally:
            lock.release()

    def resumable(self) -> Path | None:
        """Return the checkpoint to resume from, or None if no epoch has ended.

        Raises:
            ValueError: it is damaged, and the one before is damaged or missing.

        Warns:
            UserWarning: it is damaged, and the one before is taken.
        """
        kept = [path for path in (self.checkpoint, self.previous_checkpoint) if has_file(path)]
        if not kept:
            return None
        newest, *older = kept
        if not (damage := archive_damage(newest)):
            return newest
        sound = next((path for path in older if not archive_damage(path)), None)
        if sound is None and not archive_damage(newest):
            return newest  # another process of this training has put the sound one there
        if sound is None:
            raise invalid(
                str(newest),
                "a checkpoint",
                found=f"a damaged file ({damage})",
                hint=f"remove {newest.parent} and resume, which starts the run again",
            )
        warnings.warn(
            f"{newest} is damaged ({damage}): the run goes on from {sound.name}, one epoch before",
            stacklevel=2,
        )
        # So that the next checkpoint does not take the sound one's place. Another process may have done it.
        with suppress(FileNotFoundError):
            sound.replace(newest)
        return newest

    def warn_of_other_threads(self) -> None:
        """Warn if the run began with another number of CPU threads, by which sums are rounded otherwise."""
        begun, now = self.load_environment().get("threads"), torch.get_num_threads()
        if isinstance(begun, int) and begun != now:
            warnings.warn(
                f"the run began with {count_noun(begun, 'CPU thread')} and goes on with {now}, so that it "
                f"may not end in the same bits; OMP_NUM_THREADS={begun} keeps them",
                stacklevel=2,
            )

    def load_config(self) -> RunConfig:
        """Read the settings of the run.

        A fine-tuning that has moved starts from the single network where that is now.

        Raises:
            ValueError: the folder holds no run, or its settings cannot be read.
        """
        config = super().load_config()
        weights = config.model.weights
        if weights is None or Path(weights).exists() or not self.is_finetuning(config):
            return config
        if not self.single.path.is_dir():
            return config
        return replace(config, model=replace(config.model, weights=str(self.single.path.resolve())))

    def load_fission(self, *, any_task: bool = False) -> tuple[FissionNetwork, NetworkSpec]:
        """Load the network and its spec, see `load_network`, of a run whose network is a `FissionNetwork`.

        Raises:
            ValueError: the network is another, or see `load_network`.
        """
        network, spec = self.load_network(any_task=any_task)
        if not isinstance(network, FissionNetwork):
            expected = "a run whose network is divided into paths, such as one with method=fission"
            raise invalid(str(self.path), expected, found=f"method={spec.method['method']}")
        return network, spec

    def load_data_summary(self) -> DataSummary | None:
        """Read `data_summary`; None if there is no such file, ValueError if it is damaged."""
        return read_json(self.data_summary, DataSummary)

    def load_weights_report(self) -> WeightsReport | None:
        """Read `weights_report`; None if there is no such file, ValueError if it is damaged."""
        return read_json(self.weights_report, WeightsReport)

    def save_weights_report(self, reports: Sequence[WeightsReport]) -> None:
        """Write the first of some reports, which tell the same of each network of a method; none if empty."""
        if reports:
            write_json(self.weights_report, json.dumps(asdict(reports[0]), indent=1) + "\n")

    def load_budget(self) -> FoundBudget | None:
        """Read `budget`; None if there is no such file, ValueError if it is damaged."""
        return read_json(self.budget, FoundBudget)

    def read_weights(self, config: RunConfig) -> TrainedWeights | None:
        """Read the weights that a run starts from; None if it starts from others.

        Raises:
            ValueError: they cannot be read, or a run that began with other content of the file is resumed.
        """
        if config.model.weights is None:
            return None
        weights, begun = read_weights(config.model.weights), self.load_weights_report()
        if begun is not None and begun.sha256 != weights.sha256:
            raise invalid(
                "weights",
                f"the file that the run began with (SHA-256 {begun.sha256[:12]}…)",
                found=f"{weights.path} with other content ({weights.sha256[:12]}…)",
                hint="restore the file, or start another run",
            )
        return weights

    def load_metrics(self) -> list[dict[str, float]]:
        """Read the rows of `metrics`; none if there is no such file.

        Raises:
            ValueError: the file is damaged.
        """
        if not has_file(self.metrics):
            return []
        try:
            with self.metrics.open(encoding="utf-8", newline="") as file:
                return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        except (ValueError, TypeError, csv.Error) as error:
            raise invalid(
                str(self.metrics), "a table of numbers", found=f"a damaged file ({error})"
            ) from error

    def load_environment(self) -> dict[str, Any]:
        """Read what `environment` gave at the start of the run; {} if the settings file does not say.

        Raises:
            ValueError: the comments that say it are damaged.
        """
        lines = self.config.read_text(encoding="utf-8").splitlines()
        if ENVIRONMENT_MARK not in lines:
            return {}
        comments = lines[lines.index(ENVIRONMENT_MARK) + 1 :]
        try:
            content = parse_yaml("\n".join(line.removeprefix("# ") for line in comments))
        except ValueError as error:
            found = f"damaged comments ({first_line(error)})"
            raise invalid(str(self.config), "the settings of a run", found=found) from error
        return content if isinstance(content, dict) else {}

    def load_reliability(self) -> ReliabilityReport | None:
        """Read `reliability`; None if there is no such file, ValueError if damaged or of another network."""
        return self.load_figures(self.reliability, ReliabilityReport)

    def load_cascade(self) -> CascadeEvaluation | None:
        """Read `cascade`, see `load_figures`; None if there is no such file."""
        return self.load_figures(self.cascade, CascadeEvaluation, flags=" --cascade")

    def load_out_of_distribution(self) -> list[OutOfDistribution] | None:
        """Read `out_of_distribution`; None if there is no such file.

        Raises:
            ValueError: it is damaged, or an entry is of another network.
        """
        found, digest = (
            read_json(self.out_of_distribution, list[OutOfDistribution]),
            cache(self.weights_sha256),
        )
        for entry in found or []:
            self.check_weights(self.out_of_distribution, entry.weights, " --ood", digest)
        return found

    def load_corruptions(self) -> Corruptions | None:
        """Read `corruptions`, see `load_figures`; None if there is no such file."""
        return self.load_figures(self.corruptions, Corruptions, flags=" --corruptions")

    def load_evaluation_of(self, data: str) -> OtherEvaluation | None:
        """Read `evaluation_of` a data set, see `load_figures`; None if there is no such file."""
        return self.load_figures(self.evaluation_of(data), OtherEvaluation, flags=" --data")

    def load_window_evaluation(self) -> WindowEvaluation | None:
        """Read `window_evaluation`, see `load_figures`; None if there is no such file."""
        return self.load_figures(self.window_evaluation, WindowEvaluation, flags=" --window")

    def load_target_evaluation_of(self, data: str) -> OtherTargetEvaluation | None:
        """Read `evaluation_of` a data set of another task than classification, see `load_evaluation_of`."""
        return self.load_figures(self.evaluation_of(data), OtherTargetEvaluation, flags=" --data")

    def load_gain(self) -> Gain | None:
        """Read `gain`; None if there is no such file, ValueError if it is damaged."""
        return read_json(self.gain, Gain)

    def load_target_gain(self) -> TargetGain | None:
        """Read `gain` of another task than classification, see `load_gain`."""
        return read_json(self.gain, TargetGain)

    def current_gain(self) -> Gain | TargetGain | None:
        """Read `gain` if it is of the weights and calibrations that both networks have now.

        Returns:
            The gain; None if there is no such file, it cannot be read, or it was measured with others.

        Raises:
            ValueError: a network or its calibration is damaged, or they do not belong together.
        """
        classifies = task_kind(self.load_config().data.task).targets.exclusive
        try:
            gain = self.load_gain() if classifies else self.load_target_gain()
        except ValueError:  # it is measured anew
            return None
        if gain is None:
            return None
        networks = ((gain.ensemble, self), (gain.single, self.single))
        return gain if all(run._has(figures) for figures, run in networks) else None

    def shown_together(self) -> "list[RunFolder]":
        """Return the runs that this one's report shows: of a fine-tuning, also the single network's.

        A single network that was taken over is no run, and is not shown.
        """
        is_finetuned = has_file(self.config) and self.is_finetuning(self.load_config())
        return [self, self.single] if is_finetuned and has_file(self.single.config) else [self]

    def is_finetuning(self, config: RunConfig) -> bool:
        """Return whether the settings of this run are those of the ensemble of a fine-tuning."""
        weights = config.model.weights
        return weights is not None and Path(weights).name == self.single.path.name

    def _has(self, figures: NetworkFigures | TargetFigures) -> bool:
        """Return whether the figures of a gain are of the weights and calibration that are here."""
        if isinstance(figures, TargetFigures):
            spec = self.load_spec(any_task=True)
            found = self.load_calibration_of(spec) if has_file(self.weights) else None
            now = None if found is None else (self.weights_sha256(), found.digest)
            return now == (figures.weights, figures.calibration)
        calibration = self.load_calibration() if has_file(self.weights) else None
        return calibration is not None and (
            (figures.weights, figures.temperature, figures.calibrated_on)
            == (self.weights_sha256(), calibration.temperature, calibration.images)
        )

    def have_moved(self, before: str | None, now: str | None) -> bool:
        """Return whether weights have the name and content of those that the run began with, elsewhere.

        Args:
            before: the file or folder that the run began with.
            now: the file or folder that it is to go on with.
        """
        if before is None or now is None or Path(before).name != Path(now).name or not Path(now).exists():
            return False
        report = self.load_weights_report()  # None if the run ended before it read them
        return report is None or report.sha256 == file_digest(now)

    def _check_settings(self, config: RunConfig, names: Mapping[str, str]) -> None:
        if not has_file(self.config):
            lack = "which holds no run" if self.path.is_dir() else "which does not exist"
            hint = "leave it out to start the run"
            raise invalid("resume", "given for the folder of a run", found=f"{self.path}, {lack}", hint=hint)
        begun = self.load_config()
        values, hint = begun.to_dict(), SAME_SETTINGS
        for name, value in config.to_dict().items():
            if value == values[name] or name in _TIME_ONLY:
                continue
            if name == "weights" and self.have_moved(values[name], value):
                continue
            if name == "weights" and None not in (values[name], value):
                hint = MOVED
            if name == "data":
                if not (difference := self._data_difference(begun, config)):
                    continue
                hint = difference
            expected = f"{values[name]!r}, as in {self.config}"
            found = repr(value) if isinstance(value, str) else ""  # a path in full
            raise invalid(names.get(name, name), expected, value, found=found, hint=hint)

    def _data_difference(self, begun: RunConfig, now: RunConfig) -> str:
        """Say why a data set is not the run's own in another place; empty if it is."""
        before, place, targets = begun.data.data, now.data.data, task_kind(now.data.task).targets
        if is_named(before) or is_named(place):
            return SAME_SETTINGS
        if not Path(place).exists():
            return "there is no folder or table at that place"
        if Path(before).exists():
            same = fingerprint(place, targets) == fingerprint(before, targets)
            return "" if same else "files in the two differ in names or sizes"
        summary = self.load_data_summary()  # None if the run ended before it read the data
        if summary is None or targets.masks:  # which are compared when they are read
            return ""
        for name, images in find_run_splits(now).items():
            trained_on: SplitSummary | None = getattr(summary, name)
            if trained_on is None or not _are_those(images, trained_on):
                kind = IN_WORDS[name]
                return f"its {kind} images are not those in {self.data_summary}, by their names and labels"
        return ""


def find_run_splits(config: RunConfig, source: Source | None = None) -> Mapping[SplitName, Selection]:
    """Find the images of each split of a run, see `netfission.data.load.find_splits`.

    Args:
        config: the run's settings.
        source: the data set, if it was found before.

    Example:
        >>> {split: len(images.rows) for split, images in find_run_splits(RunConfig()).items()}
        {'train': 1293, 'validation': 145, 'test': 359}
    """
    data = config.data
    if task_kind(data.task).targets.masks:
        return find_photographs(data.data, validation=data.validation, seed=config.fission.seed)
    return find_splits(
        data.data,
        validation=data.validation,
        seed=config.fission.seed,
        limit_per_class=data.limit_per_class,
        targets=task_kind(data.task).targets,
        source=source,
    )


def _are_those(images: Selection, trained_on: SplitSummary) -> bool:
    """Whether the images of a split are those that a run began with, by the names and labels of files."""
    digest = digest_of_files(images)
    if None in (digest, trained_on.digest):
        return len(images.rows) == trained_on.images
    return digest == trained_on.digest


_version = cache(version)  # finds and parses a file


def environment() -> dict[str, Any]:
    """Return what a result may depend on beside its settings: versions, device and number of threads.

    Example:
        >>> sorted(environment())
        ['device', 'threads', 'versions']
    """
    packages = ("netfission", "torch", "torchvision", "timm", "lightning", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
    }
