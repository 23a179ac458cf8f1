"""The cells of a benchmark: contenders timed in turn under the same conditions, in a file whole after each.

A cell is one network under one runtime with one batch size. In every round each contender runs once, and its
time is divided by the single network's of the same round, so that drift of the machine meets both alike.
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

from contenders import PEERS, SINGLE, Contender, Network, UnavailableError, find_network, optional
from netfission.profiling.cost import count_parameters
from netfission.profiling.macs import count_macs
from netfission.profiling.timing import Quartiles, device_name, peak_bytes, times_in_turn
from netfission.runs.folder import environment
from netfission.utils.errors import check_choice
from netfission.utils.files import write_whole
from netfission.utils.text import align_columns

RESULTS = Path(__file__).parents[1] / "results"
SECONDS = 45.0  # that a cell's rounds may take where their number is left open
FEWEST_ROUNDS, MOST_ROUNDS = 3, 40
IMAGES_A_ROUND = 8  # at least, so that a round of single images is long enough to be timed

Run = Callable[[], object]
Settings = dict[str, Any]
Figures = dict[str, Any]


# --- the command line -------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser(
    benchmark: str, doc: str | None, runtimes: Iterable[str], contenders: Iterable[str]
) -> argparse.ArgumentParser:
    """The flags that benchmarks share."""
    flags = _Parser(
        prog=f"{benchmark}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--networks", default="resnet18,wrn-28-10,resnet50", help="these, or any model of netfission"
    )
    flags.add_argument("--runtimes", default=",".join(runtimes), help="default: %(default)s")
    flags.add_argument("--contenders", default=",".join(contenders), help="default: %(default)s")
    flags.add_argument(
        "--rounds",
        type=int,
        help=f"timed runs of each contender, in turn (default: {FEWEST_ROUNDS} to {MOST_ROUNDS}, "
        f"{SECONDS:.0f} seconds' worth)",
    )
    flags.add_argument("--threads", type=int, help="of the CPU (default: what PyTorch takes)")
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    flags.add_argument("--channels-last", action="store_true", help="lay images and weights out so, for all")
    flags.add_argument(
        "--out",
        type=Path,
        default=RESULTS / f"benchmark_{benchmark}.json",
        help="where cells are kept; those that it holds already are not run again",
    )
    return flags


def command(work: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None) -> int:
    """Run a benchmark; returns the exit status: 0, or 2 for a bad request, told in one line."""
    try:
        work(arguments)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def listed(argument: str, value: str, known: Iterable[str]) -> list[str]:
    """Names separated by commas, each known and each once.

    Raises:
        ValueError: one is not known.
    """
    names = list(known)
    return [check_choice(argument, name, names) for name in dict.fromkeys(value.split(","))]


def check_positive(argument: str, value: int | None) -> None:
    """Refuse numbers below 1.

    Raises:
        ValueError: it is one.
    """
    if value is not None and value < 1:
        raise ValueError(f"{argument}={value}: takes a whole number from 1")


# --- conditions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditions:
    """What all cells of a run have in common.

    Attributes:
        networks: in the order they run.
        runtimes: in the order they run.
        contenders: by name; the single network is the first.
        rounds: None where it is left open.
        device: where all runs.
        channels_last: whether images and weights are laid out so.
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
    def of(
        cls, flags: argparse.Namespace, runtimes: Iterable[str], contenders: Mapping[str, Contender]
    ) -> "Conditions":
        """Check the flags and set the threads.

        Raises:
            ValueError: one takes something else.
        """
        for argument in ("rounds", "threads"):
            check_positive(argument, getattr(flags, argument))
        if flags.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda: no GPU can be used here; takes cpu")
        if not flags.out.parent.is_dir():
            raise ValueError(f"out={flags.out}: takes a file in a folder that exists")
        names = listed("contenders", f"{SINGLE},{flags.contenders}", contenders)
        networks = [find_network(name) for name in dict.fromkeys(flags.networks.split(","))]
        if flags.threads:
            torch.set_num_threads(flags.threads)
        device = torch.device(flags.device)
        return cls(
            networks,
            listed("runtimes", flags.runtimes, runtimes),
            {name: contenders[name] for name in names},
            flags.rounds,
            device,
            flags.channels_last,
            _environment(device),
        )

    def settings(self, network: Network, runtime: str, batch_size: int) -> Settings:
        """All that a cell's figures depend on."""
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
    found = environment()
    found["versions"] |= {name: _version(name) for name in ("onnx", "onnxruntime", "onnxscript", PEERS)}
    return found | {"device": device_name(device)}


def _version(package: str) -> str:
    try:
        if package == PEERS:
            optional(package, "peers")  # it may lack what it needs itself
        return version(package)
    except (PackageNotFoundError, UnavailableError):
        return "missing"


