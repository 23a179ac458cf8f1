"""What one network of a library shows when it is fissioned without further settings, and the checks of it."""

import copy
import math
import re
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import netfission as nf
from netfission.grouping import channels
from netfission.profiling.cost import count
from netfission.surgery.features import Features, map_tensors, tensors_of
from netfission.surgery.masks import kept_masks, prunable_weights
from netfission.surgery.narrowing import ScatteredNorm, narrowed
from netfission.surgery.standardised import leave_out_standardisation, standardises
from netfission.utils.errors import first_line

Row = dict[str, Any]
Grouping = Literal["channels", "weights", "copies"]
Kept = Mapping[str, Mapping[int, Tensor]]  # tensor → dimension → the indices that a path keeps

CLASSES = 10
EXITS = 3
SECONDS = 60.0  # of processor time for one call of fission
TOLERANCE = 1e-5  # of a path's features, over the largest of them
ROUNDING = 1e-4  # of the logits of a deployed network, over their spread
SIZES = (128, 224)  # sides of the images that are tried, before the network's default
# Without these, torchvision's builders draw their weights one by one, and warn.
_BUILDER_SETTINGS: dict[str, dict[str, Any]] = {
    name: {"init_weights": False} for name in ("googlenet", "inception_v3")
}


class OverLimit(BaseException):  # not an Exception, which a search may catch
    """A call took more processor time than it may."""


class CheckError(Exception):
    """A check failed; the message says what was found."""


@dataclass(frozen=True)
class Network:
    """One network of a library.

    Attributes:
        library: `"timm"` or `"torchvision"`.
        family: the module of `timm.models` that defines it; of torchvision the name.
        name: as its library creates it.
        second: whether it is the second network of its family.
    """

    library: str
    family: str
    name: str
    second: bool = False

    def create(self, num_classes: int = CLASSES, in_channels: int = 3) -> nn.Module:
        """Create it with random weights."""
        model: nn.Module
        if self.library == "timm":
            import timm

            model = timm.create_model(
                self.name, pretrained=False, num_classes=num_classes, in_chans=in_channels
            )
        else:
            from torchvision import models

            settings = _BUILDER_SETTINGS.get(self.name, {})
            model = models.get_model(self.name, weights=None, num_classes=num_classes, **settings)
        return model


def measure(
    network: Network,
    grouping: Grouping,
    report: Callable[[str, Row], object] = lambda phase, row: None,
    seconds: float = SECONDS,
) -> Row:
    """Fission a network, and check the result.

    Args:
        network: the network.
        grouping: how it is divided.
        report: called before each phase with its name and the row so far.
        seconds: of processor time that a call of `fission` may take.

    Returns:
        A row of the table; `error` if the network was refused, else `failed` names the checks that failed.
    """
    row: Row = asdict(network) | {"grouping": grouping}
    report("create", row)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm, and about stages whose paths cost more than the stage
        model = network.create()
        images = accepted_images(model)
        disturb_constants(model)
        row["size"] = images.shape[-1]
        stored = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        row["weights_gib"] = round(stored / 2**30, 3)
        report("fission", row)
        narrowings: list[tuple[nn.Module, Kept]] = []
        start = time.process_time()
        try:
            with processor_limit(seconds), recorded(narrowings):
                net = nf.fission(model, EXITS, grouping=grouping, example_input=images)
        except Exception as error:  # whatever a search may raise
            return row | {"error": one_line(error)}
        except OverLimit as error:
            return row | {"error": str(error)}
        row |= {"seconds": round(time.process_time() - start, 2), "peak_gib": peak_gib()}
        _check_all(row, network, model, net, images, narrowings, report, seconds)
    return row


def _check_all(
    row: Row,
    network: Network,
    model: nn.Module,
    net: nf.FissionNetwork,
    images: Tensor,
    narrowings: Sequence[tuple[nn.Module, Kept]],
    report: Callable[[str, Row], object],
    seconds: float,
) -> None:
    """Add to a row what the network costs, and the results of all checks."""
    grouping: Grouping = row["grouping"]
    row |= {"stages": list(net.stage_names), "repeated": repeated(net), "failed": {}}
    whole: nf.FissionNetwork | None = None

    def one_exit() -> None:
        nonlocal whole
        with processor_limit(seconds):
            whole = nf.fission(model, 1, grouping=grouping, example_input=images)
            if whole.stage_names != net.stage_names:  # some were joined
                names = list(net.stage_names)
                whole = nf.fission(model, 1, grouping=grouping, example_input=images, stages=names)
        check_one_exit(model, whole, images)

    def restriction() -> None:
        if whole is None:
            raise CheckError("no network of one exit to compare with")
        row["restriction"] = check_restriction(net, whole, images, grouping, narrowings)

    def deployed() -> None:
        row["deployed"] = check_deployed(net, images)

    checks: dict[str, Callable[[], object]] = {
        "cost": lambda: row.update(costs(model, net, images)),
        "one exit": one_exit,
        "restriction": restriction,
        "deployed": deployed,
        "saved": lambda: check_saved(network, net, images),
        "training": lambda: check_training(model, net, images),
    }
    for name, check in checks.items():
        report(name, row)
        try:
            check()
        except (Exception, OverLimit) as error:
            row["failed"][name] = one_line(error)
    row["peak_gib_of_checks"] = peak_gib()


