import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from netfission import Classifier
from netfission.cli import main
from netfission.models import CifarResNet, WideResNet, create_model
from netfission.surgery.example import input_size


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("cifar-resnet18-w4", 1),
        ("wrn-10-1", 2),
        ("resnet10t", 1),
        ("timm/convnext_atto", 3),
        ("resnet10t.c3_in1k", 3),
        ("torchvision/squeezenet1_1", 3),
        ("torchvision/googlenet", 3),
    ],
)
def test_contract_of_every_family(name: str, channels: int) -> None:
    model = create_model(name, 7, in_channels=channels).train()
    logits = model(torch.randn(2, channels, 64, 64))
    assert logits.shape == (2, 7)


def test_names_carry_depth_and_width() -> None:
    resnet = create_model("cifar-resnet34-w8", 3)
    assert isinstance(resnet, CifarResNet)
    assert (resnet.conv1.out_channels, len(resnet.layer3)) == (8, 6)
    wide = create_model("wrn-22-3", 3)
    assert isinstance(wide, WideResNet)
    assert (wide.fc.in_features, len(wide.block2)) == (192, 3)
    assert create_model("cifar-resnet18", 2).get_submodule("fc").in_features == 512


def test_same_seed_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(create_model("wrn-10-1", 3).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, states), strict=True))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("cifar-resnt18", "cifar-resnet18"),
        ("wrn28-10", "wrn-28-10"),
        ("resnte18", "resnet18"),
        ("timm/convnext_ato", "convnext_atto"),
        ("resnet18.a1_in2k", "resnet18.a1_in1k"),
        ("torchvision/resnet19", "torchvision/resnet18"),
        ("torchvision/lraspp_mobilenet", "torchvision/lraspp_mobilenet_v3_large"),
    ],
)
def test_unknown_name_lists_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^model must be cifar-resnet18\|.*, got '{name}'; did you mean"
    ) as caught:
        create_model(name, 10)
    assert nearest in str(caught.value).split("did you mean ")[1]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wrn-27-10", {}, "depth must be 6n"),
        ("cifar-resnet20", {}, "depth must be one of 18, 34, 50, got 20"),
        ("torchvision/resnet18", {"in_channels": 1}, "in_channels must be 3 for torchvision"),
        (
            "wrn-16-2",
            {"pretrained": True},
            "pretrained must be False for 'wrn-16-2', which has no published weights, got True",
        ),
        ("timm/test_efficientnet_gn", {"in_channels": 0}, "in_channels must be a positive integer, got 0"),
        ("wrn-16-2", {"num_classes": 0}, "num_classes must be a positive integer, got 0"),
    ],
)
def test_bad_requests(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **{"num_classes": 10} | options)


def test_a_timm_model_made_for_one_size_is_made_for_that_of_the_images() -> None:
    model = create_model("test_vit", 3, image_size=(32, 48))
    assert model(torch.rand(2, 3, 32, 48)).shape == (2, 3)
    assert input_size(model) == (3, 32, 48)
    assert input_size(create_model("test_vit", 3)) == (3, 160, 160)
    assert input_size(create_model("test_vit", 3, image_size=(160, 160))) == (3, 160, 160)


def test_a_run_of_such_a_model_is_made_for_its_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--exits",
        "1",
        "--image-size",
        "32",
        "--limit-per-class",
        "2",
        "--validation",
        "0",
        "--epochs",
        "1",
    ]
    run = str(tmp_path / "run")
    assert main(["train", "--model", "test_vit", *flags, "--out", run]) == 0
    assert Classifier.from_pretrained(run).logits(torch.zeros(1, 1, 32, 32, dtype=torch.uint8)).shape == (
        1,
        1,
        10,
    )
    assert main(["cost", "test_vit", "--image-size", "32", "--exits", "1", "--rounds", "1"]) == 0


def test_a_timm_model_that_cannot_be_made_for_a_size_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"^image_size must be a size that nest_tiny accepts, got images of 50×50 \("
    ):
        create_model("nest_tiny", 3, image_size=(50, 50))


def test_timm_model_without_weights_refuses_pretrained() -> None:
    bare = next(n for n in timm.list_models("resnet*") if not timm.is_model_pretrained(n))
    with pytest.raises(ValueError, match=f"pretrained must be False for '{bare}'"):
        create_model(bare, 10, pretrained=True)


@pytest.mark.parametrize("classes", [1000, 5])
def test_torchvision_pretrained_keeps_all_but_an_unfit_classifier(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = models.get_model("squeezenet1_1", weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published)
    loaded = create_model("torchvision/squeezenet1_1", classes, pretrained=True).state_dict()
    different = {key for key in published if not torch.equal(published[key], loaded[key])}
    assert different == (set() if classes == 1000 else {"classifier.1.weight", "classifier.1.bias"})


@pytest.mark.parametrize("classes", [21, 5])
def test_pretrained_networks_of_pixels_keep_all_but_an_unfit_classifier(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "lraspp_mobilenet_v3_large"
    published = models.get_model(name, weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published)
    model = create_model(f"torchvision/{name}", classes, pretrained=True).eval()
    assert model(torch.rand(1, 3, 40, 56))["out"].shape == (1, classes, 40, 56)
    loaded = model.state_dict()
    different = {key for key in published if not torch.equal(published[key], loaded[key])}
    layers = ("low", "high") if classes == 5 else ()
    kinds = ("weight", "bias")
    assert different == {f"classifier.{layer}_classifier.{kind}" for layer in layers for kind in kinds}


@pytest.mark.parametrize("classes", [1000, 5])
@pytest.mark.parametrize("name", ["timm/test_efficientnet", "torchvision/efficientnet_b0"])
@pytest.mark.parametrize("source", ["published", "file"])
def test_a_new_classifier_of_trained_features_starts_with_small_logits(
    source: str, name: str, classes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = create_model(name, 1000).eval()
    file = tmp_path / "net.pth"
    torch.save(trained.state_dict(), file)
    of_file = partial(timm.create_model, pretrained_cfg_overlay={"file": str(file)})
    monkeypatch.setattr("timm.create_model", of_file)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: torch.load(file))
    options: dict[str, Any] = {"pretrained": True} if source == "published" else {"weights": file}
    model = create_model(name, classes, **options).eval()
    images = torch.randn(4, 3, 64, 64)
    logits = model(images)
    if classes == 1000:
        assert torch.equal(logits, trained(images))
    else:
        *_, classifier = (module for module in model.modules() if isinstance(module, nn.Linear))
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not classifier.bias.any()


def test_published_weights_of_timm_without_network_are_soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"weights of 'resnet10t', .* set pretrained to false"):
        create_model("resnet10t", 10, pretrained=True)
    assert time.monotonic() - start < 20


def test_pretrained_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    monkeypatch.setattr("timm.create_model", fail)
    for name in ("torchvision/squeezenet1_1", "timm/resnet10t"):
        with pytest.raises(ConnectionError, match=f"weights of '{name}', .* set pretrained to false"):
            create_model(name, 10, pretrained=True)


def test_import_pulls_in_no_zoo() -> None:
    code = (
        "import sys, netfission.models; assert not {'timm', 'torchvision', 'datasets', 'lightning'}"
        " & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["wrn-10-1", "torchvision/resnet18", "vgg11"])
def test_paths_are_dropped_by_models_that_have_them_alone(name):
    with pytest.raises(
        ValueError, match=rf"^drop_path must be 0 for '{name}', which has no paths to drop, got 0\.2$"
    ):
        create_model(name, 10, drop_path=0.2)
    model = create_model("convnext_atto", 10, drop_path=0.2)
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.2)