# --- contenders of one network ----------------------------------------------------------------------


@dataclass(frozen=True)
class Entrant:
    """A contender built of a network.

    Attributes:
        network: on the device.
        size: what it holds and computes.
    """

    network: nn.Module
    size: Figures


Entrants = dict[str, Entrant | str]


def enter(network: Network, conditions: Conditions) -> Entrants:
    """Build every contender, or say why it cannot be built."""
    return {name: _entrant(network, each, conditions) for name, each in conditions.contenders.items()}


def _entrant(network: Network, contender: Contender, conditions: Conditions) -> Entrant | str:
    try:
        built = contender.build(network)
    except (UnavailableError, ValueError) as error:
        return reason(error)
    macs = count_macs(built, network.images(1))
    stored, nonzero = count_parameters(built)
    built.to(conditions.device)
    if conditions.channels_last:
        built.to(memory_format=torch.channels_last)
    size = {
        "parameters": stored,
        "parameters_nonzero": nonzero,
        "macs_dense": macs.dense,
        "macs_effective": macs.effective,
    }
    return Entrant(built, size)


def reason(error: BaseException) -> str:
    """An error's message, or else its kind, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# --- cells ------------------------------------------------------------------------------------------


class CellFile:
    """A benchmark's cells, in a file that is written whole whenever one is added.

    Args:
        path: what it holds is kept.
        benchmark: its name.

    Raises:
        ValueError: the file is not that benchmark's.
    """

    def __init__(self, path: Path, benchmark: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {"benchmark": benchmark, "cells": []}
        if path.exists():
            try:
                self.content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"out={path}: cannot be read ({reason(error)})") from error
            if not isinstance(self.content, dict) or self.content.get("benchmark") != benchmark:
                raise ValueError(
                    f"out={path}: holds something else; takes a file of this benchmark, or a new one"
                )

    def find(self, settings: Settings) -> Figures | None:
        """The figures of the cell with these very settings, if it is there."""
        cells: list[Figures] = self.content["cells"]
        return next((cell for cell in cells if cell["settings"] == settings), None)

    def add(self, settings: Settings, figures: Figures) -> None:
        """Keep a cell."""
        self.content["cells"].append({"settings": settings} | figures)
        write_whole(self.path, json.dumps(self.content, indent=2) + "\n")


def measure(
    entrants: Entrants,
    prepare: Callable[[str, nn.Module], Run],
    conditions: Conditions,
    batch_size: int,
    *,
    sees_memory: bool = True,
) -> Figures:
    """Time every contender that can be prepared, in turn.

    Args:
        entrants: by name, see `enter`.
        prepare: name and network → what to time; may raise anything.
        conditions: of the run.
        batch_size: images of a run.
        sees_memory: whether the runs take their memory of PyTorch, whose allocator is asked for the peak.

    Returns:
        What a cell holds beside its settings. A contender without times has a reason instead.
    """
    load = os.getloadavg()[0]
    runs: dict[str, Run] = {}
    figures: Figures = {}
    for name, entrant in entrants.items():
        figures[name] = {"title": conditions.contenders[name].title}
        if isinstance(entrant, str):
            figures[name]["unavailable"] = entrant
            continue
        figures[name] |= entrant.size
        start = time.perf_counter()
        try:
            runs[name] = prepare(name, entrant.network)
            runs[name]()
        except Exception as error:  # whatever exporters and compilers raise; the others go on
            runs.pop(name, None)
            figures[name]["unavailable"] = reason(error)
        figures[name]["seconds_to_prepare"] = time.perf_counter() - start
    if SINGLE not in runs:
        runs.clear()
        for row in figures.values():
            row.setdefault("unavailable", "there is no single network to compare with")
    calls = max(1, IMAGES_A_ROUND // batch_size)
    seconds = _seconds(runs, conditions, calls)
    for name, times in seconds.items():
        ratio = Quartiles.from_values(
            [own / single for own, single in zip(times, seconds[SINGLE], strict=True)]
        )
        figures[name] |= {
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
        "runs_a_round": calls,
        "load_average_before": load,
        "contenders": figures,
    }


def _seconds(runs: Mapping[str, Run], conditions: Conditions, calls: int) -> dict[str, list[float]]:
    """Seconds of one run, round by round."""
    device, rounds = conditions.device, conditions.rounds
    repeated = {name: _repeated(run, calls, device) for name, run in runs.items()}
    first = times_in_turn(repeated, device, rounds=1, warm_up=0)
    if rounds is None:
        rounds = int(SECONDS / max(1e-9, sum(seconds[0] for seconds in first.values())))
        rounds = min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS)
    times = times_in_turn(repeated, device, rounds=rounds, warm_up=0)
    return {name: [seconds / calls for seconds in own] for name, own in times.items()}


def compiled_whole(network: nn.Module, options: Mapping[str, Any] | None = None) -> Any:
    """A network compiled by inductor for the shapes that it meets, with inductor's options.

    Contenders of one class share their code, each being a recompilation of it: none may be left out.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(network, dynamic=False, options=dict(options or {}))


