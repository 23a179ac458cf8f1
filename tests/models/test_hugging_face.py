import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import netfission as nf
from netfission.cli import main
from netfission.models import WeightsReport, create_model
from netfission.profiling.macs import count_macs
from netfission.runs.folder import RunFolder

transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")

ATTENTION = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTConfig", ATTENTION | {"intermediate_size": 48, "patch_size": 8}),
    "deit": ("DeiTConfig", ATTENTION | {"intermediate_size": 48, "patch_size": 8}),
    "dinov2": ("Dinov2Config", ATTENTION | {"mlp_ratio": 2, "patch_size": 8}),
    "swin": (
        "SwinConfig",
        {"embed_dim": 12, "depths": [1, 1, 2], "num_heads": [3, 3, 6], "window_size": 4, "patch_size": 2}
        | {"image_size": 32},
    ),
    "convnext": ("ConvNextConfig", {"hidden_sizes": [12, 24, 48], "depths": [2, 2, 2], "num_stages": 3}),
    "resnet": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2]},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("hf")
    for name, (kind, settings) in CONFIGS.items():
        getattr(transformers, kind)(**settings).save_pretrained(path / name)
    return {name: path / name for name in CONFIGS}


def _images(count: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 32, 32, generator=torch.Generator().manual_seed(0))


