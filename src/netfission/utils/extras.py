"""Optional dependencies: what to install if one of them is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message says what to install."""


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Turn the failed import of a package into an error that names the extra to install.

    Args:
        name: the extra of netfission that the package belongs to.
        purpose: what needs the package, for the message.

    Raises:
        MissingExtraError: a package other than netfission is not installed.

    Example:
        >>> with extra("train", "netfission train"):
        ...     import no_such_package
        Traceback (most recent call last):
        netfission.utils.extras.MissingExtraError: netfission train needs no_such_package; install it by \
pip install 'netfission[train]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "netfission"):
            raise
        hint = f"install it by pip install 'netfission[{name}]'"
        raise MissingExtraError(f"{purpose} needs {package}; {hint}", name=error.name) from error
