"""Recognition of the folders that netfission writes, which are never data."""

from pathlib import Path

ENVIRONMENT_MARK = "# Made with:"  # the line of a run's settings file above the comments with its environment


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
