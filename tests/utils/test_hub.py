import time

import pytest
from huggingface_hub import constants

from netfission.data import load_data
from netfission.utils.hub import load_from_hub


def test_without_network_it_ends_soon_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="cannot fetch the data set 'uoft-cs/cifar10'") as e:
        load_data("cifar10")
    assert time.monotonic() - start < 15
    assert "\n" not in str(e.value)
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("reachable", [True, False])
def test_offline_mode_only_where_the_hub_is_out_of_reach(
    reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        def head(self, url: str, timeout: float) -> None:
            if not reachable:
                raise TimeoutError

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", lambda _: constants.HF_HUB_OFFLINE)
    assert load_from_hub("anything") is not reachable
    assert constants.HF_HUB_OFFLINE is False
