"""What `netfission train` adds to a bare PyTorch loop over the same model and the same images.

Both train the same fissioned network, one epoch each in turn in one process, so that drift of the machine
affects both equally:

- train: all that the command does from the start of an epoch to the next. It loads images with crop and flip,
  runs Lightning's loop, and writes progress, accuracies, the table of epochs, TensorBoard and a checkpoint.
- bare: normalised float images indexed in a shuffled order, forward, loss, backward and step.

Prints images per second of both, their ratios epoch by epoch (median, range), and the peak memory of each in
a process of its own. Writes results/benchmark_training_overhead.json.

    .venv/bin/python benchmarks/training_overhead.py --data cifar100 --epochs 5
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import netfission as nf
from netfission.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.data import ImageData, TensorSplit
from netfission.runs.folder import environment
from netfission.runs.setup import build_network, load_run_data
from netfission.runs.train import train

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_training_overhead.json"


class BareLoop:
    """The loop of a PyTorch tutorial."""

    def __init__(self, network: nn.Module, data: ImageData, batch_size: int) -> None:
        assert isinstance(data.train, TensorSplit)
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))
        self.images: Tensor = (data.train.images / 255 - mean) / std
        self.labels = data.train.labels
        self.batch_size = batch_size
        self.network = network.train()
        self.loss = nf.EnsembleDistillationLoss()
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        )

    def epoch(self) -> float:
        """Train one epoch; return its seconds."""
        start = time.perf_counter()
        order = torch.randperm(len(self.images))
        for chosen in order[: len(order) // self.batch_size * self.batch_size].split(self.batch_size):
            loss = self.loss(self.network(self.images[chosen]), self.labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return time.perf_counter() - start


class InTurn(Callback):
    """Runs a bare epoch after each epoch of the trainer, and times both."""

    def __init__(self, bare: BareLoop) -> None:
        self.loop = bare
        self.train: list[float] = []
        self.bare: list[float] = []
        self.started = 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        now = time.perf_counter()
        if self.bare:
            self.train.append(now - self.started - self.bare[-1])
        self.started = now

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.bare.append(self.loop.epoch())


def main() -> None:
    """Measure, print and record."""
    arguments = _arguments()
    config = RunConfig(
        DataConfig(arguments.data, validation=0.0, limit_per_class=arguments.images_per_class),
        ModelConfig(arguments.model),
        nf.FissionConfig(exits=3),
        # Two more than count: the first warms both up, and the last is not timed.
        TrainingConfig(epochs=arguments.epochs + 2, accelerator="cpu"),
    )
    data = load_run_data(config.data, seed=0)
    if arguments.only:
        _run_alone(arguments.only, config, data)
        return
    timer = InTurn(BareLoop(copy.deepcopy(build_network(config, data)), data, config.training.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", callbacks=[timer])
    train_times, bare_times = timer.train[1:], timer.bare[1:-1]
    images = len(data.train) // config.training.batch_size * config.training.batch_size
    ratios = [bare / trained for bare, trained in zip(bare_times, train_times, strict=True)]
    memory = {name: _memory_of(name) for name in ("train", "bare")}
    record = {
        "benchmark": "training_overhead",
        "model": arguments.model,
        "exits": 3,
        "images_per_epoch": images,
        "batch_size": config.training.batch_size,
        "epochs": len(ratios),
        "train_images_per_second": [images / seconds for seconds in train_times],
        "bare_images_per_second": [images / seconds for seconds in bare_times],
        "ratio_median": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "peak_memory_mib": memory,
        "command": "python benchmarks/training_overhead.py " + " ".join(sys.argv[1:]),
        "environment": environment(),
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"\n{arguments.model}, 3 exits, {images} images per epoch, n = {len(ratios)} epochs in turn\n"
        f"train  {images / median(train_times):8.1f} images/s   peak {memory['train']} MiB\n"
        f"bare   {images / median(bare_times):8.1f} images/s   peak {memory['bare']} MiB\n"
        f"ratio  {median(ratios):8.3f} (range {min(ratios):.3f}–{max(ratios):.3f})\nwrote {RESULTS.name}"
    )


def _memory_of(which: str) -> int:
    """Return the peak resident memory, in MiB, of two epochs in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--epochs", "0", "--only", which]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(answer.split()[-1])


def _run_alone(which: str, config: RunConfig, data: ImageData) -> None:
    if which == "train":
        with tempfile.TemporaryDirectory() as folder:
            train(config, Path(folder) / "run", progress=False)
    else:
        loop = BareLoop(build_network(config, data), data, config.training.batch_size)
        for _ in range(config.training.epochs):
            loop.epoch()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="digits", help="data set of `netfission train` (default: %(default)s)"
    )
    parser.add_argument("--model", default="cifar-resnet18-w16", help="default: %(default)s")
    parser.add_argument("--images-per-class", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=5, help="epochs that count, after one of warm-up")
    parser.add_argument("--only", choices=["train", "bare"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
