"""Recognition of the folders that netfission writes: they are never data, and their files are kept."""

import re
from collections.abc import Sequence
from pathlib import Path

from netfission.utils.errors import invalid
from netfission.utils.files import check_target, is_temporary
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

# In the folder of a comparison, the names in each of its folders, and its own files.
_COMPARISON_FOLDERS = {
    "locks": re.compile(r"[0-9a-f]{12}\.lock"),
    "records": re.compile(r"[0-9a-f]{12}\.json"),
    "runs": re.compile(r"[0-9a-f]{12}"),
}
_COMPARISON_FILES = frozenset(
    {"costs.json", *(f"comparison.{suffix}" for suffix in ("json", "md", "png", "svg", "txt"))}
)
_COSTS_MARK = '"networks": {'  # in the costs of a comparison
_NEW = "where a folder is new, empty or of earlier output of this command"


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
    """Check that a command may write its output to a path: no run or comparison has a file of its own there.

    Args:
        argument: name of the option that holds `path`, for the message.
        path: the file to write.
        hint: what to do about a device, a pipe or a folder, for the message.

    Raises:
        ValueError: a run or a comparison keeps a file of its own there, or `write_whole` may not write
            there, see `netfission.utils.files.check_target`.

    Example:
        >>> check_out("--out", Path("."))
        Traceback (most recent call last):
        ValueError: --out must be a regular file, got . (a folder)
    """
    check_target(argument, path, hint=hint)
    written = path.resolve()  # through a link, the file that it names is written
    if written.name in RUN_FILES and is_output(written.parent):
        raise invalid(argument, "another file than a run's own", found=printable(path))
    if _is_of_comparison(written):
        raise invalid(argument, "another file than a comparison's own", found=printable(path))


def check_out_folder(argument: str, folder: Path, *, names: str, mark: Path) -> None:
    """Check that a command may write several files into a folder: they replace its earlier output alone.

    Args:
        argument: name of the option that holds the folder, for the message.
        folder: where the files go.
        names: regular expression of their names, those in folders below as well.
        mark: a file that tells earlier output; without it the folder must be new or empty.

    Raises:
        ValueError: the folder is a file, or has other files.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     _ = Path(name, "cat.jpg").write_bytes(b"")
        ...     check_out_folder("--out", Path(name), names=r".*\\.svg", mark=Path(name, "page.html"))
        ... # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: --out must be where a folder is new, empty or of earlier output of this command, got ...
    """
    if not _has_folder(argument, folder):
        return
    files = [file for file in folder.rglob("*") if not file.is_dir() and not is_temporary(file)]
    _check_none(
        argument, folder, [file for file in files if not mark.is_file() or not re.fullmatch(names, file.name)]
    )


def check_comparison_folder(argument: str, folder: Path) -> None:
    """Check that a comparison may be written into a folder: it is new, empty or of an earlier comparison.

    Args:
        argument: name of the option that holds the folder, for the message.
        folder: where the comparison goes. That of a comparison which was stopped at any moment is accepted.

    Raises:
        ValueError: the folder is a file, or has other files. Hidden files do not count.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     _ = Path(name, "cat.jpg").write_bytes(b"")
        ...     check_comparison_folder("--out", Path(name))
        ... # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: --out must be where a folder is new, empty or of earlier output of this command, got ...
    """
    if not _has_folder(argument, folder) or _is_comparison(folder):
        return
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    _check_none(argument, folder, [path for path in visible if not _is_begun(path)])


def _is_comparison(folder: Path) -> bool:
    """Return whether a folder has a record, a lock or a folder of a run, or the costs, of a comparison."""
    parts = ((folder / name, names) for name, names in _COMPARISON_FOLDERS.items())
    if any(
        part.is_dir() and any(names.fullmatch(path.name) for path in part.iterdir()) for part, names in parts
    ):
        return True
    costs = folder / "costs.json"
    return costs.is_file() and _COSTS_MARK in costs.read_text(encoding="utf-8", errors="replace")


def _is_of_comparison(file: Path) -> bool:
    """Return whether a file is a comparison's own, be it in one of its folders."""
    folder = file.parent
    if (names := _COMPARISON_FOLDERS.get(folder.name)) is not None:
        return names.fullmatch(file.name) is not None and _is_comparison(folder.parent)
    return file.name in _COMPARISON_FILES and _is_comparison(folder)


def _is_begun(path: Path) -> bool:
    """Return whether this is a folder that a comparison has made, and written nothing to yet."""
    return path.name in _COMPARISON_FOLDERS and path.is_dir() and not any(path.iterdir())


def _has_folder(argument: str, folder: Path) -> bool:
    """Return whether a folder for output is there; ValueError if it is a file."""
    if folder.exists() and not folder.is_dir():
        raise invalid(argument, _NEW, found=f"{printable(folder)}, a file")
    return folder.exists()


def _check_none(argument: str, folder: Path, foreign: Sequence[Path]) -> None:
    """Refuse a folder that has files of something else."""
    if foreign:
        found = f"{printable(folder)} with {printable(min(foreign).relative_to(folder))}"
        raise invalid(argument, _NEW, found=found)
