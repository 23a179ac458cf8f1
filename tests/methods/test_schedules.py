import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfission.methods.schedules import SCHEDULES, cosine, one_cycle, paper


def test_paper_holds_then_falls_linearly_then_holds():
    # arXiv 2408.02301: 0.1 to half of the training, linear to 0.001 at 90 %, held.
    expected = {0.0: 0.1, 0.5: 0.1, 0.7: 0.0505, 0.9: 0.001, 1.0: 0.001}
    assert {at: 0.1 * paper(at) for at in expected} == pytest.approx(expected)


def test_cosine_and_one_cycle_at_their_corners():
    assert [cosine(at) for at in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [one_cycle(at) for at in (0, 0.15, 0.3, 0.65, 1)] == pytest.approx([0.04, 0.52, 1, 0.5, 0])


@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0, 1))
def test_factors_stay_within_the_peak(name, progress):
    assert 0 <= SCHEDULES[name](progress) <= 1 + 1e-12
