"""Trained weights from a file or from the folder of a run: read without running code, fitted to a model."""

import argparse
import hashlib
import pickle
import pickletools
import re
import warnings
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from netfission.models.hugging_face import HuggingFaceClassifier
from netfission.utils.checksums import archive_damage, check_tensors, is_archive, parse_json
from netfission.utils.errors import describe, first_line, invalid
from netfission.utils.files import has_file
from netfission.utils.text import count_noun

# Under which names training programs store a state dict; moving averages first, as timm prefers them.
_SECTIONS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module", "net")
_COUNTER = "num_batches_tracked"  # of batch norms; files of early PyTorch versions lack it
_NEVER_NEGATIVE = ("running_var", _COUNTER)
_OF_AVERAGE = "n_averaged"  # the counter of `torch.optim.swa_utils.AveragedModel`
_PART_OF_RUN = re.compile(r"(?:stem|paths\.0\.(?:stages\.\d+|head))\.")  # before names, in a run of one exit
_LINEAR_EXIT = re.compile(r"paths\.[1-9]\d*\.head\.")  # the same, of its linear exits
_START_OF_PATH = re.compile(r"(?:^|\.)(?=paths\.\d+\.)")
_OTHER_PATH = re.compile(r"(?:^|\.)paths\.([1-9]\d*)\.stages\.")  # of a network that is divided
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?)[._]", re.IGNORECASE)  # in a prefix
_MOST_CHANNELS = 4  # of images, in a message
_SHOWN = 3  # names of tensors in a message
_WEIGHTS = "a file of weights (safetensors, or a state dict saved by PyTorch)"


@dataclass(frozen=True)
class TrainedWeights:
    """Tensors by name, as a file holds them.

    Attributes:
        path: the file, or the run's folder, as it was named.
        sha256: SHA-256 of the content of the file, as hexadecimal digits.
        tensors: name → tensor, all finite.
        section: where in the file they were, such as `state_dict_ema`; empty if they are all of it.
        ordered: whether they are in the order of their layers; safetensors files are not.
        left_out: names of the other tensors of the file: those of the linear exits of a run.
        classes: names of the classes of the logits; None if they are not known, as for a file.
        task: of the run that they are of; None if it does not say.

    Example:
        >>> TrainedWeights("net.pt", "ab", {"fc.bias": torch.zeros(2)}, section="state_dict").section
        'state_dict'
    """

    path: str
    sha256: str
    tensors: Mapping[str, Tensor]
    section: str = ""
    ordered: bool = False
    left_out: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    task: str | None = None


@dataclass(frozen=True)
class WeightsReport:
    """Which tensors of a model come from a file of weights.

    Attributes:
        path: the file, or the run's folder, as it was named.
        sha256: SHA-256 of the content of the file, as hexadecimal digits.
        loaded: number of tensors that come from the file.
        new: names of the model's tensors that do not: those of its classifier.
        unused: names of the file's tensors that the model does not use: those of another classifier, of
            linear exits, and of what a training program stores beside the network.
        section: where in the file they were, such as `state_dict_ema`; empty if they are all of it.
        prefix: what stood before the names in the file; after a `+`, what the file lacked.
        by_order: whether names differ, and the tensors were matched by order and shape.

    Example:
        >>> print(WeightsReport("net.pt", "ab", 3, new=("fc.weight", "fc.bias"), prefix="module."))
        loaded 3 of 5 tensors from net.pt (prefix module.); new weights: fc.weight, fc.bias
        >>> print(WeightsReport("net.ckpt", "ab", 5, unused=("loss.weight",), prefix="model."))
        loaded 5 of 5 tensors from net.ckpt (prefix model.); 1 not used (loss.weight)
    """

    path: str
    sha256: str
    loaded: int
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    section: str = ""
    prefix: str = ""
    by_order: bool = False

    def __str__(self) -> str:
        found = [
            *([f"section {self.section}"] if self.section else []),
            *([f"prefix {self.prefix}"] if self.prefix else []),
            *(["matched by order and shape, as the names differ"] if self.by_order else []),
        ]
        where = f" ({', '.join(found)})" if found else ""
        rest = f"; new weights: {_counted(self.new)}" if self.new else ""
        others = [name for name in self.unused if name not in self.new]
        rest += f"; {len(others)} not used ({_listed(others)})" if others else ""
        return f"loaded {self.loaded} of {self.loaded + len(self.new)} tensors from {self.path}{where}{rest}"


