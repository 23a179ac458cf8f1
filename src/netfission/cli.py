"""The command `netfission`: parse, build, run."""

import errno
import os
import sys
import warnings
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import Tensor, nn

from netfission.experiments.contenders import CONTENDERS
from netfission.experiments.named import named_grids
from netfission.files import write_whole
from netfission.fission import FissionConfig, fission, input_size
from netfission.training.config import DataConfig, MethodConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.words import one_of

if TYPE_CHECKING:
    from netfission.experiments.comparison import Comparison

PARTS = (DataConfig, ModelConfig, FissionConfig, MethodConfig, TrainingConfig)
CLASSES = 10  # of a model that is only costed
LOSE = 0.2  # points of accuracy, of a cascade


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 when the work failed, 2 for a bad request."""
    warnings.showwarning = _one_line_warning
    command = ""
    try:
        settings = _parser().parse_args(arguments)
        command = settings.command
        COMMANDS[command](settings[command])
    except (ArgumentError, ValueError, OSError) as error:
        return _report(error, 1 if getattr(error, "errno", None) == errno.ENOSPC else 2)
    except RuntimeError as error:
        return _report(error, 1)
    except KeyboardInterrupt:
        again = " with --resume" if command == "train" else ""
        return _report(KeyboardInterrupt(f"stopped; the same command{again} goes on"), 130)
    return 0


def train(settings: Namespace) -> None:
    """Train, evaluate and save one network."""
    from netfission.training.run import train as train_run

    config = _run_config(settings)
    out = Path(settings.out or Path("runs") / default_name(config))
    print(f"writing to {out}", flush=True)
    evaluation = train_run(config, out, resume=settings.resume)
    if evaluation is not None:
        print(f"\ntest split of {config.data.data}\n{evaluation.table()}\nwrote {out}")


def evaluate(settings: Namespace) -> None:
    """Evaluate a run on its test split; with --cascade, what stopping early saves and costs."""
    from netfission.training.folder import RunFolder
    from netfission.training.run import evaluate as evaluate_run
    from netfission.training.run import evaluate_cascade

    folder = RunFolder(Path(settings.run))
    config = folder.load_config()
    if settings.data:
        config = RunConfig.from_dict(config.to_dict() | {"data": settings.data})
    cascade = {name: settings[name] for name in ("lose", "spend", "rule", "single")}
    if not settings.cascade:
        for name, value in cascade.items():
            if value is not None:
                raise ValueError(f"{name}={value}: goes with --cascade")
        print(f"{evaluate_run(folder, config).table()}\nwrote {folder.evaluation}")
        return
    if settings.lose is None and settings.spend is None:
        cascade["lose"] = LOSE
    cascade["rule"] = settings.rule or "margin"
    cascade["single"] = RunFolder(Path(settings.single)) if settings.single else None
    print(evaluate_cascade(folder, config, **cascade).table())
    print(f"wrote cascade.json, cascade.png and cascade.svg in {folder.path}")


def compare(settings: Namespace) -> None:
    """Compare methods over seeds under one recipe: accuracy, likelihood, calibration and cost."""
    from netfission.experiments.compare import compare as compare_grid
    from netfission.experiments.contenders import find_contender
    from netfission.experiments.grid import Grid

    contenders = {name: find_contender(name) for name in settings.methods}
    if not contenders:
        raise ValueError("methods=[]: takes one method or more")
    for name in ("seeds", "workers", "rounds"):
        _from_one(name, settings[name])
    reference = one_of("reference", settings.reference or next(iter(contenders)), contenders)
    common = _chosen(settings, {"methods", "seeds", "reference", "workers", "ray", "rounds"})
    out = Path(settings.out)
    print(f"writing to {out}", flush=True)
    grid = Grid(contenders, range(settings.seeds), common, reference)
    _tell(compare_grid(grid, out, **_means(settings)), out)


def _means(settings: Namespace) -> dict[str, Any]:
    """How a grid's runs are done and timed."""
    return {name: settings[name] for name in ("workers", "ray", "rounds")}


def _tell(comparison: "Comparison", out: Path) -> None:
    print(f"\n{comparison.table()}\n\nwrote comparison.txt, .json, .png and .svg in {out}")


