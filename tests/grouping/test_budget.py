"""A budget is what the network with all its paths costs, relative to the model."""

import re
import warnings
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import netfission as nf
from netfission import algorithm
from netfission.classifier.folder import NetworkSpec, network_state
from netfission.cli import main
from netfission.config import FissionConfig, RunConfig
from netfission.grouping.budget import TimedBudget, UnmetBudgetError, meet_budget, meet_time
from netfission.models import create_model
from netfission.profiling import timing
from netfission.profiling.macs import count_macs
from netfission.profiling.timing import Quartiles
from netfission.runs.finetune_settings import check_ensemble
from netfission.runs.folder import RunFolder
from netfission.runs.found_budget import FoundBudget
from netfission.runs.setup import build_network, load_run_data

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@cache
def model(name: str = "cifar-resnet18-w16") -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return create_model(name, 10)


def divided(
    budget: float | None = None, name: str = "cifar-resnet18-w16", *, exits: int = 3, **settings
) -> nf.FissionNetwork:
    settings = {"grouping": "channels", "example_input": IMAGES} | settings
    return nf.fission(model(name), exits, **settings | ({} if budget is None else {"budget": budget}))


def ratio(network: nn.Module, name: str = "cifar-resnet18-w16") -> float:
    return count_macs(network, IMAGES[:1]).dense / count_macs(model(name), IMAGES[:1]).dense


@pytest.mark.parametrize("budget", [0.4, 0.75, 1.3, 1.9])
def test_the_network_costs_its_budget(budget):
    assert ratio(divided(budget)) == pytest.approx(budget, rel=0.06)


def test_unequal_shares_and_late_exits_keep_the_budget():
    network = divided(0.8, ratio=[2.0, 1.0, 1.0], branch_after=["layer2", "layer3"])
    assert ratio(network) == pytest.approx(0.8, rel=0.05)
    first, second, _ = network.stage_copies(3).values()
    assert sum(p.numel() for p in first.parameters()) > 1.5 * sum(p.numel() for p in second.parameters())


@pytest.mark.parametrize("budget", [1.2, 1.5])
def test_very_unequal_paths_reach_a_larger_budget(budget):
    assert ratio(divided(budget, exits=2, ratio=[4.0, 1.0])) == pytest.approx(budget, rel=0.05)


def test_a_budget_that_steps_miss_is_told_after_five_divisions():
    asked = []

    def divide(cost: float) -> float:
        asked.append(cost)
        return 0.6

    with pytest.warns(
        UserWarning, match=r"^the network costs 0\.60 times the model, less than its budget of 0\.8"
    ):
        meet_budget(0.8, divide, lambda result: result, divided=0.5, copied=2.0, where="after b")
    assert len(asked) == 5


def test_products_of_attention_are_within_the_budget():
    name = "timm/test_vit"
    images = torch.rand(2, 3, 160, 160)
    network = divided(0.8, name, exits=2, example_input=images)
    whole = count_macs(model(name), images[:1]).dense
    assert count_macs(network, images[:1]).dense / whole == pytest.approx(0.8, rel=0.05)


def test_a_budget_of_1_changes_nothing():
    state, other = divided().state_dict(), divided(1.0).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_one_exit_has_no_budget_to_meet():
    network = nf.fission(model(), 1, grouping="channels", budget=0.5, example_input=IMAGES)
    assert ratio(network) == 1


def test_the_message_tells_a_budget_that_can_be_met():
    with pytest.raises(
        ValueError, match=r"^budget must be at least 0\.\d\d if exits leave after layer3, "
    ) as e:
        divided(0.3, branch_after=[3, 3])
    assert str(e.value).endswith("got 0.3; let them leave earlier")
    least = float(re.findall(r"0\.\d+", str(e.value))[0])
    assert ratio(divided(least, branch_after=[3, 3])) == pytest.approx(least, rel=0.05)