def read_weights(path: str | Path) -> TrainedWeights:
    """Read the trained weights in a file or in the folder of a run; no code in the file is run.

    Args:
        path: a safetensors file, a file of PyTorch that holds a state dict, alone or as a part of a
            checkpoint, or the folder of a run of one exit. Of several state dicts in a checkpoint, a moving
            average (`state_dict_ema`, `model_ema`) is preferred.

    Raises:
        ValueError: it does not exist, is damaged, holds no weights, or would run code when it is read. Or a
            tensor is sparse, complex, quantised or without values, or has a value that is not finite, or a
            variance or counter below 0.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3, "state_dict": nn.Linear(2, 2).state_dict()}, f"{folder}/last.pt")
        ...     weights = read_weights(f"{folder}/last.pt")
        >>> weights.section, list(weights.tensors)
        ('state_dict', ['weight', 'bias'])
    """
    file, digest = _file_of(path), file_digest(path)
    with file.open("rb") as opened:
        start = opened.read(9)
    if not start:
        raise invalid(str(path), _WEIGHTS, found="an empty file")
    is_safetensors = start[8:] == b"{"  # after the length of its header
    content = _read_safetensors(file) if is_safetensors else _read_pytorch(file)
    section, tensors = _state_dict(file, content)
    for name, tensor in tensors.items():
        if kind := _unreadable(tensor):
            raise invalid(str(path), "weights of dense, real tensors", found=f"a {kind} tensor in {name}")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise invalid(str(path), "weights that are finite", found=f"NaN or infinity in {name}")
        if name.rpartition(".")[2] in _NEVER_NEGATIVE and (tensor < 0).any():
            found = f"{tensor.min().item():g} in {name}"
            raise invalid(str(path), "weights whose variances and counters are not negative", found=found)
    tensors, left_out = _of_single_network(tensors)
    return TrainedWeights(
        str(path),
        digest,
        tensors,
        section,
        ordered=not is_safetensors,
        left_out=tuple(left_out),
        classes=_classes_of_run(Path(path)) if file != Path(path) else None,
        task=_task_of_run(Path(path)) if file != Path(path) else None,
    )


def _unreadable(tensor: Tensor) -> str:
    """Return what keeps the values of a tensor from being read; empty if nothing does."""
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_complex():
        return "complex"
    return "" if tensor.layout == torch.strided else "sparse"


