"""Detectors of out-of-distribution images that read the features of the exits, by the library pytorch-ood.

Every exit ends in a linear layer, whose input is the exit's features. The mean of the exits' logits is one
linear layer on the features of all exits side by side. A detector of one network therefore applies to the
ensemble as its paper defines it; also if the ensemble averages probabilities, ViM and ReAct read the mean of
logits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netfission.utils.errors import check_choice, invalid
from netfission.utils.extras import extra

FeatureDetector = Literal["mahalanobis", "knn", "vim", "react"]
FeatureScore = Callable[[Tensor], Tensor]  # features `(n, width)` → scores `(n,)`, higher for unusual images
NEIGHBOURS = 50  # as in pytorch-ood, and in OpenOOD (arXiv 2306.09301) by default


@dataclass(frozen=True)
class ExitFeatures:
    """The outputs of a network's exits, and what each of them was computed from.

    Attributes:
        logits: `(n, exits, classes)`, float32, on the CPU.
        features: per exit the input of its linear layer, `(n, width)`, float32, on the CPU.
        layers: that layer of each exit.
    """

    logits: Tensor
    features: list[Tensor]
    layers: list[nn.Linear]

    @property
    def side_by_side(self) -> Tensor:
        """The features of all exits, `(n, sum of widths)`."""
        return torch.cat(self.features, dim=1)

    def mean_head(self, weights: Sequence[float] | None = None) -> "Head":
        """Return the linear layer that maps the features of all exits to the mean of their logits.

        Args:
            weights: of the exits; default equal weights.

        Example:
            >>> network = nn.Linear(3, 2)
            >>> outputs = exit_features(network, lambda images: network(images)[:, None], torch.rand(5, 3))
            >>> torch.equal(outputs.mean_head()(outputs.side_by_side), outputs.logits.mean(dim=1))
            True
        """
        weights = weights or [1.0] * len(self.layers)
        parts = [
            (layer.weight.detach().float().cpu(), _bias(layer), weight / sum(weights))
            for layer, weight in zip(self.layers, weights, strict=True)
        ]
        return Head(
            torch.cat([weight * share for weight, _, share in parts], dim=1),
            torch.stack([bias * share for _, bias, share in parts]).sum(dim=0),
        )


class Head(NamedTuple):
    """A linear layer from features to logits.

    Attributes:
        weight: `(classes, width)`, float32.
        bias: `(classes,)`, float32.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Map features `(n, width)` to logits `(n, classes)`."""
        return F.linear(features, self.weight, self.bias)


def exit_features(network: nn.Module, logits_of: Callable[[Tensor], Tensor], images: Tensor) -> ExitFeatures:
    """Run a network, and return the logits of its exits and the features that they were computed from.

    Args:
        network: whose layers are read. The layer of an exit is the linear layer that returns its logits.
        logits_of: runs the network: images → logits `(n, exits, classes)`.
        images: its argument.

    Raises:
        ValueError: the logits of an exit are not those of a linear layer.

    Example:
        >>> import netfission as nf
        >>> from netfission.models import create_model
        >>> model = create_model("wrn-10-1", num_classes=10)
        >>> net = nf.fission(model, exits=2, example_input=torch.zeros(1, 3, 32, 32)).eval()
        >>> [features.shape for features in exit_features(net, net, torch.zeros(4, 3, 32, 32)).features]
        [torch.Size([4, 64]), torch.Size([4, 64])]
    """
    with torch.no_grad(), _linear_calls(network) as calls:
        logits = _on_cpu(logits_of(images))
    chosen = []
    for number, exit_logits in enumerate(logits.unbind(dim=1)):
        call = next(
            (call for call in reversed(calls) if torch.equal(_on_cpu(call.output), exit_logits)), None
        )
        if call is None:
            found = f"exit {number}, whose logits are no linear layer's output"
            raise invalid(
                "feature_detectors", "left out unless every exit ends in a linear layer", found=found
            )
        chosen.append(call)
    return ExitFeatures(logits, [_on_cpu(call.input) for call in chosen], [call.layer for call in chosen])


def detectors_library() -> str:
    """Return the name and version of the library that detects.

    Raises:
        MissingExtraError: the library is not installed.
    """
    _library()
    return f"pytorch-ood {version('pytorch-ood')}"


def check_detectors(names: Sequence[str]) -> None:
    """Raise ValueError unless all are names of detectors, MissingExtraError unless they are installed.

    Example:
        >>> check_detectors(["odin"])
        Traceback (most recent call last):
        ValueError: feature_detectors must be one of mahalanobis, knn, vim, react, got 'odin'
    """
    for name in names:
        check_choice("feature_detectors", name, get_args(FeatureDetector))
    if names:
        _library()


def fit_detector(name: FeatureDetector, features: Tensor, labels: Tensor, head: Head) -> FeatureScore:
    """Fit a detector to the features of training images.

    - `mahalanobis`: distance to the nearest class mean by the covariance within classes (Lee et al. 2018,
      arXiv 1807.03888), without perturbed inputs.
    - `knn`: distance to the 50th nearest training image, of features of length 1 (Sun et al. 2022, arXiv
      2204.06507).
    - `vim`: size of what the principal subspace of the features lacks, less the energy's negative (Wang et
      al. 2022, arXiv 2203.10807). The subspace has the dimension of the paper: 1,000 from 2,048 features on,
      512 from 768 on, else half of them.
    - `react`: energy of the mean logits after features are cut at the 90th percentile (Sun et al. 2021, arXiv
      2111.12797).

    Args:
        name: of the detector.
        features: `(n, width)`, float32, of training images.
        labels: `(n,)`, int64.
        head: from features to logits.

    Returns:
        A function: features `(m, width)` → scores `(m,)`, higher for images that are less usual.

    Raises:
        ValueError: the detector is unknown, or there are too few images for the covariance of their features:
            for `mahalanobis` fewer than features and classes together, for `vim` than the dimension.
        MissingExtraError: the library is not installed.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> features, labels = torch.randn(90, 4, generator=generator), torch.arange(90) % 3
        >>> score = fit_detector("knn", features, labels, Head(torch.eye(3, 4), torch.zeros(3)))
        >>> score(torch.tensor([[1.0, 1, 1, 1]])).shape
        torch.Size([1])
    """
    check_detectors([name])
    return _FITS[name](features, labels, head)


def _fit_mahalanobis(features: Tensor, labels: Tensor, head: Head) -> FeatureScore:
    classes, dense = labels.unique(return_inverse=True)  # the library needs images of every class
    _check_images("mahalanobis", features, features.shape[1] + len(classes))
    try:
        fitted = _library().Mahalanobis(None).fit_features(features, dense)
    except RuntimeError as error:  # of the inversion
        hint = "the covariance of the features cannot be inverted, as some depend on others"
        raise invalid("feature_detectors", "left out here", "mahalanobis", hint=hint) from error
    return _scores(fitted.predict_features)


def _fit_knn(features: Tensor, labels: Tensor, head: Head) -> FeatureScore:
    detector = _library().KNN(None, k=min(NEIGHBOURS, len(features)))
    return _scores(detector.fit_features(features, labels).predict_features)


def _fit_vim(features: Tensor, labels: Tensor, head: Head) -> FeatureScore:
    dimension = _principal_dimension(features.shape[1])
    _check_images("vim", features, dimension)
    detector = _library().ViM(None, d=dimension, w=head.weight, b=head.bias)
    return _scores(detector.fit_features(features, labels).predict_features)


def _fit_react(features: Tensor, labels: Tensor, head: Head) -> FeatureScore:
    detector = _library().ReAct(None, head=head)
    return _scores(detector.fit_feature_maps(features, labels).predict_feature_maps)


_FITS: dict[str, Callable[[Tensor, Tensor, Head], FeatureScore]] = {
    "mahalanobis": _fit_mahalanobis,
    "knn": _fit_knn,
    "vim": _fit_vim,
    "react": _fit_react,
}


def _check_images(name: str, features: Tensor, fewest: int) -> None:
    """Refuse fewer images than the covariance of their features needs to have a meaning."""
    images, width = features.shape
    if images < fewest:
        expected = f"left out with fewer than {fewest:,} training images, as there are {width:,} features"
        raise invalid("feature_detectors", expected, found=f"{name!r} and {images:,} images")


def _scores(predict: Callable[[Tensor], Tensor]) -> FeatureScore:
    return lambda features: predict(features).double()


def _principal_dimension(width: int) -> int:
    return 1000 if width >= 2048 else 512 if width >= 768 else width // 2


class _Call(NamedTuple):
    """One call of a linear layer: input `(n, width)`, output `(n, classes)`."""

    layer: nn.Linear
    input: Tensor
    output: Tensor


@contextmanager
def _linear_calls(network: nn.Module) -> Iterator[list[_Call]]:
    """List the calls of a network's linear layers on one vector per image."""
    calls: list[_Call] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Linear) and output.ndim == 2:
            calls.append(_Call(layer, inputs[0], output))

    handles = [
        module.register_forward_hook(record) for module in network.modules() if isinstance(module, nn.Linear)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _on_cpu(values: Tensor) -> Tensor:
    return values.detach().float().cpu()


def _bias(layer: nn.Linear) -> Tensor:
    return torch.zeros(layer.out_features) if layer.bias is None else _on_cpu(layer.bias)


def _library() -> Any:
    with extra("ood", "detection by features"):
        from pytorch_ood import detector
    return detector
