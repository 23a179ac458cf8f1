"""Kill commands at random moments and damage the files they leave: what they end with must be the same bits.

Part `kills`: a command is killed (SIGKILL or SIGTERM) at a random moment, perhaps a second time when it goes
on, and then left to end. Its results must be those of a command that nothing disturbed.

Part `damage`: a random file of a run has a page of zeros, a flipped bit, or an end that is missing. A command
that reads it must refuse it in one line, fall back on a file before it, or give the same results.

Trials are numbered; each has a seed of its own, and goes on where the file of results ends.
Writes results/benchmark_torture.json.

    .venv/bin/python benchmarks/torture.py --kills 200 --damage 500
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netfission.cli import main as netfission
from netfission.runs.folder import environment
from netfission.utils.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_torture.json"
PAGE = 4096  # bytes
TIMEOUT_S = 300
HUNG = -999  # status of a process that did not end
SMALL = (
    *("--data", "digits", "--limit-per-class", "10", "--model", "wrn-10-1", "--exits", "2"),
    *("--sparsity", "0.5", "--epochs", "4", "--batch-size", "25", "--accelerator", "cpu"),
)
FINETUNE = (
    *("digits", "--limit-per-class", "10", "--model", "wrn-10-1", "--pretrained", "false"),
    *("--batch-size", "25", "--epochs", "2", "--ensemble-epochs", "2", "--accelerator", "cpu"),
)
GRID = """contenders: {single: , fission-channels: }
reference: single
scales: {small: }
settings: {data: digits, limit_per_class: 5, model: wrn-10-1, exits: 2, epochs: 2, batch_size: 25}
"""

# What depends on the clock or on where a command ran.
VOLATILE = {"seconds", "environment", "time", "times", "rounds", "checksum", "data"}


def digest(content: bytes) -> str:
    """Return a short hash."""
    return hashlib.sha256(content).hexdigest()[:16]


def steady(value: Any) -> Any:
    """Return what JSON holds without what depends on the clock."""
    if isinstance(value, dict):
        return {name: steady(item) for name, item in sorted(value.items()) if name not in VOLATILE}
    return [steady(item) for item in value] if isinstance(value, list) else value


def results_in(folder: Path, *names: str) -> dict[str, str]:
    """Return file → hash of what must be the same, of the files of some names in a folder."""
    found = {}
    for path in sorted(path for name in names for path in folder.rglob(name)):
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps(steady(json.loads(content))).encode()
        found[str(path.relative_to(folder))] = digest(content)
    return found


@dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
        flags: folder of a trial → the command; it writes into `out` there.
        results: of the folder.
        begins_with: name of the folder that a trial starts with, a copy of a finished run; empty for none.
        resumes: whether it takes `--resume` once `out` is a run's folder.
    """

    flags: Callable[[Path], Sequence[str]]
    results: Callable[[Path], dict[str, str]]
    begins_with: str = ""
    resumes: bool = False

    def again(self, folder: Path) -> list[str]:
        """Return the command that goes on."""
        more = ["--resume"] if self.resumes and (folder / "out" / "config.yaml").is_file() else []
        return [*self.flags(folder), *more]


TRAINED = ("model.safetensors", "calibration.json", "evaluation.json", "reliability.json", "config.json")
COMMANDS = {
    "train": Command(
        lambda folder: ["train", *SMALL, "--out", f"{folder}/out"],
        lambda folder: results_in(folder / "out", *TRAINED, "metrics.csv"),
        resumes=True,
    ),
    "finetune": Command(
        lambda folder: ["finetune", *FINETUNE, "--out", f"{folder}/out"],
        lambda folder: results_in(folder / "out", *TRAINED, "gain.json"),
    ),
    "reproduce": Command(
        lambda folder: ["reproduce", f"{folder}/grid.yaml", "--scale", "small", "--out", f"{folder}/out"],
        lambda folder: results_in(folder / "out" / "records", "*.json"),
    ),
    "evaluate": Command(
        lambda folder: ["evaluate", f"{folder}/run"],
        lambda folder: results_in(folder / "run", *TRAINED),
        begins_with="run",
    ),
    "cascade": Command(
        lambda folder: ["evaluate", f"{folder}/run", "--cascade", "--max-accuracy-drop", "5"],
        lambda folder: results_in(folder / "run", *TRAINED, "cascade.json"),
        begins_with="run",
    ),
    "export": Command(
        lambda folder: ["export", f"{folder}/run", "--out", f"{folder}/run/model.onnx"],
        lambda folder: results_in(folder / "run", *TRAINED, "model.onnx"),
        begins_with="run",
    ),
}


def prepare(command: Command, run: Path, folder: Path) -> None:
    """Fill the folder of a trial."""
    folder.mkdir()
    (folder / "grid.yaml").write_text(GRID)
    if command.begins_with:
        shutil.copytree(run, folder / command.begins_with)


