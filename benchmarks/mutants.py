"""Change the code of the method a little, and see whether a test fails.

A mutant is one small change: another comparison or operator, `and` for `or`, a number one higher, a condition
turned round, a statement left out, None returned, arguments swapped. All of them are put in an order that
depends on a seed and on what each changes, not on the lines around it; the sample is the first of them. On
each, the tests run that reach its line, the nearest and shortest first, until one fails. What no test kills
is listed: a person writes a test, or a `reason` into the file of results why it changes nothing that matters.
Mutants that were killed, or have a reason, are not run again.

The package is changed in a copy in a temporary folder, never in the working tree. Which test reaches which
line is measured once, and kept in .mutants/ until the code or the tests change.

No ready tool fits: cosmic-ray changes the working tree and runs all tests for each mutant, in a new process
that has to import PyTorch; mutmut takes no sample, knows the tests of a function, not of a line, leaves
functions with decorators out, and adds a frame to each call, which a warning's place shows.

Writes results/benchmark_mutants.json.

    .venv/bin/python benchmarks/mutants.py --sample 260
"""

import argparse
import ast
import compileall
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netfission.utils.files import write_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "benchmark_mutants.json"
KEPT = ROOT / ".mutants" / "reached.json"
SOURCES = ("pruning", "grouping", "surgery", "losses.py", "ensemble.py", "inference", "methods")
# Those of the packages above, and the ones that use them most directly.
TESTS = (
    *("tests/pruning", "tests/grouping", "tests/surgery", "tests/inference", "tests/methods", "tests/tasks"),
    *("tests/test_losses.py", "tests/test_ensemble.py", "tests/test_gradients.py"),
    *("tests/test_algorithm.py", "tests/test_network.py", "tests/test_errors.py"),
)
# Imported once, before each mutant gets a process of its own.
HEAVY = ("pytest", "torch", "torchvision", "timm", "lightning", "torchmetrics", "sklearn")
LIMIT_S = 7200  # that measuring may take
SPARE_S = 60  # that the tests of a mutant may take beyond three times what they took without it

# --- mutants ------------------------------------------------------------------------------------------

