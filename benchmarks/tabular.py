"""An MLP on tables, divided by `netfission.fission`, beside TabM and a Deep Ensemble of MLPs.

Tables of scikit-learn: digits as vectors of 64 numbers, breast cancer, and diabetes, a regression. Each seed
divides a table into 60 % training, 20 % validation and 20 % test rows, and starts all networks anew. All are
MLPs of three hidden layers and train alike: AdamW, early stopping on the validation NLL of their average.
What differs is theirs:

- single, deep-ensemble-3: cross-entropy; the mean of the probabilities;
- channels-3, weights-3, copies-3: `netfission.fission` of that MLP, ensemble distillation; mean of logits;
- tabm-3, tabm-32: the authors' package (arXiv 2410.24210) with 3 members, and with their default of 32; the
  mean of the members' losses; the mean of the probabilities.

In the regression, networks have two outputs, mean and logarithm of the variance, a Gaussian likelihood, and
the mixture of their Gaussians (TabM's authors train the mean alone). The distillation is that of
`netfission.tasks.regression`. Multiply-accumulates are those of one row, not counting removed weights. TabM's
scaling of features by member is no matrix product, and not among them.

Prints means and standard deviations over seeds, and writes results/benchmark_tabular.json. Needs the extra
`peers`.

    .venv/bin/python benchmarks/tabular.py --seeds 5
"""

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn

import netfission as nf
from netfission.evaluation.number_metrics import gaussian_nll
from netfission.profiling.macs import run_counted
from netfission.runs.folder import environment
from netfission.tasks.gaussians import mixture, moments
from netfission.tasks.regression import GaussianDistillationLoss

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_tabular.json"
TABLES = {
    "digits": datasets.load_digits,
    "breast cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
}
CONTENDERS = ("single", "deep-ensemble-3", "channels-3", "weights-3", "copies-3", "tabm-3", "tabm-32")
LAYERS, DROPOUT = 3, 0.1  # TabM's defaults, as the two below
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 3e-4
BATCH, PATIENCE = 128, 16


@dataclass(frozen=True)
class Table:
    """Training, validation and test rows, scaled by the training rows.

    Attributes:
        rows: float32 `(n, features)` of each split.
        targets: int64 `(n,)`, or float32 `(n, 1)`, of each split.
        outputs: of a network: classes, or mean and logarithm of the variance.
        unit: standard deviation of the targets; None if they are classes.
    """

    rows: list[Tensor]
    targets: list[Tensor]
    outputs: int
    unit: float | None


def load(name: str, seed: int) -> Table:
    """Return a table divided by a seed."""
    bunch = TABLES[name]()
    rows, targets = torch.tensor(bunch.data).float(), torch.tensor(bunch.target)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    fifth = len(rows) // 5
    splits = order[2 * fifth :], order[:fifth], order[fifth : 2 * fifth]
    std, center = torch.std_mean(rows[splits[0]], dim=0)
    rows = (rows - center) / torch.where(std > 0, std, 1)  # pixels at the corners are all 0
    outputs, unit = 2, None
    if targets.is_floating_point():
        spread, middle = torch.std_mean(targets[splits[0]])
        targets, unit = ((targets - middle) / spread).float().unsqueeze(1), float(spread)
    else:
        outputs = int(targets.max()) + 1
    return Table([rows[part] for part in splits], [targets[part] for part in splits], outputs, unit)


class Members(nn.Module):
    """Networks side by side: rows → outputs `(batch, members, outputs)`."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, rows: Tensor) -> Tensor:
        """Run all."""
        return torch.stack([network(rows) for network in self.networks], dim=1)


def mlp(features: int, width: int, outputs: int) -> nn.Sequential:
    """Return an MLP as TabM's backbone is."""
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(features, width), nn.ReLU(), nn.Dropout(DROPOUT)]
        features = width
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def build(contender: str, table: Table, width: int, seed: int) -> nn.Module:
    """Return a contender's network: rows → outputs `(batch, members, outputs)`."""
    torch.manual_seed(seed)
    features, rows = table.rows[0].shape[1], table.rows[0]
    kind, _, count = contender.rpartition("-")
    if kind == "tabm":
        import tabm

        network: nn.Module = tabm.TabM.make(
            n_num_features=features, d_out=table.outputs, d_block=width, n_blocks=LAYERS, k=int(count)
        )
        return network
    networks = [mlp(features, width, table.outputs) for _ in range(3 if kind == "deep-ensemble" else 1)]
    if kind in ("channels", "weights", "copies"):
        return nf.fission(networks[0], int(count), grouping=kind, example_input=rows[:2], seed=seed)
    return Members(networks)


