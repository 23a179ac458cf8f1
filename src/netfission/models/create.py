"""Creation of classifiers by name: this library's CIFAR networks, timm's, torchvision's, Hugging Face's."""

import pickle
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netfission.models.cifar_resnet import CifarResNet
from netfission.models.hugging_face import PREFIX, create_hugging_face
from netfission.models.initialisation import start_classifier
from netfission.models.segmentation_models import PREFIX as ENCODER_DECODER
from netfission.models.segmentation_models import EncoderDecoder, create_encoder_decoder
from netfission.models.weights import TrainedWeights, WeightsReport, load_weights, read_weights
from netfission.models.wide_resnet import WideResNet
from netfission.utils.errors import check_positive_integer, did_you_mean, first_line, invalid
from netfission.utils.extras import extra
from netfission.utils.hub import quick_when_offline

_CIFAR_RESNET = re.compile(r"cifar-resnet(\d+)(?:-w(\d+))?")
_WIDE_RESNET = re.compile(r"wrn-(\d+)-(\d+)")
# These two return a tuple in train mode by default.
_TORCHVISION_WITH_AUXILIARY_HEADS = {"googlenet", "inception_v3"}


def create_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    pretrained: bool = False,
    weights: TrainedWeights | str | Path | None = None,
    report: Callable[[WeightsReport], object] | None = None,
    drop_path: float = 0.0,
    classes: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Create a classifier: images `(batch, in_channels, height, width)` → logits `(batch, num_classes)`.

    These names are known:

    - `cifar-resnet18`, `cifar-resnet34`, `cifar-resnet50`, with an optional base width
      (`cifar-resnet18-w16`; default 64).
    - `wrn-D-W`, a Wide ResNet of depth D = 6n + 4 and width W (`wrn-28-10`).
    - A timm model: `resnet18`, `timm/resnet18`, or with a tag `resnet18.a1_in1k`.
    - A torchvision classifier: `torchvision/resnet18`. Or a network that classifies pixels, which returns a
      dictionary with logits `(batch, num_classes, height, width)` as `"out"`:
      `torchvision/lraspp_mobilenet_v3_large`. It has no auxiliary head, and without `pretrained` its backbone
      has random weights.
    - A network of segmentation-models-pytorch that classifies pixels: `smp/ARCHITECTURE/ENCODER`, such as
      `smp/unet/resnet18` or `smp/deeplabv3plus/tf_efficientnet_lite0`. The encoder is one of the library's
      own, or a timm model. `pretrained` loads published weights of the encoder; `weights` may be those of a
      classifier with the encoder's architecture.
    - An image classifier of Hugging Face's transformers: `hf/google/vit-base-patch16-224`, or `hf/` and a
      folder with `config.json`. Without `pretrained`, its weights are random.

    Args:
        name: one of these names.
        num_classes: number of classes.
        in_channels: channels of the images.
        pretrained: load published weights, which are downloaded on first use. The last layer gets new weights
            if the number of classes differs. New weights are drawn from PyTorch's global generator, small
            enough for logits near 0.
        weights: a file of trained weights, or the folder of a run of one exit, see
            `netfission.models.read_weights`. The classifier gets new weights if the file lacks it, or has
            one of other classes; all other tensors must fit, see `netfission.models.load_weights`.
        report: called with what was loaded, such as `print`.
        drop_path: probability by which models of timm and Hugging Face skip their last block in training; it
            falls linearly to 0 at the first block (Huang et al. 2016).
        classes: names of the classes. The classifier gets new weights, too, if `weights` is the folder of a
            run with other classes, even if they are as many.
        image_size: height and width of the images, in pixels; default those that the model is made for. Only
            models of timm that are made for one size, such as transformers, depend on it; their published
            weights are interpolated to it.

    Raises:
        ValueError: the name is unknown, or `num_classes` or `in_channels` is not valid (torchvision's models
            read 3 channels), or the model cannot be made for `image_size`. Or it has no published weights but
            `pretrained` is True, or the file of weights cannot be read or does not fit.
        ConnectionError: the weights cannot be downloaded.

    Example:
        >>> import torch
        >>> model = create_model("cifar-resnet18-w16", num_classes=10)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_positive_integer("num_classes", num_classes)
    check_positive_integer("in_channels", in_channels)
    if weights is None:
        return _create(name, num_classes, in_channels, pretrained, drop_path, image_size)
    if pretrained:
        raise invalid("weights", "None with pretrained=True, which loads others", found="both")
    trained = weights if isinstance(weights, TrainedWeights) else read_weights(weights)
    model = _create(name, num_classes, in_channels, False, drop_path, image_size)
    with torch.random.fork_rng([]):
        other = _create(name, num_classes + 1, in_channels, False, 0.0, image_size).state_dict()
    classifier = {key for key, value in model.state_dict().items() if value.shape != other[key].shape}
    if None not in (classes, trained.classes) and tuple(classes or ()) != trained.classes:
        known = {key: value for key, value in trained.tensors.items() if key not in classifier}
        trained = replace(trained, tensors=known)
    loaded = _load(model, trained, classifier, name)
    start_classifier(model, classifier.intersection(loaded.new))
    if report is not None:
        report(loaded)
    return model


