import pytest
import torch
from torch import nn

import netfission as nf
from netfission.models import create_model

pytest.importorskip("segmentation_models_pytorch", reason="the extra segmentation is not installed")
NAME = "smp/fpn/test_resnet"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model(NAME, 5).eval()


def test_an_image_of_any_size_has_logits_for_each_pixel(model):
    images = torch.randn(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    padded = model.model(nn.functional.pad(images, (0, 14, 0, 24)))  # to what 32 divides
    assert logits.shape == (2, 5, 40, 50)
    assert torch.equal(logits, padded[..., :40, :50])


def test_it_is_divided_with_its_skip_connections(model):
    net = nf.fission(model, exits=3, grouping="channels", example_input=torch.randn(2, 3, 40, 50)).eval()
    assert "model.decoder" in net.stage_names and len(net.stage_names) > 3
    assert net(torch.randn(1, 3, 40, 50)).shape == (1, 3, 5, 40, 50)


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_a_classifier_are_those_of_the_encoder(wrapped, tmp_path):
    torch.manual_seed(1)
    classifier = create_model("test_resnet", 7)
    state = (nn.ModuleDict({"net": classifier}) if wrapped else classifier).state_dict()
    torch.save(state, tmp_path / "net.pt")
    reports = []
    model = create_model(NAME, 5, weights=tmp_path / "net.pt", report=reports.append)
    (report,) = reports
    trained = classifier.state_dict()
    encoder = {name.removeprefix("model.encoder.model."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(encoder[name], value) for name, value in trained.items() if name[:3] != "fc.")
    assert report.loaded == len(trained) - 2
    assert {name.rpartition("fc.")[2] for name in report.unused} == {"weight", "bias"}
    assert all(name.startswith(("model.decoder", "model.segmentation_head")) for name in report.new)
    assert len(str(report)) < 300 and "tensors (model.decoder" in str(report)
    decoder = dict(model.model.decoder.named_parameters())
    assert decoder["p5.weight"].std() > 0.02  # not scaled down as a classifier is
    assert model.model.segmentation_head[0].weight.std() < 0.0101


def test_weights_of_the_whole_network_are_all_loaded(model, tmp_path):
    torch.save(model.model.state_dict(), tmp_path / "net.pt")
    reports = []
    other = create_model(NAME, 6, weights=tmp_path / "net.pt", report=reports.append)
    assert set(reports[0].new) == {
        "model.segmentation_head.0.weight",
        "model.segmentation_head.0.bias",
    }
    assert torch.equal(other.model.decoder.p5.weight, model.model.decoder.p5.weight)


def test_weights_of_another_encoder_are_refused(tmp_path):
    torch.save(create_model("wrn-10-1", 7).state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net\.pt must be weights of smp/fpn/test_resnet.*missing"):
        create_model(NAME, 5, weights=tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smp/unett/resnet18", "architecture among unet, .*did you mean unet"),
        ("smp/unet", "must be smp/ARCHITECTURE/ENCODER, got .smp/unet.; such as smp/unet/resnet18"),
        ("smp/unet/resnet19", "an encoder of .*did you mean resnet18"),
        ("smp/dpt/resnet18", "fit each other, got smp/dpt/resnet18 .Only Timm encoders"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, 5)


def test_paths_are_not_dropped():
    with pytest.raises(ValueError, match="drop_path must be 0 for networks of seg"):
        create_model(NAME, 5, drop_path=0.1)


def test_weights_of_a_deeper_encoder_are_refused(tmp_path):
    torch.save(create_model("resnet34", 7).state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net\.pt must be weights of smp/fpn/resnet18"):
        create_model("smp/fpn/resnet18", 5, weights=tmp_path / "net.pt")


def test_weights_of_a_network_with_another_decoder_are_taken_for_its_encoder(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "net.pt")
    reports = []
    other = create_model("smp/linknet/test_resnet", 5, weights=tmp_path / "net.pt", report=reports.append)
    assert all(name.startswith(("model.decoder", "model.segmentation_head")) for name in reports[0].new)
    state = model.model.encoder.state_dict()
    assert all(torch.equal(state[name], value) for name, value in other.model.encoder.state_dict().items())
