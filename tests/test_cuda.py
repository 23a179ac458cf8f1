"""What runs other operations on a GPU than on a CPU. Skipped where there is none."""

import pytest
import timm
import torch

import netfission as nf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("grouping", ["channels", "weights", "copies"])
@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_a_model_on_a_gpu_is_divided_there_as_on_a_cpu(name: str, grouping: str) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(4, 3, 224, 224)
    expected = nf.fission(model, grouping=grouping, example_input=images)
    net = nf.fission(model.cuda(), grouping=grouping, example_input=images.cuda())
    assert {parameter.device.type for parameter in net.parameters()} == {"cuda"}
    state = net.state_dict()
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[key].cpu(), tensor)


def test_paths_are_reconstructed_on_a_gpu() -> None:
    model = timm.create_model("tf_efficientnet_lite0", num_classes=10).cuda()
    images = torch.randn(32, 3, 64, 64, device="cuda")
    batches = [(images, torch.zeros(32, dtype=torch.long, device="cuda"))]
    settings = {"grouping": "channels", "branch_after": [4, 4], "batches": batches}
    whole = model.eval()(images)
    errors = [
        (nf.fission(model, reconstruct=solved, **settings).eval()(images) - whole[:, None]).square().mean()
        for solved in (True, False)
    ]
    assert errors[0] < errors[1] / 2