COMPARISONS: Mapping[type, type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: Mapping[type, type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        file: below src/netfission.
        scope: qualified name of the function or class; empty at the top of the file.
        operator: kind of the change.
        before, after: source text.
        line: first line of what changes.
        start, end: bytes of the file that are replaced.
        nth: among those of the scope that read the same.
    """

    file: str
    scope: str
    operator: str
    before: str
    after: str
    line: int
    start: int
    end: int
    nth: int = 0

    @property
    def key(self) -> str:
        """What tells it from others, whatever lines stand before it."""
        return f"{self.file} {self.scope} {self.operator} {self.nth}: {self.before} → {self.after}"

    def apply(self, source: bytes) -> bytes:
        """Return the changed file."""
        return source[: self.start] + self.after.encode() + source[self.end :]


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield the kind of a change and what stands in place of the node."""
    new: Any = deepcopy(node)
    match node:
        case ast.Compare(ops=[operator, *_]):
            new.ops[0] = COMPARISONS[type(operator)]()
            yield "comparison", new
        case ast.BinOp(op=operator):
            new.op = ARITHMETIC[type(operator)]() if type(operator) in ARITHMETIC else ast.Add()
            yield "arithmetic", new
        case ast.AugAssign(op=operator):
            new.op = ARITHMETIC[type(operator)]() if type(operator) in ARITHMETIC else ast.Add()
            yield "arithmetic", new
            yield "statement", ast.Pass()
        case ast.BoolOp(op=boolean):
            new.op = ast.Or() if isinstance(boolean, ast.And) else ast.And()
            yield "boolean", new
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "unary", operand
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant", ast.Constant(value + 1)
            yield "constant", ast.Constant(value - 1)
        case ast.Call(func=ast.Name(id=name)) if name in OPPOSITES:
            new.func.id = OPPOSITES[name]
            yield "opposite", new
        case ast.Call(func=ast.Attribute(attr=name)) if name in OPPOSITES:
            new.func.attr = OPPOSITES[name]
            yield "opposite", new
        case ast.Call(args=[first, second, *_]) if not any(
            isinstance(argument, ast.Starred) for argument in (first, second)
        ) and ast.dump(first) != ast.dump(second):
            new.args[:2] = new.args[1::-1]
            yield "arguments", new
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Continue() | ast.Break():
            yield "statement", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement", ast.Pass()
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield "return", ast.Return(ast.Constant(None))


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def conditions(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the conditions of a node that are turned round; not those that another change turns round."""
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        tests = [node.test]
    elif isinstance(node, ast.comprehension):
        tests = node.ifs
    else:
        return
    yield from (test for test in tests if not isinstance(test, ast.UnaryOp | ast.Constant))


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """Return all mutants of a file.

    Example:
        >>> [mutant.after for mutant in mutants_of("a.py", b"x = a < 2")]
        ['(a <= 2)', '(3)', '(1)']
    """
    starts = [0]
    for row in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))
    seen: dict[str, int] = {}
    found = []

    def add(scope: str, operator: str, node: ast.expr | ast.stmt, new: ast.AST) -> None:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        text = ast.unparse(new)
        after = f"({text})" if isinstance(node, ast.expr) else text
        mutant = Mutant(file, scope, operator, source[start:end].decode(), after, node.lineno, start, end)
        nth = seen[mutant.key] = seen.get(mutant.key, -1) + 1
        found.append(Mutant(**(mutant.__dict__ | {"nth": nth})))

    def visit(node: ast.AST, scope: str) -> None:
        if isinstance(node, ast.expr | ast.stmt):
            for operator, new in changes(node):
                add(scope, operator, node, new)
        for test in conditions(node):
            add(scope, "condition", test, ast.UnaryOp(ast.Not(), test))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = f"{scope}.{node.name}".lstrip(".")
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                # The places of what is in an f-string are not known to Python 3.11.
                if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                    visit(child, scope)

    visit(ast.parse(source), "")
    return found


def sample(mutants: Sequence[Mutant], number: int, seed: int) -> list[Mutant]:
    """Return the first mutants in an order by chance, to which a larger sample adds."""
    return sorted(mutants, key=lambda mutant: _digest(f"{seed} {mutant.key}".encode()))[:number]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# --- tests --------------------------------------------------------------------------------------------


class Session:
    """A pytest plugin: the tests run in the order asked for; keeps the first that fails, and times.

    Attributes:
        order: test → place; a test of none comes last.
        failed: name of the first test that failed, or of the file that could not be read.
        seconds: test that passed → how long it took with its fixtures.
        coverage: a measurement, which is told of each test.
    """

    def __init__(self, order: Sequence[str], coverage: Any = None) -> None:
        self.order = {name: place for place, name in enumerate(order)}
        self.failed = ""
        self.seconds: dict[str, float] = {}
        self.coverage = coverage

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.order.get(item.nodeid, len(self.order)))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or str(report.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.coverage:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or str(report.nodeid)
            self.seconds.pop(report.nodeid, None)
        elif (report.when == "setup" and report.passed) or report.nodeid in self.seconds:
            seconds = self.seconds.get(report.nodeid, 0) + report.duration
            self.seconds[report.nodeid] = seconds


def in_process(work: Callable[[], Any], limit_s: float, log: Path) -> tuple[str, Any]:
    """Do some work in a copy of this process; return how it ended and what it returns.

    Returns:
        "done" and the result, which JSON can hold; or "crash" (by a signal), "timeout" or "error", and None.
    """
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.json"
        process = os.fork()
        if not process:
            status = 1
            try:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                with log.open("w") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                answer.write_text(json.dumps(work()))
                status = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                _kill_group(process)  # what it has started
                if status == 0:
                    return "done", json.loads(answer.read_text("utf-8"))
                return "crash" if os.WIFSIGNALED(status) else "error", None
            time.sleep(0.02)
        _kill_group(process)
        os.waitpid(process, 0)
        return "timeout", None


def _kill_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def run_tests(package: Path, tests: Sequence[str], coverage: Any = None) -> tuple[int, Session]:
    """Run tests on the package in a folder; return pytest's status and what became of the tests."""
    import pytest

    sys.path.insert(0, str(package))
    os.environ |= {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.partition(".")[0] == "netfission"]:
        del sys.modules[name]
    session = Session(tests, coverage)
    stop = [] if coverage else ["-x"]
    options = ["-p", "no:cacheprovider", "--rootdir", str(ROOT), "--tb", "line", *stop]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported before
    return int(pytest.main([*options, *tests], plugins=[session])), session


def measure(package: Path, tests: Sequence[str]) -> dict[str, Any]:
    """Return, of each test that passes, its seconds, and the lines that it reaches by file.

    Lines that run when their file is imported are reached by no test.
    """
    coverage = importlib.import_module("coverage")
    measured = coverage.Coverage(data_file=None, source=[str(package / "netfission")])
    measured.start()
    _, session = run_tests(package, tests, measured)
    measured.stop()
    data = measured.get_data()
    found: dict[str, Any] = {
        name: {"seconds": round(seconds, 3), "lines": {}} for name, seconds in session.seconds.items()
    }
    for path in data.measured_files():
        file = Path(path).relative_to(package / "netfission").as_posix()
        for line, names in data.contexts_by_lineno(path).items():
            for name in names:
                if name in found:
                    found[name]["lines"].setdefault(file, []).append(line)
    return found


def tests_of(mutant: Mutant, reached: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return names and seconds of the tests that reach a mutant: the nearest and shortest first.

    Those of a line that no test is known for, such as one amid a statement, are those of the next line above;
    of one that runs on import, all that reach its file.
    """
    lines = {name: of["lines"].get(mutant.file, []) for name, of in reached.items()}
    above = [line for of_test in lines.values() for line in of_test if line <= mutant.line]
    line = max(above, default=None)
    near = f"tests/{mutant.file.removesuffix('.py').split('/')[0]}"
    stem = f"test_{Path(mutant.file).stem}.py"

    chosen = [name for name, of_test in lines.items() if line in of_test or (line is None and of_test)]
    turns: dict[str, int] = {}
    keys = {}
    for name in sorted(chosen, key=lambda name: float(reached[name]["seconds"])):
        turn = turns[_file(name)] = turns.get(_file(name), 0) + 1
        keys[name] = stem not in name, not name.startswith(near), turn, reached[name]["seconds"]
    return [(name, reached[name]["seconds"]) for name in sorted(chosen, key=keys.__getitem__)]


def try_mutant(mutant: Mutant, package: Path, reached: Mapping[str, Any], budget_s: float) -> dict[str, Any]:
    """Run the tests of a mutant until one fails.

    Returns:
        Its record: `outcome` is killed, survived, timeout, crash, or error if the tests could not run.
    """
    chosen: list[str] = []
    seconds = 0.0
    tests = tests_of(mutant, reached)
    for name, takes in tests:
        if chosen and seconds + takes > budget_s:
            break
        chosen.append(name)
        seconds += takes
    record = {
        "file": mutant.file,
        "line": mutant.line,
        "scope": mutant.scope,
        "operator": mutant.operator,
        "before": mutant.before,
        "after": mutant.after,
        "key": _digest(mutant.key.encode()),
    }
    if not chosen:
        return record | {"outcome": "survived", "tests": 0, "left": 0}
    path = package / "netfission" / mutant.file
    source = path.read_bytes()
    path.write_bytes(mutant.apply(source))
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()

    def work() -> list[Any]:
        status, session = run_tests(package, chosen)
        return [status, session.failed, len(session.seconds)]

    try:
        end, answer = in_process(work, 3 * seconds + SPARE_S, ROOT / ".mutants" / "tests.log")
    finally:
        path.write_bytes(source)
    if answer is None:
        return record | {"outcome": end, "tests": len(chosen)}
    status, failed, passed = answer
    if failed:
        return record | {"outcome": "killed", "by": failed}
    outcome = "survived" if status == 0 else "error"
    return record | {"outcome": outcome, "tests": passed, "left": len(tests) - len(chosen)}


# --- all mutants --------------------------------------------------------------------------------------

DEAD = ("killed", "timeout", "crash")


def all_mutants(sources: Sequence[str]) -> list[Mutant]:
    """Return the mutants of files and packages below src/netfission."""
    top = ROOT / "src" / "netfission"
    files = [path for name in sources for path in sorted((top / name).rglob("*.py")) or [top / name]]
    return [
        mutant for path in files for mutant in mutants_of(path.relative_to(top).as_posix(), path.read_bytes())
    ]


def reached_lines(package: Path, tests: Sequence[str]) -> dict[str, Any]:
    """Return what `measure` does of all tests; of those whose files have not changed, from a file."""
    files = [file for name in tests for file in sorted((ROOT / name).rglob("test_*.py")) or [ROOT / name]]
    states = {file.relative_to(ROOT).as_posix(): _digest(file.read_bytes()) for file in files}
    state = code_state()
    kept: dict[str, Any] = json.loads(KEPT.read_text("utf-8")) if KEPT.is_file() else {}
    if kept.get("state") != state:
        kept = {"state": state, "files": {}}
    missing = [name for name, digest in states.items() if kept["files"].get(name, {}).get("state") != digest]
    if missing:
        print(f"measuring which lines {len(missing)} files of tests reach …", flush=True)
        log = KEPT.with_name("measure.log")
        end, found = in_process(lambda: measure(package, missing), LIMIT_S, log)
        if end != "done":
            raise RuntimeError(f"the tests did not run, see {log}")
        for name in missing:
            kept["files"][name] = {"state": states[name]}
            kept["files"][name]["tests"] = {test: of for test, of in found.items() if _file(test) == name}
        write_whole(KEPT, json.dumps(kept))
    return {test: of for name in states for test, of in kept["files"][name]["tests"].items()}


def code_state() -> str:
    """Return a digest of what all tests depend on."""
    code = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/conftest.py")])
    return _digest(b"".join(path.read_bytes() for path in code))


def _file(test: str) -> str:
    return test.partition("::")[0]


def main(flags: Sequence[str] | None = None) -> int:
    """Try the mutants that are missing; return 1 if one survives without a reason."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=260, help="number of mutants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), help="below src/netfission")
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument(
        "--budget-s", type=float, default=120, help="seconds of tests for a mutant (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(flags)
    content: dict[str, Any] = json.loads(asked.out.read_text("utf-8")) if asked.out.is_file() else {}
    content = {"benchmark": "mutants", "command": "python benchmarks/mutants.py", "mutants": []} | content
    records = {record["key"]: record for record in content["mutants"]}
    population = all_mutants(asked.sources)
    drawn = sample(population, asked.sample, asked.seed)
    content |= {"seed": asked.seed, "population": len(population)}
    KEPT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        package = Path(place)
        shutil.copytree(
            ROOT / "src" / "netfission", package / "netfission", ignore=shutil.ignore_patterns("__pycache__")
        )
        compileall.compile_dir(package, quiet=2)
        for name in HEAVY:
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(name)
        reached = reached_lines(package, asked.tests)
        for mutant in drawn:
            old = records.get(_digest(mutant.key.encode()), {"outcome": "missing"})
            if old["outcome"] in DEAD or old.get("reason"):
                continue
            record = try_mutant(mutant, package, reached, asked.budget_s)
            records[record["key"]] = record
            content["mutants"] = [
                records[key] for one in drawn if (key := _digest(one.key.encode())) in records
            ]
            write_whole(asked.out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            print(f"{record['outcome']}: {mutant.key}", flush=True)
    return summarise(content["mutants"])


def summarise(records: Sequence[Mapping[str, Any]]) -> int:
    """Print the numbers and the survivors without a reason; return 1 if there are any, or errors."""
    dead = sum(record["outcome"] in DEAD for record in records)
    harmless = sum("reason" in record for record in records)
    open_ = [record for record in records if record["outcome"] not in DEAD and "reason" not in record]
    print(f"{dead} of {len(records)} killed, {harmless} others change nothing that matters")
    for record in open_:
        print(
            f"{record['outcome']}: {record['file']}:{record['line']} {record['before']} → {record['after']}"
        )
    return int(bool(open_))


if __name__ == "__main__":
    sys.exit(main())
