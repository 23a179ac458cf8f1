"""ResNet-18 on all of CIFAR-100 in several ways at once, in minutes of one GPU.

    full_size.py decode FOLDER              parquet files in FOLDER → FOLDER/train.pt and FOLDER/test.pt
    full_size.py train FOLDER OUT RUN ...   a process for each run; writes OUT/RUN.json when it ends
    full_size.py table OUT                  the figures of the runs in OUT

A RUN is a kind and a seed, such as single-0 or fission-channels-2. `train` ends with the table, and with the
Deep Ensemble of the single networks in it. All follow one recipe: SGD at 0.1 with the
schedule of the paper, batches of 128, shifts and flips, in bfloat16 on a GPU. Images lie on the device.
Runs of one table need the same number of epochs. `--images 128 --epochs 1` tries a run on a CPU. The records
in results/full-size/ are of 21 epochs; on an H200, an epoch of one run beside seven others took 12 s.
"""

import argparse
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor, nn

import netfission as nf
from netfission.evaluation import Evaluation
from netfission.evaluation.evaluate import evaluate_logits
from netfission.methods.schedules import paper
from netfission.runs.folder import environment
from netfission.utils.errors import check_choice, invalid
from netfission.utils.files import write_whole
from netfission.utils.text import align_columns, percent

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of the training images
PEAK_RATE, BATCH, PADDING = 0.1, 128, 4

# Kind → settings of `fission`.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "single": {"exits": 1},
    "fission-channels": {"exits": 3, "grouping": "channels"},
    "multi-exit": {"exits": 1, "linear_exits": [1, 2]},
    "multi-exit-late": {"exits": 1, "linear_exits": [3, 3]},
    "fission-channels-linear": {"exits": 3, "grouping": "channels", "linear_exits": [3, 3]},
    "fission-channels-late": {"exits": 3, "grouping": "channels", "branch_after": [3, 3]},
    "fission-weights": {"exits": 3, "grouping": "weights"},
    "fission-weights-snip": {"exits": 3, "grouping": "weights", "sparsity": 0.5, "criterion": "snip"},
}


def decode(folder: Path) -> None:
    """Write the images and labels of both splits as tensors."""
    from pyarrow.parquet import read_table

    for split in ("train", "test"):
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if not files:
            raise invalid("folder", f"one with parquet files of the {split} split", found=str(folder))
        rows = [row for file in files for row in read_table(file).to_pylist()]
        images = np.stack(
            [np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows]
        )
        content = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        torch.save((content, torch.tensor([row["fine_label"] for row in rows])), folder / f"{split}.pt")
        print(f"{split}: {len(rows):,} images")


def build(kind: str, images: Tensor, labels: Tensor) -> nf.FissionNetwork:
    """Build a ResNet-18 for small images, with weights from PyTorch's global generator, and divide it."""
    model = timm.create_model("resnet18", num_classes=100)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return nf.fission(model, **KINDS[kind], batches=[(images, labels)], example_input=images[:2])


def train_run(run: str, folder: Path, out: Path, epochs: int, limit: int | None) -> None:
    """Train and evaluate one run, and write its record."""
    kind, _, seed = run.rpartition("-")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(int(seed))
    generator = torch.Generator(device).manual_seed(int(seed))
    train, test = (_load(folder / f"{split}.pt", device, limit) for split in ("train", "test"))
    network = build(kind, _normalised(train[0][:512]).cpu(), train[1][:512].cpu())
    network.to(device).to(memory_format=torch.channels_last)
    began = time.perf_counter()
    _train(
        network,
        *train,
        epochs,
        generator,
        lambda epoch: print(f"{run}: epoch {epoch} of {epochs}", flush=True),
    )
    seconds = time.perf_counter() - began
    logits = _logits(network, test[0]).cpu()
    evaluation = evaluate_logits(logits, test[1].cpu(), average="logits")
    torch.save(logits.half(), out / f"{run}.pt")
    record = {
        "run": run,
        "epochs": epochs,
        "images": len(train[1]),
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "evaluation": asdict(evaluation),
        "environment": environment(),
    }
    write_whole(out / f"{run}.json", json.dumps(record, indent=1) + "\n")
    print(f"{run}: accuracy {percent(evaluation.ensemble['top1'], 2)} %", flush=True)


def _load(file: Path, device: str, limit: int | None) -> tuple[Tensor, Tensor]:
    images, labels = torch.load(file, weights_only=True)
    return images[:limit].to(device), labels[:limit].to(device)


