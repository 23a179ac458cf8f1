import copy

import pytest
import torch
from torch import Tensor, nn

import netfission as nf
from netfission.grouping import CopyGrouping, Stage
from netfission.models import create_model

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def stage() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def deal(
    stage: nn.Module, kept: dict[str, Tensor], shares: list[float], generator: torch.Generator
) -> list[nn.Module]:
    return CopyGrouping().split(Stage(stage, IMAGES), kept, shares, generator, {}).paths


def test_copies_choose_no_cost(stage: nn.Sequential) -> None:
    split = CopyGrouping().split(Stage(stage, IMAGES), {}, [1.0, 1.0], seeded(), {})
    assert (split.cost, split.kept, split.repeated) == (1, (), ())


def test_exit_0_keeps_the_weights_and_the_others_get_them_in_another_order(stage: nn.Sequential) -> None:
    given = copy.deepcopy(stage.state_dict())
    first, *others = deal(stage, {}, [1.0, 1.0, 1.0], seeded())
    assert list(first.state_dict()) == list(given)
    assert all(torch.equal(value, given[name]) for name, value in first.state_dict().items())
    assert all(torch.equal(value, given[name]) for name, value in stage.state_dict().items())
    for other in others:
        for name, value in other.state_dict().items():
            shuffled = name in {"0.weight", "2.weight"}
            assert torch.equal(value, given[name]) != shuffled
            assert torch.equal(value.flatten().sort().values, given[name].flatten().sort().values)
    assert not torch.equal(others[0].get_parameter("0.weight"), others[1].get_parameter("0.weight"))
    every = [parameter.data_ptr() for path in (stage, first, *others) for parameter in path.parameters()]
    assert len(set(every)) == len(every)


def test_copies_of_trained_weights_get_noise_of_their_own(stage: nn.Sequential) -> None:
    torch.nn.init.normal_(stage[0].weight, 1.0, 0.5, generator=seeded(2))
    given = copy.deepcopy(stage.state_dict())
    first, *others = CopyGrouping(0.1).split(Stage(stage, IMAGES), {}, [1.0] * 3, seeded(), {}).paths
    assert all(torch.equal(value, given[name]) for name, value in first.state_dict().items())
    weight = given["0.weight"]
    noises = [other.get_parameter("0.weight") - weight for other in others]
    for noise in noises:
        assert 0.08 < noise.std() / weight.std() < 0.12
        assert abs(noise.mean()) < 0.05 * weight.std()
    assert torch.corrcoef(torch.stack([noise.flatten() for noise in noises]))[0, 1].abs() < 0.3
    assert all(torch.equal(other.get_parameter("0.bias"), given["0.bias"]) for other in others)


def test_paths_share_the_mask_of_pruning(stage: nn.Sequential) -> None:
    kept = {"0.weight": torch.rand(4, 3, 3, 3, generator=seeded(1)) > 0.5}
    for path in deal(stage, kept, [1.0, 2.0], seeded()):
        weight = path.get_parameter("0.weight")
        assert torch.equal(path.get_buffer("0.weight_removed"), ~kept["0.weight"])
        assert not weight[~kept["0.weight"]].any()
        assert weight[kept["0.weight"]].all()
        assert path.get_parameter("2.weight").all()


def test_the_generator_decides(stage: nn.Sequential) -> None:
    def second(seed: int) -> Tensor:
        return deal(stage, {}, [1.0, 1.0], seeded(seed))[1].get_parameter("0.weight")

    state = torch.get_rng_state()
    assert torch.equal(second(0), second(0))
    assert not torch.equal(second(0), second(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_whole_network_of_copies(sparsity: float) -> None:
    model = create_model("wrn-10-1", 10)
    given = dict(model.named_parameters())
    settings = {"sparsity": sparsity, "criterion": "magnitude", "example_input": IMAGES}
    net = nf.fission(model, 3, grouping="copies", **settings)
    single = nf.fission(model, 1, grouping="copies", **settings)
    assert any(name.endswith("_removed") for name in net.state_dict()) == (sparsity > 0)
    alone = single.state_dict()
    for name, value in net.state_dict().items():
        exit_, _, rest = name.partition(".stages.")
        if name in alone and not name.startswith(("paths.1", "paths.2")):
            assert torch.equal(value, alone[name])
        elif rest and name.endswith("_removed"):
            stage, _, end = rest.partition(".")
            shared = net.branch_after[int(exit_.removeprefix("paths.")) - 1]
            assert torch.equal(value, alone[f"paths.0.stages.{int(stage) + shared}.{end}"])
    heads = [path.head.state_dict() for path in net.paths]
    assert all(torch.equal(head["fc.weight"], given["fc.weight"]) for head in heads)
    logits = net.eval()(IMAGES)
    assert torch.equal(logits[:, 0], single.eval()(IMAGES)[:, 0])
    assert not torch.allclose(logits[:, 0], logits[:, 1]) and not torch.allclose(logits[:, 1], logits[:, 2])
