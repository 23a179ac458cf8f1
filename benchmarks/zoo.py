"""Every image model of timm and torchvision, fissioned without further settings, by every grouping.

Of each family of timm (a module of `timm.models`) one network runs, the smallest, and of torchvision every
classification model; `--second` runs another network of each family of timm. They have random weights, 10
classes, 3 exits, and images as small as the network accepts. Each network and grouping is measured in a
process of its own, which may use 60 s of processor time for a call of `fission` and 6 GiB of memory. So a
search without an end is a row of the table, too. Lists of families: benchmarks/zoo_families.json.

The results are written to results/benchmark_zoo.json after each row. Rows of the same source are not measured
again. `make docs` writes them as a page of the documentation.

    .venv/bin/python benchmarks/zoo.py --networks resnet,convnext --groupings channels
"""

import argparse
import hashlib
import json
import multiprocessing as mp
import re
import resource
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from textwrap import shorten
from typing import Any, get_args

import torch
from tqdm import tqdm

from cells import command, split_names
from netfission.runs.folder import environment
from netfission.utils.errors import did_you_mean, invalid
from netfission.utils.files import write_whole
from netfission.utils.text import align_columns, count_noun, percent
from zoo_checks import EXITS, SECONDS, Grouping, Network, Row, measure, peak_gib

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "benchmark_zoo.json"
PAGE = ROOT / "docs" / "reference" / "models.md"
# Family of timm → its smallest network, and another one if there is one of at most 130 M parameters.
FAMILIES = Path(__file__).with_name("zoo_families.json")
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
GIB = 6.0  # of memory that `fission` may use, with the network itself; more if …
COPIES = 4.0  # … this many times the network's weights are more
OF_CHECKS = 3  # The checks, which hold three fissioned networks and copies, may use this many times as much.
ALL_SECONDS = 300  # of processor time of a process: fission with three exits and with one, and the checks
BUDGET = 1.05  # multiply-accumulates over the network's
# What a row depends on: the method, and the measurement itself.
_SOURCES = (
    *("algorithm.py", "config.py", "ensemble.py", "losses.py", "network.py"),
    *("classifier", "grouping", "inference", "profiling", "pruning", "surgery"),
)
# … and of the method, what only rows by channels depend on.
_OF_CHANNELS = ("channel_flow.py", "channels.py", "coupling.py", "heads.py", "narrowing.py", "widths.py")
_Key = tuple[str, str, bool, str]
_OF_FISSION = ("create", "fission")  # phases; the others are checks


# --- networks ---------------------------------------------------------------------------------------


def networks(*, second: bool = False) -> list[Network]:
    """Return a network of each family of timm, and all classification models of torchvision."""
    families: dict[str, list[str]] = json.loads(FAMILIES.read_text("utf-8"))
    number = 1 if second else 0
    found = [
        Network("timm", family, names[number], second)
        for family, names in families.items()
        if number < len(names)
    ]
    if not second:
        from torchvision import models

        found += [Network("torchvision", name, name) for name in models.list_models(module=models)]
    return found


