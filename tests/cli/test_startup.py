"""What the command imports, and when."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

import netfission as nf
from netfission.cli import COMMANDS
from netfission.models import create_model

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
HEAVY = {
    "PIL",
    "datasets",
    "huggingface_hub",
    "lightning",
    "matplotlib",
    "numpy",
    "timm",
    "torch",
    "torchvision",
}


def names(requirements: list[str]) -> set[str]:
    """The modules that requirements are imported by."""
    packages = (re.match(r"[\w.-]+", requirement)[0] for requirement in requirements)
    return {MODULES.get(package, package.replace("-", "_")) for package in packages}


@cache
def imported() -> set[str]:
    """The top-level modules that the package imports anywhere, but for its own and Python's."""
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    return found - {"netfission"} - set(sys.stdlib_module_names)


HARD = names(PROJECT["dependencies"])
HIDE = """
import sys

class Hidden:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {hidden!r}
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hidden, sys.meta_path)
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_with_hard_dependencies(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds none of the package's imports but its hard dependencies."""
    return run(HIDE.replace("{hidden!r}", repr(imported() - HARD)) + code, *arguments)


@pytest.mark.parametrize(("flag", "status", "lines"), [("--help", 0, 0), ("--bogus", 2, 1)])
def test_help_and_bad_flags_import_neither_torch_nor_what_else_is_slow(flag, status, lines):
    code = f"""
import contextlib, io, sys
from netfission.cli import main
for command in ["", *sys.argv[2:]]:
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            status = main([*command.split(), sys.argv[1]])
        except SystemExit as end:
            status = end.code
    print(command, status, len(errors.getvalue().splitlines()), sorted({HEAVY!r} & set(sys.modules)))
"""
    done = run(code, flag, *COMMANDS)
    assert done.stdout.splitlines() == [f"{command} {status} {lines} []" for command in ("", *COMMANDS)]


def test_help_takes_little_time():
    code = """
import resource, sys
from netfission.cli import main
try:
    main(["--help"])
except SystemExit:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(usage.ru_utime + usage.ru_stime)
"""
    assert min(float(run(code).stdout.splitlines()[-1]) for _ in range(3)) < 0.3


def test_every_import_is_declared():
    optional = PROJECT["optional-dependencies"]
    extras = set().union(
        *(names(optional[extra]) for extra in optional if extra not in ("dev", "docs", "peers"))
    )
    assert imported() - HARD - extras - {"imagecorruptions"} == set()


def test_inference_needs_the_hard_dependencies_alone(finished_run, tmp_path):
    code = """
import sys
import torch
import netfission as nf
from netfission.cli import main
from netfission.models import create_model

images = torch.rand(2, 3, 16, 16)
for grouping in ("weights", "channels"):
    network = nf.fission(create_model("wrn-10-1", 4), exits=2, grouping=grouping, example_input=images)
    assert network(images).shape == (2, 2, 4)
classifier = nf.Classifier.from_pretrained(sys.argv[1])
pixels = torch.zeros(1, *classifier.spec.shape, dtype=torch.uint8)
assert len(classifier.predict(pixels).classes) == 1
from PIL import Image
Image.new("L", (8, 8)).save(sys.argv[2])
quick = ["--rounds", "1", "--batch-sizes", "[1]"]
sys.exit(main(["predict", *sys.argv[1:]]) or main(["cost", sys.argv[1], *quick]))
"""
    done = run_with_hard_dependencies(code, finished_run, tmp_path / "image.png")
    assert (done.returncode, done.stderr) == (0, "")


def test_predict_imports_no_more_than_it_needs(tmp_path):
    """A timm model marks functions for the compiler, whose import takes as long as that of PyTorch."""
    images = torch.rand(2, 3, 32, 32)
    model = create_model("resnet10t", 4)
    network = nf.fission(model, exits=2, grouping="channels", example_input=images)
    nf.Classifier.from_network(
        network, model="resnet10t", classes=list("abcd"), shape=(3, 32, 32), mean=[0.5] * 3, std=[0.2] * 3
    ).save_pretrained(tmp_path / "model")
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    code = """
import sys
from netfission.cli import main
status = main(["predict", *sys.argv[1:]])
heavy = {"datasets", "lightning", "matplotlib", "pandas", "scipy", "sklearn", "sympy", "tensorboard"}
print(status, sorted((heavy | {"torch._dynamo", "torch._inductor", "torchmetrics"}) & set(sys.modules)))
"""
    done = run(code, tmp_path / "model", tmp_path / "image.png")
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