SMALL: dict[str, object] = {"name": "wrn-10-1", "exits": 2}


@pytest.mark.parametrize(("budget", "stage"), [(0.85, 2), (0.6, 1), (1.5, 1)])
def test_late_exits_leave_as_late_as_the_budget_can_be_met(budget, stage):
    network = divided(budget, branch_after="late", **SMALL)
    assert network.branch_after == (stage,)
    assert ratio(network, "wrn-10-1") == pytest.approx(budget, rel=0.06)
    if stage == 2:
        assert "exits leave after block2: late, so that" in network.summary()
    else:
        assert "exits leave after block1: as late as the budget can be met" in network.summary()
        with pytest.raises(ValueError, match=r"at (least|most) \d\.\d\d if exits leave after block2"):
            divided(budget, branch_after=[2], **SMALL)


@pytest.mark.parametrize("given", ["late", [1]])
def test_a_budget_that_no_branch_point_meets_is_told_with_what_is_nearest_to_it(given):
    with pytest.raises(
        ValueError, match=r"^budget must be at least 0\.\d\d if exits leave after block1"
    ) as e:
        divided(0.3, branch_after=given, **SMALL)
    assert str(e.value).endswith("got 0.3; use fewer exits")
    with pytest.raises(
        ValueError, match=r"^budget must be at most 1\.\d\d if exits leave after block1, what"
    ):
        divided(5.0, branch_after=given, **SMALL)


def test_late_exits_leave_as_late_as_the_time_of_the_budget_can_be_met(timed):
    network = divided(0.5, budget_in="time", branch_after="late", **SMALL)
    assert network.branch_after == (1,) and network.timed.time.median <= 0.5
    found = FoundBudget.of(network, {})
    asked = FissionConfig(grouping="channels", branch_after="late", budget_in="time", budget=0.5)
    assert (found.applied(asked).branch_after, found.applied(asked).budget) == ([1], network.timed.asked)


def test_a_run_keeps_the_branch_points_that_its_budget_asked_for(tmp_path):
    flags = "--data digits --limit-per-class 5 --model wrn-10-1 --exits 2 --grouping channels --epochs 1"
    late = ["--branch-after", "late", "--budget", "0.6"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that widths come in steps
        assert main(["train", *flags.split(), *late, "--out", str(tmp_path / "run")]) == 0
    folder = RunFolder(tmp_path / "run")
    assert folder.load_spec().fission["branch_after"] == [1]
    assert folder.load_config().fission.branch_after == "late"
    assert nf.Classifier.from_pretrained(tmp_path / "run").network.branch_after == (1,)


def test_more_than_whole_copies_is_refused():
    message = (
        r"^budget must be at most 2\.\d\d if exits leave after layer1, what whole copies cost, got 5\.0$"
    )
    with pytest.raises(ValueError, match=message):
        divided(5.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grouping": "weights"}, r"^budget must be 1\.0 unless grouping='channels', got 0\.5$"),
        ({"exact_partition": True}, r"^budget must be 1\.0 with exact_partition, got 0\.5$"),
    ],
)
def test_a_budget_beside_settings_without_one_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        divided(0.5, **settings)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_no_budget(budget):
    with pytest.raises(ValueError, match=r"^budget must be (a positive number|positive)"):
        divided(budget)


def test_a_saved_network_of_another_budget_is_the_same_again():
    network = divided(0.5).eval()
    fission = {"exits": 3, "grouping": "channels", "budget": 0.5}
    spec = NetworkSpec(
        "cifar-resnet18-w16", list("abcdefghij"), [3, 32, 32], [0.5] * 3, [0.2] * 3, fission, "0"
    )
    assert torch.equal(spec.restore(network_state(network))(IMAGES), network(IMAGES))