def _normalised(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values, dtype=torch.float32).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def _shifted_and_flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift images by up to `PADDING` pixels, with zeros around them, and flip half of them."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, [PADDING] * 4)

    def random(high: int) -> Tensor:
        return torch.randint(0, high, (count, 1), device=images.device, generator=generator)

    rows = random(2 * PADDING + 1) + torch.arange(height, device=images.device)
    columns = random(2 * PADDING + 1) + torch.arange(width, device=images.device)
    columns = torch.where(random(2) == 0, columns.flip(1), columns)
    number = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(3, device=images.device).view(1, -1, 1, 1)
    return padded[number, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    generator: torch.Generator,
    say: Callable[[int], None],
) -> None:
    loss_of = nf.EnsembleDistillationLoss()
    optimizer = torch.optim.SGD(
        network.parameters(), PEAK_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True, foreach=True
    )
    batch = min(BATCH, len(labels))
    steps = len(labels) // batch
    network.train()
    for epoch in range(epochs):
        order = torch.randperm(len(labels), device=labels.device, generator=generator)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * paper((epoch * steps + step) / (epochs * steps))
            index = order[step * batch : (step + 1) * batch]
            inputs = _normalised(_shifted_and_flipped(images[index], generator))
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=labels.is_cuda):
                logits = network(inputs)
            optimizer.zero_grad()
            loss_of(logits.float(), labels[index]).backward()
            optimizer.step()
        say(epoch + 1)
    network.eval()


@torch.inference_mode()
def _logits(network: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        return torch.cat([network(_normalised(part)).float() for part in images.split(500)])


def table(out: Path, labels: Tensor | None = None) -> str:
    """Return the figures of the runs in a folder; with labels also of the single networks' Deep Ensemble."""
    records = [json.loads(file.read_text("utf-8")) for file in sorted(out.glob("*-*.json"))]
    rows = [(record["run"], record["epochs"], Evaluation(**record["evaluation"])) for record in records]
    singles = sorted(out.glob("single-*.pt"))
    if labels is not None and len(singles) > 1:
        logits = torch.cat([torch.load(file, weights_only=True).float() for file in singles], dim=1)
        evaluation = evaluate_logits(logits, labels, average="probabilities")
        rows.append((f"deep ensemble of {len(singles)}", rows[0][1], evaluation))
    head = ["run", "epochs", "accuracy %", "NLL", "ECE %", "exits %"]
    return align_columns([head, *(_cells(name, epochs, found) for name, epochs, found in rows)])


def _cells(name: str, epochs: int, found: Evaluation) -> list[str]:
    exits = ", ".join(f"{100 * figures['top1']:.1f}" for figures in found.exits)
    of_all = found.ensemble
    return [
        name,
        str(epochs),
        f"{100 * of_all['top1']:.2f}",
        f"{of_all['nll']:.3f}",
        f"{100 * of_all['ece']:.2f}",
        exits,
    ]


def _work(*arguments: Any) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    train_run(*arguments)


def train_all(runs: Sequence[str], folder: Path, out: Path, epochs: int, limit: int | None) -> None:
    """Train each run in a process of its own."""
    for run in runs:
        kind, _, seed = run.rpartition("-")
        check_choice("kind", kind, KINDS)
        if not seed.isdecimal():
            raise invalid("run", "a kind and a seed, such as single-0", run)
    out.mkdir(parents=True, exist_ok=True)
    spawn = mp.get_context("spawn")
    processes = [spawn.Process(target=_work, args=(run, folder, out, epochs, limit)) for run in runs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [run for run, process in zip(runs, processes, strict=True) if process.exitcode]
    print(table(out, _load(folder / "test.pt", "cpu", limit)[1]))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(
        prog="full_size.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("decode").add_argument("folder", type=Path)
    of_training = commands.add_parser("train")
    of_training.add_argument("folder", type=Path)
    of_training.add_argument("out", type=Path)
    of_training.add_argument("runs", nargs="+", metavar="RUN", help=f"KIND-SEED; kinds: {', '.join(KINDS)}")
    of_training.add_argument("--epochs", type=int, default=21)
    of_training.add_argument("--images", type=int, help="number of images of each split (default: all)")
    commands.add_parser("table").add_argument("out", type=Path)
    flags = parser.parse_args(arguments)
    if flags.command == "decode":
        decode(flags.folder)
    elif flags.command == "train":
        train_all(flags.runs, flags.folder, flags.out, flags.epochs, flags.images)
    else:
        print(table(flags.out))


if __name__ == "__main__":
    main()