MODELS = {
    "resnet18": ("timm", "models"),
    "torchvision/resnet18": ("torchvision", "models"),
    "hf/google/vit-base-patch16-224": ("transformers", "hf"),
    "smp/unet/resnet18": ("segmentation_models_pytorch", "segmentation"),
}
COMMAND_EXTRAS = {
    "train": "train",
    "compare": "train",
    "demo": "train",
    "reproduce grouping": "train",
    "calibrate RUN": "train",
    "evaluate RUN": "train",
    "report RUN": "report",
    "export RUN": "export",
    "serve RUN": "serve",
}


@pytest.fixture(scope="module")
def outcomes(finished_run, tmp_path_factory) -> dict[str, list]:
    """The status and the errors of commands that one fresh interpreter without any extra runs in a folder."""
    code = """
import contextlib, io, json, os
from netfission.cli import main
os.chdir(sys.argv[1])
outcomes = {}
for command in sys.argv[3:]:
    words = [sys.argv[2] if word == "RUN" else word for word in command.split()]
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(words)
    outcomes[command] = [status, errors.getvalue()]
print(json.dumps(outcomes))
"""
    commands = [*COMMAND_EXTRAS, *(f"cost {name}" for name in MODELS)]
    done = run_with_hard_dependencies(code, tmp_path_factory.mktemp("bare"), finished_run, *commands)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_a_package_that_is_missing_names_the_extra(name, outcomes):
    package, extra = MODELS[name]
    hint = f"install it by pip install 'netfission[{extra}]'"
    assert outcomes[f"cost {name}"] == [2, f"netfission: model '{name}' needs {package}; {hint}\n"]


@pytest.mark.parametrize("command", COMMAND_EXTRAS)
def test_a_command_whose_extra_is_missing_says_what_to_install(command, outcomes):
    status, error = outcomes[command]
    assert status == 2
    extra = COMMAND_EXTRAS[command]
    assert re.fullmatch(rf"netfission: .+ needs \w+; .*'netfission\[{extra}\]'\n", error)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_an_extra_that_exists(command):
    assert COMMANDS[command] in PROJECT["optional-dependencies"]


# What extensions in C do with an interruption amid their import, and Python in a finaliser.
CONVERTED = """
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                raise ImportError("a bad install")
"""
LOST = """
            class Finalised:
                def __del__(self):
                    os.kill(os.getpid(), signal.SIGINT)

            Finalised()
            import time
            time.sleep(10)
"""


@pytest.mark.parametrize(
    ("interrupt", "status", "module"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "numpy._core.numeric"),
        ("exec('raise KeyboardInterrupt')", 130, "torch"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "torch"),
        (CONVERTED, 143, "numpy"),
        (LOST, 130, "numpy"),
    ],
)
def test_an_interruption_while_modules_are_imported_is_one_line(interrupt, status, module):
    code = f"""
import os, signal, sys
from netfission.cli import run_process

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            sys.meta_path.remove(self)
            {interrupt}

sys.meta_path.insert(0, Interrupt())
run_process()
"""
    done = run(code, "train")
    assert (done.returncode, done.stderr) == (status, "netfission: stopped; the same command starts over\n")


def test_an_interruption_after_the_work_is_ignored():
    code = """
import atexit, os, signal
from netfission.cli import run_process
atexit.register(os.kill, os.getpid(), signal.SIGINT)
run_process()
"""
    done = run(code, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("netfission ")


def test_a_command_ends_with_its_status_and_what_it_left_for_the_end_but_without_teardown():
    code = """
import atexit
import netfission.cli
atexit.register(print, "torn down")

def main():
    atexit.register(print, "left for the end")
    return 3

netfission.cli.main = main
netfission.cli.run_process()
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (3, "left for the end\n", "")


def test_closed_streams_are_as_those_that_nobody_reads():
    code = """
import os, stat, sys
import netfission.cli

def work(settings):
    print(sys.stdout.isatty(), sys.stderr.isatty())
    print("nothing", file=sys.stderr)
    null = os.stat(os.devnull).st_rdev
    raise RuntimeError if any(os.fstat(number).st_rdev != null for number in range(3)) else SystemExit(7)

netfission.cli._overview = work
netfission.cli.run_process()
"""
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code], check=False)
    assert done.returncode == 7
