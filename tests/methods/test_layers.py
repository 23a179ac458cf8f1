import pytest
import torch
from torch import nn

from netfission.methods.layers import replace_layers, run_order


class Backwards(nn.Module):
    """Runs its layers in another order than it names them, one of them twice."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.parts = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.again = self.parts[0]

    def forward(self, features):
        return self.last(self.again(self.parts(features)))


def test_layers_are_named_in_the_order_in_which_they_run():
    model = Backwards()
    model.parts.eval()
    assert run_order(model, torch.rand(2, 4), nn.Linear, nn.ReLU) == ["parts.0", "parts.1", "last"]
    assert model.training
    assert not model.parts.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_where_the_model_fails():
    model = Backwards()
    with pytest.raises(RuntimeError):
        run_order(model, torch.rand(2, 5), nn.Linear)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_of_two_names_is_replaced_by_one():
    model = Backwards()
    names = []

    def make(name, module):
        names.append(name)
        return nn.Sequential(module) if isinstance(module, nn.Linear) else None

    assert replace_layers(model, make) is model
    assert isinstance(model.parts[0], nn.Sequential)
    assert model.again is model.parts[0]
    assert names == ["", "last", "parts", "parts.0", "parts.1"]  # nothing of what was made


def test_what_is_replaced_may_be_all():
    layer = nn.Linear(2, 2)
    assert replace_layers(layer, lambda _name, module: nn.Sequential(module))[0] is layer


def test_the_inside_of_an_attention_stays():
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    replace_layers(model, lambda _name, module: nn.Identity() if isinstance(module, nn.Linear) else None)
    assert isinstance(model[0].out_proj, nn.Linear)
    assert isinstance(model[1], nn.Identity)
