"""What masks that hold in every forward pass add to a training step and to inference.

Three networks with the same weights take turns in one process:

- now: the network as `netfission.fission` returns it;
- hooks: the same layers without masks; gradients and weights are set to 0 only by hooks after `backward` and
  after the optimiser's step, and the paths' stages are called one by one (netfission 0.1.0);
- none: without masks, so that training moves the removed weights.

A step is forward, loss, backward and SGD with momentum 0.9. Inference is of one image, in eval mode, not
deployed. Prints each median over that of `hooks`, with quartiles, and writes results/benchmark_masks.json.

    .venv/bin/python benchmarks/masks.py --rounds 15
"""

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import netfission as nf
from netfission.models import create_model
from netfission.runs.folder import environment
from netfission.surgery.masks import discard_masks, masked_weights

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_masks.json"


class StageByStage(nn.Module):
    """A `FissionNetwork` that calls stages and heads, not paths."""

    def __init__(self, network: nf.FissionNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits `(batch, exits, classes)`."""
        trunk, *branches = self.network.exit_paths
        features = [self.network.stem(images)]
        for stage in trunk.stages:
            features.append(stage(features[-1]))
        logits = [trunk.head(features[-1])]
        for path, after in zip(branches, self.network.branch_after, strict=True):
            logits.append(path(features[after]))
        return torch.stack(logits, dim=1)


def without_masks(network: nf.FissionNetwork) -> nf.FissionNetwork:
    """Return a copy that can be trained and whose removed weights start at 0."""
    network = copy.deepcopy(network)
    discard_masks(network)
    return network.requires_grad_(True)


def with_hooks(network: nf.FissionNetwork) -> nn.Module:
    """Return a copy whose gradients and weights are set to 0 by hooks alone."""
    plain = without_masks(network)
    masks: dict[Tensor, Tensor] = {
        plain.get_parameter(name): removed.clone() for name, _, removed in masked_weights(network)
    }

    def after_backward(weight: Tensor) -> None:
        assert weight.grad is not None
        weight.grad.masked_fill_(masks[weight], 0)

    @torch.no_grad()
    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight in masks:
                    weight.masked_fill_(masks[weight], 0)

    for weight in masks:
        weight.register_post_accumulate_grad_hook(after_backward)
    register_optimizer_step_post_hook(after_step)
    return StageByStage(plain)


def training_step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return one step."""
    loss = nf.EnsembleDistillationLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        network.train()
        optimizer.zero_grad()
        loss(network(images), labels).backward()
        optimizer.step()

    return step


def inference(network: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return one forward pass of one image."""

    @torch.no_grad()
    def run() -> None:
        network.eval()(images[:1])

    return run


def compare(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, Any]:
    """Run in turn, from another one each round; return seconds and ratios to `hooks`."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    rows = {}
    for name in names:
        ratios = [mine / hooks for mine, hooks in zip(seconds[name][1:], seconds["hooks"][1:], strict=True)]
        lower, _, upper = quantiles(ratios, n=4, method="inclusive")
        rows[name] = {
            "seconds_median": median(seconds[name][1:]),
            "ratio_median": median(ratios),
            "ratio_quartiles": [lower, upper],
        }
    return rows


def main(flags: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    arguments = _arguments(flags)
    cells = []
    for model, grouping in itertools.product(arguments.models, ("channels", "weights")):
        torch.manual_seed(0)
        images, labels = torch.randn(arguments.batch, 3, 32, 32), torch.randint(100, (arguments.batch,))
        net = nf.fission(create_model(model, 100), 3, grouping=grouping, example_input=images[:2])
        networks = {"now": net, "hooks": with_hooks(net), "none": without_masks(net)}
        work = {
            "training step": {
                name: training_step(network, images, labels) for name, network in networks.items()
            },
            "inference of one image": {
                name: inference(network, images) for name, network in networks.items()
            },
        }
        for what, runs in work.items():
            rounds = arguments.rounds * (1 if what == "training step" else 10)
            rows = compare(runs, rounds)
            cells.append(
                {"model": model, "grouping": grouping, "measured": what, "rounds": rounds, "networks": rows}
            )
            for name, row in rows.items():
                lower, upper = row["ratio_quartiles"]
                print(
                    f"{model}, by {grouping}, {what}, {name:5}: {row['seconds_median']:8.4f} s, "
                    f"{row['ratio_median']:.3f} ({lower:.3f} to {upper:.3f}) of hooks",
                    flush=True,
                )
    record = {
        "benchmark": "masks",
        "batch_size": arguments.batch,
        "exits": 3,
        "cells": cells,
        "command": "python benchmarks/masks.py " + " ".join(sys.argv[1:]),
        "environment": environment(),
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {arguments.out}")


def _arguments(flags: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["cifar-resnet18", "wrn-16-2"])
    parser.add_argument("--batch", type=int, default=64, help="images per step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s, after one of warm-up")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(flags)


if __name__ == "__main__":
    main()
