"""`netfission export`."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from netfission.cli.answer_options import add_answer_options, answer_options, check_options, given_options
from netfission.cli.parser import Parser, flag_name
from netfission.config import RunConfig
from netfission.utils.errors import invalid
from netfission.utils.files import choose_format, has_file
from netfission.utils.outputs import check_out, check_out_folder
from netfission.utils.text import printable

TARGET_IMAGES = 64  # to check a file of another task than classification with: maps take memory

if TYPE_CHECKING:  # slow to import, and parsing needs none of it
    from torch import Tensor

    from netfission.classifier import Classifier, Predictor
    from netfission.classifier.answer_settings import AnswerSettings
    from netfission.export.cascade import Plan


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__)
    parser.add("run", str, help="the run's folder")
    parser.add(
        "--format",
        Literal["onnx", "pt2"] | None,
        help="ONNX, or torch.export's format (default: by --out's name, .onnx or .pt2; else onnx)",
    )
    parser.add(
        "--precision",
        Literal["float32", "fp16", "int8"],
        "float32",
        "number format; the effect of fewer bits is measured on the validation split, or else the test split",
    )
    parser.add(
        "--cascade",
        True,
        help="write one graph per exit, for early exit as `evaluate --cascade` chose, or to lose 0.2 points",
    )
    parser.add("--opset", int | None, help="version of ONNX's operators, 18 to 23 (default: 20)")
    parser.add(
        "--data", str | None, help="where the run's data set is now (default: where it was)", metavar="FOLDER"
    )
    parser.add(
        "--images",
        str | None,
        help="folder of images to check with, instead of the run's data set",
        metavar="FOLDER",
    )
    add_answer_options(parser, parser.add_argument_group("answers", "Further outputs of the file."))
    parser.add(
        "--out",
        str | None,
        help="file, or with --cascade folder (default: model.onnx, model.pt2 or cascade in the run's folder)",
        metavar="PATH",
    )
    return parser


def run(settings: Namespace) -> None:
    """Write a run's network as a file that runs without netfission, checked against PyTorch first."""
    from netfission.classifier.answer_settings import AnswerSettings
    from netfission.classifier.folder import ModelFolder

    folder = Path(settings.run)
    if not folder.is_dir():
        raise invalid("run", "the folder of a run", found=str(folder))
    settings.format = _format(settings)
    answers = AnswerSettings(**answer_options(settings))
    asked = None if answers == AnswerSettings() else answers
    _check_together(settings)
    out = _out(settings, folder)
    if settings.format == "onnx":
        from netfission.export.onnx import OPSET, check_onnx

        check_onnx(OPSET if settings.opset is None else settings.opset)
    if ModelFolder(folder).load_spec(any_task=True).find_task().targets.exclusive:
        print(_classes(settings, folder, out, asked))
    else:
        print(_targets(settings, folder, out))
    print(f"wrote {printable(out)}")


def _classes(settings: Namespace, folder: Path, out: Path, asked: AnswerSettings | None) -> str:
    """Export a classifier; return what to print."""
    from netfission.classifier import Classifier

    classifier = Classifier.from_pretrained(folder)
    if settings.cascade:
        return _cascade(classifier, classifier.recipe, settings, folder, out)
    if settings.precision == "float32":
        return _whole(classifier, settings, out, asked)
    return _reduced(classifier, settings, out, asked)


def _format(settings: Namespace) -> str:
    """Return the format that is asked for."""
    from netfission.export.formats import FORMATS

    chosen: str | None = settings.format
    if settings.out is None:
        return chosen or "onnx"
    if settings.cascade and Path(settings.out).suffix in FORMATS:
        raise invalid("--out", "a folder's name with --cascade", found=settings.out)
    return choose_format("--out", settings.out, FORMATS, chosen) or "onnx"


def _check_together(settings: Namespace) -> None:
    """Raise ValueError if settings do not go together."""
    if settings.format == "pt2":
        for name in ("opset", "cascade"):
            value = getattr(settings, name)
            if value is not None and value is not False:
                raise invalid(flag_name(name), "left out unless --format is onnx", value)
        if settings.precision == "int8":
            raise invalid("--precision", "float32 or fp16 unless --format is onnx", settings.precision)
    if settings.images and settings.data:
        raise invalid("--data", "left out with --images", settings.data, hint="they are read in its place")
    if settings.cascade:
        for name, value in given_options(settings).items():
            raise invalid(flag_name(name), "left out with --cascade", value)
    if settings.precision != "float32":
        if settings.cascade:
            raise invalid("--precision", "float32 with --cascade", settings.precision)
        if settings.images:
            hint = (
                "they have no labels to measure accuracy with; pass --data, where the run's data set is now"
            )
            raise invalid(
                "--images", f"left out with --precision {settings.precision}", settings.images, hint=hint
            )


