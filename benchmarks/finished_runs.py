"""Measure something more on the networks of a grid: what `temperature.py` and `other_images.py` share."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from netfission.experiments.records import Record
from netfission.runs.folder import RunFolder, environment
from netfission.utils.files import write_whole
from netfission.utils.json_files import read_json


def measure_runs(
    folder: Path, out: Path, measure: Callable[[RunFolder], Mapping[str, Any]], **facts: Any
) -> None:
    """Measure the networks of a grid that are not in a file yet, and write it after each.

    Runs that failed, or whose weights are gone, are left out.

    Args:
        folder: output folder of `netfission reproduce`.
        out: the file, a JSON object with `networks`, `environment` and the facts.
        measure: what is measured of a run.
        facts: that hold for all networks.
    """
    done = json.loads(out.read_text("utf-8")) if out.is_file() else {"networks": []}
    known = {network["key"] for network in done["networks"]}
    for file in sorted((folder / "records").glob("*.json")):
        record = read_json(file, Record)
        assert record is not None
        run = RunFolder(folder / "runs" / record.key)
        if record.key in known or record.error is not None or not run.weights.is_file():
            continue
        of_run = {"contender": record.contender, "seed": record.seed, "key": record.key}
        done["networks"].append(of_run | dict(measure(run)))
        done |= facts | {"environment": environment()}
        write_whole(out, json.dumps(done, indent=1) + "\n")
        print(f"{record.contender}, seed {record.seed}", flush=True)