def test_what_widths_do_not_tell_is_measured():
    asked = []

    def divide(cost: float) -> float:
        asked.append(cost)
        return 0.5 + 0.9 * 0.5 * cost  # 10 % of the stages cost nothing

    reached = meet_budget(1.4, divide, lambda result: result, divided=0.5, copied=2.0, where="after block1")
    assert reached == pytest.approx(1.4, rel=0.05) and 1 < len(asked) <= 3


@given(
    budget=st.floats(0.4, 3.0),
    fixed=st.floats(0.0, 0.3),
    slope=st.floats(0.5, 1.5),
    bend=st.floats(-0.2, 0.2),
    steps=st.floats(0.005, 0.03),
)
def test_what_is_found_is_within_its_time_and_close_to_it(budget, fixed, slope, bend, steps):
    """Times that are no line, of widths that come in steps and reach something else than was asked."""

    def median(macs: float) -> float:
        return fixed + slope * macs + bend * macs * macs / (1 + macs)

    def divide(macs: float) -> float:
        return max(0.01, steps * round(macs / steps) * (1.1 if macs == budget else 1))

    found = meet_time(budget, divide, float, lambda macs: _quartiles(median(macs), 0.0), where="after b")
    assert found.macs == divide(found.asked)
    assert found.time.median == median(found.macs) <= budget
    assert found.time.median >= 0.95 * budget - 2 * steps * slope


def _quartiles(median: float, spread: float) -> Quartiles:
    return Quartiles(median * (1 - spread), median, median * (1 + spread))


def test_an_upper_quartile_far_above_is_too_slow():
    times = {1.0: _quartiles(0.99, 0.04)}
    found = meet_time(
        1.0, float, float, lambda macs: times.get(macs, _quartiles(macs, 0.04)), where="after b"
    )
    assert found.macs < 1 and found.time.upper <= 1.02


def test_a_busy_device_is_told_and_its_median_counts():
    with pytest.warns(
        UserWarning, match=r"^the times vary by 40% between the quartiles, as on a device that"
    ):
        found = meet_time(1.0, float, float, lambda macs: _quartiles(0.98 * macs, 0.2), where="after b")
    assert found.macs == 1.0


def test_the_narrowest_paths_are_tried_where_no_other_width_saves_time():
    def divide(macs: float) -> float:
        if macs < 0.1:
            raise UnmetBudgetError("budget must be at least 0.1", 0.1)
        return macs

    times = {0.1: _quartiles(0.5, 0.0)}
    found = meet_time(1.0, divide, float, lambda macs: times.get(macs, _quartiles(1.2, 0.0)), where="after b")
    assert found.macs == 0.1


def test_the_narrowest_paths_are_tried_before_a_budget_is_refused():
    def divide(macs: float) -> float:
        if macs < 0.4:
            raise UnmetBudgetError("budget must be at least 0.4", 0.4)
        return macs

    measured = []

    def measure(macs: float) -> Quartiles:
        measured.append(macs)
        return _quartiles(0.5 + macs, 0.0)

    assert meet_time(0.91, divide, float, measure, where="after b").macs == pytest.approx(0.4, rel=0.03)
    with pytest.raises(
        ValueError, match=r"^budget must be at least 0\.90 in time with exits after b, got 0\.8"
    ):
        meet_time(0.8, divide, float, measure, where="after b")
    assert measured[-1] == 0.4


def test_the_least_time_is_told_where_less_is_reached_than_was_asked():
    """The stages cannot be divided to cost what they did: 1.0 gives 1.3, and 1.1 is the narrowest."""

    def divide(macs: float) -> float:
        if macs < 1.1 and macs != 1.0:
            raise UnmetBudgetError("budget must be at least 1.1", 1.1)
        return 1.3 if macs == 1.0 else macs

    with pytest.raises(
        ValueError, match=r"^budget must be at least 1\.04 in time with exits after b, got 1\.0"
    ):
        meet_time(1.0, divide, float, lambda macs: _quartiles(macs - 0.06, 0.0), where="after b")