def _load(model: nn.Module, trained: TrainedWeights, classifier: set[str], name: str) -> WeightsReport:
    """Load trained weights into a model, or those of its encoder alone if the file has no others."""
    try:
        return load_weights(model, trained, classifier=classifier, name=name)
    except ValueError:
        loaded = model.load_encoder(trained, name) if isinstance(model, EncoderDecoder) else None
        if loaded is None:
            raise
        return loaded


def _create(
    name: str,
    num_classes: int,
    in_channels: int,
    pretrained: bool,
    drop_path: float,
    image_size: tuple[int, int] | None,
) -> nn.Module:
    cifar_model = _create_cifar(name, num_classes, in_channels)
    if cifar_model is not None:
        if pretrained:
            raise _without_weights(name)
        if drop_path:
            raise _without_drop_path(name, drop_path)
        return cifar_model
    if name.startswith(PREFIX):
        return create_hugging_face(name, num_classes, in_channels, pretrained, drop_path)
    if name.startswith(ENCODER_DECODER):
        try:
            return create_encoder_decoder(name, num_classes, in_channels, pretrained, drop_path)
        except OSError as error:
            raise _unreachable(name) from error
    if name.startswith("torchvision/"):
        if drop_path:
            raise _without_drop_path(name, drop_path)
        return _create_torchvision(name, num_classes, in_channels, pretrained)
    return _create_timm(name, num_classes, in_channels, pretrained, drop_path, image_size)


def _create_cifar(name: str, num_classes: int, in_channels: int) -> nn.Module | None:
    if match := _CIFAR_RESNET.fullmatch(name):
        depth, base_width = int(match[1]), int(match[2] or 64)
        return CifarResNet(depth, num_classes, in_channels=in_channels, base_width=base_width)
    if match := _WIDE_RESNET.fullmatch(name):
        return WideResNet(int(match[1]), int(match[2]), num_classes, in_channels=in_channels)
    return None


