"""Budgets in time: the widths that are found, and the time that the network takes when it is measured again.

For each network, number of exits and batch size, `fission` by channels with `budget_in="time"` finds the
widths. Then the divided and the single network are prepared anew for each runtime of `inference.py`, and
timed in turn. Each cell is written to results/benchmark_time_budget.json as soon as it is done, and is not
run again. Nothing else should run on the machine.

    .venv/bin/python benchmarks/time_budget.py --networks resnet18 --exits 3 --batches 1,32
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import netfission as nf
from cells import RESULTS, CellFile, Results, Settings, command, split_names
from contenders import Network, UnavailableError, find_network
from inference import RUNTIMES
from netfission.profiling.timing import Quartiles, device_name, times_in_turn
from netfission.runs.folder import environment
from netfission.surgery.backbone import cut
from netfission.utils.errors import first_line, invalid
from netfission.utils.text import align_columns

NETWORKS = (
    "resnet18,resnet50,wrn-28-10,timm/tf_efficientnet_lite0,timm/convnext_atto,timm/vit_tiny_patch16_224"
)
SECONDS = 20.0  # for the rounds of a runtime
FEWEST, MOST = 7, 60  # rounds


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record; return the exit status."""
    return command(_work, arguments)


def _work(arguments: Sequence[str] | None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--networks", default=NETWORKS, help="default: %(default)s")
    flags.add_argument("--exits", default="2,3,4", help="numbers of exits (default: %(default)s)")
    flags.add_argument("--batches", default="1,32,128", help="batch sizes (default: %(default)s)")
    flags.add_argument("--runtimes", default="deployed,onnxruntime", help="default: %(default)s")
    flags.add_argument("--budget", type=float, default=1.0, help="default: %(default)s")
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    flags.add_argument("--out", type=Path, default=RESULTS / "benchmark_time_budget.json")
    given = flags.parse_args(arguments)
    runtimes = split_names("runtimes", given.runtimes, RUNTIMES)
    device = torch.device(given.device)
    conditions = environment() | {"device": device_name(device)}
    order = [
        {
            "network": network,
            "exits": exits,
            "batch_size": size,
            "budget": given.budget,
            "runtimes": runtimes,
            "environment": conditions,
        }
        for network in given.networks.split(",")
        for exits in _numbers("exits", given.exits)
        for size in _numbers("batches", given.batches)
    ]
    file = CellFile(given.out, "time_budget")
    networks = {name: find_network(name) for name in given.networks.split(",")}
    for settings in (bar := tqdm(order, unit="cell", file=sys.stderr)):
        bar.set_description(
            f"{settings['network']}, {settings['exits']} exits, batch {settings['batch_size']}"
        )
        if file.find(settings) is None:
            file.add(settings, _cell(settings, networks[settings["network"]], device))
    print(table([(settings, found) for settings in order if (found := file.find(settings)) is not None]))
    print(f"wrote {given.out}")


def _numbers(name: str, text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise invalid(name, "positive integers with commas, as in 1,32", text)
    return [int(number) for number in numbers]


def _cell(settings: Settings, network: Network, device: torch.device) -> Results:
    model, images = network.create().eval().to(device), network.images(settings["batch_size"]).to(device)
    example = images[:1].repeat(2, 1, 1, 1)
    last = len(cut(model, example).stages) - 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            divided = nf.fission(
                model,
                settings["exits"],
                branch_after=[min(number, last) for number in range(1, settings["exits"])],
                grouping="channels",
                budget=settings["budget"],
                budget_in="time",
                budget_batch_size=len(images),
                example_input=example,
            ).eval()
        except ValueError as error:
            return {"unmet": first_line(error)}
    single = nf.fission(model, 1, example_input=example).eval()
    assert divided.timed is not None
    again = {name: _time(name, divided, single, images) for name in settings["runtimes"]}
    warned = [text for text in (str(warning.message) for warning in caught) if "times vary" in text]
    timed = divided.timed
    return {"macs": timed.macs, "found": asdict(timed.time), "again": again, "warnings": warned}


@torch.no_grad()
def _time(name: str, divided: nf.FissionNetwork, single: nf.FissionNetwork, images: torch.Tensor) -> Results:
    """Time both networks anew under a runtime, in rounds in which each runs once."""
    try:
        runs = {"divided": RUNTIMES[name](divided, images), "single": RUNTIMES[name](single, images)}
        first = times_in_turn(runs, images.device, rounds=1)
    except (UnavailableError, RuntimeError) as error:
        return {"unavailable": first_line(error)}
    rounds = min(max(round(SECONDS / sum(map(sum, first.values()))), FEWEST), MOST)
    times = times_in_turn(runs, images.device, rounds=rounds, warm_up=0)
    return asdict(Quartiles.of_ratios(times["divided"], times["single"])) | {"rounds": rounds}


def table(cells: Sequence[tuple[Settings, Results]]) -> str:
    """Return cells as an aligned table."""
    runtimes = list(dict.fromkeys(name for settings, _ in cells for name in settings["runtimes"]))
    rows = [["", "exits", "batch", "MACs", *runtimes]]
    for settings, results in cells:
        row = [settings["network"], str(settings["exits"]), str(settings["batch_size"])]
        if "unmet" in results:
            row += ["", results["unmet"]]
        else:
            row += [f"{results['macs']:.2f}", *(_cell_text(results["again"].get(name)) for name in runtimes)]
        rows.append(row)
    width = max(map(len, rows))
    return align_columns([row + [""] * (width - len(row)) for row in rows])


def _cell_text(time: Results | None) -> str:
    if time is None or "unavailable" in time:
        return "–" if time is None else time["unavailable"]
    return f"{time['median']:.2f} ({time['lower']:.2f}–{time['upper']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
