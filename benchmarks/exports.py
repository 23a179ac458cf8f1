"""Every kind of network, fissioned by every grouping: saved, loaded and exported, with the differences.

The networks have two exits with random weights, and run on 8 images of noise. `loaded` says whether a network
saved by `save_pretrained` gives the same logits bit for bit. `difference` is the largest difference of a
probability between PyTorch and the file in its own runtime; above 1e-4 no file is kept. The results are
written to results/benchmark_exports.json after each network.

    .venv/bin/python benchmarks/exports.py --formats onnx,pt2
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import netfission as nf
from netfission.export import export
from netfission.export.write import Format
from netfission.models import create_model
from netfission.runs.folder import environment
from netfission.utils.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_exports.json"
GROUPINGS = ("weights", "channels", "copies")
CLASSES = 10
VIT = ["blocks.3", "blocks.7", "blocks.11"]
SWIN = ["layers.0", "layers.1", "layers.2", "layers.3"]
MODELS: Mapping[str, tuple[int, list[str] | None]] = {  # side of the images; stages, if none are found
    "cifar-resnet18-w16": (32, None),
    "wrn-10-1": (32, None),
    "torchvision/resnet18": (64, None),
    "torchvision/resnet50": (64, None),
    "torchvision/densenet121": (64, None),
    "torchvision/mobilenet_v3_small": (64, None),
    "torchvision/convnext_tiny": (64, None),
    "torchvision/vgg11_bn": (64, None),
    "timm/resnet18": (64, None),
    "timm/resnext50_32x4d": (64, None),
    "timm/wide_resnet50_2": (64, None),
    "timm/convnext_atto": (64, None),
    "timm/convnextv2_atto": (64, None),
    "timm/regnety_002": (64, None),
    "timm/efficientnet_b0": (64, None),
    "timm/mobilenetv3_small_100": (64, None),
    "timm/vit_tiny_patch16_224": (224, VIT),
    "timm/deit_tiny_patch16_224": (224, VIT),
    "timm/swin_tiny_patch4_window7_224": (224, SWIN),
}


def create_single(model: str, num_classes: int, in_channels: int) -> nn.Module:
    """Return the single network; VGG, whose head holds nine tenths of its weights, gets one of one layer."""
    network = create_model(model, num_classes, in_channels=in_channels)
    if "vgg" in model:
        network.classifier = nn.Linear(25088, num_classes)
    return network


def build_classifier(model: str, grouping: str) -> nf.Classifier:
    """Return a classifier whose exit branches off after stage 2, since not every stage 1 can be divided."""
    side, stages = MODELS[model]
    torch.manual_seed(0)
    example = torch.zeros(2, 3, side, side)
    network = nf.fission(
        create_single(model, CLASSES, 3),
        2,
        branch_after=[2],
        stages=stages,
        grouping=grouping,
        example_input=example,
    )
    return nf.Classifier.from_network(
        network,
        model=None,
        classes=[str(label) for label in range(CLASSES)],
        shape=(3, side, side),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def measure(classifier: nf.Classifier, model: str, formats: list[Format]) -> dict[str, Any]:
    """Save, load and export a classifier; return the differences."""
    images = torch.randint(256, (8, *classifier.spec.shape), dtype=torch.uint8)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classifier.save_pretrained(folder)
        loaded = nf.Classifier.from_pretrained(folder, factory=partial(create_single, model))
        results["loaded"] = torch.equal(loaded.logits(images), classifier.logits(images))
        for format in formats:
            start = time.perf_counter()
            try:
                exported = export(classifier, folder / f"model.{format}", images, format=format)
            except (ValueError, RuntimeError) as error:
                results[format] = {"error": str(error)}
                continue
            results[format] = {
                "difference": exported.difference,
                "mib": exported.path.stat().st_size / 2**20,
                "seconds": time.perf_counter() - start,
            }
    return results


def main() -> None:
    """Measure all networks, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="default: all")
    parser.add_argument("--groupings", default=",".join(GROUPINGS), help="default: all")
    parser.add_argument("--formats", default="onnx,pt2", help="default: both")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to write (default: %(default)s)")
    flags = parser.parse_args()
    formats: list[Format] = flags.formats.split(",")
    rows: list[dict[str, Any]] = []
    for model in flags.models.split(","):
        for grouping in flags.groupings.split(","):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about stages whose paths cost more than the stage
                row = {"model": model, "grouping": grouping}
                try:
                    row |= measure(build_classifier(model, grouping), model, formats)
                except ValueError as error:
                    row |= {"error": str(error)}
            rows.append(row)
            print(row, flush=True)
            record = {"benchmark": "exports", "images": 8, "rows": rows, "environment": environment()}
            write_whole(flags.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