def test_whole_copies_that_take_less_than_the_budget_are_told():
    def divide(macs: float) -> float:
        if macs > 2:
            raise UnmetBudgetError("budget must be at most 2", 2.0)
        return macs

    message = r"^budget must be at most 1\.80 in time with exits after b, what whole copies take, got 3\.0"
    with pytest.raises(ValueError, match=message):
        meet_time(3.0, divide, float, lambda macs: _quartiles(0.9 * macs, 0.0), where="after b")


@pytest.fixture
def timed(monkeypatch):
    """Take the share of weights for the time, with a fixed part, not measured; return the batches."""
    batches = []

    def measure(network, reference, images, *, seconds):
        batches.append(images)
        weights, others = (sum(p.numel() for p in one.parameters()) for one in (network, reference))
        return _quartiles(0.2 + weights / others, 0.0)

    monkeypatch.setattr(algorithm, "relative_time", measure)
    monkeypatch.setattr(algorithm, "relative_step_time", None)
    monkeypatch.setattr(algorithm, "deploy", lambda network, images: network)
    return batches


def test_a_training_step_takes_the_time_of_its_budget(timed, monkeypatch):
    monkeypatch.setattr(algorithm, "relative_step_time", algorithm.relative_time)
    monkeypatch.setattr(algorithm, "relative_time", None)
    monkeypatch.setattr(algorithm, "deploy", None)  # what is trained is not deployed
    network = divided(1.0, budget_in="training", budget_batch_size=8)
    assert 0.97 <= network.timed.time.median <= 1.0 and 0.7 < network.config.budget < 0.9
    assert network.summary().count(" times its time for 8 images, a training step") == 1
    found = FoundBudget.of(network, {})
    assert found.text().startswith("budget in training: ") and found.text().endswith(", a training step")
    with pytest.raises(ValueError, match=r"^budget must be at least \d\.\d\d in training with exits after"):
        divided(0.1, budget_in="training")


@pytest.mark.parametrize("rest", [(), (4, 3)], ids=["labels", "maps"])
def test_what_is_timed_is_a_training_step(rest, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    class Exits(nn.Module):
        def __init__(self, forward, backward):
            super().__init__()
            self.weight, self.seconds = nn.Parameter(torch.ones(2, 5, *rest)), (forward, backward)

        def pass_time(self, seconds):
            clock[0] += seconds

        def forward(self, images):
            assert self.training
            self.pass_time(self.seconds[0])
            logits = images[:, :1].reshape(-1, *[1] * self.weight.ndim) * self.weight
            logits.register_hook(lambda _: self.pass_time(self.seconds[1]))
            return logits

    network, reference = Exits(1.0, 4.0), Exits(1.0, 1.0)
    ratio = timing.relative_step_time(network, reference, torch.rand(3, 1), seconds=0.1)
    assert ratio.median == 2.5 and network.weight.grad is None


def test_a_network_takes_the_time_of_its_budget(timed):
    network = divided(1.0, budget_in="time", budget_batch_size=8, linear_exits=["layer4"])
    assert 0.97 <= network.timed.time.median <= 1.0
    assert network.timed.macs == pytest.approx(ratio(network), rel=0.01)  # linear exits cost next to nothing
    assert network.timed.macs != network.timed.asked == network.config.budget
    assert {images.shape for images in timed} == {(8, 3, 32, 32)}
    assert network.config.budget_in == "macs" and 0.7 < network.config.budget < 0.9
    said = rf"^with {network.timed.macs:.2f} times the model's multiply-accumulates it takes [01]\.\d\d \("
    assert re.search(said + ".* times its time for 8 images", network.summary(), re.MULTILINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that widths come in steps
        again = nf.fission(
            model(),
            3,
            grouping="channels",
            example_input=IMAGES,
            **{name: getattr(network.config, name) for name in ("budget", "stages", "linear_exits")},
        )
    assert [p.shape for p in again.parameters()] == [p.shape for p in network.parameters()]


@pytest.mark.filterwarnings("error")
def test_a_network_that_is_faster_than_its_cost_is_not_reported_as_too_expensive(monkeypatch):
    monkeypatch.setattr(algorithm, "relative_time", lambda *_, **__: next(times))
    monkeypatch.setattr(algorithm, "deploy", lambda network, images: network)
    times = iter([_quartiles(0.7, 0.0), _quartiles(0.99, 0.0)])
    network = divided(1.0, budget_in="time")
    assert network.timed.asked > 1.2 and ratio(network) > 1.2


def test_time_is_really_measured(monkeypatch):
    monkeypatch.setattr(algorithm, "_TIMED", 0.1)
    settings = {"budget": 50.0, "budget_in": "time", "budget_batch_size": 1}
    message = (
        r"^budget must be at most (\d+\.\d\d) in time with exits after block1, what whole copies take, got 50"
    )
    with pytest.raises(ValueError, match=message) as told:
        nf.fission(
            create_model("wrn-10-1", 10),
            2,
            grouping="channels",
            example_input=IMAGES[:, :, :8, :8],
            **settings,
        )
    assert 0.1 < float(re.match(message, str(told.value))[1]) < 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget_in": "seconds"}, "^budget_in must be one of macs, time, training, got 'seconds'"),
        (
            {"budget_in": "time", "grouping": "weights"},
            "^budget_in must be 'macs' unless grouping='channels', got",
        ),
        (
            {"budget_in": "time", "exact_partition": True},
            "^budget_in must be 'macs' with exact_partition, got",
        ),
        ({"budget_batch_size": 0}, "^budget_batch_size must be a positive integer, got 0"),
    ],
)
def test_a_budget_in_time_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        divided(**settings)


