"""The examples in docstrings do what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import netfission

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(netfission.__path__, "netfission.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", ["netfission", *MODULES])
def test_examples_of_a_module_run(name: str, tmp_path, monkeypatch) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("netfission"):
            raise
        pytest.skip(f"needs {error.name}")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert doctest.testmod(module).failed == 0
    assert not any(tmp_path.iterdir())
