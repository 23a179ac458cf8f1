"""How long inference takes, over the single network made fast in the same way.

Runtimes, each for all contenders alike:

- eager: PyTorch, in eval mode without gradients;
- deployed: `netfission.inference.deploy`: batch norms folded, paths joined; peers too, where it can be done;
- onnxruntime: deployed where it can be, exported by torch.onnx and run by ONNX Runtime, with as many threads;
- compiled: torch.compile (inductor) with weights frozen. This takes long: up to minutes a contender.

The contenders of a network run in turn, round by round, in one cell (batch size, runtime) after another. Each
cell is written as soon as it is done, into results/benchmark_inference.json, and is not run again.

    .venv/bin/python benchmarks/inference.py --networks resnet18 --batches 1,32 --runtimes eager,deployed
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import netfission as nf
from cells import (
    CellFile,
    Conditions,
    Entrants,
    Figures,
    Run,
    Settings,
    check_positive,
    closing,
    command,
    compiled_whole,
    measure,
    parser,
    run_cells,
)
from contenders import CONTENDERS, DeepEnsemble, Peer, UnavailableError, optional
from netfission.inference.deployment import deploy
from netfission.network import ExitPath, FissionNetwork

TOLERANCE = 1e-2  # of logits over the largest: what a GPU's TF32 makes of them is fine, another result is not

Runtime = Callable[[nn.Module, Tensor], Run]


def eager(network: nn.Module, images: Tensor) -> Run:
    """The network as it is."""
    return partial(network, images)


def deployed(network: nn.Module, images: Tensor) -> Run:
    """The network made fast to run."""
    return partial(_deploy(network, images), images)


def _deploy(network: nn.Module, images: Tensor) -> nn.Module:
    if isinstance(network, DeepEnsemble):
        return DeepEnsemble([_deploy(member, images) for member in network.members])
    if isinstance(network, Peer):
        body, head = network.split()
        as_exit = FissionNetwork(body, [ExitPath([], head)], [], [])
        return nn.Sequential(deploy(as_exit, images), nn.Flatten(1, 2))
    if not isinstance(network, FissionNetwork):
        network = nf.fission(network, exits=1, example_input=images)
    return deploy(network, images)


def compiled(network: nn.Module, images: Tensor) -> Run:
    """The network compiled for this batch size."""
    return partial(compiled_whole(network, {"freezing": True}), images)


def onnxruntime(network: nn.Module, images: Tensor) -> Run:
    """The network made fast to run if it can be, exported for this batch size."""
    runtime = optional("onnxruntime", "onnx")
    for module in ("onnx", "onnxscript"):
        optional(module, "onnx")
    provider = "CUDAExecutionProvider" if images.is_cuda else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise UnavailableError(f"ONNX Runtime has no {provider} here")
    with suppress(UnavailableError):
        network = _deploy(network, images)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Else its threads go on spinning for a while, while the next contender runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "network.onnx"
        torch.onnx.export(network, (images,), file, dynamo=True, external_data=False, verbose=False)
        session = runtime.InferenceSession(file, options, providers=[provider])
    return partial(session.run, None, {session.get_inputs()[0].name: images.cpu().numpy()})


RUNTIMES: dict[str, Runtime] = {
    "eager": eager,
    "deployed": deployed,
    "onnxruntime": onnxruntime,
    "compiled": compiled,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record; returns the exit status."""
    return command(_work, arguments)


def _work(arguments: Sequence[str] | None) -> None:
    flags = parser("inference", __doc__, RUNTIMES, CONTENDERS)
    flags.add_argument("--batches", default="1,32,128", help="batch sizes (default: %(default)s)")
    given = flags.parse_args(arguments)
    conditions = Conditions.of(given, RUNTIMES, CONTENDERS)
    batches = _batches(given.batches)
    run_cells(
        CellFile(given.out, "inference"),
        [
            conditions.settings(network, runtime, size)
            for network in conditions.networks
            for size in batches
            for runtime in conditions.runtimes
        ],
        conditions,
        _cell,
    )
    print(closing(conditions, "Inference of one batch, in eval mode without gradients."))
    print(f"wrote {given.out}")


def _batches(text: str) -> list[int]:
    try:
        sizes = [int(size) for size in dict.fromkeys(text.split(","))]
    except ValueError as error:
        raise ValueError(f"batches={text}: takes whole numbers from 1, as in 1,32") from error
    for size in sizes:
        check_positive("batches", size)
    return sizes


@torch.no_grad()
def _cell(settings: Settings, entrants: Entrants, images: Tensor, conditions: Conditions) -> Figures:
    runtime = RUNTIMES[settings["runtime"]]

    def prepare(_: str, network: nn.Module) -> Run:
        run = runtime(network.eval(), images)
        _check(run(), network(images))
        return run

    return measure(entrants, prepare, conditions, len(images), sees_memory=runtime is not onnxruntime)


def _check(result: Any, logits: Tensor) -> None:
    """Refuse to time what gives other logits; ONNX Runtime gives a list of arrays."""
    found = torch.as_tensor(result[0] if isinstance(result, list) else result).to(logits).flatten()
    difference = (found - logits.flatten()).abs().max().item()
    largest = logits.abs().max().item()
    if not difference <= TOLERANCE * largest:
        raise UnavailableError(f"its logits differ by {difference:.2g} of at most {largest:.2g}")


if __name__ == "__main__":
    sys.exit(main())
