"""The cells of a benchmark: contenders timed in turn under the same conditions, written to a file one by one.

A cell is one network under one runtime with one batch size. In every round each contender runs once, and its
time is divided by the single network's of the same round, so that drift of the machine affects both equally.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from contenders import PEERS, SINGLE, Contender, Network, UnavailableError, find_network, import_optional
from netfission.profiling.cost import count_parameters
from netfission.profiling.macs import count_macs
from netfission.profiling.timing import Quartiles, device_name, peak_bytes, times_in_turn
from netfission.runs.folder import environment
from netfission.utils.errors import check_choice, check_positive_integer, first_line, invalid
from netfission.utils.files import write_whole
from netfission.utils.text import align_columns

RESULTS = Path(__file__).parents[1] / "results"
SECONDS = 45.0  # for the rounds of a cell, unless their number is given
MIN_ROUNDS, MAX_ROUNDS = 3, 40
IMAGES_PER_ROUND = 8  # at least, so that a round of single images is long enough to time

Run = Callable[[], object]
Settings = dict[str, Any]
Results = dict[str, Any]


# --- the command line -------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise invalid("arguments", "as in --help", found=message)


def parser(
    benchmark: str, doc: str | None, runtimes: Iterable[str], contenders: Iterable[str]
) -> argparse.ArgumentParser:
    """Return a parser with the flags that benchmarks share."""
    flags = _Parser(
        prog=f"{benchmark}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--networks",
        default="resnet18,wrn-28-10,resnet50",
        help="these, or any model of netfission (default: %(default)s)",
    )
    flags.add_argument("--runtimes", default=",".join(runtimes), help="default: %(default)s")
    flags.add_argument("--contenders", default=",".join(contenders), help="default: %(default)s")
    flags.add_argument(
        "--rounds",
        type=int,
        help=f"timed runs of each contender, in turn (default: {MIN_ROUNDS} to {MAX_ROUNDS}, "
        f"as many as fit {SECONDS:.0f} seconds)",
    )
    flags.add_argument("--threads", type=int, help="threads of the CPU (default: PyTorch's)")
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    flags.add_argument(
        "--channels-last",
        action="store_true",
        help="keep images and weights of all contenders in channels-last order",
    )
    flags.add_argument(
        "--out",
        type=Path,
        default=RESULTS / f"benchmark_{benchmark}.json",
        help="file of the cells; cells that it already holds are not run again",
    )
    return flags


def command(work: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None) -> int:
    """Run a benchmark; return the exit status: 0, or 2 for a bad request, with one line on standard error."""
    try:
        work(arguments)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def split_names(argument: str, value: str, known: Iterable[str]) -> list[str]:
    """Return the names in a text with commas, each once.

    Raises:
        ValueError: a name is unknown.
    """
    names = list(known)
    return [check_choice(argument, name, names) for name in dict.fromkeys(value.split(","))]


# --- conditions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditions:
    """The conditions that all cells of a run share.

    Attributes:
        networks: in the order they run.
        runtimes: in the order they run.
        contenders: by name; the single network is the first.
        rounds: number of rounds; None for as many as fit the time.
        device: of all contenders.
        channels_last: whether images and weights are in channels-last order.
        environment: versions, device and threads.
    """

    networks: list[Network]
    runtimes: list[str]
    contenders: dict[str, Contender]
    rounds: int | None
    device: torch.device
    channels_last: bool
    environment: dict[str, Any]

    @classmethod
    def from_flags(
        cls, flags: argparse.Namespace, runtimes: Iterable[str], contenders: Mapping[str, Contender]
    ) -> "Conditions":
        """Check the flags and set the threads.

        Raises:
            ValueError: a flag is not valid.
        """
        for argument in ("rounds", "threads"):
            if getattr(flags, argument) is not None:
                check_positive_integer(argument, getattr(flags, argument))
        if flags.device == "cuda" and not torch.cuda.is_available():
            raise invalid("device", "cpu", "cuda", hint="no GPU is available")
        if not flags.out.parent.is_dir():
            raise invalid("out", "a file in a folder that exists", str(flags.out))
        names = split_names("contenders", f"{SINGLE},{flags.contenders}", contenders)
        networks = [find_network(name) for name in dict.fromkeys(flags.networks.split(","))]
        if flags.threads:
            torch.set_num_threads(flags.threads)
        device = torch.device(flags.device)
        return cls(
            networks,
            split_names("runtimes", flags.runtimes, runtimes),
            {name: contenders[name] for name in names},
            flags.rounds,
            device,
            flags.channels_last,
            _environment(device),
        )

    def settings(self, network: Network, runtime: str, batch_size: int) -> Settings:
        """Return everything that a cell's results depend on."""
        return {
            "network": network.name,
            "model": network.model,
            "classes": network.classes,
            "image_shape": [3, network.side, network.side],
            "runtime": runtime,
            "batch_size": batch_size,
            "contenders": list(self.contenders),
            "rounds": self.rounds,
            "channels_last": self.channels_last,
            "environment": self.environment,
        }


