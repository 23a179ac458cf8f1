import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netfission.pruning.magnitude import magnitude

values = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20)


@given(st.lists(values, min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_score_is_the_absolute_value(tensors: list[list[float]]) -> None:
    weights = {str(i): torch.tensor(tensor) for i, tensor in enumerate(tensors)}
    scores = magnitude(torch.nn.Identity(), weights, [], torch.Generator())
    assert {name: score.tolist() for name, score in scores.items()} == {
        str(i): [abs(value) for value in tensor] for i, tensor in enumerate(tensors)
    }
