"""`netfission predict`."""

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from jsonargparse import Namespace

from netfission.cli.parser import Parser, check_positive
from netfission.utils.files import write_whole

if TYPE_CHECKING:
    from netfission.prediction import Failure, ImagePrediction, Writer

RISK = 0.05


def parser() -> Parser:
    """The command's arguments."""
    own = Parser(description=run.__doc__)
    own.add_argument("run", type=str, help="a run's folder, or a repository of the Hugging Face hub")
    own.add_argument(
        "images", type=str, nargs="+", help="image files, folders of them, or - for names on standard input"
    )
    own.add_argument(
        "--format",
        type=Literal["table", "csv", "jsonl"] | None,
        help="of what is written (default: by --out's name, .csv, .jsonl or .txt; else table)",
    )
    own.add_argument(
        "--risk",
        type=float | None,
        help="share of wrong answers that is borne: abstain where less sure than that took on the run's "
        f"validation split (default: {RISK} where it had one)",
    )
    own.add_argument(
        "--probabilities", action="store_true", help="write the probability of every class (not in a table)"
    )
    own.add_argument("--batch_size", type=int, default=64, help="images that the network is given at once")
    own.add_argument("--out", type=str | None, help="file to write (default: standard output)")
    return own


def run(settings: Namespace) -> None:
    """Predict the classes of images, with each exit's vote and the ensemble's doubt."""
    import torch
    from tqdm import tqdm

    from netfission.classifier import Classifier
    from netfission.prediction import FORMATS, Layout, find_images, predict_images

    _check_writable(settings.out)
    form = settings.format or _form_of(settings.out)
    if settings.probabilities and form == "table":
        raise ValueError("format=table: shows no probabilities; takes csv or jsonl with --probabilities")
    check_positive("batch_size", settings.batch_size)
    classifier = Classifier.from_pretrained(settings.run)
    classifier.to("cuda" if torch.cuda.is_available() else "cpu")
    risk = settings.risk
    if risk is None and classifier.calibration is not None:
        risk = RISK
    images = find_images(_names(settings.images))
    if not images:
        raise ValueError("images=-: standard input names none")
    layout = Layout.from_classifier(classifier, images, risk=risk, probabilities=settings.probabilities)
    writer = FORMATS[form](layout)
    said = predict_images(classifier, images, batch_size=settings.batch_size, risk=risk)
    # Where the lines themselves run over the screen, a bar would run through them.
    seen = settings.out is None and sys.stdout.isatty()
    with tqdm(said, total=len(images), unit="image", disable=True if seen else None, leave=False) as bar:
        failures = _write(writer, bar, settings.out)
    if failures:
        raise RuntimeError(_unanswered(images, failures))


def _unanswered(images: "Sequence[Path | Failure]", failures: int) -> str:
    """How many images were not read, and how many folders held none."""
    empty = sum(not isinstance(each, Path) for each in images)
    unread, count = failures - empty, len(images) - empty
    said = [f"{unread} of {count} images could not be read"] if unread else []
    return "; ".join([*said, f"folders without images: {empty}"] if empty else said)


def _write(writer: "Writer", said: "Iterable[ImagePrediction | Failure]", out: str | None) -> int:
    """Write all answers, to standard output as they come; how many are failures."""
    from netfission.prediction import Failure

    failures = 0

    def lines() -> Iterator[str]:
        nonlocal failures
        yield from writer.header()
        for answer in said:
            failures += isinstance(answer, Failure)
            yield writer.line(answer)
        yield from writer.footer()

    if out is None:
        _print_all(lines())
    else:
        text = "".join(f"{line}\n" for line in lines())
        write_whole(Path(out), text.encode(errors="surrogateescape"))
        print(f"wrote {out}")
    return failures


def _print_all(lines: Iterable[str]) -> None:
    _any_file_name(sys.stdout)
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:
        # The reader has seen enough. Python would complain when it flushes standard output at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _names(images: list[str]) -> Iterator[str]:
    for name in images:
        if name != "-":
            yield name
            continue
        if sys.stdin is None:
            raise ValueError("images=-: standard input is closed")
        _any_file_name(sys.stdin)
        yield from filter(None, (line.rstrip("\n") for line in sys.stdin))


def _any_file_name(stream: TextIO) -> None:
    """Let names pass that are not text in the stream's encoding, as file systems do."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")


def _check_writable(out: str | None) -> None:
    if out is not None and (Path(out).is_dir() or not os.access(Path(out).parent, os.W_OK)):
        raise ValueError(f"out={out}: takes a file in a folder that can be written to")


def _form_of(out: str | None) -> str:
    if out is None:
        return "table"
    forms = {".csv": "csv", ".jsonl": "jsonl", ".txt": "table"}
    suffix = Path(out).suffix
    if suffix not in forms:
        raise ValueError(f"out={out}: takes a name that ends in {', '.join(forms)}; or say --format")
    return forms[suffix]
