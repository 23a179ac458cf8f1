"""The command `netfission`: parse, build, run. Each subcommand is a file with `parser` and `run`."""

# Only what Python has loaded anyway is imported here, so that Ctrl-C is answered from the first moment.
import errno
import os
import sys
import warnings

TYPE_CHECKING = False  # not from typing, which is slow to import

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import NoReturn

    from netfission.cli.parser import Parser

STDOUT = 1  # its file descriptor
SIGINT = 2  # its number
_AGAIN_S = 0.05
_signal = 0  # number of the one that told the process to stop

# The commands, and the extra of dependencies that each needs.
COMMANDS = {
    "calibrate": "train",
    "compare": "train",
    "cost": "models",
    "demo": "train",
    "evaluate": "train",
    "export": "export",
    "finetune": "report",
    "predict": "models",
    "report": "report",
    "reproduce": "train",
    "serve": "serve",
    "train": "train",
}


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the command line.

    Args:
        arguments: the command's name and its arguments; default `sys.argv[1:]`.

    Returns:
        The exit status: 0, 1 if the work failed, 2 for a bad request, 75 if the time of `--minutes` is over
        and runs are missing, 130 if it was interrupted, 141 if the reader of standard output has closed it,
        143 if the process was told to end (SIGTERM).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    try:
        _prepare_output()
        _dispatch(name, given)
    except KeyboardInterrupt as error:
        stopped = KeyboardInterrupt(str(error) or _stopped(name))
        return _report(stopped, 128 + (_signal or SIGINT))
    except Exception as error:
        if _signal:  # what an import in C makes of an interruption
            return _report(KeyboardInterrupt(_stopped(name)), 128 + _signal)
        status = _status(error)
        if status is None:
            raise
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            # Python would complain when it flushes standard output at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
            return 141  # 128 + SIGPIPE, as of a tool that the signal ends
        return _report(error, status, name)
    return 0


def _stop_when_told(number: int, _: object = None) -> None:
    """Answer SIGTERM as Ctrl-C, with a status of its own."""
    global _signal
    _signal = number
    raise KeyboardInterrupt


def _stop_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send a signal again, a moment later, whose interruption was lost where nothing can be raised.

    It is lost if the signal comes while Python calls a finaliser or the callback of a weak reference, of
    which imports have many.
    """
    if unraisable.exc_type is KeyboardInterrupt and _signal:
        import threading

        threading.Timer(_AGAIN_S, os.kill, (os.getpid(), _signal)).start()
    else:
        sys.__unraisablehook__(unraisable)


def run_process() -> "NoReturn":
    """Run the command line, and end the process with its exit status."""
    import atexit
    import signal

    from netfission.utils.quick import end_process, lean_metrics

    lean_metrics()
    status: int | None = None
    # What is registered first is called last, when nothing is left to do but to tear Python's objects down.
    atexit.register(lambda: None if status is None else end_process(status))
    signal.signal(signal.SIGTERM, _stop_when_told)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
        signal.signal(signal.SIGINT, _stop_when_told)
    sys.unraisablehook = _stop_again
    _fill_descriptors()
    try:
        status = main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to be stopped
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    exec("")  # lets Python forget an interruption, for which it would end itself by a signal
    sys.exit(status)


def _fill_descriptors() -> None:
    """Open what a process was started without, so that no file gets the number of a standard stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def command_module(name: str) -> "ModuleType":
    """Import the file of a command, with its `parser` and `run`; it imports neither torch nor a trainer."""
    from importlib import import_module

    return import_module(f"netfission.cli.{name}")


def command_parser(name: str) -> "Parser":
    """Return the parser of a command."""
    parser: Parser = command_module(name).parser()
    parser.prog = f"netfission {name}"
    return parser


def _prepare_output() -> None:
    """Show a warning as one line, and let no character end a command, whatever the terminal's encoding.

    Where a stream is closed, as in a process without a terminal, what is written to it goes nowhere.
    """
    from netfission.utils.text import accept_all_text

    warnings.showwarning = _one_line_warning
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - to the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    accept_all_text(sys.stdout)
    accept_all_text(sys.stderr)


