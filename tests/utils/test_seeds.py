"""Seeds of PyTorch's global generators."""

import ast
from pathlib import Path

import pytest
import torch

import netfission
from netfission.utils.seeds import seeded


def test_only_the_cpu_is_seeded_and_its_state_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_seed: int) -> None:
        raise AssertionError("an accelerator was seeded")

    for device in (torch.cuda, torch.mps, torch.xpu):
        monkeypatch.setattr(
            device, "manual_seed_all" if hasattr(device, "manual_seed_all") else "manual_seed", refuse
        )
    before = torch.get_rng_state()
    with seeded(7):
        drawn = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))


def test_no_code_seeds_devices_that_it_does_not_restore() -> None:
    """`torch.manual_seed` in a training alone, which owns all devices."""
    package = Path(netfission.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.manual_seed"
    }
    assert found == {"runs/lightning_module.py"}
