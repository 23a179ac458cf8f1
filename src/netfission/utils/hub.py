"""Access to the Hugging Face hub, which fails fast and in plain words if there is no network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TIMEOUT_S = 10


def load_from_hub(hub_name: str) -> Any:
    """Load a data set from the hub, or from the hub's cache on this machine if the hub is out of reach.

    Args:
        hub_name: owner and name, such as `"uoft-cs/cifar10"`.

    Returns:
        A `datasets.DatasetDict`.

    Raises:
        ConnectionError: the hub is out of reach and the data set is not in the cache.
    """
    import datasets

    try:
        with quick_when_offline():
            return datasets.load_dataset(hub_name)
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(
            f"cannot fetch the data set {hub_name!r} from the hub, and it is not cached here: "
            "connect to a network once, or pass a folder of parquet shards or images"
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
