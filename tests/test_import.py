"""`import netfission` is the method alone."""

import subprocess
import sys

OTHERS = ["datasets", "jsonargparse", "lightning", "matplotlib", "pytorch_lightning", "sklearn"]
OTHERS += ["tensorboard", "timm", "torchmetrics", "torchvision"]


def printed(code: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_import_pulls_in_no_trainer_no_zoo_and_no_data_sets() -> None:
    code = f"import sys, netfission; print(sorted(set({OTHERS!r}) & set(sys.modules)))"
    assert printed(code) == "[]"


def test_public_names_are_sorted_and_exist() -> None:
    missing = "{n for n in nf.__all__ if not hasattr(nf, n)}"
    code = f"import netfission as nf; print(sorted(nf.__all__) == nf.__all__, {missing})"
    assert printed(code) == "True set()"
