"""Time and memory of networks, measured side by side in one process."""

import copy
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler import profile

from netfission.losses import ensemble_distillation_loss
from netfission.utils.inputs import Inputs, row_count, tensors_in
from netfission.utils.modes import in_mode

WARM_UP = 3
FEWEST_ROUNDS, MOST_ROUNDS = 7, 60  # of `relative_time`
ROUND_SECONDS = 0.05

Loss = Callable[[nn.Module, Any, Tensor], Tensor]


@dataclass(frozen=True)
class Quartiles:
    """The median of measured values, and the quartiles below and above it.

    Example:
        >>> Quartiles.from_values([4.0, 1.0, 3.0, 2.0])
        Quartiles(lower=1.75, median=2.5, upper=3.25)
    """

    lower: float
    median: float
    upper: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Self:
        """Compute them in float64, linear between neighbouring values.

        Args:
            values: at least one, in any order.
        """
        quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(quarters).tolist())

    @classmethod
    def of_ratios(cls, times: Sequence[float], reference: Sequence[float]) -> Self:
        """Compute those of times over a reference's, round by round.

        Example:
            >>> Quartiles.of_ratios([2.0, 3.0], [1.0, 1.0])
            Quartiles(lower=2.25, median=2.5, upper=2.75)
        """
        return cls.from_values([time / other for time, other in zip(times, reference, strict=True)])


