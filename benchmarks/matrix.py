"""The whole test suite under other versions of Python and PyTorch, and in other surroundings.

Tests that are marked as thorough are run, too. A row of versions gets an environment of its own in
.matrix/, made with the constraints of the project but for what the row changes. It takes about 7 GB, and is
removed once the row is done unless --keep is given. A row of surroundings runs with the Python of this
script, by default all of them at once. Each row is written to results/benchmark_matrix.json as soon as it
is done, and is not run again for the same commit.

    .venv/bin/python benchmarks/matrix.py --rows torch-2.11,hash-seed
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netfission.utils.errors import check_choice, invalid
from netfission.utils.files import write_whole
from netfission.utils.text import align_columns

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "benchmark_matrix.json"
SHOWN = 20  # names of failed tests of a row
# What the project's constraints pin together with PyTorch.
_WITH_TORCH = re.compile(r"(torch|torchvision|triton|nvidia-|cuda-)")


@dataclass(frozen=True)
class Row:
    """One run of the suite.

    Attributes:
        python: version of Python that an environment is made with; None for the one that runs this script.
        requirements: in place of the project's constraints on the same packages.
        variables: of the environment of the tests.
        prefix: the command before that of the tests.
    """

    python: str | None = None
    requirements: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()


VERSIONS = {
    "torch-2.11": Row(python="3.11", requirements=("torch==2.11.*", "torchvision")),
    "python-3.12": Row(python="3.12"),
    "python-3.13": Row(python="3.13"),
}
SURROUNDINGS = {
    # Python would read the POSIX locale as UTF-8 by itself.
    "posix-locale": Row(variables={"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
    "time-zone": Row(variables={"TZ": "Pacific/Chatham"}),
    "hash-seed": Row(variables={"PYTHONHASHSEED": "4321"}),
    "reversed": Row(variables={"NETFISSION_REVERSED_TESTS": "1"}),
    "no-network": Row(
        prefix=("unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "-")
    ),
}
# All surroundings at once; one of them alone, by its name, shows which one a failed test does not bear.
TOGETHER = Row(
    variables={name: value for row in SURROUNDINGS.values() for name, value in row.variables.items()},
    prefix=[word for row in SURROUNDINGS.values() for word in row.prefix],
)
DEFAULT = VERSIONS | {"surroundings": TOGETHER}
ROWS = DEFAULT | SURROUNDINGS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows that are missing; return 1 if a test failed in one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = f"of {', '.join(ROWS)} (default: %(default)s)"
    parser.add_argument("--rows", default=",".join(DEFAULT), help=known)
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--processes", default="auto", help="that share the tests (default: one per core)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("tests", nargs="*", default=["tests"], help="of the suite (default: all)")
    flags = parser.parse_args(arguments)
    done = json.loads(flags.out.read_text("utf-8")) if flags.out.is_file() else {}
    commit = _output("git", "describe", "--always", "--abbrev=40", "--dirty")
    names = [check_choice("rows", name, ROWS) for name in flags.rows.split(",")]
    for name in names:
        if done.get(name, {}).get("commit") == commit and done[name]["tests"] == flags.tests:
            continue
        print(f"{name} …", flush=True)
        found = _run(name, ROWS[name], ["-n", flags.processes, *flags.tests], keep=flags.keep)
        if not commit.endswith("-dirty"):  # else it is not known what was tested
            done[name] = found | {"commit": commit, "tests": flags.tests}
            write_whole(flags.out, json.dumps(done, indent=1) + "\n")
        else:
            done[name] = found
    asked = {name: done[name] for name in names}
    print(table(asked))
    return int(any(row["failures"] or not row["passed"] for row in asked.values()))


def _run(name: str, row: Row, tests: Sequence[str], *, keep: bool) -> dict[str, Any]:
    folder = ROOT / ".matrix" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        python = Path(sys.executable) if row.python is None else _environment(folder / "venv", row)
        report = folder / "tests.xml"
        report.unlink(missing_ok=True)
        command = [*row.prefix, str(python), "-m", "pytest", "--dist", "worksteal", *tests]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "NETFISSION_THOROUGH": "1"} | dict(row.variables)
        with (folder / "tests.log").open("w") as log:
            command.append(f"--junitxml={report}")
            subprocess.run(
                command,
                cwd=ROOT,
                env=variables,
                stdout=log,
                stderr=log,
                check=False,
                preexec_fn=_interruptible,
            )
        if not report.is_file():
            raise RuntimeError(f"{name}: the tests did not run, see {log.name}")
        versions: dict[str, Any] = json.loads(_output(str(python), "-c", _VERSIONS))
        return versions | read_report(report.read_text(encoding="utf-8", errors="replace"))
    finally:
        if not keep:
            shutil.rmtree(folder / "venv", ignore_errors=True)


def _interruptible() -> None:
    """Let tests of Ctrl-C work in a job that a shell runs in the background, which ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


_VERSIONS = (
    "import json, platform, torch;"
    "print(json.dumps({'python': platform.python_version(), 'torch': torch.__version__}))"
)


def _environment(folder: Path, row: Row) -> Path:
    """Make an environment with the project and its development packages; return its Python."""
    python = folder / "bin" / "python"
    if python.is_file():
        return python
    found = shutil.which(f"python{row.python}")
    if found is None:
        raise invalid("rows", "those whose Python is on the path", found=f"no python{row.python}")
    constraints = folder.parent / "constraints.txt"
    pinned = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    changed = bool(row.requirements)
    constraints.write_text(
        "\n".join(pin for pin in pinned if not (changed and _WITH_TORCH.match(pin))) + "\n"
    )
    subprocess.run([found, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    subprocess.run([*install, *row.requirements, "--editable", f"{ROOT}[dev]"], check=True)
    return python


def read_report(text: str) -> dict[str, Any]:
    """Return the counts of a JUnit report, and the names of failed tests.

    Example:
        >>> read_report('<testsuites><testsuite tests="2" skipped="1" time="3.5"/></testsuites>')
        {'passed': 1, 'skipped': 1, 'failures': 0, 'failed': [], 'seconds': 3.5}
    """
    suite = ElementTree.fromstring(text).find("testsuite")
    assert suite is not None
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    return {
        "passed": tests - skipped - len(failed),
        "skipped": skipped,
        "failures": len(failed),
        "failed": failed[:SHOWN],
        "seconds": float(suite.get("time", 0)),
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows as an aligned table."""
    head = ["", "Python", "PyTorch", "passed", "skipped", "failed"]
    lines = [
        [name, row["python"], row["torch"], str(row["passed"]), str(row["skipped"]), str(row["failures"])]
        for name, row in rows.items()
    ]
    return align_columns([head, *lines])


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
