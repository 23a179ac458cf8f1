"""What the tests of exports share."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _fast_exports(one_table_of_operators):
    """Exports of all these tests are fast."""
