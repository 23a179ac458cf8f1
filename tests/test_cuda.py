"""What runs other operations on a GPU than on a CPU. Skipped where there is none."""

import pytest
import timm
import torch

import netfission as nf
from netfission.tasks.base import Task
from netfission.tasks.multilabel import Multilabel
from netfission.tasks.regression import Regression

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


@pytest.mark.parametrize("task", [Multilabel(["a", "b"]), Regression(["a", "b"])], ids=["labels", "numbers"])
def test_targets_are_predicted_on_the_device_of_the_outputs(task: Task) -> None:
    outputs = torch.randn(20, 2, task.outputs)
    calibration = task.calibrate(outputs, torch.randint(2, (20, 2)).float(), average="logits")
    records = [
        task.predict(part, average="logits", calibration=calibration).records()
        for part in (outputs, outputs.cuda())
    ]
    for ours, theirs in zip(*records, strict=True):
        for name, values in ours.items():
            assert theirs[name] == (pytest.approx(values) if name != "labels" else values)
