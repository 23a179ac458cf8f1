"""Time and memory of networks, measured side by side in one process."""

import copy
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler import profile

from netfission.losses import ensemble_distillation_loss
from netfission.utils.modes import in_mode

WARM_UP = 3

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


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


def device_name(device: torch.device) -> str:
    """What measured figures are told to be of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"


def times_in_turn(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 20,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Time runs side by side: in each round every one goes once, so that drift meets all alike.

    The machine should be idle otherwise: what else runs on it slows some rounds more than others.

    Args:
        runs: name → what to time.
        device: where it runs; a GPU is waited for.
        rounds: how many times are kept of each.
        warm_up: rounds before that.

    Returns:
        name → seconds of each round.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warm_up + rounds):
        for name, run in runs.items():
            _wait_for(device)
            start = time.perf_counter()
            run()
            _wait_for(device)
            if index >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def inference_times(
    networks: Mapping[str, nn.Module], images: Tensor, *, rounds: int = 20, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Time inference of networks side by side, in eval mode without gradients; see `times_in_turn`.

    Args:
        networks: name → module, on the images' device; their modes are put back afterwards.
        images: one batch.
        rounds: how many times are kept of each.
        warm_up: rounds before that.

    Returns:
        name → seconds of each round.
    """
    runs = {name: _call(module, images) for name, module in networks.items()}
    # Not inference_mode, which is no faster: what a network caches here must still serve in training.
    with torch.no_grad(), in_mode(*networks.values(), training=False):
        return times_in_turn(runs, images.device, rounds=rounds, warm_up=warm_up)


def training_times(
    networks: Mapping[str, nn.Module], images: Tensor, *, rounds: int = 20, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Time training steps of copies of networks side by side, in train mode; see `times_in_turn`.

    A step is forward, loss, backward and SGD with Nesterov momentum 0.9 and weight decay 5e-4. The loss is
    `ensemble_distillation_loss` of logits `(batch, exits, classes)`, cross-entropy of `(batch, classes)`.
    The learning rate is 0: the same work, and no round meets other weights than the last.

    Args:
        networks: name → classifier, on the images' device; not changed.
        images: one batch.
        rounds: how many times are kept of each.
        warm_up: rounds before that.

    Returns:
        name → seconds of each round.
    """
    runs = {name: training_step(copy.deepcopy(module), images) for name, module in networks.items()}
    return times_in_turn(runs, images.device, rounds=rounds, warm_up=warm_up)


def inference_peak(network: nn.Module, images: Tensor) -> int:
    """Most bytes that inference of one batch needs beside network and images; see `peak_bytes`."""
    with torch.no_grad(), in_mode(network, training=False):
        network(images)
        return peak_bytes(_call(network, images), images.device)


def training_peak(network: nn.Module, images: Tensor) -> int:
    """Most bytes that a training step needs beside network and images; see `peak_bytes`.

    Gradients and momentum are in it: it is measured on the first step of a copy. The step is that of
    `training_times`.
    """
    network = copy.deepcopy(network)
    training_step(network, images)()  # what libraries set up once is not the step's
    network.zero_grad()
    return peak_bytes(training_step(network, images), images.device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most memory that PyTorch's allocator gave out during a run, above what it had given before.

    On a CPU as on a GPU that holds what operations take for themselves (such as a convolution's reordered
    weights). On a CPU, memory that oneDNN or BLAS take from the system directly is not seen, and what the
    run gives back of memory from before is not set off.

    Args:
        run: what to measure; run it once before, so that what is made only once is not counted.
        device: where it runs.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    profiler = profile(profile_memory=True)
    with _unheard():
        profiler.__enter__()
    try:
        run()
    finally:
        with _unheard():
            profiler.__exit__(None, None, None)
    assert profiler.kineto_results is not None
    now = peak = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]  # forgotten in PyTorch's stubs
            peak = max(peak, now)
    return peak


@contextmanager
def _unheard() -> Iterator[None]:
    """Turn file descriptor 2 away, where the profiler's library writes that it starts and stops."""
    sys.stderr.flush()
    before = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _call(module: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: module(images)


def training_step(network: nn.Module, images: Tensor, loss_of: Loss | None = None) -> Callable[[], None]:
    """A training step as `training_times` takes it, which can be run any number of times.

    Args:
        network: put into train mode; its gradients and batch-norm statistics are written.
        images: one batch.
        loss_of: network, images and labels `(batch,)` int64 → a scalar; default as in `training_times`.
    """
    network.train()
    loss_of = loss_of or _usual_loss
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    @torch.enable_grad()
    def step() -> None:
        loss = loss_of(network, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _usual_loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits = network(images)
    return F.cross_entropy(logits, labels) if logits.ndim == 2 else ensemble_distillation_loss(logits, labels)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
