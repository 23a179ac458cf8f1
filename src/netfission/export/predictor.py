"""The module that is exported: pixels → all that a `Classifier` predicts, by name."""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from netfission.classifier import Classifier
from netfission.classifier.predictions import AnswerLimits, Predictions
from netfission.data.batches import Normalisation
from netfission.ensemble import Average
from netfission.methods.layers import replace_layers
from netfission.methods.mc_dropout import MemberDropout
from netfission.surgery.masks import discard_masks

INPUT = "images"


# Outputs by name, all of them attributes of `Predictions`, with their descriptions.
OUTPUTS = {
    "probabilities": "(batch, classes), float32: of the ensemble, calibrated",
    "classes": "(batch,), int64: the ensemble's most probable class",
    "exit_probabilities": "(batch, exits, classes), float32: of each exit",
    "votes": "(batch, exits), int64: each exit's most probable class",
    "disagreement": "(batch,), float32: share of the pairs of exits that differ",
    "entropy": "(batch,), float32: of the ensemble's probabilities, in nats",
    "mutual_information": "(batch,), float32: of class and exit, in nats; uncertainty from disagreement",
    "logits": "(batch, exits, classes), float32: divided by the temperature",
}


# Further outputs of a file whose answers keep to limits: name → attribute of `Predictions`, and description.
PROMISED = {
    "abstain": ("abstains", "(batch,), bool: whether the answer is withheld"),
    "set": ("sets", "(batch, classes), bool: which classes are in the prediction set"),
    "p_value": ("p_values", "(batch,), float32: of coming from the distribution of the calibration images"),
    "out_of_distribution": ("out_of_distribution", "(batch,), bool: whether it is marked as such"),
}


def promised_outputs(limits: AnswerLimits) -> dict[str, str]:
    """Return the outputs that limits ask for, with their descriptions.

    Example:
        >>> list(promised_outputs(AnswerLimits(coverage=0.9, quantiles=[1.0, 1.0])))
        ['set']
    """
    asked = {
        "abstain": limits.threshold is not None,
        "set": limits.coverage is not None,
        "p_value": limits.detector is not None,
        "out_of_distribution": limits.accept_false_alarms is not None,
    }
    return {name: description for name, (_, description) in PROMISED.items() if asked[name]}


class Predictor(nn.Module):
    """A module that returns the predictions of a `Classifier` as `OUTPUTS`, by name.

    Its input is pixels, uint8 `(batch, channels, height, width)`.

    Args:
        network: normalised images → logits `(batch, exits, classes)`, in the dtype of its weights.
        normalise: pixels → normalised images, float32.
        temperature: divisor of the logits.
        average: what the ensemble averages over the exits.
        limits: that the answers keep to; they add the outputs of `promised_outputs`. Default: none.
    """

    def __init__(
        self,
        network: nn.Module,
        normalise: Normalisation,
        temperature: float,
        *,
        average: Average,
        limits: AnswerLimits | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.normalise = normalise
        self.temperature = temperature
        self.average = average
        self.limits = limits or AnswerLimits()
        self.dtype = next(network.parameters()).dtype
        self.training = network.training

    @classmethod
    def from_classifier(
        cls, classifier: Classifier, *, half: bool = False, limits: AnswerLimits | None = None
    ) -> "Predictor":
        """Make the module of a classifier, which is not changed.

        Args:
            classifier: the classifier.
            half: whether to compute in float16 between normalisation and logits.
            limits: that the answers keep to; default none.
        """
        normalise = Normalisation(classifier.spec.mean, classifier.spec.std)
        network = make_exportable(classifier.network, torch.zeros(2, *classifier.spec.shape))
        network = network.half() if half else network
        return cls(network, normalise, classifier.temperature, average=classifier.spec.average, limits=limits)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return outputs by name."""
        logits = self.network(self.normalise(images).to(self.dtype)).float()
        predictions = Predictions.from_logits(logits, self.temperature, self.limits, average=self.average)
        outputs = {name: getattr(predictions, name) for name in OUTPUTS}
        for name in promised_outputs(self.limits):
            promised: Tensor = getattr(predictions, PROMISED[name][0])
            outputs[name] = promised.float() if promised.is_floating_point() else promised
        return outputs


@torch.no_grad()
def make_exportable(network: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy on the CPU, in eval mode, without masks and random numbers, which cannot be exported.

    Weights hold the zeros of their masks. The factors that MC dropout draws from its seed at each call are
    stored.

    Args:
        network: images → logits.
        images: normalised images, as an example.
    """
    network = copy.deepcopy(network).cpu().eval()
    discard_masks(network)
    shapes: dict[nn.Module, torch.Size] = {}
    dropouts = [layer for layer in network.modules() if isinstance(layer, MemberDropout)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: shapes.update({layer: inputs[0].shape[1:]}))
        for layer in dropouts
    ]
    network(images)
    for hook in hooks:
        hook.remove()

    def store_factors(_: str, layer: nn.Module) -> nn.Module | None:
        return _StoredDropout(layer, shapes[layer]) if isinstance(layer, MemberDropout) else None

    return replace_layers(network, store_factors).requires_grad_(False)


class _StoredDropout(nn.Module):
    """A `MemberDropout` in eval mode with stored factors, for features of one shape."""

    factors: Tensor

    def __init__(self, layer: MemberDropout, shape: torch.Size) -> None:
        super().__init__()
        factors = layer(torch.ones(layer.members, *shape))
        self.register_buffer("factors", factors.unsqueeze(1))

    def forward(self, features: Tensor) -> Tensor:
        rows = features.unflatten(0, (len(self.factors), -1))
        dropped: Tensor = (rows * self.factors).flatten(0, 1)
        return dropped


@contextmanager
def export_errors() -> Iterator[None]:
    """Silence the exporters' warnings, and turn what they raise into a RuntimeError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # exporters raise errors of many kinds and lines
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).splitlines() or [""])[0]
        raise RuntimeError(f"the network cannot be exported ({type(cause).__name__}: {reason})") from error


def batch_shapes(module: nn.Module, inputs: int, batch: Any) -> tuple[Any, ...]:
    """Return which dimensions of a module's inputs vary, as `torch.export` takes them: the first of each.

    Args:
        module: called with the inputs in their order.
        inputs: number of inputs.
        batch: the dimension.

    Example:
        >>> batch_shapes(nn.Identity(), 1, "batch")
        ({0: 'batch'},)
    """
    shapes = tuple({0: batch} for _ in range(inputs))
    parameters = inspect.signature(module.forward).parameters.values()
    takes_any_number = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return (shapes,) if takes_any_number else shapes


def trace(module: nn.Module, inputs: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """Trace a module for any batch size; the result does not refer to its source files.

    Args:
        module: in eval mode; called with the inputs in this order.
        inputs: examples of two rows or more; the first dimension of each is the batch.

    Raises:
        RuntimeError: the module cannot be traced.
    """
    shapes = batch_shapes(module, len(inputs), torch.export.Dim.DYNAMIC)
    with export_errors():
        program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
    for part in program.graph_module.modules():
        for node in getattr(getattr(part, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # holds paths of this machine
    return program
