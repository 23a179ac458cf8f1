"""Contenders side by side: their metrics over seeds, paired differences, and their costs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netfission.config import DataConfig
from netfission.experiments.costs import Costs
from netfission.experiments.statistics import SeedValues
from netfission.profiling.timing import Quartiles
from netfission.tasks import Task, task_kind
from netfission.tasks.base import EvaluationResult
from netfission.tasks.columns import Columns, brief, paired
from netfission.utils.files import write_together
from netfission.utils.text import align_columns, as_markdown, count_noun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = dict[str, SeedValues]  # metric → its values over the seeds


@dataclass(frozen=True)
class Comparison:
    """The results of a grid.

    Attributes:
        title: what is compared, on what data.
        reference: the contender that the others are compared with.
        metrics: contender → metrics of its ensemble, by its method's rule of averaging.
        averages: contender → that rule, see `Task.averaged`; a dash for a single prediction.
        costs: of the contenders that have a trained network.
        remarks: contender → what its settings and its training have of their own, in words.
        failed: contender → seed → why its run failed.
        settings: contender → its own settings.
        epochs: contender → epochs of its training over those that the settings of all contenders have.
        starts: contender → the contender whose trained network it starts from.
        x_axis: the setting on the picture's x-axis; if empty, the cost.
        conditions: the settings that all contenders share, in one line.
        notes: what holds for some of the contenders only, one line each.
        task: what the networks learned.
    """

    title: str
    reference: str
    metrics: dict[str, Metrics]
    averages: dict[str, str]
    costs: Costs
    remarks: dict[str, list[str]]
    failed: dict[str, dict[int, str]]
    settings: dict[str, dict[str, Any]]
    epochs: dict[str, float]
    starts: dict[str, str] = field(default_factory=dict)
    x_axis: str = ""
    conditions: str = ""
    notes: list[str] = field(default_factory=list)
    task: str = DataConfig.task

    @property
    def kind(self) -> type[Task]:
        """The task that the networks learned."""
        return task_kind(self.task)

    @property
    def columns(self) -> Columns:
        """The measures that are compared, and how they are shown."""
        return self.kind.columns

    def table(self) -> str:
        """Return all results as aligned plain text."""
        remark = f"; {self.kind.columns_remark}" if self.kind.columns_remark else ""
        blocks = [
            "\n".join(line for line in (self.title, self.conditions) if line),
            align_columns(self._metric_rows()),
            align_columns(self._difference_rows()),
            align_columns(self._size_rows()),
            align_columns(self._time_rows()),
            f"Times: median and quartiles of {count_noun(self.costs.rounds, 'round')} side by side; "
            "deployed: both networks optimised by netfission.deploy; –: it does not support such a network.",
            "MACs of the training: those of a step times the epochs. Records hold its duration.",
            f"averages: what a method averages over its predictions, by its authors{remark}.",
        ]
        blocks += [self.kind.remark] if self.kind.remark else []
        blocks += ["\n".join(self.notes)] if self.notes else []
        blocks += ["\n".join(self._remark_lines())] if self.remarks or self.failed else []
        return "\n\n".join(blocks)

    def markdown(self) -> str:
        """Return the main results as a Markdown table, below a line that says what they are of."""
        columns, size = brief(self.columns), self.costs.batch_sizes[-1]
        head = [
            "",
            "averages",
            *(column.title for column in columns.values()),
            "MACs",
            "training MACs",
            "training step",
            "inference",
        ]
        rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
        for name, metrics in self.metrics.items():
            cost = self.costs.contenders[name]
            ratios = (
                cost.size.macs_dense / self.costs.single.size.macs_dense,
                self._training_macs(name),
                cost.training.median,
                cost.inference[size].median,
            )
            rows.append(
                [
                    as_markdown(name),
                    self.averages[name],
                    *(metrics[key].cell(column) for key, column in columns.items()),
                    *(f"{ratio:.2f}×" for ratio in ratios),
                ]
            )
        title = " · ".join(map(as_markdown, self.title.splitlines()))
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        kinds = (
            f"training MACs: of the whole training; times on batches of {size}, not deployed; "
            "–: a single prediction has no average"
        )
        above = "\n".join(line for line in (f"{title}; {kinds}", self.conditions) if line)
        return "\n\n".join([above, table, *self.notes])

    def _training_macs(self, name: str) -> float:
        """Return the multiply-accumulates of a contender's training over those of the single network's.

        Those of the training of the network that it starts from are included, if a contender starts from one.
        """
        step = self.costs.contenders[name].training_macs / self.costs.single.training_macs
        before = self._training_macs(self.starts[name]) if name in self.starts else 0.0
        return before + step * self.epochs[name]

    def _metric_rows(self) -> list[list[str]]:
        titles = [column.title for column in self.columns.values()]
        rows = [["mean ± standard deviation", "n", "averages", *titles]]
        for name, metrics in self.metrics.items():
            cells = [metrics[key].cell(column) for key, column in self.columns.items()]
            rows.append([name, str(metrics[self.kind.headline].n), self.averages[name], *cells])
        return rows

    def _difference_rows(self) -> list[list[str]]:
        head = f"minus {self.reference}, seed by seed [95 %]"
        columns = paired(self.columns)
        rows = [[head, *(column.title for column in columns.values())]]
        reference = self.metrics.get(self.reference)
        for name, metrics in self.metrics.items():
            if reference is not None and name != self.reference:
                cells = [
                    metrics[key].minus(reference[key]).difference(column) for key, column in columns.items()
                ]
                rows.append([name, *cells])
        return rows

    def _size_rows(self) -> list[list[str]]:
        head = ["over the single network", "parameters", "non-zero", "MACs", "effective"]
        rows = [[*head, "MACs of a training step", "of the training"]]
        single = self.costs.single
        for name, cost in self.costs.contenders.items():
            counts = zip(astuple(cost.size), astuple(single.size), strict=True)
            ratios = [count / single_count for count, single_count in counts]
            ratios += [cost.training_macs / single.training_macs, self._training_macs(name)]
            rows.append([name, *(f"{ratio:.2f}×" for ratio in ratios)])
        return rows

    def _time_rows(self) -> list[list[str]]:
        head = ["time over the single network", "training step"]
        sizes = self.costs.batch_sizes
        head += [f"{kind}, batch {size}" for kind in ("inference", "deployed") for size in sizes]
        rows = [head]
        for name, cost in self.costs.contenders.items():
            times = [times.get(size) for times in (cost.inference, cost.deployed) for size in sizes]
            rows.append([name, *map(_ratio_text, [cost.training, *times])])
        return rows

    def _remark_lines(self) -> list[str]:
        lines = [f"{name}: {'; '.join(remarks)}" for name, remarks in self.remarks.items()]
        return lines + [
            f"{name}, seed {seed}: failed ({reason})"
            for name, reasons in self.failed.items()
            for seed, reason in reasons.items()
        ]

    def _picture(self) -> "Figure":
        from netfission.experiments.plots import plot_against_cost, plot_against_setting

        columns = {key: self.columns[key] for key in (self.kind.headline, "nll")}
        title = f"{self.title}\nmean ± standard deviation over seeds"
        if self.x_axis:
            return plot_against_setting(title, columns, self.metrics, self.settings, self.x_axis)
        return plot_against_cost(title, columns, self.metrics, self.costs, self.settings)

    def record(self) -> dict[str, Any]:
        """Return everything as plain data; the task unless it is the default."""
        left_out = {"task"} if self.task == DataConfig.task else set()
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def write(self, out: Path) -> list[Path]:
        """Write tables, data and pictures into a folder, each whole or not at all; return the files.

        Files stay as they are if tables and data do not change, as those hold all that is drawn.
        """
        texts = {
            out / "comparison.txt": self.table() + "\n",
            out / "comparison.md": self.markdown() + "\n",
            out / "comparison.json": json.dumps(self.record(), indent=1, ensure_ascii=False) + "\n",
        }
        pictures = [out / "comparison.png", out / "comparison.svg"]
        is_known = all(_holds(file, text) for file, text in texts.items())
        if not (is_known and all(picture.is_file() for picture in pictures)):
            # Imports matplotlib, which takes time that is saved where nothing is new.
            from netfission.utils.plot_style import picture_files

            # Texts come last, as they tell next time that the pictures are of these results.
            write_together({**picture_files(self._picture(), out / "comparison"), **texts})
        return [*texts, *pictures]


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode(errors="backslashreplace")


def ensemble_metrics(task: type[Task], evaluations: Mapping[int, EvaluationResult]) -> Metrics:
    """Return the metrics of one contender's ensemble over the seeds.

    A metric that an older version did not measure, or that is not defined for some seed, has no values.

    Args:
        task: what the networks learned.
        evaluations: seed → evaluation.
    """
    values = {seed: task.compared(evaluation) for seed, evaluation in evaluations.items()}
    metrics = {}
    for key in task.columns:
        known = {seed: value for seed, of_seed in values.items() if (value := of_seed[key]) is not None}
        metrics[key] = SeedValues(known if len(known) == len(values) else {})
    return metrics


def _ratio_text(ratio: Quartiles | None) -> str:
    return "–" if ratio is None else f"{ratio.median:.2f}× ({ratio.lower:.2f}–{ratio.upper:.2f})"