# --- the network ------------------------------------------------------------------------------------


@torch.no_grad()
def accepted_images(model: nn.Module) -> Tensor:
    """Return two images of the smallest size that a model accepts in train and eval mode.

    The statistics of batch norms move, so that they are no longer 0 and 1.
    """
    default = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 299, 299))[-1]
    sizes = dict.fromkeys((*SIZES, default))
    for size in sizes:
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            model.eval()(images)
            model.train()(images)
        except Exception as error:  # whatever its layers raise on features that are too small
            if size == list(sizes)[-1]:
                raise CheckError(f"accepts no images ({one_line(error)})") from error
        else:
            return images
    raise AssertionError


@torch.no_grad()
def disturb_constants(model: nn.Module) -> None:
    """Add noise to parameters whose values are all equal: branches that start at 0 would hide errors."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.numel() and parameter.min() == parameter.max():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits_of(output: Any) -> Tensor:
    """Return the logits in the output of a model, which in train mode may hold auxiliary ones as well."""
    logits: Tensor = output if isinstance(output, Tensor) else output[0]
    return logits


def costs(model: nn.Module, net: nf.FissionNetwork, images: Tensor) -> Row:
    """Count multiply-accumulates and parameters: of the model, and of the network over the model's."""
    single, fissioned = (count(module, images[:1]).size for module in (model, net))
    return {
        "model_macs": single.macs_dense,
        "model_parameters": single.parameters_stored,
        "macs": fissioned.macs_dense / single.macs_dense,
        "macs_effective": fissioned.macs_effective / single.macs_effective,
        "parameters": fissioned.parameters_stored / single.parameters_stored,
        "parameters_nonzero": fissioned.parameters_nonzero / single.parameters_nonzero,
    }


def repeated(net: nf.FissionNetwork) -> list[Row]:
    """Return what the paths of each stage repeat: reason, number of layers and MACs of one copy."""
    found: dict[tuple[str, str], Row] = {}
    for stage, layers in net.repeated.items():
        for layer in layers:
            empty: Row = {"stage": stage, "reason": layer.reason, "layers": 0, "macs": 0}
            row = found.setdefault((stage, layer.reason), empty)
            row["layers"] += 1
            row["macs"] += layer.macs
    return list(found.values())


# --- checks -----------------------------------------------------------------------------------------


@torch.no_grad()
def check_one_exit(model: nn.Module, whole: nf.FissionNetwork, images: Tensor) -> None:
    """Check that the logits of a network with one exit are the model's, bit for bit, in both modes.

    If the model has auxiliary heads, without dropout, of which they use some.
    """
    for training in (False, True):
        single, one = (copy.deepcopy(module).train(training) for module in (model, whole))
        if training and not isinstance(single(images), Tensor):
            for layer in (*single.modules(), *one.modules()):
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.0
            single.load_state_dict(model.state_dict())
        torch.manual_seed(1)
        expected = logits_of(single(images))
        torch.manual_seed(1)
        logits = one(images)[:, 0]
        if not torch.equal(logits, expected):
            mode = "train" if training else "eval"
            raise CheckError(f"in {mode} mode, logits differ by {relative_difference(logits, expected):.1e}")


def check_training(model: nn.Module, net: nf.FissionNetwork, images: Tensor) -> None:
    """Check that a training step is finite, and reaches each parameter that one of the model reaches."""
    model, net = copy.deepcopy(model).train(), copy.deepcopy(net).train()
    labels = torch.arange(len(images)) % CLASSES
    torch.manual_seed(1)
    logits_of(model(images)).square().sum().backward()
    logits = net(images)
    nf.EnsembleDistillationLoss()(logits, labels).backward()
    if not logits.isfinite().all():
        raise CheckError("logits are not finite")
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, parameter in net.named_parameters():
        if parameter.grad is None:
            if name_in_model(name) in reached:
                raise CheckError(f"{name} has no gradient")
        elif not parameter.grad.isfinite().all():
            raise CheckError(f"the gradient of {name} is not finite")


def name_in_model(name: str) -> str:
    """Return the name in the model of a parameter of a fissioned network.

    Example:
        >>> name_in_model("paths.1.stages.0.layer3.0.conv1.weight")
        'layer3.0.conv1.weight'
    """
    return re.sub(r"^(stem\.|paths\.\d+\.(stages\.\d+\.|head\.))", "", name)