def device_name(device: torch.device) -> str:
    """Return the name of a device, for a report of what was measured on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"


def times_in_turn(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 20,
    warm_up: int = WARM_UP,
    title: str | None = None,
) -> dict[str, list[float]]:
    """Time several runs in turn: each runs once per round, so that drift affects all equally.

    The machine should be idle otherwise: other load slows some rounds more than others.

    Args:
        runs: name → what to time.
        device: where they run; a GPU is waited for.
        rounds: number of timed rounds.
        warm_up: number of rounds before that.
        title: of a progress bar of the rounds, on a terminal; default no bar.

    Returns:
        Name → seconds per round.

    Example:
        >>> times = times_in_turn({"sum": lambda: sum(range(1000))}, torch.device("cpu"), rounds=3)
        >>> len(times["sum"])
        3
    """
    from tqdm import tqdm

    times: dict[str, list[float]] = {name: [] for name in runs}
    hidden = True if title is None else None  # None: unless standard error is a terminal
    for index in tqdm(range(warm_up + rounds), desc=title, unit="round", disable=hidden, leave=False):
        for name, run in runs.items():
            _wait_for(device)
            start = time.perf_counter()
            run()
            _wait_for(device)
            if index >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def inference_times(
    networks: Mapping[str, nn.Module],
    images: Inputs,
    *,
    rounds: int = 20,
    warm_up: int = WARM_UP,
    title: str | None = None,
) -> dict[str, list[float]]:
    """Time inference of networks in turn, in eval mode without gradients; see `times_in_turn`.

    Args:
        networks: name → module, on the images' device; their modes are restored afterwards.
        images: one batch.
        rounds: number of timed rounds.
        warm_up: number of rounds before that.
        title: of a progress bar, see `times_in_turn`.

    Returns:
        Name → seconds per round.

    Example:
        >>> times = inference_times({"linear": nn.Linear(3, 2)}, torch.zeros(8, 3), rounds=5)
        >>> all(seconds > 0 for seconds in times["linear"])
        True
    """
    runs = {name: _call(module, images) for name, module in networks.items()}
    # Not inference_mode, which is not faster: tensors that a network caches must still work in training.
    with torch.no_grad(), in_mode(*networks.values(), training=False):
        return times_in_turn(runs, tensors_in(images)[0].device, rounds=rounds, warm_up=warm_up, title=title)


def relative_time(network: nn.Module, reference: nn.Module, images: Inputs, *, seconds: float) -> Quartiles:
    """Time inference of a network over a reference's, round by round; see `inference_times`.

    In a round, each runs as often as takes about `ROUND_SECONDS`, since single short runs vary much.

    Args:
        network: the network.
        reference: what its times are divided by.
        images: one batch.
        seconds: about how long to measure; at least `FEWEST_ROUNDS` rounds and at most `MOST_ROUNDS`.

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> relative_time(layer, layer, torch.zeros(8, 64), seconds=0.1).median > 0
        True
    """
    with torch.no_grad(), in_mode(network, reference, training=False):
        return _relative(_call(network, images), _call(reference, images), images, seconds)


def relative_step_time(
    network: nn.Module, reference: nn.Module, images: Inputs, *, seconds: float
) -> Quartiles:
    """Time a training step of a copy of a network over a reference's, round by round; see `training_times`.

    The arguments are those of `relative_time`.

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> relative_step_time(layer, layer, torch.zeros(8, 64), seconds=0.1).median > 0
        True
    """
    run, of_reference = (training_step(copy.deepcopy(module), images) for module in (network, reference))
    return _relative(run, of_reference, images, seconds)


def _relative(
    run: Callable[[], object], reference: Callable[[], object], images: Inputs, seconds: float
) -> Quartiles:
    """Time a run over a reference, in about so many seconds."""
    runs, device = {"network": run, "reference": reference}, tensors_in(images)[0].device
    first = sum(map(min, times_in_turn(runs, device, rounds=2).values()))
    calls = max(1, round(2 * ROUND_SECONDS / first))
    rounds = min(max(round(seconds / (calls * first)), FEWEST_ROUNDS), MOST_ROUNDS)
    repeated = {name: partial(_repeat, one, calls) for name, one in runs.items()}
    times = times_in_turn(repeated, device, rounds=rounds, warm_up=0)
    return Quartiles.of_ratios(times["network"], times["reference"])


def training_times(
    networks: Mapping[str, nn.Module],
    images: Inputs,
    *,
    rounds: int = 20,
    warm_up: int = WARM_UP,
    title: str | None = None,
) -> dict[str, list[float]]:
    """Time training steps of copies of networks in turn, in train mode; see `times_in_turn`.

    A step is forward, loss, backward and SGD with Nesterov momentum 0.9 and weight decay 5e-4. The loss is
    `ensemble_distillation_loss` of logits `(batch, exits, classes)`, also for each pixel, and cross-entropy
    of `(batch, classes)`.
    The learning rate is 0, which takes the same work and keeps the weights equal in all rounds.

    Args:
        networks: name → classifier, on the images' device; not changed.
        images: one batch.
        rounds: number of timed rounds.
        warm_up: number of rounds before that.
        title: of a progress bar, see `times_in_turn`.

    Returns:
        Name → seconds per round.
    """
    runs = {name: training_step(copy.deepcopy(module), images) for name, module in networks.items()}
    return times_in_turn(runs, tensors_in(images)[0].device, rounds=rounds, warm_up=warm_up, title=title)


def inference_peak(network: nn.Module, images: Inputs) -> int:
    """Measure the peak memory of inference of one batch, in addition to network and images, in bytes.

    See `peak_bytes`.
    """
    with torch.no_grad(), in_mode(network, training=False):
        network(images)
        return peak_bytes(_call(network, images), tensors_in(images)[0].device)


def training_peak(network: nn.Module, images: Inputs) -> int:
    """Measure the peak memory of a training step, in addition to network and images, in bytes.

    It includes gradients and momentum, as it is measured on the first step of a copy. The step is that of
    `training_times`; see `peak_bytes` for how memory is measured.
    """
    network = copy.deepcopy(network)
    training_step(network, images)()  # so that what libraries allocate once is not counted
    network.zero_grad()
    return peak_bytes(training_step(network, images), tensors_in(images)[0].device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Measure the peak of PyTorch's allocated memory during a run, above what was allocated before.

    On CPU and GPU, this includes workspaces of operations, such as a convolution's reordered weights. On a
    CPU, memory that oneDNN or BLAS allocate directly is not counted, and earlier memory that the run frees is
    not subtracted.

    Args:
        run: what to measure; call it once before, so that what is allocated only once is not counted.
        device: where it runs.

    Returns:
        Bytes.

    Example:
        >>> peak_bytes(lambda: torch.zeros(1000), torch.device("cpu"))
        4000
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    profiler = profile(profile_memory=True)
    with _silent_stderr():
        profiler.__enter__()
    try:
        run()
    finally:
        with _silent_stderr():
            profiler.__exit__(None, None, None)
    assert profiler.kineto_results is not None
    now = peak = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]  # missing in PyTorch's stubs
            peak = max(peak, now)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence file descriptor 2, to which the profiler's library writes that it starts and stops."""
    sys.stderr.flush()
    before = os.dup(2)
    with Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


def _call(module: nn.Module, images: Inputs) -> Callable[[], object]:
    return lambda: module(images)


def training_step(
    network: nn.Module, images: Inputs, compute_loss: Loss | None = None, targets: Tensor | None = None
) -> Callable[[], None]:
    """Return a training step as in `training_times`, which can be run any number of times.

    Args:
        network: put into train mode; its gradients and batch-norm statistics are written.
        images: one batch.
        compute_loss: network, images and targets → a scalar; default as in `training_times`.
        targets: what the network learns; default the first class for each image, `(batch,)` int64.
    """
    network.train()
    compute_loss = compute_loss or _default_loss
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
    if targets is None:
        targets = torch.zeros(row_count(images), dtype=torch.int64, device=tensors_in(images)[0].device)

    @torch.enable_grad()
    def step() -> None:
        loss = compute_loss(network, images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _default_loss(network: nn.Module, images: Inputs, labels: Tensor) -> Tensor:
    logits = network(images)
    if logits.ndim == 2:
        return F.cross_entropy(logits, labels)
    of_pixels = labels.reshape(-1, *[1] * (logits.ndim - 3)).expand(-1, *logits.shape[3:])
    return ensemble_distillation_loss(logits, of_pixels)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