def _repeated(run: Run, calls: int, device: torch.device) -> Run:
    def runs() -> None:
        for _ in range(calls):
            run()
            if device.type == "cuda":  # one image is answered before the next arrives
                torch.cuda.synchronize(device)

    return runs


def run_cells(
    file: CellFile,
    order: Sequence[Settings],
    conditions: Conditions,
    cell: Callable[[Settings, Entrants, Tensor, Conditions], Figures],
    after: Callable[[Figures], str] | None = None,
) -> None:
    """Run the cells that the file does not hold yet, then print all of them, a block a network and runtime.

    Args:
        file: where they are kept.
        order: their settings, a network's one after another.
        conditions: of the run.
        cell: measures one, of the contenders as built and a batch of images.
        after: lines below a block, of its first cell.
    """
    with tqdm(total=len(order), unit="cell", file=sys.stderr) as bar:
        for network in conditions.networks:
            own = [settings for settings in order if settings["network"] == network.name]
            left = [settings for settings in own if file.find(settings) is None]
            bar.update(len(own) - len(left))
            entrants = enter(network, conditions) if left else {}
            for settings in left:
                bar.set_description(f"{network.name}, batch {settings['batch_size']}, {settings['runtime']}")
                images = network.images(settings["batch_size"]).to(conditions.device)
                if conditions.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                file.add(settings, cell(settings, entrants, images, conditions))
                torch.compiler.reset()
                bar.update()
            entrants.clear()
    blocks: dict[tuple[str, str], list[Figures]] = {}
    for settings in order:
        found = file.find(settings)
        assert found is not None
        blocks.setdefault((settings["network"], settings["runtime"]), []).append(found)
    for cells in blocks.values():
        print(f"\n{block(cells)}" + (after(cells[0]) if after else ""))


# --- as text ----------------------------------------------------------------------------------------


def block(cells: Sequence[Figures]) -> str:
    """Cells that differ in their batch size alone, as an aligned table."""
    settings = cells[0]["settings"]
    classes, shape = settings["classes"], " × ".join(map(str, settings["image_shape"]))
    head = ["", "parameters, M", "MACs, M"]
    for cell in cells:
        head += [f"batch {cell['settings']['batch_size']}: ms", "ratio (quartiles)", "peak, MiB"]
    rows = [head]
    missing: dict[str, list[str]] = {}
    for name, row in cells[0]["contenders"].items():
        each = [cell["contenders"][name] for cell in cells]
        for why in {figures["unavailable"]: None for figures in each if "unavailable" in figures}:
            missing.setdefault(why, []).append(row["title"])
        if any("seconds" in figures for figures in each):
            size = [_two(row, "parameters", "parameters_nonzero"), _two(row, "macs_dense", "macs_effective")]
            rows.append([row["title"], *size, *(text for figures in each for text in _measured(figures))])
    return "\n".join(
        [
            f"{settings['network']} ({settings['model']}, {classes} classes, {shape}), {settings['runtime']}",
            *([align_columns(rows)] if len(rows) > 1 else []),
            *(f"not available: {', '.join(titles)}: {why}" for why, titles in missing.items()),
            "rounds: "
            + ", ".join(f"{cell['rounds']} at batch {cell['settings']['batch_size']}" for cell in cells),
        ]
    )


def _two(row: Figures, all_of_it: str, of_kept_weights: str) -> str:
    texts = [f"{row[name] / 1e6:,.2f}" for name in (all_of_it, of_kept_weights)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} ({texts[1]} non-zero)"


def _measured(figures: Figures) -> list[str]:
    if "seconds" not in figures:
        return ["–"] * 3
    lower, upper = figures["ratio_quartiles"]
    peak = figures["peak_bytes"]
    return [
        f"{1e3 * figures['seconds_median']:,.1f}",
        f"{figures['ratio_median']:.2f} ({lower:.2f}–{upper:.2f})",
        "–" if peak is None else f"{peak / 2**20:,.1f}",
    ]


def closing(conditions: Conditions, what: str) -> str:
    """What the tables' numbers are, and of what machine."""
    found = conditions.environment
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n".join(
        [
            "",
            what,
            "ms: median of the rounds, after one of warm-up. ratio: median (quartiles) of the time over the",
            "single network's in the same round and runtime. MACs: of one image in inference. peak: most",
            "memory that PyTorch gives out during a run, above what it had given out before.",
            versions,
            f"threads: {found['threads']}; device: {found['device']}",
        ]
    )