@torch.no_grad()
def check_deployed(net: nf.FissionNetwork, images: Tensor) -> float:
    """Check that `deploy` changes logits by rounding only; return the difference over their spread.

    Raises:
        CheckError: it is above 1e-4.
        ValueError: `deploy` itself refuses the network.
    """
    expected = copy.deepcopy(net).eval()(images)
    difference = (nf.deploy(net, images)(images) - expected).abs().max()
    relative = float(difference / (expected.amax(-1) - expected.amin(-1)).max())
    if not relative <= ROUNDING:
        raise CheckError(f"logits differ by {relative:.1e} of their spread")
    return relative


@torch.no_grad()
def check_saved(network: Network, net: nf.FissionNetwork, images: Tensor) -> None:
    """Check that the network saved as safetensors and loaded again gives the same logits."""
    half = (0.5, 0.5, 0.5)
    classifier = nf.Classifier.from_network(
        net,
        model=None,
        classes=[str(label) for label in range(CLASSES)],
        shape=tuple(images.shape[1:]),
        mean=half,
        std=half,
    )
    with tempfile.TemporaryDirectory() as folder:
        classifier.save_pretrained(folder)
        loaded = nf.Classifier.from_pretrained(folder, factory=network.create).network
    expected, logits = copy.deepcopy(net).eval()(images), loaded(images)
    if not torch.equal(logits, expected):
        raise CheckError(f"logits differ by {relative_difference(logits, expected):.1e}")


@torch.no_grad()
def check_restriction(
    net: nf.FissionNetwork,
    whole: nf.FissionNetwork,
    images: Tensor,
    grouping: Grouping,
    narrowings: Sequence[tuple[nn.Module, Kept]] = (),
) -> float:
    """Check that each path computes what the original does with the weights of that path alone.

    Norms over channels that a path has only a part of are left out on both sides, and so is the
    standardisation of weights, as their statistics depend on all channels.

    Args:
        net: the fissioned network.
        whole: the same model with one exit, whose stages are the original ones.
        images: a batch.
        grouping: of `net`.
        narrowings: see `recorded`.

    Returns:
        The largest difference of a path's features, over the largest of them.

    Raises:
        CheckError: it is above 1e-5 in float32, and in float64, too.
    """
    if net.stage_names != whole.stage_names:
        raise CheckError(f"with one exit, the stages are {', '.join(whole.stage_names)}")
    largest = 0.0
    features = copy.deepcopy(whole.stem).eval()(images)
    for index, original in enumerate(whole.exit_paths[0].stages):
        copies = net.stage_copies(index)
        for exit_, path in copies.items():
            kept = next((kept for module, kept in narrowings if module is path), None)
            if kept is None and grouping == "channels":
                raise CheckError(f"channels of exit {exit_} in stage {net.stage_names[index]} are unknown")
            pair = restricted(original, path, grouping, kept or {}, shuffled=exit_ > 0)
            difference = _difference_of(pair, features)
            if not difference <= TOLERANCE:
                raise CheckError(
                    f"exit {exit_} in stage {net.stage_names[index]} differs by {difference:.1e}"
                )
            largest = max(largest, difference)
        if grouping == "weights":
            _check_partition(list(copies.values()))
        features = copy.deepcopy(original).eval()(features)
    return largest


def restricted(
    original: nn.Module, path: nn.Module, grouping: Grouping, kept: Kept, *, shuffled: bool
) -> tuple[nn.Module, nn.Module]:
    """Return a copy of a stage with the weights of a path alone, and a copy of the path to compare.

    Raises:
        CheckError: a tensor of the path does not hold the values of the original.
    """
    original, path = copy.deepcopy(original).eval(), copy.deepcopy(path).eval()
    weights, masks = prunable_weights(original), kept_masks(path)
    tensors = dict(path.named_parameters()) | dict(path.named_buffers())
    scattered = {name for name, module in path.named_modules() if isinstance(module, ScatteredNorm)}
    for name in scattered:  # its norm has the names of the original
        norm = path.get_submodule(f"{name}.norm")
        tensors |= {f"{name}.{key}": tensor for key, tensor in norm.state_dict(keep_vars=True).items()}
    for name, whole in (*original.named_parameters(), *original.named_buffers()):
        if name not in tensors or not whole.is_floating_point():
            continue
        part, dims = tensors[name], kept.get(name, {})
        if grouping == "copies" and shuffled and name in weights:
            if not torch.equal(part.flatten().sort().values, whole.flatten().sort().values):
                raise CheckError(f"{name} holds other values than the original")
            whole.copy_(part)
            continue
        if grouping == "weights" and name in weights:
            whole.mul_(masks[name])
        for dim, indices in dims.items():
            if dim == 1:
                dropped = torch.ones(whole.shape[1], dtype=torch.bool).index_fill(0, indices, False)
                whole[:, dropped] = 0
        selected = whole
        for dim, indices in dims.items():
            selected = selected.index_select(dim, indices)
        if selected.shape != part.shape:
            raise CheckError(f"{name} has another shape than the original's channels")
        weight = _scaled_by(original, name)
        inputs = original.get_parameter(weight)[0].numel() if weight in masks else 1
        scale = variance_scale(part, selected, masks.get(weight), inputs)
        if scale is None:
            raise CheckError(f"{name} holds other values than the original")
        whole.mul_(scale)
        if name.rpartition(".")[0] in scattered:
            whole.copy_(torch.zeros_like(whole).index_copy(0, kept[name][0], part))
    for name in {name.rpartition(".")[0] for name in kept}:
        layer = original.get_submodule(name)
        if _is_norm_over_channels(layer):
            for module in (original, path):
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, nn.Identity())
        elif isinstance(layer, nn.Conv2d) and standardises(layer):
            for module in (original, path):
                leave_out_standardisation(module.get_submodule(name))
    return original, path