def _out(settings: Namespace, folder: Path) -> Path:
    """Return where to write."""
    name = "cascade" if settings.cascade else f"model.{settings.format}"
    out = folder / name if settings.out is None else Path(settings.out)
    wrong = os.path.lexists(out) and not out.is_dir() if settings.cascade else out.is_dir()
    if wrong or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        kind = "folder" if settings.cascade else "file"
        raise invalid("--out", f"a {kind} in a folder that exists and can be written to", found=str(out))
    if settings.cascade:
        check_out_folder("--out", out, names=r"cascade\.json|step\d+\.onnx", mark=out / "step0.onnx")
    else:
        check_out("--out", out)
    return out


def _whole(classifier: Classifier, settings: Namespace, out: Path, asked: AnswerSettings | None) -> str:
    """Export in float32; return what to print."""
    from netfission.export import export

    limits = None if asked is None else asked.limits(classifier)
    images, source = _images(classifier, classifier.recipe, settings)
    done = export(classifier, out, images, format=settings.format, opset=settings.opset, limits=limits)
    return _checked(classifier, done.difference, len(images), source)


def _targets(settings: Namespace, folder: Path, out: Path) -> str:
    """Export a network of another task than classification; return what to print."""
    from netfission.classifier import Predictor
    from netfission.classifier.folder import ModelFolder
    from netfission.export import export_targets

    predictor = Predictor.from_pretrained(folder)
    given = given_options(settings)
    if settings.precision != "float32":
        given["precision"] = settings.precision
    check_options(predictor.task, given)
    run = ModelFolder(folder)
    recipe = run.load_config() if has_file(run.config) else None
    if settings.cascade:
        return _cascade(predictor, recipe, settings, folder, out)
    images, source = _images(predictor, recipe, settings)
    done = export_targets(
        predictor, out, images, format=settings.format, opset=settings.opset, coverage=settings.coverage
    )
    return _checked(predictor, done.difference, len(images), source)


def _reduced(classifier: Classifier, settings: Namespace, out: Path, asked: AnswerSettings | None) -> str:
    """Export in fewer bits; return what that changes."""
    from netfission.export import export_reduced
    from netfission.export.samples import load_training_data

    data, workers = load_training_data(classifier.spec, classifier.recipe, settings.data)
    done = export_reduced(
        classifier,
        out,
        data,
        precision=settings.precision,
        format=settings.format,
        opset=settings.opset,
        asked=asked,
        workers=workers,
    )
    split = "test" if data.validation is None else "validation"
    return f"float32 → {settings.precision} on the {split} split: {done.change}"


def _cascade(
    network: Classifier | Predictor, recipe: RunConfig | None, settings: Namespace, folder: Path, out: Path
) -> str:
    """Export a graph per exit; return what to print."""
    from netfission.export.cascade import Plan, check_cascade, export_cascade
    from netfission.inference.cascade import describe_stops
    from netfission.runs.folder import RunFolder

    check_cascade(network)
    run = RunFolder(folder)
    chosen = run.cascade
    plan = Plan.read(chosen, run.weights_sha256()) if has_file(chosen) else _plan(network, recipe, settings)
    images, source = _images(network, recipe, settings)
    difference = export_cascade(network, plan, out, images, opset=settings.opset)
    order = ", ".join(map(str, plan.order))
    return (
        f"exits run in the order {order}; {describe_stops(plan.rule, plan.thresholds)}\n"
        f"{_checked(network, difference, len(images), source)}"
    )


def _plan(network: Classifier | Predictor, recipe: RunConfig | None, settings: Namespace) -> Plan:
    """Choose a cascade's thresholds on the validation split."""
    from netfission.export.cascade import Plan
    from netfission.export.samples import BATCH, labelled_batches, load_training_data

    if recipe is not None and recipe.data.validation == 0:
        hint = "--cascade chooses thresholds on validation images"
        raise invalid("validation", "above 0 in the run's training", 0, hint=hint)
    data, workers = load_training_data(network.spec, recipe, settings.data)
    assert data.validation is not None
    size = network.spec.find_task().batch_size(network.spec.shape, BATCH)
    return Plan.choose(network, labelled_batches(data.validation, workers, size))


def _images(
    network: Classifier | Predictor, recipe: RunConfig | None, settings: Namespace
) -> tuple[Tensor, str]:
    """Return real images to check with, by default 256 (64 of other tasks) or fewer, and their source."""
    from netfission.export.samples import CHECK_IMAGES, load_training_data, sample_folder, sample_split

    number = CHECK_IMAGES if network.spec.find_task().targets.exclusive else TARGET_IMAGES
    if settings.images:
        return sample_folder(network, Path(settings.images), number), settings.images
    data, _ = load_training_data(
        network.spec, recipe, settings.data, alternative=", or --images, a folder of images like its own"
    )
    if data.validation is None:
        return sample_split(data.test, number), "the test split"
    return sample_split(data.validation, number), "the validation split"


def _checked(network: Classifier | Predictor, difference: float, n: int, source: str) -> str:
    what = "probabilities" if network.spec.find_task().targets.exclusive else "outputs"
    return f"checked on {n} images of {source}: {what} differ by {difference:.2g} at most"
