"""Train networks in two processes, each on half of every batch, and compare them with one process.

The processes talk by gloo on the CPU, in float64, so that what is left of rounding is small. Trials:

- `divided`: a network by each grouping under `DistributedDataParallel` for 50 steps, without batch norms and
  with them; and the same network in one process on the whole batches.
- `synchronised`: what PyTorch says to `SyncBatchNorm` on a CPU.
- `moving`: the methods whose masks change during training, by `netfission.runs.train.train` as `torchrun`
  starts it.

Writes results/benchmark_processes.json.

    .venv/bin/python benchmarks/processes.py
"""

import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import netfission as nf
from netfission.config import DataConfig, FissionConfig, MethodConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.data import load_data
from netfission.grouping import GROUPINGS
from netfission.models import create_model
from netfission.runs.folder import environment
from netfission.surgery.masks import masked_weights
from netfission.utils.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_processes.json"
PROCESSES = 2
STEPS = 50
BATCH = 32  # images of all processes together
NETWORKS = ("plain", "batch norm")
METHODS = ("dst-ensemble", "edst-ensemble", "neurotrails")
EPOCHS = 25  # of two steps, of the methods
CLOSE = 1e-9  # largest difference of a weight from one process that is rounding, in float64
TIMEOUT_S = 600

Batch = tuple[Tensor, Tensor]  # images and labels


def make_network(kind: str, grouping: str) -> nf.FissionNetwork:
    """Divide a small network in float64, the same in every process.

    Args:
        kind: one of `NETWORKS`; "plain" has no batch norms, "batch norm" is a Wide ResNet.
        grouping: a name in `GROUPINGS`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("wrn-10-1", 10) if kind == "batch norm" else _plain_model()
    net = nf.fission(
        model, 3, grouping=grouping, sparsity=0.3, criterion="random", example_input=torch.zeros(2, 3, 8, 8)
    )
    return net.double()


def _plain_model() -> nn.Sequential:
    """Return a convolutional network without normalisation, which 50 steps train."""
    stages = [
        nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride, padding=1), nn.ReLU()
        )
        for stride in (1, 2, 2)
    ]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *stages, nn.Flatten(), nn.Linear(64, 10))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


def digits(split: Literal["train", "test"]) -> Batch:
    """Return images of digits, float64 `(n, 3, 8, 8)` in [0, 1], and their labels."""
    data = getattr(load_data("digits"), split)
    return data.images.double().div(255).expand(-1, 3, -1, -1), data.labels


def batches_of_digits(steps: int) -> Iterator[Batch]:
    """Yield the images and labels of as many whole batches."""
    images, labels = digits("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        rows = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        yield images[rows], labels[rows]


@torch.no_grad()
def accuracy(net: nn.Module, state: dict[str, Tensor], images: Tensor, labels: Tensor) -> float:
    """Load a state dict; return the share of images that the ensemble then classifies correctly."""
    net.load_state_dict(state)
    return float((net.eval()(images).mean(dim=1).argmax(dim=1) == labels).double().mean())


def train(net: nn.Module, batches: Iterable[Batch], rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """Train a network on this process's share of each batch, and watch its masks.

    Args:
        net: the network.
        batches: images and labels, of all processes together.
        rank: of this process.
        processes: how many there are.

    Returns:
        `start`: digest of the network before the first step; `masks`: of its masks after each step; `zero`:
        whether removed weights were 0 after each step; `state`: its parameters and buffers at the end.
    """
    start = digest(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    trained = net if processes == 1 else DistributedDataParallel(net)
    masks, zero = [], True
    for images, labels in batches:
        optimizer.zero_grad()
        loss = nf.ensemble_distillation_loss(trained(images[rank::processes]), labels[rank::processes])
        loss.backward()
        optimizer.step()
        masks.append(digest_of_masks(net))
        zero = zero and removed_are_zero(net)
    return {"start": start, "masks": masks, "zero": zero, "state": copy.deepcopy(net.state_dict())}


def digest(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and values of tensors."""
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def digest_of_masks(net: nn.Module) -> str:
    """Return the SHA-256 of all masks of a network."""
    return digest({name: removed for name, _, removed in masked_weights(net)})


def removed_are_zero(net: nn.Module) -> bool:
    """Whether every removed weight is exactly 0."""
    return not any(weight.detach()[removed].any() for _, weight, removed in masked_weights(net))


