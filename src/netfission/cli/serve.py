"""`netfission serve`."""

from argparse import Namespace
from typing import Literal

from netfission.cli.answer_options import ANSWER_OPTIONS, add_answer_options
from netfission.cli.parser import Parser


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(run.__doc__, config=True)
    parser.add("run", str, help="the run's folder, or a repository of the Hugging Face hub")
    parser.add("--device", Literal["auto", "cpu", "cuda"], "auto", "device to run on")
    parser.add("--threads", int | None, help="number of CPU threads (default: PyTorch's)")
    address = parser.add_argument_group("address")
    parser.add(
        "--host", str, "127.0.0.1", "address to listen on; 0.0.0.0 accepts other machines", group=address
    )
    parser.add("--port", int, 8000, "port to listen on; 0 for any that is free", group=address)
    parser.add(
        "--allowed-host",
        str,
        (),
        "names that the server answers to, or '*' (default: IP addresses, localhost and this machine's name)",
        group=address,
        metavar="NAME",
        several=True,
    )
    parser.add(
        "--cors-origin",
        str,
        (),
        "origins whose pages may read the answers, such as https://example.org, or '*' (default: no other)",
        group=address,
        metavar="ORIGIN",
        several=True,
    )
    parser.add(
        "--drift-window",
        int | None,
        help="number of the last images whose drift /metrics has the p-value of (default: a tenth of the "
        "calibration images, at most 500)",
    )
    limits = parser.add_argument_group("limits")
    parser.add("--max-batch", int, 32, "largest number of images in a batch, and in one form", group=limits)
    parser.add(
        "--max-wait-ms",
        float,
        2.0,
        "longest time that a batch waits for images being decoded, in milliseconds",
        group=limits,
    )
    parser.add(
        "--max-bytes", int, 2**24, "largest size of a request; a larger one gets status 413", group=limits
    )
    parser.add(
        "--max-pixels",
        int,
        40_000_000,
        "largest number of pixels of a request's images; more get status 413",
        group=limits,
    )
    parser.add(
        "--timeout-s",
        float,
        30.0,
        "seconds for a request to arrive (status 408), and then to be answered (504)",
        group=limits,
    )
    answers = parser.add_argument_group("answers", "Defaults of requests, which may ask for other values.")
    add_answer_options(parser, answers)
    return parser


def run(settings: Namespace) -> None:
    """Serve a trained network on a local web page, and over HTTP as JSON, until Ctrl-C."""
    from netfission.classifier.answer_settings import AnswerSettings
    from netfission.serve.server import Settings, serve

    chosen = vars(settings)
    answers = {name: chosen.pop(name) for name in ANSWER_OPTIONS}
    serve(chosen.pop("run"), Settings(answers=AnswerSettings(**answers), **chosen))
