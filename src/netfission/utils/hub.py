"""The Hugging Face hub, and what to say without a network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TIMEOUT_S = 10


def load_from_hub(hub_name: str) -> Any:
    """Load a data set (a `DatasetDict`) from the hub, or from its cache where there is no network.

    Raises ConnectionError where it is neither cached nor within reach.
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
    """Put the hub client into its offline mode where the hub is out of reach.

    Left alone it retries each file for half a minute before it turns to its cache.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not is_in_reach()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_in_reach() -> bool:
    """Whether the hub answers."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception:  # the client's own exceptions, which differ between its releases
        return False
    return True
