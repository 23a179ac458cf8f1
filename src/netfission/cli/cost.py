"""`netfission cost`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace
from torch import Tensor, nn

from netfission.algorithm import fission
from netfission.cli.parser import Parser, check_positive
from netfission.config import FissionConfig
from netfission.surgery.example import input_size
from netfission.utils.files import write_whole

CLASSES = 10  # of a model that is only costed


def parser() -> Parser:
    """The command's arguments."""
    own = Parser(description=run.__doc__)
    own.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    own.add_argument(
        "network", type=str, metavar="MODEL|RUN", help="a model's name, as train takes it, or a run's folder"
    )
    own.add_class_arguments(FissionConfig)
    own.add_argument("--classes", type=int, default=CLASSES, help="of a model")
    own.add_argument(
        "--image_size",
        type=int | None,
        help="height and width of a model's images (default: timm's own, 32 for cifar-… and wrn-…, else 224)",
    )
    own.add_argument("--batch_sizes", type=list[int], default=[1, 32], help="of inference, as a list")
    own.add_argument("--rounds", type=int, default=20, help="timed runs of each network, in turn")
    own.add_argument("--threads", type=int | None, help="of the CPU (default: what PyTorch takes)")
    own.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to run")
    own.add_argument("--out", type=str | None, help="JSON file to keep the figures in")
    return own


def run(settings: Namespace) -> None:
    """Measure what a network costs beside the single one: parameters, MACs, memory, time."""
    from netfission.profiling.cost import cost as cost_of

    out = Path(settings.out) if settings.out else None
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"out={out}: takes a file in a folder that exists")
    device = _device(settings.device)
    with _threads(settings.threads):
        title, network, single, images = _network_and_single(settings)
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
        print(f"\nwrote {out}")


def _network_and_single(settings: Namespace) -> tuple[str, nn.Module, nn.Module, Tensor]:
    """A title, the network that the settings of `cost` name, the model it is made of, and images."""
    from netfission.models import create_model
    from netfission.runs.folder import RunFolder

    chosen = FissionConfig(**{field.name: settings[field.name] for field in fields(FissionConfig)})
    folder = RunFolder(Path(settings.network))
    if folder.config.is_file() or folder.spec.is_file():
        defaults = asdict(FissionConfig()) | {"classes": CLASSES, "image_size": None}
        for name, default in defaults.items():
            if settings[name] != default:
                raise ValueError(f"{name}={settings[name]}: goes with a model's name; a run has its own")
        network, spec = folder.load_fission()
        chosen = FissionConfig(**spec.fission)
        return _title(spec.model or "your own", chosen), network, spec.single(), torch.randn(1, *spec.shape)
    for name in ("classes", "image_size"):
        check_positive(name, settings[name])
    with torch.random.fork_rng([]):
        torch.manual_seed(chosen.seed)
        try:
            single = create_model(settings.network, settings.classes)
        except ValueError as error:
            raise ValueError(f"{error}; nor is there a run in a folder of that name") from error
        side = settings.image_size or _side(settings.network, single)
        images = torch.randn(16, 3, side, side)
        labels = torch.randint(settings.classes, (16,))
    network = fission(single, **asdict(chosen), batches=[(images, labels)])
    return _title(settings.network, chosen), network, single, images


def _title(model: str, chosen: FissionConfig) -> str:
    return f"{model}, exits: {chosen.exits}, grouping: {chosen.grouping}, sparsity: {chosen.sparsity:g}"


def _side(name: str, model: nn.Module) -> int:
    if name.startswith(("cifar-", "wrn-")):
        return 32
    return (input_size(model) or (3, 224, 224))[-1]


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: no GPU can be used here; takes auto or cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Let operations on a CPU use so many threads for a while."""
    before = torch.get_num_threads()
    check_positive("threads", number)
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