def reproduce(settings: Namespace) -> None:
    """Do a named grid of runs, the paper's or our own, and compare what it compares."""
    from netfission.experiments.compare import compare as compare_grid
    from netfission.experiments.named import find_grid

    file = find_grid(settings.grid)
    changes = {} if settings.data is None else {"data": _found(settings.data)}
    grid = file.at(settings.scale, seeds=settings.seeds, **changes)
    for name in ("workers", "rounds"):
        _from_one(name, settings[name])
    out = Path(settings.out or Path("reproduce") / f"{file.name}-{settings.scale}")
    print(f"{file.title}: {len(grid.cells())} runs, writing to {out}", flush=True)
    _tell(compare_grid(grid, out, **_means(settings)), out)


def cost(settings: Namespace) -> None:
    """Measure what a network costs beside the single one: parameters, MACs, memory, time."""
    from netfission.cost import cost as cost_of

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


def demo(settings: Namespace) -> None:
    """Compare a network with its three-exit fission on real digits, in under 3 minutes."""
    from netfission.demo import run_demo

    run_demo(Path(settings.out), settings.seeds, settings.grouping)


COMMANDS = {
    "compare": compare,
    "cost": cost,
    "demo": demo,
    "evaluate": evaluate,
    "reproduce": reproduce,
    "train": train,
}


def default_name(config: RunConfig) -> str:
    """A folder's name that tells a run from others."""
    data, fission, method = Path(config.data.data).name, config.fission, config.method.method
    model = config.model.model.replace("/", "-")
    pruned = f"-{fission.criterion}{fission.sparsity:g}" if fission.sparsity else ""
    way = f"{fission.exits}exits-{fission.grouping}" if method == "fission" else f"{method}{fission.exits}"
    return f"{data}-{model}-{way}{pruned}-seed{fission.seed}"


def _parser() -> ArgumentParser:
    parser = _Parser(
        prog="netfission",
        description="Turn one image classifier into a multi-exit self-ensemble, train it and measure it.",
        version=version("netfission"),
    )
    commands = parser.add_subcommands(dest="command", required=True)

    run = _Parser(description=train.__doc__)
    run.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    for part in PARTS:
        run.add_class_arguments(part)
    run.add_argument(
        "--out", type=str | None, help="the run's folder (default: runs/ and a name from the settings)"
    )
    run.add_argument("--resume", action="store_true", help="go on with the run that the folder holds")
    commands.add_subcommand("train", run, help=train.__doc__)

    again = _Parser(description=evaluate.__doc__)
    again.add_argument("run", type=str, help="the run's folder")
    again.add_argument(
        "--data", type=str | None, help="where the run's data set is now (default: where it was)"
    )
    again.add_argument(
        "--cascade", action="store_true", help="run exits one after another and stop early when sure"
    )
    again.add_argument(
        "--lose",
        type=float | None,
        help=f"points of accuracy that a cascade may lose against all exits (default: {LOSE})",
    )
    again.add_argument(
        "--spend",
        type=float | None,
        help="MACs that a cascade may spend on average, over the single network's (instead of --lose)",
    )
    again.add_argument(
        "--rule",
        type=Literal["margin", "confidence", "agreement"] | None,
        help="what makes a cascade sure: how far apart the two largest probabilities are (default), the "
        "largest one, or exits that agree",
    )
    again.add_argument(
        "--single", type=str | None, help="folder of a run of the same model with one exit, to show beside"
    )
    commands.add_subcommand("evaluate", again, help=evaluate.__doc__)

    beside = _Parser(description=compare.__doc__)
    beside.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    beside.add_argument(
        "--methods",
        type=list[str],
        default=["single", "deep-ensemble", "fission-channels"],
        help=f"as a list, of {', '.join(CONTENDERS)}",
    )
    beside.add_argument("--seeds", type=int, default=3, help="runs of each method, from seeds 0, 1, …")
    beside.add_argument(
        "--reference", type=str | None, help="the method to take differences to (default: the first)"
    )
    for part in PARTS:
        beside.add_class_arguments(part, skip={"method", "seed", "workers"})
    _add_means(beside)
    beside.add_argument("--out", type=str, default="compare", help="folder of records, runs and figures")
    commands.add_subcommand("compare", beside, help=compare.__doc__)

    repeat = _Parser(description=reproduce.__doc__)
    repeat.add_argument("grid", type=str, help=f"{', '.join(named_grids())}, or a YAML file of your own")
    repeat.add_argument("--scale", type=str, default="laptop", help="paper: in full; laptop: hours on a CPU")
    repeat.add_argument("--seeds", type=int | None, help="runs of each contender (default: the grid's)")
    repeat.add_argument("--data", type=str | None, help="where the data set is (default: from the hub)")
    _add_means(repeat)
    repeat.add_argument(
        "--out",
        type=str | None,
        help="folder of records, runs and figures (default: reproduce/GRID-SCALE)",
    )
    commands.add_subcommand("reproduce", repeat, help=reproduce.__doc__)

    price = _Parser(description=cost.__doc__)
    price.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    price.add_argument(
        "network", type=str, metavar="MODEL|RUN", help="a model's name, as train takes it, or a run's folder"
    )
    price.add_class_arguments(FissionConfig)
    price.add_argument("--classes", type=int, default=CLASSES, help="of a model")
    price.add_argument(
        "--image_size",
        type=int | None,
        help="height and width of a model's images (default: timm's own, 32 for cifar-… and wrn-…, else 224)",
    )
    price.add_argument("--batch_sizes", type=list[int], default=[1, 32], help="of inference, as a list")
    price.add_argument("--rounds", type=int, default=20, help="timed runs of each network, in turn")
    price.add_argument("--threads", type=int | None, help="of the CPU (default: what PyTorch takes)")
    price.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to run")
    price.add_argument("--out", type=str | None, help="JSON file to keep the figures in")
    commands.add_subcommand("cost", price, help=cost.__doc__)

    show = _Parser(description=demo.__doc__)
    show.add_argument("--out", type=str, default="demo", help="folder for its runs, table and picture")
    show.add_argument("--seeds", type=int, default=5, help="how many times each network is trained")
    show.add_argument("--grouping", type=str, default="channels", help="channels, weights or copies")
    commands.add_subcommand("demo", show, help=demo.__doc__)
    return parser


