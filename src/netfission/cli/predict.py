"""`netfission predict`."""

import io
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from netfission.cli.answer_options import add_answer_options, answer_options, check_options, given_options
from netfission.cli.parser import Parser
from netfission.cli.window_options import WindowProgress, add_window_options, check_windows, find_windows
from netfission.utils.errors import check_positive_integer, invalid
from netfission.utils.files import choose_format, write_whole
from netfission.utils.outputs import check_out
from netfission.utils.quick import without_collection, without_compiler
from netfission.utils.text import printable

_FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".txt": "table"}

if TYPE_CHECKING:
    from netfission.classifier.folder import ModelFolder
    from netfission.prediction import Failure, Writer
    from netfission.prediction.targets import TargetWriter


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__)
    parser.add("run", str, help="a run's folder, or a repository of the Hugging Face hub")
    parser.add(
        "images", str, help="image files, folders of them, or - for names on standard input", several=True
    )
    add_answer_options(parser)
    parser.add("--probabilities", True, help="write the probability of every class; csv and jsonl only")
    add_window_options(parser)
    parser.add("--batch-size", int, 64, "number of images per batch, or of windows")
    parser.add(
        "--format",
        Literal["table", "csv", "jsonl"] | None,
        help="format to write (default: by --out's name, .csv, .jsonl or .txt; else table)",
    )
    parser.add(
        "--out",
        str | None,
        help="file to write (default: standard output); with a class for each pixel, the folder for maps and "
        "for predictions.csv, or .jsonl or .txt by --format",
        metavar="FILE",
    )
    return parser


def run(settings: Namespace) -> None:
    """Predict the classes, labels, numbers or pixels of images, with the ensemble's uncertainty."""
    with without_collection():
        import torch

        from netfission.classifier import Classifier
        from netfission.classifier.answer_settings import AnswerSettings
        from netfission.classifier.image_network import find_folder
        from netfission.prediction import FORMATS, Layout, find_images, predict_images

    check_positive_integer("--batch-size", settings.batch_size)
    asked = AnswerSettings(**answer_options(settings))
    folder = find_folder(settings.run)
    task = folder.load_spec(any_task=True).find_task()
    check_windows(settings, lambda: task)
    if task.draws_maps and settings.out is not None:
        _check_map_folder(settings.out)
        chosen_format = settings.format or "csv"
    else:
        _check_writable(settings.out)
        chosen_format = _chosen_format(settings.format, settings.out)
    if settings.probabilities and chosen_format == "table":
        raise invalid("--format", "csv or jsonl with --probabilities", chosen_format)
    if not task.targets.exclusive:
        _predict_targets(settings, folder, chosen_format)
        return
    with without_collection(), without_compiler():
        classifier = Classifier.from_pretrained(folder.path)
    classifier.to("cuda" if torch.cuda.is_available() else "cpu")
    limits = asked.limits(classifier)
    images = _found(find_images(_names(settings.images)))
    layout = Layout.from_classifier(classifier, images, limits=limits, probabilities=settings.probabilities)
    writer = FORMATS[chosen_format](layout)
    predictions = predict_images(classifier, images, batch_size=settings.batch_size, limits=limits)
    _write_all(writer, predictions, images, settings.out)


def _predict_targets(settings: Namespace, folder: "ModelFolder", chosen_format: str) -> None:
    """Predict labels, numbers or pixels of images, with the ensemble's uncertainty."""
    import torch

    from netfission.classifier import Predictor
    from netfission.prediction import find_images
    from netfission.prediction.maps import MapFolder
    from netfission.prediction.targets import predict_targets, predict_windows, target_writer

    with without_collection(), without_compiler():
        predictor = Predictor.from_folder(folder)
    check_options(predictor.task, given_options(settings))
    if settings.probabilities:
        expected = f"left out for a run of task={predictor.task.name}"
        raise invalid("--probabilities", expected, True, hint="all of its values are written anyway")
    predictor.to("cuda" if torch.cuda.is_available() else "cpu")
    images = _found(find_images(_names(settings.images)))
    writer = target_writer(chosen_format, predictor, images, coverage=settings.coverage)
    draw_maps = predictor.task.draws_maps and settings.out is not None
    progress = WindowProgress()
    predictions: Iterable[Any]
    if settings.window is not None:
        predictions = predict_windows(
            predictor,
            images,
            find_windows(settings, predictor),
            batch_size=settings.batch_size,
            draw_maps=draw_maps,
            progress=progress,
        )
    else:
        predictions = predict_targets(
            predictor,
            images,
            batch_size=settings.batch_size,
            coverage=settings.coverage,
            draw_maps=draw_maps,
        )
    out = settings.out
    if draw_maps:
        folder_of_maps = MapFolder(Path(settings.out), images)
        suffix = next(suffix for suffix, kind in _FORMATS.items() if kind == chosen_format)
        table = folder_of_maps.path / f"predictions{suffix}"
        check_out("--out", table)
        print(f"writing maps to {printable(settings.out)}", flush=True)
        predictions = folder_of_maps.written(predictions)
        out = str(table)
    _write_all(writer, predictions, images, out, progress)