def start(flags: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command as a process group of its own, whose errors go to a file."""
    with log.open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "netfission", *flags],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def finish(flags: Sequence[str], log: Path) -> tuple[int, float]:
    """Run a command to its end; return its status and seconds."""
    begun = time.perf_counter()
    return end(start(flags, log)), time.perf_counter() - begun


def interrupt(flags: Sequence[str], after: float, sent: signal.Signals, log: Path) -> int:
    """Run a command, send it a signal after some seconds, and return its status."""
    process = start(flags, log)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(after)
    with contextlib.suppress(ProcessLookupError):
        if sent is signal.SIGKILL:
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)
    return end(process)


def end(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process to end, and return its status; one that hangs is killed."""
    try:
        return process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return HUNG


def kill_trial(name: str, seed: int, undisturbed: tuple[dict[str, str], float], run: Path) -> dict[str, Any]:
    """Kill a command once or twice, let it end, and compare what it leaves."""
    chance = random.Random(f"{name} {seed}")
    command, (expected, seconds) = COMMANDS[name], undisturbed
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "trial"
        prepare(command, run, folder)
        log, kills = Path(place) / "log", []
        for _ in range(chance.choice([1, 1, 2])):
            after, sent = chance.uniform(0, seconds), chance.choice([signal.SIGKILL, signal.SIGTERM])
            status = interrupt(command.again(folder), after, sent, log)
            # A command that SIGTERM ends says so by 143; it may also have ended before.
            fits = status in ((0, -sent) if sent is signal.SIGKILL else (0, 128 + sent))
            kills.append({"signal": sent.name, "after_s": round(after, 3), "status": status, "fits": fits})
        status, _ = finish(command.again(folder), log)
        found = command.results(folder)
        left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.tmp"))
        text = log.read_text(errors="replace")
    differ = sorted(file for file in expected.keys() | found.keys() if expected.get(file) != found.get(file))
    good = status == 0 and not differ and not left and all(kill["fits"] for kill in kills)
    record: dict[str, Any] = {"command": name, "seed": seed, "kills": kills, "identical": good}
    if not good:
        record |= {"status": status, "differ": differ, "left": left, "said": text[-2000:]}
    return record


# --- damage -----------------------------------------------------------------------------------------

# What a finished run, and one that goes on, read again; their other files have no checksum.
OF_FINISHED = ("model.safetensors", "config.json", "config.yaml", "calibration.json", "data.json")
OF_UNFINISHED = ("config.yaml", "data.json", "checkpoints/*.ckpt")


def damaged(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Return a kind of damage, and damaged content."""
    kind = chance.choice(["page", "bit", "end"])
    place = chance.randrange(len(content))
    if kind == "end":
        return kind, content[:place]
    changed = bytearray(content)
    if kind == "bit":
        changed[place] ^= 1 << chance.randrange(8)
    else:
        first = place // PAGE * PAGE
        changed[first : first + PAGE] = bytes(len(changed[first : first + PAGE]))
    return kind, bytes(changed)


def call(*flags: str) -> tuple[int, str]:
    """Run a command in this process; return its status and what it says of errors."""
    said = io.StringIO()
    silent = contextlib.redirect_stdout(io.StringIO())
    with silent, contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("always")
        status = netfission(list(flags))
    return status, said.getvalue()


def read_finished(folder: Path) -> tuple[int, str, dict[str, str]]:
    """Predict and evaluate with a finished run."""
    image = folder.parent / "image.png"
    predictions = folder.parent / "predictions.csv"
    status, said = call("predict", str(folder), str(image), "--out", str(predictions))
    if status:
        return status, said, {}
    status, more = call("evaluate", str(folder))
    rows = predictions.read_text("utf-8").replace(str(folder.parent), "")
    return status, said + more, results_in(folder, *TRAINED) | {"predictions": digest(rows.encode())}


def read_unfinished(folder: Path) -> tuple[int, str, dict[str, str]]:
    """Go on with a run that was stopped."""
    status, said = call("train", *SMALL, "--out", str(folder), "--resume")
    return status, said, results_in(folder, *TRAINED) if not status else {}


Reader = Callable[[Path], tuple[int, str, dict[str, str]]]


def outcome(status: int, said: str, found: dict[str, str], expected: dict[str, str]) -> str:
    """Say what became of a damaged file."""
    lines = [line for line in said.splitlines() if line.startswith("netfission: ")]
    errors = [line for line in lines if not line.startswith("netfission: warning: ")]
    if status:
        return "refused" if len(errors) == 1 and "Traceback" not in said else "refused badly"
    if found != expected:
        return "taken silently"
    return "fell back" if len(lines) > len(errors) else "without effect"


def damage_trial(kind: str, seed: int, source: Path, expected: dict[str, str]) -> dict[str, Any]:
    """Damage one file of a copy of a run, and read it."""
    chance = random.Random(f"{kind} {seed}")
    reader, names = READERS[kind]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        shutil.copytree(source, folder)
        shutil.copy(source.parent / "image.png", folder.parent)
        file = chance.choice(sorted(path for name in names for path in folder.glob(name)))
        what, content = damaged(file.read_bytes(), chance)
        file.write_bytes(content)
        status, said, found = reader(folder)
    result = outcome(status, said, found, expected)
    record = {"run": kind, "seed": seed, "file": file.name, "damage": what, "outcome": result}
    return record | ({} if result in GOOD else {"status": status, "said": said[-2000:]})


READERS: dict[str, tuple[Reader, Sequence[str]]] = {
    "finished": (read_finished, OF_FINISHED),
    "unfinished": (read_unfinished, OF_UNFINISHED),
}
GOOD = ("refused", "fell back", "without effect")


# --- all trials -------------------------------------------------------------------------------------


def make_runs(place: Path) -> dict[str, Path]:
    """Train a run, and stop another one amid its training."""
    from PIL import Image

    runs = {"finished": place / "finished" / "run", "unfinished": place / "unfinished" / "run"}
    for run in runs.values():
        run.parent.mkdir()
        Image.linear_gradient("L").resize((8, 8)).save(run.parent / "image.png")
    status, said = call("train", *SMALL, "--out", str(runs["finished"]))
    assert status == 0, said
    shutil.copytree(runs["finished"], runs["unfinished"])
    return runs


def stopped(run: Path) -> None:
    """Train a run, and kill it after its third epoch, of which it has two checkpoints then."""
    shutil.rmtree(run)
    process = start(["train", *SMALL, "--out", str(run)], run.parent / "log")
    while process.poll() is None:
        metrics = run / "metrics.csv"
        if metrics.is_file() and len(metrics.read_text("utf-8").splitlines()) > 3:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.002)
    assert not (run / "model.safetensors").exists(), "it ended before it was killed"


def trials(
    part: str, number: int, kinds: Sequence[str], done: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, int]]:
    """Yield kind and seed of the trials of a part that are not done, the kinds in turn."""
    key = "command" if part == "kills" else "run"
    finished = {(trial[key], trial["seed"]) for trial in done}
    for seed in range(number):
        trial = kinds[seed % len(kinds)], seed
        if trial not in finished:
            yield trial


def main(flags: Sequence[str] | None = None) -> int:
    """Run the trials that are missing; return 1 if one of all was bad."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="number of trials that kill a command")
    parser.add_argument("--damage", type=int, default=500, help="number of trials that damage a file")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(flags)
    content: dict[str, Any] = json.loads(asked.out.read_text("utf-8")) if asked.out.is_file() else {}
    content = {"benchmark": "torture", "kills": [], "damage": []} | content
    content["command"] = "python benchmarks/torture.py"
    content.setdefault("environment", environment())  # of the first trials

    def keep(part: str, record: dict[str, Any]) -> None:
        content[part].append(record)
        write_whole(asked.out, json.dumps(content, indent=1) + "\n")
        print(json.dumps(record), flush=True)

    with tempfile.TemporaryDirectory() as place:
        runs = make_runs(Path(place))
        undisturbed: dict[str, tuple[dict[str, str], float]] = {}
        for name, seed in trials("kills", asked.kills, asked.commands, content["kills"]):
            if name not in undisturbed:
                undisturbed[name] = measure(name, runs["finished"], Path(place))
            keep("kills", kill_trial(name, seed, undisturbed[name], runs["finished"]))
        missing = list(trials("damage", asked.damage, list(READERS), content["damage"]))
        if missing:
            stopped(runs["unfinished"])
            expected = {kind: whole(READERS[kind][0], runs[kind]) for kind in READERS}
        for kind, seed in missing:
            keep("damage", damage_trial(kind, seed, runs[kind], expected[kind]))
    return summarise(content)


def measure(name: str, run: Path, place: Path) -> tuple[dict[str, str], float]:
    """Run a command that nothing disturbs; return its results and seconds."""
    folder = place / f"undisturbed-{name}"
    prepare(COMMANDS[name], run, folder)
    status, seconds = finish(COMMANDS[name].flags(folder), place / "log")
    assert status == 0, (place / "log").read_text("utf-8")
    return COMMANDS[name].results(folder), seconds


def whole(reader: Reader, run: Path) -> dict[str, str]:
    """Return the results of a run whose files are whole."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        shutil.copytree(run, folder)
        shutil.copy(run.parent / "image.png", folder.parent)
        status, said, found = reader(folder)
    assert status == 0, said
    return found


def summarise(content: dict[str, Any]) -> int:
    """Print how many trials were good; return 1 if one was not."""
    good = sum(trial["identical"] for trial in content["kills"])
    print(f"kills: {good} of {len(content['kills'])} ended in the same bits")
    outcomes = [trial["outcome"] for trial in content["damage"]]
    for result in sorted(set(outcomes)):
        print(f"damage: {outcomes.count(result)} of {len(outcomes)} {result}")
    return int(good < len(content["kills"]) or any(result not in GOOD for result in outcomes))


if __name__ == "__main__":
    sys.exit(main())
