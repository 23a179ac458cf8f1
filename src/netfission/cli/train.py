"""`netfission train`."""

from argparse import Namespace
from collections.abc import Set as AbstractSet
from pathlib import Path

from netfission.cli.parser import PARTS, Parser, run_config, run_settings
from netfission.config import RECIPES, RunConfig
from netfission.utils.quick import without_collection
from netfission.utils.text import printable


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__, config=True)
    for title, part in PARTS.items():
        parser.add_settings(title, part)
    group = parser.add_argument_group("run")
    parser.add(
        "--out",
        str | None,
        help="the run's folder (default: runs/ and a name from the settings)",
        group=group,
        metavar="FOLDER",
    )
    parser.add(
        "--recipe",
        str | None,
        help=f"settings for a purpose, which the file and flags override: {', '.join(RECIPES)}",
        group=group,
        metavar="NAME",
    )
    parser.add("--resume", True, help="continue the run that the folder holds", group=group)
    return parser


def run(settings: Namespace) -> None:
    """Train, evaluate and save one network."""
    from netfission.runs.setup import with_processes
    from netfission.utils.outputs import is_output

    config = with_processes(run_config(settings), settings.flags | settings.file.keys())
    out = Path(settings.out or Path("runs") / default_name(config))
    try:
        with without_collection():
            from lightning.pytorch.callbacks import LambdaCallback

            from netfission.runs.setup import check_run
            from netfission.runs.train import train as train_run

        check_run(config)
        if not settings.resume:  # which needs the settings that the run began with
            check_given_effects(config, settings, {"resume", "recipe"})

        def announce_folder(is_main: bool) -> None:
            if is_main:
                print(f"writing to {printable(out)}", flush=True)

        # Once the settings are known to be valid.
        announce = LambdaCallback(on_fit_start=lambda trainer, _: announce_folder(trainer.is_global_zero))
        evaluation = train_run(config, out, resume=settings.resume, callbacks=[announce])
    except KeyboardInterrupt as error:
        effect = "with --resume goes on" if is_output(out) else "starts over"
        raise KeyboardInterrupt(f"stopped; the same command {effect}") from error
    if evaluation is not None:
        from netfission.runs.folder import RunFolder

        reliability = RunFolder(out).load_reliability()
        print(f"\ntest split of {printable(config.data.data)}\n{evaluation.table(config.fission.linear)}")
        if reliability is not None:
            print(reliability.summary())
        print(f"wrote {printable(out)}")


def check_given_effects(config: RunConfig, settings: Namespace, others: AbstractSet[str]) -> None:
    """Check that flags have an effect, and settings of the file unless flags take it from them.

    Args:
        config: the settings of the run.
        settings: the arguments of the command.
        others: see `run_settings`.

    Raises:
        ValueError: a setting that was given has no effect.
    """
    from netfission.methods.effects import check_effects, chosen, unmet_condition
    from netfission.methods.registry import check_settings

    try:
        by_file = RunConfig.from_dict(settings.file)
        check_settings(by_file)
    except ValueError:  # without the flags, it is not valid
        by_file = config
    # A file may hold every setting, as a run's config.yaml does; a flag is there for its effect.
    in_vain = {name for name in chosen(settings.file) if unmet_condition(name, by_file)}
    given = run_settings(settings, others)
    check_effects(config, [name for name in given if name in settings.flags | in_vain])


def default_name(config: RunConfig) -> str:
    """Return a folder's name that distinguishes a run from others."""
    data, fission, method = printable(Path(config.data.data).name), config.fission, config.method.method
    model = config.model.model
    is_folder = model.startswith("hf/") and Path(model.removeprefix("hf/")).is_dir()
    model = f"hf-{Path(model).name}" if is_folder else model.replace("/", "-")
    pruned = f"-{fission.criterion}{fission.sparsity:g}" if fission.sparsity else ""
    scheme = f"{fission.exits}exits-{fission.grouping}" if method == "fission" else f"{method}{fission.exits}"
    linear = f"-linear-{'-'.join(map(str, fission.linear_exits))}" if fission.linear_exits else ""
    solved = "-reconstructed" if fission.reconstruct else ""
    return f"{data}-{model}-{scheme}{linear}{solved}{pruned}-seed{fission.seed}"
