"""Access to the Hugging Face hub, which fails fast and in plain words if there is no network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from netfission.utils.errors import invalid

_TIMEOUT_S = 10


def load_from_hub(hub_name: str, config: str | None = None) -> Any:
    """Load a data set from the hub, or from the hub's cache on this machine if the hub is out of reach.

    Args:
        hub_name: owner and name, such as `"uoft-cs/cifar10"`.
        config: of a data set that comes in several; default its only or its default one.

    Returns:
        A `datasets.DatasetDict`.

    Raises:
        ConnectionError: the hub is out of reach and the data set is not in the cache.
        ValueError: the data set has no such configuration, or needs the name of one.
    """
    import datasets

    try:
        with quick_when_offline():
            return datasets.load_dataset(hub_name, *([] if config is None else [config]))
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(
            f"cannot fetch the data set {hub_name!r} from the hub, and it is not cached here: "
            "connect to a network once, or pass a folder of parquet shards or images"
        ) from error
    except ValueError as error:  # of several lines, the last of them about the library's own functions
        reason = " ".join(str(error).splitlines()[:2])
        raise invalid(
            hub_name, "a data set that the hub has", found=f"config={config}", hint=reason
        ) from error


@contextmanager
def quick_when_offline() -> Iterator[None]:
    """Put the hub client into its offline mode if the hub is out of reach.

    Without it, the client retries each file for half a minute before it turns to its cache.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not is_in_reach()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_in_reach() -> bool:
    """Return whether the hub answers."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except (
        Exception
    ):  # the client's HTTP library, and so the type of its errors, differs between its releases
        return False
    return True
