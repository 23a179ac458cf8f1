"""Every name that a package of netfission offers shows an example."""

import importlib
import inspect
import pkgutil

import pytest

import netfission

PACKAGES = ["netfission"] + [
    module.name for module in pkgutil.walk_packages(netfission.__path__, "netfission.") if module.ispkg
]


def public_names() -> list[tuple[str, str]]:
    """Package and name of all that `__all__` lists, except of packages whose dependency is missing."""
    pairs = []
    for name in PACKAGES:
        try:
            package = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("netfission"):
                raise
            continue
        pairs += [(name, public_name) for public_name in getattr(package, "__all__", ())]
    return pairs


@pytest.mark.parametrize(("package", "name"), public_names())
def test_a_public_name_has_an_example(package: str, name: str) -> None:
    value = getattr(importlib.import_module(package), name)
    if not inspect.isclass(value) and not inspect.isroutine(value):
        pytest.skip("a constant has no docstring")
    assert ">>>" in (inspect.getdoc(value) or ""), f"{package}.{name} has no example"
