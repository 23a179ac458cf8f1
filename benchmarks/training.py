"""Time of a training step over the single network's.

A step is forward, loss, backward and SGD with Nesterov momentum 0.9 and weight decay 5e-4, in train mode. The
losses of the contenders are listed below the tables. The learning rate is 0: the work is the same, and all
rounds have the same weights. Two contenders lack distillation or masks; the benchmark also prints what these
add to a step.

Runtimes: eager, and compiled (network and loss by torch.compile, inductor; the optimiser's step stays eager).

The contenders of a network step in turn, round by round. Each cell (network, runtime) is written to
results/benchmark_training.json as soon as it is done, and is not run again.

    .venv/bin/python benchmarks/training.py --networks resnet18 --runtimes eager
"""

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from cells import (
    BuiltContenders,
    CellFile,
    Conditions,
    Results,
    Run,
    Settings,
    command,
    compiled_whole,
    footnotes,
    measure,
    parser,
    run_cells,
)
from contenders import ABLATIONS, CONTENDERS, DeepEnsemble, Loss
from netfission.profiling.timing import Quartiles
from netfission.utils.errors import check_positive_integer

ALL = CONTENDERS | ABLATIONS
# What is added → contenders with it and without it.
ADDITIONS = {"distillation": ("channels-3", "channels-3-cross-entropy"), "masks": ("weights-3", "copies-3")}


class Learner(nn.Module):
    """A network with its loss: images, labels → loss."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar."""
        return self.loss(self.network, images, labels)


RUNTIMES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda learner: learner,
    "compiled": compiled_whole,
}


def training_step(learners: Iterable[nn.Module], images: Tensor, labels: Tensor) -> Run:
    """Return one training step of all learners, one after another."""
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
    """Measure, print and record; return the exit status."""
    return command(_work, arguments)


def _work(arguments: Sequence[str] | None) -> None:
    flags = parser("training", __doc__, RUNTIMES, ALL)
    flags.add_argument("--batch", type=int, help="images per step (default: 128 of 32 × 32, else 32)")
    given = flags.parse_args(arguments)
    if given.batch is not None:
        check_positive_integer("batch", given.batch)
    conditions = Conditions.from_flags(given, RUNTIMES, ALL)
    run_cells(
        CellFile(given.out, "training"),
        [
            conditions.settings(network, runtime, given.batch or (128 if network.side == 32 else 32))
            for network in conditions.networks
            for runtime in conditions.runtimes
        ],
        conditions,
        _cell,
        _additions_text,
    )
    print("\ntrained on:")
    for contender in conditions.contenders.values():
        print(f"  {contender.title}: {contender.trains_on}")
    print(
        footnotes(conditions, "A training step: forward, loss, backward, SGD with momentum and weight decay.")
    )
    print(f"wrote {given.out}")


def _cell(settings: Settings, built: BuiltContenders, images: Tensor, conditions: Conditions) -> Results:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(settings["classes"], images.shape[:1], generator=generator).to(images.device)
    runtime = RUNTIMES[settings["runtime"]]

    def prepare(name: str, network: nn.Module) -> Run:
        loss = conditions.contenders[name].loss
        members = network.train().members if isinstance(network, DeepEnsemble) else [network.train()]
        return training_step([runtime(Learner(member, loss)) for member in members], images, labels)

    results = measure(built, prepare, conditions, len(images))
    for name, contender in conditions.contenders.items():
        results["contenders"][name]["trains_on"] = contender.trains_on
    return results | {"added_to_step": _added(results["contenders"])}


def _added(rows: Results) -> Results:
    """What distillation and masks add to a step: its time over that of a step without them, less 1."""
    added = {}
    for what, names in ADDITIONS.items():
        seconds = [rows.get(name, {}).get("seconds") for name in names]
        if None not in seconds:
            share = Quartiles.from_values([full / part - 1 for full, part in zip(*seconds, strict=True)])
            added[what] = {"median": share.median, "quartiles": [share.lower, share.upper]}
    return added


def _additions_text(cell: Results) -> str:
    lines = []
    for what, addition in cell["added_to_step"].items():
        lower, upper = addition["quartiles"]
        verb = "add" if what == "masks" else "adds"
        lines.append(
            f"{what} {verb} {addition['median']:.1%} (quartiles {lower:.1%} to {upper:.1%}) "
            f"to a step of {ALL[ADDITIONS[what][0]].title}"
        )
    return "".join(f"\n{line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
