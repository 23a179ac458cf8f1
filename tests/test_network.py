import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import netfission as nf
from netfission.models import create_model

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CLASSES = 10
LAYOUTS = {
    "one exit": [],
    "two exits": [1],
    "three exits": [1, 2],
    "late": [2],
    "several at one branch point": [1, 1, 2, 2, 1],
    "late before early": [2, 1],
}


def build(branch_after: list[int], grouping: str = "weights") -> nf.FissionNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("wrn-10-1", CLASSES)
        nn.init.normal_(model.fc.weight)  # logits well apart
    return nf.fission(
        model,
        len(branch_after) + 1,
        branch_after=branch_after,
        grouping=grouping,
        example_input=IMAGES,
    )


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def net(request: pytest.FixtureRequest) -> nf.FissionNetwork:
    return build(request.param)


def test_logits_are_those_of_each_path_run_alone(net: nf.FissionNetwork) -> None:
    net.eval()
    logits = net(IMAGES)
    assert logits.shape == (5, net.exits, CLASSES)
    for number, path in enumerate(net.paths):
        features = net.stem(IMAGES)
        if number:
            for stage in net.paths[0].stages[: net.branch_after[number - 1]]:
                features = stage(features)
        assert torch.equal(logits[:, number], path(features))


@pytest.mark.parametrize("training", [True, False])
def test_every_stage_runs_once(net: nf.FissionNetwork, training: bool) -> None:
    runs: Counter[str] = Counter()
    parts = {"stem": net.stem}
    for number, path in enumerate(net.paths):
        parts |= {f"{number}/{index}": stage for index, stage in enumerate(path.stages)}
        parts[f"{number}/head"] = path.head
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: runs.update([name]))
    net.train(training)(IMAGES)
    assert runs == dict.fromkeys(parts, 1)
    counts = [len(path.stages) for path in net.paths]
    assert counts == [3, *(3 - after for after in net.branch_after)]


def test_every_path_is_called_as_a_module(net: nf.FissionNetwork) -> None:
    """Hooks, profilers and sharding by path rest on it."""
    called: list[int] = []
    for number, path in enumerate(net.paths):
        path.register_forward_hook(lambda *_, number=number: called.append(number))
    net(IMAGES)
    assert sorted(called) == list(range(net.exits))


def test_a_path_returns_the_features_asked_for() -> None:
    path = build([1]).eval().exit_paths[0]
    features = torch.rand(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    logits, kept = path(features, [2, 0, 2])
    assert torch.equal(logits, path(features))
    assert kept[1] is features and kept[0] is kept[2]
    assert torch.equal(kept[0], path.stages[1](path.stages[0](features)))


def test_shared_norms_see_a_batch_once() -> None:
    net = build([1, 2]).train()
    net(IMAGES)
    counters = [value for name, value in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters and all(int(counter) == 1 for counter in counters)


@pytest.mark.parametrize("batch", [1, 2, 3, 17])
def test_any_batch_size(batch: int) -> None:
    net = build([1, 1, 2]).eval()
    images = torch.randn(batch, 3, 8, 8)
    logits = net(images)
    assert logits.shape == (batch, 4, CLASSES)
    assert torch.allclose(logits[:1], net(images[:1]), atol=1e-5)


@pytest.mark.parametrize("side", [8, 12, 32])
def test_any_image_size(side: int) -> None:
    assert build([1])(torch.randn(2, 3, side, side)).shape == (2, 2, CLASSES)


def test_an_exit_does_not_lean_on_the_paths_of_others() -> None:
    net = build([1, 1, 2]).eval()
    before = net(IMAGES)
    for number in range(1, net.exits):
        changed = copy.deepcopy(net)
        for parameter in changed.paths[number].parameters():
            nn.init.constant_(parameter, 0.5)
        after = changed(IMAGES)
        same = [torch.equal(before[:, k], after[:, k]) for k in range(net.exits)]
        assert same == [k != number for k in range(net.exits)]


def test_every_exit_teaches_the_stages_it_shares() -> None:
    net = build([2]).train()
    net(IMAGES)[:, 1].sum().backward()
    reached = {name for name, parameter in net.named_parameters() if parameter.grad.any()}
    expected = {
        name
        for name, _ in net.named_parameters()
        if name.startswith(("stem.", "paths.0.stages.0.", "paths.0.stages.1.", "paths.1."))
    }
    assert reached == expected


def test_ensemble_averages_the_exits(net: nf.FissionNetwork) -> None:
    net.eval()
    logits = net(IMAGES).double()
    assert torch.allclose(net.ensemble()(IMAGES).double(), logits.sum(1) / net.exits, atol=1e-5)
    mean = sum(logits[:, k].exp() / logits[:, k].exp().sum(1, keepdim=True) for k in range(net.exits))
    output = net.ensemble("probabilities")(IMAGES)
    assert output.shape == (5, CLASSES)
    assert torch.allclose(output.double().exp(), mean / net.exits, atol=1e-5)
    assert torch.allclose(output.softmax(1), output.exp(), atol=1e-6)


def test_the_two_averages_differ() -> None:
    net = build([1, 2]).eval()
    outputs = [net.ensemble(average)(IMAGES).softmax(1) for average in ("logits", "probabilities")]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_ensemble_shares_the_weights_and_follows_the_mode() -> None:
    net = build([1])
    ensemble = net.ensemble()
    assert isinstance(ensemble, nf.Ensemble)
    assert {id(p) for p in ensemble.parameters()} == {id(p) for p in net.parameters()}
    ensemble.eval()
    assert not net.training
    before = ensemble(IMAGES)
    nn.init.zeros_(net.paths[0].head.get_parameter("fc.weight"))
    assert not torch.equal(ensemble(IMAGES), before)


@pytest.mark.parametrize("training", [True, False])
def test_ensemble_takes_the_networks_mode_and_changes_none(training: bool) -> None:
    net = build([1]).train(training)
    net.stem.train(not training)
    before = [module.training for module in net.modules()]
    assert net.ensemble().training == training
    assert [module.training for module in net.modules()] == before


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of PyTorch 2.11, about its own code
def test_an_export_of_the_ensemble_leaves_the_network_in_eval_mode() -> None:
    net = build([1, 2]).eval()
    before = net(IMAGES)
    program = torch.onnx.export(net.ensemble(), (IMAGES,), dynamo=True, verbose=False)
    assert program is not None
    assert not any(module.training for module in net.modules())
    assert torch.equal(net(IMAGES), before)


def test_an_unknown_average_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^average must be one of logits, probabilities, got 'median'$"):
        build([1]).ensemble("median")  # type: ignore[arg-type]


def test_names_say_which_exit_and_which_parameter() -> None:
    net = build([1, 2])
    assert net.exits == 3
    assert net.branch_after == (1, 2)
    assert net.stage_names == ("block1", "block2", "bn")
    names = dict(net.named_parameters())
    assert {"stem.conv1.weight", "paths.0.stages.0.block1.0.conv1.weight"} <= set(names)
    assert {"paths.1.stages.0.block2.0.shortcut.weight", "paths.2.head.fc.weight"} <= set(names)
    assert "paths.2.stages.0.block2.0.shortcut.weight" not in names


def test_a_double_network_stays_double() -> None:
    net = build([1, 2]).double().eval()
    logits: Tensor = net(IMAGES.double())
    assert logits.dtype is torch.float64
    assert torch.allclose(logits.float(), build([1, 2]).eval()(IMAGES), atol=1e-4)