def compare(
    kind: str, grouping: str, found: Sequence[dict[str, Any]], batches: Sequence[Batch], tested: Batch
) -> dict[str, Any]:
    """Compare what two processes hold at the end with one process, trained here.

    Args:
        kind: of the network, see `make_network`, as `grouping`.
        grouping: by which it is divided.
        found: what `train` returned in each process.
        batches: that they trained on.
        tested: images and labels to classify at the end.

    Returns:
        The record of a trial, which is good if all masks and weights are the same in both processes and those
        of one process, but for the weights of networks with batch norms.
    """
    net = make_network(kind, grouping)
    names = [name for name, _ in net.named_parameters()]

    def flat(state: dict[str, Tensor]) -> Tensor:
        return torch.cat([state[name].flatten() for name in names])

    before = flat(net.state_dict())
    one = train(net, batches)
    after = flat(one["state"])
    first, second = (flat(result["state"]) for result in found)
    record: dict[str, Any] = {
        "trial": "divided",
        "network": kind,
        "grouping": grouping,
        "steps": len(batches),
        "removed_weights": sum(int(removed.sum()) for _, _, removed in masked_weights(net)),
        "same_assignment": all(result["start"] == one["start"] for result in found),
        "same_masks": all(result["masks"] == one["masks"] for result in found),
        "removed_are_zero": all(result["zero"] for result in (*found, one)),
        "same_weights_in_both": torch.equal(first, second),
        "largest_difference": float((first - after).abs().max()),
        "share_of_the_way": float((first - after).norm() / (after - before).norm()),
        "accuracy_of_one_process": accuracy(net, one["state"], *tested),
        "accuracy_of_two": accuracy(net, found[0]["state"], *tested),
    }
    equal = ("same_assignment", "same_masks", "removed_are_zero", "same_weights_in_both")
    near = record["largest_difference"] <= CLOSE or kind == "batch norm"
    return record | {"good": near and all(record[name] for name in equal)}


def train_divided(folder: Path, steps: int) -> None:
    """Train all divided networks in this process, which is one of two; write what each ends in."""
    dist.init_process_group("gloo")
    for kind in NETWORKS:
        for grouping in GROUPINGS:
            result = train(make_network(kind, grouping), batches_of_digits(steps), dist.get_rank(), PROCESSES)
            torch.save(result, folder / f"{kind}-{grouping}-{dist.get_rank()}.pt")
    refusal = refusal_of_synchronised_norms()
    torch.save(refusal, folder / f"synchronised-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def refusal_of_synchronised_norms() -> str:
    """Return what PyTorch says, in one of several processes, to `SyncBatchNorm`; empty if it is trained."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(make_network("batch norm", "weights"))
    try:
        net(digits("train")[0][:BATCH])
    except ValueError as error:
        return str(error)
    return ""


def train_method(folder: Path, method: str) -> None:
    """Train by a method in this process, which is one of two; write the masks after each step."""
    from lightning.pytorch.callbacks import Callback

    from netfission.runs.train import train as train_run

    seen: list[tuple[str, str, bool]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            parameters = dict(module.network.named_parameters())
            seen.append(
                (digest_of_masks(module.network), digest(parameters), removed_are_zero(module.network))
            )

    config = RunConfig(
        DataConfig("digits", limit_per_class=20),
        ModelConfig("wrn-10-1"),
        FissionConfig(exits=2, sparsity=0.8, criterion="erk"),
        TrainingConfig(epochs=EPOCHS, batch_size=50, accelerator="cpu"),
        MethodConfig(method, regrow_every=5),
    )
    train_run(config, folder / method, progress=False, callbacks=[Watch()])
    torch.save(seen, folder / f"{method}-{os.environ['RANK']}.pt")


def compare_method(method: str, found: Sequence[Sequence[tuple[str, str, bool]]]) -> dict[str, Any]:
    """Return the record of a method's trial: whether both processes had the same masks after every step."""
    masks, weights = ([[step[part] for step in process] for process in found] for part in (0, 1))
    record: dict[str, Any] = {
        "trial": "moving",
        "method": method,
        "steps": len(masks[0]),
        "times_masks_moved": sum(a != b for a, b in zip(masks[0], masks[0][1:], strict=False)),
        "same_masks": masks[0] == masks[1],
        "same_weights_in_both": weights[0] == weights[1],
        "removed_are_zero": all(step[2] for process in found for step in process),
    }
    good = all(record[name] for name in ("same_masks", "same_weights_in_both", "removed_are_zero"))
    return record | {"good": good and record["times_masks_moved"] > 0}


def launch(what: str, folder: Path, steps: int) -> None:
    """Run this file in two processes, as torchrun does."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(PROCESSES),
    ]
    command += [__file__, "--steps", str(steps), "--process-of", what, str(folder)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=TIMEOUT_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all trials; return 1 if one ended otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--process-of", nargs=2, help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    if settings.process_of:
        what, place = settings.process_of
        if what == "divided":
            train_divided(Path(place), settings.steps)
        else:
            train_method(Path(place), what)
        return 0
    trials = []
    with tempfile.TemporaryDirectory() as place:

        def results(name: str) -> list[Any]:
            files = [Path(place, f"{name}-{rank}.pt") for rank in range(PROCESSES)]
            return [torch.load(file, weights_only=True) for file in files]

        batches = list(batches_of_digits(settings.steps))
        launch("divided", Path(place), settings.steps)
        for kind in NETWORKS:
            for grouping in GROUPINGS:
                trials.append(compare(kind, grouping, results(f"{kind}-{grouping}"), batches, digits("test")))
                print(json.dumps(trials[-1]), flush=True)
        refusals = results("synchronised")
        trials.append({"trial": "synchronised", "refused": refusals[0], "good": all(refusals)})
        print(json.dumps(trials[-1]), flush=True)
        for method in METHODS:
            launch(method, Path(place), settings.steps)
            trials.append(compare_method(method, results(method)))
            print(json.dumps(trials[-1]), flush=True)
    content = {
        "benchmark": "processes",
        "command": "python benchmarks/processes.py",
        "environment": environment(),
        "trials": trials,
    }
    write_whole(settings.out, json.dumps(content, indent=1) + "\n")
    return int(not all(trial["good"] for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