def loss_of(contender: str, table: Table) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a contender's loss of outputs `(batch, members, outputs)`."""
    distils = contender.startswith(("channels", "weights", "copies"))
    reduction: Any = "mean" if contender.startswith("tabm") else "sum"
    weight = 1.0 if distils else 0.0
    if table.unit is None:
        return nf.EnsembleDistillationLoss(weight=weight, reduction=reduction)
    return GaussianDistillationLoss(["target"], weight=weight, reduction=reduction)


def score(outputs: Tensor, targets: Tensor, unit: float | None, average: Any) -> tuple[float, float]:
    """Return the accuracy in percent, or the RMSE in the targets' unit, and the NLL in nats."""
    if unit is None:
        logs = nf.ensemble_log_probabilities(outputs, average)
        right = (logs.argmax(dim=1) == targets).double().mean()
        return 100 * float(right), float(F.nll_loss(logs, targets))
    center, variance, _ = mixture(*moments(outputs))
    error = (center - targets).square().mean().sqrt()
    return unit * float(error), float(gaussian_nll(center, variance, targets).mean())


def train(network: nn.Module, contender: str, table: Table, epochs: int, seed: int) -> dict[str, float]:
    """Train with early stopping, and return what the test rows say of the best epoch."""
    loss = loss_of(contender, table)
    average = "probabilities" if contender.startswith(("deep", "tabm", "single")) else "logits"
    evaluate = partial(score, unit=table.unit, average=average)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    best, best_state, since = float("inf"), copy.deepcopy(network.state_dict()), 0
    for _ in range(epochs):
        network.train()
        for batch in torch.randperm(len(table.rows[0]), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss(network(table.rows[0][batch]), table.targets[0][batch]).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            nll = evaluate(network(table.rows[1]), table.targets[1])[1]
        since += 1
        if nll < best:
            best, best_state, since = nll, copy.deepcopy(network.state_dict()), 0
        if since > PATIENCE:
            break
    network.load_state_dict(best_state)
    with torch.no_grad():
        measure, nll = evaluate(network(table.rows[2]), table.targets[2])
    return {"accuracy" if table.unit is None else "rmse": measure, "nll": nll}


def cell(name: str, contender: str, seeds: int, width: int, epochs: int) -> dict[str, Any]:
    """Train a contender once for each seed."""
    runs = []
    for seed in range(seeds):
        table = load(name, seed)
        network = build(contender, table, width, seed)
        macs = run_counted(network, table.rows[0][:1]).total.effective
        parameters = sum(parameter.numel() for parameter in network.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs.append({"seed": seed, **train(network, contender, table, epochs, seed)})
    return {"table": name, "contender": contender, "macs": macs, "parameters": parameters, "runs": runs}


def shown(row: dict[str, Any]) -> str:
    """Return a cell as a line."""
    measures = [key for key in row["runs"][0] if key != "seed"]
    text = f"{row['table']:13} {row['contender']:15} {row['macs']:>9,} MACs"
    for key in measures:
        values = [run[key] for run in row["runs"]]
        spread = stdev(values) if len(values) > 1 else 0.0
        text += f"  {key} {mean(values):.3f} ± {spread:.3f}"
    return text


def main(flags: Sequence[str] | None = None) -> None:
    """Train, print and record."""
    arguments = _arguments(flags)
    cells = []
    for name in arguments.tables:
        for contender in arguments.contenders:
            cells.append(cell(name, contender, arguments.seeds, arguments.width, arguments.epochs))
            print(shown(cells[-1]), flush=True)
    record = {
        "benchmark": "tabular",
        "width": arguments.width,
        "epochs": arguments.epochs,
        "cells": cells,
        "tabm": version("tabm") if find_spec("tabm") else None,
        "command": "python benchmarks/tabular.py " + " ".join(sys.argv[1:]),
        "environment": environment(),
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {arguments.out}")


def _arguments(flags: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=128, help="of hidden layers (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=150, help="at most (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(flags)
    peers = [contender for contender in arguments.contenders if contender.startswith("tabm")]
    if peers and find_spec("tabm") is None:
        parser.error(f"--contenders {' '.join(peers)} needs the extra peers: pip install 'netfission[peers]'")
    return arguments


if __name__ == "__main__":
    main()
