"""Whether marks of out-of-distribution images and tests of drift keep to their rates on real logits.

The logits are those of `guarantees.py`, with the same options. Calibration images and batches are drawn from
the population of test images at random, with replacement, so that the share that is marked falsely is known
exactly, not estimated. Batches are of the same distribution, so that every drift that is found is false.

Writes results/benchmark_false_alarms.json.

    .venv/bin/python benchmarks/false_alarms.py --data DATA --draws 1000
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import torch
from torch import Tensor

from guarantees import DELTA, SIZES, arguments, broken, read_or_make_logits
from netfission.evaluation.drift import drift_p_value
from netfission.evaluation.p_values import DEFAULT_DETECTOR, Detector, DetectorScore, detector_scores
from netfission.runs.folder import environment

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_false_alarms.json"
RATE = 0.05
BATCHES = (20, 200)  # images tested for drift at once


def rows_of(scores: dict[str, Tensor], n: int, draws: int) -> Iterator[dict[str, Any]]:
    """Measure false alarms of every detector, and of the test of drift, with n calibration images."""
    generator = torch.Generator().manual_seed(n)
    for name, values in scores.items():
        ordered = values.sort().values
        for delta in (None, DELTA):
            rates = []
            for _ in range(draws):
                sample = values[torch.randint(len(values), (n,), generator=generator)]
                detector = Detector.from_scores(
                    cast(DetectorScore, name), sample, accept_false_alarms=RATE, delta=delta
                )
                unmarked = int(torch.searchsorted(ordered, detector.alarm_above, right=True))
                rates.append(1 - unmarked / len(values))
            yield {
                "n": n,
                "detector": name,
                "delta": delta,
                "accepted": RATE,
                "rate_mean": mean(rates),
                "rate_standard_error": stdev(rates) / len(rates) ** 0.5,
                "above": broken(sum(rate > RATE for rate in rates), draws),
            }
    values = scores[DEFAULT_DETECTOR]
    for batch in BATCHES:
        found = 0
        for _ in range(draws):
            rows = torch.randint(len(values), (n + batch,), generator=generator)
            found += drift_p_value(values[rows[n:]], values[rows[:n]]) <= RATE
        yield {"n": n, "drift": {"images": batch, "level": RATE, "found": broken(found, draws)}}


def main(flags: Sequence[str] | None = None) -> None:
    """Measure all data sets."""
    chosen = arguments(flags, __doc__, RESULTS)
    sets = []
    for name, (logits, labels) in read_or_make_logits(chosen.data, chosen.logits).items():
        scores = detector_scores(logits, average="logits")
        rows = [row for n in SIZES for row in rows_of(scores, n, chosen.draws)]
        print("\n".join(f"{name} {json.dumps(row)}" for row in rows), flush=True)
        accuracy = (logits.mean(dim=1).argmax(dim=1) == labels).double().mean().item()
        sets.append({"data": name, "images": len(labels), "accuracy": accuracy, "rows": rows})
    record = {
        "benchmark": "false alarms",
        "draws": chosen.draws,
        "data": sets,
        "command": f"python benchmarks/false_alarms.py --data DATA --draws {chosen.draws}",
        "environment": environment(),
    }
    chosen.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()
