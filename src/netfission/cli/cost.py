"""`netfission cost`."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from netfission.cli.parser import Parser, flag_name
from netfission.config import FissionConfig, RunConfig
from netfission.utils.errors import (
    MOST_ROUNDS,
    MOST_THREADS,
    check_image_size,
    check_positive_integer,
    invalid,
)
from netfission.utils.text import printable

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASSES = 10  # of a model whose cost alone is measured
_MOST_CLASSES = 1_000_000


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__, config=True)
    parser.add("network", str, help="a model's name, see `netfission train --help`, or a run's folder")
    model = parser.add_argument_group("model")
    parser.add("--classes", int, CLASSES, "number of classes of a model", group=model)
    parser.add(
        "--image-size",
        int | None,
        help="height and width of a model's images (default: timm's, 32 for cifar-… and wrn-…, or 224)",
        group=model,
    )
    parser.add_settings("fission", FissionConfig)
    measurement = parser.add_argument_group("measurement")
    parser.add("--batch-sizes", list[int], [1, 32], "batch sizes of inference", group=measurement)
    parser.add("--rounds", int, 20, "number of timed runs of each network, in turn", group=measurement)
    parser.add("--threads", int | None, help="number of CPU threads (default: PyTorch's)", group=measurement)
    parser.add("--device", Literal["auto", "cpu", "cuda"], "auto", "device to run on", group=measurement)
    parser.add(
        "--out",
        str | None,
        help="file to write the report to, ending in .json",
        group=measurement,
        metavar="FILE",
    )
    return parser


def run(settings: Namespace) -> None:
    """Measure a network's cost beside the single network's: parameters, MACs, memory and time."""
    from netfission.profiling.cost import cost as cost_of
    from netfission.utils.files import write_whole
    from netfission.utils.outputs import check_out

    out = None if settings.out is None else Path(settings.out)
    if out is not None and (out.suffix != ".json" or out.is_dir() or not out.parent.is_dir()):
        raise invalid("--out", "a file ending in .json, in a folder that exists", found=str(out))
    if out is not None:
        check_out("--out", out)
    check_positive_integer("--rounds", settings.rounds, MOST_ROUNDS)
    device = _device(settings.device)
    with _threads(settings.threads):
        title, network, single, images = _network_and_single(settings)
        if sys.stderr.isatty():
            print(f"measuring {title} on {device} …", file=sys.stderr, flush=True)
        measured = cost_of(
            network.to(device).eval(),
            images.to(device),
            single.to(device).eval(),
            batch_sizes=settings.batch_sizes,
            rounds=settings.rounds,
        )
    print(f"{title}, beside the single network\n\n{measured.table()}")
    if out is not None:
        write_whole(out, measured.to_json())
        print(f"\nwrote {printable(out)}")


def _network_and_single(settings: Namespace) -> "tuple[str, nn.Module, nn.Module, Tensor]":
    """Return a title, the network that the settings name, the model it is made of, and images."""
    import torch

    from netfission.algorithm import fission
    from netfission.models import create_model
    from netfission.runs.folder import RunFolder
    from netfission.utils.seeds import seeded

    given = {
        field.name: getattr(settings, field.name)
        for field in fields(FissionConfig)
        if hasattr(settings, field.name)
    }
    chosen = RunConfig.from_dict(given).fission
    folder = RunFolder(Path(settings.network))
    if folder.config.is_file() or folder.spec.is_file():
        for name, default in (("classes", CLASSES), ("image_size", None)):
            if (value := getattr(settings, name)) != default:
                given[name] = value
        for name, value in given.items():
            raise invalid(flag_name(name), "left out for a run, which has its own", value)
        network, spec = folder.load_fission(any_task=True)
        chosen = FissionConfig(**spec.fission)
        return _title(spec.model or "your own", chosen), network, spec.single(), torch.randn(1, *spec.shape)
    check_positive_integer("--classes", settings.classes, _MOST_CLASSES)
    size = None
    if settings.image_size is not None:
        side = check_image_size("--image-size", settings.image_size)
        size = (side, side)
    with seeded(chosen.seed):
        try:
            single = create_model(settings.network, settings.classes, image_size=size)
        except ValueError as error:
            if not Path(settings.network).exists():
                raise
            found = f"{settings.network} without a run"
            raise invalid("network", "a run's folder or a model's name", found=found) from error
        side = settings.image_size or _side(settings.network, single)
        images = torch.randn(16, 3, side, side)
        labels = torch.randint(settings.classes, (16,))
    network = fission(single, **asdict(chosen), batches=[(images, labels)])
    return _title(settings.network, chosen), network, single, images


def _title(model: str, chosen: FissionConfig) -> str:
    linear = f", linear exits: {chosen.linear}" if chosen.linear else ""
    return (
        f"{model}, exits: {chosen.exits}{linear}, grouping: {chosen.grouping}, sparsity: {chosen.sparsity:g}"
    )


def _side(name: str, model: "nn.Module") -> int:
    from netfission.surgery.example import input_size

    if name.startswith(("cifar-", "wrn-")):
        return 32
    return (input_size(model) or (3, 224, 224))[-1]


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise invalid("--device", "auto or cpu", name, hint="no GPU can be used here")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Let operations on a CPU use `number` threads for a while."""
    import torch

    before = torch.get_num_threads()
    if number is not None:
        check_positive_integer("--threads", number, MOST_THREADS)
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