def _environment(device: torch.device) -> dict[str, Any]:
    conditions = environment()
    conditions["versions"] |= {name: _version(name) for name in ("onnx", "onnxruntime", "onnxscript", PEERS)}
    return conditions | {"device": device_name(device)}


def _version(package: str) -> str:
    try:
        if package == PEERS:
            import_optional(package, "peers")  # what it depends on may be missing
        return version(package)
    except (PackageNotFoundError, UnavailableError):
        return "missing"


# --- contenders of one network ----------------------------------------------------------------------


@dataclass(frozen=True)
class BuiltContender:
    """A contender built from a network.

    Attributes:
        network: on the device.
        size: parameters and multiply-accumulates.
    """

    network: nn.Module
    size: Results


BuiltContenders = dict[str, BuiltContender | str]


def build_contenders(network: Network, conditions: Conditions) -> BuiltContenders:
    """Build every contender; name → the contender, or why it cannot be built."""
    return {name: _build(network, contender, conditions) for name, contender in conditions.contenders.items()}


def _build(network: Network, contender: Contender, conditions: Conditions) -> BuiltContender | str:
    try:
        module = contender.build(network)
    except (UnavailableError, ValueError) as error:
        return first_line(error)
    macs = count_macs(module, network.images(1))
    stored, nonzero = count_parameters(module)
    module.to(conditions.device)
    if conditions.channels_last:
        module.to(memory_format=torch.channels_last)
    size = {
        "parameters": stored,
        "parameters_nonzero": nonzero,
        "macs_dense": macs.dense,
        "macs_effective": macs.effective,
    }
    return BuiltContender(module, size)


# --- cells ------------------------------------------------------------------------------------------