def test_a_run_keeps_the_budget_that_it_found(timed, tmp_path, capsys):
    flags = "--data digits --limit-per-class 5 --model wrn-10-1 --exits 2 --grouping channels --epochs 1"
    command = ["train", *flags.split(), "--budget-in", "time", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    folder = RunFolder(tmp_path / "run")
    found = folder.load_budget()
    assert found.text() in capsys.readouterr().out and found.batch_size == 32 and found.timed.macs < 1
    spec = folder.load_spec().fission
    assert (spec["budget"], spec["budget_in"], spec["stages"]) == (found.timed.asked, "macs", found.stages)
    assert folder.load_config().fission.budget == 1
    weights = folder.weights.read_bytes()
    folder.weights.unlink()  # as if it had been stopped
    timed.clear()
    assert main([*command, "--resume"]) == 0
    assert not timed and folder.weights.read_bytes() == weights


def test_several_devices_cannot_find_a_budget(tmp_path, capsys):
    flags = ["--budget-in", "time", "--grouping", "channels", "--devices", "2", "--data", "digits"]
    assert main(["train", *flags, "--out", str(tmp_path / "run")]) == 2
    assert "--budget-in must be macs with several devices" in capsys.readouterr().err


def test_a_resumed_run_has_the_stages_that_it_began_with():
    stages = ["block1", "block2.0", "bn"]
    timed = TimedBudget(0.9, 0.9, _quartiles(1.0, 0.0))
    config = RunConfig.from_dict(
        {"data": "digits", "model": "wrn-16-1", "exits": 2, "grouping": "channels", "budget_in": "time"}
    )
    data = load_run_data(config.data, 0)
    network = build_network(config, data, budget=FoundBudget(timed, stages, 32, {}))
    assert list(network.stage_names) == stages and network.config.budget == 0.9


def test_the_check_before_a_fine_tuning_measures_no_time(monkeypatch):
    monkeypatch.setattr(algorithm, "relative_time", None)
    config = RunConfig.from_dict(
        {"data": "digits", "model": "wrn-16-1", "exits": 3, "grouping": "channels", "budget_in": "time"}
    )
    check_ensemble(config)
