"""`netfission finetune`."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from netfission.cli.parser import Parser, run_settings
from netfission.cli.train import check_given_effects
from netfission.config import (
    COPY_NOISE,
    ENSEMBLE_EPOCHS,
    FINETUNE_RECIPE,
    OF_TRAINED_WEIGHTS,
    RECIPES,
    DataConfig,
    FissionConfig,
    MethodConfig,
    ModelConfig,
    TrainingConfig,
)
from netfission.utils.errors import invalid
from netfission.utils.text import printable

_OWN = {"ensemble_epochs", "finetuned", "recipe"}  # arguments that are no settings of runs


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__, config=True, of_file=_of_single_network)
    help = (
        "folder of images with a folder per class, or with --task a table, a folder per label or a folder of "
        "masks, or another data set, see `netfission train --help`"
    )
    parser.add("data", str, help=help, metavar="FOLDER")
    group = parser.add_argument_group("fine-tuning")
    parser.add(
        "--ensemble-epochs",
        int,
        ENSEMBLE_EPOCHS,
        "passes over the training images when the ensemble is trained; --epochs is for the single network",
        group=group,
    )
    parser.add(
        "--recipe",
        str,
        FINETUNE_RECIPE,
        f"settings of both networks: {' or '.join(RECIPES)}; --config and flags override them",
        group=group,
        metavar="NAME",
    )
    parser.add(
        "--finetuned",
        str | None,
        help="a network that is already fine-tuned on these classes, as a file of weights or the folder of a "
        "run of one exit; it is taken as the single network, and step 1 trains nothing",
        group=group,
        metavar="FILE",
    )
    parser.add(
        "--out",
        str | None,
        help="folder of the ensemble's run, with the single network in single/; if the command was stopped, "
        "the same command continues (default: runs/ and a name from the settings)",
        group=group,
        metavar="RUN",
    )
    defaults = _shown_defaults()
    parser.add_settings("model", ModelConfig, defaults=defaults)
    parser.add_settings("data", DataConfig, skip={"data"}, defaults=defaults)
    parser.add_settings("fission", FissionConfig, defaults=defaults)
    parser.add_settings("training", TrainingConfig, skip={"devices", "machines"}, defaults=defaults)
    return parser


def run(settings: Namespace) -> None:
    """Fine-tune a network on images, make an ensemble of it, and compare the two."""
    from netfission.report import write_report
    from netfission.runs.finetune import finetune
    from netfission.runs.finetune_settings import plan_finetuning, run_of
    from netfission.runs.folder import RunFolder

    if settings.finetuned == "":
        raise invalid("--finetuned", "a file, or the folder of a run", "")
    given = run_settings(settings, _OWN)
    finetuned = None if settings.finetuned is None else str(Path(settings.finetuned).resolve())
    if "model" not in given and (finetuned is None or run_of(finetuned) is None):
        raise invalid(
            "--model", "given", found="nothing", hint="for example resnet18, see `netfission train --help`"
        )
    folder = RunFolder(Path(settings.out or _default_out(given, finetuned)))
    plan = plan_finetuning(
        given,
        folder.single.path.resolve(),
        recipe=settings.recipe,
        ensemble_epochs=settings.ensemble_epochs,
        finetuned=finetuned,
    )
    check_given_effects(plan.ensemble, settings, _OWN)
    gain = finetune(plan, folder.path, say=_say)
    if not folder.report.is_file():
        begun, now = folder.load_config().data.data, plan.ensemble.data.data
        write_report([folder.path], folder.report, data=None if now == begun else now)
    print(f"\n{gain.table()}\n{gain.summary()}")
    shown = printable(folder.path)
    print(f"wrote the ensemble's run to {shown}, with {folder.gain.name} and {folder.report.name}")


def _of_single_network(path: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings that count of a run's own file, which holds all: those of a single network.

    Raises:
        ValueError: the run is not one of a single network.
    """
    if "data" not in content:  # which is no setting of this command's own files
        return content
    from netfission.runs.finetune_settings import OF_ENSEMBLE

    is_single = (
        content.get("method", "fission") == "fission" and content.get("exits", FissionConfig().exits) == 1
    )
    if not is_single or content.get("linear_exits"):
        hint = "of a fine-tuning give single/config.yaml, and the ensemble's settings as flags"
        raise invalid(path, "settings of a single network", found="those of an ensemble", hint=hint)
    others = {setting.name for setting in fields(MethodConfig)}
    left_out = OF_ENSEMBLE | others | {"data", "devices", "machines"}
    return {name: value for name, value in content.items() if name not in left_out}


def _say(line: str) -> None:
    print(line, flush=True)


def _default_out(given: dict[str, Any], finetuned: str | None) -> Path:
    model = given.get("model") or Path(finetuned or "").name
    name = f"{Path(given['data']).name}-{model}".replace("/", "-")
    return Path("runs") / f"{printable(name)}-finetuned-seed{given.get('seed', 0)}"


def _shown_defaults() -> dict[str, Any]:
    """Return the defaults of settings that differ from those of a run, as values or in words."""
    in_words = {
        "model": None,
        "pretrained": "true, unless --weights or --finetuned is given",
        "batch_size": "that of the recipe, or less for few images: at least about 8 steps per epoch",
        "image_size": "the size that the model is made for, or else their own",
        "branch_after": "the last stage but one, for each",
        "linear_exits": "the last stage but one, twice",
        "copy_noise": COPY_NOISE,
    }
    return {**RECIPES[FINETUNE_RECIPE], **OF_TRAINED_WEIGHTS, **in_words}
