"""The command `netfission`: parse, build, run. Each subcommand is a file with `parser` and `run`."""

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from jsonargparse import ArgumentError

from netfission.cli import compare, cost, demo, evaluate, export, predict, report, reproduce, serve, train
from netfission.cli.parser import Parser
from netfission.utils.text import printable

COMMANDS = {
    "compare": compare,
    "cost": cost,
    "demo": demo,
    "evaluate": evaluate,
    "export": export,
    "predict": predict,
    "report": report,
    "reproduce": reproduce,
    "serve": serve,
    "train": train,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 when the work failed, 2 for a bad request."""
    warnings.showwarning = _one_line_warning
    command = ""
    try:
        settings = parser().parse_args(arguments)
        command = settings.command
        COMMANDS[command].run(settings[command])
    except (ArgumentError, ValueError, OSError) as error:
        return _report(error, 1 if getattr(error, "errno", None) == errno.ENOSPC else 2)
    except RuntimeError as error:
        return _report(error, 1)
    except KeyboardInterrupt as error:
        return _report(KeyboardInterrupt(str(error) or _stopped(command)), 130)
    return 0


def parser() -> Parser:
    """The parser of the whole command line."""
    whole = Parser(
        prog="netfission",
        description="Turn one image classifier into a multi-exit self-ensemble, train it and measure it.",
        version=version("netfission"),
    )
    commands = whole.add_subcommands(dest="command", required=True)
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, command.parser(), help=command.run.__doc__)
    return whole


def _stopped(command: str) -> str:
    """What is left when a command was stopped."""
    if command in ("compare", "demo", "reproduce"):
        return "stopped; the same command goes on"
    return "stopped; the same command starts over"


def _report(error: BaseException, status: int) -> int:
    if os.environ.get("NETFISSION_TRACEBACK"):
        raise error
    print("netfission: " + _one_line(error), file=sys.stderr)
    return status


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print("netfission: warning: " + _one_line(message), file=sys.stderr)


def _one_line(message: object) -> str:
    return printable(" ".join(str(message).split()))
