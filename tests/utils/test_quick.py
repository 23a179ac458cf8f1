"""A quick start and end of a command."""

import errno
import gc
import io
import os
import subprocess
import sys

import pytest

from netfission.utils.quick import end_process, without_collection


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, in which the compiler is not imported yet."""
    head = "import gc, sys\ngc.disable()\nimport torch\n"
    head += "from netfission.utils.quick import end_process, without_compiler\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_again_as_before(enabled):
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with without_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if before else gc.disable()


def test_timm_is_imported_without_the_compiler_which_works_afterwards():
    done = run(
        """
with without_compiler():
    import timm
print({"sympy", "torch._dynamo", "torch._inductor"} & set(sys.modules))
network = timm.create_model("resnet10t", num_classes=4).eval()
images = torch.rand(1, 3, 32, 32)
compiled = torch.compile(network, backend="eager")
print(torch.equal(compiled(images), network(images)), torch._dynamo.__file__ is not None)
"""
    )
    assert (done.stdout, done.returncode) == ("set()\nTrue True\n", 0), done.stderr


READ = [
    "from torch._dynamo.utils import counters",
    "from torch._dynamo.utils import is_compile_supported; print(is_compile_supported('cpu'))",
    "import torch._dynamo; torch._dynamo.config.suppress_errors; from torch._dynamo import eval_frame",
]


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="copies an interpreter, as importing torch takes long")
def test_what_else_is_read_of_the_compiler_is_the_real_thing_and_one_that_is_imported_stays():
    code = f"""
import os
for read in {READ!r}:
    copy = os.fork()
    if not copy:
        with without_compiler():
            exec(read)
        print(type(sys.modules["torch._dynamo"]).__name__, flush=True)
        os._exit(0)
    os.waitpid(copy, 0)
import torch._dynamo
with without_compiler():
    from torch._dynamo.utils import counters
print(counters is torch._dynamo.utils.counters, torch.compiler.disable.__module__)
"""
    done = run(code)
    printed = ["module", "True", "module", "module", "True torch.compiler"]
    assert done.stdout.splitlines() == printed, done.stderr


def test_metrics_are_imported_without_what_others_need_which_is_there_for_all_else():
    code = """
from netfission.utils.quick import lean_metrics
lean_metrics()
import torchmetrics
print({"matplotlib", "scipy", "torchvision", "transformers"} & set(sys.modules))
print(torchmetrics.functional.accuracy(torch.ones(1), torch.ones(1), task="binary").item())
from lightning_utilities.core.imports import RequirementCache, package_available
print(bool(RequirementCache("scipy>=1")), package_available("scipy"))
"""
    done = run(code)
    assert (done.stdout, done.returncode) == ("set()\n1.0\nTrue True\n", 0), done.stderr


def test_the_process_ends_at_once_with_all_that_was_written():
    code = """
import atexit
atexit.register(print, "torn down")
print("out", end="")
print("err", end="", file=sys.stderr)
end_process(3)
"""
    done = run(code)
    assert (done.stdout, done.stderr, done.returncode) == ("out", "err", 3)


class Full(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("full", "status", "ended", "said"),
    [
        ("stdout", 0, 1, "netfission: standard output cannot be written (No space left on device)\n"),
        ("stdout", 2, 2, ""),  # the command has said why
        ("stderr", 0, 0, ""),
        ("stderr", 3, 3, ""),
    ],
)
def test_a_full_stream_ends_in_one_line_and_a_status_that_is_true(monkeypatch, full, status, ended, said):
    ends, written = [], io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(os, "_exit", ends.append)
        patch.setattr(sys, "stderr", written)
        patch.setattr(sys, full, Full())
        end_process(status)
    assert (ends, written.getvalue()) == ([ended], said)