def _scaled_by(original: nn.Module, name: str) -> str:
    """Return the weight whose inputs decide how a parameter is scaled: of a gain, that of its layer."""
    layer, _, attribute = name.rpartition(".")
    if attribute == "gain" and standardises(original.get_submodule(layer)):
        return f"{layer}.weight"
    return name


def variance_scale(part: Tensor, selected: Tensor, mask: Tensor | None, inputs: int) -> float | None:
    """Return 1, or the factor that keeps the variance of a layer that reads fewer inputs, or None if neither.

    Args:
        part: a tensor of a path.
        selected: the values of the original at the same places.
        mask: of a prunable weight, True where the path keeps it.
        inputs: number of inputs of each output of the original.
    """
    if torch.equal(part, selected):
        return 1.0
    if mask is None or not mask.any():
        return None
    scale = math.sqrt(inputs * int(mask.flatten(1).any(1).sum()) / int(mask.sum()))
    return scale if torch.allclose(part, scale * selected, rtol=1e-5, atol=0) else None


def _is_norm_over_channels(layer: nn.Module) -> bool:
    if isinstance(layer, _BatchNorm) or "norm" not in type(layer).__name__.lower():
        return False
    return not (isinstance(layer, nn.GroupNorm) and layer.num_groups > 1)


def _difference_of(pair: tuple[nn.Module, nn.Module], features: Features) -> float:
    expected, found = (module(map_tensors(Tensor.clone, features)) for module in pair)
    difference = _largest_difference(found, expected)
    if not difference <= TOLERANCE:  # rounding adds up over many layers, an error stays
        expected, found = (module.double()(map_tensors(Tensor.double, features)) for module in pair)
        difference = _largest_difference(found, expected)
    return difference


def _largest_difference(found: Features, expected: Features) -> float:
    pairs = zip(tensors_of(found), tensors_of(expected), strict=True)
    return max(relative_difference(*pair) for pair in pairs)


def _check_partition(paths: Sequence[nn.Module]) -> None:
    """Check that each weight of a stage belongs to exactly one of its paths."""
    masks = [kept_masks(path) for path in paths]
    for name in masks[0]:
        owners = torch.stack([mask[name].int() for mask in masks]).sum(0)
        if not (owners == 1).all():
            raise CheckError(f"{int((owners != 1).sum())} weights of {name} do not belong to one path")


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value; infinite if the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max())


# --- the process ------------------------------------------------------------------------------------


@contextmanager
def recorded(narrowings: list[tuple[nn.Module, Kept]]) -> Iterator[None]:
    """Add each path's stage that is made by channels within, and the channels that it keeps, to a list."""

    def record(module: nn.Module, kept: Kept, scattered: Collection[str]) -> nn.Module:
        result = narrowed(module, kept, scattered)
        narrowings.append((result, kept))
        return result

    with mock.patch.object(channels, "narrowed", record):
        yield


@contextmanager
def processor_limit(seconds: float) -> Iterator[None]:
    """Raise `OverLimit` if the process uses more than `seconds` of processor time within."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise OverLimit(f"over {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again, since Python ignores it in some callbacks
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def peak_gib(process: int | str = "self") -> float | None:
    """Return the largest memory that a process has had, in GiB; None if the system does not tell."""
    try:
        status = Path(f"/proc/{process}/status").read_text("utf-8")
    except OSError:
        return None
    kib = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return round(int(kib[1]) / 2**20, 2) if kib else None


def one_line(error: BaseException) -> str:
    """Return an error as one line, with its type unless it is made for the reader."""
    text = first_line(error) if isinstance(error, Exception) else str(error)
    return (
        text if isinstance(error, CheckError | OverLimit | ValueError) else f"{type(error).__name__}: {text}"
    )
