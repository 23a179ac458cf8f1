"""Image classifiers of Hugging Face's transformers, as modules that map images to logits."""

import copy
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netfission.utils.errors import first_line, invalid
from netfission.utils.extras import extra
from netfission.utils.hub import is_in_reach, quick_when_offline

PREFIX = "hf/"
_EXPECTED = "hf/NAME of an image classifier, on the hub or in a folder with config.json"
_CONFIG = "config.json"


class HuggingFaceClassifier(nn.Module):
    """A classifier of transformers: images `(batch, channels, height, width)` → logits `(batch, classes)`.

    Args:
        model: a model for image classification.

    Attributes:
        model: the model.
        pretrained_cfg: `input_size`, the channels, height and width of the images that its settings name;
            empty if they name none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        size = getattr(config, "image_size", None)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        self.pretrained_cfg = {} if size is None else {"input_size": (channels, height, width)}

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(pixel_values=images).logits
        return logits

    def by_own_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors that transformers has stored by the names that the model has for them.

        For some models these differ. A tensor of another shape than the model's comes without values.
        """
        config: Any = copy.deepcopy(self.model.config)
        kind: Any = type(self.model)
        with torch.random.fork_rng([]), _quiet():
            model, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        others = {key: torch.empty(shape, device="meta") for key, shape, _ in found["mismatched_keys"]}
        lacking = found["missing_keys"] | others.keys()
        own = {key: tensor for key, tensor in model.state_dict().items() if key not in lacking} | others
        unexpected = {key: tensors[key] for key in found["unexpected_keys"] if key in tensors}
        return {f"model.{key}": tensor for key, tensor in own.items()} | unexpected


def create_hugging_face(
    name: str, num_classes: int, in_channels: int, pretrained: bool, drop_path: float = 0.0
) -> HuggingFaceClassifier:
    """Create a classifier of transformers.

    Args:
        name: `hf/` and the name of a model on the hub, or a folder with `config.json`.
        num_classes: number of classes.
        in_channels: channels of the images.
        pretrained: load its weights. A classifier of other classes gets new ones.
        drop_path: probability by which the last block is skipped in training.

    Raises:
        ValueError: there is no such model, it is no image classifier, or its weights do not fit.
        ConnectionError: the hub is out of reach, and the model is not in its cache.
        MissingExtraError: transformers is not installed.
    """
    auto_model = _auto_model(name)
    config = _read_config(name)
    config.num_labels = num_classes
    if in_channels != getattr(config, "num_channels", 3):
        if pretrained or not hasattr(config, "num_channels"):
            raise invalid("in_channels", f"{getattr(config, 'num_channels', 3)} for {name}", in_channels)
        config.num_channels = in_channels
    if drop_path:
        if not hasattr(config, "drop_path_rate"):
            raise invalid("drop_path", f"0 for {name!r}, which has no paths to drop", drop_path)
        config.drop_path_rate = drop_path
    if config.architectures is None:  # which transformers does not expect
        config.architectures = []
    try:
        if not pretrained:
            model = auto_model.from_config(config, dtype=torch.float32, trust_remote_code=False)
            return HuggingFaceClassifier(model).train()
        with _quiet(), quick_when_offline():
            model, loaded = auto_model.from_pretrained(
                name.removeprefix(PREFIX),
                config=config,
                trust_remote_code=False,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except OSError as error:
        raise _not_found(name, error, "weights") from error
    except pickle.UnpicklingError as error:
        found = f"{name}, whose weights are a pickle that would run code"
        raise invalid("model", _EXPECTED, found=found) from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        found = f"{name} of type {config.model_type}, which classifies no images"
        raise invalid("model", _EXPECTED, found=found) from error
    _check_loaded(name, model, config, loaded)
    return HuggingFaceClassifier(model).train()


def _auto_model(name: str) -> Any:
    with extra("hf", f"model {name!r}"):
        from transformers import AutoModelForImageClassification
    return AutoModelForImageClassification


def _read_config(name: str) -> Any:
    from transformers import AutoConfig

    place = name.removeprefix(PREFIX)
    if not place:
        raise invalid("model", _EXPECTED, name)
    if Path(place).is_dir() and not (Path(place) / _CONFIG).is_file():
        raise invalid("model", _EXPECTED, found=f"{name}, a folder without {_CONFIG}")
    try:
        with _quiet(), quick_when_offline():
            return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except OSError as error:
        raise _not_found(name, error, _CONFIG) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # settings of another kind
        raise invalid("model", _EXPECTED, found=f"{name} ({first_line(error)})") from error


def _not_found(name: str, error: OSError, what: str) -> Exception:
    """Return the error for a model that is not in a folder, or not on the hub, or out of reach."""
    if Path(name.removeprefix(PREFIX)).is_dir() or is_in_reach() or "Repo id" in str(error):
        return invalid("model", _EXPECTED, found=f"{name} without readable {what} ({first_line(error)})")
    them = "they are" if what == "weights" else "it is"
    return ConnectionError(
        f"cannot download {what} of {name!r}, and {them} not in the cache: connect to a network once, "
        f"or name a folder with {_CONFIG}"
    )


def _check_loaded(name: str, model: nn.Module, config: Any, loaded: dict[str, Any]) -> None:
    """Raise ValueError if a tensor outside the classifier did not come from the published weights."""
    new = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    if not new:
        return
    with torch.random.fork_rng([]):
        config.num_labels += 1
        other = _auto_model(name).from_config(config, dtype=torch.float32).state_dict()
        config.num_labels -= 1
    state = model.state_dict()
    lacking = sorted(key for key in new if key in state and state[key].shape == other[key].shape)
    if lacking:
        found = f"published weights without {', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}"
        raise invalid("pretrained", f"False for {name!r}", found=found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting on standard error what is checked here."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # without types
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