def _dispatch(name: str, given: "Sequence[str]") -> None:
    """Run the command, or print the help; write all that was printed."""
    try:
        if name in COMMANDS:
            _run(name, given[1:])
        else:
            _overview(given)
    except SystemExit:  # after a help or the version
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    import select

    if not hasattr(select, "poll"):  # Windows, where such a pipe raises another error
        return False
    poll = select.poll()
    poll.register(STDOUT, 0)
    return bool(poll.poll(0))


def _run(name: str, arguments: "Sequence[str]") -> None:
    from netfission.utils.errors import invalid
    from netfission.utils.extras import extra
    from netfission.utils.processes import find_launch

    launch = find_launch()
    if name != "train" and launch is not None and launch.devices * launch.machines > 1:
        found = f"{launch.devices * launch.machines} processes of {launch.launcher}"
        raise invalid(f"netfission {name}", "started as one process", found=found)
    settings = command_parser(name).parse_args(arguments)
    import numpy  # noqa: F401 - before torch, which ignores Ctrl-C while it imports NumPy

    with extra(COMMANDS[name], f"netfission {name}"):
        command_module(name).run(settings)


def _overview(arguments: "Sequence[str]") -> None:
    """Print the help or the version; raise ValueError if neither is asked for."""
    from netfission.cli.parser import Parser
    from netfission.utils.errors import check_choice, invalid

    if not arguments:
        raise invalid("command", f"one of {', '.join(COMMANDS)}", found="nothing")
    if not arguments[0].startswith("-"):
        check_choice("command", arguments[0], COMMANDS)
    parser = Parser(
        "Turn one image classifier into a multi-exit self-ensemble, train it and measure it.",
        prog="netfission",
        usage="netfission COMMAND [options]",
        epilog=_commands(),
    )
    parser.add_argument("--version", action="version", version=_version(), help="print the version and exit")
    parser.parse_args(arguments)


def _commands() -> str:
    """The list of commands, each with what it does."""
    lines = [f"  {name:11}{command_module(name).run.__doc__}" for name in COMMANDS]
    return "\n".join(["commands:", *lines, "", "`netfission COMMAND --help` lists the options of a command."])


def _status(error: Exception) -> int | None:
    """The exit status for an error that a user can act on; None for a fault of the program."""
    from argparse import ArgumentError

    from netfission.experiments.time_limit import OUT_OF_TIME, OutOfTimeError
    from netfission.utils.extras import MissingExtraError

    if isinstance(error, OutOfTimeError):
        return OUT_OF_TIME
    if isinstance(error, RuntimeError) or getattr(error, "errno", None) == errno.ENOSPC:
        return 1
    return 2 if isinstance(error, ArgumentError | ValueError | OSError | MissingExtraError) else None


def _version() -> str:
    from importlib.metadata import version

    return f"netfission {version('netfission')}"


def _stopped(command: str) -> str:
    """What is left when a command was stopped."""
    if command in ("compare", "demo", "finetune", "reproduce"):
        return "stopped; the same command goes on"
    return "stopped; the same command starts over"


def _report(error: BaseException, status: int, command: str = "") -> int:
    if os.environ.get("NETFISSION_TRACEBACK"):
        raise error
    message = _one_line(error)
    if isinstance(error, ValueError) and command in COMMANDS:
        message = command_parser(command).in_flags(message)
    _complain(message)
    return status


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> None:
    _complain("warning: " + _one_line(message))


def _complain(message: str) -> None:
    """Print a line on standard error; where it is full, the command ends as it would otherwise."""
    from contextlib import suppress

    with suppress(OSError):
        print(f"netfission: {message}", file=sys.stderr)


def _one_line(message: object) -> str:
    import re

    from netfission.utils.text import printable

    line = printable(" ".join(str(message).split()))
    asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", line)  # PyTorch's words
    if asked is None:
        return line
    return f"memory must be enough for the settings, got too little for {int(asked[1]):,} bytes more"
