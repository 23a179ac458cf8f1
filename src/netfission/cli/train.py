"""`netfission train`."""

from pathlib import Path

from jsonargparse import Namespace

from netfission.cli.parser import PARTS, Parser, run_config
from netfission.config import RunConfig


def parser() -> Parser:
    """The command's arguments."""
    own = Parser(description=run.__doc__)
    own.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    for part in PARTS:
        own.add_class_arguments(part)
    own.add_argument(
        "--out", type=str | None, help="the run's folder (default: runs/ and a name from the settings)"
    )
    own.add_argument("--resume", action="store_true", help="go on with the run that the folder holds")
    return own


def run(settings: Namespace) -> None:
    """Train, evaluate and save one network."""
    config = run_config(settings)
    out = Path(settings.out or Path("runs") / default_name(config))
    print(f"writing to {out}", flush=True)
    try:
        from netfission.runs.train import train as train_run

        evaluation = train_run(config, out, resume=settings.resume)
    except KeyboardInterrupt as error:
        from netfission.runs.folder import RunFolder

        begun = RunFolder(out).config.is_file()
        way = "with --resume goes on" if begun else "starts over"
        raise KeyboardInterrupt(f"stopped; the same command {way}") from error
    if evaluation is not None:
        from netfission.runs.folder import RunFolder

        reliability = RunFolder(out).load_reliability()
        assert reliability is not None
        print(f"\ntest split of {config.data.data}\n{evaluation.table()}\n{reliability.summary()}")
        print(f"wrote {out}")


def default_name(config: RunConfig) -> str:
    """A folder's name that tells a run from others."""
    data, fission, method = Path(config.data.data).name, config.fission, config.method.method
    model = config.model.model.replace("/", "-")
    pruned = f"-{fission.criterion}{fission.sparsity:g}" if fission.sparsity else ""
    way = f"{fission.exits}exits-{fission.grouping}" if method == "fission" else f"{method}{fission.exits}"
    return f"{data}-{model}-{way}{pruned}-seed{fission.seed}"
