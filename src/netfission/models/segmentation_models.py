"""Networks of segmentation-models-pytorch, as modules that map images of any size to logits of each pixel."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from netfission.models.weights import TrainedWeights, WeightsReport, fit_part, load_weights
from netfission.utils.errors import did_you_mean, first_line, invalid
from netfission.utils.extras import extra
from netfission.utils.hub import quick_when_offline

PREFIX = "smp/"


class EncoderDecoder(nn.Module):
    """A network of segmentation-models-pytorch: images → logits `(batch, classes, height, width)`.

    Images are padded with zeros at the right and the bottom to a size that the encoder divides, and the
    logits of the padding are left out.

    Args:
        model: the network, with `encoder` and `decoder`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        settings: Any = model
        settings.requires_divisible_input_shape = False  # its own check asks for what `forward` does
        self._divisor: int = settings.encoder.output_stride
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        height, width = images.shape[-2:]
        padding = (0, -width % self._divisor, 0, -height % self._divisor)
        logits: Tensor = self.model(F.pad(images, padding))
        return logits[..., :height, :width]

    @property
    def encoder(self) -> nn.Module:
        """The encoder, whose tensors have the names that files of its weights have for them."""
        encoder = self.model.get_submodule("encoder")
        inner = getattr(encoder, "model", None)  # of timm
        return inner if isinstance(inner, nn.Module) else encoder

    def load_encoder(self, weights: TrainedWeights, name: str) -> WeightsReport | None:
        """Load the weights of a classifier of the encoder's architecture, without its last layers.

        Those of another network with this encoder are taken so, too, without its decoder.

        Args:
            weights: the tensors.
            name: of the network, for messages.

        Returns:
            What was loaded; None, without a change, if the file lacks a tensor of the encoder.
        """
        encoder = self.encoder
        part = fit_part(weights, encoder)
        if part is None:
            return None
        loaded = load_weights(encoder, part, name=name)
        inside = {id(tensor) for tensor in encoder.state_dict(keep_vars=True).values()}
        own = self.state_dict(keep_vars=True).items()
        return replace(loaded, new=tuple(key for key, tensor in own if id(tensor) not in inside))


def create_encoder_decoder(
    name: str, num_classes: int, in_channels: int, pretrained: bool, drop_path: float = 0.0
) -> EncoderDecoder:
    """Create a network of segmentation-models-pytorch.

    Args:
        name: `smp/ARCHITECTURE/ENCODER`, such as `smp/unet/resnet18`. The encoder is one of the library's
            own, or a timm model.
        num_classes: number of classes.
        in_channels: channels of the images.
        pretrained: load published weights of the encoder; the decoder's are random.
        drop_path: 0.

    Raises:
        ValueError: there is no such architecture or encoder, or they do not fit; or `drop_path` is not 0.
        OSError: the weights cannot be downloaded.
        MissingExtraError: segmentation-models-pytorch is not installed.
    """
    with extra("segmentation", f"model {name!r}"):
        import segmentation_models_pytorch as smp
    import timm

    architecture, _, encoder = name.removeprefix(PREFIX).partition("/")
    known = smp.MODEL_ARCHITECTURES_MAPPING
    own = smp.encoders.get_encoder_names()
    bare = encoder.removeprefix("tu-")  # the library's mark of timm's models
    if architecture not in known:
        expected = f"smp/ARCHITECTURE/ENCODER with an architecture among {', '.join(known)}"
        raise invalid("model", expected, name, hint=did_you_mean(architecture, known))
    if not encoder:
        raise invalid("model", "smp/ARCHITECTURE/ENCODER", name, hint=f"such as {name}/resnet18")
    if encoder not in own and not timm.is_model(bare.partition(".")[0]):
        expected = "smp/ARCHITECTURE/ENCODER with an encoder of segmentation-models-pytorch or timm"
        raise invalid("model", expected, name, hint=did_you_mean(encoder, {*own, *timm.list_models()}))
    if drop_path:
        raise invalid("drop_path", "0 for networks of segmentation-models-pytorch", drop_path)
    is_own = encoder in own
    weights = ("imagenet" if is_own else True) if pretrained else None
    try:
        with quick_when_offline():
            model = smp.create_model(
                architecture,
                encoder if is_own else f"tu-{bare}",
                encoder_weights=weights,
                in_channels=in_channels,
                classes=num_classes,
            )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        expected = "an architecture and an encoder that fit each other"
        raise invalid("model", expected, found=f"{name} ({first_line(error)})") from error
    return EncoderDecoder(model)
