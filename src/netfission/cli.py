"""The command `netfission`: parse, build, run."""

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from netfission.fission import FissionConfig
from netfission.training.config import DataConfig, ModelConfig, RunConfig, TrainingConfig

PARTS = (DataConfig, ModelConfig, FissionConfig, TrainingConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 when the work failed, 2 for a bad request."""
    warnings.showwarning = _one_line_warning
    try:
        settings = _parser().parse_args(arguments)
        command = settings.command
        COMMANDS[command](settings[command])
    except (ArgumentError, ValueError, OSError) as error:
        return _report(error, 1 if getattr(error, "errno", None) == errno.ENOSPC else 2)
    except RuntimeError as error:
        return _report(error, 1)
    except KeyboardInterrupt:
        return _report(KeyboardInterrupt("stopped; the same command with --resume goes on"), 130)
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
    """Evaluate a run on its test split."""
    from netfission.training.folder import RunFolder
    from netfission.training.run import evaluate as evaluate_run

    folder = RunFolder(Path(settings.run))
    config = folder.load_config()
    if settings.data:
        config = RunConfig.from_dict(config.to_dict() | {"data": settings.data})
    print(f"{evaluate_run(folder, config).table()}\nwrote {folder.evaluation}")


def demo(settings: Namespace) -> None:
    """Compare a network with its three-exit fission on real digits, in under 3 minutes."""
    from netfission.demo import run_demo

    run_demo(Path(settings.out), seeds=settings.seeds)


COMMANDS = {"demo": demo, "evaluate": evaluate, "train": train}


def default_name(config: RunConfig) -> str:
    """A folder's name that tells a run from others."""
    data, fission = Path(config.data.data).name, config.fission
    model = config.model.model.replace("/", "-")
    pruned = f"-{fission.criterion}{fission.sparsity:g}" if fission.sparsity else ""
    return f"{data}-{model}-{fission.exits}exits-{fission.grouping}{pruned}-seed{fission.seed}"


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
    commands.add_subcommand("evaluate", again, help=evaluate.__doc__)

    show = _Parser(description=demo.__doc__)
    show.add_argument("--out", type=str, default="demo", help="folder for its runs, table and picture")
    show.add_argument("--seeds", type=int, default=5, help="how many times each network is trained")
    commands.add_subcommand("demo", show, help=demo.__doc__)
    return parser


def _run_config(settings: Namespace) -> RunConfig:
    from netfission.data.sources import NAMES

    flat: dict[str, Any] = settings.as_dict()
    chosen = {k: v for k, v in flat.items() if k not in ("config", "out", "resume")}
    if chosen["data"] not in NAMES and Path(chosen["data"]).exists():
        chosen["data"] = str(Path(chosen["data"]).resolve())  # so that the run is found from anywhere
    return RunConfig.from_dict(chosen)


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
