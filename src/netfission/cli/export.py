"""`netfission export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace
from torch import Tensor

from netfission.cli.parser import Parser

if TYPE_CHECKING:  # slow to import, and parsing needs none of it
    from netfission.classifier import Classifier
    from netfission.export.cascade import Plan


def parser() -> Parser:
    """The command's arguments."""
    own = Parser(description=run.__doc__)
    own.add_argument("run", type=str, help="the run's folder")
    own.add_argument(
        "--format", type=Literal["onnx", "pt2"], default="onnx", help="ONNX, or PyTorch's own (torch.export)"
    )
    own.add_argument(
        "--precision",
        type=Literal["float32", "fp16", "int8"],
        default="float32",
        help="fewer bits: what that changes is measured on the validation split, or else on the test split; "
        "int8 is calibrated on training images",
    )
    own.add_argument(
        "--cascade",
        action="store_true",
        help="a graph for each exit, to stop early when sure: as `evaluate --cascade` chose, else to lose "
        "0.2 points of accuracy",
    )
    own.add_argument("--opset", type=int | None, help="version of ONNX's operators, 18 to 23 (default: 20)")
    own.add_argument(
        "--data", type=str | None, help="where the run's data set is now (default: where it was)"
    )
    own.add_argument(
        "--images", type=str | None, help="folder of images to check with, instead of the run's data set"
    )
    own.add_argument(
        "--out",
        type=str | None,
        help="file, or with --cascade folder (default: model.onnx, model.pt2 or cascade in the run's folder)",
    )
    return own


def run(settings: Namespace) -> None:
    """Write a run's network as a file that runs without netfission, checked against PyTorch first."""
    from netfission.classifier import Classifier

    folder = Path(settings.run)
    if not folder.is_dir():
        raise ValueError(f"run={folder}: takes the folder of a run")
    _check_together(settings)
    out = _out(settings, folder)
    if settings.format == "onnx":
        from netfission.export.onnx import OPSET, check_onnx

        check_onnx(OPSET if settings.opset is None else settings.opset)
    classifier = Classifier.from_pretrained(folder)
    if settings.cascade:
        print(_cascade(classifier, settings, folder, out))
    elif settings.precision == "float32":
        print(_whole(classifier, settings, out))
    else:
        print(_reduced(classifier, settings, out))
    print(f"wrote {out}")


def _check_together(settings: Namespace) -> None:
    """ValueError where settings do not go together."""
    if settings.format == "pt2":
        for name in ("opset", "cascade"):
            if settings[name]:
                raise ValueError(f"{name}={settings[name]}: goes with --format onnx")
        if settings.precision == "int8":
            raise ValueError("precision=int8: goes with --format onnx")
    if settings.precision != "float32":
        if settings.cascade:
            raise ValueError(f"precision={settings.precision}: goes with one graph; leave out --cascade")
        if settings.images:
            raise ValueError(
                f"images={settings.images}: have no labels to measure precision={settings.precision} with; "
                "takes --data, where the run's data set is now"
            )


def _out(settings: Namespace, folder: Path) -> Path:
    """Where to write."""
    name = "cascade" if settings.cascade else f"model.{settings.format}"
    out = Path(settings.out) if settings.out else folder / name
    wrong = out.is_file() if settings.cascade else out.is_dir()
    if wrong or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        kind = "folder" if settings.cascade else "file"
        raise ValueError(f"out={out}: takes a {kind} in a folder that exists and can be written")
    return out


def _whole(classifier: Classifier, settings: Namespace, out: Path) -> str:
    """Export in float32; says how that went."""
    from netfission.export import export

    images, source = _images(classifier, settings)
    done = export(classifier, out, images, format=settings.format, opset=settings.opset)
    return _checked(done.difference, len(images), source)


def _reduced(classifier: Classifier, settings: Namespace, out: Path) -> str:
    """Export in fewer bits; says what that changes."""
    from netfission.export import export_reduced
    from netfission.export.samples import data_of

    data, workers = data_of(classifier, settings.data)
    done = export_reduced(
        classifier,
        out,
        data,
        precision=settings.precision,
        format=settings.format,
        opset=settings.opset,
        workers=workers,
    )
    split = "test" if data.validation is None else "validation"
    return f"float32 → {settings.precision} on the {split} split: {done.change}"


def _cascade(classifier: Classifier, settings: Namespace, folder: Path, out: Path) -> str:
    """Export a graph for each exit; says how that went, and when it stops."""
    from netfission.export.cascade import Plan, check_cascade, export_cascade
    from netfission.runs.folder import RunFolder

    check_cascade(classifier)
    chosen = RunFolder(folder).cascade
    plan = Plan.read(chosen) if chosen.is_file() else _plan(classifier, settings)
    images, source = _images(classifier, settings)
    difference = export_cascade(classifier, plan, out, images, opset=settings.opset)
    order = ", ".join(map(str, plan.order))
    thresholds = ", ".join(f"{threshold:.4g}" for threshold in plan.thresholds)
    return (
        f"exits run in the order {order}; an image stops at {plan.rule} above {thresholds}\n"
        f"{_checked(difference, len(images), source)}"
    )


def _plan(classifier: Classifier, settings: Namespace) -> Plan:
    """A cascade's thresholds, chosen on the validation split."""
    from netfission.export.cascade import Plan
    from netfission.export.samples import batches_of, data_of

    if classifier.recipe is not None and classifier.recipe.data.validation == 0:
        raise ValueError(
            "validation=0: thresholds are chosen on validation images; --cascade takes a run trained with a "
            "share of them above 0"
        )
    data, workers = data_of(classifier, settings.data)
    assert data.validation is not None
    return Plan.choose(classifier, batches_of(data.validation, workers))


def _images(classifier: Classifier, settings: Namespace) -> tuple[Tensor, str]:
    """Real images to check with, and where they are from."""
    from netfission.export.samples import CHECKED, data_of, read_folder, spread

    if settings.images:
        return read_folder(classifier, Path(settings.images), CHECKED), settings.images
    data, _ = data_of(classifier, settings.data, otherwise=", or --images, a folder of images like its own")
    if data.validation is None:
        return spread(data.test, CHECKED), "the test split"
    return spread(data.validation, CHECKED), "the validation split"


def _checked(difference: float, n: int, source: str) -> str:
    return f"checked on {n} images of {source}: probabilities differ by {difference:.2g} at most"