def _create_torchvision(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    with extra("models", f"model {name!r}"):
        from torchvision import models

    bare = name.removeprefix("torchvision/")
    of_pixels = bare in models.list_models(module=models.segmentation)
    if not of_pixels and bare not in models.list_models(module=models):
        raise _unknown(name)
    if in_channels != 3:
        raise invalid("in_channels", "3 for torchvision models", in_channels)
    options: dict[str, Any] = (
        {"aux_logits": False, "init_weights": True, "transform_input": pretrained}
        if bare in _TORCHVISION_WITH_AUXILIARY_HEADS
        else {}
    )
    if of_pixels:
        options = {"weights_backbone": None}
    model: nn.Module = models.get_model(bare, weights=None, num_classes=num_classes, **options)
    if pretrained:
        try:
            published = models.get_model_weights(bare).DEFAULT
            weights = published.get_state_dict(check_hash=True, weights_only=True)
        except OSError as error:
            raise _unreachable(name) from error
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            file = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
            found = f"a damaged file, or one that would run code, in {file}"
            hint = "remove it, and it is downloaded again"
            raise invalid("pretrained weights", f"those of {name!r}", found=found, hint=hint) from error
        # torchvision builds pretrained models with their original number of classes only: weights of
        # another shape are those of the last layer.
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        fitting = {key: value for key, value in weights.items() if shapes.get(key) == value.shape}
        model.load_state_dict(fitting, strict=False)
        start_classifier(model, shapes.keys() - fitting.keys())
    return model


def _create_timm(
    name: str,
    num_classes: int,
    in_channels: int,
    pretrained: bool,
    drop_path: float,
    image_size: tuple[int, int] | None,
) -> nn.Module:
    with extra("models", f"model {name!r}"):
        import timm

    bare = name.removeprefix("timm/")
    architecture, _, tag = bare.partition(".")
    tags = timm.list_pretrained(f"{architecture}.*") if timm.is_model(architecture) else []
    if not timm.is_model(architecture) or (tag and bare not in tags):
        raise _unknown(name, *(f"{prefix}{known}" for known in tags for prefix in ("", "timm/")))
    if pretrained and not timm.is_model_pretrained(architecture):
        raise _without_weights(name)
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if drop_path:
        options["drop_path_rate"] = drop_path
    try:
        with quick_when_offline() if pretrained else nullcontext():
            model = _make_timm(bare, image_size, pretrained=pretrained, **options)
    except OSError as error:
        raise _unreachable(name) from error
    except TypeError as error:  # an argument that the model does not know
        if drop_path and "drop_path_rate" in str(error):
            raise _without_drop_path(name, drop_path) from error
        raise
    if pretrained:
        _start_timm_classifier(model, num_classes)
    if drop_path and not any(type(module).__name__ == "DropPath" for module in model.modules()):
        raise _without_drop_path(name, drop_path)
    return model


def _make_timm(name: str, image_size: tuple[int, int] | None, **options: Any) -> nn.Module:
    """Call timm's `create_model`, with the size of images if the model is made for one of several."""
    import timm

    published = timm.get_pretrained_cfg(name)
    made_for = None if published is None else published.input_size[1:]
    if published is None or not published.fixed_input_size or image_size in (None, made_for):
        return timm.create_model(name, **options)
    try:
        model = timm.create_model(name, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **options)
    except (AssertionError, ValueError, ZeroDivisionError) as error:
        found = f"images of {image_size[0]}×{image_size[1]} ({first_line(error)})"
        raise invalid("image_size", f"a size that {name} accepts", found=found) from error
    settings: Any = model.pretrained_cfg
    settings["input_size"] = (settings["input_size"][0], *image_size)
    return model


def _start_timm_classifier(model: Any, num_classes: int) -> None:
    """Start the classifiers of a pretrained model with small weights if it was trained on other classes."""
    if model.pretrained_cfg.get("num_classes") == num_classes:
        return
    classifiers = model.get_classifier()  # two of distilled transformers
    parts = classifiers if isinstance(classifiers, tuple | list) else [classifiers]
    new = {id(parameter) for part in parts for parameter in part.parameters()}
    start_classifier(model, [name for name, value in model.named_parameters() if id(value) in new])


def _without_drop_path(name: str, drop_path: float) -> ValueError:
    return invalid("drop_path", f"0 for {name!r}, which has no paths to drop", drop_path)


def _unreachable(name: str) -> ConnectionError:
    return ConnectionError(
        f"cannot download the pretrained weights of {name!r}, and they are not in the cache: connect to a "
        "network once, or set pretrained to false"
    )


def _without_weights(name: str) -> ValueError:
    return invalid("pretrained", f"False for {name!r}, which has no published weights", True)


def _unknown(name: str, *tagged: str) -> ValueError:
    with extra("models", f"model {name!r}"):
        import timm
        from torchvision import models

    known = [
        *(f"cifar-resnet{depth}" for depth in (18, 34, 50)),
        *(f"wrn-{depth}-{width}" for depth in (16, 22, 28, 40) for width in (1, 2, 4, 8, 10)),
        *timm.list_models(),
        *(f"torchvision/{other}" for other in models.list_models(module=models)),
        *(f"torchvision/{other}" for other in models.list_models(module=models.segmentation)),
        *tagged,
    ]
    expected = (
        "cifar-resnet18|34|50[-wN], wrn-D-W, a timm name, torchvision/NAME, smp/NAME/ENCODER or hf/NAME"
    )
    return invalid("model", expected, name, hint=did_you_mean(name, known))