def _found(images: "list[Path | Failure]") -> "list[Path | Failure]":
    if not images:
        raise invalid("images", "one file or more", found="no names on standard input")
    return images


def _write_all(
    writer: "Writer | TargetWriter",
    predictions: Iterable[Any],
    images: "Sequence[Path | Failure]",
    out: str | None,
    progress: WindowProgress | None = None,
) -> None:
    """Write all predictions with a progress bar; RuntimeError if an image has none."""
    from tqdm import tqdm

    _check_is_no_image(out, images)
    # A bar would run through lines that are themselves printed on the screen.
    hidden = True if out is None and sys.stdout.isatty() else None
    with tqdm(predictions, total=len(images), unit="image", disable=hidden, leave=False) as bar:
        if progress is not None:
            progress.bar = bar
        failures = _write(writer, bar, out)
    if failures:
        raise RuntimeError(_describe_failures(images, failures))


def _describe_failures(images: "Sequence[Path | Failure]", failures: int) -> str:
    """Say how many images were not read, and how many folders held none."""
    empty = sum(not isinstance(image, Path) for image in images)
    unread, count = failures - empty, len(images) - empty
    reasons = [f"{unread} of {count} images could not be read"] if unread else []
    return "; ".join([*reasons, f"folders without images: {empty}"] if empty else reasons)


def _write(writer: "Writer | TargetWriter", predictions: Iterable[Any], out: str | None) -> int:
    """Write all predictions, to standard output as they come; return the number of failures."""
    from netfission.prediction import Failure

    failures = 0

    def lines() -> Iterator[str]:
        nonlocal failures
        yield from writer.header()
        for prediction in predictions:
            failures += isinstance(prediction, Failure)
            yield writer.line(prediction)
        yield from writer.footer()

    if out is None:
        if not writer.for_people:
            _write_as_files(sys.stdout)
        for line in lines():
            print(line, flush=True)
    else:
        text = "".join(f"{line}\n" for line in lines())
        write_whole(Path(out), text.encode(errors="surrogateescape"))
        print(f"wrote {printable(out)}")
    return failures


def _write_as_files(stream: TextIO) -> None:
    """Write what a file would contain: UTF-8, and names of files as the bytes that they are."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def _names(images: list[str]) -> Iterator[str]:
    from netfission.prediction.names import read_names

    for name in images:
        if name != "-":
            yield name
            continue
        if sys.stdin is None:
            raise invalid("images", "files or folders", "-", hint="standard input is closed")
        yield from read_names(sys.stdin.buffer.read())


def _check_writable(out: str | None) -> None:
    if out is None and getattr(sys.stdout, "name", "") == os.devnull:  # in place of a closed one
        raise invalid("--out", "given if standard output is closed", found="nothing")
    if out is not None and (Path(out).is_dir() or not os.access(Path(out).parent, os.W_OK)):
        raise invalid("--out", "a file in a folder that can be written to", found=out or "no name")
    if out is not None:
        check_out("--out", Path(out), hint="leave it out for standard output")


def _check_is_no_image(out: str | None, images: "Sequence[Path | Failure]") -> None:
    """Raise ValueError if the file to write is one of the images, by whatever name."""
    if out is None or not Path(out).exists():
        return
    for image in images:
        with suppress(OSError):  # an image that is not there gets a line of its own
            if isinstance(image, Path) and image.samefile(out):
                raise invalid("--out", "another file than the images", found=out)


def _check_map_folder(out: str) -> None:
    folder = Path(out)
    is_other = folder.suffix.lower() in _FORMATS or (folder.exists() and not folder.is_dir())
    if is_other or not os.access(folder if folder.is_dir() else folder.parent, os.W_OK):
        raise invalid("--out", "a folder for maps, in one that can be written to", found=out)


def _chosen_format(format: str | None, out: str | None) -> str:
    """Return the format that `--format` or the name of the file asks for; ValueError if they differ."""
    if out is None:
        return format or "table"
    chosen = choose_format("--out", out, _FORMATS, format)
    if chosen is None:
        expected = f"a name that ends in {', '.join(_FORMATS)}"
        raise invalid("--out", expected, found=out, hint="or pass --format")
    return chosen
