"""Time of inference over the single network's, in the same runtime.

Each runtime serves all contenders:

- eager: PyTorch, in eval mode without gradients.
- deployed: `netfission.inference.deploy`, with batch norms folded and paths joined; peers too, if possible.
- onnxruntime: deployed if possible, exported by torch.onnx and run by ONNX Runtime with as many threads.
- compiled: torch.compile (inductor) with frozen weights. Compiling takes up to minutes per contender.

The contenders of a network run in turn, round by round, in one cell (batch size, runtime) after another. Each
cell is written to results/benchmark_inference.json as soon as it is done, and is not run again.

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
    BuiltContenders,
    CellFile,
    Conditions,
    Results,
    Run,
    Settings,
    command,
    compiled_whole,
    footnotes,
    measure,
    parser,
    run_cells,
)
from contenders import CONTENDERS, DeepEnsemble, Peer, UnavailableError, import_optional
from netfission.inference.deployment import deploy
from netfission.network import ExitPath, FissionNetwork
from netfission.utils.errors import invalid

TOLERANCE = 1e-2  # difference of logits over the largest; above that of a GPU's TF32

Runtime = Callable[[nn.Module, Tensor], Run]


def eager(network: nn.Module, images: Tensor) -> Run:
    """The network as it is."""
    return partial(network, images)


def deployed(network: nn.Module, images: Tensor) -> Run:
    """The network deployed."""
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
    """The network deployed if possible, exported for this batch size."""
    runtime = import_optional("onnxruntime", "onnx")
    for module in ("onnx", "onnxscript"):
        import_optional(module, "onnx")
    provider = "CUDAExecutionProvider" if images.is_cuda else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise UnavailableError(f"ONNX Runtime has no {provider} here")
    with suppress(UnavailableError):
        network = _deploy(network, images)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads spin on for a while, while the next contender runs.
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
    """Measure, print and record; return the exit status."""
    return command(_work, arguments)


def _work(arguments: Sequence[str] | None) -> None:
    flags = parser("inference", __doc__, RUNTIMES, CONTENDERS)
    flags.add_argument("--batches", default="1,32,128", help="batch sizes (default: %(default)s)")
    given = flags.parse_args(arguments)
    conditions = Conditions.from_flags(given, RUNTIMES, CONTENDERS)
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
    print(footnotes(conditions, "Inference of one batch, in eval mode without gradients."))
    print(f"wrote {given.out}")


def _batches(text: str) -> list[int]:
    sizes = dict.fromkeys(text.split(","))
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise invalid("batches", "positive integers with commas, as in 1,32", text)
    return [int(size) for size in sizes]


@torch.no_grad()
def _cell(settings: Settings, built: BuiltContenders, images: Tensor, conditions: Conditions) -> Results:
    runtime = RUNTIMES[settings["runtime"]]

    def prepare(_: str, network: nn.Module) -> Run:
        run = runtime(network.eval(), images)
        _check(run(), network(images))
        return run

    return measure(built, prepare, conditions, len(images), sees_memory=runtime is not onnxruntime)


def _check(result: Any, logits: Tensor) -> None:
    """Refuse to time a run with other logits; ONNX Runtime returns a list of arrays."""
    output = torch.as_tensor(result[0] if isinstance(result, list) else result).to(logits).flatten()
    difference = (output - logits.flatten()).abs().max().item()
    largest = logits.abs().max().item()
    if not difference <= TOLERANCE * largest:
        raise UnavailableError(f"its logits differ by {difference:.2g}, and the largest is {largest:.2g}")


if __name__ == "__main__":
    sys.exit(main())
