"""Writing files so that a crash leaves the old content or the new, never a part."""

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary neighbour that takes its name once it is safely on disk.

    Args:
        path: The file; what it held is replaced. Its folder must exist.
        content: Text is written as UTF-8, line ends as they are.

    Raises:
        OSError: The write failed (full disk, no such folder, no permission). `path` is as it
            was, no temporary file is left, and the error's `filename` is `path`.
    """
    write_together({path: content})


def write_together(files: Mapping[Path, str | bytes], *, removed: Iterable[Path] = ()) -> None:
    """`write_whole` of files that belong together: none changes before all are safely on disk.

    Args:
        files: contents by path; they take their names in this order.
        removed: files that go before the first of them does: what would not fit some of them alone.

    Raises:
        OSError: see `write_whole`; where it was for want of space, no file has changed.
    """
    with contextlib.ExitStack() as cleanup:
        written = {}
        for path, content in files.items():
            # tempfile would make the file readable by its owner alone; open() follows the umask.
            written[path] = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            cleanup.callback(_remove, written[path])
            with _named_in_errors(path):
                _write(written[path], content.encode() if isinstance(content, str) else content)
        for path in removed:
            path.unlink(missing_ok=True)
        for path, temporary in written.items():
            with _named_in_errors(path):
                temporary.replace(path)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # gone already, or never made
        path.unlink()


@contextlib.contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
