"""Contenders side by side: their figures over seeds, paired differences, and their costs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from netfission.evaluation import Evaluation
from netfission.experiments.contenders import Settings
from netfission.experiments.costs import BATCH_SIZES, Costs
from netfission.experiments.plots import against_cost, lines
from netfission.experiments.statistics import COLUMNS, SeedValues
from netfission.profiling.cost import Quartiles
from netfission.utils.files import write_together
from netfission.utils.plot_style import picture_files
from netfission.utils.text import align_columns, count_noun


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to.

    Attributes:
        title: what is compared, on what.
        reference: the contender that the others are measured by.
        figures: contender → figure of merit → values.
        costs: of the contenders whose networks are there.
        remarks: contender → what is its own in settings and training.
        failed: contender → seed → why its run failed.
        settings: contender → its own.
        along: the setting along the picture; empty for costs.
    """

    title: str
    reference: str
    figures: dict[str, dict[str, SeedValues]]
    costs: Costs
    remarks: dict[str, list[str]]
    failed: dict[str, dict[int, str]]
    settings: dict[str, Settings]
    along: str = ""

    def table(self) -> str:
        """The figures as aligned plain text."""
        blocks = [
            self.title,
            align_columns(self._quality()),
            align_columns(self._differences()),
            align_columns(self._counts()),
            align_columns(self._times()),
            f"Times: median and quartiles of {count_noun(self.costs.rounds, 'round')} side by side; "
            "deployed: both made fast by this project.",
        ]
        blocks += ["\n".join(self._remarks())] if self.remarks or self.failed else []
        return "\n\n".join(blocks)

    def markdown(self) -> str:
        """What matters most of it, as a table in Markdown, with what it is of in the line above."""
        kinds = {key: COLUMNS[key] for key in ("top1", "nll", "ece")}
        head = ["", *(column.title for column in kinds.values()), "MACs", "training step", "inference"]
        rows = [head, ["---", *["---:"] * (len(head) - 1)]]
        for name, own in self.figures.items():
            cost, unit = self.costs.contenders[name], self.costs.single.size.macs_dense
            rows.append(
                [
                    name,
                    *(column.cell(own[key]) for key, column in kinds.items()),
                    f"{cost.size.macs_dense / unit:.2f}×",
                    f"{cost.training.median:.2f}×",
                    f"{cost.inference[BATCH_SIZES[-1]].median:.2f}×",
                ]
            )
        title = " · ".join(self.title.splitlines())
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"{title}; times on batches of {BATCH_SIZES[-1]}, not deployed\n\n{table}"

    def _quality(self) -> list[list[str]]:
        head = ["mean ± standard deviation", "n", *(column.title for column in COLUMNS.values())]
        return [
            head,
            *(
                [name, str(own["top1"].n), *(column.cell(own[key]) for key, column in COLUMNS.items())]
                for name, own in self.figures.items()
            ),
        ]

    def _differences(self) -> list[list[str]]:
        kinds = {key: COLUMNS[key] for key in ("top1", "nll", "ece")}
        head = f"minus {self.reference}, seed by seed [95 %]"
        rows = [[head, *(column.title for column in kinds.values())]]
        base = self.figures.get(self.reference)
        for name, own in self.figures.items():
            if base is not None and name != self.reference:
                differences = {key: own[key].minus(base[key]) for key in kinds}
                rows.append([name, *(kinds[key].difference(each) for key, each in differences.items())])
        return rows

    def _counts(self) -> list[list[str]]:
        head = ["over the single network", "parameters", "non-zero", "MACs", "effective", "training MACs"]
        single = self.costs.single
        rows = [head]
        for name, own in self.costs.contenders.items():
            ours, its = asdict(own.size), asdict(single.size)
            ratios = [ours[kind] / its[kind] for kind in ours]
            rows.append(
                [name, *(f"{ratio:.2f}×" for ratio in (*ratios, own.training_macs / single.training_macs))]
            )
        return rows

    def _times(self) -> list[list[str]]:
        head = ["time over the single network", "training step"]
        head += [f"inference, batch {size}" for size in BATCH_SIZES]
        head += [f"deployed, batch {size}" for size in BATCH_SIZES]
        rows = [head]
        for name, own in self.costs.contenders.items():
            times: list[Quartiles | None] = [own.training]
            times += [kind.get(size) for kind in (own.inference, own.deployed) for size in BATCH_SIZES]
            rows.append([name, *map(_time, times)])
        return rows

    def _remarks(self) -> list[str]:
        lines = [f"{name}: {'; '.join(own)}" for name, own in self.remarks.items()]
        return lines + [
            f"{name}, seed {seed}: failed ({reason})"
            for name, own in self.failed.items()
            for seed, reason in own.items()
        ]

    def _picture(self) -> Figure:
        merits = {key: COLUMNS[key] for key in ("top1", "nll")}
        title = f"{self.title}\nmean ± standard deviation over seeds"
        if self.along:
            return lines(title, merits, self.figures, self.settings, self.along)
        return against_cost(title, merits, self.figures, self.costs, self.settings)

    def record(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)

    def write(self, out: Path) -> list[Path]:
        """Keep table, figures and picture in a folder, each whole or not at all."""
        files: dict[Path, str | bytes] = {
            out / "comparison.txt": self.table() + "\n",
            out / "comparison.md": self.markdown() + "\n",
            out / "comparison.json": json.dumps(self.record(), indent=1, ensure_ascii=False) + "\n",
            **picture_files(self._picture(), out / "comparison"),
        }
        write_together(files)
        return list(files)


def seed_values(evaluations: Mapping[str, Mapping[int, Evaluation]]) -> dict[str, dict[str, SeedValues]]:
    """Contender → figure of merit of its ensemble → values by seed."""
    return {
        name: {
            key: SeedValues({seed: _value(evaluation, key) for seed, evaluation in of_seeds.items()})
            for key in COLUMNS
        }
        for name, of_seeds in evaluations.items()
    }


def _value(evaluation: Evaluation, key: str) -> float:
    return evaluation.disagreement if key == "disagreement" else evaluation.ensemble[key]


def _time(ratio: Quartiles | None) -> str:
    return "–" if ratio is None else f"{ratio.median:.2f}× ({ratio.lower:.2f}–{ratio.upper:.2f})"
