"""Writing files so that a crash leaves the old content or the new, never a part."""

import contextlib
import os
import secrets
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
    data = content.encode() if isinstance(content, str) else content
    # tempfile would make the file readable by its owner alone; open() follows the umask.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # gone already, or never made
            temporary.unlink()
