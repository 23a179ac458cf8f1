"""Recognition of the folders that netfission writes: they are never data, and their files are kept."""

from pathlib import Path

from netfission.utils.errors import invalid
from netfission.utils.files import check_target
from netfission.utils.text import printable

ENVIRONMENT_MARK = "# Made with:"  # the line of a run's settings file above the comments with its environment
# In a run's folder, what no option of another command may replace.
RUN_FILES = frozenset(
    {
        "budget.json",
        "calibration.json",
        "cascade.json",
        "config.json",
        "config.yaml",
        "corruptions.json",
        "data.json",
        "evaluation-windows.json",
        "evaluation.json",
        "gain.json",
        "metrics.csv",
        "model.safetensors",
        "ood.json",
        "reliability.json",
        "seconds.json",
        "weights.json",
    }
)


def is_output(folder: Path) -> bool:
    """Return whether a folder is that of a run or of a comparison.

    Args:
        folder: it is recognised by the settings file of a run, or the records and locks of a comparison.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     before = is_output(Path(name))
        ...     _ = Path(name, "config.yaml").write_text(f"data: digits\\n{ENVIRONMENT_MARK}\\n")
        ...     print(before, is_output(Path(name)))
        False True
    """
    settings = folder / "config.yaml"
    if settings.is_file():
        lines = settings.read_text(encoding="utf-8", errors="replace").splitlines()
        return ENVIRONMENT_MARK in lines
    return (folder / "records").is_dir() and (folder / "locks").is_dir()


def check_out(argument: str, path: Path, *, hint: str = "") -> None:
    """Check that a command may write its output to a path: nothing is there, or a file that no run needs.

    Args:
        argument: name of the option that holds `path`, for the message.
        path: the file to write.
        hint: what to do about a device, a pipe or a folder, for the message.

    Raises:
        ValueError: a run's folder keeps a file of its own there, or `write_whole` may not write there, see
            `netfission.utils.files.check_target`.

    Example:
        >>> check_out("--out", Path("."))
        Traceback (most recent call last):
        ValueError: --out must be a regular file, got . (a folder)
    """
    check_target(argument, path, hint=hint)
    written = path.resolve()  # through a link, the file that it names is written
    if written.name in RUN_FILES and is_output(written.parent):
        raise invalid(argument, "another file than a run's own", found=printable(str(path)))
