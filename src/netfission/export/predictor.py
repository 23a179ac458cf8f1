"""What is exported: from pixels to all that a `Classifier` predicts, each by its name."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from netfission.classifier import Classifier
from netfission.classifier.predictions import Predictions
from netfission.data.batches import Normalisation
from netfission.methods.layers import replace_layers
from netfission.methods.mc_dropout import MemberDropout
from netfission.surgery.masks import discard_masks

INPUT = "images"


class Output(NamedTuple):
    """An output: the attribute of `Predictions` that it is, and that in words."""

    attribute: str
    meaning: str


OUTPUTS = {
    "probabilities": Output("probabilities", "(batch, classes), float32: of the ensemble, calibrated"),
    "classes": Output("classes", "(batch,), int64: the ensemble's most probable class"),
    "exit_probabilities": Output("exits", "(batch, exits, classes), float32: of each exit"),
    "votes": Output("votes", "(batch, exits), int64: each exit's most probable class"),
    "disagreement": Output("disagreement", "(batch,), float32: share of the pairs of exits that differ"),
    "entropy": Output("entropy", "(batch,), float32: of the ensemble's probabilities, in nats"),
    "mutual_information": Output(
        "mutual_information", "(batch,), float32: of class and exit, in nats: doubt by the exits' differences"
    ),
    "logits": Output("logits", "(batch, exits, classes), float32: divided by the temperature"),
}


class Predictor(nn.Module):
    """Pixels, uint8 `(batch, channels, height, width)` → `OUTPUTS`, as `Classifier.predict` gives them.

    Args:
        network: normalised images → logits `(batch, exits, classes)`; computes in the dtype of its weights.
        normalise: pixels → float32.
        temperature: what logits are divided by.
    """

    def __init__(self, network: nn.Module, normalise: Normalisation, temperature: float) -> None:
        super().__init__()
        self.network = network
        self.normalise = normalise
        self.temperature = temperature
        self.dtype = next(network.parameters()).dtype
        self.eval().requires_grad_(False)

    @classmethod
    def from_classifier(cls, classifier: Classifier, *, half: bool = False) -> "Predictor":
        """From a classifier, which is not changed.

        Args:
            classifier: what predicts.
            half: compute in float16 between normalisation and logits.
        """
        normalise = Normalisation(classifier.spec.mean, classifier.spec.std)
        network = plain(classifier.network, torch.zeros(2, *classifier.spec.shape))
        return cls(network.half() if half else network, normalise, classifier.temperature)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Pixels → outputs by name."""
        logits = self.network(self.normalise(images).to(self.dtype)).float()
        predictions = Predictions(logits / self.temperature)
        return {name: getattr(predictions, output.attribute) for name, output in OUTPUTS.items()}


@torch.no_grad()
def plain(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy on the CPU, in eval mode, that computes with stored numbers alone.

    Masks are burnt in, and what MC dropout draws anew from its seed at each call is stored: neither masks
    nor generators can be exported.

    Args:
        network: images → logits.
        images: normalised, an example.
    """
    network = copy.deepcopy(network).cpu().eval()
    discard_masks(network)
    shapes: dict[nn.Module, torch.Size] = {}
    drawing = [layer for layer in network.modules() if isinstance(layer, MemberDropout)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: shapes.update({layer: inputs[0].shape[1:]}))
        for layer in drawing
    ]
    network(images)
    for hook in hooks:
        hook.remove()

    def stored(_: str, layer: nn.Module) -> nn.Module | None:
        return _Factors(layer, shapes[layer]) if isinstance(layer, MemberDropout) else None

    return replace_layers(network, stored).requires_grad_(False)


class _Factors(nn.Module):
    """A `MemberDropout` in eval mode, for features of one shape."""

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
def exporting() -> Iterator[None]:
    """Without the exporters' warnings; what they raise becomes a RuntimeError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # whatever they raise, of many lines
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).splitlines() or [""])[0]
        raise RuntimeError(f"the network cannot be exported ({type(cause).__name__}: {reason})") from error


def traced(module: nn.Module, inputs: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """A module's operations for any batch size, without where in its source each comes from.

    Args:
        module: in eval mode; takes the inputs in this order.
        inputs: examples of two rows or more; the first dimension of each is the batch.

    Raises:
        RuntimeError: the module cannot be traced.
    """
    batch = {0: torch.export.Dim.DYNAMIC}
    with exporting():
        program = torch.export.export(
            module, tuple(inputs.values()), dynamic_shapes=tuple(batch for _ in inputs), strict=False
        )
    for part in program.graph_module.modules():
        for node in getattr(getattr(part, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # holds paths of this machine
    return program
