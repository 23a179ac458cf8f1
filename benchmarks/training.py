"""How long a training step takes, over the single network's.

A step is forward, loss, backward and SGD with Nesterov momentum 0.9 and weight decay 5e-4, in train mode, on
the loss that each contender trains on, which is listed below the tables. The learning rate is 0: the same
work, and no round meets other weights than the last. Two contenders are there for what they lack: beside
them, what distillation and masks add to a step is printed.

Runtimes: eager, and compiled (network and loss by torch.compile, inductor; the optimiser's step stays eager).

The contenders of a network step in turn, round by round. Each cell (network, runtime) is written as soon as
it is done, into results/benchmark_training.json, and is not run again.

    .venv/bin/python benchmarks/training.py --networks resnet18 --runtimes eager
"""

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from cells import (
    CellFile,
    Conditions,
    Entrants,
    Figures,
    Run,
    Settings,
    check_positive,
    closing,
    command,
    compiled_whole,
    measure,
    parser,
    run_cells,
)
from contenders import CONTENDERS, WITHOUT, DeepEnsemble, Loss
from netfission.profiling.timing import Quartiles

ALL = CONTENDERS | WITHOUT
# What it adds → of a step with it, and of the same without.
SHARES = {"distillation": ("channels-3", "channels-3-cross-entropy"), "masks": ("weights-3", "copies-3")}


class Learner(nn.Module):
    """A network and what it trains on: images, labels → loss."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images and labels → loss, a scalar."""
        return self.loss(self.network, images, labels)


RUNTIMES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda learner: learner,
    "compiled": compiled_whole,
}


def step_of(learners: Iterable[nn.Module], images: Tensor, labels: Tensor) -> Run:
    """One training step of each learner in turn."""
    learners = list(learners)
    parameters = [
        parameter for learner in learners for parameter in learner.parameters() if parameter.requires_grad
    ]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def step() -> None:
        for learner in learners:
            learner(images, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record; returns the exit status."""
    return command(_work, arguments)


def _work(arguments: Sequence[str] | None) -> None:
    flags = parser("training", __doc__, RUNTIMES, ALL)
    flags.add_argument("--batch", type=int, help="images of a step (default: 128 of 32 × 32, else 32)")
    given = flags.parse_args(arguments)
    check_positive("batch", given.batch)
    conditions = Conditions.of(given, RUNTIMES, ALL)
    run_cells(
        CellFile(given.out, "training"),
        [
            conditions.settings(network, runtime, given.batch or (128 if network.side == 32 else 32))
            for network in conditions.networks
            for runtime in conditions.runtimes
        ],
        conditions,
        _cell,
        _shares,
    )
    print("\ntrained on:")
    for contender in conditions.contenders.values():
        print(f"  {contender.title}: {contender.trains_on}")
    print(
        closing(conditions, "A training step: forward, loss, backward, SGD with momentum and weight decay.")
    )
    print(f"wrote {given.out}")


def _cell(settings: Settings, entrants: Entrants, images: Tensor, conditions: Conditions) -> Figures:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(settings["classes"], images.shape[:1], generator=generator).to(images.device)
    runtime = RUNTIMES[settings["runtime"]]

    def prepare(name: str, network: nn.Module) -> Run:
        loss = conditions.contenders[name].loss
        networks = network.train().members if isinstance(network, DeepEnsemble) else [network.train()]
        return step_of([runtime(Learner(each, loss)) for each in networks], images, labels)

    figures = measure(entrants, prepare, conditions, len(images))
    for name, contender in conditions.contenders.items():
        figures["contenders"][name]["trains_on"] = contender.trains_on
    return figures | {"added_to_a_step": _added(figures["contenders"])}


def _added(figures: Figures) -> Figures:
    """What distillation and masks add to a step: its time over the same step's without, less 1."""
    added = {}
    for what, names in SHARES.items():
        seconds = [figures.get(name, {}).get("seconds") for name in names]
        if None not in seconds:
            share = Quartiles.from_values([full / part - 1 for full, part in zip(*seconds, strict=True)])
            added[what] = {"median": share.median, "quartiles": [share.lower, share.upper]}
    return added


def _shares(cell: Figures) -> str:
    lines = []
    for what, share in cell["added_to_a_step"].items():
        lower, upper = share["quartiles"]
        verb = "add" if what == "masks" else "adds"
        lines.append(
            f"{what} {verb} {share['median']:.1%} (quartiles {lower:.1%} to {upper:.1%}) "
            f"to a step of {ALL[SHARES[what][0]].title}"
        )
    return "".join(f"\n{line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
