"""Call a model with one argument, whatever it takes: what is traced and divided is a function of one."""

import inspect
from typing import Any

from torch import nn

from netfission.utils.errors import invalid
from netfission.utils.inputs import Inputs

# As transformers' classifiers return them, beside a loss, hidden states and the like.
_LOGITS = "logits"
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class _OneInput(nn.Module):
    """Base of the classes that `with_one_input` makes."""

    input_names: tuple[str, ...] | None
    input_count: int

    def forward(self, inputs: Any) -> Any:
        call: Any = super().forward
        if self.input_names is not None:
            output = call(**{name: inputs[name] for name in self.input_names})
        elif self.input_count:
            output = call(*(inputs[index] for index in range(self.input_count)))
        else:
            output = call(inputs)
        if not isinstance(output, dict) or _LOGITS not in output:
            return output
        if output.get("loss") is not None:
            raise invalid("inputs", "without labels", found="labels, for which the model returns a loss")
        return output[_LOGITS]


def with_one_input(model: nn.Module, example: Inputs) -> nn.Module:
    """Return a model as a function of one argument, whose output is its logits.

    A dictionary gives it its arguments by name, a tuple by position, if it has such arguments. Of a
    dictionary that such a model returns, as classifiers of transformers do, the logits alone are left. A
    model of one argument is returned as it is, unless it takes any keywords. Else the result shares all parts
    and tensors with the model.

    Args:
        model: any module.
        example: an example of its input.

    Example:
        >>> import torch
        >>> model = nn.Bilinear(2, 3, 4)
        >>> pair = torch.zeros(5, 2), torch.zeros(5, 3)
        >>> with_one_input(model, pair)(pair).shape
        torch.Size([5, 4])
    """
    parameters = inspect.signature(model.forward).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    positions = sum(kind in _POSITIONAL for kind in kinds)
    by_name = isinstance(example, dict) and (takes_any or example.keys() <= parameters.keys())
    by_position = isinstance(example, tuple) and (
        positions >= len(example) or inspect.Parameter.VAR_POSITIONAL in kinds
    )
    if isinstance(model, _OneInput) or not (by_name or by_position or takes_any):
        return model
    kind = type(model)
    result: Any = object.__new__(type(kind.__name__, (_OneInput, kind), {"__module__": kind.__module__}))
    vars(result).update(vars(model))
    result.input_names = tuple(example) if isinstance(example, dict) and by_name else None
    result.input_count = len(example) if by_position else 0
    assert isinstance(result, nn.Module)
    return result