def source(grouping: Grouping) -> str:
    """Return a short hash of the source that the rows of a grouping depend on."""
    package = ROOT / "src" / "netfission"
    files = [path for name in _SOURCES for path in (package / name).rglob("*.py")]
    files += [package / name for name in _SOURCES if name.endswith(".py")]
    if grouping != "channels":
        files = [path for path in files if path.name not in _OF_CHANNELS]
    digest = hashlib.sha256()
    for path in sorted([*files, Path(__file__).with_name("zoo_checks.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


# --- processes --------------------------------------------------------------------------------------


def run_limited(
    network: Network,
    grouping: Grouping,
    *,
    gib: float = GIB,
    seconds: float = SECONDS,
    all_seconds: int = ALL_SECONDS,
) -> Row:
    """Measure a row in a process of its own; if it is ended, the row says in which phase and why."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["zoo_checks", "timm", "torchvision"])
    parent, child = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(child, network, grouping, seconds, all_seconds), daemon=True
    )
    process.start()
    child.close()
    phase, row, ended = "create", asdict(network) | {"grouping": grouping}, ""
    while phase != "end":
        try:
            if parent.poll(0.1):
                phase, row = parent.recv()
                continue
        except EOFError:
            process.join()
            ended = ended or _words(process.exitcode, all_seconds)
            break
        limit = max(gib, COPIES * row.get("weights_gib", 0.0)) * (1 if phase in _OF_FISSION else OF_CHECKS)
        if (peak_gib(process.pid or 0) or 0) > limit:
            ended = f"over {limit:.4g} GiB of memory"
            process.kill()
    process.join()
    if phase in _OF_FISSION and ended:
        row["error"] = ended
    elif ended:
        row["failed"][phase] = ended
    return row


def _words(exit_code: int | None, all_seconds: int) -> str:
    if exit_code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"over {all_seconds} s of processor time"
    return f"the process ended with exit status {exit_code}"


def _work(parent: Connection, network: Network, grouping: Grouping, seconds: float, all_seconds: int) -> None:
    """Measure a row, and send it before each phase and at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    resource.setrlimit(resource.RLIMIT_CPU, (all_seconds, all_seconds + 1))
    torch.set_num_threads(1)
    try:
        row = measure(network, grouping, lambda phase, row: parent.send((phase, row)), seconds)
    except Exception as error:  # the network cannot be created, or accepts no images
        row = asdict(network) | {"grouping": grouping, "error": f"{type(error).__name__}: {error}"}
    parent.send(("end", row))


# --- the file ---------------------------------------------------------------------------------------


class RowFile:
    """The rows of a file, which is written anew with each row."""

    def __init__(self, path: Path) -> None:
        """Read the rows, if the file exists."""
        self.path = path
        self.rows: dict[_Key, Row] = {}
        if path.exists():
            try:
                content = json.loads(path.read_text("utf-8"))
                self.rows = {_key(row): row for row in content["rows"]}
            except (KeyError, TypeError, ValueError) as error:
                raise invalid("out", "a file of this benchmark, or not exist", found=str(path)) from error
        elif not path.absolute().parent.is_dir():
            raise invalid("out", "a file in a folder that exists", found=str(path))

    def has(self, network: Network, grouping: Grouping, source: str) -> bool:
        """Return whether a row of this source is there."""
        row = self.rows.get(_key(asdict(network) | {"grouping": grouping}))
        return row is not None and row["source"] == source

    def add(self, row: Row) -> None:
        """Replace the older row, if there is one, and write the file."""
        self.rows[_key(row)] = row
        record = {
            "benchmark": "zoo",
            "exits": EXITS,
            "limits": {"seconds": SECONDS, "gib": GIB},
            "rows": [self.rows[key] for key in sorted(self.rows)],
            "environment": environment(),
        }
        write_whole(self.path, json.dumps(record, indent=1) + "\n")


def _key(row: Mapping[str, Any]) -> _Key:
    return row["library"], row["family"], row["second"], row["grouping"]


# --- as text ----------------------------------------------------------------------------------------


def is_sound(row: Row) -> bool:
    """Return whether a network went through, and every check."""
    return "error" not in row and not row["failed"]


def cause(error: str) -> str:
    """Return what messages about different networks have in common: without names, numbers and details.

    Example:
        >>> cause("exits must be at most 2, one per stage (blocks, norm), got 3; name more stages")
        'exits must be at most n, one per stage'
    """
    text = re.sub(r"\s*\([^()]*(\([^()]*\)[^()]*)*\)", "", error)
    text = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "n", re.sub(r"'[^']*'", "…", text))
    expected, got, found = text.partition(", got ")
    detail = re.split(r"; | with |, and | \(", found)[0]
    return f"{expected} (got {detail})" if got and detail != "n" and len(detail) < 40 else expected


def by_cause(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Return cause → networks, the most frequent first, of what was refused or failed a check."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "error" in row:
            found.setdefault(f"refused: {cause(row['error'])}", []).append(row["name"])
        for check, error in row.get("failed", {}).items():
            found.setdefault(f"{check}: {cause(error)}", []).append(row["name"])
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def sets(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Divide rows by library and, of timm, by whether it is the second network of a family."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        second = ", second network" if row["second"] else ", smallest network"
        title = "torchvision" if row["library"] == "torchvision" else f"timm{second}"
        found.setdefault(title, []).append(row)
    return found


def counts(rows: Sequence[Row]) -> list[list[str]]:
    """Return a table of how many networks go through, by set and grouping."""
    table = [["", "networks", "fissioned", "all checks pass", f"MACs ≤ {BUDGET}×"]]
    for title, of_set in sets(rows).items():
        for grouping in GROUPINGS:
            chosen = [row for row in of_set if row["grouping"] == grouping]
            within = [row for row in chosen if is_sound(row) and row["macs"] <= BUDGET]
            numbers = (
                len(chosen),
                sum("error" not in row for row in chosen),
                sum(map(is_sound, chosen)),
                len(within),
            )
            if chosen:
                table.append([f"{title}, by {grouping}", *map(str, numbers)])
    return table


def summary(rows: Sequence[Row]) -> str:
    """Return how many networks go through, and what the others failed at."""
    lines = [align_columns(counts(rows))]
    for title, of_set in sets(rows).items():
        for grouping in GROUPINGS:
            causes = by_cause(row for row in of_set if row["grouping"] == grouping)
            if causes:
                lines.append(f"\n{title}, by {grouping}:")
            lines += [f"  {len(names)} {reason}: {', '.join(names)}" for reason, names in causes.items()]
    return "\n".join(lines)


_INTRODUCTION = f"""---
hide: [navigation, toc]
---
# Image models

What `fission(model, exits={EXITS}, grouping=…, example_input=images)` makes of each family of timm and of
each classification model of torchvision, without further settings. `make zoo` measures it, and `make docs`
writes this page.

- The networks have random weights and 10 classes. Images are 128 × 128, or the smallest larger size that the
  network accepts.
- MACs and parameters are those of the whole network of {EXITS} exits, over those of the model. By weights,
  removed weights are not counted.
- The checks: a training step is finite. With one exit, the logits are the model's bit for bit. Each path
  computes what the model does with the weights of that path alone, within 1e-5. `deploy` changes logits by
  rounding only. A network that was saved and loaded gives the same logits.
- Columns without another name are by channels. *Restriction* and *deployed* are the largest differences that
  these checks found: of a path's features over the largest of them, and of logits over their spread.
- Seconds are the processor time of `fission`. It may use {SECONDS:.0f},
  and the process {GIB:g} GiB of memory, or {COPIES:g} times the network's weights if that is more.
- –: refused, or not measured. ✗: a check fails.
"""


def page(record: Mapping[str, Any] | None) -> str:
    """Return the page of the documentation."""
    if record is None:
        return f"{_INTRODUCTION}\nThere are no results yet.\n"
    rows: list[Row] = record["rows"]
    parts = [_INTRODUCTION, _markdown(counts(rows))]
    for title, of_set in sets(rows).items():
        networks: dict[str, dict[str, Row]] = {}
        for row in of_set:
            networks.setdefault(row["name"], {})[row["grouping"]] = row
        head = ["network", "MACs", "parameters", "MACs by weights", "by copies", "seconds", "restriction"]
        head += ["deployed", "stages", "repeated by each path (share of the model's MACs)"]
        lines = [_cells(name, by_grouping) for name, by_grouping in networks.items()]
        parts += [f"## {title}", _markdown([head, *lines])]
    refused: dict[str, list[str]] = {}
    for row in rows:
        if "error" in row:
            refused.setdefault(row["error"], []).append(f"{row['name']} by {row['grouping']}")
        for check, error in row.get("failed", {}).items():
            refused.setdefault(f"{check}: {error}", []).append(f"{row['name']} by {row['grouping']}")
    if refused:
        lines = [[", ".join(names), _escaped(shorten(error, 400))] for error, names in refused.items()]
        parts += ["## Refused, or failing a check", _markdown([["network", "reason"], *lines])]
    versions = ", ".join(f"{name} {number}" for name, number in record["environment"]["versions"].items())
    return "\n\n".join(part.rstrip("\n") for part in [*parts, f"Measured with {versions}."]) + "\n"


def _cells(name: str, by_grouping: Mapping[str, Row]) -> list[str]:
    row = by_grouping.get("channels", {})
    differences = [f"{row[key]:.0e}" if key in row else "–" for key in ("restriction", "deployed")]
    return [
        f"`{name}`",
        *(_ratio(row, key) for key in ("macs", "parameters")),
        _ratio(by_grouping.get("weights", {}), "macs_effective"),
        _ratio(by_grouping.get("copies", {}), "macs"),
        f"{row['seconds']:.1f}" if "seconds" in row else "–",
        *differences,
        ", ".join(row.get("stages", ["–"])),
        _escaped(_repeated_text(row)),
    ]


def _repeated_text(row: Row) -> str:
    """Return the layers that each path repeats, and their share of the model's MACs, by reason."""
    if "macs" not in row:
        return "–"
    found: dict[str, list[int]] = {}
    for entry in row["repeated"]:
        total = found.setdefault(cause(entry["reason"]), [0, 0])
        total[0] += entry["layers"]
        total[1] += entry["macs"]
    texts = [
        f"{count_noun(layers, 'layer')} ({percent(macs / row['model_macs'], 1)} %), as {reason}"
        for reason, (layers, macs) in found.items()
    ]
    return "; ".join(texts) or "nothing"


def _ratio(row: Row, key: str) -> str:
    """Return a ratio; a dash if the network was refused, and a cross if it failed a check."""
    if key not in row:
        return "–"
    return f"{row[key]:.2f}" if is_sound(row) else f"{row[key]:.2f} ✗"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *lines = table
    rule = ["---", *["---:"] * (len(head) - 1)] if head[0] == "" else ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def write_page(results: Path, path: Path) -> None:
    """Write the page of the documentation from a file of results."""
    write_whole(path, page(json.loads(results.read_text("utf-8")) if results.exists() else None))


# --- the command line -------------------------------------------------------------------------------


def run(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows that the file lacks, and print a summary."""
    flags = _flags(arguments)
    if flags.page:
        write_page(flags.out, PAGE)
        return
    file = RowFile(flags.out)
    versions = {grouping: source(grouping) for grouping in GROUPINGS}
    asked = split_names("groupings", flags.groupings, GROUPINGS)
    groupings = [grouping for grouping in GROUPINGS if grouping in asked]
    chosen = _chosen(networks(second=flags.second), flags.networks)
    with tqdm(total=len(chosen) * len(groupings), unit="row", file=sys.stderr) as bar:
        for grouping in groupings:
            for network in chosen:
                bar.set_description(f"{network.name} by {grouping}")
                if flags.again or not file.has(network, grouping, versions[grouping]):
                    file.add(run_limited(network, grouping) | {"source": versions[grouping]})
                bar.update()
    print(summary(list(file.rows.values())))
    old = sum(row["source"] != versions[row["grouping"]] for row in file.rows.values())
    if old:
        print(f"\n{count_noun(old, 'row')} of another version of the source")
    print(f"wrote {file.path}")


def _chosen(known: list[Network], names: str | None) -> list[Network]:
    """Return the networks with these names or of these families."""
    if names is None:
        return known
    asked = names.split(",")
    every = {text for network in known for text in (network.name, network.family)}
    for name in asked:
        if name not in every:
            expected = "names of families or networks of this benchmark"
            raise invalid("networks", expected, name, hint=did_you_mean(name, every))
    return [network for network in known if {network.name, network.family} & set(asked)]


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="zoo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", help="names of families or networks, with commas (default: all)")
    parser.add_argument("--groupings", default=",".join(GROUPINGS), help="default: %(default)s")
    parser.add_argument("--second", action="store_true", help="the second network of each family of timm")
    parser.add_argument("--again", action="store_true", help="measure rows of this source again, too")
    parser.add_argument("--page", action="store_true", help="write the page of the documentation alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to write (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return command(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