def _create(folder: Path, classes: int = 5, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model(f"hf/{folder}", classes, **options)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def _other_weights(folder: Path) -> Path:
    torch.save(create_model("wrn-10-1", 7).state_dict(), folder / "other.pt")
    return folder / "other.pt"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_gives_a_classifier_with_weights_of_the_seed(
    name: str, folders: dict[str, Path]
) -> None:
    model = _create(folders[name], in_channels=1)
    assert model.training
    assert copy.deepcopy(model)(_images(channels=1)).shape == (2, 5)
    assert not _differing(model.state_dict(), _create(folders[name], in_channels=1).state_dict())
    torch.manual_seed(1)
    assert _differing(model.state_dict(), create_model(f"hf/{folders[name]}", 5, in_channels=1).state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_channels_are_divided_at_the_cost_of_the_network(
    name: str, folders: dict[str, Path], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, images = _create(folders[name]), _images()
    net = nf.fission(model, 3, grouping="channels", example_input=images)
    assert net(images).shape == (2, 3, 5)
    assert count_macs(net, images).dense <= 1.05 * count_macs(model, images).dense
    widths = {
        tuple(parameter.shape)
        for path in net.exit_paths[1:]
        for key, parameter in path.named_parameters()
        if "head" not in key
    }
    assert widths - {tuple(parameter.shape) for parameter in model.parameters()}  # paths are narrower
    assert capfd.readouterr().err == ""
    classifier = nf.Classifier.from_network(
        net,
        model=f"hf/{folders[name]}",
        classes=list("abcde"),
        shape=[3, 32, 32],
        mean=[0.5] * 3,
        std=[0.2] * 3,
    )
    classifier.save_pretrained(tmp_path / "saved")
    again = nf.Classifier.from_pretrained(tmp_path / "saved").network
    assert torch.equal(again(images), net.eval()(images))


@pytest.mark.parametrize("grouping", ["weights", "copies"])
@pytest.mark.parametrize("name", CONFIGS)
def test_other_groupings(name: str, grouping: str, folders: dict[str, Path]) -> None:
    model, images = _create(folders[name]), _images()
    net = nf.fission(model, 3, grouping=grouping, example_input=images)
    loss = nf.EnsembleDistillationLoss(temperature=3.0)(net(images), torch.zeros(2).long())
    loss.backward()
    assert all(p.grad is not None for p in net.exit_paths[1].head.parameters())
    whole = nf.fission(model, 1, grouping=grouping, example_input=images)
    assert torch.equal(whole.eval()(images)[:, 0], model.eval()(images))


def test_weights_are_float32_whatever_the_configuration_says(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = json.loads((folders["vit"] / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps(settings | {"dtype": "float16", "torch_dtype": "float16"})
    )
    assert {parameter.dtype for parameter in _create(tmp_path).parameters()} == {torch.float32}


def test_blocks_are_skipped_in_training_if_the_model_can(folders: dict[str, Path]) -> None:
    images = _images()
    model = _create(folders["dinov2"], drop_path=0.9)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))
    net = nf.fission(model, 3, grouping="channels", example_input=images).train()
    assert not torch.equal(net(images), net(images))
    with pytest.raises(ValueError, match=r"^drop_path must be 0 for 'hf/.*', which has no paths to drop"):
        _create(folders["resnet"], drop_path=0.9)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_run(name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders[name].parent)
    flags = (
        f"--data digits --limit-per-class 5 --image-size 32 --model hf/{name} --exits 3 --grouping channels"
    )
    out = tmp_path / "run"
    assert main(["train", *flags.split(), "--epochs", "1", "--optimizer", "adamw", "--out", str(out)]) == 0
    monkeypatch.chdir(tmp_path)  # from where the folder has another relative path
    assert RunFolder(out).load_config().model.model == f"hf/{folders[name]}"
    folder = RunFolder(out)
    evaluation = folder.evaluation.read_bytes()
    assert main(["evaluate", str(out)]) == 0
    assert folder.evaluation.read_bytes() == evaluation


def test_published_weights_of_a_folder_are_kept_but_for_another_classifier(
    tmp_path: Path, folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    trained = _create(folders["vit"], 7)
    trained.model.save_pretrained(tmp_path)
    capfd.readouterr()
    name = f"hf/{tmp_path}"
    same = create_model(name, 7, pretrained=True)
    assert not _differing(trained.state_dict(), same.state_dict())
    assert same.training
    other = create_model(name, 5, pretrained=True).state_dict()
    kept = {key: tensor for key, tensor in trained.state_dict().items() if "classifier" not in key}
    assert len(kept) == len(other) - 2
    assert not _differing(kept, other)
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match=rf"^in_channels must be 3 for {name}, got 1$"):
        create_model(name, 7, in_channels=1, pretrained=True)
    reports: list[WeightsReport] = []
    file = tmp_path / "model.safetensors"  # in which transformers has other names
    loaded = create_model(name, 5, weights=file, report=reports.append).state_dict()
    assert not _differing(kept, loaded)
    assert reports[0].new == reports[0].unused == ("model.classifier.weight", "model.classifier.bias")
    stored = {f"module.{key}": tensor for key, tensor in load_file(file).items()}
    torch.save(stored, tmp_path / "net.pt")
    loaded = create_model(name, 7, weights=tmp_path / "net.pt", report=reports.append).state_dict()
    assert not _differing(trained.state_dict(), loaded)
    assert (reports[1].prefix, reports[1].new, reports[1].by_order) == ("module.", (), False)
    with pytest.raises(ValueError, match=r"must be weights of hf/.*, got .* missing \(model\.vit"):
        create_model(name, 7, weights=_other_weights(tmp_path))

    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(settings | {"intermediate_size": 40}))
    expected = rf"^pretrained must be False for '{name}', got published weights without model\.vit\."
    with pytest.raises(ValueError, match=expected.replace("model\\.vit", "vit")):
        create_model(name, 7, pretrained=True)


def test_images_are_of_the_size_that_the_settings_name(folders: dict[str, Path]) -> None:
    net = nf.fission(_create(folders["vit"]), 3, grouping="copies")  # without example_input
    assert net(_images()).shape == (2, 3, 5)
    model = _create(folders["vit"])
    with pytest.raises(ValueError, match=r"^example_input must be .*16\*16.* \(32\*32\)") as caught:
        nf.fission(copy.deepcopy(model), 3, example_input=torch.zeros(2, 3, 16, 16))
    assert "\n" not in str(caught.value)


def test_what_is_no_image_classifier_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    def refusal(folder: Path | str, **options: Any) -> str:
        with pytest.raises(ValueError, match=r"^(model|pretrained) must be ") as caught:
            create_model(f"hf/{folder}", 5, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"got hf/{tmp_path}, a folder without config.json" in refusal(tmp_path)
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    assert refusal(tmp_path).endswith(f"got hf/{tmp_path} of type bert, which classifies no images")
    (tmp_path / "config.json").write_text("{")
    assert "without readable config.json (" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert f"got hf/{tmp_path} (Unrecognized model" in refusal(tmp_path)
    assert "without readable weights (" in refusal(folders["vit"], pretrained=True)
    with pytest.raises(ValueError, match=r"^model must be hf/NAME .*got hf/a/b/c without readable"):
        create_model("hf/a/b/c", 5)
    assert refusal("").endswith("with config.json, got 'hf/'")


def test_a_name_on_the_hub_without_network_is_soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"^cannot download config\.json of 'hf/someone/net', and it is .* folder"
    ):
        create_model("hf/someone/net", 5)
    assert time.monotonic() - start < 20