def _add_means(parser: ArgumentParser) -> None:
    """Flags for `_means`."""
    parser.add_argument("--workers", type=int, default=1, help="processes that share the runs")
    parser.add_argument(
        "--ray", type=str | None, help="address of a Ray cluster that does the runs: auto, local, HOST:PORT"
    )
    parser.add_argument("--rounds", type=int, default=15, help="how often each contender is timed")


def _run_config(settings: Namespace) -> RunConfig:
    return RunConfig.from_dict(_chosen(settings, {"resume"}))


def _chosen(settings: Namespace, others: Set[str]) -> dict[str, Any]:
    """The settings of runs among those of a command."""
    flat: dict[str, Any] = settings.as_dict()
    chosen = {name: value for name, value in flat.items() if name not in {"config", "out", *others}}
    return chosen | {"data": _found(chosen["data"])}


def _found(data: str) -> str:
    """A data set's name as it is; a folder's path in full, so that the run is found from anywhere."""
    from netfission.data.sources import NAMES

    return data if data in NAMES or not Path(data).exists() else str(Path(data).resolve())


def _from_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name}={value}: takes a whole number from 1")


def _network_and_single(settings: Namespace) -> tuple[str, nn.Module, nn.Module, Tensor]:
    """A title, the network that the settings of `cost` name, the model it is made of, and images."""
    from netfission.models import create_model
    from netfission.training.folder import RunFolder

    chosen = FissionConfig(**{field.name: settings[field.name] for field in fields(FissionConfig)})
    folder = RunFolder(Path(settings.network))
    if folder.config.is_file() or folder.card.is_file():
        defaults = asdict(FissionConfig()) | {"classes": CLASSES, "image_size": None}
        for name, default in defaults.items():
            if settings[name] != default:
                raise ValueError(f"{name}={settings[name]}: goes with a model's name; a run has its own")
        network, card = folder.load_fission()
        chosen = FissionConfig(**card.fission)
        single = create_model(card.model, len(card.classes), in_channels=card.shape[0])
        return _title(card.model, chosen), network, single, torch.randn(1, *card.shape)
    for name in ("classes", "image_size"):
        _from_one(name, settings[name])
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
    _from_one("threads", number)
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Parser(ArgumentParser):
    """Raises what argparse would print and exit with."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(exit_on_error=False, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ArgumentError(None, message) from ex


def _report(error: BaseException, status: int) -> int:
    if os.environ.get("NETFISSION_TRACEBACK"):
        raise error
    print("netfission: " + " ".join(str(error).split()), file=sys.stderr)
    return status


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print("netfission: warning: " + " ".join(str(message).split()), file=sys.stderr)
