"""`netfission serve`."""

from typing import Literal

from jsonargparse import Namespace

from netfission.cli.parser import Parser


def parser() -> Parser:
    """The command's arguments."""
    own = Parser(description=run.__doc__)
    own.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    own.add_argument("run", type=str, help="the run's folder, or a repository on the Hugging Face hub")
    own.add_argument("--host", type=str, default="127.0.0.1", help="0.0.0.0 for other machines, too")
    own.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    own.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to run")
    own.add_argument("--threads", type=int | None, help="of the CPU (default: what PyTorch takes)")
    own.add_argument(
        "--risk", type=float | None, help="share of wrong answers that is borne; tells what it abstains from"
    )
    own.add_argument("--max_batch", type=int, default=32, help="images run at once, or sent in one form")
    own.add_argument(
        "--max_wait_ms", type=float, default=2.0, help="that a batch waits for images being decoded"
    )
    own.add_argument("--max_bytes", type=int, default=2**24, help="of a request; larger ones get status 413")
    own.add_argument("--max_pixels", type=int, default=40_000_000, help="of an image; likewise")
    own.add_argument(
        "--timeout_s", type=float, default=30.0, help="for a request to come (408), then to be answered (504)"
    )
    return own


def run(settings: Namespace) -> None:
    """Serve a trained network on a local web page, and over HTTP as JSON, until Ctrl-C."""
    try:
        from netfission.serve.server import Settings, serve
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ValueError(f"{package}: is not installed; pip install 'netfission[serve]'") from error

    chosen = {name: value for name, value in settings.as_dict().items() if name != "config"}
    serve(chosen.pop("run"), Settings(**chosen))