def _of_single_network(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Give the tensors of a run of one exit the names that the single network has, under each prefix.

    Returns:
        The tensors, and the names of those of linear exits, which are left out. Of other files, all tensors
        as they are.
    """
    prefixes = {name[: found.end()] for name in tensors if (found := _START_OF_PATH.search(name))}
    before = {
        name: max(starts, key=len)
        for name in tensors
        if (starts := [prefix for prefix in prefixes if name.startswith(prefix)])
    }
    parts = {name: name.removeprefix(prefix) for name, prefix in before.items()}
    if not all(_PART_OF_RUN.match(part) or _LINEAR_EXIT.match(part) for part in parts.values()):
        return dict(tensors), []
    left_out = [name for name, part in parts.items() if _LINEAR_EXIT.match(part)]
    renamed = {
        before[name] + _PART_OF_RUN.sub("", parts[name], count=1) if name in parts else name: tensor
        for name, tensor in tensors.items()
        if name not in left_out
    }
    return renamed, left_out


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file of weights, or of that in the folder of a run, as hexadecimal digits.

    Raises:
        ValueError: there is no such file, or it is a pipe or a device.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "net.pt").write_bytes(b"")
        ...     file_digest(f"{folder}/net.pt")[:8]
        'e3b0c442'
    """
    try:
        file = _file_of(path)
        state = file.stat()
        has_file(file)  # a pipe would be waited for, and a device has no end
        return _digest(file.resolve(), state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise invalid(str(path), _WEIGHTS, found=(error.strerror or "no such file").lower()) from error


@cache  # the runs of a comparison share a file
def _digest(file: Path, _time: int, _size: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@torch.no_grad()
def load_weights(
    model: nn.Module,
    weights: TrainedWeights | str | Path,
    *,
    classifier: Collection[str] = (),
    name: str = "",
) -> WeightsReport:
    """Load trained weights into a model, in place.

    Names may have a prefix in the file, such as `module.` or `model.`, or lack one that the model has: the
    prefix with which most names match is taken. If the file has all tensors of the model, others outside the
    prefix, such as those of metrics or of a moving average, are left out. If names differ, but the tensors of
    a PyTorch file have the order, shapes and last parts of names (`weight`, `running_mean`) of the model's,
    they are matched so.

    Args:
        model: the model.
        weights: what `read_weights` returned, or the path of the file.
        classifier: names of the model's tensors that keep their values if the file lacks one of them, or has
            it in another shape. All other tensors must be in the file, and no others.
        name: of the model, for messages; default its class.

    Returns:
        What was loaded, and how it was found.

    Raises:
        ValueError: see `read_weights`, or the weights do not fit; the model is not changed.

    Example:
        >>> import tempfile
        >>> from netfission.models import create_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trained = nn.DataParallel(create_model("wrn-10-1", num_classes=100))
        ...     torch.save(trained.state_dict(), f"{folder}/net.pt")
        ...     report = load_weights(
        ...         create_model("wrn-10-1", num_classes=10), f"{folder}/net.pt",
        ...         classifier=["fc.weight", "fc.bias"],
        ...     )
        >>> report.prefix, report.loaded, report.new
        ('module.', 44, ('fc.weight', 'fc.bias'))
    """
    if not isinstance(weights, TrainedWeights):
        weights = read_weights(weights)
    state = model.state_dict()
    before, added, renamed = _without_prefix(weights.tensors, state)
    prefix = f"+{added}" if added and not before and added != _common_prefix(state) else before
    fit = _Fit(state, renamed, classifier)
    by_order, left_out = False, weights.left_out
    if fit.errors and (beside := _beside(weights.tensors, before, added, state)):
        rest = {key: tensor for key, tensor in renamed.items() if key not in beside}
        other = _Fit(state, rest, classifier)
        if not other.errors and other.unused == other.new:  # no tensor of the model is missing
            fit, left_out = other, (*left_out, *beside)
    if fit.errors and isinstance(model, HuggingFaceClassifier):
        inner = _innermost_prefix(weights.tensors)
        bare = {key.removeprefix(inner): tensor for key, tensor in weights.tensors.items()}
        if not (other := _Fit(state, model.by_own_names(bare), classifier)).errors:
            prefix, fit = inner, other
    if fit.errors and weights.ordered and (ordered := _in_order(weights.tensors, state, classifier)):
        by_order, prefix, fit = True, "", _Fit(state, ordered, classifier)
    if fit.errors:
        expected = f"weights of {name or type(model).__name__}, a classifier of other classes allowed"
        if paths := {int(path) for key in weights.tensors for path in _OTHER_PATH.findall(key)}:
            found = f"those of a network that is divided into {max(paths) + 1} paths"
            raise invalid(weights.path, expected, found=found, hint="name one of one exit")
        raise invalid(weights.path, expected, found="; ".join(fit.errors), hint=fit.other_channels)
    for key in fit.loaded:
        state[key].copy_(fit.tensors[key])
    return WeightsReport(
        weights.path,
        weights.sha256,
        len(fit.loaded),
        tuple(fit.new),
        (*fit.unused, *left_out),
        weights.section,
        prefix,
        by_order,
    )


def fit_part(weights: TrainedWeights, part: nn.Module) -> TrainedWeights | None:
    """Return the tensors of a file that a part of its network has, such as all but its last layers.

    Args:
        weights: those of the whole network.
        part: its first layers.

    Returns:
        The tensors, by the part's names, or by those of the file if they match by order alone (see
        `load_weights`). None if the file lacks one, or has others in the same modules, as a deeper network
        has them.

    Example:
        >>> whole = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> weights = TrainedWeights("net.pt", "ab", whole.state_dict())
        >>> list(fit_part(weights, nn.Sequential(nn.Conv2d(3, 4, 3))).tensors)
        ['0.weight', '0.bias']
    """
    state = part.state_dict()
    _, _, renamed = _without_prefix(weights.tensors, state)
    named = {name: tensor for name, tensor in renamed.items() if name in state}
    if not _Fit(state, named, ()).errors:
        others = [name for name in renamed if name not in state]
        if not _outermost(others).isdisjoint(_outermost(named)):
            return None
        return replace(weights, tensors=named, left_out=(*weights.left_out, *others))
    without_counters = not any(name.endswith(_COUNTER) for name in weights.tensors)
    count = sum(not (without_counters and name.endswith(_COUNTER)) for name in state)
    names = list(weights.tensors)
    first = {name: weights.tensors[name] for name in names[:count]}
    if not weights.ordered or _in_order(first, state, ()) is None:
        return None
    bare = [name.removeprefix(_innermost_prefix(names)) for name in names]
    if not _outermost(bare[count:]).isdisjoint(_outermost(bare[:count])):
        return None
    return replace(weights, tensors=first, left_out=(*weights.left_out, *names[count:]))


class _Fit:
    """How tensors with the names of a model's fit the model.

    Attributes:
        tensors: those of the file, by name in the model.
        loaded: names of those that the model takes.
        new: names of the model's classifier, if it takes none of them.
        unused: names of the file's classifier, if the model does not take it.
        errors: in words what does not fit; empty if all does.
        other_channels: what to say if nothing but the channels of the images differs; else empty.
    """

    def __init__(
        self, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], classifier: Collection[str]
    ) -> None:
        same = {name for name in state.keys() & tensors.keys() if _suits(tensors[name], state[name])}
        of_classifier = [name for name in state if name in classifier]
        self.new = [] if same.issuperset(of_classifier) else of_classifier
        self.unused = [name for name in self.new if name in tensors]
        self.tensors = tensors
        others = [name for name in state if name not in self.new]
        self.loaded = [name for name in others if name in same]
        missing = [name for name in others if name not in tensors and not name.endswith(_COUNTER)]
        unexpected = [
            name for name in tensors if name not in state and name.rpartition(".")[2] != _OF_AVERAGE
        ]
        unequal = [
            f"{name} {describe(tensors[name])}, not {describe(state[name])}"
            for name in others
            if name in tensors and name not in same
        ]
        self.errors = [
            f"{len(names)} {problem} ({_listed(names)})"
            for problem, names in (("missing", missing), ("unexpected", unexpected), ("unequal", unequal))
            if names
        ]
        if not self.loaded and not self.errors:
            self.errors = ["none"]
        differing = [name for name in others if name in tensors and name not in same]
        self.other_channels = "" if missing or unexpected else _other_channels(tensors, state, differing)


def _other_channels(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], differing: list[str]) -> str:
    """Say that a network reads images of other channels if its first convolution alone differs so.

    A convolution of other groups differs in the same dimension.
    """
    first = next((name for name, tensor in state.items() if tensor.ndim == 4), None)
    if differing != [first]:
        return ""
    found, wanted = tensors[differing[0]].shape, state[differing[0]].shape
    if len(found) != 4 or (found[0], *found[2:]) != (wanted[0], *wanted[2:]) or found[1] > _MOST_CHANNELS:
        return ""
    return f"the file is of a network for images of {count_noun(found[1], 'channel')}, not {wanted[1]}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _counted(names: Sequence[str]) -> str:
    """Return names, or the number and the first of many, as those of a decoder."""
    few = len(names) <= 2 * _SHOWN
    return ", ".join(names) if few else f"{len(names)} tensors ({_listed(names)})"


def _outermost(names: Iterable[str]) -> set[str]:
    """Return the first parts of names: the outermost modules that hold the tensors."""
    return {name.partition(".")[0] for name in names}


def _suits(tensor: Tensor, wanted: Tensor) -> bool:
    return tensor.shape == wanted.shape and tensor.is_floating_point() == wanted.is_floating_point()


def _without_prefix(
    tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[str, str, dict[str, Tensor]]:
    """Return the prefixes that names of a file have before a model's, and lack, and the renamed tensors."""
    common = _common_prefix(state)  # of a model in a wrapper, which files of the model itself lack
    counts: Counter[tuple[str, str]] = Counter({("", ""): 0})
    for name in tensors:
        for before, rest in _splits(name):
            counts.update((before, added) for added in {"", common} if added + rest in state)
    for name in state:
        counts.update(
            ("", added) for added, rest in _splits(name) if added not in ("", common) and rest in tensors
        )
    # Of equally good ones, that of no moving average, and the shortest.
    best = max(
        counts,
        key=lambda pair: (counts[pair], not _AVERAGE.search(pair[0]), -len(pair[0]) - len(pair[1])),
    )
    # One that few names match would only make the message of a network that does not fit hard to read.
    before, added = best if 2 * counts[best] > min(len(tensors), len(state)) else ("", "")
    renamed = {_renamed(name, before, added): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):  # some names are there with the prefix and without
        return "", "", dict(tensors)
    return before, added, renamed


def _beside(
    tensors: Mapping[str, Tensor], before: str, added: str, state: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Return the names of a file's tensors that are no part of the model: see `load_weights`.

    None if they hold a second network that is no moving average: it may be the one that is meant.
    """
    beside = []
    for name in tensors:
        if _renamed(name, before, added) in state:
            continue
        copies = [start for start, rest in _splits(name) if added + rest in state]
        if any(not _AVERAGE.search(start) for start in copies):
            return ()
        if copies or not name.startswith(before):
            beside.append(name)
    return tuple(beside)


def _renamed(name: str, before: str, added: str) -> str:
    """Return a name in the model; one that lacks the prefix stays as it is in the file."""
    return added + name.removeprefix(before) if name.startswith(before) else name


def _common_prefix(names: Collection[str]) -> str:
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    (first,) = firsts if len(firsts) == 1 else ("",)
    return f"{first}." if first else ""


def _innermost_prefix(names: Collection[str]) -> str:
    """Return what all names begin with, up to a dot."""
    first = _common_prefix(names)
    return first and first + _innermost_prefix([name.removeprefix(first) for name in names])


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield each division of a name at a dot, after it; first the one with nothing before."""
    yield "", name
    for dot in (index for index, letter in enumerate(name) if letter == "."):
        yield name[: dot + 1], name[dot + 1 :]


def _in_order(
    tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], classifier: Collection[str]
) -> dict[str, Tensor] | None:
    """Return a file's tensors by the names of the model's in the same place; None if one does not fit.

    Shapes must be equal but for the classifier, and so must the last parts of names. The tensors of one layer
    in the file are those of one layer in the model.
    """
    names = list(state)
    if not any(name.endswith(_COUNTER) for name in tensors):
        names = [name for name in names if not name.endswith(_COUNTER)]
    if len(tensors) != len(names):  # perhaps the file has no classifier
        names = [name for name in names if name not in classifier]
    if len(tensors) != len(names):
        return None
    layers: set[tuple[str, str]] = set()
    for (found, tensor), name in zip(tensors.items(), names, strict=True):
        (layer, _, kind), (wanted_layer, _, wanted_kind) = found.rpartition("."), name.rpartition(".")
        layers.add((layer, wanted_layer))
        if kind != wanted_kind or not (name in classifier or _suits(tensor, state[name])):
            return None
    one_to_one = all(len({pair[side] for pair in layers}) == len(layers) for side in (0, 1))
    return dict(zip(names, tensors.values(), strict=True)) if one_to_one else None


def _file_of(path: str | Path) -> Path:
    return _weights_of_run(Path(path)) if Path(path).is_dir() else Path(path)


def _weights_of_run(folder: Path) -> Path:
    """Return the file of weights in the folder of a run of one exit."""
    expected = "a file of weights, or the folder of a finished run of one exit"
    try:
        spec = parse_json((folder / "config.json").read_bytes())
        fission = spec["fission"]
        exits, sparsity = fission.get("exits"), fission.get("sparsity", 0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise invalid(str(folder), expected, found="a folder without such a run") from error
    if exits != 1 or sparsity:
        found = f"a run of {exits} exits" if exits != 1 else f"a run with sparsity {sparsity}"
        raise invalid(str(folder), expected, found=found, hint="name a run of the undivided network")
    return folder / "model.safetensors"


def _classes_of_run(folder: Path) -> tuple[str, ...] | None:
    """Return the names of the classes of a run; None if its folder does not say."""
    classes = parse_json((folder / "config.json").read_bytes()).get("classes")
    return tuple(map(str, classes)) if isinstance(classes, list) else None


def _task_of_run(folder: Path) -> str | None:
    """Return the task of a run; None if its folder does not say."""
    task = parse_json((folder / "config.json").read_bytes()).get("task")
    return None if task is None else str(task)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        check_tensors(file)
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise invalid(str(file), _WEIGHTS, found=f"a damaged file ({first_line(error)})") from error


def _read_pytorch(file: Path) -> Any:
    """Read a file of PyTorch; only tensors, plain data and parsed command lines are allowed in it."""
    if program := _program(file):
        hint = "save the state_dict of the model alone"
        raise invalid(str(file), _WEIGHTS, found=f"{program}, which holds code", hint=hint)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the refusal says what is wrong
            if is_archive(file) and (damage := archive_damage(file)):  # which PyTorch does not look at
                raise BadZipFile(damage)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the file may hold anything
        wanted = _wanted_code(file, error)
        if wanted:
            hint = "save the state_dict of the model alone, with torch.save"
            raise invalid(
                str(file),
                "weights that are read without running code",
                found=f"a pickle that wants {', '.join(wanted)}",
                hint=hint,
            ) from error
        found = "a damaged file" if is_archive(file) else "a file of another kind, or a damaged one"
        raise invalid(str(file), _WEIGHTS, found=found) from error


def _program(file: Path) -> str:
    """Return which kind of program PyTorch exported to a file; empty if it holds no program."""
    try:
        with ZipFile(file) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except BadZipFile:  # of an early version of PyTorch, or damaged
        return ""
    if any(name.startswith("models/") for name in names):
        return "a program of torch.export"
    return "a TorchScript program" if any(name.startswith("code/") for name in names) else ""


def _wanted_code(file: Path, error: Exception) -> Sequence[str]:
    """Return the names of the functions and classes that a pickle wants to call, without calling them."""
    if not isinstance(error, pickle.UnpicklingError):
        return ()
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))[:_SHOWN]
        except Exception:  # not a zip file: only the message names the first, if it does
            named = re.findall(r"(?:GLOBAL|class|function) '?([\w.]+\.[\w.]+)", str(error))[:1]
            return named or sorted(_names_in_pickle(file))[:_SHOWN]


def _names_in_pickle(file: Path) -> set[str]:
    """Return the functions and classes that a plain pickle names, without running it; none if damaged."""
    names: set[str] = set()
    memo: dict[object, object] = {}
    last: deque[object] = deque([None, None], maxlen=2)  # what was put on the stack
    try:
        with file.open("rb") as content:
            for opcode, argument, _ in pickletools.genops(content):
                if opcode.name == "MEMOIZE":
                    memo[len(memo)] = last[-1]
                elif opcode.name in ("BINGET", "LONG_BINGET"):
                    last.append(memo.get(argument))
                elif opcode.name == "GLOBAL":
                    names.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(".".join(map(str, last)))
                if opcode.name not in ("MEMOIZE", "BINGET", "LONG_BINGET", "FRAME"):
                    last.append(argument)
    except (OSError, ValueError):
        return set()
    return names


def _state_dict(file: Path, content: Any) -> tuple[str, dict[str, Tensor]]:
    """Find the state dict in what a file holds; return the names of the sections that lead to it."""
    section: list[str] = []
    while isinstance(content, Mapping):
        tensors = [value for value in content.values() if isinstance(value, Tensor)]
        if tensors and len(tensors) == len(content) and all(isinstance(name, str) for name in content):
            return ".".join(section), dict(content)
        name = next((name for name in _SECTIONS if isinstance(content.get(name), Mapping)), None)
        if name is None:
            break
        section.append(name)
        content = content[name]
    held = (
        f"{type(content).__name__} of {', '.join(map(str, list(content)[:_SHOWN]))}"[:60]
        if isinstance(content, Mapping) and content
        else type(content).__name__
    )
    expected = f"a file with a state dict, alone or as {', '.join(_SECTIONS)}"
    raise invalid(str(file), expected, found=f"a {held}")
