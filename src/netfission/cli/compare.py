"""`netfission compare`."""

from argparse import Namespace
from pathlib import Path

from netfission.cli.grid_options import add_run_options, compare_and_print, run_options
from netfission.cli.parser import PARTS, Parser, run_settings
from netfission.config import DataConfig
from netfission.experiments.contenders import CONTENDERS, usual_contenders
from netfission.utils.errors import MOST_SEEDS, check_choice, check_positive_integer, invalid
from netfission.utils.quick import without_collection


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__, config=True)
    group, usual = parser.add_argument_group("comparison"), ", ".join(usual_contenders())
    parser.add(
        "--methods",
        list[str] | None,
        None,
        f"methods to compare: {', '.join(CONTENDERS)} (default: {usual}, if the task has them)",
        group=group,
    )
    parser.add("--seeds", int, 3, "number of runs of each method, from seeds 0, 1, …", group=group)
    parser.add(
        "--reference",
        str | None,
        help="method that differences are taken to (default: the first)",
        group=group,
    )
    for title, part in PARTS.items():
        parser.add_settings(title, part, skip={"method", "seed", "workers"})
    add_run_options(parser, out="folder of records, runs and figures", default="compare")
    return parser


def run(settings: Namespace) -> None:
    """Compare methods over seeds under one recipe: accuracy, likelihood, calibration and cost."""
    options = run_options(settings)
    with without_collection():
        from netfission.experiments.contenders import find_contender
        from netfission.experiments.grid import Grid
        from netfission.tasks import task_kind

    common = run_settings(settings, {"methods", "seeds", "reference", *options})
    trained = bool(common.get("pretrained")) or common.get("weights") is not None
    # A training one by one cannot stop early, and a user's own choice counts.
    is_open = "one_by_one" not in common and common.get("patience") is None
    methods = settings.methods
    if methods is None:
        methods = usual_contenders(task_kind(common.get("task", DataConfig.task)).methods)
    contenders = {name: find_contender(name, trained=trained and is_open) for name in methods}
    if not contenders:
        raise invalid("--methods", "one method or more", methods)
    check_positive_integer("--seeds", settings.seeds, MOST_SEEDS)
    reference = check_choice("--reference", settings.reference or next(iter(contenders)), contenders)
    grid = Grid(contenders, range(settings.seeds), common, reference, explicit=settings.flags)
    compare_and_print(grid, Path(settings.out), options)
