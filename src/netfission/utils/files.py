"""Write files so that a crash leaves either the old content or the new, never a part of it."""

import contextlib
import functools
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from netfission.utils.checksums import stamp_json
from netfission.utils.errors import invalid

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<process>\d{1,9})(?:@(?P<host>\w*))?-[0-9a-f]{8}\.tmp")


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@functools.cache
def _host() -> str:
    """Return the name of this machine, as several may write into one folder."""
    import socket  # slow to import, and help writes no file

    return re.sub(r"\W", "_", socket.gethostname())[:20]


def has_file(path: Path, argument: str = "", *, hint: str = "") -> bool:
    """Return whether a regular file, or a link to one, is at `path`; False only if nothing is there.

    Args:
        path: the file.
        argument: name of the option that holds `path`, for the message; default `path` itself.
        hint: what to do about something else, for the message.

    Raises:
        ValueError: something else is there, such as a folder, a pipe, a device or a broken link.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     has_file(Path(folder, "a.json"))
        False
    """
    if path.is_file():
        return True
    if not os.path.lexists(path):
        return False
    try:
        kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode), "something else")
    except OSError:  # no target, or the link itself
        kind = "a broken link"
    found = f"{path} ({kind})" if argument else kind
    raise invalid(argument or str(path), "a regular file", found=found, hint=hint)


def check_target(argument: str, path: Path, *, hint: str = "") -> None:
    """Check that `write_whole` may write to a path: nothing is there, or a regular file or a link to either.

    Args:
        argument: name of the option that holds `path`, for the message; "" names `path` itself.
        path: the file to write.
        hint: what to do about something else, for the message.

    Raises:
        ValueError: something else is there, such as a pipe or a device, which a file would replace.

    Example:
        >>> check_target("--out", Path("."))
        Traceback (most recent call last):
        ValueError: --out must be a regular file, got . (a folder)
    """
    if path.is_symlink() and not os.path.lexists(os.path.realpath(path)):
        return  # the file that the link names is made
    has_file(path, argument, hint=hint)


def write_whole(path: Path, content: str | bytes, *, kept_as: Path | None = None) -> None:
    """Write a temporary file beside `path`, and rename it to `path` once it is safely on disk.

    Args:
        path: the file; its previous content is replaced, and its permissions are kept. Through a link, the
            file that it names is written. The folder must exist.
        content: text is written as UTF-8, with line ends as they are. Names of files that are not UTF-8 are
            written with escapes that JSON reads back.
        kept_as: takes the previous content, if there is a previous file; a link is then moved itself.

    Raises:
        ValueError: something else than a regular file is there, see `check_target`.
        OSError: the write failed (full disk, no such folder, no permission). `path` is unchanged, no
            temporary file is left, and the error's `filename` is `path`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "a.txt"), "new")
        ...     Path(folder, "a.txt").read_text()
        'new'
    """
    write_together({path: content}, kept_as={} if kept_as is None else {path: kept_as})


def write_json(path: Path, text: str) -> None:
    """Write the text of a JSON object or list with a checksum, see `netfission.utils.checksums`.

    Raises:
        ValueError, OSError: see `write_whole`.
    """
    write_whole(path, stamp_json(text))


def write_together(
    files: Mapping[Path, str | bytes],
    *,
    removed: Iterable[Path] = (),
    kept_as: Mapping[Path, Path] | None = None,
) -> None:
    """Write files that belong together: none changes before all are safely on disk; see `write_whole`.

    Args:
        files: path → content; the files are renamed in this order.
        removed: files to remove before the first one is renamed, since they do not fit the new ones.
        kept_as: path → the path that takes its previous content.

    Raises:
        ValueError: see `write_whole`.
        OSError: see `write_whole`; if the disk was full, no file has changed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_together({Path(folder, "a"): "1", Path(folder, "b"): b"2"})
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['a', 'b']
    """
    kept_as = kept_as or {}
    for path in files:
        check_target("", path)
    # Through a link, unless it becomes the previous file.
    places = {path: path if path in kept_as else Path(os.path.realpath(path)) for path in files}
    with contextlib.ExitStack() as cleanup:
        written = {}
        for path, content in files.items():
            place = places[path]
            remove_abandoned(place.parent, place.name)
            # tempfile would make the file readable by its owner alone; open() follows the umask.
            written[path] = place.with_name(
                f".{place.name}.{os.getpid()}@{_host()}-{os.urandom(4).hex()}.tmp"
            )
            cleanup.callback(_remove, written[path])
            with _named_in_errors(path):
                _write(
                    written[path],
                    content.encode(errors="backslashreplace") if isinstance(content, str) else content,
                    stat.S_IMODE(place.stat().st_mode) if place.exists() else None,
                )
        for path in removed:
            places.get(path, path).unlink(missing_ok=True)
        for path, temporary in written.items():
            with _named_in_errors(path):
                if path in kept_as and path.is_file():
                    path.replace(kept_as[path])
                temporary.replace(places[path])


def is_temporary(path: Path) -> bool:
    """Return whether a file has a name that `write_whole` gives to one that is not whole yet.

    Example:
        >>> is_temporary(Path(".a.json.12@host-0123abcd.tmp")), is_temporary(Path("a.tmp"))
        (True, False)
    """
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files of processes of this machine that were killed while they wrote.

    Args:
        folder: where they wrote; need not exist.
        name: the file that they wrote; default all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, f".a.txt.{2**22 + 1}-12345678.tmp").touch()  # no process has such a number
        ...     remove_abandoned(Path(folder))
        ...     list(Path(folder).iterdir())
        []
    """
    if sys.platform == "win32":  # where asking whether a process lives would end it
        return
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            match = _TEMPORARY.fullmatch(entry.name)
            if match is None or name not in (None, match["name"]) or match["host"] not in (None, _host()):
                continue
            if not _is_alive(int(match["process"])):
                _remove(Path(entry))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user, or no number of a process
        pass
    return True


def safe_name(text: str, longest: int = 40) -> str:
    """Return text as a part of a file's name: letters, digits and hyphens, dots and underscores within.

    Example:
        >>> safe_name("../my photos/"), safe_name("/")
        ('my-photos', 'unnamed')
    """
    return re.sub(r"[^\w.-]+", "-", text).strip("-._")[:longest] or "unnamed"


def _write(path: Path, data: bytes, mode: int | None) -> None:
    with path.open("xb") as file:
        if mode is not None:
            path.chmod(mode)  # before the content, which may be private
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # renamed, or never written
        path.unlink()


@contextlib.contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def choose_format(
    argument: str, path: str | Path, suffixes: Mapping[str, str], chosen: str | None = None
) -> str | None:
    """Return the format of a file to write: the one that was chosen, or else the one that its name ends in.

    Args:
        argument: name of the option that holds `path`, for the message.
        path: the file.
        suffixes: suffix with its dot, in lower case → format.
        chosen: the format that was chosen; None if none was.

    Returns:
        The format; None if none was chosen and the suffix is not among `suffixes`.

    Raises:
        ValueError: the suffix is that of another format than the chosen one.

    Example:
        >>> choose_format("--out", "model.pt2", {".onnx": "onnx", ".pt2": "pt2"})
        'pt2'
        >>> choose_format("--out", "model.pt2", {".onnx": "onnx", ".pt2": "pt2"}, "onnx")
        Traceback (most recent call last):
        ValueError: --out must be a file name that suits the format onnx, got model.pt2
    """
    by_name = suffixes.get(Path(path).suffix.lower())
    if chosen is not None and by_name not in (None, chosen):
        raise invalid(argument, f"a file name that suits the format {chosen}", found=str(path))
    return chosen or by_name
