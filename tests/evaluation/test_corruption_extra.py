"""What is said where the library that corrupts images is not installed."""

import sys

import pytest

from netfission.evaluation.corruption import library_version
from netfission.utils.extras import MissingExtraError


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(
        MissingExtraError,
        match=r"^evaluation under corruptions needs imagecorruptions; .* 'netfission\[corruptions\]'$",
    ):
        library_version()