class CellFile:
    """The file of a benchmark's cells, written whole whenever a cell is added.

    Args:
        path: of the file; the cells that it holds are kept.
        benchmark: name of the benchmark.

    Raises:
        ValueError: the file is damaged, or belongs to another benchmark.
    """

    def __init__(self, path: Path, benchmark: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {"benchmark": benchmark, "cells": []}
        if path.exists():
            try:
                self.content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                found = f"damaged JSON ({first_line(error)})"
                raise invalid(str(path), "a file of this benchmark", found=found) from error
            if not isinstance(self.content, dict) or self.content.get("benchmark") != benchmark:
                raise invalid(str(path), "a file of this benchmark, or not exist", found="other content")

    def find(self, settings: Settings) -> Results | None:
        """Return the results of the cell with exactly these settings; None if it is not there."""
        cells: list[Results] = self.content["cells"]
        return next((cell for cell in cells if cell["settings"] == settings), None)

    def add(self, settings: Settings, results: Results) -> None:
        """Add a cell."""
        self.content["cells"].append({"settings": settings} | results)
        write_whole(self.path, json.dumps(self.content, indent=2) + "\n")


def measure(
    built: BuiltContenders,
    prepare: Callable[[str, nn.Module], Run],
    conditions: Conditions,
    batch_size: int,
    *,
    sees_memory: bool = True,
) -> Results:
    """Time every contender that can be prepared, in turn.

    Args:
        built: by name, see `build_contenders`.
        prepare: name and network → what to time; may raise anything.
        conditions: of the run.
        batch_size: images per run.
        sees_memory: whether the runs take their memory from PyTorch's allocator, which knows the peak.

    Returns:
        The cell without its settings. A contender without times has a reason instead.
    """
    load = os.getloadavg()[0]
    runs: dict[str, Run] = {}
    rows: Results = {}
    for name, contender in built.items():
        rows[name] = {"title": conditions.contenders[name].title}
        if isinstance(contender, str):
            rows[name]["unavailable"] = contender
            continue
        rows[name] |= contender.size
        start = time.perf_counter()
        try:
            runs[name] = prepare(name, contender.network)
            runs[name]()
        except Exception as error:  # whatever an exporter or compiler raises; the other contenders go on
            runs.pop(name, None)
            rows[name]["unavailable"] = first_line(error)
        rows[name]["seconds_to_prepare"] = time.perf_counter() - start
    if SINGLE not in runs:
        runs.clear()
        for row in rows.values():
            row.setdefault("unavailable", "no single network to compare with")
    calls = max(1, IMAGES_PER_ROUND // batch_size)
    seconds = _seconds(runs, conditions, calls)
    for name, times in seconds.items():
        ratio = Quartiles.of_ratios(times, seconds[SINGLE])
        rows[name] |= {
            "seconds": times,
            "seconds_median": median(times),
            "ratio_median": ratio.median,
            "ratio_quartiles": [ratio.lower, ratio.upper],
            "peak_bytes": peak_bytes(runs[name], conditions.device) if sees_memory else None,
        }
    runs.clear()
    gc.collect()
    return {
        "rounds": len(seconds.get(SINGLE, ())),
        "runs_per_round": calls,
        "load_average_before": load,
        "contenders": rows,
    }


def _seconds(runs: Mapping[str, Run], conditions: Conditions, calls: int) -> dict[str, list[float]]:
    """Seconds of one run, round by round."""
    device, rounds = conditions.device, conditions.rounds
    repeated = {name: _repeated(run, calls, device) for name, run in runs.items()}
    first = times_in_turn(repeated, device, rounds=1, warm_up=0)
    if rounds is None:
        rounds = int(SECONDS / max(1e-9, sum(seconds[0] for seconds in first.values())))
        rounds = min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)
    times = times_in_turn(repeated, device, rounds=rounds, warm_up=0)
    return {name: [seconds / calls for seconds in of_rounds] for name, of_rounds in times.items()}


def compiled_whole(network: nn.Module, options: Mapping[str, Any] | None = None) -> Any:
    """Compile a network with inductor for the shapes that it meets, with inductor's options.

    Contenders of one class share their code, and each recompiles it: the limit must leave out none.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(network, dynamic=False, options=dict(options or {}))


def _repeated(run: Run, calls: int, device: torch.device) -> Run:
    def runs() -> None:
        for _ in range(calls):
            run()
            if device.type == "cuda":  # a run ends before the next one starts
                torch.cuda.synchronize(device)

    return runs


def run_cells(
    file: CellFile,
    order: Sequence[Settings],
    conditions: Conditions,
    cell: Callable[[Settings, BuiltContenders, Tensor, Conditions], Results],
    after: Callable[[Results], str] | None = None,
) -> None:
    """Run the cells that the file does not hold yet, then print all, one table per network and runtime.

    Args:
        file: of the cells.
        order: settings of the cells, network by network.
        conditions: of the run.
        cell: measures a cell: settings, contenders, a batch of images and conditions → its results.
        after: lines below a table: first cell of the table → text.
    """
    with tqdm(total=len(order), unit="cell", file=sys.stderr) as bar:
        for network in conditions.networks:
            of_network = [settings for settings in order if settings["network"] == network.name]
            missing = [settings for settings in of_network if file.find(settings) is None]
            bar.update(len(of_network) - len(missing))
            built = build_contenders(network, conditions) if missing else {}
            for settings in missing:
                bar.set_description(f"{network.name}, batch {settings['batch_size']}, {settings['runtime']}")
                images = network.images(settings["batch_size"]).to(conditions.device)
                if conditions.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                file.add(settings, cell(settings, built, images, conditions))
                torch.compiler.reset()
                bar.update()
            built.clear()
    tables: dict[tuple[str, str], list[Results]] = {}
    for settings in order:
        results = file.find(settings)
        assert results is not None
        tables.setdefault((settings["network"], settings["runtime"]), []).append(results)
    for cells in tables.values():
        print(f"\n{table(cells)}" + (after(cells[0]) if after else ""))


# --- as text ----------------------------------------------------------------------------------------


def table(cells: Sequence[Results]) -> str:
    """Return cells that differ in their batch size alone as an aligned table."""
    settings = cells[0]["settings"]
    classes, shape = settings["classes"], " × ".join(map(str, settings["image_shape"]))
    head = ["", "parameters, M", "MACs, M"]
    for cell in cells:
        head += [f"batch {cell['settings']['batch_size']}: ms", "ratio (quartiles)", "peak, MiB"]
    rows = [head]
    missing: dict[str, list[str]] = {}
    for name, row in cells[0]["contenders"].items():
        by_cell = [cell["contenders"][name] for cell in cells]
        for reason in {results["unavailable"]: None for results in by_cell if "unavailable" in results}:
            missing.setdefault(reason, []).append(row["title"])
        if any("seconds" in results for results in by_cell):
            parameters = _millions(row, "parameters", "parameters_nonzero")
            macs = _millions(row, "macs_dense", "macs_effective")
            times = [text for results in by_cell for text in _time_texts(results)]
            rows.append([row["title"], parameters, macs, *times])
    return "\n".join(
        [
            f"{settings['network']} ({settings['model']}, {classes} classes, {shape}), {settings['runtime']}",
            *([align_columns(rows)] if len(rows) > 1 else []),
            *(f"not available: {', '.join(titles)}: {reason}" for reason, titles in missing.items()),
            "rounds: "
            + ", ".join(f"{cell['rounds']} at batch {cell['settings']['batch_size']}" for cell in cells),
        ]
    )


def _millions(row: Results, total: str, nonzero: str) -> str:
    texts = [f"{row[name] / 1e6:,.2f}" for name in (total, nonzero)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} ({texts[1]} non-zero)"


def _time_texts(results: Results) -> list[str]:
    if "seconds" not in results:
        return ["–"] * 3
    lower, upper = results["ratio_quartiles"]
    peak = results["peak_bytes"]
    return [
        f"{1e3 * results['seconds_median']:,.1f}",
        f"{results['ratio_median']:.2f} ({lower:.2f}–{upper:.2f})",
        "–" if peak is None else f"{peak / 2**20:,.1f}",
    ]


def footnotes(conditions: Conditions, what: str) -> str:
    """Return lines that say what the numbers of the tables mean, and on what machine they were measured."""
    machine = conditions.environment
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return "\n".join(
        [
            "",
            what,
            "ms: median of the rounds, after one of warm-up. ratio: median (quartiles) of the time over the",
            "single network's in the same round and runtime. MACs: of one image in inference. peak: the most",
            "memory that PyTorch allocates during a run, above what it had allocated before.",
            versions,
            f"threads: {machine['threads']}; device: {machine['device']}",
        ]
    )
